"""at_opset: write a model in another opset of ONNX's standard operators.

    Gelu(x)                        →  0.5 · x · (1 + Erf(x / √2))          below 20, also in its form by Tanh
    ReduceMean(x, axes)            →  ReduceMean(x) <axes>                 below 18, and the other reductions
    Split(x) <num_outputs>         →  Split(x, sizes), or Split(x)         below 18
    GridSample <mode = "linear">   →  GridSample <mode = "bilinear">       below 20

Models are traced and pruned in opset 20. PyTorch's own conversion to others fails below (it has no older Gelu) and
drops functions above. Operators whose versions differ in types alone, or in attributes that have their default, stay
as they are; `onnx.defs` tells which those are.

Refuses: operators that the opset lacks and that are not written out here, and what their older form cannot say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import defs, helper, numpy_helper

from quartermap_deploy.errors import PassError
from quartermap_deploy.lowering.element_types import FLOAT, types_of_values
from quartermap_deploy.lowering.operator import OPSETS
from quartermap_deploy.lowering.versions import opset_of, stamp_ir_version
from quartermap_deploy.passes.shapes import infer_shapes
from quartermap_deploy.passes.write_gelu import gelu_nodes

NAME = "at_opset"
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_LATER_VALUES = {
    ("ScatterElements", "reduction", "max"): 18,
    ("ScatterElements", "reduction", "min"): 18,
    ("ScatterND", "reduction", "max"): 18,
    ("ScatterND", "reduction", "min"): 18,
    ("Pad", "mode", "wrap"): 19,
    ("Resize", "coordinate_transformation_mode", "half_pixel_symmetric"): 19,
}
"""Values of attributes that came later than the attribute: the first opset that knows them."""
_CHANGED = {"GroupNormalization": 21}
"""Operators that mean something else from this opset on, though their attributes are the same."""


def at_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Return the model in another opset, with its functions and the lowest IR version that is valid.

    Args:
        model: any model, with the types of its values; not changed.
        opset: one of `lowering.operator.OPSETS`.

    Raises:
        PassError: if there is no such opset, or an operator cannot be written in it.
    """
    if opset not in OPSETS:
        raise PassError(f"{NAME}: there is no opset {opset}; expected {OPSETS[0]} to {OPSETS[-1]}")
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for part in (result, *result.functions):
        if opset_of(part) != opset:
            graph = part.graph if isinstance(part, onnx.ModelProto) else part
            _rewrite(graph, _Rewriter(graph, opset_of(part), opset))
            if isinstance(graph, onnx.GraphProto):
                _drop_unused(graph)
            (entry,) = (item for item in part.opset_import if item.domain in ("", "ai.onnx"))
            entry.version = opset
    stamp_ir_version(result)
    return infer_shapes(result)


def _rewrite(graph: onnx.GraphProto | onnx.FunctionProto, rewriter: _Rewriter) -> None:
    """Rewrite the nodes of a graph or function, and of the graphs in them, in place."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rewrite(attribute.g, rewriter.inside(attribute.g))
        nodes += rewriter.written(node)
    copies = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del graph.node[:]
    graph.node.extend(copies)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Drop weights that nothing reads any more, such as axes that became attributes."""
    used = {value.name for value in graph.output} | set(_read_values(graph))
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    if len(kept) != len(graph.initializer):
        copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
        del graph.initializer[:]
        graph.initializer.extend(copies)


