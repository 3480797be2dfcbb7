"""As MambaIR: an image to an image of twice the size, tokens with their size beside them, scaled residuals."""

import torch
import torch.nn.functional as F
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
from torch import nn


class SS2D(nn.Module):
    def __init__(self, d_model, d_state=4):
        super().__init__()
        self.d_state, self.d_inner, self.dt_rank = d_state, 2 * d_model, 1
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv2d = nn.Conv2d(self.d_inner, self.d_inner, 3, padding=1, groups=self.d_inner)
        self.x_proj_weight = nn.Parameter(torch.zeros(4, self.dt_rank + 2 * d_state, self.d_inner))
        self.dt_projs_weight = nn.Parameter(torch.zeros(4, self.d_inner, self.dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.zeros(4, self.d_inner))
        self.A_logs = nn.Parameter(torch.zeros(4 * self.d_inner, d_state))
        self.Ds = nn.Parameter(torch.ones(4 * self.d_inner))
        self.selective_scan = selective_scan_fn
        self.out_norm = nn.LayerNorm(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward_core(self, x):
        B, C, H, W = x.shape
        L, K = H * W, 4
        turned = torch.transpose(x, dim0=2, dim1=3).contiguous()
        x_hwwh = torch.stack([x.view(B, -1, L), turned.view(B, -1, L)], dim=1).view(B, 2, -1, L)
        xs = torch.cat([x_hwwh, torch.flip(x_hwwh, dims=[-1])], dim=1)
        x_dbl = torch.matmul(self.x_proj_weight, xs)
        dts, Bs, Cs = torch.split(x_dbl, [self.dt_rank, self.d_state, self.d_state], dim=2)
        dts = torch.matmul(self.dt_projs_weight, dts)
        out_y = self.selective_scan(
            xs.view(B, -1, L),
            dts.contiguous().view(B, -1, L),
            -torch.exp(self.A_logs),
            Bs.view(B, K, -1, L),
            Cs.view(B, K, -1, L),
            self.Ds,
            z=None,
            delta_bias=self.dt_projs_bias.view(-1),
            delta_softplus=True,
            return_last_state=False,
        ).view(B, K, -1, L)
        inv_y = torch.flip(out_y[:, 2:4], dims=[-1]).view(B, 2, -1, L)
        wh_y = torch.transpose(out_y[:, 1].view(B, -1, W, H), dim0=2, dim1=3).contiguous().view(B, -1, L)
        invwh_y = torch.transpose(inv_y[:, 1].view(B, -1, W, H), dim0=2, dim1=3).contiguous().view(B, -1, L)
        return out_y[:, 0], inv_y[:, 0], wh_y, invwh_y

    def forward(self, x):
        B, H, W, C = x.shape
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))
        y = sum(self.forward_core(x))
        y = torch.transpose(y, dim0=1, dim1=2).contiguous().view(B, H, W, -1)
        return self.out_proj(self.out_norm(y) * F.silu(z))


class Attention(nn.Module):
    """Which channels matter, from their means."""

    def __init__(self, dim):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.GELU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, dim, 1), nn.Sigmoid())

    def forward(self, x):
        x = self.body(x)
        return x * self.gate(x)


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.ln_1, self.self_attention = nn.LayerNorm(dim), SS2D(dim)
        self.skip_scale = nn.Parameter(torch.ones(dim))
        self.ln_2, self.conv_blk = nn.LayerNorm(dim), Attention(dim)
        self.skip_scale2 = nn.Parameter(torch.ones(dim))

    def forward(self, tokens, x_size):
        B, L, C = tokens.shape
        x = tokens.view(B, *x_size, C).contiguous()
        x = x * self.skip_scale + self.self_attention(self.ln_1(x))
        mixed = self.conv_blk(self.ln_2(x).permute(0, 3, 1, 2).contiguous())
        x = x * self.skip_scale2 + mixed.permute(0, 2, 3, 1).contiguous()
        return x.view(B, -1, C).contiguous()


class Restorer(nn.Module):
    def __init__(self, dim=8, scale=2):
        super().__init__()
        self.mean = torch.tensor([0.45, 0.44, 0.40]).view(1, 3, 1, 1)
        self.conv_first = nn.Conv2d(3, dim, 3, 1, 1)
        self.layers = nn.ModuleList([Block(dim), Block(dim)])
        self.norm = nn.LayerNorm(dim)
        self.conv_after_body = nn.Conv2d(dim, dim, 3, 1, 1)
        self.upsample = nn.Sequential(nn.Conv2d(dim, 3 * scale**2, 3, 1, 1), nn.PixelShuffle(scale))

    def forward(self, x):
        self.mean = self.mean.type_as(x)
        x = self.conv_first(x - self.mean)
        x_size = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens, x_size)
        y = self.norm(tokens).transpose(1, 2).view(x.shape[0], -1, *x_size)
        return self.upsample(self.conv_after_body(y) + x) + self.mean
