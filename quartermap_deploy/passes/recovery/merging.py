"""Where the outputs of a scan's steps go: the value in which the directions meet, and the position of each step in it.

Going down from the scans through nodes that move or add up, every value is a candidate through which all that leaves
the scans must pass. The steps of one direction at a time are numbered, and where the numbers come out is its merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.passes.recovery.concrete import Concrete
from quartermap_deploy.passes.recovery.group import GroupSizes, ScanGroup
from quartermap_deploy.passes.recovery.maps import MapForm
from quartermap_deploy.passes.recovery.operators import moves, sums
from quartermap_deploy.passes.recovery.programs import program
from quartermap_deploy.passes.recovery.refusal import Refused
from quartermap_deploy.passes.recovery.unrolling import Unrolling, position_of
from quartermap_deploy.pruning.orders import OUTSIDE


class NotSummed(Refused):
    """The directions do not meet by being added up: something else reads them first."""


@dataclass(frozen=True)
class Merge:
    """How a value is made of the scans' outputs.

    Attributes:
        target: the value.
        form: how it holds the map.
        steps: (K, positions): the step of each direction that each position of the map takes; `OUTSIDE` for none.
        share: (K,), what each direction is multiplied with: 1 for a sum, 1/K for a mean.
    """

    target: str
    form: MapForm
    steps: NDArray[np.int64]
    share: NDArray[np.float64]

    def is_in_place(self, unrolling: Unrolling) -> bool:
        """Whether every position gets from each direction what it gave to it."""
        positions = np.arange(self.steps.shape[1])
        return all(
            (found != OUTSIDE).all() and np.array_equal(order[found], positions)
            for order, found in zip(unrolling.order, self.steps, strict=True)
        )

    def gives_back(self, unrolling: Unrolling) -> bool:
        """Whether a position that a direction visits gets from it what it gave to it, and no other gets anything."""
        for order, found in zip(unrolling.order, self.steps, strict=True):
            visited = order[order != OUTSIDE]
            given = np.flatnonzero(found != OUTSIDE)
            if not np.array_equal(np.sort(visited), given) or not np.array_equal(order[found[given]], given):
                return False
        return True

    @property
    def is_even(self) -> bool:
        """Whether all directions count the same."""
        return bool((self.share == self.share[0]).all())


def read_merge(group: ScanGroup, unrolling: Unrolling, concrete: Concrete) -> Merge:
    """Find the value in which the directions of a group meet.

    Raises:
        NotSummed: if there is none, because something else than a sum reads them.
        Refused: if there is none that is the map again.
    """
    merged = _reached(group, concrete)
    inside = set(merged)
    targets = [
        value
        for value in merged
        if _forms(value, group, unrolling, concrete) and not _leaving(group, inside, concrete, value)
    ]
    if not targets:
        raise NotSummed(
            f"its directions do not meet in a map by being added up: {_leaving(group, inside, concrete)}"
        )
    refusals = []
    # The last one first: behind it stands what reads the map, in the layout in which it reads it.
    for value in reversed(targets):
        try:
            return read_merge_at(value, group, unrolling, concrete)
        except Refused as refusal:
            refusals.append(str(refusal))
    raise Refused(refusals[-1])


def _forms(value: str, group: ScanGroup, unrolling: Unrolling, concrete: Concrete) -> list[MapForm]:
    """The forms in which a value may hold the map that is scanned."""
    sizes, sides = GroupSizes.of(group, concrete), (unrolling.height, unrolling.width)
    return [
        form
        for form in MapForm.all_of(concrete.shape(value), sizes.d_inner)
        if form.batch == sizes.batch
        and (form.sides == sides or (len(form.sides) == 1 and form.positions == unrolling.form.positions))
    ]


def read_merge_at(value: str, group: ScanGroup, unrolling: Unrolling, concrete: Concrete) -> Merge:
    """Read how a value is made of the steps of each direction.

    Raises:
        Refused: if it is anything but steps of the directions, the same for all channels and images, added up.
    """
    sizes = GroupSizes.of(group, concrete)
    forms = _forms(value, group, unrolling, concrete)
    if not forms:
        shown = " × ".join(map(str, concrete.shape(value)))
        raise Refused(f"its directions meet in {value} ({shown}), which is not the map that they scan")
    merge = program(concrete, group.outputs, [value])
    refusals = []
    for found in forms:
        try:
            return Merge(value, found, *_steps(merge, found, sizes, value))
        except Refused as refusal:
            refusals.append(str(refusal))
    raise Refused(refusals[0])


def _steps(
    merge: Any, form: MapForm, sizes: GroupSizes, value: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The steps and the share of each direction in a value, by numbering the steps of one direction at a time."""
    count = sizes.batch * sizes.d_inner * sizes.steps
    numbers = 1 + np.arange(count, dtype=np.float64).reshape(sizes.batch, sizes.d_inner, sizes.steps)
    steps, shares = [], []
    for direction in range(sizes.count):
        fed = np.zeros((sizes.batch, sizes.count, sizes.d_inner, sizes.steps))
        fed[:, direction] = 1
        (ones,) = merge(*sizes.by_scan(fed))
        share = float(ones.max())
        if share <= 0 or not ((ones == 0) | (ones == share)).all():
            raise Refused(f"direction {direction + 1} is not added to {value} with one weight")
        fed[:, direction] = numbers
        (found,) = merge(*sizes.by_scan(fed))
        whole = form.read(found) / share
        entries = np.rint(whole).astype(np.int64) - 1
        if not np.abs(whole - (entries + 1)).max() <= 1e-3 or entries.max() >= count:
            raise Refused(f"direction {direction + 1} is not merged into {value} by moving its steps")
        # One direction of as many steps as the target has positions.
        placed = position_of(
            entries[:, None], sizes, sizes.steps, f"the merge of direction {direction + 1} into {value}"
        )
        steps.append(placed[0])
        shares.append(share)
    return np.stack(steps), np.array(shares)


def _reached(group: ScanGroup, concrete: Concrete) -> list[str]:
    """The values below the scans that only moves and sums stand above, in graph order."""
    index = concrete.index
    reached = list(group.outputs)
    known = set(reached)
    pending = sorted({place for value in reached for place in index.read_by.get(value, [])})
    while pending:
        place = pending.pop(0)
        node = index.nodes[place]
        data = [name for name in node.input if name and not concrete.is_fixed(name)]
        if not all(name in known for name in data) or not (moves(node, concrete) or sums(node, concrete)):
            continue
        made = [name for name in node.output if name and name not in known]
        reached += made
        known.update(made)
        pending = sorted({*pending, *(later for name in made for later in index.read_by.get(name, []))})
    return sorted(reached, key=lambda value: index.made_by[value])


def _leaving(group: ScanGroup, merged: set[str], concrete: Concrete, target: str = "") -> str:
    """What reads the scans' outputs outside of their merge, past `target`, in words; empty if nothing does."""
    index = concrete.index
    pending, seen = [value for value in group.outputs if value != target], set()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in index.outputs:
            return f"{value} is an output of the model"
        for place in index.read_by.get(value, []):
            node = index.nodes[place]
            made = [name for name in node.output if name]
            # A size that is asked of the merge, and used in it alone, goes with it.
            if not all(name in merged or concrete.is_fixed(name) for name in made):
                return f"{node.op_type} {node.name} reads {value}"
            pending += [name for name in made if name != target]
    return ""
