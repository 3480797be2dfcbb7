"""A 16-bit graph in a form whose numbers ONNX Runtime can show on a CPU: float32 that is rounded where 16 bits are.

    y = Conv(x, w)                  all bfloat16
    →
    y = round(Conv(x, w))           all float32; round is Cast to bfloat16 and back, w is rounded already

ONNX Runtime 1.31 on a CPU has kernels of its own for 16 bits only where values are moved or normalised. For float16 it
puts casts around every other operator and then drops those between two operators, so that values between them are
neither rounded nor limited to 65504: an overflow that a GPU would meet does not show. For bfloat16 it refuses the
model. In the form made here every operator computes and accumulates in float32 and every value that has 16 bits in the
typed graph is rounded to them.

That is what a runtime does that computes each operator on its own with float32 accumulation. One that fuses operators
rounds less often; one that accumulates in 16 bits is worse than this.
"""

from __future__ import annotations

import onnx
from onnx import helper, numpy_helper

from quartermap_deploy.lowering.element_types import BY_NUMBER, FLOAT, ElementType, types_of_values
from quartermap_deploy.passes.inline_scans import makes_scan
from quartermap_deploy.passes.precision.operator_types import EXACT
from quartermap_deploy.passes.shapes import infer_shapes

_PREFIX = "rounded"


def has_16_bits(model: onnx.ModelProto) -> bool:
    """Whether anything in the main graph is float16 or bfloat16."""
    types = types_of_values(model.graph)
    return any(number in BY_NUMBER for number in types.values())


def rounded_in_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the form of a typed model described above; a model without 16-bit values is returned as it is.

    Args:
        model: typed by `cast_precision`, with or without bodies; not changed.

    Returns:
        A model whose values have the same names and are all float32, inputs and outputs too. What a scan returns is
        named after its node, as `runners.with_block_outputs` wants it, but rounded like everything else.
    """
    if not has_16_bits(model):
        return model
    result = infer_shapes(model)
    graph = result.graph
    types = types_of_values(graph)
    weights = {tensor.name for tensor in graph.initializer}
    ends = {info.name for info in graph.output}
    rename: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []

    def round_value(unrounded: str, name: str, kind: ElementType) -> None:
        half = f"{_PREFIX}/{name}"
        nodes.append(helper.make_node("Cast", [unrounded], [half], half, to=kind.number))
        nodes.append(helper.make_node("Cast", [half], [name], f"{half}/float32", to=FLOAT))

    for info in graph.input:
        number = info.type.tensor_type.elem_type
        if number in BY_NUMBER:
            info.type.tensor_type.elem_type = FLOAT
            if info.name not in weights:
                rename[info.name] = f"{info.name}/{_PREFIX}"
                round_value(info.name, rename[info.name], BY_NUMBER[number])
    for node in graph.node:
        own = onnx.NodeProto()
        own.CopyFrom(node)
        for position, name in enumerate(own.input):
            own.input[position] = rename.get(name, name)
        exact = node.op_type in EXACT and node.domain == ""
        kinds = [BY_NUMBER.get(types.get(name, 0)) for name in node.output]
        _compute_in_float32(own)
        nodes.append(own)
        for position, (name, kind) in enumerate(zip(node.output, kinds, strict=True)):
            if kind is None or exact:
                continue
            own.output[position] = f"{name}/unrounded"
            if makes_scan(node) and node.name and name not in ends:
                own.name = f"{node.name}/unrounded"
                rename[name] = node.name
            round_value(own.output[position], rename.get(name, name), kind)
    for tensor in graph.initializer:
        if tensor.data_type in BY_NUMBER:
            wide = numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    for info in graph.output:
        if info.type.tensor_type.elem_type in BY_NUMBER:
            info.type.tensor_type.elem_type = FLOAT
    del graph.node[:]
    graph.node.extend(nodes)
    return infer_shapes(result)


def _compute_in_float32(node: onnx.NodeProto) -> None:
    """Undo 16-bit types in a node's attributes."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i in BY_NUMBER:
            attribute.i = FLOAT
        elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in BY_NUMBER:
            wide = numpy_helper.to_array(attribute.t).astype("float32")
            attribute.t.CopyFrom(numpy_helper.from_array(wide, attribute.t.name))
