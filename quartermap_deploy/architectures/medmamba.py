"""MedMamba (Yue and Li, arXiv 2403.03849): half a block's channels pass convolutions, half an SS2D.

Module names give the state dict the keys of the public implementation's checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quartermap_deploy.architectures.base import Stage, VisualStateSpaceModel
from quartermap_deploy.architectures.layers import PatchMerging, initialise_linear_and_norm, mean_over_map
from quartermap_deploy.architectures.ss2d import SS2D


@dataclass(frozen=True)
class MedMambaConfig:
    """Settings of a MedMamba model, under their public names.

    Attributes:
        depths: blocks per stage.
        dims: channels per stage.
        num_classes: size of the output.
        in_chans: channels of the image.
        d_state: state size N.

    Raises:
        ValueError: if settings contradict each other.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    num_classes: int = 6
    in_chans: int = 3
    d_state: int = 16

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.dims):
            raise ValueError(f"depths {self.depths} and dims {self.dims} must have one entry per stage each")
        if odd := [channels for channels in self.dims if channels % 2]:
            raise ValueError(f"dims {odd} are odd; a block splits its channels into two halves")


class PatchEmbedding(nn.Module):
    """Cuts the image into 4x4 patches and normalises them, channel-last."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, kernel_size=4, stride=4)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, H, W) to (batch, H/4, W/4, channels), rounding down."""
        y: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return y


class MedMambaBlock(nn.Module):
    """SS-Conv-SSM: half of the channels pass convolutions, half an SS2D; the results are interleaved."""

    def __init__(self, channels: int, d_state: int) -> None:
        super().__init__()
        half = channels // 2
        self.ln_1 = nn.LayerNorm(half)
        self.self_attention = SS2D(half, d_state=d_state, ssm_ratio=2.0, conv_bias=True, gated=True)
        self.conv33conv33conv11 = nn.Sequential(
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, kernel_size=3, padding=1),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, kernel_size=3, padding=1),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, kernel_size=1),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of x's shape, (batch, H, W, channels)."""
        local, distant = x.chunk(2, dim=-1)
        local = self.conv33conv33conv11(local.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        distant = self.self_attention(self.ln_1(distant))
        # The channel shuffle of the public code with its two groups: output channels alternate between the
        # halves.
        return torch.stack((local, distant), dim=-1).flatten(3) + x


class MedMamba(VisualStateSpaceModel):
    """MedMamba classifier: images (batch, in_chans, H, W) to logits (batch, num_classes), float32."""

    head_path = "head"
    backbone_norms = False
    mixer_name = "self_attention"

    def __init__(self, config: MedMambaConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.in_channels = config.in_chans
        self.dims, self.channel_first = config.dims, False
        # Patches of four pixels, halved between the stages, and both round down.
        self.minimum_side = 4 * 2 ** (len(config.dims) - 1)
        self.patch_embed = PatchEmbedding(config.in_chans, config.dims[0])
        steps: list[nn.Module] = [
            PatchMerging(channels, 2 * channels, odd_sides="crop") for channels in config.dims[:-1]
        ]
        self.layers = nn.ModuleList(
            Stage([MedMambaBlock(channels, config.d_state) for _ in range(depth)], step)
            for channels, depth, step in zip(config.dims, config.depths, [*steps, nn.Identity()], strict=True)
        )
        self.head = nn.Linear(config.dims[-1], config.num_classes)
        self.apply(initialise_linear_and_norm)
        for module in self.modules():
            # Without values there is nothing to initialise; on the meta device it would import torch's compiler.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def classify(self, x: Tensor) -> Tensor:
        """Return logits, (batch, num_classes), for the map of the last stage."""
        logits: Tensor = self.head(mean_over_map(x, channel_first=False))
        return logits
