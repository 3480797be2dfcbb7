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
    model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]], orders: Mapping[str, ScanOrder]
) -> dict[str, ScanOrder]:
    """The orders of a graph's scans when its inputs have certain shapes.

    Args:
        model: a graph with open sizes.
        shapes: of its inputs, by name.
        orders: of its scans, by name, at whatever size they were read off.

    Returns:
        Those that are known at these shapes.
    """
    from quartermap_deploy.passes.shapes import infer_shapes_at

    types = infer_shapes_at(model, shapes)
    found: dict[str, ScanOrder] = {}
    for node in model.graph.node:
        if node.domain != DOMAIN or node.op_type != SELECTIVE_SCAN_2D or node.name not in orders:
            continue
        value = types.get(node.input[0])
        sides = [] if value is None else [dim.dim_value for dim in value.tensor_type.shape.dim[2:]]
        if len(sides) == 2 and all(sides):
            with contextlib.suppress(PlanError):
                found[node.name] = orders[node.name].at(*sides)
    return found
