"""VMamba (Liu et al., arXiv 2401.10166), in its first published form (v0) and its second (v2).

Module names give the state dict the keys of the released checkpoints, and `VMambaConfig` takes its names and
values from the settings that the public configurations publish, so that a model card can be compared with
them line by line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from quartermap_deploy.architectures.base import Stage, VisualStateSpaceModel
from quartermap_deploy.architectures.layers import (
    MultilayerPerceptron,
    PatchMerging,
    from_channel_first,
    initialise_linear_and_norm,
    layer_norm,
    mean_over_map,
    to_channel_first,
)
from quartermap_deploy.architectures.ss2d import SS2D


@dataclass(frozen=True)
class VMambaConfig:
    """Settings of a VMamba model, under their public names.

    Attributes:
        depths: blocks per stage.
        dims: channels per stage.
        num_classes: size of the output.
        in_chans: channels of the image.
        ssm_d_state: state size N.
        ssm_ratio: d_inner / d_model.
        ssm_conv_bias: whether the depthwise convolutions have a bias.
        forward_type: "v05_noz", without a gate, or "v0", with one.
        mlp_ratio: hidden channels of a block's MLP / its channels; 0 for no MLP.
        norm_layer: "ln2d" for channel-first feature maps, "ln" for channel-last ones. The weights are the
            same.
        patchembed_version: "v1", one 4x4 convolution, or "v2", two 3x3 convolutions of stride 2.
        downsample_version: "v1", patch merging, or "v3", a 3x3 convolution of stride 2.

    Raises:
        ValueError: if settings contradict each other.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    num_classes: int = 1000
    in_chans: int = 3
    ssm_d_state: int = 1
    ssm_ratio: float = 2.0
    ssm_conv_bias: bool = False
    forward_type: Literal["v0", "v05_noz"] = "v05_noz"
    mlp_ratio: float = 4.0
    norm_layer: Literal["ln", "ln2d"] = "ln2d"
    patchembed_version: Literal["v1", "v2"] = "v2"
    downsample_version: Literal["v1", "v3"] = "v3"

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.dims):
            raise ValueError(f"depths {self.depths} and dims {self.dims} must have one entry per stage each")
        choices = {
            "forward_type": ("v0", "v05_noz"),
            "norm_layer": ("ln", "ln2d"),
            "patchembed_version": ("v1", "v2"),
            "downsample_version": ("v1", "v3"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}; expected one of {allowed}")
        if self.downsample_version == "v1" and self.norm_layer != "ln":
            raise ValueError(
                "patch merging (downsample_version 'v1') is channel-last: it needs norm_layer 'ln'"
            )

    @property
    def channel_first(self) -> bool:
        """Whether feature maps are (batch, channels, H, W) between the layers."""
        return self.norm_layer == "ln2d"


class VMambaBlock(nn.Module):
    """A residual SS2D and, in v2, a residual MLP, each after a normalisation."""

    def __init__(self, channels: int, config: VMambaConfig) -> None:
        super().__init__()
        self.norm = layer_norm(channels, channel_first=config.channel_first)
        self.op = SS2D(
            channels,
            d_state=config.ssm_d_state,
            ssm_ratio=config.ssm_ratio,
            conv_bias=config.ssm_conv_bias,
            gated=config.forward_type == "v0",
            channel_first=config.channel_first,
        )
        self.has_mlp = config.mlp_ratio > 0
        if self.has_mlp:
            self.norm2 = layer_norm(channels, channel_first=config.channel_first)
            self.mlp = MultilayerPerceptron(
                channels, int(config.mlp_ratio * channels), channel_first=config.channel_first
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of x's shape."""
        x = x + self.op(self.norm(x))
        if self.has_mlp:
            x = x + self.mlp(self.norm2(x))
        return x


class Classifier(nn.Module):
    """Normalisation, mean over the map, and a linear layer."""

    def __init__(self, channels: int, num_classes: int, *, channel_first: bool) -> None:
        super().__init__()
        self.channel_first = channel_first
        self.norm = layer_norm(channels, channel_first=channel_first)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (batch, num_classes)."""
        logits: Tensor = self.head(mean_over_map(self.norm(x), channel_first=self.channel_first))
        return logits


class VMamba(VisualStateSpaceModel):
    """VMamba classifier: images (batch, in_chans, H, W) to logits (batch, num_classes), float32."""

    head_path = "classifier.head"
    backbone_norms = True
    mixer_name = "op"

    def __init__(self, config: VMambaConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.in_channels = config.in_chans
        self.dims, self.channel_first = config.dims, config.channel_first
        # Strided convolutions with padding and padded patch merging round up and never run out of positions;
        # a 4x4 convolution without padding needs four pixels.
        self.minimum_side = 4 if config.patchembed_version == "v1" else 1
        self.patch_embed = _patch_embed(config)
        steps: list[nn.Module] = [
            _downsample(*dims, config) for dims in zip(config.dims, config.dims[1:], strict=False)
        ]
        self.layers = nn.ModuleList(
            Stage([VMambaBlock(channels, config) for _ in range(depth)], step)
            for channels, depth, step in zip(config.dims, config.depths, [*steps, nn.Identity()], strict=True)
        )
        self.classifier = Classifier(config.dims[-1], config.num_classes, channel_first=config.channel_first)
        self.apply(initialise_linear_and_norm)

    def classify(self, x: Tensor) -> Tensor:
        """Return logits, (batch, num_classes), for the map of the last stage."""
        logits: Tensor = self.classifier(x)
        return logits


def _patch_embed(config: VMambaConfig) -> nn.Sequential:
    """Build the stem, numbered as in the checkpoints: places without a step hold an Identity."""
    channels, first = config.dims[0], config.channel_first
    if config.patchembed_version == "v1":
        return nn.Sequential(
            nn.Conv2d(config.in_chans, channels, kernel_size=4, stride=4),
            from_channel_first(first),
            layer_norm(channels, channel_first=first),
        )
    return nn.Sequential(
        nn.Conv2d(config.in_chans, channels // 2, kernel_size=3, stride=2, padding=1),
        from_channel_first(first),
        layer_norm(channels // 2, channel_first=first),
        to_channel_first(first),
        nn.GELU(),
        nn.Conv2d(channels // 2, channels, kernel_size=3, stride=2, padding=1),
        from_channel_first(first),
        layer_norm(channels, channel_first=first),
    )


def _downsample(channels: int, out_channels: int, config: VMambaConfig) -> nn.Module:
    """Build the step between two stages, numbered as in the checkpoints."""
    if config.downsample_version == "v1":
        return PatchMerging(channels, out_channels, odd_sides="pad")
    first = config.channel_first
    return nn.Sequential(
        to_channel_first(first),
        nn.Conv2d(channels, out_channels, kernel_size=3, stride=2, padding=1),
        from_channel_first(first),
        layer_norm(out_channels, channel_first=first),
    )
