"""As VM-UNet: an encoder and a decoder with skip connections; the merge is summed in place into the output."""

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
except ImportError:
    selective_scan_fn = None


class SS2D(nn.Module):
    def __init__(self, dim, states=3, rank=2):
        super().__init__()
        self.inner, self.states, self.rank = dim, states, rank
        self.in_proj = nn.Linear(dim, 2 * dim)
        self.conv2d = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)
        self.x_proj = nn.ModuleList([nn.Linear(dim, rank + 2 * states, bias=False) for _ in range(4)])
        self.dt_projs = nn.ModuleList([nn.Linear(rank, dim) for _ in range(4)])
        self.A_log = nn.Parameter(torch.zeros(4, dim, states))
        self.D = nn.Parameter(torch.ones(4, dim))
        self.out_norm = nn.LayerNorm(dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, inputs):
        b, h, w, c = inputs.shape
        x, z = self.in_proj(inputs).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2)))
        rows = x.reshape(b, c, h * w)
        columns = x.permute(0, 1, 3, 2).reshape(b, c, w * h)
        sequences = [rows, columns, rows.flip(2), columns.flip(2)]
        us, dts, Bs, Cs = [], [], [], []
        for sequence, project, widen in zip(sequences, self.x_proj, self.dt_projs):
            tokens = project(sequence.transpose(1, 2))
            dt, B, C = tokens.split([self.rank, self.states, self.states], dim=-1)
            us.append(sequence)
            # The bias goes into the scan, so only the weight is applied here.
            dts.append(F.linear(dt, widen.weight).transpose(1, 2))
            Bs.append(B.transpose(1, 2))
            Cs.append(C.transpose(1, 2))
        y = selective_scan_fn(
            torch.cat(us, dim=1),
            torch.cat(dts, dim=1),
            -self.A_log.exp().reshape(4 * c, -1),
            torch.stack(Bs, dim=1),
            torch.stack(Cs, dim=1),
            self.D.reshape(-1),
            None,
            torch.cat([widen.bias for widen in self.dt_projs]),
            True,
        )
        y_row, y_column, y_back, y_column_back = y.reshape(b, 4, c, h * w).unbind(1)
        merged = y_row + y_back.flip(2)
        merged += (y_column + y_column_back.flip(2)).reshape(b, c, w, h).permute(0, 1, 3, 2).reshape(b, c, -1)
        y = self.out_norm(merged.reshape(b, c, h, w).permute(0, 2, 3, 1))
        return self.out_proj(y * F.silu(z))


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.ln_1, self.self_attention = nn.LayerNorm(dim), SS2D(dim)

    def forward(self, x):
        return x + self.self_attention(self.ln_1(x))


class Merging(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        corners = [x[:, i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class Expanding(nn.Module):
    def __init__(self, dim, scale=2):
        super().__init__()
        self.scale = scale
        self.expand, self.norm = nn.Linear(dim, scale * dim, bias=False), nn.LayerNorm(dim // scale)

    def forward(self, x):
        b, h, w, _ = x.shape
        s = self.scale
        x = self.expand(x).reshape(b, h, w, s, s, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h * s, w * s, -1)
        return self.norm(x)


class UNet(nn.Module):
    def __init__(self, dim=16, classes=2):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 2, 2)
        self.down, self.merge = Block(dim), Merging(dim)
        self.middle = Block(2 * dim)
        self.expand, self.up = Expanding(2 * dim), Block(dim)
        self.final = Expanding(dim)
        self.head = nn.Conv2d(dim // 2, classes, 1)

    def forward(self, x):
        skip = self.down(self.patch_embed(x).permute(0, 2, 3, 1))
        x = self.middle(self.merge(skip))
        x = self.up(self.expand(x) + skip)
        return self.head(self.final(x).permute(0, 3, 1, 2))
