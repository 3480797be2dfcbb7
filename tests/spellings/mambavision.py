"""As MambaVision: windows, a Conv1d that sees both ways before a one-dimensional scan, half the channels unscanned."""

import torch
import torch.nn.functional as F
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import nn


def into_windows(x, size):
    b, c, h, w = x.shape
    x = x.view(b, c, h // size, size, w // size, size).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(-1, size * size, c)


def from_windows(tokens, size, h, w):
    b = tokens.shape[0] // (h * w // size // size)
    x = tokens.reshape(b, h // size, w // size, size, size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h, w)


class Mixer(nn.Module):
    def __init__(self, dim, states=4, rank=2, width=3):
        super().__init__()
        self.half, self.states, self.rank = dim // 2, states, rank
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.conv1d_x = nn.Conv1d(self.half, self.half, width, groups=self.half, bias=False)
        self.conv1d_z = nn.Conv1d(self.half, self.half, width, groups=self.half, bias=False)
        self.x_proj = nn.Linear(self.half, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, self.half)
        self.A_log = nn.Parameter(torch.zeros(self.half, states))
        self.D = nn.Parameter(torch.ones(self.half))
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, tokens):
        length = tokens.shape[1]
        x, z = self.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)
        x = F.silu(F.conv1d(x, self.conv1d_x.weight, padding="same", groups=self.half))
        z = F.silu(F.conv1d(z, self.conv1d_z.weight, padding="same", groups=self.half))
        narrow = self.x_proj(x.transpose(1, 2).reshape(-1, self.half))
        dt, B, C = torch.split(narrow, [self.rank, self.states, self.states], dim=-1)
        dt = self.dt_proj(dt).reshape(-1, length, self.half).transpose(1, 2)
        B = B.reshape(-1, length, self.states).transpose(1, 2).contiguous()
        C = C.reshape(-1, length, self.states).transpose(1, 2).contiguous()
        A = -torch.exp(self.A_log.float())
        bias = self.dt_proj.bias.float()
        y = selective_scan_fn(
            x,
            dt,
            A,
            B,
            C,
            self.D.float(),
            z=None,
            delta_bias=bias,
            delta_softplus=True,
            return_last_state=None,
        )
        return self.out_proj(torch.cat([y, z], dim=1).transpose(1, 2))


class HybridBackbone(nn.Module):
    def __init__(self, dim=16, window=4, classes=4):
        super().__init__()
        self.window = window
        self.patch_embed = nn.Sequential(nn.Conv2d(3, dim, 4, 4), nn.BatchNorm2d(dim), nn.ReLU())
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(3)])
        self.mixers = nn.ModuleList([Mixer(dim), Mixer(dim)])
        self.gamma = nn.Parameter(torch.ones(dim))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.head = nn.Linear(dim, classes)

    def attention(self, x):
        b, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(b, length, 3, 2, dim // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, length, dim))

    def forward(self, x):
        x = self.patch_embed(x)
        _, _, h, w = x.shape
        tokens = into_windows(x, self.window)
        for norm, mixer in zip(self.norms, self.mixers):
            tokens = tokens + self.gamma * mixer(norm(tokens))
        tokens = tokens + self.attention(self.norms[2](tokens))
        x = from_windows(tokens, self.window, h, w)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
