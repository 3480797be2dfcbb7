"""What a graph says about its outputs, and about the maps of its scans."""

from __future__ import annotations

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
    import onnx

    from quartermap_deploy.passes.lower import map_sizes
    from quartermap_deploy.passes.shapes import infer_shapes

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            dim.dim_value = size
    for output in fixed.graph.output:
        output.type.tensor_type.ClearField("shape")
    sizes = map_sizes(infer_shapes(fixed))
    found = {}
    for node in fixed.graph.node:
        if node.domain == DOMAIN and node.op_type == SELECTIVE_SCAN_2D and node.input[0] in sizes:
            order = orders.get(node.name)
            try:
                found[node.name] = order.at(*sizes[node.input[0]]) if order is not None else None
            except PlanError:
                continue
    return {name: order for name, order in found.items() if order is not None}
