"""Shape inference for graphs whose scans have no body yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from quartermap_deploy.errors import PassError
from quartermap_deploy.lowering.operator import DOMAIN, SCANS


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the shape of every value, inferred anew.

    A scan's output has the type and shape of its first input, so for the inference each scan stands as an Identity.
    Large weights are kept out of it.

    Raises:
        PassError: if the graph contradicts itself.
    """
    inferred = _inferred(_without_large_weights(model))
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.value_info[:]
    result.graph.value_info.extend(inferred.graph.value_info)
    return result


def infer_shapes_at(model: onnx.ModelProto, sizes: Mapping[str, Sequence[int]]) -> dict[str, onnx.TypeProto]:
    """Return the type and shape of every value, as far as they are known, at given sizes of the graph's inputs.

    Args:
        model: the model; not changed.
        sizes: the shape of each input.

    Raises:
        PassError: if the graph contradicts itself at these sizes.
    """
    skeleton = _without_large_weights(model)
    # What was inferred for open sizes holds names where there are numbers now.
    del skeleton.graph.value_info[:]
    for value in skeleton.graph.input:
        if value.name in sizes:
            for dim, size in zip(value.type.tensor_type.shape.dim, sizes[value.name], strict=True):
                dim.dim_value = size
    for output in skeleton.graph.output:
        output.type.tensor_type.ClearField("shape")
    graph = _inferred(skeleton).graph
    return {value.name: value.type for value in (*graph.input, *graph.value_info, *graph.output)}


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with inferred shapes; its scans stand as Identity."""
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(model)
    del skeleton.graph.value_info[:]
    for node in skeleton.graph.node:
        if node.domain == DOMAIN and node.op_type in SCANS:
            node.op_type, node.domain = "Identity", ""
            del node.input[1:]
            del node.attribute[:]
    try:
        return onnx.shape_inference.infer_shapes(skeleton, strict_mode=True, data_prop=True)
    except Exception as error:
        raise PassError(f"shape inference found a contradiction in the graph: {error}") from error


def _without_large_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which initializers that shape inference cannot read shapes from are inputs."""
    small = 1024
    copy = onnx.ModelProto()
    for field in model.DESCRIPTOR.fields:
        if field.name == "graph":
            continue
        if field.is_repeated:
            getattr(copy, field.name).extend(getattr(model, field.name))
        elif model.HasField(field.name):
            setattr(copy, field.name, getattr(model, field.name))
    copy.graph.name = model.graph.name
    copy.graph.node.extend(model.graph.node)
    copy.graph.input.extend(model.graph.input)
    copy.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) <= small:
            copy.graph.initializer.append(tensor)
        else:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            copy.graph.input.append(info)
    return copy
