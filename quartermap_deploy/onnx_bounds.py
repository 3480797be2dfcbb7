"""What an ONNX file of a bundle may hold, looked at before any runtime reads it.

A file of a few hundred bytes can keep a runtime busy for ever: functions that call each other twice, level upon level,
a loop without an end, a constant that is expanded to a terabyte while the file is loaded. What this package writes has
none of these, so nothing of the kind is taken: functions are its scans, and lie two deep at most.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quartermap_deploy.errors import BundleError
from quartermap_deploy.lowering.operator import DOMAIN
from quartermap_deploy.onnx_graphs import (
    DEEPEST,
    MOST_KNOWN,
    MOST_NODES,
    MOST_NUMBERS,
    STANDARD,
    Constant,
    Constants,
    Graph,
    Key,
    Node,
    read_graphs,
)
from quartermap_deploy.protobuf_fields import Malformed, fields_of, message_of, number_of, text_in

LOOP = "Scan"
"""What scans are that are written out in the main graph."""
_SIZES = {
    **dict.fromkeys(("ConstantOfShape", "HannWindow", "HammingWindow", "BlackmanWindow"), (0,)),
    **dict.fromkeys(
        ("Expand", "Tile", "Pad", "OneHot", "CenterCropPad", "AffineGrid", "DFT", "Upsample"), (1,)
    ),
    **{"Col2Im": (1, 2), "MelWeightMatrix": (0, 1), "MaxUnpool": (2,), "Resize": (2, 3), "Range": (0, 1, 2)},
}
"""Operators that make a tensor as large as some of their inputs say; which ones."""


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
        graphs, functions = read_graphs(_contents(model))
        if len(graphs) != 1:
            raise Malformed(f"it has {len(graphs)} graphs")
        _Walk(functions).graph(graphs[0], {}, 0)
        return frozenset(node.kind for node in graphs[0].nodes if node.domain == DOMAIN or node.kind == LOOP)
    except FileNotFoundError:
        raise BundleError(f"there is no model {name}") from None
    except (OSError, ValueError, struct.error) as error:
        raise BundleError(f"{name} cannot be read: {error}") from error
    except Malformed as error:
        raise BundleError(
            f"{name} is refused: {error}. This package writes no such file, and a runtime could hang or fill the "
            f"memory; {remedy}"
        ) from None


def versions_of(model: Path) -> tuple[int, int]:
    """The opset of the standard operators in a file that `check_model` took, and its IR version."""
    opset = ir_version = 0
    for number, value in fields_of(_contents(model)):
        if number == 1:
            ir_version = number_of(value)
        elif number == 8:
            entry = message_of(value)
            if text_in(entry, 1) in STANDARD:
                opset = max(
                    (number_of(found) for field_, found in fields_of(entry) if field_ == 2), default=0
                )
    return opset, ir_version


def _contents(model: Path | bytes) -> memoryview:
    if isinstance(model, bytes):
        return memoryview(model)
    with model.open("rb") as file:
        # Unmapped when the last view of it is gone.
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


@dataclass
class _Walk:
    """Goes through the graph as a runtime does that writes every function out where it is called."""

    functions: Mapping[Key, Graph]
    nodes: int = 0
    _open: list[Key] = field(default_factory=list)

    def graph(self, graph: Graph, known: Constants, depth: int, around: Collection[str] = ()) -> Constants:
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
            raise Malformed(f"graphs and functions lie in each other more than {DEEPEST} deep in it")
        constants = {**known, **graph.constants}
        names = {"", *around, *graph.inputs, *graph.constants}
        for node in graph.nodes:
            self.nodes += 1
            if self.nodes > MOST_NODES:
                raise Malformed(f"it has more than {MOST_NODES:,} nodes, with its functions written out")
            if not names.issuperset(node.inputs):
                # Runtimes sort them; constants would be known too late here.
                raise Malformed(f"its {node.kind[:80]} stands before what it takes")
            _check_sizes(node, constants)
            made = self._made(node, constants, depth, names)
            for name in node.outputs:
                constants.pop(name, None)
            constants.update(made)
            names.update(node.outputs)
        return constants

    def _made(self, node: Node, constants: Constants, depth: int, names: Collection[str]) -> Constants:
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

    def _call(self, key: Key, node: Node, constants: Constants, depth: int) -> Constants:
        if key in self._open:
            raise Malformed(f"its function {key[0][:80]!r} calls itself")
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


def _check_sizes(node: Node, constants: Constants) -> None:
    """Refuse a node that makes a tensor of a size that stands in the file, and is nobody's.

    Raises:
        Malformed: if it does, or if the size is computed from constants, as if to hide it.
    """
    places = [place for place in _SIZES.get(node.kind, ()) if place < len(node.inputs) and node.inputs[place]]
    names = [node.inputs[place] for place in places]
    if node.kind == "Range" and not all(name in constants for name in names):
        return
    for name in names:
        if name in constants and constants[name] is None:
            raise Malformed(
                f"the size of its {node.kind} {node.outputs[0][:80]!r} is computed from constants"
            )
    numbers = [constants[name] for name in names if name in constants]
    if node.kind == "Range":
        start, limit, step = (float((values or (0,))[0]) for values in numbers)
        sizes = [abs(limit - start) / abs(step) if step else math.inf]
    else:
        sizes = [math.prod(max(1.0, abs(float(number))) for number in values or ()) for values in numbers]
    if not all(size <= MOST_NUMBERS for size in sizes):
        raise Malformed(
            f"its {node.kind} {node.outputs[0][:80]!r} makes a tensor of {max(sizes):.0f} numbers"
        )


def _computed(node: Node, constants: Constants) -> Constant:
    """What a node makes of constants, where that is easily told."""
    given = [constants[name] for name in node.inputs if name]
    first = given[0]
    if node.kind in ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Flatten"):
        return first
    if any(values is None for values in given):
        return None
    if node.kind == "Concat":
        joined = tuple(number for values in given for number in values or ())
        return joined if len(joined) <= MOST_KNOWN else None
    return None
