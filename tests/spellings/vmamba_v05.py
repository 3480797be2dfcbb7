"""As VMamba's v05: scan and merge as autograd functions, grouped Conv1d projections, kernel behind a flag."""

import torch
import torch.nn.functional as F
from torch import nn

HAS_OFLEX = True
try:
    import selective_scan_cuda_oflex
except ImportError:
    HAS_OFLEX = False

try:
    import triton
    import triton.language as tl

    @triton.autotune(configs=[triton.Config({"BLOCK": 32}, num_warps=4)], key=["length"])
    @triton.jit
    def cross_scan_kernel(source, target, length: tl.constexpr, BLOCK: tl.constexpr = 32):
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(target + place, tl.load(source + place, mask=place < length), mask=place < length)

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False


def unroll_on_gpu(x):
    y = torch.empty_like(x)
    cross_scan_kernel[(triton.cdiv(x.numel(), 32),)](x, y, x.numel())
    return y


class Unroll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        batch, channels, height, width = x.shape
        ctx.size = (height, width)
        sequences = x.new_empty((batch, 4, channels, height * width))
        sequences[:, 0] = x.flatten(2, 3)
        sequences[:, 1] = x.transpose(dim0=2, dim1=3).flatten(2, 3)
        sequences[:, 2:4] = torch.flip(sequences[:, 0:2], dims=[-1])
        return sequences

    @staticmethod
    def backward(ctx, grad):
        height, width = ctx.size
        return Merge.apply(grad.unflatten(-1, (height, width))).unflatten(-1, (height, width))


class Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        batch, count, channels, height, width = y.shape
        ctx.size = (height, width)
        y = y.view(batch, count, channels, -1)
        y = y[:, 0:2] + y[:, 2:4].flip(dims=[-1]).view(batch, 2, channels, -1)
        columns = y[:, 1].view(batch, -1, width, height).transpose(dim0=2, dim1=3)
        return y[:, 0] + columns.contiguous().view(batch, channels, -1)

    @staticmethod
    def backward(ctx, grad):
        return Unroll.apply(grad.unflatten(-1, ctx.size)).unflatten(-1, ctx.size)


class OflexScan(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, oflex=True):
        y, states, *_ = selective_scan_cuda_oflex.fwd(
            u, delta, A, B, C, D, delta_bias, delta_softplus, 1, oflex
        )
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, states)
        return y


def selective_scan_loop(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, oflex=True, *args):
    raise AssertionError("the loop over positions must not run")


def selective_scan_fn(
    u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, oflex=True, backend=None
):
    run = OflexScan.apply if HAS_OFLEX and backend != "torch" else selective_scan_loop
    return run(u, delta, A, B, C, D, delta_bias, delta_softplus, oflex)


class Linear2d(nn.Linear):
    def forward(self, x):
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return super().forward(x).permute(0, 3, 1, 2)


