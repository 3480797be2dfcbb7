"""cast_precision: write 16-bit types into a float32 graph.

    images ─ Conv ─ … ─ block_n ─ … ─ ReduceMean ─ Gemm ─ logits                        all float32
    →
    images ─ Cast ─ Conv ─ … ─ block_n ─ … ─ Cast ─ ReduceMean ─ Gemm ─ logits
             └────────── float16 or bfloat16 ─┘  └──────── float32 ─────┘

Weights and activations get 16 bits. These stay float32:

* A, D and dt_bias of every scan, as the operator wants them; its state is float32 inside;
* the statistics of every LayerNormalization, by its attribute stash_type;
* the scale, shift and statistics of every BatchNormalization;
* the classifier head, from the global pool on, and the logits;
* every operator that has no form of the type;
* weights that the type cannot hold, and whatever the caller names, with the operators that read or make it.

TensorRT 11 has no precision flags any more: what it computes in is what is written here.

Refuses: graphs with function bodies or subgraphs, because the pass comes before `lower`; graphs of the other 16-bit
type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

from quartermap_deploy.errors import PassError
from quartermap_deploy.frontend.node_names import block_output
from quartermap_deploy.lowering.element_types import (
    BY_NUMBER,
    FLOAT,
    ElementType,
    element_type,
    types_of_values,
    types_present,
)
from quartermap_deploy.lowering.operator import (
    DOMAIN,
    INPUTS_1D,
    INPUTS_2D,
    SELECTIVE_SCAN,
    SELECTIVE_SCAN_2D,
)
from quartermap_deploy.passes.base import PassReport
from quartermap_deploy.passes.shapes import infer_shapes

NAME = "cast_precision"
IO = Literal["float32", "same"]

_POOLS = ("ReduceMean", "GlobalAveragePool")
_MOVEMENT = (
    "Flatten",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
"""Operators that only move the values of their first input."""
MOVEMENT = frozenset((*_MOVEMENT, "Concat", "Expand"))
"""Operators that make no new number."""
_ANY_TYPE = ("Cast", "Shape", "Size")
"""Operators whose input may have any type, whatever their output is."""
_SCAN_INPUTS = {SELECTIVE_SCAN_2D: INPUTS_2D, SELECTIVE_SCAN: INPUTS_1D}
_FLOAT32_PARAMETERS = ("A", "D", "dt_bias", "delta_bias")


@dataclass
class CastReport(PassReport):
    """What the pass did.

    Attributes:
        precision: the 16-bit type.
        kept: why an operator or weight beside the scans' parameters is float32, by its name.
        operators: how many operators of the graph make values of each type, casts left out.
        casts: casts in the graph.
        subnormal: share of elements too small for all the type's bits, for weights with more than 1 % of them.
    """

    precision: str = ""
    kept: dict[str, str] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    casts: int = 0
    subnormal: dict[str, float] = field(default_factory=dict)


def cast_precision(
    model: onnx.ModelProto,
    precision: str,
    *,
    keep_float32: Iterable[str] = (),
    io: IO = "float32",
    blocks_float32: Iterable[int] = (),
) -> tuple[onnx.ModelProto, CastReport]:
    """Write 16-bit types into a model.

    Args:
        model: a float32 model whose scans have no bodies yet; not changed. A model that has the precision already is
            returned as it is.
        precision: "float16" or "bfloat16".
        keep_float32: names of values to hold in float32, and the operators that make and read them compute in float32
            too; or of operators to compute in float32, if there is no value of that name.
        io: type of the model's inputs and outputs: "float32", or "same" for that of `precision`.
        blocks_float32: blocks, from 1, to compute in float32, each with what leads into it: the stem before the first
            block, the downsampling before the first of a stage.

    Returns:
        The new model, with the type and shape of all its values, and what the pass did. Its opset is 22 for bfloat16.

    Raises:
        UnknownNameError: if there is no such precision.
        PassError: if the graph has bodies or another precision, or a name or block does not exist.
    """
    kind = element_type(precision)
    if io not in ("float32", "same"):
        raise PassError(f"{NAME}: io = {io!r}; expected float32 or same")
    _require_bare(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    present = list(types_present(model.graph))
    if present == [kind]:
        report = CastReport(NAME, precision=precision)
        report.operators, report.casts = count_operators(result), _casts(result)
        return result, report
    if present:
        raise PassError(f"{NAME}: the graph is in {present[0].name} already; start from the float32 graph")
    _raise_opset(result, kind)
    result = infer_shapes(result)
    _initializers_for_constants(result.graph)
    plan = _Plan(result, kind)
    plan.keep_unsupported()
    plan.keep_head()
    plan.keep_named(keep_float32)
    plan.keep_blocks(blocks_float32)
    plan.keep_weights_out_of_range()
    plan.keep_between_float32(float32_outputs=io == "float32")
    report = CastReport(NAME, precision=precision, kept=plan.described(), subnormal=plan.subnormal)
    _Writer(plan, io).write()
    typed = infer_shapes(result)
    report.operators, report.casts = count_operators(typed), _casts(typed)
    report.changed = _changes(typed, kind, report)
    return typed, report


def count_operators(model: onnx.ModelProto) -> dict[str, int]:
    """How many operators of the main graph make values of each floating-point type, casts left out.

    Args:
        model: with the types of its values.
    """
    types = types_of_values(model.graph)
    names = {FLOAT: "float32", **{item.number: item.name for item in types_present(model.graph)}}
    counts: dict[str, int] = {}
    for node in model.graph.node:
        name = names.get(types.get(node.output[0], 0))
        if name is not None and node.op_type not in ("Cast", "Constant"):
            counts[name] = counts.get(name, 0) + 1
    return counts


def block_parts(graph: onnx.GraphProto) -> dict[int, list[onnx.NodeProto]]:
    """The operators of each block, from 1, in graph order, each with what leads into it; 0 is what follows the last.

    A block ends with the value `block_<i>`. Operators that make only numbers for shapes are in the block that first
    asks for them.
    """
    maker = {name: place for place, node in enumerate(graph.node) for name in node.output}
    parts: dict[int, list[onnx.NodeProto]] = {}
    taken: set[int] = set()

    def collect(part: int, values: Iterable[str]) -> None:
        pending, own = [maker[value] for value in values if value in maker], set()
        while pending:
            place = pending.pop()
            if place not in taken and place not in own:
                own.add(place)
                pending += [maker[name] for name in graph.node[place].input if name in maker]
        taken.update(own)
        parts[part] = [graph.node[place] for place in sorted(own)]

    index = 1
    while block_output(index) in maker:
        collect(index, [block_output(index)])
        index += 1
    collect(0, [output.name for output in graph.output])
    return parts


def _require_bare(model: onnx.ModelProto) -> None:
    """Refuse graphs that the pass cannot see through."""
    if bodies := [f.name for f in model.functions]:
        raise PassError(
            f"{NAME}: the model has a body for {bodies[0]}; the pass comes before lower, which attaches the bodies"
        )
    for node in model.graph.node:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise PassError(f"{NAME}: {node.op_type} {node.name} has a subgraph, which the pass cannot type")


def _raise_opset(model: onnx.ModelProto, kind: ElementType) -> None:
    """Raise the opset to the first that has the type.

    From 20 to 22 operators gained types and none changed its meaning but GroupNormalization.
    """
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version < kind.opset:
            for node in model.graph.node:
                if node.op_type == "GroupNormalization":
                    raise PassError(f"{NAME}: {node.name}: GroupNormalization differs in opset {kind.opset}")
            entry.version = kind.opset


def _initializers_for_constants(graph: onnx.GraphProto) -> None:
    """Turn float32 Constant nodes into initializers, which are typed by who reads them."""
    kept = []
    for node in graph.node:
        values = {a.name: a for a in node.attribute} if node.op_type == "Constant" else {}
        if "value" in values and values["value"].t.data_type == FLOAT:
            tensor = graph.initializer.add()
            tensor.CopyFrom(values["value"].t)
            tensor.name = node.output[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _casts(model: onnx.ModelProto) -> int:
    return sum(node.op_type == "Cast" for node in model.graph.node)


def _changes(model: onnx.ModelProto, kind: ElementType, report: CastReport) -> list[str]:
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type == kind.number]
    size = sum(int(np.prod(tensor.dims)) for tensor in weights)
    made = report.operators
    lines = [
        f"{len(weights)} weights, {size:,} numbers, in {kind.name}",
        f"{made.get(kind.name, 0)} operators in {kind.name}, {made.get('float32', 0)} in float32",
        f"{report.casts} casts",
    ]
    return lines + [f"{name} stays float32: {reason}" for name, reason in report.kept.items()]


class _Plan:
    """Which operators of a float32 graph compute in float32, and why; all others get the 16-bit type."""

    def __init__(self, model: onnx.ModelProto, kind: ElementType) -> None:
        self.model, self.graph, self.kind = model, model.graph, kind
        (self.opset,) = (item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
        self.floats = {name for name, number in types_of_values(self.graph).items() if number == FLOAT}
        self.weights = {item.name: item for item in self.graph.initializer if item.data_type == FLOAT}
        self.maker = {name: place for place, node in enumerate(self.graph.node) for name in node.output}
        self.readers: dict[str, list[int]] = {}
        for place, node in enumerate(self.graph.node):
            for name in node.input:
                self.readers.setdefault(name, []).append(place)
        self.slots = [_slots(node, self.opset, kind) for node in self.graph.node]
        self.reasons: dict[int, str] = {}
        self.kept_weights: dict[str, str] = {}
        self.subnormal: dict[str, float] = {}

    def in_float32(self, place: int) -> bool:
        return place in self.reasons

    def wants(self, place: int, position: int) -> int | None:
        """The type that an operator reads an input in, or None if any will do."""
        node = self.graph.node[place]
        if node.op_type in _ANY_TYPE:
            return None
        return FLOAT if self.in_float32(place) or position not in self.slots[place] else self.kind.number

    def makes(self, place: int, position: int) -> int:
        """The type of a floating-point output."""
        typed = not self.in_float32(place) and position in _typed_outputs(self.graph.node[place])
        return self.kind.number if typed else FLOAT

    def described(self) -> dict[str, str]:
        """Reasons by the names of operators and weights, in graph order."""
        named = {
            self.graph.node[place].name or self.graph.node[place].output[0]: self.reasons[place]
            for place in sorted(self.reasons)
            if self._makes_floats(place)
        }
        return named | self.kept_weights

    # What stays float32 ------------------------------------------------------------------------------------------

    def keep_unsupported(self) -> None:
        for place, node in enumerate(self.graph.node):
            floats = [name for name in (*node.input, *node.output) if name in self.floats]
            if floats and not self.slots[place] and node.op_type not in (*_ANY_TYPE, *_MAKERS):
                made = self._makes_floats(place)
                self.reasons[place] = (
                    f"{node.op_type} has no {self.kind.name} form" if made else "no float output"
                )

    def keep_head(self) -> None:
        """Keep what lies between the last global pool, included, and the outputs, if there is such a pool."""
        own: set[int] = set()
        pending = [output.name for output in self.graph.output]
        while pending:
            name = pending.pop()
            if name in self.weights or name not in self.floats:
                continue
            place = self.maker.get(name)
            if place is None or self.graph.node[place].domain == DOMAIN:
                return  # an output that hangs on a scan or an input by another way has no such head
            if place not in own:
                own.add(place)
                if self.graph.node[place].op_type not in _POOLS:
                    pending += self.graph.node[place].input
        for place in own:
            self.reasons.setdefault(place, "classifier head")

    def keep_named(self, names: Iterable[str]) -> None:
        by_name = {node.name: place for place, node in enumerate(self.graph.node) if node.name}
        for name in names:
            if name in self.floats:
                self._keep_value(name, f"{name} was named by the caller")
            elif name in by_name:
                self.reasons.setdefault(by_name[name], "named by the caller")
            else:
                near = difflib.get_close_matches(name, sorted({*by_name, *self.floats}), n=2)
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                raise PassError(f"{NAME}: the graph has no operator and no float32 value {name!r}{hint}")

    def keep_blocks(self, blocks: Iterable[int]) -> None:
        wanted = set(blocks)
        if not wanted:
            return
        parts = block_parts(self.graph)
        for block in sorted(wanted):
            if block < 1 or block not in parts:
                raise PassError(f"{NAME}: there is no block {block}; the graph has {len(parts) - 1} blocks")
            for node in parts[block]:
                self.reasons.setdefault(self.maker[node.output[0]], f"block {block} is kept in float32")

    def keep_weights_out_of_range(self) -> None:
        """Keep weights that the type cannot hold.

        Those are weights that would become infinite, and those so small that rounding takes more of the whole tensor
        than one unit in the last place.
        """
        for name, tensor in self.weights.items():
            typed = [
                place
                for place in self.readers.get(name, [])
                for position, item in enumerate(self.graph.node[place].input)
                if item == name and self.wants(place, position) == self.kind.number
            ]
            if not typed:
                continue
            values = numpy_helper.to_array(tensor)
            reason, subnormal = _unfit(values, self.kind)
            if subnormal > 0.01:
                self.subnormal[name] = round(subnormal, 4)
            if reason is not None:
                self.kept_weights[name] = reason
                for place in typed:
                    self.reasons.setdefault(place, f"its weight {name} stays float32")

    def keep_between_float32(self, *, float32_outputs: bool) -> None:
        """Keep operators that only move values from one float32 operator to another."""
        ends = {output.name for output in self.graph.output} if float32_outputs else set()
        onward: set[int] = set()
        for place in reversed(range(len(self.graph.node))):
            if self._moves(place) and any(
                self._read_in_float32(n, ends, onward) for n in self._outputs(place)
            ):
                onward.add(place)
        for place in sorted(onward):
            source = self.maker.get(self.graph.node[place].input[0])
            # The order of the graph makes sure that a chain is followed from its start.
            if source is not None and self.makes(source, self._position(source, place)) == FLOAT:
                self.reasons.setdefault(place, "between float32 operators")

    def _keep_value(self, name: str, reason: str) -> None:
        places = [*self.readers.get(name, [])]
        if name in self.maker:
            places.append(self.maker[name])
        for place in places:
            if self.graph.node[place].op_type not in _ANY_TYPE:
                self.reasons.setdefault(place, reason)

    def _moves(self, place: int) -> bool:
        node = self.graph.node[place]
        return (
            node.op_type in _MOVEMENT
            and node.domain == ""
            and node.input[0] in self.floats
            and node.input[0] not in self.weights
            and not self.in_float32(place)
        )

    def _read_in_float32(self, name: str, ends: set[str], onward: set[int]) -> bool:
        return name in ends or any(
            place in onward or self._reads_in_float32(place, name) for place in self.readers.get(name, [])
        )

    def _reads_in_float32(self, place: int, name: str) -> bool:
        inputs = enumerate(self.graph.node[place].input)
        return any(item == name and self.wants(place, position) == FLOAT for position, item in inputs)

    def _outputs(self, place: int) -> Iterator[str]:
        return (name for name in self.graph.node[place].output if name in self.floats)

    def _makes_floats(self, place: int) -> bool:
        return any(True for _ in self._outputs(place))

    def _position(self, source: int, reader: int) -> int:
        return list(self.graph.node[source].output).index(self.graph.node[reader].input[0])


_MAKERS = ("Cast", "ConstantOfShape")
"""Operators whose output type is an attribute."""


def _slots(node: onnx.NodeProto, opset: int, kind: ElementType) -> frozenset[int]:
    """Positions of the inputs that an operator takes in its own type; empty if it has no form of the type."""
    if node.domain == DOMAIN:
        names = _SCAN_INPUTS.get(node.op_type, ())
        return frozenset(i for i, name in enumerate(names) if name not in _FLOAT32_PARAMETERS)
    if node.op_type in _MAKERS or not onnx.defs.has(node.op_type, node.domain):
        return frozenset()
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    # The type of the first output is what the operator computes in; BatchNormalization's parameters, or the scales of
    # Resize, have types of their own.
    own = schema.outputs[0].type_str
    allowed = {item.type_param_str: item.allowed_type_strs for item in schema.type_constraints}
    if kind.tensor_type not in allowed.get(own, ()):
        return frozenset()
    formal = [schema.inputs[min(i, len(schema.inputs) - 1)] for i in range(len(node.input))]
    return frozenset(i for i, item in enumerate(formal) if item.type_str == own)


def _typed_outputs(node: onnx.NodeProto) -> range:
    """Positions of the outputs that have the operator's own type."""
    # The further outputs of a normalisation are its statistics.
    alone = node.op_type in ("LayerNormalization", "BatchNormalization")
    return range(1 if alone else len(node.output))


def _unfit(
    values: np.ndarray[tuple[int, ...], np.dtype[np.float32]], kind: ElementType
) -> tuple[str | None, float]:
    """Why a weight cannot have a type, or None, and the share of its elements that are too small for all bits."""
    size = np.abs(values.astype(np.float64))
    if not size.size:
        return None, 0.0
    rounded = kind.rounded(values).astype(np.float64)
    if not np.isfinite(rounded).all():
        return f"its largest value is {size.max():.3g}, {kind.name} ends at {kind.largest:.4g}", 0.0
    subnormal = float(((size > 0) & (size < kind.smallest_normal)).mean())
    norm = float(np.linalg.norm(size))
    lost = float(np.linalg.norm(rounded - values)) / norm if norm > 0 else 0.0
    if lost > 2.0 ** (1 - kind.digits):
        return f"{lost:.1e} of it would be lost: its values are too small for {kind.name}", subnormal
    return None, subnormal


class _Writer:
    """Carries out a plan: types of weights and attributes, casts, inputs and outputs."""

    def __init__(self, plan: _Plan, io: IO) -> None:
        self.plan, self.graph, self.kind, self.io = plan, plan.graph, plan.kind, io
        self.end_type = FLOAT if io == "float32" else plan.kind.number
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
