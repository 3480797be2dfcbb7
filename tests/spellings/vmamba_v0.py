"""As VMamba's v0: stack, flip and cat; einsum; a merge that stays flat; a gate."""

from functools import partial

import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import nn


class SS2D(nn.Module):
    def __init__(self, dim, one_by_one, d_state=4, rank=2):
        super().__init__()
        inner = 2 * dim
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, kernel_size=3, padding=1, groups=inner)
        self.act = nn.SiLU()
        self.x_proj_weight = nn.Parameter(torch.zeros(4, rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.zeros(4, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.zeros(4, inner))
        self.A_logs = nn.Parameter(torch.zeros(4 * inner, d_state))
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.forward_core = self.forward_each if one_by_one else self.forward_together

    def projected(self, x):
        batch, _, height, width = x.shape
        length = height * width
        _, states = self.A_logs.shape
        count, _, rank = self.dt_projs_weight.shape
        both = [x.view(batch, -1, length), torch.transpose(x, 2, 3).contiguous().view(batch, -1, length)]
        forwards = torch.stack(both, dim=1).view(batch, 2, -1, length)
        xs = torch.cat([forwards, torch.flip(forwards, dims=[-1])], dim=1)
        narrow = torch.einsum("b k d l, k c d -> b k c l", xs, self.x_proj_weight)
        dts, Bs, Cs = torch.split(narrow, [rank, states, states], dim=2)
        dts = torch.einsum("b k r l, k d r -> b k d l", dts, self.dt_projs_weight)
        return xs, dts, Bs.contiguous(), Cs.contiguous(), -torch.exp(self.A_logs.float())

    def forward_together(self, x):
        xs, dts, Bs, Cs, As = self.projected(x)
        batch, count, _, length = xs.shape
        scan = partial(selective_scan_fn, delta_softplus=True)
        y = scan(
            xs.float().view(batch, -1, length),
            dts.contiguous().float().view(batch, -1, length),
            As,
            Bs.float(),
            Cs.float(),
            self.Ds.float(),
            z=None,
            delta_bias=self.dt_projs_bias.float().view(-1),
            return_last_state=False,
        )
        return y.view(batch, count, -1, length)

    def forward_each(self, x):
        xs, dts, Bs, Cs, As = self.projected(x)
        batch, count, channels, length = xs.shape
        ys = []
        for k in range(count):
            own = slice(k * channels, (k + 1) * channels)
            y = selective_scan_fn(
                xs[:, k],
                dts[:, k],
                As[own],
                Bs[:, k],
                Cs[:, k].unsqueeze(1),
                self.Ds.float().view(count, -1)[k],
                delta_bias=self.dt_projs_bias.float()[k],
                delta_softplus=True,
            )
            ys.append(y.view(batch, -1, length))
        return torch.stack(ys, dim=1)

    def forward(self, x):
        batch, height, width, _ = x.shape
        length = height * width
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = self.act(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))
        out = self.forward_core(x)
        back = torch.flip(out[:, 2:4], dims=[-1]).view(batch, 2, -1, length)
        column = torch.transpose(out[:, 1].view(batch, -1, width, height), 2, 3)
        column_back = torch.transpose(back[:, 1].view(batch, -1, width, height), 2, 3)
        y = out[:, 0] + back[:, 0] + column.contiguous().view(batch, -1, length)
        y = y + column_back.contiguous().view(batch, -1, length)
        y = torch.transpose(y, 1, 2).contiguous()
        y = self.out_norm(y).view(batch, height, width, -1)
        return self.out_proj(y * self.act(z))


class VSSM(nn.Module):
    def __init__(self, one_by_one=False, dim=8, classes=5):
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 2, stride=2)
        count = 1 if one_by_one else 2
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(count)])
        self.blocks = nn.ModuleList([SS2D(dim, one_by_one) for _ in range(count)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        for norm, block in zip(self.norms, self.blocks):
            x = x + block(norm(x))
        return self.head(self.norm(x).mean(dim=(1, 2)))
