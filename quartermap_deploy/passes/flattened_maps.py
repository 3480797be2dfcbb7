"""Moving the flattening of a map below the operators that act on one position at a time.

    Reshape(y → sequence) ─ LayerNorm ─ MatMul ─ …   →   LayerNorm ─ MatMul ─ Reshape(→ sequence) ─ …

VMamba's first version and others normalise the merged map as a sequence, (batch, H·W, channels), and make a map of it
again afterwards. Nothing is computed otherwise on the map itself, and there the restoring nodes can pass. Where the map
is made again right behind, both Reshapes go.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from quartermap_deploy.passes.base import (
    GraphWriter,
    constant_of,
    only_consumer,
    place_of,
    varies_over_channels_only,
)

_UNARY = {"Sigmoid", "Gelu", "Relu", "Tanh", "Identity", "Cast", "Erf", "Neg"}
_BINARY = {"Mul", "Add", "Sub", "Div"}


def unflatten_below(graph: gs.Graph, value: gs.Tensor, prefix: str) -> None:
    """Move a Reshape that flattens the channel-last map `value`, or its transpose, as far down as it stays exact.

    Args:
        graph: changed in place.
        value: a map of four axes.
        prefix: what the names of new nodes start with.
    """
    while (node := only_consumer(graph, value)) is not None and node.op == "Transpose":
        value = node.outputs[0]
    if node is None or not _flattens(node):
        return
    passed = _positionwise(graph, node.outputs[0])
    if not passed:
        return
    end = passed[-1].outputs[0]
    back = only_consumer(graph, end)
    passed[0].inputs = [value if item is node.outputs[0] else item for item in passed[0].inputs]
    node.inputs, node.outputs = [], []
    for item in passed:
        item.outputs[0].shape = None
        if item.op == "LayerNormalization":
            item.attrs["axis"] = -1
    if back is not None and _makes_map_again(back, value):
        last, made = passed[-1], back.outputs[0]
        back.inputs, back.outputs = [], []
        last.outputs = [made]
    else:
        _flatten_behind(graph, passed[-1], prefix)
    graph.cleanup()


def _flatten_behind(graph: gs.Graph, last: gs.Node, prefix: str) -> None:
    """Write the flattening again behind a node, under the name that its output has."""
    end = last.outputs[0]
    whole = gs.Variable(f"{prefix}/unflattened", dtype=end.dtype)
    last.outputs = [whole]
    write = GraphWriter(graph, prefix, end.dtype, place_of(graph, last) + 1)
    # Of a map (batch, H, W, channels) 0 keeps the batch; channels may be others than before.
    outer, inner = (
        write("Shape", f"flat_{name}", [whole], dtype=np.dtype(np.int64), start=start, end=stop)
        for name, start, stop in (("batch", 0, 1), ("channels", 3, 4))
    )
    every = write.constant("flat_positions", np.array([-1], np.int64))
    shape = write("Concat", "flat_shape", [outer, every, inner], dtype=np.dtype(np.int64), axis=0)
    flat = gs.Node("Reshape", name=f"{prefix}/flatten", inputs=[whole, shape], outputs=[end])
    graph.nodes.insert(place_of(graph, shape.inputs[0]) + 1, flat)


def _flattens(node: gs.Node) -> bool:
    """Whether a node makes (batch, H·W, channels) of (batch, H, W, channels)."""
    if node.op != "Reshape":
        return False
    shape = constant_of(node.inputs[1])
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if shape is None or len(shape) != 3 or before is None or len(before) != 4:
        return False
    batch = shape[0] == 0 or (isinstance(before[0], int) and shape[0] == before[0])
    # One axis may be counted by −1: the batch, if the others are numbers, or the positions.
    batch = batch or (shape[0] == -1 and _same(shape[1], _positions(before)))
    return bool(batch) and _same(shape[2], before[3]) and (after is None or len(after) == 3)


def _makes_map_again(node: gs.Node, like: gs.Tensor) -> bool:
    """Whether a node makes the sides of `like`, (batch, H, W, channels), out of its sequence of positions."""
    if node.op != "Reshape":
        return False
    made, before = node.outputs[0].shape, like.shape
    if made is None or before is None or len(made) != 4:
        return False
    return all(isinstance(made[axis], int) and made[axis] == before[axis] for axis in (1, 2)) and (
        node.inputs[0].shape is None or _same(made[3], node.inputs[0].shape[-1])
    )


def _positions(shape: Sequence[int | str | None]) -> int | None:
    height, width = shape[1], shape[2]
    return height * width if isinstance(height, int) and isinstance(width, int) else None


def _same(size: int, other: int | str | None) -> bool:
    return isinstance(other, int) and int(size) == other


def _positionwise(graph: gs.Graph, value: gs.Tensor) -> list[gs.Node]:
    """The nodes behind a sequence (batch, L, channels) that act on one position at a time."""
    found: list[gs.Node] = []
    while (node := only_consumer(graph, value)) is not None and _acts_on_positions(node, value):
        found.append(node)
        value = node.outputs[0]
    return found


def _acts_on_positions(node: gs.Node, value: gs.Tensor) -> bool:
    if node.op == "LayerNormalization":
        return int(node.attrs.get("axis", -1)) in (-1, 2) and len(node.outputs) == 1
    if node.op == "MatMul":
        weight = constant_of(node.inputs[1])
        return node.inputs[0] is value and weight is not None and weight.ndim == 2
    if node.op in _BINARY:
        others = [item for item in node.inputs if item is not value]
        return len(others) == 1 and varies_over_channels_only(others[0], 3)
    return node.op in _UNARY
