"""Which positions of a feature map a pruned block keeps, and how the map is filled up again, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from quartermap_deploy.pruning.plan import Subsample


def keep_positions(x: Tensor, subsample: Subsample) -> Tensor:
    """Keep the plan's rows and columns of x, (batch, channels, H, W) → (batch, channels, H', W')."""
    for axis in (2, 3):
        kept = torch.arange(subsample.kept_size(x.shape[axis]), device=x.device)
        # The j-th kept position is number j mod keep of group j // keep.
        indices = kept // subsample.keep * subsample.stride + kept % subsample.keep
        x = x.index_select(axis, indices)
    return x


def restore_positions(y: Tensor, size: tuple[int, int], subsample: Subsample) -> Tensor:
    """Fill y up to `size` (H, W), (batch, channels, H', W') → (batch, channels, H, W).

    Nearest takes source position floor(i·H'/H) in integers: `torch.nn.functional.interpolate` means the same
    but multiplies by a float32 ratio, and rounding puts it one position off at some sizes (H = 94 with stride
    3 is the first). Bilinear and bicubic are those of `interpolate` with align_corners=False.
    """
    if subsample.upsample != "nearest":
        return functional.interpolate(y, size=size, mode=subsample.upsample, align_corners=False)
    for axis, length in zip((2, 3), size, strict=True):
        source = torch.arange(length, device=y.device) * y.shape[axis] // length
        y = y.index_select(axis, source)
    return y