def _read_values(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _read_values(attribute.g)


class _Rewriter:
    """Writes nodes of one graph in another opset."""

    def __init__(self, graph: onnx.GraphProto | onnx.FunctionProto, opset: int, wanted: int) -> None:
        self.opset, self.wanted = opset, wanted
        self.constants: dict[str, NDArray[Any]] = {}
        self.types: dict[str, int] = {}
        self.shapes: dict[str, list[int]] = {}
        self._read(graph)

    def inside(self, graph: onnx.GraphProto) -> _Rewriter:
        """One for a graph in a node of this one."""
        inner = _Rewriter(graph, self.opset, self.wanted)
        inner.constants = {**self.constants, **inner.constants}
        return inner

    def written(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The nodes that say the same in the opset that is wanted."""
        if node.domain not in ("", "ai.onnx") or self._same_version(node):
            return [node]
        if self.wanted < self.opset and node.op_type in _RULES:
            rule, first = _RULES[node.op_type]
            if self.wanted < first <= self.opset:
                return rule(self, node)
        return [self._as_it_is(node)]

    def refused(self, node: onnx.NodeProto, why: str) -> PassError:
        """The error for a node that cannot be written."""
        return PassError(
            f"{NAME}: {node.op_type} at {node.name or node.output[0]} cannot be written in opset {self.wanted}: {why}; "
            f"take opset {self.opset}, or another operator in the module"
        )

    def _read(self, graph: onnx.GraphProto | onnx.FunctionProto) -> None:
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        if isinstance(graph, onnx.GraphProto):
            self.types = types_of_values(graph)
            # Axes and sizes are vectors; weights need not be read.
            small = (tensor for tensor in graph.initializer if len(tensor.dims) <= 1)
            self.constants |= {tensor.name: numpy_helper.to_array(tensor) for tensor in small}
            for value in (*graph.input, *graph.value_info, *graph.output):
                if value.type.tensor_type.HasField("shape"):
                    sides = value.type.tensor_type.shape.dim
                    self.shapes[value.name] = [side.dim_value for side in sides]

    def _same_version(self, node: onnx.NodeProto) -> bool:
        versions = []
        for opset in (self.opset, self.wanted):
            try:
                versions.append(defs.get_schema(node.op_type, opset, "").since_version)
            except defs.SchemaError:
                versions.append(0)
        return versions[0] == versions[1]

    def _as_it_is(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """The node without the attributes that have their default, where its other version allows that."""
        try:
            schema = defs.get_schema(node.op_type, self.wanted, "")
        except defs.SchemaError:
            raise self.refused(node, "there is no such operator") from None
        present = defs.get_schema(node.op_type, self.opset, "")
        low, high = sorted((self.opset, self.wanted))
        if low < _CHANGED.get(node.op_type, 0) <= high:
            raise self.refused(node, "it means something else there")
        inputs = [place for place, name in enumerate(node.input) if name]
        most = math.inf if _variadic(schema) else len(schema.inputs)
        if inputs and inputs[-1] >= most:
            raise self.refused(node, f"its input {present.inputs[inputs[-1]].name} is not known there")
        kept = []
        for attribute in node.attribute:
            value = helper.get_attribute_value(attribute)
            text = value.decode() if isinstance(value, bytes) else value
            if (
                isinstance(text, str)
                and _LATER_VALUES.get((node.op_type, attribute.name, text), 0) > self.wanted
            ):
                raise self.refused(node, f"{attribute.name} = {text} is not known there")
            if attribute.name in schema.attributes:
                kept.append(attribute)
                continue
            default = present.attributes[attribute.name].default_value
            if not default.name or helper.get_attribute_value(default) != value:
                raise self.refused(node, f"its attribute {attribute.name} is not known there")
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.attribute[:]
        copy.attribute.extend(kept)
        return copy


def _variadic(schema: Any) -> bool:
    inputs = schema.inputs
    return bool(inputs) and inputs[-1].option == defs.OpSchema.FormalParameterOption.Variadic


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _gelu(rewriter: _Rewriter, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    # The values of functions have no types.
    return gelu_nodes(node, rewriter.types.get(node.output[0], FLOAT))


def _reduction(rewriter: _Rewriter, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    attributes = _attributes(node)
    if attributes.pop("noop_with_empty_axes", 0):
        raise rewriter.refused(node, "noop_with_empty_axes is not known there")
    if len(node.input) > 1 and node.input[1]:
        axes = rewriter.constants.get(node.input[1])
        if axes is None:
            raise rewriter.refused(node, "its axes are computed")
        if axes.size:
            attributes["axes"] = [int(axis) for axis in axes.reshape(-1)]
    return [helper.make_node(node.op_type, node.input[:1], node.output, node.name, **attributes)]


def _split(rewriter: _Rewriter, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """With sizes where they are known: the older form without them takes equal parts alone."""
    attributes = _attributes(node)
    parts = attributes.pop("num_outputs", None)
    if parts is None:
        return [node]
    inputs, nodes = [node.input[0]], []
    shape = rewriter.shapes.get(node.input[0], [])
    axis = int(attributes.get("axis", 0))
    side = shape[axis] if -len(shape) <= axis < len(shape) else 0
    if side:
        part = -(-side // parts)
        sizes = np.array([max(0, min(part, side - part * place)) for place in range(parts)], np.int64)
        tensor = numpy_helper.from_array(sizes, f"{node.name or node.output[0]}/sizes")
        nodes.append(helper.make_node("Constant", [], [tensor.name], tensor.name, value=tensor))
        inputs.append(tensor.name)
    return [*nodes, helper.make_node("Split", inputs, node.output, node.name, **attributes)]


def _grid_sample(rewriter: _Rewriter, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    attributes = _attributes(node)
    mode = attributes.pop("mode", b"linear").decode()
    older = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    return [helper.make_node("GridSample", node.input, node.output, node.name, mode=older, **attributes)]


_Rule = Callable[[_Rewriter, onnx.NodeProto], list[onnx.NodeProto]]
_RULES: Mapping[str, tuple[_Rule, int]] = {
    "Gelu": (_gelu, 20),
    "GridSample": (_grid_sample, 20),
    "Split": (_split, 18),
    **{f"Reduce{name}": (_reduction, 18) for name in _REDUCTIONS},
}
"""How operators are written in an opset below the one at which they changed."""
