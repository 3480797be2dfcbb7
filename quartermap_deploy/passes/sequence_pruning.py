"""Pruning a one-dimensional scan whose steps visit a map: the steps on the plan's rows and columns are gathered.

    SelectiveScan(u, delta, B, C)  →  Gather(SelectiveScan(Gather(u), Gather(delta), Gather(B), Gather(C)))

The kept steps stay in their order, and steps outside the map, such as a class token, all stay. Afterwards each step of
the map takes the output of the kept position that stands for its own: source row floor(i·H'/H), and likewise for
columns.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from quartermap_deploy.lowering.operator import INPUTS_1D
from quartermap_deploy.passes.base import GraphWriter, ScanNode, place_of, producer
from quartermap_deploy.passes.subsampling import pruned_prefix, scanned_name
from quartermap_deploy.pruning.orders import OUTSIDE, ScanOrder
from quartermap_deploy.pruning.plan import Subsample

Steps = NDArray[np.int64]
INT64 = np.dtype(np.int64)


def prune_sequence(graph: gs.Graph, scan: ScanNode, order: ScanOrder, subsample: Subsample) -> None:
    """Write the nodes that gather a scan's steps and spread its output, in place."""
    kept, source = kept_steps(order, subsample)
    y = scan.node.outputs[0]
    prefix = pruned_prefix(scan)
    write = GraphWriter(graph, prefix, y.dtype, place_of(graph, scan.node))
    for name in ("u", "delta", "B", "C"):
        place = INPUTS_1D.index(name)
        scan.node.inputs[place] = _gathered(write, f"keep_{name}", scan.node.inputs[place], kept)
    small = gs.Variable(scanned_name(scan, subsample), dtype=y.dtype)
    scan.node.outputs = [small]
    write = GraphWriter(graph, prefix, y.dtype, place_of(graph, scan.node) + 1)
    last = producer(_gathered(write, "spread", small, source))
    assert last is not None
    last.outputs = [y]


def kept_steps(order: ScanOrder, subsample: Subsample) -> tuple[Steps, Steps]:
    """The steps to keep of each direction, (K, L'), and for each step the kept one that stands for it, (K, L)."""
    rows, columns = (np.array(subsample.kept_indices(size)) for size in (order.height, order.width))
    kept_map = np.zeros((order.height, order.width), bool)
    kept_map[np.ix_(rows, columns)] = True
    nearest = [
        kept[np.arange(size) * len(kept) // size]
        for size, kept in ((order.height, rows), (order.width, columns))
    ]
    stand_in = (nearest[0][:, None] * order.width + nearest[1]).ravel()
    all_kept, all_sources = [], []
    for steps in order.order:
        kept = np.flatnonzero((steps == OUTSIDE) | kept_map.ravel()[steps])
        # Where each step, and each position of the map, is found among the kept ones.
        of_step = np.full(len(steps), OUTSIDE)
        of_step[kept] = np.arange(len(kept))
        of_position = np.full(order.height * order.width, OUTSIDE)
        inside = steps[kept] != OUTSIDE
        of_position[steps[kept][inside]] = np.flatnonzero(inside)
        all_sources.append(np.where(steps == OUTSIDE, of_step, of_position[stand_in[steps]]))
        all_kept.append(kept)
    return np.stack(all_kept).astype(np.int64), np.stack(all_sources).astype(np.int64)


def _gathered(write: GraphWriter, name: str, value: gs.Tensor, steps: Steps) -> gs.Variable:
    """Other steps of a value (batch, K·c, L) or (batch, K, c, L), for each of the K directions its own."""
    rank = len(value.shape or ())
    last = rank - 1 if rank else 2
    if (steps == steps[0]).all():
        return write("Gather", name, [value, write.constant(f"{name}_steps", steps[0])], axis=last)
    count = len(steps)
    parts = write.several("Split", f"{name}_split", [value], count, axis=1, num_outputs=count)
    moved = [
        write("Gather", f"{name}_{k}", [part, write.constant(f"{name}_steps_{k}", steps[k])], axis=last)
        for k, part in enumerate(parts)
    ]
    return write("Concat", name, moved, axis=1)
