"""The graphs and functions of an ONNX file, read without a runtime. What no file of ours has is refused on the way.

The file is walked as protobuf writes it, field by field, and weights are skipped: 100 MB take some milliseconds, and no
memory. The fields are those of onnx.proto, whose numbers never change.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from quartermap_deploy.lowering.operator import DOMAIN
from quartermap_deploy.protobuf_fields import (
    Malformed,
    fields_of,
    message_of,
    number_of,
    numbers_of,
    text_in,
    text_of,
)

MOST_NODES = 200_000
"""Nodes, with every function written out where it is called. VMamba-B has about 20,000."""
DEEPEST = 4
"""Graphs in nodes in graphs, functions included. Ours have two: a function, and the body of its Scan."""
MOST_NUMBERS = 1 << 28
"""Numbers of a tensor whose shape stands in the file: 1 GiB of float32."""

STANDARD = ("", "ai.onnx")
"""The domains of ONNX's own operators."""
MOST_KNOWN = 64
"""Numbers of a constant that is looked at; shapes have fewer."""
_REFUSED = {
    "Loop": "may have no end",
    "SequenceMap": "is a loop",
    "ImageDecoder": "opens an image of any format",
    **dict.fromkeys(
        ("StringConcat", "StringSplit", "StringNormalizer", "RegexFullMatch", "TfIdfVectorizer"),
        "makes texts of any length, or searches them",
    ),
}
_SIZE_ATTRIBUTES = frozenset(
    {
        *("pads", "strides", "dilations", "kernel_shape", "output_shape", "output_padding", "shape"),
        *("output_height", "output_width", "pooled_shape", "sample_size", "scales"),
    }
)
_SIDES = ("output_height", "output_width")
_FORMATS = {1: "f", 6: "i", 7: "q", 11: "d"}
"""ONNX's numbers of element types, and `struct`'s letters for them."""

Constant = tuple[float, ...] | None
"""Numbers that stand in the file; None for more, or for what is computed from them in another way."""
Constants = Mapping[str, Constant]


@dataclass(frozen=True)
class Node:
    """An operator, or the call of a function."""

    kind: str
    domain: str
    overload: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    graphs: tuple[Graph, ...]
    constant: Constant


