"""The grid that the steps of a one-dimensional scan come from, followed upwards through the model.

A scan of tokens knows no rows and columns. But its sequence was once a map: patches in raster order, perhaps with class
tokens between them, perhaps turned round. Going up from u, an operator that acts on one position at a time, a
normalisation, a projection, a residual sum or a convolution along the sequence leaves a step where it is; where
elements are moved, numbers sent through say from where. The first value with two axes of positions is the grid.

What is so found is inferred, not proved: that a step is *about* its position is the intention of the model, and after
mixing nothing else can be meant by it. It is used for pruning alone, never for `recover_2d`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.lowering.operator import SCANS
from quartermap_deploy.passes.recovery.concrete import Concrete
from quartermap_deploy.passes.recovery.graph_index import elements
from quartermap_deploy.passes.recovery.group import GroupSizes, ScanGroup
from quartermap_deploy.passes.recovery.operators import moves
from quartermap_deploy.passes.recovery.programs import program
from quartermap_deploy.passes.recovery.refusal import Refused
from quartermap_deploy.passes.recovery.unrolling import sources_above
from quartermap_deploy.pruning.orders import OUTSIDE, ScanOrder

_MOST_NODES = 4000
_CONVOLUTIONS = ("Conv",)
_PRODUCTS = ("MatMul", "Gemm", "LayerNormalization", "RMSNormalization")
_ELEMENTWISE = {
    "Abs",
    "Add",
    "BatchNormalization",
    "Cast",
    "Clip",
    "Div",
    "Elu",
    "Erf",
    "Exp",
    "Gelu",
    "HardSigmoid",
}
_ELEMENTWISE |= {
    "HardSwish",
    "Identity",
    "LeakyRelu",
    "Log",
    "Mul",
    "Neg",
    "Pow",
    "PRelu",
    "Reciprocal",
    "Relu",
}
_ELEMENTWISE |= {"Sigmoid", "Softplus", "Sqrt", "Sub", "Sum", "Tanh", "Where"}


@dataclass(frozen=True)
class InferredOrder:
    """An order on a grid that was found upstream.

    Attributes:
        order: the order of one scan.
        grid: the value with two axes of positions.
    """

    order: ScanOrder
    grid: str


@dataclass(frozen=True)
class _Track:
    """Where the steps of one direction are in a value.

    Attributes:
        value: the value.
        axes: its axes of positions.
        at: (steps, axes): the coordinates of each step there; `OUTSIDE` for a step that was put in on the way.
        channel: the coordinates of one element on the other axes, by axis; it shows where its positions go.
    """

    value: str
    axes: tuple[int, ...]
    at: NDArray[np.int64]
    channel: dict[int, int]


def infer_order(group: ScanGroup, concrete: Concrete) -> InferredOrder | None:
    """The order of one scan on the grid that its sequence comes from, or None if none is found.

    Args:
        group: of one scan.
        concrete: the graph at one choice of sizes.
    """
    try:
        sizes = GroupSizes.of(group, concrete)
        steps = np.arange(sizes.steps)[:, None]
        (u,) = group.inputs("u")
        found = [
            _grid_above(_Track(u, (2,), steps, {0: 0, 1: direction * sizes.d_inner}), concrete)
            for direction in range(sizes.count)
        ]
    except Refused:
        return None
    grids = {track.value for track in found if track is not None}
    if len(grids) != 1 or any(track is None for track in found):
        return None
    (grid,) = grids
    tracks = [track for track in found if track is not None]
    height, width = (concrete.shape(grid)[axis] for axis in tracks[0].axes)
    orders = [
        np.where(track.at[:, 0] == OUTSIDE, OUTSIDE, track.at[:, 0] * width + track.at[:, 1])
        for track in tracks
    ]
    for one in orders:
        if not np.array_equal(np.sort(one[one != OUTSIDE]), np.arange(height * width)):
            return None
    return InferredOrder(ScanOrder(height, width, np.stack(orders), merged=False), grid)


def _grid_above(track: _Track, concrete: Concrete) -> _Track | None:
    """The nearest value upstream with two axes of positions."""
    pending = [track]
    seen: set[str] = set()
    while pending and len(seen) < _MOST_NODES:
        found = pending.pop()
        if found.value in seen:
            continue
        seen.add(found.value)
        if len(found.axes) == 2:
            return found
        above = sorted(_above(found, concrete), key=lambda item: concrete.index.made_by.get(item.value, -1))
        # The earliest value last, so that it is followed first: a residual sum leads up by its shortest way.
        pending += reversed(above)
    return None


def _above(track: _Track, concrete: Concrete) -> list[_Track]:
    """Where the steps of a track are in the values that its value is made of."""
    node = concrete.index.maker(track.value)
    if node is None:
        return []
    if moves(node, concrete):
        return _through_moves(track, concrete)
    shape = concrete.shape(track.value)
    if node.op_type in _CONVOLUTIONS:
        # What stands in step l of a causal or centred convolution is about step l.
        source = concrete.shape(node.input[0])
        (axis,) = track.axes
        inside = track.at[:, 0] < source[axis] if axis >= 2 else np.array([False])
        return [_Track(node.input[0], track.axes, track.at, {0: 0, 1: 0})] if inside.all() else []
    if node.op_type in SCANS:
        return [_Track(node.input[0], track.axes, track.at, dict(track.channel))]
    if node.op_type in _PRODUCTS:
        # A weight on the left mixes the last axis but one.
        left = node.op_type == "MatMul" and concrete.is_fixed(node.input[0])
        source, mixed = node.input[int(left)], len(shape) - (2 if left else 1)
        if mixed in track.axes or len(concrete.shape(source)) != len(shape):
            return []
        return [_Track(source, track.axes, track.at, {**track.channel, mixed: 0})]
    if node.op_type in _ELEMENTWISE:
        return [
            _Track(name, track.axes, track.at, dict(track.channel))
            for name in node.input
            if name and not concrete.is_fixed(name) and concrete.shape(name) == shape
        ]
    return []


def _through_moves(track: _Track, concrete: Concrete) -> list[_Track]:
    """Where the steps were before they were moved, read off by sending numbers through the nodes that only move.

    Steps that come from weights, as class tokens do, are outside the map from there on.
    """
    found = []
    sources = sources_above([track.value], concrete)
    run = program(concrete, sources, [track.value])
    nothing = [np.zeros(concrete.shape(name)) for name in sources]
    (base,) = run(*nothing)
    for place, source in enumerate(sources):
        shape = concrete.shape(source)
        numbers = 1 + np.arange(elements(shape), dtype=np.float64).reshape(shape)
        (moved,) = run(*nothing[:place], numbers, *nothing[place + 1 :])
        entries = np.rint(moved - base).astype(np.int64) - 1
        seen = entries[_steps_of(track, entries.shape)]
        inside = (seen >= 0) & (track.at[:, 0] != OUTSIDE)
        if inside.any():
            found.append(_before(track, source, shape, np.where(inside, seen, OUTSIDE)))
    # Of two maps that were put side by side neither is the grid.
    return [item for item in found if item is not None] if len(found) == 1 else []


def _steps_of(track: _Track, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The index that takes the elements of a value that stand for the steps of a track."""
    at = np.where(track.at == OUTSIDE, 0, track.at)
    index: list[Any] = [track.channel.get(axis, 0) for axis in range(len(shape))]
    for place, axis in enumerate(track.axes):
        index[axis] = at[:, place]
    return tuple(index)


def _before(track: _Track, source: str, shape: tuple[int, ...], entries: NDArray[np.int64]) -> _Track | None:
    """The track in a source of which the steps are these elements."""
    inside = entries != OUTSIDE
    coordinates = np.stack(np.unravel_index(np.maximum(entries, 0), shape), axis=1)
    varying = tuple(axis for axis in range(len(shape)) if len(np.unique(coordinates[inside, axis])) > 1)
    if not 1 <= len(varying) <= 2:
        return None
    at = np.where(inside[:, None], coordinates[:, varying], OUTSIDE)
    first = coordinates[inside][0]
    channel = {axis: int(first[axis]) for axis in range(len(shape)) if axis not in varying}
    return _Track(source, varying, at, channel)
