"""What a graph says about its outputs, and about the maps of its scans."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from quartermap_deploy.errors import PlanError
from quartermap_deploy.lowering.operator import DOMAIN, SELECTIVE_SCAN_2D
from quartermap_deploy.pruning.orders import ScanOrder
from quartermap_deploy.tensor_info import TensorInfo

if TYPE_CHECKING:
    import onnx


def output_infos(model: onnx.ModelProto) -> tuple[TensorInfo, ...]:
    """Names, shapes and types of a graph's outputs; an axis of which the graph says nothing is named "any"."""
    import onnx

    found = []
    for value in model.graph.output:
        tensor = value.type.tensor_type
        shape = tuple(
            int(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "any"
            for dim in tensor.shape.dim
        )
        found.append(
            TensorInfo(value.name, shape, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
        )
    return tuple(found)


def orders_at(
    model: onnx.ModelProto,
    shapes: Mapping[str, Sequence[int]],
    orders: Mapping[str, ScanOrder],
    nodes: Mapping[str, str],
) -> dict[str, ScanOrder]:
    """The orders of a graph's scans when its inputs have certain shapes.

    Args:
        model: a graph with open sizes.
        shapes: of its inputs, by name.
        orders: of the module's scans, by name, at whatever size they were read off.
        nodes: names of the graph's scans that several of the module's are together.

    Returns:
        Those that are known at these shapes.
    """
    from quartermap_deploy.passes.shapes import infer_shapes_at

    types = infer_shapes_at(model, shapes)
    sizes: dict[str, tuple[int, int]] = {}
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type == SELECTIVE_SCAN_2D and node.input[0] in types:
            sides = [dim.dim_value for dim in types[node.input[0]].tensor_type.shape.dim[2:]]
            if len(sides) == 2 and all(sides):
                sizes[node.name] = (sides[0], sides[1])
    found: dict[str, ScanOrder] = {}
    for name, order in orders.items():
        if (size := sizes.get(nodes.get(name, name))) is not None:
            with contextlib.suppress(PlanError):
                found[name] = order.at(*size)
    return found
