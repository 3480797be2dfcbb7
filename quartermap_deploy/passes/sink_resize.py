"""sink_resize: restore the map after the work instead of before it.

    out_proj(out_norm(restore(y)))  →  restore(out_proj(out_norm(y)))

Nearest upsampling copies positions, and normalisation over channels, 1×1 convolutions, matrix products over channels
and activations act on one position at a time, so they give the same numbers on fewer positions. The restoring nodes
move down to the first node that reads another map: the residual Add, or the gate's Mul.

Restoring works on (batch, channels, H, W). Where the graph is channel-last at the place it has moved to, the
restoring nodes stand between a transpose and its inverse. A map that is flattened to a sequence for some of these
operators stays a map for them (`flattened_maps.py`).

Refuses: interpolation other than nearest, which mixes positions and does not commute with the normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from quartermap_deploy.errors import PassError
from quartermap_deploy.passes.base import (
    GraphWriter,
    PassReport,
    Selection,
    constant_of,
    only_consumer,
    place_of,
    producer,
    selected_scans,
    varies_over_channels_only,
)
from quartermap_deploy.passes.flattened_maps import unflatten_below
from quartermap_deploy.passes.subsampling import (
    pruned_prefix,
    require_pruned,
    restore_chain,
    restored_like,
    write_restore,
)
from quartermap_deploy.pruning.plan import Subsample

NAME = "sink_resize"
RASTER: tuple[int, ...] = (0, 1, 2, 3)
_UNARY = {"Sigmoid", "Gelu", "Relu", "Tanh", "Identity", "Cast", "Erf", "Neg"}
_BINARY = {"Mul", "Add", "Sub", "Div"}


def sink_resize(graph: gs.Graph, selection: Selection) -> PassReport:
    """Move the restoring nodes of every selected block as far down as they stay exact, in place.

    Raises:
        PassError: if a selected block was not pruned by this plan, or nothing restores its map.
    """
    report = PassReport(NAME)
    for scan in selected_scans(graph, selection, NAME):
        require_pruned(scan, selection.subsample, NAME)
        if not scan.of_map:
            report.refused[scan.block] = "its scan is one-dimensional: its steps are spread, not a map"
            continue
        if selection.subsample.upsample != "nearest":
            report.refused[scan.block] = f"{selection.subsample.upsample} interpolation mixes positions"
            continue
        chain, above = _restoring(graph, scan.node.outputs[0])
        if not chain:
            raise PassError(
                f"{NAME}: block {scan.block} is pruned, but nothing restores its map behind the scan"
            )
        unflatten_below(graph, chain[-1].outputs[0], pruned_prefix(scan))
        passed = _positionwise_run(graph, chain[-1].outputs[0])
        # Passing transposes alone would move work about without saving any.
        while passed and passed[-1].op == "Transpose":
            passed.pop()
        if passed:
            _move(graph, pruned_prefix(scan), chain, passed, _axes_after(passed), selection.subsample)
            names = ", ".join(node.op for node in passed if node.op != "Transpose")
            report.changed.append(f"block {scan.block}: restored after {names}")
        elif not above:
            report.refused[scan.block] = (
                f"its restored map is read by {_readers(graph, chain[-1].outputs[0])}"
            )
    return report


def _restoring(graph: gs.Graph, small: gs.Tensor) -> tuple[list[gs.Node], list[gs.Node]]:
    """The nodes that restore the scan's map, and the position-wise ones that stand above them already."""
    above: list[gs.Node] = []
    for node in (None, *_positionwise_run(graph, small)):
        if node is not None:
            above.append(node)
        if chain := restore_chain(small if node is None else node.outputs[0]):
            return chain, [item for item in above if item.op != "Transpose"]
    return [], above


def _readers(graph: gs.Graph, value: gs.Tensor) -> str:
    """Who reads a value, in words."""
    readers = [f"{node.op} {node.name}".strip() for node in value.outputs]
    if any(value is output for output in graph.outputs):
        readers.append("the graph's outputs")
    return " and ".join(readers) or "nothing"


def _positionwise_run(graph: gs.Graph, value: gs.Tensor) -> list[gs.Node]:
    """The nodes that read `value` one after the other and act on one position at a time."""
    run: list[gs.Node] = []
    axes = RASTER
    while (node := only_consumer(graph, value)) is not None and _acts_on_positions(node, value, axes):
        axes = _permuted(axes, node)
        run.append(node)
        value = node.outputs[0]
    return run


def _acts_on_positions(node: gs.Node, value: gs.Tensor, axes: Sequence[int]) -> bool:
    """Whether a node that reads `value`, whose axes stand in the order `axes`, treats each position by itself."""
    channel = tuple(axes).index(1)
    others = [item for item in node.inputs if item is not value]
    if node.op == "Transpose":
        return len(node.attrs.get("perm", ())) == len(RASTER)
    if node.op == "LayerNormalization":
        return channel == 3 and int(node.attrs.get("axis", -1)) in (-1, 3) and len(node.outputs) == 1
    if node.op == "Conv":
        kernel = constant_of(node.inputs[1])
        return (
            channel == 1
            and node.inputs[0] is value
            and kernel is not None
            and kernel.shape[2:] == (1, 1)
            and set(node.attrs.get("strides", [1, 1])) == {1}
            and not any(node.attrs.get("pads", []))
        )
    if node.op == "MatMul":
        weight = constant_of(node.inputs[1])
        return channel == 3 and node.inputs[0] is value and weight is not None and weight.ndim == 2
    if node.op in _BINARY:
        return len(others) == 1 and varies_over_channels_only(others[0], channel)
    return node.op in _UNARY


def _permuted(axes: Sequence[int], node: gs.Node) -> tuple[int, ...]:
    return tuple(axes[axis] for axis in node.attrs["perm"]) if node.op == "Transpose" else tuple(axes)


def _axes_after(run: Sequence[gs.Node]) -> tuple[int, ...]:
    axes = RASTER
    for node in run:
        axes = _permuted(axes, node)
    return axes


def _move(
    graph: gs.Graph,
    prefix: str,
    chain: list[gs.Node],
    passed: Sequence[gs.Node],
    axes: Sequence[int],
    subsample: Subsample,
) -> None:
    """Take the restoring nodes out and write them again behind the passed ones."""
    small, restored, full = chain[0].inputs[0], chain[-1].outputs[0], restored_like(chain)
    passed[0].inputs = [small if item is restored else item for item in passed[0].inputs]
    for node in chain:
        node.inputs, node.outputs = [], []
    # The nodes that computed the size go too, so that their names are free again.
    graph.cleanup()
    end = passed[-1].outputs[0]
    write = GraphWriter(graph, prefix, end.dtype, place_of(graph, passed[-1]) + 1)
    value: gs.Tensor = gs.Variable(f"{prefix}/small", dtype=end.dtype)
    passed[-1].outputs = [value]
    raster = tuple(axes) == RASTER
    if not raster:
        value = write("Transpose", "to_raster", [value], perm=[list(axes).index(axis) for axis in range(4)])
    value = write_restore(write, value, full, subsample)
    if not raster:
        value = write("Transpose", "from_raster", [value], perm=list(axes))
    last = producer(value)
    assert last is not None
    last.outputs = [end]
