"""A graph at one choice of sizes: the shape of every value, and the values that depend on sizes alone.

Graphs with open sizes hold chains of Shape, Gather, Div and Concat that end in the shapes of Reshape. At given sizes of
the graph's inputs all of these are numbers. A value is *fixed* if no element of an input reaches it, only sizes do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from quartermap_deploy.errors import PassError
from quartermap_deploy.lowering.operator import DOMAIN
from quartermap_deploy.passes.recovery.folding import evaluated
from quartermap_deploy.passes.recovery.graph_index import GraphIndex, attribute, elements, has_subgraph
from quartermap_deploy.passes.recovery.refusal import Refused
from quartermap_deploy.passes.shapes import infer_shapes_at

Shape = tuple[int, ...]
_SHAPE_DATA = 4096
"""Elements that a known input may have to be told to shape inference; shapes and pads are far smaller."""


class Concrete:
    """A graph at one choice of the sizes of its inputs.

    Attributes:
        index: the graph.
        sizes: the shape of each input of the graph.
    """

    def __init__(self, index: GraphIndex, sizes: Mapping[str, Shape]) -> None:
        self.index = index
        self.sizes = dict(sizes)
        (self._opset,) = (
            entry.version for entry in index.model.opset_import if entry.domain in ("", "ai.onnx")
        )
        self._fixed = _fixed_values(index)
        self._arrays: dict[str, NDArray[Any]] = {}
        self._types = infer_shapes_at(index.model, self.sizes)
        self._complete()

    def shape(self, value: str) -> Shape:
        """The shape of a value.

        Raises:
            Refused: if nothing tells it, as where it depends on the data.
        """
        if self.index.is_constant(value):
            return tuple(self.index.constant(value).shape)
        found = _known_shape(self._types.get(value))
        if found is None:
            raise Refused(f"the shape of {value} is not known")
        return found

    def element_type(self, value: str) -> int:
        """The element type of a value, of onnx.TensorProto; 0 if it is not known."""
        if self.index.is_constant(value):
            return int(helper.np_dtype_to_tensor_dtype(self.index.constant(value).dtype))
        known = self._types.get(value)
        return 0 if known is None else int(known.tensor_type.elem_type)

    def is_fixed(self, value: str) -> bool:
        """Whether a value depends on sizes and weights alone."""
        return value in self._fixed or self.index.is_constant(value)

    def array(self, value: str) -> NDArray[Any]:
        """A fixed value.

        Raises:
            Refused: if it cannot be computed at these sizes.
        """
        if self.index.is_constant(value):
            return self.index.constant(value)
        if value not in self._arrays:
            node = self.index.maker(value)
            assert node is not None
            for name, array in zip(node.output, self._outputs(node), strict=False):
                self._arrays[name] = array
        return self._arrays[value]

    def _outputs(self, node: onnx.NodeProto) -> list[NDArray[Any]]:
        if node.op_type == "Shape":
            shape = self.shape(node.input[0])[slice(attribute(node, "start", 0), attribute(node, "end"))]
            return [np.array(shape, np.int64)]
        if node.op_type == "Size":
            return [np.array(elements(self.shape(node.input[0])), np.int64)]
        inputs = [self.array(name) if name else None for name in node.input]
        try:
            return evaluated(node, inputs, self._opset)
        except Exception as error:
            raise Refused(f"{node.op_type} {node.name} fails at these sizes: {error}") from error

    def _complete(self) -> None:
        """Find the shapes that inference over the whole graph has not, node by node with what is known before it."""
        for node in self.index.nodes:
            if all(_known_shape(self._types.get(name)) is not None for name in node.output if name):
                continue
            if node.domain == DOMAIN and (known := self._types.get(node.input[0])) is not None:
                # An output of our operators is as their first input.
                self._types[node.output[0]] = known
            if node.domain not in ("", "ai.onnx"):
                continue
            types = {name: found for name in node.input if (found := self._type(name)) is not None}
            data = {
                name: numpy_helper.from_array(self.array(name)) for name in node.input if self._is_data(name)
            }
            try:
                self._types.update(
                    onnx.shape_inference.infer_node_outputs(
                        onnx.defs.get_schema(node.op_type, self._opset, ""),
                        node,
                        types,
                        data,
                    )
                )
            except Exception:
                # Its shape stays unknown, and what needs it says so.
                continue

    def _type(self, value: str) -> onnx.TypeProto | None:
        if self.index.is_constant(value):
            return helper.make_tensor_type_proto(self.element_type(value), self.shape(value))
        return self._types.get(value)

    def _is_data(self, value: str) -> bool:
        if not self.is_fixed(value):
            return False
        try:
            return elements(self.shape(value)) <= _SHAPE_DATA and self.array(value).dtype.kind in "iub"
        except Refused:
            return False


def _fixed_values(index: GraphIndex) -> set[str]:
    fixed: set[str] = set()
    for node in index.nodes:
        if node.op_type in ("Shape", "Size"):
            fixed.update(node.output)
            continue
        random = node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial")
        if random or has_subgraph(node) or node.domain not in ("", "ai.onnx"):
            continue
        if all(name in fixed or index.is_constant(name) for name in node.input if name):
            fixed.update(name for name in node.output if name)
    return fixed


def _known_shape(type_: onnx.TypeProto | None) -> Shape | None:
    if type_ is None or not type_.HasField("tensor_type") or not type_.tensor_type.HasField("shape"):
        return None
    dims = type_.tensor_type.shape.dim
    if not all(dim.HasField("dim_value") for dim in dims):
        return None
    return tuple(dim.dim_value for dim in dims)


def concrete_graph(index: GraphIndex, sizes: Mapping[str, Shape]) -> Concrete:
    """The graph at these sizes of its inputs.

    Raises:
        Refused: if the graph cannot be run at them.
    """
    try:
        return Concrete(index, sizes)
    except PassError as error:
        raise Refused(_first_lines(error)) from error


def _first_lines(error: Exception) -> str:
    """The start of a message of shape inference, which names every node after the first that fails."""
    return " ".join(str(error).split())[:300]
