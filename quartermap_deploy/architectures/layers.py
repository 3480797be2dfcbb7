"""Layers that several architectures share.

Feature maps are (batch, channels, H, W) in a channel-first model and (batch, H, W, channels) in a
channel-last one. No layer branches on a batch size, height or width that may be symbolic, so that
`torch.export` keeps them dynamic.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional


class Linear2d(nn.Linear):
    """A linear layer over the channels of a channel-first map: a 1x1 convolution, weight (out, in)."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, in, H, W) to (batch, out, H, W)."""
        return functional.conv2d(input, self.weight[:, :, None, None], self.bias)


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of a channel-first map."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (batch, channels, H, W) at each position."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Permute(nn.Module):
    """Reorders the axes of a tensor, as a step of a `Sequential`."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """Return x with its axes in the order given at construction."""
        return x.permute(self.axes)


def to_channel_first(channel_first: bool) -> nn.Module:
    """Return the step that brings a map from the model's layout to the one that convolutions take."""
    return nn.Identity() if channel_first else Permute(0, 3, 1, 2)


def from_channel_first(channel_first: bool) -> nn.Module:
    """Return the step that brings a convolution's output back to the model's layout."""
    return nn.Identity() if channel_first else Permute(0, 2, 3, 1)


def linear(in_features: int, out_features: int, *, bias: bool, channel_first: bool) -> nn.Linear:
    """Return a linear layer over the channels of the model's layout."""
    return (Linear2d if channel_first else nn.Linear)(in_features, out_features, bias=bias)


def layer_norm(channels: int, *, channel_first: bool) -> nn.LayerNorm:
    """Return a layer normalisation over the channels of the model's layout."""
    return (LayerNorm2d if channel_first else nn.LayerNorm)(channels)


def merge_patches(x: Tensor) -> Tensor:
    """Stack each 2x2 patch of a channel-last map with even sides, (batch, H, W, C) → (batch, H/2, W/2, 4·C).

    The order inside a patch is Swin's: (0, 0), (1, 0), (0, 1), (1, 1) in (row, column).
    """
    batch, height, width, channels = x.shape
    patches = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return patches.permute(0, 1, 3, 4, 2, 5).flatten(3)


class PatchMerging(nn.Module):
    """Halves a channel-last map by stacking, normalising and reducing 2x2 patches (Swin, arXiv 2103.14030).

    Args:
        channels: channels of the input.
        out_channels: channels of the output.
        odd_sides: what happens to the last row or column of an odd side: "pad" adds a row or column of zeros,
            as VMamba does, "crop" drops it, as MedMamba does.
    """

    def __init__(self, channels: int, out_channels: int, *, odd_sides: Literal["pad", "crop"]) -> None:
        super().__init__()
        self.odd_sides = odd_sides
        self.reduction = nn.Linear(4 * channels, out_channels, bias=False)
        self.norm = nn.LayerNorm(4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, H, W, channels) to (batch, H/2, W/2, out_channels), rounding up with padding."""
        round_up = 1 if self.odd_sides == "pad" else 0
        # Written as the distance to an even number, so that a symbolic side stays simple: their sum is even.
        rows, columns = (2 * ((side + round_up) // 2) - side for side in x.shape[1:3])
        # Sides that are even for certain give a plain 0 here, and padding by it would stay in the graph as a
        # copy. A symbolic side is no plain int, so nothing is decided about its value.
        known_even = type(rows) is int and type(columns) is int and rows == columns == 0
        if not known_even:
            x = functional.pad(x, (0, 0, 0, columns, 0, rows))  # a negative amount crops
        merged: Tensor = self.reduction(self.norm(merge_patches(x)))
        return merged


class MultilayerPerceptron(nn.Module):
    """Two linear layers with a GELU between them, over the channels of the model's layout."""

    def __init__(self, channels: int, hidden_channels: int, *, channel_first: bool) -> None:
        super().__init__()
        self.fc1 = linear(channels, hidden_channels, bias=True, channel_first=channel_first)
        self.act = nn.GELU()
        self.fc2 = linear(hidden_channels, channels, bias=True, channel_first=channel_first)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of x's shape."""
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


def mean_over_map(x: Tensor, *, channel_first: bool) -> Tensor:
    """Average a feature map over its positions, to (batch, channels)."""
    return torch.mean(x, dim=(2, 3) if channel_first else (1, 2))


def initialise_linear_and_norm(module: nn.Module) -> None:
    """Initialise one layer as VMamba and MedMamba do, for use with `nn.Module.apply`.

    Weights of linear layers come from a normal distribution of standard deviation 0.02 truncated at ±2,
    biases are zero.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
