"""QuarterMap plans: which blocks scan a subsampled map, and how the map is subsampled and filled up again.

QuarterMap is a post-training pruning of visual state-space models: a pruned block drops rows and columns of
its feature map before the four-direction scan and fills the gaps with neighbours afterwards. This file holds
the plan alone, without torch; `reference.py` carries it out in PyTorch, and the ONNX passes carry it out in a
graph.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from quartermap_deploy.errors import PlanError

Upsample = Literal["nearest", "bilinear", "bicubic"]

EVERY = 3
"""Which block is pruned where a plan does not say."""

UPSAMPLE_MODES: tuple[str, ...] = get_args(Upsample)


@dataclass(frozen=True)
class Subsample:
    """How one block subsamples its map along each axis: of every `stride` positions the first `keep` stay.

    Attributes:
        stride: length of the repeating group of positions, at least 2.
        keep: positions kept of each group, from 1 to stride - 1.
        upsample: interpolation that restores the full size; "nearest" takes source position
            floor(i·kept/size).

    Raises:
        PlanError: if a value is out of range.
    """

    stride: int = 2
    keep: int = 1
    upsample: Upsample = "nearest"

    def __post_init__(self) -> None:
        _require_integer("stride", self.stride, minimum=2, why="a stride of 1 keeps every position")
        _require_integer("keep", self.keep, minimum=1, why="a block must keep a position")
        if self.keep >= self.stride:
            most = f" to {self.stride - 1}" if self.stride > 2 else ""
            raise PlanError(
                f"keep = {self.keep} with stride = {self.stride} drops nothing; keep must be 1{most}"
            )
        if self.upsample not in UPSAMPLE_MODES:
            near = difflib.get_close_matches(str(self.upsample), UPSAMPLE_MODES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise PlanError(
                f"unknown upsample {self.upsample!r}; expected one of {', '.join(UPSAMPLE_MODES)}.{hint}"
            )

    def kept_size(self, size: int) -> int:
        """Return how many of `size` positions along an axis are kept.

        Written as a sum of floor divisions, without a comparison, so that it also holds for symbolic sizes.
        """
        return sum((size - first + self.stride - 1) // self.stride for first in range(self.keep))

    def kept_indices(self, size: int) -> tuple[int, ...]:
        """Return the kept positions of an axis of `size` positions: every i with i mod stride < keep."""
        return tuple(i for i in range(size) if i % self.stride < self.keep)


@dataclass(frozen=True)
class QuarterMap:
    """A QuarterMap plan for a whole model.

    Blocks are numbered from 1 over the whole network. Block i is pruned iff i is a multiple of `every` and
    its stage is not excluded; an explicit list of `blocks` takes the place of `every`, in any stage.

    Attributes:
        every: prune every k-th block, at least 1; without it and without `blocks`, every third. None where blocks are
            named.
        blocks: the blocks to prune, or None to choose them by `every` and `exclude_stages`.
        exclude_stages: stages, from 1, in which `every` prunes nothing. The first stage sees the finest map
            and is the most sensitive, so it is excluded by default.
        stride: along each axis, the length of the repeating group of positions, at least 2.
        keep: along each axis, the positions kept of each group, from 1 to stride - 1.
        upsample: "nearest", "bilinear" or "bicubic".

    Raises:
        PlanError: if a value is of the wrong type or out of range, or both `every` and `blocks` are given.
    """

    every: int | None = None
    blocks: tuple[int, ...] | None = None
    exclude_stages: tuple[int, ...] = (1,)
    stride: int = 2
    keep: int = 1
    upsample: Upsample = "nearest"

    def __post_init__(self) -> None:
        if self.every is not None and self.blocks is not None:
            raise PlanError(
                f"every = {self.every} and blocks = {self.blocks!r} both say which blocks are pruned; leave one of "
                "them out"
            )
        if self.blocks is None:
            object.__setattr__(self, "every", EVERY if self.every is None else self.every)
            _require_integer("every", self.every, minimum=1, why="every counts blocks")
        object.__setattr__(self, "exclude_stages", _numbers("exclude_stages", self.exclude_stages))
        if self.blocks is not None:
            blocks = _numbers("blocks", self.blocks)
            if not blocks:
                raise PlanError(
                    "blocks is empty, so the plan prunes nothing; name a block or leave blocks out"
                )
            object.__setattr__(self, "blocks", blocks)
        # Checks stride, keep and upsample.
        _ = self.subsample

    @property
    def subsample(self) -> Subsample:
        """What the plan does inside each pruned block."""
        return Subsample(self.stride, self.keep, self.upsample)

    def select(self, depths: Sequence[int]) -> tuple[int, ...]:
        """Return the numbers of the pruned blocks, in order, of a model with these blocks per stage.

        Raises:
            PlanError: if the plan names a block or a stage that does not exist, or prunes nothing.
        """
        total = sum(depths)
        if self.blocks is not None:
            if absent := [block for block in self.blocks if block > total]:
                raise PlanError(
                    f"the plan names {_list('block', absent)}, but the model has blocks 1 to {total}"
                )
            return self.blocks
        if absent := [stage for stage in self.exclude_stages if stage > len(depths)]:
            raise PlanError(
                f"the plan excludes {_list('stage', absent)}, but the model has stages 1 to {len(depths)}"
            )
        stage_of_block = [stage for stage, depth in enumerate(depths, start=1) for _ in range(depth)]
        selected = tuple(
            block
            for block, stage in enumerate(stage_of_block, start=1)
            if self.every is not None and block % self.every == 0 and stage not in self.exclude_stages
        )
        if not selected:
            raise PlanError(
                f"the plan prunes nothing: no block of {tuple(depths)} is a multiple of every = {self.every} "
                f"outside the excluded stages {self.exclude_stages}; lower every, exclude fewer stages or "
                "name blocks"
            )
        return selected

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for TOML or JSON; `from_dict` reads it back.

        `blocks` is left out when it is None, as TOML has no null.
        """
        plan = dataclasses.asdict(self)
        # Manifests always had it, also beside blocks.
        plan["every"] = EVERY if self.every is None else self.every
        plan["exclude_stages"] = list(self.exclude_stages)
        plan["blocks"] = None if self.blocks is None else list(self.blocks)
        return {key: value for key, value in plan.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuarterMap:
        """Build a plan from the table of a recipe or manifest; missing keys take their defaults.

        As manifests have both, `blocks` takes the place of `every`.

        Raises:
            PlanError: if a key is unknown or a value is wrong.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise PlanError(
                    f"unknown key {key!r} in a QuarterMap plan; expected {', '.join(names)}.{hint}"
                )
        given = dict(values)
        if given.get("blocks") is not None:
            given.pop("every", None)
        return cls(**given)


def _require_integer(name: str, value: object, minimum: int, why: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlanError(f"{name} = {value!r} is not a whole number")
    if value < minimum:
        raise PlanError(f"{name} = {value} must be at least {minimum}: {why}")


def _numbers(name: str, values: object) -> tuple[int, ...]:
    """Check a list of block or stage numbers and return it in order."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise PlanError(f"{name} = {values!r} is not a list of numbers")
    # NumPy's whole numbers, as np.arange makes them, become Python's.
    numbers = tuple(
        operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value
        for value in values
    )
    for number in numbers:
        _require_integer(
            f"a number in {name}", number, minimum=1, why="blocks and stages are numbered from 1"
        )
    if repeated := sorted({number for number in numbers if numbers.count(number) > 1}):
        raise PlanError(f"{name} names {', '.join(map(str, repeated))} more than once")
    return tuple(sorted(numbers))


def _list(noun: str, numbers: Sequence[int]) -> str:
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
