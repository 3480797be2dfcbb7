"""A traced graph as recovery reads it: who makes a value, who reads it, and its constants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from quartermap_deploy.lowering.operator import DOMAIN, SELECTIVE_SCAN


class GraphIndex:
    """The main graph of a model by the names of its values. The model must not change while this is used.

    Attributes:
        model: the model.
        nodes: its nodes, in the order of the graph, which ONNX wants to be topological.
        made_by: for each value, the place in `nodes` of the node that makes it.
        read_by: for each value, the places of the nodes that read it; a subgraph reads for the node that holds it.
        outputs: names of the graph's outputs.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.made_by: dict[str, int] = {}
        self.read_by: dict[str, list[int]] = {}
        for place, node in enumerate(self.nodes):
            for name in node.output:
                if name:
                    self.made_by[name] = place
            for name in read_values(node):
                self.read_by.setdefault(name, []).append(place)
        self.outputs = {output.name for output in model.graph.output}
        self.inputs = {value.name: value for value in model.graph.input}
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._arrays: dict[str, NDArray[Any]] = {}

    def maker(self, value: str) -> onnx.NodeProto | None:
        """The node that makes a value, or None for inputs and weights."""
        place = self.made_by.get(value)
        return None if place is None else self.nodes[place]

    def is_constant(self, value: str) -> bool:
        """Whether a value is a weight."""
        return value in self._initializers

    def constant(self, value: str) -> NDArray[Any]:
        """The array of a weight."""
        if value not in self._arrays:
            self._arrays[value] = numpy_helper.to_array(self._initializers[value])
        return self._arrays[value]

    def scans(self) -> list[int]:
        """The places of the one-dimensional scans."""
        return [
            place
            for place, node in enumerate(self.nodes)
            if node.op_type == SELECTIVE_SCAN and node.domain == DOMAIN
        ]


def read_values(node: onnx.NodeProto) -> Iterator[str]:
    """The values that a node reads, those of its subgraphs among them."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
        for graph in graphs:
            own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
            own |= {name for inner in graph.node for name in inner.output}
            yield from (name for inner in graph.node for name in read_values(inner) if name not in own)
            yield from (value.name for value in graph.output if value.name not in own)


def has_subgraph(node: onnx.NodeProto) -> bool:
    """Whether a node holds a graph of its own, as If and Loop do."""
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute, or the default."""
    found = next((item for item in node.attribute if item.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def elements(shape: tuple[int, ...]) -> int:
    """How many elements a tensor of this shape has."""
    return int(np.prod(shape, dtype=np.int64))