@dataclass(frozen=True)
class Graph:
    """A graph, or a function."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: Constants


Key = tuple[str, str]
"""A function: its name, and its overload."""


def read_graphs(data: memoryview) -> tuple[list[Graph], dict[Key, Graph]]:
    """The graphs and the functions of a ModelProto."""
    graphs: list[Graph] = []
    functions: dict[Key, Graph] = {}
    reader = GraphReader()
    for number, value in fields_of(data):
        if number == 7:
            graphs.append(reader.graph(message_of(value), 0))
        elif number == 25:
            body = message_of(value)
            key = (text_in(body, 1), text_in(body, 13))
            if text_in(body, 10) != DOMAIN or key in functions:
                raise Malformed(f"it has a function {key[0][:80]!r} that is none of this package")
            functions[key] = reader.graph(body, 0, function=True)
    return graphs, functions


@dataclass
class GraphReader:
    """Reads the messages of a file, and refuses what no file of ours has."""

    nodes: int = 0

    def graph(self, data: memoryview, depth: int, *, function: bool = False) -> Graph:
        """Read a GraphProto or a FunctionProto."""
        if depth > DEEPEST:
            raise Malformed(f"graphs lie in each other more than {DEEPEST} deep in it")
        node, inside, outside = (7, 4, 5) if function else (1, 11, 12)
        inputs: list[str] = []
        outputs: list[str] = []
        nodes: list[Node] = []
        constants: dict[str, Constant] = {}
        for number, value in fields_of(data):
            if number == node:
                nodes.append(self.node(message_of(value), depth))
            elif number in (inside, outside):
                name = text_of(value) if function else text_in(message_of(value), 1)
                (inputs if number == inside else outputs).append(name)
            elif number == 5:
                name, constant = _tensor(message_of(value))
                constants[name] = constant
            elif number == 15 and not function:
                raise Malformed("it has sparse weights")
        return Graph(tuple(inputs), tuple(outputs), tuple(nodes), constants)

    def node(self, data: memoryview, depth: int) -> Node:
        """Read a NodeProto."""
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise Malformed(f"it has more than {MOST_NODES:,} nodes")
        texts = {4: "", 7: "", 8: ""}
        inputs: list[str] = []
        outputs: list[str] = []
        graphs: list[Graph] = []
        sizes = 1.0
        constant: Constant = None
        named: set[str] = set()
        for number, value in fields_of(data):
            if number == 1:
                inputs.append(text_of(value))
            elif number == 2:
                outputs.append(text_of(value))
            elif number in texts:
                texts[number] = text_of(value)
            elif number == 5:
                name, constant, below, size = self.attribute(message_of(value), depth)
                if name in named:
                    raise Malformed(f"it has an operator with two attributes {name[:80]!r}")
                named.add(name)
                graphs += below
                # Height and width may be attributes of their own, and are multiplied then.
                sizes *= size if name in _SIDES else 1
        kind, domain, overload = texts[4], texts[7], texts[8]
        if kind == "Constant" and len(named) != 1:
            raise Malformed(f"it has a Constant with {len(named)} attributes")
        if sizes > MOST_NUMBERS:
            raise Malformed(f"attributes of its operator {kind[:80]} ask for {sizes:,} numbers")
        if domain not in (*STANDARD, DOMAIN):
            raise Malformed(f"it has the operator {kind[:80]!r} of the domain {domain[:80]!r}")
        if kind in _REFUSED:
            raise Malformed(f"it has the operator {kind}, which {_REFUSED[kind]}")
        return Node(kind, domain, overload, tuple(inputs), tuple(outputs), tuple(graphs), constant)

    def attribute(self, data: memoryview, depth: int) -> tuple[str, Constant, list[Graph], float]:
        """Read an AttributeProto: its name, the numbers it holds, the graphs, and the size that it asks for."""
        name, reference, tensors = "", "", 0
        wholes: list[float] = []
        constant: Constant = None
        graphs = []
        for number, value in fields_of(data):
            if number == 1:
                name = text_of(value)
            elif number in (3, 8):
                wholes += numbers_of(value)
                constant = tuple(wholes) if len(wholes) <= MOST_KNOWN else None
            elif number in (2, 7):
                floats = message_of(value)
                found = struct.unpack(f"<{len(floats) // 4}f", floats[: len(floats) // 4 * 4])
                wholes += found[:MOST_KNOWN]
                constant = tuple(wholes) if len(wholes) <= MOST_KNOWN else None
            elif number in (5, 10):
                tensors += number == 5
                constant = _tensor(message_of(value))[1]
            elif number in (6, 11):
                graphs.append(self.graph(message_of(value), depth + 1))
            elif number == 21:
                reference = text_of(value)
            elif number in (22, 23):
                raise Malformed("it has sparse weights")
        if tensors > 1:
            # Readers put the parts of two together, into a third one.
            raise Malformed(f"its attribute {name[:80]!r} has {tensors} tensors")
        if name not in _SIZE_ATTRIBUTES:
            return name, constant, graphs, 1
        if reference:
            raise Malformed(f"an operator of it takes its {name} from where its function is called")
        size = math.prod(max(1, abs(whole)) for whole in wholes)
        if not size <= MOST_NUMBERS:
            raise Malformed(f"an operator of it has {name} = {wholes[:8]}")
        return name, constant, graphs, size


def _tensor(data: memoryview) -> tuple[str, Constant]:
    """Read a TensorProto: its name, and its numbers if they are few."""
    name, kind, size = "", 0, 0
    dims: list[int] = []
    raw: memoryview | None = None
    typed: list[float] = []
    for number, value in fields_of(data):
        if number == 1:
            dims += numbers_of(value)
        elif number == 2:
            kind = number_of(value)
        elif number == 8:
            name = text_of(value)
        elif number == 9:
            raw = message_of(value)
            size += len(raw)
        elif number in (13, 14) and (number == 13 or value):
            raise Malformed("its weights lie in another file")
        elif number in (4, 5, 6, 7, 10, 11):
            size += 10 if isinstance(value, int) else 1 + len(value)
            if number in (5, 7) and size <= 10 * MOST_KNOWN:
                typed += numbers_of(value)
            elif number in (4, 10) and size <= 10 * MOST_KNOWN:
                letter, width = ("f", 4) if number == 4 else ("d", 8)
                packed = message_of(value)
                whole = len(packed) // width
                typed += struct.unpack(f"<{whole}{letter}", packed[: whole * width])
    if any(side < 0 for side in dims) or (count := math.prod(dims)) > 8 * size:
        raise Malformed(f"it has weights of the shape {dims[:8]} in {size:,} bytes")
    if count > MOST_KNOWN or kind not in _FORMATS:
        return name, None
    if raw is not None:
        letter = _FORMATS[kind]
        whole = len(raw) // struct.calcsize(letter)
        return name, struct.unpack(f"<{whole}{letter}", raw[: whole * struct.calcsize(letter)])[:count]
    return name, tuple(typed[:count])
