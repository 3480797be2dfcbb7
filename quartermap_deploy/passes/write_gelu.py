"""write_gelu: write Gelu out in float16, in the operators that it consists of.

    Gelu(x)                →  0.5 · x · (1 + Erf(x / √2))
    Gelu(x) <"tanh">       →  0.5 · x · (1 + Tanh(√(2/π) · (x + 0.044715 · x³)))

ONNX defines Gelu so, and ONNX Runtime has no kernel for float16 on a CPU: it writes Gelu out itself, with √2 as a Sqrt
of float16, for which it has none either, and prints a warning for each. Written out here, √2 is a constant, and ONNX
Runtime, which makes one operator of these nodes again, has nothing to say. The numbers are the same, bit for bit; those
of the form by Tanh, whose constants are rounded once, are as close.

Refuses: nothing. Gelu in other types stays, as runtimes have it.
"""

from __future__ import annotations

import math

import onnx
from onnx import helper

from quartermap_deploy.lowering.element_types import FLOAT, element_type, types_of_values
from quartermap_deploy.passes.shapes import infer_shapes


def write_gelu(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose Gelus of float16 are written out.

    Args:
        model: with the types of its values; not changed. One without such a Gelu is returned as it is.
    """
    types, half = types_of_values(model.graph), element_type("float16").number
    found = [
        node for node in model.graph.node if node.op_type == "Gelu" and types.get(node.output[0]) == half
    ]
    if not found:
        return model
    outputs = {node.output[0] for node in found}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes += gelu_nodes(node, half) if node.output[0] in outputs else [node]
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return infer_shapes(result)


def gelu_nodes(node: onnx.NodeProto, number: int = FLOAT) -> list[onnx.NodeProto]:
    """What a Gelu consists of, in the order of factors in which ONNX Runtime makes one operator of them again.

    Args:
        node: the Gelu.
        number: ONNX's number of the type that it computes in.
    """
    (x,), (y,) = node.input, node.output
    prefix = node.name or y
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, value: float) -> str:
        tensor = helper.make_tensor(f"{prefix}/{name}", number, [], [value])
        nodes.append(helper.make_node("Constant", [], [tensor.name], tensor.name, value=tensor))
        return str(tensor.name)

    def write(op: str, name: str, *inputs: str) -> str:
        made = helper.make_node(op, inputs, [f"{prefix}/{name}"], f"{prefix}/{name}")
        nodes.append(made)
        return str(made.output[0])

    half, one = constant("half", 0.5), constant("one", 1.0)
    if any(attribute.name == "approximate" and attribute.s == b"tanh" for attribute in node.attribute):
        cube = write("Mul", "cube", write("Mul", "square", x, x), x)
        inner = write("Add", "sum", x, write("Mul", "small", cube, constant("weight", 0.044715)))
        curve = write(
            "Tanh", "tanh", write("Mul", "scaled", inner, constant("scale", math.sqrt(2 / math.pi)))
        )
    else:
        curve = write("Erf", "erf", write("Div", "scaled", x, constant("root", math.sqrt(2))))
    gate = write("Mul", "gated", x, write("Add", "gate", curve, one))
    nodes.append(helper.make_node("Mul", [gate, half], [y], prefix))
    return nodes
