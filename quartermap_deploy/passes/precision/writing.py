"""Types written into a graph as a plan has it: weights, attributes, casts, inputs and outputs."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from quartermap_deploy.lowering.element_types import BY_NUMBER, FLOAT, ElementType
from quartermap_deploy.passes.precision.plan import PrecisionPlan


class TypeWriter:
    """Carries out a plan: types of weights and attributes, casts, inputs and outputs."""

    def __init__(self, plan: PrecisionPlan, end_type: int) -> None:
        self.plan, self.graph, self.kind, self.end_type = plan, plan.graph, plan.kind, end_type
        self.ends = {output.name: output for output in self.graph.output}
        self.nodes: list[onnx.NodeProto] = []
        self.types: dict[str, int] = {}
        self.inner: dict[str, str] = {}
        self.casts: dict[tuple[str, int], str] = {}
        self.taken = {name for node in self.graph.node for name in (*node.input, *node.output)}
        self.wanted = self._wanted_weights()
        self.typed_weights = {
            name: self._fresh(f"{name}/to_{self.kind.name}") if FLOAT in wanted else name
            for name, wanted in self.wanted.items()
            if self.kind.number in wanted
        }

    def write(self) -> None:
        """Change the graph."""
        self._type_inputs()
        for place in range(len(self.graph.node)):
            self._type_node(place)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        self._type_weights()

    def _wanted_weights(self) -> dict[str, set[int]]:
        """The types in which each weight is read."""
        wanted: dict[str, set[int]] = {name: set() for name in self.plan.weights}
        for place, node in enumerate(self.graph.node):
            for position, name in enumerate(node.input):
                if name in wanted:
                    wanted[name].add(self.plan.wants(place, position) or FLOAT)
        for name in self.ends.keys() & wanted.keys():
            wanted[name].add(FLOAT)
        return wanted

    def _type_inputs(self) -> None:
        for info in self.graph.input:
            if info.name in self.plan.floats and info.name not in self.plan.weights:
                info.type.tensor_type.elem_type = self.end_type
                self.types[info.name] = self.end_type

    def _type_node(self, place: int) -> None:
        node = onnx.NodeProto()
        node.CopyFrom(self.graph.node[place])
        for position, name in enumerate(node.input):
            if name in self.plan.floats:
                node.input[position] = self._read(name, self.plan.wants(place, position))
        if not self.plan.in_float32(place):
            _type_attributes(node, self.kind)
        self.nodes.append(node)
        for position, name in enumerate(node.output):
            if name in self.plan.floats:
                node.output[position] = self._made(name, self.plan.makes(place, position))

    def _read(self, name: str, kind: int | None) -> str:
        """The value `name` in a type, by a cast if it has another; None takes it as it is."""
        if name in self.plan.weights:
            return name if kind in (None, FLOAT) else self.typed_weights[name]
        name = self.inner.get(name, name)
        if kind is None or self.types[name] == kind:
            return name
        if (name, kind) not in self.casts:
            self._cast(name, kind, self._fresh(f"{name}/to_{_type_name(kind)}"))
        return self.casts[name, kind]

    def _made(self, name: str, kind: int) -> str:
        """Take note of a value's type and return its name; an output of the graph gets its own type by a cast."""
        if name in self.ends:
            self.ends[name].type.tensor_type.elem_type = self.end_type
            if kind != self.end_type:
                self.inner[name] = inner = self._fresh(f"{name}/{_type_name(kind)}")
                self.types[inner] = kind
                self._cast(inner, self.end_type, name)
                return inner
        self.types[name] = kind
        return name

    def _cast(self, name: str, kind: int, result: str) -> None:
        self.nodes.append(
            helper.make_node("Cast", [name], [result], f"{name}/to_{_type_name(kind)}", to=kind)
        )
        self.casts[name, kind] = result

    def _type_weights(self) -> None:
        """Give each weight the type in which it is read, or both."""
        weights = []
        for tensor in self.graph.initializer:
            wanted = self.wanted.get(tensor.name, {FLOAT})
            if self.kind.number in wanted:
                values = numpy_helper.to_array(tensor)
                weights.append(self.kind.tensor(values, self.typed_weights[tensor.name]))
            if FLOAT in wanted or not wanted:
                copy = onnx.TensorProto()
                copy.CopyFrom(tensor)
                weights.append(copy)
        del self.graph.initializer[:]
        self.graph.initializer.extend(weights)
        types = {tensor.name: tensor.data_type for tensor in weights}
        for info in self.graph.input:
            if info.name in types:
                info.type.tensor_type.elem_type = types[info.name]

    def _fresh(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


def _type_name(number: int) -> str:
    return BY_NUMBER[number].name if number in BY_NUMBER else "float32"


def _type_attributes(node: onnx.NodeProto, kind: ElementType) -> None:
    """Give the attributes that decide about types the 16-bit type; statistics are computed in float32."""
    if node.op_type == "Cast":
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == FLOAT:
                attribute.i = kind.number
    elif node.op_type == "ConstantOfShape":
        given = [a.t for a in node.attribute if a.name == "value"]
        value = numpy_helper.to_array(given[0]) if given else np.zeros(1, np.float32)
        if value.dtype == np.float32:
            _set_attribute(node, "value", kind.tensor(value, ""))
    elif node.op_type == "LayerNormalization":
        _set_attribute(node, "stash_type", FLOAT)


def _set_attribute(node: onnx.NodeProto, name: str, value: object) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
