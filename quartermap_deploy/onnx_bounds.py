"""What an ONNX file of a bundle may hold, looked at before any runtime reads it.

A file of a few hundred bytes can keep a runtime busy for ever: functions that call each other twice, level upon level,
a loop without an end, a constant that is expanded to a terabyte while the file is loaded. What this package writes has
none of these, so nothing of the kind is taken: functions are its scans, and lie two deep at most.

The file is walked as protobuf writes it, field by field, and weights are skipped: 100 MB take some milliseconds, and no
memory. The fields are those of onnx.proto, whose numbers never change.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quartermap_deploy.errors import BundleError
from quartermap_deploy.lowering.operator import DOMAIN

MOST_NODES = 200_000
"""Nodes, with every function written out where it is called. VMamba-B has about 20,000."""
DEEPEST = 4
"""Graphs in nodes in graphs, functions included. Ours have two: a function, and the body of its Scan."""
MOST_NUMBERS = 1 << 28
"""Numbers of a tensor whose shape stands in the file: 1 GiB of float32."""

LOOP = "Scan"
"""What scans are that are written out in the main graph."""
_STANDARD = ("", "ai.onnx")
_REFUSED = {
    "Loop": "may have no end",
    "SequenceMap": "is a loop",
    "ImageDecoder": "opens an image of any format",
    **dict.fromkeys(
        ("StringConcat", "StringSplit", "StringNormalizer", "RegexFullMatch", "TfIdfVectorizer"),
        "makes texts of any length, or searches them",
    ),
}
_SIZES = {
    **dict.fromkeys(("ConstantOfShape", "HannWindow", "HammingWindow", "BlackmanWindow"), (0,)),
    **dict.fromkeys(
        ("Expand", "Tile", "Pad", "OneHot", "CenterCropPad", "AffineGrid", "DFT", "Upsample"), (1,)
    ),
    **{"Col2Im": (1, 2), "MelWeightMatrix": (0, 1), "MaxUnpool": (2,), "Resize": (2, 3), "Range": (0, 1, 2)},
}
"""Operators that make a tensor as large as some of their inputs say; which ones."""
_SIZE_ATTRIBUTES = frozenset(
    {
        *("pads", "strides", "dilations", "kernel_shape", "output_shape", "output_padding", "shape"),
        *("output_height", "output_width", "pooled_shape", "sample_size", "scales"),
    }
)
_SIDES = ("output_height", "output_width")
_FORMATS = {1: "f", 6: "i", 7: "q", 11: "d"}
"""ONNX's numbers of element types, and `struct`'s letters for them."""
_MOST_KNOWN = 64
"""Numbers of a constant that is looked at; shapes have fewer."""


class _Malformed(Exception):
    """A file that is no protobuf, or departs from what any writer makes; the message says how."""


Fields = Iterator[tuple[int, Any]]


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place >= len(data) or shift > 63:
            raise _Malformed("a number in it has no end")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7


def _fields(data: memoryview) -> Fields:
    """The fields of a message: their numbers, and an int or the bytes of each."""
    place, end = 0, len(data)
    while place < end:
        key = data[place]
        if key < 0x80:
            place += 1
        else:
            key, place = _varint(data, place)
            if key >> 32:
                # Some readers drop the bits above, and find another field than is seen here.
                raise _Malformed("it has a field of an unknown kind")
        kind = key & 7
        if kind == 2:
            size, place = _varint(data, place)
            if place + size > end:
                raise _Malformed("a field of it ends after the file does")
            yield key >> 3, data[place : place + size]
            place += size
        elif kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
            if place > end:
                raise _Malformed("a field of it ends after the file does")
            yield key >> 3, data[place - (8 if kind == 1 else 4) : place]
        else:
            raise _Malformed("it has a field of an unknown kind")


def _message(value: Any) -> memoryview:
    if not isinstance(value, memoryview):
        raise _Malformed("it has a number where a message belongs")
    return value


def _text(value: Any) -> str:
    return bytes(_message(value)).decode("utf-8", "replace")


def _whole(value: Any) -> int:
    """A signed whole number of 64 bits."""
    if not isinstance(value, int):
        raise _Malformed("it has a message where a number belongs")
    low: int = value & (1 << 64) - 1
    return low - (1 << 64) if low >> 63 else low


def _wholes(value: Any) -> list[int]:
    """Whole numbers: one, or as many as there are packed together."""
    if isinstance(value, int):
        return [_whole(value)]
    found, place = [], 0
    while place < len(value):
        number, place = _varint(value, place)
        found.append(_whole(number))
    return found


Constant = tuple[float, ...] | None
"""Numbers that stand in the file; None for more, or for what is computed from them in another way."""
Constants = Mapping[str, Constant]


@dataclass(frozen=True)
class _Node:
    kind: str
    domain: str
    overload: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    graphs: tuple[_Graph, ...]
    constant: Constant


@dataclass(frozen=True)
class _Graph:
    """A graph, or a function."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[_Node, ...]
    constants: Constants


