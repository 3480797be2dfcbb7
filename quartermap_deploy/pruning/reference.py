"""QuarterMap in PyTorch: the reference that every other target is compared with.

In its canonical form a pruned block keeps some positions of x after the convolution and its activation,
projects and scans those alone, and fills the result up to the full size before out_norm, gate and out_proj.
The ONNX passes are written without this file, so that comparing the two means something.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol, TypeVar

from quartermap_deploy.errors import PlanError
from quartermap_deploy.pruning.plan import QuarterMap, Subsample


class Mixer(Protocol):
    """A token mixer that scans a map.

    Attributes:
        subsample: how it subsamples the map; None scans it whole.
    """

    subsample: Subsample | None


class Block(Protocol):
    """A block of a model."""

    @property
    def index(self) -> int:
        """Its number, from 1 over the whole network."""

    @property
    def mixer(self) -> Mixer:
        """Its mixer."""


class Prunable(Protocol):
    """What `prune` asks of a model."""

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks per stage."""

    def blocks(self) -> Sequence[Block]:
        """Return every block, in order."""


Model = TypeVar("Model", bound=Prunable)


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
