"""settle_shapes: what shape inference knows already becomes a constant, and casts that change nothing go.

    Shape(x)                             →  Constant, where the sizes asked for are known
    Concat, Squeeze, … of constants      →  Constant
    Reshape(x, Concat(Shape(x), …))      →  Reshape(x, Constant), where at most one size is open, which is -1
    Flatten(x)                           →  Reshape(x, Constant), likewise
    Cast(x) to the type that x has       →  x
    CastLike(x, y)                       →  Cast(x), or x

For files in which the scans are written out. Their bodies serve every size and compute the one at hand by dozens of
nodes, which other tools would have to understand to tell a shape. ONNX Runtime's symbolic shape inference cannot, and
onnxscript 0.7's optimiser puts constants in their place behind the nodes that read them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from quartermap_deploy.frontend.node_names import names_scan, read_name
from quartermap_deploy.lowering.element_types import types_of_values
from quartermap_deploy.lowering.versions import opset_of
from quartermap_deploy.passes.recovery.folding import evaluated
from quartermap_deploy.passes.shapes import infer_shapes

_ROUNDS = 6
"""A constant tells shapes, and these tell constants; bodies of scans need three rounds."""
_FOLDED = ("Add", "Concat", "Div", "Gather", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze")
_LARGEST = 64
"""Numbers of a constant that is computed; shapes have fewer."""


def settle_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the shapes that are known as constants; not changed itself.

    Names of nodes and values stay, but for those that go; a node that made what a scan returns hands its name on.

    Raises:
        PassError: if the graph contradicts itself.
    """
    result = infer_shapes(model)
    _drop_casts(result.graph)
    for _ in range(_ROUNDS):
        if not _fold(result.graph, opset_of(result)):
            break
        _drop_unread(result.graph)
        result = infer_shapes(result)
    return result


# Casts ---------------------------------------------------------------------------------------------------------------


def _drop_casts(graph: onnx.GraphProto) -> None:
    """Drop casts to the type that a value has, in place; others are told the type by its number."""
    types = types_of_values(graph)
    makers = {name: node for node in graph.node for name in node.output}
    kept_names = {value.name for value in (*graph.input, *graph.output)}
    renamed: dict[str, str] = {}
    gone: set[str] = set()
    for node in graph.node:
        if node.op_type not in ("Cast", "CastLike") or node.domain:
            continue
        (y,), x = node.output, node.input[0]
        if types.get(x) != types.get(y):
            if node.op_type == "CastLike" and types.get(y):
                node.op_type = "Cast"
                del node.input[1:], node.attribute[:]
                node.attribute.append(helper.make_attribute("to", types[y]))
            continue
        if names_scan(node.name):
            # The maker of x is of the scan's body, and nothing else reads x.
            maker = makers[x]
            maker.name, maker.output[0] = node.name, y
        elif y in kept_names or read_name(y) is not None:
            continue
        else:
            renamed[y] = renamed.get(x, x)
        gone.add(node.output[0])
    _keep(
        graph,
        [node for node in graph.node if not (node.op_type.startswith("Cast") and node.output[0] in gone)],
    )
    for values in _inputs(graph):
        for place, name in enumerate(values):
            if name in renamed:
                values[place] = renamed[name]


# Shapes --------------------------------------------------------------------------------------------------------------


def _fold(graph: onnx.GraphProto, opset: int) -> bool:
    """Replace what is known, in place; returns whether anything was."""
    known = _constants(graph)
    shapes = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    found = False
    for node in graph.node:
        value = _value(node, known, shapes, opset)
        if value is not None:
            known[node.output[0]] = value
            node = _constant(node.output[0], value, node.name)
            found = True
        elif node.op_type == "Flatten" or (node.op_type == "Reshape" and _asks(node, known)):
            sides = shapes.get(node.output[0])
            if sides is not None and sum(side < 1 for side in sides) <= 1:
                shape = np.array([side if side > 0 else -1 for side in sides], np.int64)
                nodes.append(_constant(f"{node.output[0]}/sizes", shape))
                inputs = [node.input[0], nodes[-1].output[0]]
                node = helper.make_node("Reshape", inputs, node.output, node.name)
                found = True
        nodes.append(node)
    _keep(graph, nodes)
    return found


def _asks(reshape: onnx.NodeProto, known: dict[str, NDArray[np.int64]]) -> bool:
    """Whether a Reshape takes sizes that are computed, or are those of its input, which is what 0 means.

    Tools that make one Reshape of two (onnxoptimizer 0.4, onnxsim 0.4) read the 0 as a size of what comes before both.
    """
    shape = known.get(reshape.input[1])
    return shape is None or 0 in shape


def _constants(graph: onnx.GraphProto) -> dict[str, NDArray[np.int64]]:
    """The short vectors and numbers of int64 that are constants: what sizes are made of."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensors[node.output[0]] = node.attribute[0].t
    return {
        name: numpy_helper.to_array(tensor)
        for name, tensor in tensors.items()
        if tensor.data_type == onnx.TensorProto.INT64 and np.prod(tensor.dims, dtype=int) <= _LARGEST
    }


def _value(
    node: onnx.NodeProto, known: dict[str, NDArray[np.int64]], shapes: dict[str, list[int]], opset: int
) -> NDArray[np.int64] | None:
    """What a node makes, where that is a constant of sizes."""
    if node.domain:
        return None
    if node.op_type == "Shape" and node.input[0] in shapes:
        bounds = {attribute.name: attribute.i for attribute in node.attribute}
        sides = shapes[node.input[0]][bounds.get("start", 0) : bounds.get("end")]
        return np.array(sides, np.int64) if all(side > 0 for side in sides) else None
    if node.op_type in _FOLDED and all(name in known for name in node.input):
        (value,) = evaluated(node, [known[name] for name in node.input], opset)
        return value if value.size <= _LARGEST else None
    return None


def _constant(value: str, array: NDArray[np.int64], name: str = "") -> onnx.NodeProto:
    return helper.make_node("Constant", [], [value], name or value, value=numpy_helper.from_array(array))


# Graphs --------------------------------------------------------------------------------------------------------------


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Drop nodes whose outputs nothing reads, in place."""
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            kept.append(node)
            read.update(node.input)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    read.update(name for values in _inputs(attribute.g) for name in values)
    _keep(graph, kept[::-1])


def _inputs(graph: onnx.GraphProto) -> Iterator[list[str]]:
    """The inputs of every node, and of the nodes in its graphs."""
    for node in graph.node:
        yield node.input
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _inputs(attribute.g)


def _keep(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