@dataclass
class _Reader:
    """Reads the messages of a file, and refuses what no file of ours has."""

    nodes: int = 0

    def graph(self, data: memoryview, depth: int, *, function: bool = False) -> _Graph:
        """Read a GraphProto or a FunctionProto."""
        if depth > DEEPEST:
            raise _Malformed(f"graphs lie in each other more than {DEEPEST} deep in it")
        node, inside, outside = (7, 4, 5) if function else (1, 11, 12)
        inputs: list[str] = []
        outputs: list[str] = []
        nodes: list[_Node] = []
        constants: dict[str, Constant] = {}
        for number, value in _fields(data):
            if number == node:
                nodes.append(self.node(_message(value), depth))
            elif number in (inside, outside):
                name = _text(value) if function else _named(_message(value), 1)
                (inputs if number == inside else outputs).append(name)
            elif number == 5:
                name, constant = _tensor(_message(value))
                constants[name] = constant
            elif number == 15 and not function:
                raise _Malformed("it has sparse weights")
        return _Graph(tuple(inputs), tuple(outputs), tuple(nodes), constants)

    def node(self, data: memoryview, depth: int) -> _Node:
        """Read a NodeProto."""
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise _Malformed(f"it has more than {MOST_NODES:,} nodes")
        texts = {4: "", 7: "", 8: ""}
        inputs: list[str] = []
        outputs: list[str] = []
        graphs: list[_Graph] = []
        sizes = 1.0
        constant: Constant = None
        named: set[str] = set()
        for number, value in _fields(data):
            if number == 1:
                inputs.append(_text(value))
            elif number == 2:
                outputs.append(_text(value))
            elif number in texts:
                texts[number] = _text(value)
            elif number == 5:
                name, constant, below, size = self.attribute(_message(value), depth)
                if name in named:
                    raise _Malformed(f"it has an operator with two attributes {name[:80]!r}")
                named.add(name)
                graphs += below
                # Height and width may be attributes of their own, and are multiplied then.
                sizes *= size if name in _SIDES else 1
        kind, domain, overload = texts[4], texts[7], texts[8]
        if kind == "Constant" and len(named) != 1:
            raise _Malformed(f"it has a Constant with {len(named)} attributes")
        if sizes > MOST_NUMBERS:
            raise _Malformed(f"attributes of its operator {kind[:80]} ask for {sizes:,} numbers")
        if domain not in (*_STANDARD, DOMAIN):
            raise _Malformed(f"it has the operator {kind[:80]!r} of the domain {domain[:80]!r}")
        if kind in _REFUSED:
            raise _Malformed(f"it has the operator {kind}, which {_REFUSED[kind]}")
        return _Node(kind, domain, overload, tuple(inputs), tuple(outputs), tuple(graphs), constant)

    def attribute(self, data: memoryview, depth: int) -> tuple[str, Constant, list[_Graph], float]:
        """Read an AttributeProto: its name, the numbers it holds, the graphs, and the size that it asks for."""
        name, reference, tensors = "", "", 0
        wholes: list[float] = []
        constant: Constant = None
        graphs = []
        for number, value in _fields(data):
            if number == 1:
                name = _text(value)
            elif number in (3, 8):
                wholes += _wholes(value)
                constant = tuple(wholes) if len(wholes) <= _MOST_KNOWN else None
            elif number in (2, 7):
                floats = _message(value)
                found = struct.unpack(f"<{len(floats) // 4}f", floats[: len(floats) // 4 * 4])
                wholes += found[:_MOST_KNOWN]
                constant = tuple(wholes) if len(wholes) <= _MOST_KNOWN else None
            elif number in (5, 10):
                tensors += number == 5
                constant = _tensor(_message(value))[1]
            elif number in (6, 11):
                graphs.append(self.graph(_message(value), depth + 1))
            elif number == 21:
                reference = _text(value)
            elif number in (22, 23):
                raise _Malformed("it has sparse weights")
        if tensors > 1:
            # Readers put the parts of two together, into a third one.
            raise _Malformed(f"its attribute {name[:80]!r} has {tensors} tensors")
        if name not in _SIZE_ATTRIBUTES:
            return name, constant, graphs, 1
        if reference:
            raise _Malformed(f"an operator of it takes its {name} from where its function is called")
        size = math.prod(max(1, abs(whole)) for whole in wholes)
        if not size <= MOST_NUMBERS:
            raise _Malformed(f"an operator of it has {name} = {wholes[:8]}")
        return name, constant, graphs, size


def _named(data: memoryview, wanted: int) -> str:
    """The text of one field of a message; the last one, as protobuf takes it."""
    name = ""
    for number, value in _fields(data):
        if number == wanted:
            name = _text(value)
    return name


def _tensor(data: memoryview) -> tuple[str, Constant]:
    """Read a TensorProto: its name, and its numbers if they are few."""
    name, kind, size = "", 0, 0
    dims: list[int] = []
    raw: memoryview | None = None
    typed: list[float] = []
    for number, value in _fields(data):
        if number == 1:
            dims += _wholes(value)
        elif number == 2:
            kind = _whole(value)
        elif number == 8:
            name = _text(value)
        elif number == 9:
            raw = _message(value)
            size += len(raw)
        elif number in (13, 14) and (number == 13 or value):
            raise _Malformed("its weights lie in another file")
        elif number in (4, 5, 6, 7, 10, 11):
            size += 10 if isinstance(value, int) else 1 + len(value)
            if number in (5, 7) and size <= 10 * _MOST_KNOWN:
                typed += _wholes(value)
            elif number in (4, 10) and size <= 10 * _MOST_KNOWN:
                letter, width = ("f", 4) if number == 4 else ("d", 8)
                packed = _message(value)
                whole = len(packed) // width
                typed += struct.unpack(f"<{whole}{letter}", packed[: whole * width])
    if any(side < 0 for side in dims) or (count := math.prod(dims)) > 8 * size:
        raise _Malformed(f"it has weights of the shape {dims[:8]} in {size:,} bytes")
    if count > _MOST_KNOWN or kind not in _FORMATS:
        return name, None
    if raw is not None:
        letter = _FORMATS[kind]
        whole = len(raw) // struct.calcsize(letter)
        return name, struct.unpack(f"<{whole}{letter}", raw[: whole * struct.calcsize(letter)])[:count]
    return name, tuple(typed[:count])


Key = tuple[str, str]


@dataclass
class _Walk:
    """Goes through the graph as a runtime does that writes every function out where it is called."""

    functions: Mapping[Key, _Graph]
    nodes: int = 0
    _open: list[Key] = field(default_factory=list)

    def graph(self, graph: _Graph, known: Constants, depth: int, around: Collection[str] = ()) -> Constants:
        """Count the nodes of a graph, and look at the sizes that it makes of constants.

        Args:
            graph: the graph.
            known: constants around it, by their names in it.
            depth: how many graphs it lies in.
            around: all names around it that it may use.

        Returns:
            Its constants, by their names, with those around it.
        """
        if depth > DEEPEST:
            raise _Malformed(f"graphs and functions lie in each other more than {DEEPEST} deep in it")
        constants = {**known, **graph.constants}
        names = {"", *around, *graph.inputs, *graph.constants}
        for node in graph.nodes:
            self.nodes += 1
            if self.nodes > MOST_NODES:
                raise _Malformed(f"it has more than {MOST_NODES:,} nodes, with its functions written out")
            if not names.issuperset(node.inputs):
                # Runtimes sort them; constants would be known too late here.
                raise _Malformed(f"its {node.kind[:80]} stands before what it takes")
            _check_sizes(node, constants)
            made = self._made(node, constants, depth, names)
            for name in node.outputs:
                constants.pop(name, None)
            constants.update(made)
            names.update(node.outputs)
        return constants

    def _made(self, node: _Node, constants: Constants, depth: int, names: Collection[str]) -> Constants:
        """Go through what a node holds or calls; returns those of its outputs that are constants."""
        made: dict[str, Constant] = {}
        for inner in node.graphs:
            own = {name: value for name, value in constants.items() if name not in inner.inputs}
            found = self.graph(inner, own, depth + 1, names)
            made |= {
                name: None
                for name, inside in zip(node.outputs, inner.outputs, strict=False)
                if inside in found
            }
        if node.kind == "Constant":
            return dict.fromkeys(node.outputs, node.constant)
        key = (node.kind, node.overload)
        if node.domain == DOMAIN and key in self.functions:
            return self._call(key, node, constants, depth)
        if not node.graphs and node.inputs and all(name in constants for name in node.inputs if name):
            return dict.fromkeys(node.outputs, _computed(node, constants))
        return made

    def _call(self, key: Key, node: _Node, constants: Constants, depth: int) -> Constants:
        if key in self._open:
            raise _Malformed(f"its function {key[0][:80]!r} calls itself")
        function = self.functions[key]
        given = zip(function.inputs, node.inputs, strict=False)
        self._open.append(key)
        found = self.graph(
            function, {own: constants[name] for own, name in given if name in constants}, depth + 1
        )
        self._open.pop()
        return {
            name: found[own]
            for name, own in zip(node.outputs, function.outputs, strict=False)
            if own in found
        }


def _check_sizes(node: _Node, constants: Constants) -> None:
    """Refuse a node that makes a tensor of a size that stands in the file, and is nobody's.

    Raises:
        _Malformed: if it does, or if the size is computed from constants, as if to hide it.
    """
    places = [place for place in _SIZES.get(node.kind, ()) if place < len(node.inputs) and node.inputs[place]]
    names = [node.inputs[place] for place in places]
    if node.kind == "Range" and not all(name in constants for name in names):
        return
    for name in names:
        if name in constants and constants[name] is None:
            raise _Malformed(
                f"the size of its {node.kind} {node.outputs[0][:80]!r} is computed from constants"
            )
    numbers = [constants[name] for name in names if name in constants]
    if node.kind == "Range":
        start, limit, step = (float((values or (0,))[0]) for values in numbers)
        sizes = [abs(limit - start) / abs(step) if step else math.inf]
    else:
        sizes = [math.prod(max(1.0, abs(float(number))) for number in values or ()) for values in numbers]
    if not all(size <= MOST_NUMBERS for size in sizes):
        raise _Malformed(
            f"its {node.kind} {node.outputs[0][:80]!r} makes a tensor of {max(sizes):.0f} numbers"
        )


def _computed(node: _Node, constants: Constants) -> Constant:
    """What a node makes of constants, where that is easily told."""
    given = [constants[name] for name in node.inputs if name]
    first = given[0]
    if node.kind in ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Flatten"):
        return first
    if any(values is None for values in given):
        return None
    if node.kind == "Concat":
        joined = tuple(number for values in given for number in values or ())
        return joined if len(joined) <= _MOST_KNOWN else None
    return None


def _contents(model: Path | bytes) -> memoryview:
    if isinstance(model, bytes):
        return memoryview(model)
    with model.open("rb") as file:
        # Unmapped when the last view of it is gone.
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def check_model(model: Path | bytes, remedy: str = "compile the bundle again") -> frozenset[str]:
    """Check that a model has nothing that this package does not write, and that could keep a runtime busy for ever.

    Functions are of this package's domain, do not call themselves and are short when they are written out; other
    operators are ONNX's; there is no loop but Scan, which ends with its input; weights are as large as they say and lie
    in the file; and no tensor gets an absurd size from a constant.

    Args:
        model: its file, or its serialised bytes.
        remedy: what the user is told to do about one that is refused.

    Returns:
        The operators of this package's domain that its graph calls, and "Scan" if it has such a loop itself.

    Raises:
        BundleError: if it is otherwise, or no ONNX model.
    """
    name = "the model" if isinstance(model, bytes) else str(model)
    try:
        graphs, functions = _parts(_contents(model))
        if len(graphs) != 1:
            raise _Malformed(f"it has {len(graphs)} graphs")
        _Walk(functions).graph(graphs[0], {}, 0)
        return frozenset(node.kind for node in graphs[0].nodes if node.domain == DOMAIN or node.kind == LOOP)
    except FileNotFoundError:
        raise BundleError(f"there is no model {name}") from None
    except (OSError, ValueError, struct.error) as error:
        raise BundleError(f"{name} cannot be read: {error}") from error
    except _Malformed as error:
        raise BundleError(
            f"{name} is refused: {error}. This package writes no such file, and a runtime could hang or fill the "
            f"memory; {remedy}"
        ) from None


def versions_of(model: Path) -> tuple[int, int]:
    """The opset of the standard operators in a file that `check_model` took, and its IR version."""
    opset = ir_version = 0
    for number, value in _fields(_contents(model)):
        if number == 1:
            ir_version = _whole(value)
        elif number == 8:
            entry = _message(value)
            if _named(entry, 1) in _STANDARD:
                opset = max((_whole(found) for field_, found in _fields(entry) if field_ == 2), default=0)
    return opset, ir_version


def _parts(data: memoryview) -> tuple[list[_Graph], dict[Key, _Graph]]:
    """The graphs and the functions of a ModelProto."""
    graphs: list[_Graph] = []
    functions: dict[Key, _Graph] = {}
    reader = _Reader()
    for number, value in _fields(data):
        if number == 7:
            graphs.append(reader.graph(_message(value), 0))
        elif number == 25:
            body = _message(value)
            key = (_named(body, 1), _named(body, 13))
            if _named(body, 10) != DOMAIN or key in functions:
                raise _Malformed(f"it has a function {key[0][:80]!r} that is none of this package")
            functions[key] = reader.graph(body, 0, function=True)
    return graphs, functions
