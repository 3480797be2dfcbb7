"""insert_quartermap: QuarterMap in its canonical form (arXiv 2507.09514).

    x ─┬─ Conv ─ Split ─ dt, B, C ─┐            x ─ keep ─┬─ Conv ─ Split ─ dt, B, C ─┐
       └───────────── SelectiveScan2D ─ y   →             └───────────── SelectiveScan2D ─ restore ─ y

In every selected block some positions of the map x are kept before the projections and the scan, and the output of the
scan is brought back to the size of x. This is the one pass that changes what the model computes.

A scan that stayed one-dimensional is pruned by its steps, where their order on a map is known (`sequence_pruning.py`).
All scans of a block are pruned, and the directions of one map together.

Refuses: a block whose x is read on the way to the scan by anything but operators that act on one position at a time,
because the scan of the smaller map would then see other values; and what cannot be pruned soundly (`prunable.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from quartermap_deploy.errors import PassError
from quartermap_deploy.lowering.operator import MAPS
from quartermap_deploy.passes.base import (
    GraphWriter,
    PassReport,
    ScanNode,
    Selection,
    constant_of,
    place_of,
    producer,
    selected_scans,
    varies_over_channels_only,
)
from quartermap_deploy.passes.prunable import require_prunable
from quartermap_deploy.passes.sequence_pruning import prune_sequence
from quartermap_deploy.passes.subsampling import (
    is_pruned,
    pruned_prefix,
    scanned_name,
    write_keep,
    write_restore,
)
from quartermap_deploy.pruning.plan import Subsample

NAME = "insert_quartermap"


def insert_quartermap(graph: gs.Graph, selection: Selection) -> PassReport:
    """Subsample the selected blocks of a graph in place; blocks that this plan has subsampled are left as they are.

    Raises:
        PassError: if a selected block is missing, is not of a form above, cannot be pruned soundly, or was subsampled
            by another plan. Nothing is changed then.
    """
    report = PassReport(NAME)
    subsample = selection.subsample
    pending = [
        scan for scan in selected_scans(graph, selection, NAME) if not is_pruned(scan, subsample, NAME)
    ]
    # All is looked at before anything is written.
    for scan in pending:
        require_prunable(scan, selection, NAME)
    groups = _by_map([scan for scan in pending if scan.of_map])
    paths = [_pointwise_path(graph, group) for group in groups]
    for group, path in zip(groups, paths, strict=True):
        _insert(graph, group, path, subsample)
    for scan in pending:
        if not scan.of_map:
            prune_sequence(graph, scan, selection.orders[scan.name], subsample)
    for block in dict.fromkeys(scan.block for scan in pending):
        report.changed.append(
            f"block {block}: keep {subsample.keep} of {subsample.stride} rows and columns, restore by "
            f"{subsample.upsample}"
        )
    return report


def _by_map(scans: Sequence[ScanNode]) -> list[list[ScanNode]]:
    """Scans of one block that read one map together, as directions that are scanned one by one do."""
    groups: dict[tuple[int, int], list[ScanNode]] = {}
    for scan in scans:
        groups.setdefault((scan.block, id(scan.node.inputs[0])), []).append(scan)
    return list(groups.values())


def _insert(
    graph: gs.Graph, scans: Sequence[ScanNode], projections: Sequence[gs.Node], subsample: Subsample
) -> None:
    """Prune the scans of one map."""
    x = scans[0].node.inputs[0]
    inside = [*(scan.node for scan in scans), *projections]
    readers = [node for node in x.outputs if any(node is item for item in inside)]
    first = min(place_of(graph, node) for node in readers)
    kept = write_keep(GraphWriter(graph, pruned_prefix(scans[0]), x.dtype, first), x, subsample)
    for node in readers:
        node.inputs = [kept if item is x else item for item in node.inputs]
    for scan in scans:
        y = scan.node.outputs[0]
        small = gs.Variable(scanned_name(scan, subsample), dtype=y.dtype)
        scan.node.outputs = [small]
        write = GraphWriter(graph, pruned_prefix(scan), y.dtype, place_of(graph, scan.node) + 1)
        restored = write_restore(write, small, x, subsample)
        # The restored map takes the old output's place in its producer, so that its name and readers stay.
        last = producer(restored)
        assert last is not None
        last.outputs = [y]


def _pointwise_path(graph: gs.Graph, scans: Sequence[ScanNode]) -> list[gs.Node]:
    """The nodes between the map x that some scans read and their dt, B and C.

    Raises:
        PassError: if one of them mixes positions, or reads a map other than x.
    """
    x, block = scans[0].node.inputs[0], scans[0].block
    found: list[gs.Node] = []
    pending = [value for scan in scans for value in scan.node.inputs[MAPS][1:]]
    while pending:
        value = pending.pop()
        if value is x or constant_of(value) is not None:
            continue
        node = producer(value)
        if node is None:
            raise PassError(f"{NAME}: block {block} projects {value.name}, which does not come from {x.name}")
        if any(node is item for item in found):
            continue
        if not _acts_pointwise(node):
            raise PassError(
                f"{NAME}: block {block} has the node {node.name} ({node.op}) between its map and its scan, which "
                "does not act on one position at a time; expected a 1×1 convolution and a split of channels"
            )
        found.append(node)
        pending += node.inputs
    _require_private(graph, found, scans)
    return found


def _require_private(graph: gs.Graph, projections: Sequence[gs.Node], scans: Sequence[ScanNode]) -> None:
    """Refuse projections that something else than the scans reads, which needs every position of them."""
    block = scans[0].block
    inside = {*(id(scan.node) for scan in scans), *map(id, projections)}
    for value in (output for node in projections for output in node.outputs):
        outside = [node.name for node in value.outputs if id(node) not in inside]
        if outside or any(value is output for output in graph.outputs):
            raise PassError(
                f"{NAME}: {value.name} of block {block} is also read by {', '.join(outside) or 'the graph output'}"
                ", which needs every position"
            )


def _acts_pointwise(node: gs.Node) -> bool:
    if node.op == "Conv":
        kernel = constant_of(node.inputs[1])
        strides = node.attrs.get("strides", [1, 1])
        return kernel is not None and kernel.shape[2:] == (1, 1) and set(strides) == {1}
    if node.op == "Split":
        return int(node.attrs.get("axis", 0)) == 1
    if node.op in ("Mul", "Add", "Sub"):
        constants = [item for item in node.inputs if constant_of(item) is not None]
        return all(varies_over_channels_only(item, channel=1) for item in constants)
    return node.op in ("Sigmoid", "Identity", "Cast")
