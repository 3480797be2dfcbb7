"""QuarterMap in PyTorch: the reference that every other target is compared with.

In its canonical form a pruned block keeps some positions of x after the convolution and its activation,
projects and scans those alone, and fills the result up to the full size before out_norm, gate and out_proj.
The ONNX passes are written without this file, so that comparing the two means something.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from quartermap_deploy.errors import PlanError
from quartermap_deploy.pruning.plan import QuarterMap, Subsample

if TYPE_CHECKING:
    from quartermap_deploy.architectures.base import VisualStateSpaceModel

Model = TypeVar("Model", bound="VisualStateSpaceModel")


def prune(model: Model, plan: QuarterMap) -> Model:
    """Return a deep copy of `model` whose selected blocks scan a subsampled map.

    The plan describes the whole result: blocks that it does not select are not pruned, even if they were in
    `model`. The weights are unchanged and `model` is left as it was.

    Raises:
        PlanError: if the plan does not fit the model's blocks.
    """
    if not hasattr(model, "blocks") or not hasattr(model, "depths"):
        raise PlanError(f"cannot prune a {type(model).__name__}; expected a model from create_model")
    selected = plan.select(model.depths)
    pruned = copy.deepcopy(model)
    for block in pruned.blocks():
        block.mixer.subsample = plan.subsample if block.index in selected else None
    return pruned


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
