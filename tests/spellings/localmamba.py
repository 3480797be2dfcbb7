"""As LocalMamba: windows of a padded map, one after the other; each direction has a gate before the sum."""

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    import selective_scan_cuda_core

    MODE = "core"
except Exception:
    MODE = "mamba"
    import selective_scan_cuda


class SelectiveScan(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)
    def forward(ctx, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, nrows=1):
        assert u.shape[1] % (B.shape[1] * nrows) == 0
        if MODE == "core":
            y, _, *_ = selective_scan_cuda_core.fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows)
        else:
            y, _, *_ = selective_scan_cuda.fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
        return y


def windows(x, size):
    """(b, c, h, w) → (b, c, positions of the padded map), window by window."""
    b, c, h, w = x.shape
    x = F.pad(x, (0, -w % size, 0, -h % size))
    rows, columns = x.shape[2] // size, x.shape[3] // size
    return x.view(b, c, rows, size, columns, size).permute(0, 1, 2, 4, 3, 5).reshape(b, c, -1)


def map_of(y, size, h, w):
    """What undoes `windows`."""
    b, c, _ = y.shape
    rows, columns = -(-h // size), -(-w // size)
    y = y.view(b, c, rows, columns, size, size).permute(0, 1, 2, 4, 3, 5)
    return y.reshape(b, c, rows * size, columns * size)[:, :, :h, :w].flatten(2)


class Gate(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.reduce, self.select = (
            nn.LayerNorm(dim),
            nn.Linear(dim, dim // 4),
            nn.Linear(dim // 4, dim),
        )

    def forward(self, x):
        mean = F.gelu(self.reduce(self.norm(x).mean(1, keepdim=True)))
        return x * torch.sigmoid(self.select(mean))


class SS2D(nn.Module):
    def __init__(self, dim, choices, states=2, rank=2):
        super().__init__()
        self.inner, self.states, self.rank = 2 * dim, states, rank
        self.choices = choices
        count = len(choices)
        self.in_proj = nn.Linear(dim, 2 * self.inner, bias=False)
        self.conv2d = nn.Conv2d(self.inner, self.inner, 3, padding=1, groups=self.inner)
        self.x_proj_weight = nn.Parameter(torch.zeros(count, rank + 2 * states, self.inner))
        self.dt_projs_weight = nn.Parameter(torch.zeros(count, self.inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.zeros(count, self.inner))
        self.A_logs = nn.Parameter(torch.zeros(count * self.inner, states))
        self.Ds = nn.Parameter(torch.ones(count * self.inner))
        self.attn = Gate(self.inner)
        self.out_norm, self.out_proj = nn.LayerNorm(self.inner), nn.Linear(self.inner, dim, bias=False)

    def unroll(self, x, choice):
        if choice.startswith("w"):
            sequence = windows(x, int(choice[1]))
        else:
            sequence = x.transpose(2, 3).flatten(2) if choice.startswith("v") else x.flatten(2)
        return sequence.flip([-1]) if choice.endswith("flip") else sequence

    def roll(self, y, choice, h, w):
        y = y.flip([-1]) if choice.endswith("flip") else y
        if choice.startswith("w"):
            return map_of(y, int(choice[1]), h, w)
        return y.view(y.shape[0], -1, w, h).transpose(2, 3).flatten(2) if choice.startswith("v") else y

    def forward(self, x):
        b, h, w, _ = x.shape
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))
        sequences = [self.unroll(x, choice) for choice in self.choices]
        lengths = [sequence.shape[-1] for sequence in sequences]
        longest = max(lengths)
        xs = torch.stack([F.pad(s, (0, longest - s.shape[-1])) for s in sequences], dim=1)
        narrow = torch.einsum("b k d l, k c d -> b k c l", xs, self.x_proj_weight)
        dts, Bs, Cs = torch.split(narrow, [self.rank, self.states, self.states], dim=2)
        dts = torch.einsum("b k r l, k d r -> b k d l", dts, self.dt_projs_weight)

        def selective_scan(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, nrows=1):
            return SelectiveScan.apply(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows)

        ys = selective_scan(
            xs.reshape(b, -1, longest),
            dts.reshape(b, -1, longest),
            -torch.exp(self.A_logs),
            Bs.contiguous(),
            Cs.contiguous(),
            self.Ds,
            self.dt_projs_bias.view(-1),
            nrows=2,
        ).view(b, len(self.choices), -1, longest)
        y = 0
        for k, (choice, length) in enumerate(zip(self.choices, lengths)):
            tokens = self.roll(ys[:, k, :, :length], choice, h, w).transpose(1, 2)
            y = y + self.attn(tokens)
        y = self.out_norm(y).view(b, h, w, -1)
        return self.out_proj(y * F.silu(z))


class LocalClassifier(nn.Module):
    def __init__(self, dim=8, choices=("h", "v_flip", "w3", "w3_flip"), classes=4):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 2, 2)
        self.blocks = nn.ModuleList([SS2D(dim, choices)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patch_embed(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x).mean((1, 2)))
