"""What a graph says about its outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
