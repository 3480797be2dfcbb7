"""Where the steps of a scan come from: the map that u is unrolled from, and the position of each step.

Going up from u through nodes that only move elements, every value that alone makes u, delta, B and C is a candidate for
the map. Its elements are numbered, the numbers are sent through the graph, and where they come out is the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.passes.recovery.concrete import Concrete
from quartermap_deploy.passes.recovery.group import GroupSizes, ScanGroup
from quartermap_deploy.passes.recovery.maps import MapForm
from quartermap_deploy.passes.recovery.operators import depends_on_data, moves
from quartermap_deploy.passes.recovery.programs import nodes_between, program
from quartermap_deploy.passes.recovery.refusal import Refused
from quartermap_deploy.pruning.orders import OUTSIDE, direction_named


@dataclass(frozen=True)
class Unrolling:
    """How u is made of a map.

    Attributes:
        source: the value that is the map.
        form: how it holds the map.
        height: H; 1 where the value is a sequence.
        width: W.
        order: (K, L): the position that each step of each direction visits; `OUTSIDE` where u is 0.
    """

    source: str
    form: MapForm
    height: int
    width: int
    order: NDArray[np.int64]

    @property
    def directions(self) -> tuple[str | None, ...]:
        """The names of the directions, with None for an order that has no name."""
        return tuple(direction_named(steps, self.height, self.width) for steps in self.order)


def read_unrolling(group: ScanGroup, concrete: Concrete) -> Unrolling:
    """Find the map that a group of scans reads, and the order of its steps.

    Raises:
        Refused: if u is not a map of which each direction takes each position at most once.
    """
    sizes = GroupSizes.of(group, concrete)
    reached = _reached_by_moves(group.inputs("u"), concrete)
    # A map that tells its sides is preferred: where sizes are open, nothing else in the graph may tell them.
    reached.sort(key=lambda value: len(concrete.shape(value)) != 4)
    refusals: list[str] = []
    for value in reached:
        forms = [
            form for form in MapForm.all_of(concrete.shape(value), sizes.d_inner) if form.batch == sizes.batch
        ]
        if not forms or not _makes_all(value, group, concrete, refusals):
            continue
        for form in forms:
            try:
                return read_unrolling_from(value, form, group, concrete)
            except Refused as refusal:
                refusals.append(str(refusal))
    raise Refused(refusals[0] if refusals else _why_no_map(group, concrete))


def read_unrolling_from(value: str, form: MapForm, group: ScanGroup, concrete: Concrete) -> Unrolling:
    """Read the order in which u takes the positions of a value that is known to be its map.

    Raises:
        Refused: if u is anything but positions of the map, the same for all channels and images.
    """
    sizes = GroupSizes.of(group, concrete)
    unroll = program(concrete, [value], group.inputs("u"))
    count = sizes.batch * sizes.d_inner * form.positions
    numbers = 1 + np.arange(count, dtype=np.float64).reshape(sizes.batch, sizes.d_inner, form.positions)
    found = sizes.by_direction(unroll(form.write(numbers)))
    entries = found.astype(np.int64) - 1
    if not (found == entries + 1).all() or entries.max() >= count:
        raise Refused(f"u is not {value} moved about: it holds values that are not in it")
    order = position_of(entries, sizes, form.positions, f"u, unrolled from {value},")
    for steps in order:
        visited = steps[steps != OUTSIDE]
        if len(np.unique(visited)) != len(visited):
            raise Refused(f"a direction takes a position of {value} twice")
    height, width = form.sides if len(form.sides) == 2 else _grid(order, form.positions)
    return Unrolling(value, form, height, width, order)


def position_of(
    entries: NDArray[np.int64], sizes: GroupSizes, positions: int, what: str
) -> NDArray[np.int64]:
    """The position part of numbers (image, channel, position) that came out as (batch, K, d_inner, L).

    Args:
        entries: the numbers, counted up with positions fastest; −1 where there is none.
        sizes: of the scans.
        positions: how many there are.
        what: what the numbers went through, for messages.

    Returns:
        (K, L), with `OUTSIDE` where there is none.

    Raises:
        Refused: if an image or channel is not its own, or channels and images are treated differently.
    """
    outside = entries < 0
    image, rest = np.divmod(entries, sizes.d_inner * positions)
    channel, position = np.divmod(rest, positions)
    position[outside] = OUTSIDE
    if not (position == position[:1, :, :1]).all():
        raise Refused(f"{what} takes other positions for some channels or images than for others")
    if not (outside | (image == np.arange(sizes.batch)[:, None, None, None])).all():
        raise Refused(f"{what} takes positions of another image of the batch")
    if not (outside | (channel == np.arange(sizes.d_inner)[:, None])).all():
        raise Refused(f"{what} takes values of another channel")
    return position[0, :, 0]


def sources_of(group: ScanGroup, concrete: Concrete) -> list[str]:
    """The values that u is moved from: where going up from it through moves ends."""
    return sources_above(group.inputs("u"), concrete)


def sources_above(values: Sequence[str], concrete: Concrete) -> list[str]:
    """The values that some values are moved from, in graph order."""
    index = concrete.index
    reached = _reached_by_moves(values, concrete)
    return [value for value in reached if (node := index.maker(value)) is None or not moves(node, concrete)]


def _reached_by_moves(values: Sequence[str], concrete: Concrete) -> list[str]:
    """The values above some values that only moves stand below, and those values, in graph order."""
    index = concrete.index
    pending, found = list(values), set()
    while pending:
        value = pending.pop()
        if value in found or not value or concrete.is_fixed(value):
            continue
        found.add(value)
        node = index.maker(value)
        if node is not None and moves(node, concrete):
            pending += node.input
    return sorted(found, key=lambda value: index.made_by.get(value, -1))


def _why_no_map(group: ScanGroup, concrete: Concrete) -> str:
    """What stands above u instead of a map, in words."""
    index, sources = concrete.index, sources_of(group, concrete)
    makers = [index.maker(value) for value in sources]
    if any(node is not None and depends_on_data(node, concrete) for node in makers):
        return "the order of its steps depends on the data"
    if len(sources) != 1:
        return f"u is put together from {len(sources)} values: {', '.join(sorted(sources)[:4])}"
    shape = " × ".join(map(str, concrete.shape(sources[0])))
    return f"u is moved from {sources[0]} ({shape}), which is no feature map of its channels"


def _makes_all(value: str, group: ScanGroup, concrete: Concrete, refusals: list[str]) -> bool:
    """Whether a value alone makes u, delta, B and C; if not, why is added to the refusals."""
    for name in ("u", "delta", "B", "C"):
        try:
            nodes_between(concrete, [value], group.inputs(name))
        except Refused as refusal:
            refusals.append(f"{name} is not made of {value} alone: {refusal}")
            return False
    return True


def _grid(order: NDArray[np.int64], positions: int) -> tuple[int, int]:
    """The sides of a map that the graph holds as a sequence, told by a direction along its columns.

    (1, L) where there is none: along rows alone, the map is a sequence.
    """
    grids = []
    for height in range(2, positions // 2 + 1):
        if positions % height == 0:
            names = [direction_named(steps, height, positions // height) or "" for steps in order]
            if all(names) and any(name.startswith("column") for name in names):
                grids.append((height, positions // height))
    return grids[0] if len(grids) == 1 else (1, positions)
