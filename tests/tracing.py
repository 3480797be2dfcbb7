"""Exporting a small foreign module with its scans named, for tests of the graph alone."""

from __future__ import annotations

import onnx
import torch
from torch import nn

from quartermap_deploy.frontend.exporter import to_onnx
from quartermap_deploy.frontend.node_names import SCOPES, read_scopes, scan_name
from quartermap_deploy.lowering.operator import DOMAIN

INPUT = "images"


def traced(module: nn.Module, *shape: int, batch: bool = True, sides: bool = False) -> onnx.ModelProto:
    """Export a module of one image, with its modules that scan as blocks 1, 2, and so on.

    Args:
        module: the module.
        shape: of its input.
        batch: whether the batch is open.
        sides: whether height and width are.
    """
    axes = {0: torch.export.Dim("batch")} if batch else {}
    if sides:
        axes |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    model = to_onnx(
        module.eval(), (torch.randn(*shape),), dynamic_shapes=(axes,) if axes else None, input_names=[INPUT]
    )
    blocks: dict[str, int] = {}
    scans: dict[int, int] = {}
    for node in model.graph.node:
        if node.domain == DOMAIN:
            scopes = {item.key: item.value for item in node.metadata_props}.get(SCOPES)
            path = (read_scopes(scopes) or ("",))[-1]
            block = blocks.setdefault(path, len(blocks) + 1)
            scans[block] = scans.get(block, 0) + 1
            node.name = scan_name(block, place=scans[block])
    return model
