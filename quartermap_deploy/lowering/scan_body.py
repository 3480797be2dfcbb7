"""The `scan` body of SelectiveScan2D: ONNX Scan in two levels, for CPUs.

Each orientation, rows or columns, is brought into the layout (T, batch, P, d_inner): P lines side by side, T positions
along a line, channels last. Both directions of an orientation then walk the same tensors, one from the front and one
from the back, which Scan does by an attribute instead of a copy. Three Scans solve the recurrence of an orientation:

1. along all lines at once from a zero state, for the last state of each line;
2. across the lines, (batch, d_inner) at a time, for the state each line starts from: the product of the decays of a
   line is exp(A·Σdt), a sum, so no running product is needed;
3. along all lines at once from the right state; h·C is the output.

Everything that needs no state (projection, softplus, exp) is done on whole maps before the Scans where d_state is 1,
because whole maps use all cores. For larger d_state these tensors would be d_state maps each, so the decay and the
drive are formed inside the Scans, where a step stays in cache.

Maps are unrolled by Gather, not by Transpose: ONNX Runtime merges neighbouring transposes into one with a general
permutation, which is five times slower than two simple ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from quartermap_deploy.lowering.operator import (
    DOMAIN,
    INPUTS_2D,
    ORIENTATIONS,
    SELECTIVE_SCAN_2D,
    Direction,
    ScanVariant,
)
from quartermap_deploy.lowering.softplus import write_softplus
from quartermap_deploy.lowering.writer import Value, Writer, ints

OPSET = 20


def scan_body(variant: ScanVariant, overload: str = "") -> onnx.FunctionProto:
    """Write the ONNX function of SelectiveScan2D for one variant.

    Args:
        variant: directions, softplus, state size and rank of the time step.
        overload: the function's overload name, for models that hold more than one variant.

    Returns:
        A function in domain `quartermap` whose body has standard operators of opset 20 only. It computes in float32
        and casts the result to the type of x. Every size is read from its inputs, so one function serves all blocks
        and all input sizes.
    """
    writer = _BodyWriter(variant)
    result = writer.write_body()
    inputs = INPUTS_2D if variant.low_rank else INPUTS_2D[:-1]
    function = helper.make_function(
        DOMAIN,
        SELECTIVE_SCAN_2D,
        list(inputs),
        [result],
        writer.write.nodes,
        [helper.make_opsetid("", OPSET)],
        ["directions", "softplus"],
    )
    function.overload = overload
    return function


@dataclass(frozen=True)
class _Line:
    """The tensors of one direction, lines side by side: (T, batch, P, ...)."""

    reverse: bool
    exponent: Value
    """dt·A, (T, batch, P, d_inner), where d_state is 1, else dt, (T, batch, P, 1, d_inner)."""
    drive: Value
    """dt·B·x, (T, batch, P, d_inner), where d_state is 1, else dt·x, (T, batch, P, 1, d_inner)."""
    B: Value
    C: Value
    A: Value


class _BodyWriter:
    def __init__(self, variant: ScanVariant) -> None:
        self.write = Writer()
        self.variant = variant
        self.directions = [Direction.parse(name) for name in variant.directions]
        self.count = len(self.directions)
        self.single = variant.d_state == 1

    def write_body(self) -> Value:
        write = self.write
        x_last = write("Transpose", self._float("x"), perm=[0, 2, 3, 1])
        x = write("Flatten", x_last, axis=3)
        # B and C of all directions side by side: (positions, K·N + K·N).
        projections = write("Concat", self._positions("B"), self._positions("C"), axis=1)
        steps = self._positions("dt")
        if self.variant.low_rank:
            # A column of ones, so that the product with the weight adds the bias too: (positions, K, R + 1). By
            # Concat, because Pad is five times slower.
            ranked = write("Reshape", steps, ints(0, self.count, -1))
            shape = write("Concat", write("Shape", x, start=0, end=1), ints(self.count, 1), axis=0)
            one = helper.make_tensor("one", onnx.TensorProto.FLOAT, [1], [1.0])
            steps = write("Concat", ranked, write("ConstantOfShape", shape, value=one), axis=2)
        weights = self._time_step_weights()
        A = [
            write("Transpose", part, perm=[1, 0])
            for part in self._split(self._float("A"), self.count, axis=0)
        ]
        raster = self._raster_indices(x, x_last)

        merged: list[Value] = []
        for orientation in ORIENTATIONS:
            members = [k for k, d in enumerate(self.directions) if d.orientation == orientation]
            if not members:
                continue
            unroll, roll = self._unrolling(raster, orientation)
            local_x = write("Gather", x, unroll, axis=0)
            maps = self._split(write("Gather", projections, unroll, axis=0), 2 * self.count, axis=3)
            local_steps = self._split(write("Gather", steps, unroll, axis=0), self.count, axis=3)
            lines = [
                self._line(k, local_x, local_steps[k], maps[k], maps[self.count + k], weights[k], A[k])
                for k in members
            ]
            flat = write("Flatten", self._solve(lines), axis=3)
            merged.append(write("Gather", flat, roll, axis=0))
        y = merged[0] if len(merged) == 1 else write("Add", merged[0], merged[1])
        grouped_D = write("Reshape", self._float("D"), ints(self.count, -1))
        skip = write("ReduceSum", grouped_D, ints(0), keepdims=0)
        y = write("Add", y, write("Mul", x_last, skip))
        return write("CastLike", write("Transpose", y, perm=[0, 3, 1, 2]), "x")

    # Layout ----------------------------------------------------------------------------------------------------

    def _float(self, name: str) -> Value:
        return self.write("Cast", name, to=onnx.TensorProto.FLOAT)

    def _positions(self, name: str) -> Value:
        """(batch, c, H, W) → (batch·H·W, c)."""
        return self.write("Flatten", self.write("Transpose", self._float(name), perm=[0, 2, 3, 1]), axis=3)

    def _raster_indices(self, x: Value, x_last: Value) -> Value:
        """0, 1, … in raster order, (batch, H, W)."""
        write = self.write
        zero, one = np.array(0, dtype=np.int64), np.array(1, dtype=np.int64)
        positions = write("Squeeze", write("Shape", x, start=0, end=1), ints(0))
        return write("Reshape", write("Range", zero, positions, one), write("Shape", x_last, start=0, end=3))

    def _unrolling(self, raster: Value, orientation: str) -> tuple[Value, Value]:
        """Row indices (T, batch, P) that turn positions into lines, and (batch, H, W) that turn them back."""
        write = self.write
        to_lines, to_raster = ([2, 0, 1], [1, 2, 0]) if orientation == "row" else ([1, 0, 2], [1, 0, 2])
        unroll = write("Transpose", raster, perm=to_lines)
        # The same count, laid out as lines: where position i of the lines has to go.
        counted = write("Reshape", raster, write("Shape", unroll))
        return unroll, write("Transpose", counted, perm=to_raster)

    def _split(self, value: Value, parts: int, axis: int) -> list[Value]:
        if parts == 1:
            return [value]
        return self.write.multiple("Split", [value], parts, axis=axis, num_outputs=parts)

    # Parameters ------------------------------------------------------------------------------------------------

    def _time_step_weights(self) -> list[Value]:
        """K matrices (R + 1, d_inner), the last row being the bias; the biases (1, d_inner) alone at full rank."""
        write = self.write
        biases = self._split(write("Unsqueeze", self._float("dt_bias"), ints(0)), self.count, axis=1)
        if not self.variant.low_rank:
            return biases
        weights = self._split(self._float("dt_weight"), self.count, axis=0)
        return [
            write("Concat", write("Transpose", weight, perm=[1, 0]), bias, axis=0)
            for weight, bias in zip(weights, biases, strict=True)
        ]

    # The scan --------------------------------------------------------------------------------------------------

    def _line(self, k: int, x: Value, steps: Value, B: Value, C: Value, weight: Value, A: Value) -> _Line:
        """Form what the Scans of direction k read from its maps (T, batch, P, ...)."""
        write = self.write
        if self.variant.low_rank:
            dt = write("MatMul", write("Squeeze", steps, ints(3)), weight)
        else:
            dt = write("Add", steps, weight)
        if self.variant.softplus:
            dt = write_softplus(write, dt)
        reverse = self.directions[k].reverse
        if self.single:
            # B first: were x multiplied by B, both unrolled, ONNX Runtime would move the unrolling behind the product.
            drive = write("Mul", write("Mul", dt, B), x)
            return _Line(reverse, write("Mul", dt, A), drive, B, C, A)
        drive = write("Unsqueeze", write("Mul", dt, x), ints(3))
        B, C = write("Unsqueeze", B, ints(4)), write("Unsqueeze", C, ints(3))
        return _Line(reverse, write("Unsqueeze", dt, ints(3)), drive, B, C, A)

    def _solve(self, lines: Sequence[_Line]) -> Value:
        """The three Scans of one orientation; returns the sum of its directions, (T, batch, P, d_inner)."""
        write = self.write
        decays = [write("Exp", line.exponent) if self.single else line.exponent for line in lines]
        drives = [
            [decay, line.drive] + ([] if self.single else [line.B])
            for decay, line in zip(decays, lines, strict=True)
        ]
        totals = [self._total_decay(line) for line in lines]
        zeros = write("Sub", totals[0], totals[0])
        last_states = self._scan_lines(lines, drives, [zeros] * len(lines), output=False)
        first_states = self._scan_across(lines, last_states, totals)
        outputs = self._scan_lines(lines, drives, first_states, output=True)
        result = outputs[0] if len(outputs) == 1 else write("Sum", *outputs)
        return result if self.single else write("Squeeze", result, ints(3))

    def _total_decay(self, line: _Line) -> Value:
        """The product of a line's decays, exp(A·Σdt): (batch, P, [N,] d_inner)."""
        total = self.write("ReduceSum", line.exponent, ints(0), keepdims=0)
        return self.write("Exp", total if self.single else self.write("Mul", total, line.A))

    def _scan_lines(
        self,
        lines: Sequence[_Line],
        drives: Sequence[Sequence[Value]],
        initial: Sequence[Value],
        output: bool,
    ) -> list[Value]:
        """Advance all lines position by position: the last states, or with `output` the outputs, of each direction."""
        body = Writer("line_")
        states_in: list[Value] = []
        states_out: list[Value] = []
        scanned: list[Value] = []
        results: list[Value] = []
        feeds: list[Value] = []
        reversed_flags: list[int] = []
        for line, drive in zip(lines, drives, strict=True):
            names = [body.fresh("scanned") for _ in drive]
            state = body.fresh("state")
            decay, force = names[0], names[1]
            if not self.single:
                decay = body("Exp", body("Mul", decay, line.A))
                force = body("Mul", force, names[2])
            next_state = body("Add", body("Mul", decay, state), force)
            states_in.append(state)
            states_out.append(next_state)
            scanned += names
            feeds += drive
            reversed_flags += [int(line.reverse)] * len(drive)
            if output:
                weight = body.fresh("scanned")
                scanned.append(weight)
                feeds.append(line.C)
                reversed_flags.append(int(line.reverse))
                results.append(
                    body(
                        "Mul" if self.single else "MatMul",
                        *((next_state, weight) if self.single else (weight, next_state)),
                    )
                )
        outputs = self.write.multiple(
            "Scan",
            [*initial, *feeds],
            len(states_out) + len(results),
            body=body.subgraph("line", [*states_in, *scanned], [*states_out, *results]),
            num_scan_inputs=len(feeds),
            scan_input_directions=reversed_flags,
            **({"scan_output_directions": [int(line.reverse) for line in lines]} if output else {}),
        )
        return outputs[len(lines) :] if output else outputs

    def _scan_across(
        self, lines: Sequence[_Line], last: Sequence[Value], totals: Sequence[Value]
    ) -> list[Value]:
        """From the last states and total decays of the lines, the state each line starts from."""
        body = Writer("across_")
        carries: list[Value] = []
        next_carries: list[Value] = []
        scanned: list[Value] = []
        feeds: list[Value] = []
        flags: list[int] = []
        for line, state, total in zip(lines, last, totals, strict=True):
            carry, own, decay = (body.fresh("carry"), body.fresh("scanned"), body.fresh("scanned"))
            next_carries.append(body("Add", body("Mul", decay, carry), own))
            carries.append(carry)
            scanned += [own, decay]
            feeds += [state, total]
            flags += [int(line.reverse)] * 2
        before = [body("Identity", carry) for carry in carries]
        zero = self.write("ReduceMin", self.write("Sub", totals[0], totals[0]), ints(1), keepdims=0)
        outputs = self.write.multiple(
            "Scan",
            [zero] * len(lines) + feeds,
            2 * len(lines),
            body=body.subgraph("across", [*carries, *scanned], [*next_carries, *before]),
            num_scan_inputs=len(feeds),
            scan_input_axes=[1] * len(feeds),
            scan_output_axes=[1] * len(lines),
            scan_input_directions=flags,
            scan_output_directions=[int(line.reverse) for line in lines],
        )
        return outputs[len(lines) :]
