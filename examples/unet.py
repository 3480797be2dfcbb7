"""A U-Net with selective scans: an image in, logits of classes at every pixel out.

quartermap compile examples/unet.py:UNet --example 1x3x64x96 --arg classes=4 --task segmentation --out bundles/unet
"""

from __future__ import annotations

import torch
from ss2d import Block
from torch import Tensor, nn
from torch.nn import functional


class UNet(nn.Module):
    """Two stages down, one up, and a skip between them."""

    def __init__(self, classes: int = 4, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 4, stride=4)
        self.fine = nn.Sequential(Block(channels), Block(channels))
        self.down = nn.Conv2d(channels, 2 * channels, 2, stride=2)
        self.coarse = nn.Sequential(Block(2 * channels), Block(2 * channels))
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.join = nn.Linear(2 * channels, channels)
        self.decoder = Block(channels)
        self.head = nn.Conv2d(channels, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """(batch, 3, H, W) → (batch, classes, H, W); H and W are multiples of 8."""
        skip = self.fine(self.stem(image).permute(0, 2, 3, 1))
        deep = self.coarse(self.down(skip.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        up = self.up(deep.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = self.decoder(self.join(torch.cat([up, skip], dim=-1)))
        logits: Tensor = self.head(x.permute(0, 3, 1, 2))
        return functional.interpolate(logits, scale_factor=4.0, mode="bilinear", align_corners=False)
