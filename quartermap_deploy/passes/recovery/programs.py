"""Running a part of a graph in ONNX Runtime, in float64, to see what it computes.

float64 holds indices exactly to 2^53, and rounds so little that what is linear can be told from what nearly is. ONNX
Runtime has no convolution in float64; one that acts on single positions is written as a product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from quartermap_deploy.lowering.writer import OPSET
from quartermap_deploy.passes.recovery.concrete import Concrete
from quartermap_deploy.passes.recovery.graph_index import attribute, elements
from quartermap_deploy.passes.recovery.refusal import Refused

Array = NDArray[Any]
Program = Callable[..., list[NDArray[np.float64]]]
"""Takes one array for each input of the part, and returns its outputs."""

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_INLINE = 1 << 16
"""Elements of a fixed value that is written into a program as it is; larger ones are computed where they can be."""


def nodes_between(
    concrete: Concrete, inputs: Iterable[str], outputs: Iterable[str], most: int = 400
) -> list[int]:
    """The places of the nodes that make `outputs` out of `inputs` and fixed values, in graph order.

    Raises:
        Refused: if something else is read on the way, or more than `most` nodes stand there.
    """
    index = concrete.index
    stops = set(inputs)
    pending, seen, places = list(outputs), set(stops), set()
    while pending:
        value = pending.pop()
        if value in seen or not value or concrete.is_fixed(value):
            continue
        seen.add(value)
        place = index.made_by.get(value)
        if place is None:
            raise Refused(f"it also reads {value}, an input of the model")
        if place in places:
            continue
        places.add(place)
        if len(places) > most:
            raise Refused(f"it is made by more than {most} nodes from what it is read from")
        pending += index.nodes[place].input
    return sorted(places)


def program(concrete: Concrete, inputs: Sequence[str], outputs: Sequence[str]) -> Program:
    """Return the part of a graph between some values and others as a function in float64.

    Args:
        concrete: the graph at the sizes at which the part is run.
        inputs: floating-point values that it takes, by position, each of its own shape.
        outputs: floating-point values that it returns, in order.

    Raises:
        Refused: if the part reads other values too, or has an operator that cannot be run so.
    """
    nodes = nodes_between(concrete, inputs, outputs)
    part = _Part(concrete)
    for place in nodes:
        part.add(concrete.index.nodes[place])
    # A value that is taken is returned as it is.
    made = [name for name in dict.fromkeys(outputs) if name not in inputs]
    graph = helper.make_graph(
        part.nodes,
        "part",
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, concrete.shape(name)) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in made],
        part.initializers,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    session = _session(helper.make_model(graph, ir_version=10, opset_imports=opsets)) if made else None

    def run(*arrays: Array) -> list[NDArray[np.float64]]:
        feeds = {name: np.ascontiguousarray(a, np.float64) for name, a in zip(inputs, arrays, strict=True)}
        found = {**feeds, **dict(zip(made, _run(session, made, feeds), strict=True))}
        return [np.asarray(found[name]) for name in outputs]

    return run


def run_once(model: onnx.ModelProto, feeds: dict[str, Array], outputs: Sequence[str]) -> list[Array]:
    """Run a whole small model.

    Raises:
        Refused: if ONNX Runtime cannot.
    """
    return _run(_session(model), list(outputs), feeds)


def _session(model: onnx.ModelProto) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # Parts are run a few times: optimising them takes longer than it saves.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise Refused(f"ONNX Runtime cannot load this part of the graph: {_line(error)}") from error


def _run(session: Any, outputs: list[str], feeds: dict[str, Array]) -> list[Array]:
    if not outputs:
        return []
    try:
        return list(session.run(outputs, feeds))
    except Exception as error:
        raise Refused(f"ONNX Runtime fails on this part of the graph: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


class _Part:
    """Collects the nodes of a part, changed to float64, and the fixed values that they read."""

    def __init__(self, concrete: Concrete) -> None:
        self.concrete = concrete
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._present: set[str] = set()

    def add(self, node: onnx.NodeProto) -> None:
        for name in node.input:
            if name and name not in self._present and self.concrete.is_fixed(name):
                self._add_fixed(name)
        if node.op_type == "Conv":
            self._add_convolution(node)
        else:
            self.nodes.append(_in_double(node))

    def _add_fixed(self, name: str) -> None:
        self._present.add(name)
        node = self.concrete.index.maker(name)
        # A large base of a slice assignment is computed again rather than written out.
        if node is not None and node.op_type in ("ConstantOfShape", "Expand") and self._is_large(name):
            self.add(node)
            return
        array = self.concrete.array(name)
        self._constant(name, array.astype(np.float64) if array.dtype.kind == "f" else array)

    def _is_large(self, name: str) -> bool:
        return elements(self.concrete.shape(name)) > _INLINE

    def _constant(self, name: str, array: Array) -> str:
        # Not ascontiguousarray, which makes a vector of a scalar.
        self.initializers.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def _add_convolution(self, node: onnx.NodeProto) -> None:
        """Write y = Conv(x, w, b) with a kernel of one position as a product of matrices for each group."""
        weight = self.concrete.array(node.input[1]).astype(np.float64)
        if not acts_on_single_positions(node, weight.shape):
            raise Refused(f"the convolution {node.name} reads more than one position")
        shape, groups = self.concrete.shape(node.input[0]), int(attribute(node, "group", 1))
        out, stem = node.output[0], f"{node.output[0]}/as_product"
        matrices = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1])
        split = self._constant(f"{stem}/split", np.array([shape[0], groups, weight.shape[1], -1]))
        whole = self._constant(f"{stem}/whole", np.array([shape[0], weight.shape[0], *shape[2:]]))
        factor = self._constant(f"{stem}/matrices", matrices)
        biased = len(node.input) > 2 and node.input[2] != ""
        product = f"{stem}/sum" if biased else out
        self.nodes += [
            helper.make_node("Reshape", [node.input[0], split], [f"{stem}/in"]),
            helper.make_node("MatMul", [factor, f"{stem}/in"], [f"{stem}/out"]),
            helper.make_node("Reshape", [f"{stem}/out", whole], [product]),
        ]
        if biased:
            bias = self.concrete.array(node.input[2]).astype(np.float64)
            shaped = self._constant(f"{stem}/bias", bias.reshape(-1, *[1] * (len(shape) - 2)))
            self.nodes.append(helper.make_node("Add", [product, shaped], [out]))


def acts_on_single_positions(node: onnx.NodeProto, weight_shape: Sequence[int]) -> bool:
    """Whether a convolution has a kernel of one position and leaves the size as it is."""
    return (
        set(weight_shape[2:]) <= {1}
        and set(attribute(node, "strides", [1])) <= {1}
        and not any(attribute(node, "pads", []))
    )


def _in_double(node: onnx.NodeProto) -> onnx.NodeProto:
    """A copy of a node that makes float64 where it made another floating-point type."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    if node.op_type == "ConstantOfShape" and not node.attribute:
        copy.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.zeros(1))))
    for item in copy.attribute:
        if item.name == "to" and node.op_type == "Cast" and item.i in _FLOATS:
            item.i = TensorProto.DOUBLE
        elif item.HasField("t") and item.t.data_type in _FLOATS:
            array = numpy_helper.to_array(item.t).astype(np.float64)
            item.t.CopyFrom(numpy_helper.from_array(array, item.t.name))
    return copy