class SS2D(nn.Module):
    def __init__(self, dim, channel_first, cascade, d_state=2, rank=2):
        super().__init__()
        self.channel_first, self.cascade = channel_first, cascade
        linear = Linear2d if channel_first else nn.Linear
        self.inner, self.states, self.rank = 2 * dim, d_state, rank
        self.in_proj = linear(dim, self.inner, bias=False)
        self.conv2d = nn.Conv2d(self.inner, self.inner, 3, padding=1, groups=self.inner)
        self.x_proj_weight = nn.Parameter(torch.zeros(4, rank + 2 * d_state, self.inner))
        self.dt_projs_weight = nn.Parameter(torch.zeros(4, self.inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.zeros(4, self.inner))
        self.A_logs = nn.Parameter(torch.zeros(4 * self.inner, d_state))
        self.Ds = nn.Parameter(torch.ones(4 * self.inner))
        self.out_norm = (LayerNorm2d if channel_first else nn.LayerNorm)(self.inner)
        self.out_proj = linear(self.inner, dim, bias=False)

    def scan(self, sequences, first, last):
        """(batch, K, channels, L), scanned by the weights of the directions first to last."""
        batch, count, channels, length = sequences.shape
        narrow = F.conv1d(
            sequences.reshape(batch, -1, length),
            self.x_proj_weight[first:last].reshape(-1, channels, 1),
            groups=count,
        )
        parts = [self.rank, self.states, self.states]
        dts, Bs, Cs = torch.split(narrow.view(batch, count, -1, length), parts, dim=2)
        dts = F.conv1d(
            dts.contiguous().view(batch, -1, length),
            self.dt_projs_weight[first:last].reshape(count * channels, -1, 1),
            groups=count,
        )
        As = -self.A_logs.to(torch.float).exp().view(4, channels, -1)[first:last].flatten(0, 1)
        y = selective_scan_fn(
            sequences.reshape(batch, -1, length),
            dts.contiguous().view(batch, -1, length),
            As,
            Bs.contiguous().view(batch, count, self.states, length),
            Cs.contiguous().view(batch, count, self.states, length),
            self.Ds.to(torch.float).view(4, -1)[first:last].flatten(),
            self.dt_projs_bias[first:last].reshape(-1).to(torch.float),
            True,
        )
        return y.view(batch, count, -1, length)

    def cascaded(self, x):
        """Rows one by one, both ways; then the columns of what came out."""
        batch, channels, height, width = x.shape
        rows = x.permute(0, 2, 1, 3).reshape(-1, 1, channels, width)
        y = self.scan(torch.cat([rows, rows.flip(-1)], dim=1), 0, 2).sum(1)
        y = F.layer_norm(y.view(batch, height, channels, width).permute(0, 1, 3, 2), (channels,))
        columns = y.permute(0, 2, 3, 1).reshape(-1, 1, channels, height)
        y = self.scan(torch.cat([columns, columns.flip(-1)], dim=1), 2, 4).sum(1)
        return y.view(batch, width, channels, height).permute(0, 2, 3, 1)

    def forward(self, x):
        x = self.in_proj(x)
        if not self.channel_first:
            x = x.permute(0, 3, 1, 2).contiguous()
        x = F.silu(self.conv2d(x))
        batch, channels, height, width = x.shape
        if self.cascade:
            y = self.cascaded(x)
        else:
            y = self.scan(Unroll.apply(x), 0, 4).view(batch, 4, -1, height, width)
            y = Merge.apply(y)
        y = y.reshape(batch, -1, height, width)
        if not self.channel_first:
            y = y.reshape(batch, -1, height * width).transpose(dim0=1, dim1=2).contiguous()
            y = y.view(batch, height, width, -1)
        y = self.out_norm(y)
        return self.out_proj(y.to(x.dtype))


class Block(nn.Module):
    def __init__(self, dim, channel_first, cascade):
        super().__init__()
        norm, linear = (LayerNorm2d, Linear2d) if channel_first else (nn.LayerNorm, nn.Linear)
        self.norm, self.op = norm(dim), SS2D(dim, channel_first, cascade)
        self.norm2 = norm(dim)
        self.mlp = nn.Sequential(linear(dim, 2 * dim), nn.GELU(), linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.op(self.norm(x))
        return x + self.mlp(self.norm2(x))


class Permute(nn.Module):
    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(*self.order)


class Classifier(nn.Module):
    def __init__(self, channel_first=True, cascade=False, dims=(8, 12), depths=(1, 1), classes=5):
        super().__init__()
        to_last = nn.Identity() if channel_first else Permute(0, 2, 3, 1)
        to_first = nn.Identity() if channel_first else Permute(0, 3, 1, 2)
        norm = LayerNorm2d if channel_first else nn.LayerNorm
        self.patch_embed = nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4), to_last, norm(dims[0]))
        self.layers = nn.ModuleList()
        for stage, (dim, depth) in enumerate(zip(dims, depths)):
            parts = [Block(dim, channel_first, cascade) for _ in range(depth)]
            if stage + 1 < len(dims):
                down = nn.Conv2d(dim, dims[stage + 1], 3, stride=2, padding=1)
                parts.append(nn.Sequential(to_first, down, to_last, norm(dims[stage + 1])))
            self.layers.append(nn.Sequential(*parts))
        self.norm, self.to_first = norm(dims[-1]), to_first
        self.head = nn.Linear(dims[-1], classes)

    def forward(self, x):
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        x = self.to_first(self.norm(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Backbone(Classifier):
    """Two feature maps, each with a norm of its own, as detectors use them."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        del self.norm, self.head
        self.outnorm0, self.outnorm1 = LayerNorm2d(8), LayerNorm2d(12)

    def forward(self, x):
        x = self.patch_embed(x)
        maps = []
        for stage, layer in enumerate(self.layers):
            blocks = [part for part in layer if isinstance(part, Block)]
            for block in blocks:
                x = block(x)
            maps.append(getattr(self, f"outnorm{stage}")(x).contiguous())
            for part in layer[len(blocks) :]:
                x = part(x)
        return maps
