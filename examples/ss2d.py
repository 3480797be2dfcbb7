"""A four-direction selective scan of a feature map, spelt as public models spell it.

Nothing here knows quartermap-deploy. The import needs mamba-ssm, which needs a GPU; `quartermap compile` takes the file
all the same, on a machine that has neither.
"""

from __future__ import annotations

import math

import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import Tensor, nn
from torch.nn import functional


class SS2D(nn.Module):
    """Token mixer: (batch, H, W, channels) to the same shape."""

    def __init__(self, channels: int, d_state: int = 4, expand: int = 2) -> None:
        super().__init__()
        self.d_inner, self.d_state = expand * channels, d_state
        self.dt_rank = math.ceil(channels / 8)
        self.in_proj = nn.Linear(channels, 2 * self.d_inner, bias=False)
        self.conv2d = nn.Conv2d(self.d_inner, self.d_inner, 3, padding=1, groups=self.d_inner)
        rows = self.dt_rank + 2 * d_state
        self.x_proj_weight = nn.Parameter(torch.randn(4, rows, self.d_inner) / math.sqrt(self.d_inner))
        self.dt_projs_weight = nn.Parameter(
            torch.randn(4, self.d_inner, self.dt_rank) / math.sqrt(self.dt_rank)
        )
        self.dt_projs_bias = nn.Parameter(torch.randn(4, self.d_inner) - 2)
        steps = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_logs = nn.Parameter(steps.log().repeat(4 * self.d_inner, 1))
        self.Ds = nn.Parameter(torch.ones(4 * self.d_inner))
        self.out_norm = nn.LayerNorm(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, channels, bias=False)

    def scan(self, x: Tensor) -> Tensor:
        """Scan a map (batch, d_inner, H, W) along rows and columns, both ways, and add up: (batch, d_inner, H·W)."""
        batch, _, height, width = x.shape
        length = height * width
        both = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], dim=1)
        xs = torch.cat([both, both.flip(-1)], dim=1)
        projected = torch.einsum("bkdl,kcd->bkcl", xs, self.x_proj_weight)
        steps, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=2)
        steps = torch.einsum("bkrl,kdr->bkdl", steps, self.dt_projs_weight)
        ys = selective_scan_fn(
            xs.reshape(batch, -1, length),
            steps.reshape(batch, -1, length),
            -self.A_logs.exp(),
            B.contiguous(),
            C.contiguous(),
            self.Ds,
            z=None,
            delta_bias=self.dt_projs_bias.flatten(),
            delta_softplus=True,
        ).view(batch, 4, -1, length)
        ys = ys[:, :2] + ys[:, 2:].flip(-1)
        columns = ys[:, 1].view(batch, -1, width, height).transpose(2, 3).flatten(2)
        merged: Tensor = ys[:, 0] + columns
        return merged

    def forward(self, x: Tensor) -> Tensor:
        """Mix the positions of a map."""
        batch, height, width, _ = x.shape
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = functional.silu(self.conv2d(x.permute(0, 3, 1, 2)))
        y = self.out_norm(self.scan(x).transpose(1, 2)).view(batch, height, width, -1)
        out: Tensor = self.out_proj(y * functional.silu(z))
        return out


class Block(nn.Module):
    """A residual SS2D: (batch, H, W, channels) to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(channels), SS2D(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the mixer makes of the normalised map."""
        out: Tensor = x + self.mixer(self.norm(x))
        return out
