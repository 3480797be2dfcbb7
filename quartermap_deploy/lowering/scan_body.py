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
        self.batch, self.d_inner, self.height, self.width = (
            write("Shape", "x", start=axis, end=axis + 1) for axis in range(4)
        )
        self.length = write("Mul", self.height, self.width)
        self.positions = write("Mul", self.batch, self.length)
        x = self._channels_last(self._float("x"))
        narrow = self._narrow_maps()
        wide = None if self.variant.low_rank else self._channels_last(self._float("dt"))
        weights = self._time_step_weights()
        A = self._per_direction("A")

        merged: list[Value] = []
        for orientation in ORIENTATIONS:
            members = [k for k, d in enumerate(self.directions) if d.orientation == orientation]
            if not members:
                continue
            unroll, roll = self._unrolling(orientation)
            local_x = write("Gather", x, unroll, axis=0)
            local_narrow = write("Gather", narrow, unroll, axis=0)
            per_direction = self._split(local_narrow, self.count, axis=3)
            steps = (
                None
                if wide is None
                else self._split(write("Gather", wide, unroll, axis=0), self.count, axis=3)
            )
            lines = [
                self._line(
                    k, local_x, per_direction[k], None if steps is None else steps[k], weights[k], A[k]
                )
                for k in members
            ]
            summed = self._solve(lines)
            flat = write("Reshape", summed, write("Concat", self.positions, self.d_inner, axis=0))
            merged.append(write("Gather", flat, roll, axis=0))
        y = merged[0] if len(merged) == 1 else write("Add", merged[0], merged[1])
        grouped_D = write("Reshape", self._float("D"), ints(self.count, -1))
        skip = write("ReduceSum", grouped_D, ints(0), keepdims=0)
        y = write("Add", y, write("Mul", x, skip))
        return self._raster(y)

    # Layout ----------------------------------------------------------------------------------------------------

    def _float(self, name: str) -> Value:
        return self.write("Cast", name, to=onnx.TensorProto.FLOAT)

    def _channels_last(self, map_: Value) -> Value:
        """(batch, c, H, W) → (batch·H·W, c)."""
        write = self.write
        last = write("Transpose", map_, perm=[0, 2, 3, 1])
        return write("Reshape", last, write("Concat", self.positions, ints(-1), axis=0))

    def _raster(self, y: Value) -> Value:
        """(batch·H·W, d_inner) → (batch, d_inner, H, W), in the type of x."""
        write = self.write
        shape = write("Concat", self.batch, self.height, self.width, self.d_inner, axis=0)
        y = write("Transpose", write("Reshape", y, shape), perm=[0, 3, 1, 2])
        return write("CastLike", y, "x")

    def _narrow_maps(self) -> Value:
        """Join what is narrow, so that it is unrolled once: (batch·H·W, K, [dt | 1] + B + C).

        The column of ones lets the projection of the time step add its bias in the same matrix product.
        """
        write = self.write
        rows = write("Concat", self.positions, ints(self.count, -1), axis=0)
        parts = [write("Reshape", self._channels_last(self._float(name)), rows) for name in ("B", "C")]
        if self.variant.low_rank:
            ones_shape = write("Concat", self.positions, ints(self.count, 1), axis=0)
            one = helper.make_tensor("one", onnx.TensorProto.FLOAT, [1], [1.0])
            ones = write("ConstantOfShape", ones_shape, value=one)
            parts = [write("Reshape", self._channels_last(self._float("dt")), rows), ones, *parts]
        return write("Concat", *parts, axis=2)

    def _unrolling(self, orientation: str) -> tuple[Value, Value]:
        """Row indices that turn (batch·H·W, c) into (T, batch, P, c), and those that turn it back."""
        write = self.write
        zero, one = np.array(0, dtype=np.int64), np.array(1, dtype=np.int64)

        def count(size: Value) -> Value:
            return write("Range", zero, write("Squeeze", size, ints(0)), one)

        def placed(values: Value, stride: Value | None, axes: Sequence[int]) -> Value:
            scaled = values if stride is None else write("Mul", values, stride)
            return write("Unsqueeze", scaled, ints(*axes))

        b, h, w = count(self.batch), count(self.height), count(self.width)
        if orientation == "row":
            # Raster index b·H·W + h·W + w at (w, b, h); line index w·batch·H + b·H + h at (b, h, w).
            across = write("Mul", self.batch, self.height)
            to_line = (placed(b, self.length, (0, 2)), placed(h, self.width, (0, 1)), placed(w, None, (1, 2)))
            to_raster = (placed(b, self.height, (1, 2)), placed(h, None, (0, 2)), placed(w, across, (0, 1)))
        else:
            # Raster index b·H·W + h·W + w at (h, b, w); line index h·batch·W + b·W + w at (b, h, w).
            across = write("Mul", self.batch, self.width)
            to_line = (placed(b, self.length, (0, 2)), placed(h, self.width, (1, 2)), placed(w, None, (0, 1)))
            to_raster = (placed(b, self.width, (1, 2)), placed(h, across, (0, 2)), placed(w, None, (0, 1)))
        unroll = write("Add", write("Add", to_line[0], to_line[1]), to_line[2])
        roll = write("Add", write("Add", to_raster[0], to_raster[1]), to_raster[2])
        return unroll, write("Reshape", roll, ints(-1))

    def _split(self, value: Value, parts: int, axis: int) -> list[Value]:
        if parts == 1:
            return [value]
        return self.write.multiple("Split", [value], parts, axis=axis, num_outputs=parts)

    # Parameters ------------------------------------------------------------------------------------------------

    def _per_direction(self, name: str) -> list[Value]:
        """(K·d_inner, N) → K of (d_inner) where N is 1, else of (N, d_inner)."""
        write = self.write
        if self.single:
            rows = self._split(write("Reshape", self._float(name), ints(self.count, -1)), self.count, axis=0)
            return [write("Reshape", row, ints(-1)) for row in rows]
        states = ints(self.count, -1, self.variant.d_state)
        grouped = write("Transpose", write("Reshape", self._float(name), states), perm=[0, 2, 1])
        return [write("Squeeze", part, ints(0)) for part in self._split(grouped, self.count, axis=0)]

    def _time_step_weights(self) -> list[Value]:
        """K matrices (R + 1, d_inner), the last row being the bias; the biases (1, d_inner) alone at full rank."""
        write = self.write
        bias = write("Reshape", self._float("dt_bias"), ints(self.count, 1, -1))
        if self.variant.low_rank:
            shape = write("Concat", ints(self.count), self.d_inner, ints(-1), axis=0)
            weight = write("Transpose", write("Reshape", self._float("dt_weight"), shape), perm=[0, 2, 1])
            bias = write("Concat", weight, bias, axis=1)
        return [write("Squeeze", part, ints(0)) for part in self._split(bias, self.count, axis=0)]

    # The scan --------------------------------------------------------------------------------------------------

    def _line(self, k: int, x: Value, narrow: Value, wide: Value | None, weight: Value, A: Value) -> _Line:
        """Form what the Scans of direction k read: x (T, batch, P, d_inner), narrow (T, batch, P, 1, c)."""
        write, n = self.write, self.variant.d_state
        flat = write("Squeeze", narrow, ints(3))
        if wide is None:
            # The width of the low-rank part, ones included, is the height of its weight.
            rank = write("Shape", weight, start=0, end=1)
            sizes = write("Concat", rank, ints(n, n), axis=0)
            low_rank, B, C = write.multiple("Split", [flat, sizes], 3, axis=3)
            dt = write("MatMul", low_rank, weight)
        else:
            B, C = write.multiple("Split", [flat], 2, axis=3, num_outputs=2)
            dt = write("Add", wide, weight)
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
        states_in, states_out, scanned, results, feeds, reversed_flags = [], [], [], [], [], []
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
        carries, next_carries, scanned, feeds, flags = [], [], [], [], []
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
