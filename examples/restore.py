"""An image-to-image model with selective scans: a picture in, a picture twice as large out.

quartermap compile examples/restore.py:Restorer --example 1x3x48x64 --task image --out bundles/restore \
    --preprocessing resize=48x64 crop=48x64 fit=stretch interpolation=bicubic mean=0,0,0 std=1,1,1
"""

from __future__ import annotations

from ss2d import Block
from torch import Tensor, nn
from torch.nn import functional


class Restorer(nn.Module):
    """Blocks at full resolution between two convolutions, and pixels shuffled into a larger picture."""

    def __init__(self, channels: int = 16, depth: int = 4, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList([Block(channels) for _ in range(depth)])
        self.last = nn.Conv2d(channels, 3 * scale * scale, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """(batch, 3, H, W) → (batch, 3, 2·H, 2·W)."""
        x = self.first(image).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        detail = functional.pixel_shuffle(self.last(x.permute(0, 3, 1, 2)), self.scale)
        larger: Tensor = (
            functional.interpolate(image, scale_factor=float(self.scale), mode="bilinear") + detail
        )
        return larger
