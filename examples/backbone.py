"""A backbone with selective scans: an image in, named feature maps for a detector out.

quartermap compile examples/backbone.py:build --example 1x3x64x96 --arg depths=[1,2,2] --task features \
    --every 2 --out bundles/backbone
"""

from __future__ import annotations

from collections.abc import Sequence

from ss2d import Block
from torch import Tensor, nn


class Backbone(nn.Module):
    """Stages of blocks, each at half the resolution of the one before."""

    def __init__(self, depths: Sequence[int], channels: int) -> None:
        super().__init__()
        widths = [channels * 2**stage for stage in range(len(depths))]
        self.stem = nn.Conv2d(3, channels, 4, stride=4)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(*(Block(width) for _ in range(depth)))
                for width, depth in zip(widths, depths, strict=True)
            ]
        )
        self.downs = nn.ModuleList([nn.Conv2d(width, 2 * width, 2, stride=2) for width in widths[:-1]])

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(batch, 3, H, W) → maps (batch, C, H/4, W/4), (batch, 2·C, H/8, W/8) and so on, by name."""
        maps, x = {}, self.stem(image)
        for number, stage in enumerate(self.stages):
            if number:
                x = self.downs[number - 1](x)
            x = stage(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            maps[f"c{number + 2}"] = x
        return maps


def build(depths: Sequence[int] = (1, 2, 2), channels: int = 16) -> nn.Module:
    """Make a backbone: a factory is anything that returns a module."""
    return Backbone(depths, channels)
