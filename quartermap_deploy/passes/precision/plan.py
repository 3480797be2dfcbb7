"""Which operators of a float32 graph stay float32, and why."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

import onnx
from onnx import numpy_helper

from quartermap_deploy.errors import PassError
from quartermap_deploy.lowering.element_types import FLOAT, ElementType, types_of_values
from quartermap_deploy.lowering.operator import DOMAIN
from quartermap_deploy.passes.block_parts import block_parts
from quartermap_deploy.passes.precision.operator_types import (
    ANY_TYPE,
    MAKERS,
    MOVERS,
    typed_inputs,
    typed_outputs,
)
from quartermap_deploy.passes.precision.weight_range import unfit

NAME = "cast_precision"
"""The pass, for messages."""

_POOLS = ("ReduceMean", "GlobalAveragePool")


class PrecisionPlan:
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
        self.slots = [typed_inputs(node, self.opset, kind) for node in self.graph.node]
        self.reasons: dict[int, str] = {}
        self.kept_weights: dict[str, str] = {}
        self.subnormal: dict[str, float] = {}

    def in_float32(self, place: int) -> bool:
        """Whether an operator computes in float32."""
        return place in self.reasons

    def wants(self, place: int, position: int) -> int | None:
        """The type that an operator reads an input in, or None if any will do."""
        node = self.graph.node[place]
        if node.op_type in ANY_TYPE:
            return None
        return FLOAT if self.in_float32(place) or position not in self.slots[place] else self.kind.number

    def makes(self, place: int, position: int) -> int:
        """The type of a floating-point output."""
        typed = not self.in_float32(place) and position in typed_outputs(self.graph.node[place])
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
        """Keep operators that have no form of the type."""
        for place, node in enumerate(self.graph.node):
            floats = [name for name in (*node.input, *node.output) if name in self.floats]
            if floats and not self.slots[place] and node.op_type not in (*ANY_TYPE, *MAKERS):
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
        """Keep values and operators that the caller names.

        Raises:
            PassError: if there is none of a name.
        """
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
        """Keep blocks, each with what leads into it.

        Raises:
            PassError: if there is no such block.
        """
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
            reason, subnormal = unfit(values, self.kind)
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
            if self.graph.node[place].op_type not in ANY_TYPE:
                self.reasons.setdefault(place, reason)

    def _moves(self, place: int) -> bool:
        node = self.graph.node[place]
        return (
            node.op_type in MOVERS
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
