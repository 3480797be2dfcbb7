"""recover_2d: a scan of a feature map, however it is spelt, becomes one SelectiveScan2D.

    x ─ unroll ─ project ─ SelectiveScan ─ merge ─ y      x ─┬─ Conv ─ Split ─ dt, B, C ─┐
                                                       →     └─────────── SelectiveScan2D ─ y

Public models unroll a map in K directions, project each of the K sequences, scan them one-dimensionally, and put the
results back and add them up: by stack, flip and cat, by slice assignments, by einsum or Conv1d, by one scan with K
groups or by K scans. None of these spellings is known here. Projections act on one position at a time, unrolling and
merging move positions, and so what they do is read off by running these parts of the graph: numbered positions show the
order of every direction, unit vectors the matrices of the projections (`recovery/`).

Directions that scan parts of the map, or windows, or have a gate each before they are added up, become one
SelectiveScan2D each, where that is faster (`recovery/apart.py`). Every other scan that is none of a whole map in rows
or columns, summed in place, keeps its operator, and the report says why. A replacement is compared with what it
replaces on random maps before it is accepted; where sizes are open, at two sizes.

Refuses nothing that a plan names: what it leaves alone is a legal model, in one dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx

from quartermap_deploy.frontend.node_names import read_name
from quartermap_deploy.passes.base import PassReport
from quartermap_deploy.passes.recovery.apart import read_apart
from quartermap_deploy.passes.recovery.concrete import Concrete
from quartermap_deploy.passes.recovery.graph_index import GraphIndex, read_values
from quartermap_deploy.passes.recovery.grids import infer_order
from quartermap_deploy.passes.recovery.group import GroupSizes, ScanGroup
from quartermap_deploy.passes.recovery.probing_sizes import probing_graphs
from quartermap_deploy.passes.recovery.reading import Reading, read_group
from quartermap_deploy.passes.recovery.refusal import Refused
from quartermap_deploy.passes.recovery.unrolling import sources_of
from quartermap_deploy.passes.recovery.writing import Replacement
from quartermap_deploy.passes.shapes import infer_shapes
from quartermap_deploy.pruning.orders import ScanOrder
from quartermap_deploy.pruning.parts import parts_of

NAME = "recover_2d"


@dataclass(frozen=True)
class ScanRecovery:
    """What became of one scan of the traced graph, or of several that were one scan of a map.

    Attributes:
        scans: names of the traced scans.
        nodes: names of the scans that stand for them now: the same ones if they were left alone.
        refused: why they were left alone, or None.
        orders: the order of each of them, by its name, if it is known.
        d_inner: channels of a direction.
        d_state: N.
        rank: R of the time step; None if it has none, or was not looked for.
        source: the value that is the map, and its layout, as "silu (NCHW)"; None if it was not found.
        inferred: where the order of a one-dimensional scan was inferred from, in words, or None.
        apart: whether each direction became a scan of a map of its own.
    """

    scans: tuple[str, ...]
    nodes: tuple[str, ...]
    refused: str | None
    orders: Mapping[str, ScanOrder]
    d_inner: int
    d_state: int
    rank: int | None
    source: str | None
    inferred: str | None = None
    apart: bool = False

    def describe(self) -> str:
        """One line."""
        names = ", ".join(self.scans)
        if self.refused is not None:
            known = "" if self.inferred is None else f"; for pruning, its steps are {self.inferred}"
            return f"{names}: stays one-dimensional: {self.refused}{known}"
        orders = [self.orders[name] for name in self.scans]
        if self.apart:
            parts = [part for order in orders for part in parts_of(order)]
            words = ["another order" if part is None else part.describe() for part in parts]
            directions = f"one direction each: {', '.join(words)}"
        else:
            directions = ", ".join(name for order in orders for name in order.directions or ())
        rank = "full rank" if self.rank is None else f"rank {self.rank}"
        return (
            f"{names}: {directions} of {self.d_inner}×{orders[0].height}×{orders[0].width}, state {self.d_state}, "
            f"time step of {rank}, from {self.source}"
        )


@dataclass
class RecoveryReport(PassReport):
    """What `recover_2d` did.

    Attributes:
        scans: what became of each traced scan, in graph order.
    """

    scans: list[ScanRecovery] = field(default_factory=list)


@dataclass(frozen=True)
class Recovered:
    """What `recover_2d` returns.

    Attributes:
        model: the new model, with the shapes of all its values.
        report: what became of each scan.
    """

    model: onnx.ModelProto
    report: RecoveryReport

    @property
    def orders(self) -> dict[str, ScanOrder]:
        """The order of each traced scan, by its name, where it is known."""
        return {name: order for scan in self.report.scans for name, order in scan.orders.items()}


def recover_2d(model: onnx.ModelProto, example: Mapping[str, Sequence[int]] | None = None) -> Recovered:
    """Recover the scans of feature maps in a traced graph.

    Args:
        model: a model whose scans are SelectiveScan nodes without bodies; not changed. Nodes that are SelectiveScan2D
            already stay as they are.
        example: shapes of the inputs that the model takes, by input name. Where sizes are open, the graph is run at
            sizes that most models take, or at multiples of these.

    Raises:
        PassError: if the graph contradicts itself.
    """
    report = RecoveryReport(NAME)
    index = GraphIndex(model)
    if not index.scans():
        return Recovered(infer_shapes(model), report)
    readings, recoveries = _recovered(index, example)
    report.scans += recoveries
    for recovery in recoveries:
        if recovery.refused is None:
            report.changed.append(recovery.describe())
        elif (name := read_name(recovery.scans[0])) is not None:
            report.refused.setdefault(name.block, recovery.refused)
    replacements = [reading.replacement for reading in readings if reading.replacement is not None]
    return Recovered(infer_shapes(_replaced(model, index, replacements)), report)


def _recovered(
    index: GraphIndex, example: Mapping[str, Sequence[int]] | None
) -> tuple[list[Reading], list[ScanRecovery]]:
    """What was read of each group of scans, in graph order, and what becomes of it."""
    try:
        probes = probing_graphs(index, example)
    except Refused as refusal:
        # What cannot be looked at stays as it is, which is a legal model.
        alone = [Reading(ScanGroup(index, (place,)), refused=str(refusal)) for place in index.scans()]
        return alone, [_unread(reading) for reading in alone]
    readings = [reading for group in _groups(index, probes[0]) for reading in _read(group, probes)]
    readings.sort(key=lambda reading: reading.group.places)
    return readings, [_recovery(reading, probes[0]) for reading in readings]


def _groups(index: GraphIndex, concrete: Concrete) -> list[ScanGroup]:
    """The scans of one map together: they may be its directions."""
    by_source: dict[tuple[str, ...], list[int]] = {}
    for place in index.scans():
        sources = sources_of(ScanGroup(index, (place,)), concrete)
        by_source.setdefault(tuple(sources), []).append(place)
    return [ScanGroup(index, tuple(places)) for places in by_source.values()]


def _read(group: ScanGroup, probes: Sequence[Concrete]) -> list[Reading]:
    """Read scans of one map as its directions, and where they are not, each by itself, and its directions apart."""
    together = read_group(group, probes)
    if together.refused is None:
        return [together]
    alone = [together]
    if len(group.places) > 1:
        alone = [read_group(ScanGroup(group.index, (place,)), probes) for place in group.places]
    return [reading if reading.refused is None else read_apart(reading, probes) for reading in alone]


def _unread(reading: Reading) -> ScanRecovery:
    names = reading.group.names
    return ScanRecovery(names, names, reading.refused, {}, d_inner=0, d_state=0, rank=None, source=None)


def _recovery(reading: Reading, concrete: Concrete) -> ScanRecovery:
    group, unrolling = reading.group, reading.unrolling
    first = ScanGroup(group.index, group.places[:1])
    try:
        sizes = GroupSizes.of(first, concrete)
        d_inner, d_state = sizes.d_inner, sizes.d_state
    except Refused:
        d_inner = d_state = 0
    replacement, projections = reading.replacement, reading.projections
    orders, inferred = reading.orders, None
    if reading.refused is not None and all(order.height == 1 for order in orders.values()):
        found = infer_order(group, concrete) if len(group.places) == 1 else None
        if found is not None:
            orders = {group.names[0]: found.order}
            inferred = f"the {found.order.height}×{found.order.width} positions of {found.grid}"
    return ScanRecovery(
        scans=group.names,
        nodes=group.names if replacement is None else replacement.scans,
        refused=reading.refused,
        orders=orders,
        d_inner=d_inner,
        d_state=d_state,
        rank=None if projections is None else projections.rank,
        source=None if unrolling is None else f"{unrolling.source} ({unrolling.form.layout})",
        inferred=inferred,
        apart=reading.apart,
    )


def _replaced(
    model: onnx.ModelProto, index: GraphIndex, replacements: Iterable[Replacement]
) -> onnx.ModelProto:
    """The model with new nodes in place of those that made the same values, and without what is read no more."""
    before: dict[int, list[onnx.NodeProto]] = {}
    made_anew: set[str] = set()
    initializers: list[onnx.TensorProto] = []
    for replacement in replacements:
        place = min(index.made_by[target] for target in replacement.targets)
        before.setdefault(place, []).extend(replacement.nodes)
        made_anew.update(replacement.targets)
        initializers += replacement.initializers
    nodes: list[onnx.NodeProto] = []
    for place, node in enumerate(index.nodes):
        nodes += before.get(place, [])
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for number, name in enumerate(node.output):
            if name in made_anew:
                # Of a node with several outputs the others may still be read.
                copy.output[number] = f"{name}/replaced"
        nodes.append(copy)
    return _without_unread(model, nodes, initializers)


def _without_unread(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], initializers: Sequence[onnx.TensorProto]
) -> onnx.ModelProto:
    read = {output.name for output in model.graph.output}
    kept = []
    for node in reversed(nodes):
        if any(name in read for name in node.output):
            read.update(read_values(node))
            kept.append(node)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    weights = [tensor for tensor in (*result.graph.initializer, *initializers) if tensor.name in read]
    for values, new in ((result.graph.node, kept[::-1]), (result.graph.initializer, weights)):
        copies = [type(item)() for item in new]
        for copy, item in zip(copies, new, strict=True):
            copy.CopyFrom(item)
        del values[:]
        values.extend(copies)
    return result
