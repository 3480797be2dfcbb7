"""The graph passes, in order. Each is a file of its own with before → after in its docstring.

`insert_quartermap` carries out the plan; `hoist_slice` and `sink_resize` make the pruned blocks cheaper without
changing a number, and are left out where the paper's canonical form is wanted. `recover_2d` comes before all of them,
on graphs of modules that are not ours, and needs no plan.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from quartermap_deploy.passes.at_opset import at_opset
from quartermap_deploy.passes.base import GraphPass, PassReport, Selection
from quartermap_deploy.passes.hoist_slice import hoist_slice
from quartermap_deploy.passes.insert_quartermap import insert_quartermap
from quartermap_deploy.passes.lower import lower
from quartermap_deploy.passes.shapes import infer_shapes
from quartermap_deploy.passes.sink_resize import sink_resize
from quartermap_deploy.passes.write_gelu import write_gelu

CANONICAL: tuple[GraphPass, ...] = (insert_quartermap,)
OPTIMIZED: tuple[GraphPass, ...] = (insert_quartermap, hoist_slice, sink_resize)

__all__ = [
    "CANONICAL",
    "OPTIMIZED",
    "GraphPass",
    "PassReport",
    "Selection",
    "at_opset",
    "hoist_slice",
    "infer_shapes",
    "insert_quartermap",
    "lower",
    "run_passes",
    "sink_resize",
    "write_gelu",
]


def run_passes(
    model: onnx.ModelProto, selection: Selection, passes: Sequence[GraphPass] = OPTIMIZED
) -> tuple[onnx.ModelProto, list[PassReport]]:
    """Run graph passes over a model.

    Args:
        model: a model whose scans have no bodies yet, as `frontend.exporter.trace` returns it; not changed.
        selection: the blocks to prune, and how.
        passes: in order.

    Returns:
        The new model, with the shapes of all its values, and what each pass did.

    Raises:
        PassError: if a pass does not find what the plan names.
    """
    import onnx_graphsurgeon as gs

    graph = gs.import_onnx(infer_shapes(model))
    reports = [graph_pass(graph, selection) for graph_pass in passes]
    graph.toposort()
    changed = gs.export_onnx(graph, do_type_check=False)
    return infer_shapes(changed), reports
