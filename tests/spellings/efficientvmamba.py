"""As EfficientVMamba: each direction scans another quarter of the map, written into place by slices."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    from selective_scan_vmamba_pt202 import selective_scan_cuda_core

    MODE = "core"
except Exception:
    MODE = "mamba"
    import selective_scan_cuda


class SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False):
        fwd = selective_scan_cuda_core.fwd if MODE == "core" else selective_scan_cuda.fwd
        between = (1,) if MODE == "core" else ()
        gate = () if MODE == "core" else (None,)
        y, _ = fwd(u, delta, A, B, C, D, *gate, delta_bias, delta_softplus, *between)
        return y


class Skip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, step):
        b, c, h, w = x.shape
        if w % step:
            x = F.pad(x, (0, step - w % step, 0, 0))
        if h % step:
            x = F.pad(x, (0, 0, 0, step - h % step))
        h, w = x.shape[2] // step, x.shape[3] // step
        turned = x.transpose(2, 3)
        xs = x.new_empty((b, 4, c, h * w))
        xs[:, 0] = x[:, :, ::step, ::step].contiguous().view(b, c, -1)
        xs[:, 1] = turned[:, :, ::step, 1::step].contiguous().view(b, c, -1)
        xs[:, 2] = x[:, :, ::step, 1::step].contiguous().view(b, c, -1)
        xs[:, 3] = turned[:, :, 1::step, 1::step].contiguous().view(b, c, -1)
        return xs


class Fill(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ys, height, width, step):
        b, _, c, _ = ys.shape
        h, w = math.ceil(height / step), math.ceil(width / step)
        y = ys.new_empty((b, c, h * step, w * step))
        y[:, :, ::step, ::step] = ys[:, 0].reshape(b, c, h, w)
        y[:, :, 1::step, ::step] = ys[:, 1].reshape(b, c, w, h).transpose(2, 3)
        y[:, :, ::step, 1::step] = ys[:, 2].reshape(b, c, h, w)
        y[:, :, 1::step, 1::step] = ys[:, 3].reshape(b, c, w, h).transpose(2, 3)
        return y[:, :, :height, :width].contiguous().view(b, c, -1)


class ES2D(nn.Module):
    def __init__(self, dim, states=2, rank=2):
        super().__init__()
        self.states, self.rank = states, rank
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.x_proj_weight = nn.Parameter(torch.zeros(4, rank + 2 * states, dim))
        self.dt_projs_weight = nn.Parameter(torch.zeros(4, dim, rank))
        self.dt_projs_bias = nn.Parameter(torch.zeros(4, dim))
        self.A_logs = nn.Parameter(torch.zeros(4 * dim, states))
        self.Ds = nn.Parameter(torch.ones(4 * dim))
        self.out_norm, self.out_proj = nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False)

    def forward(self, x, step=2):
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))
        b, _, height, width = x.shape
        xs = Skip.apply(x, step)
        length = xs.shape[-1]
        narrow = torch.einsum("b k d l, k c d -> b k c l", xs, self.x_proj_weight)
        dts, Bs, Cs = torch.split(narrow, [self.rank, self.states, self.states], dim=2)
        dts = torch.einsum("b k r l, k d r -> b k d l", dts, self.dt_projs_weight)
        ys = SelectiveScan.apply(
            xs.view(b, -1, length),
            dts.contiguous().view(b, -1, length),
            -torch.exp(self.A_logs),
            Bs.contiguous(),
            Cs.contiguous(),
            self.Ds,
            self.dt_projs_bias.view(-1),
            True,
        ).view(b, 4, -1, length)
        y = Fill.apply(ys, int(height), int(width), step).transpose(1, 2).contiguous()
        y = self.out_norm(y).view(b, height, width, -1)
        return self.out_proj(y * F.silu(z))


class Efficient(nn.Module):
    def __init__(self, dim=8, classes=4):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 3, 2, 1)
        self.blocks = nn.ModuleList([ES2D(dim)])
        self.local = nn.ModuleList([nn.Conv2d(dim, dim, 3, padding=1) for _ in range(1)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        for block, local in zip(self.blocks, self.local):
            near = local(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            x = x + block(x) + near
        return self.head(self.norm(x).mean((1, 2)))
