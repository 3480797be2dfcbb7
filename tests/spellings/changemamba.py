"""As ChangeMamba: two images, one encoder for both, their maps interleaved in tensors that are made on a GPU."""

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    import selective_scan_cuda_oflex
except Exception:
    ...
try:
    import selective_scan_cuda_core
except Exception:
    ...


class ScanOflex(torch.autograd.Function):
    # The kernel is a global of this function, and undefined where its import failed.
    @staticmethod
    def forward(
        ctx,
        u,
        delta,
        A,
        B,
        C,
        D=None,
        delta_bias=None,
        delta_softplus=False,
        nrows=1,
        backnrows=1,
        oflex=True,
    ):
        y, states, *_ = selective_scan_cuda_oflex.fwd(
            u, delta, A, B, C, D, delta_bias, delta_softplus, 1, oflex
        )
        return y


class CrossScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
        return torch.stack([rows, columns, rows.flip(-1), columns.flip(-1)], dim=1)


class CrossMerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        b, _, c, h, w = y.shape
        y = y.flatten(3)
        y = y[:, :2] + y[:, 2:].flip(-1)
        return y[:, 0].view(b, c, h, w) + y[:, 1].view(b, c, w, h).transpose(2, 3)


def cross_selective_scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan=ScanOflex):
    b, channels, h, w = x.shape
    count, _, rank = dt_projs_weight.shape
    states, length = A_logs.shape[1], h * w
    xs = CrossScan.apply(x)
    narrow = torch.einsum("b k d l, k c d -> b k c l", xs, x_proj_weight)
    dts, Bs, Cs = torch.split(narrow, [rank, states, states], dim=2)
    dts = torch.einsum("b k r l, k d r -> b k d l", dts, dt_projs_weight)
    ys = scan.apply(
        xs.view(b, -1, length),
        dts.contiguous().view(b, -1, length),
        -torch.exp(A_logs.to(torch.float)),
        Bs.contiguous(),
        Cs.contiguous(),
        Ds.to(torch.float),
        dt_projs_bias.view(-1).to(torch.float),
        True,
    ).view(b, count, -1, h, w)
    return CrossMerge.apply(ys)


class Block(nn.Module):
    def __init__(self, dim, states=2, rank=2):
        super().__init__()
        self.norm, self.in_proj = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.x_proj_weight = nn.Parameter(torch.zeros(4, rank + 2 * states, dim))
        self.dt_projs_weight = nn.Parameter(torch.zeros(4, dim, rank))
        self.dt_projs_bias = nn.Parameter(torch.zeros(4, dim))
        self.A_logs = nn.Parameter(torch.zeros(4 * dim, states))
        self.Ds = nn.Parameter(torch.ones(4 * dim))
        self.out_norm, self.out_proj = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, x):
        """(batch, channels, h, w), the same out."""
        y = self.in_proj(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        y = F.silu(self.conv2d(y))
        y = cross_selective_scan(
            y, self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds
        )
        return x + self.out_proj(self.out_norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class ChangeDetector(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.encoder = nn.ModuleList([Block(dim)])
        self.channels = nn.Sequential(nn.Conv2d(2 * dim, dim, 1), Block(dim))
        self.columns, self.sides = Block(dim), Block(dim)
        self.fuse = nn.Sequential(nn.Conv2d(5 * dim, dim, 1), nn.BatchNorm2d(dim), nn.ReLU())
        self.main_clf = nn.Conv2d(dim, 2, 1)

    def encode(self, image):
        x = self.stem(image)
        for block in self.encoder:
            x = block(x)
        return x

    def forward(self, before, after):
        a, b = self.encode(before), self.encode(after)
        n, c, h, w = a.size()
        together = self.channels(torch.cat([a, b], dim=1))
        between = torch.empty(n, c, h, 2 * w).cuda()
        between[:, :, :, ::2] = a
        between[:, :, :, 1::2] = b
        between = self.columns(between)
        beside = torch.empty(n, c, h, 2 * w, device="cuda")
        beside[:, :, :, 0:w] = a
        beside[:, :, :, w:] = b
        beside = self.sides(beside)
        maps = [together, between[..., ::2], between[..., 1::2], beside[..., :w], beside[..., w:]]
        y = self.main_clf(self.fuse(torch.cat(maps, dim=1)))
        return F.interpolate(y, size=before.size()[-2:], mode="bilinear")
