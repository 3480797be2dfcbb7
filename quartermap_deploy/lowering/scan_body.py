"""The `scan` body of SelectiveScan2D: ONNX Scan in two levels, for CPUs.

Every direction is a sequence of L = H·W positions in its own order. The sequences of all K directions are brought into
one layout (T, K, batch, P, channels): each sequence is cut into P = H lines of T = W positions, lines stand side by
side, channels are last. For the row direction a line is a row; for the others it is just the next W positions, so that
the directions fit together for any H and W. `recurrence.py` then solves all of them at once, along all lines side by
side; where d_state is larger than 1 a single position gives it enough to do, so there is one line, P = 1.

Maps are unrolled by Gather: with Transpose, ONNX Runtime merges neighbours into one general permutation, which is five
times slower. Few nodes matter as much as few operations: an operator call costs ONNX Runtime about 0.7 µs, and the time
to load a model grows with the square of its nodes.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from quartermap_deploy.lowering.operator import (
    ATTRIBUTES_2D,
    INPUTS_2D,
    SELECTIVE_SCAN_2D,
    Direction,
    ScanVariant,
)
from quartermap_deploy.lowering.recurrence import write_recurrence
from quartermap_deploy.lowering.softplus import write_softplus
from quartermap_deploy.lowering.writer import Value, Writer, ints, scan_function

_POSITIONS_LAST = [1, 2, 3, 0]
"""(T, K, batch, P) → (K, batch, P, T): sequences as they run."""
_STEPS_FIRST = [3, 0, 1, 2]
"""The inverse of the above."""


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
    return scan_function(writer.write, SELECTIVE_SCAN_2D, inputs, result, ATTRIBUTES_2D, overload)


class _BodyWriter:
    def __init__(self, variant: ScanVariant) -> None:
        self.write = Writer()
        self.variant = variant
        self.directions = [Direction.parse(name) for name in variant.directions]
        self.count = len(self.directions)
        self.single = variant.d_state == 1

    def write_body(self) -> Value:
        write = self.write
        raster_x = write("Transpose", self._float("x"), perm=[0, 2, 3, 1])
        x = write("Flatten", raster_x, axis=3)
        unroll, roll = self._unrolling(x, raster_x)
        local_x = write("Gather", x, unroll, axis=0)
        dt, B, C = self._projections(x, unroll)
        if self.variant.softplus:
            dt = write_softplus(write, dt)
        A = write("Reshape", self._float("A"), ints(self.count, -1, self.variant.d_state))
        y = write_recurrence(write, A, dt, B, C, local_x, in_lines=self.single)
        # Every position collects what the directions say about it: (batch, H, W, K, d_inner) → (batch, H, W, d_inner).
        collected = write("Gather", write("Flatten", y, axis=4), roll, axis=0)
        merged = write("ReduceSum", collected, ints(3), keepdims=0)
        grouped_D = write("Reshape", self._float("D"), ints(self.count, -1))
        skip = write("ReduceSum", grouped_D, ints(0), keepdims=0)
        total = write("Add", merged, write("Mul", raster_x, skip))
        return write("CastLike", write("Transpose", total, perm=[0, 3, 1, 2]), "x")

    def _float(self, name: str) -> Value:
        return self.write("Cast", name, to=onnx.TensorProto.FLOAT)

    # Layout ----------------------------------------------------------------------------------------------------

    def _unrolling(self, x: Value, raster_x: Value) -> tuple[Value, Value]:
        """Where each step's positions come from, (T, K, batch, P), and where each position's outputs are found.

        The second, (batch, H, W, K), counts the entries of the first.
        """
        write = self.write
        grid = write("Shape", raster_x, start=0, end=3)
        positions = write("Shape", x, start=0, end=1)
        raster = write("Reshape", self._count_up(positions), grid)
        # Once for each orientation: of two Flattens of one value onnxscript 0.7's optimiser loses the shape of one.
        forward = {
            orientation: self._sequence(raster, orientation)
            for orientation in dict.fromkeys(direction.orientation for direction in self.directions)
        }
        sequences = [
            self._reversed(forward[direction.orientation])
            if direction.reverse
            else forward[direction.orientation]
            for direction in self.directions
        ]
        stacked = write("Concat", *sequences, axis=0)
        height = write("Shape", raster_x, start=1, end=2)
        lines = height if self.single else ints(1)
        # (K, batch, H·W) → (K, batch, P, T).
        split = write("Concat", ints(0, 0), lines, ints(-1), axis=0)
        unroll = write("Transpose", write("Reshape", stacked, split), perm=_STEPS_FIRST)

        entries = self._count_up(write("Mul", positions, ints(self.count)))
        placed = write("Transpose", write("Reshape", entries, write("Shape", unroll)), perm=_POSITIONS_LAST)
        by_sequence = write("Reshape", placed, ints(0, 0, -1))
        parts = self._split(by_sequence, self.count, axis=0)
        width = write("Shape", raster_x, start=2, end=3)
        found = [
            self._in_raster(part, direction, height, width)
            for part, direction in zip(parts, self.directions, strict=True)
        ]
        return unroll, write("Concat", *found, axis=3)

    def _sequence(self, raster: Value, orientation: str) -> Value:
        """The raster indices (batch, H, W) along rows or columns, (1, batch, H·W)."""
        write = self.write
        if orientation == "column":
            raster = write("Transpose", raster, perm=[0, 2, 1])
        return write("Unsqueeze", write("Flatten", raster, axis=1), ints(0))

    def _in_raster(self, sequence: Value, direction: Direction, height: Value, width: Value) -> Value:
        """The inverse of such a sequence: (1, batch, H·W) in the order of a direction → (batch, H, W, 1)."""
        write = self.write
        if direction.reverse:
            sequence = self._reversed(sequence)
        column = direction.orientation == "column"
        sides = (width, height) if column else (height, width)
        shape = write("Concat", ints(-1), *sides, ints(1), axis=0)
        grid = write("Reshape", sequence, shape)
        return write("Transpose", grid, perm=[0, 2, 1, 3]) if column else grid

    def _reversed(self, sequence: Value) -> Value:
        far = np.iinfo(np.int64).min
        return self.write("Slice", sequence, ints(-1), ints(far), ints(2), ints(-1))

    def _count_up(self, size: Value) -> Value:
        """0, 1, … size - 1, for a size given as a vector of one element."""
        zero, one = np.array(0, dtype=np.int64), np.array(1, dtype=np.int64)
        return self.write("Range", zero, self.write("Squeeze", size, ints(0)), one)

    def _split(self, value: Value, parts: int, axis: int) -> list[Value]:
        if parts == 1:
            return [value]
        return self.write.multiple("Split", [value], parts, axis=axis, num_outputs=parts)

    def _by_direction(self, name: str) -> Value:
        """A map (batch, K·c, H, W) → (batch·H·W, K, c)."""
        write = self.write
        flat = write("Flatten", write("Transpose", self._float(name), perm=[0, 2, 3, 1]), axis=3)
        return write("Reshape", flat, ints(0, self.count, -1))

    def _projections(self, x: Value, unroll: Value) -> tuple[Value, Value, Value]:
        """The time step before softplus, (T, K, batch, P, d_inner), and B and C, (T, K, batch, P, N)."""
        write, n = self.write, self.variant.d_state
        bias = write("Reshape", self._float("dt_bias"), ints(self.count, 1, 1, -1))
        narrow = [self._by_direction("B"), self._by_direction("C")]
        if self.variant.low_rank:
            # A column of ones, so that the product with the weight adds the bias too. By Concat, because ONNX
            # Runtime's Pad is five times slower.
            shape = write("Concat", write("Shape", x, start=0, end=1), ints(self.count, 1), axis=0)
            one = helper.make_tensor("one", onnx.TensorProto.FLOAT, [1], [1.0])
            ones = write("ConstantOfShape", shape, value=one)
            narrow += [self._by_direction("dt"), ones]
        joined = write("Flatten", write("Concat", *narrow, axis=2), axis=2)
        # Row l·K + k holds what direction k projects from position l.
        own = np.arange(self.count).reshape(-1, 1, 1)
        rows = write("Add", write("Mul", unroll, np.array(self.count)), own)
        local = write("Gather", joined, rows, axis=0)
        if not self.variant.low_rank:
            B, C = write.multiple("Split", [local, ints(n, n)], 2, axis=4)
            wide = write("Flatten", self._by_direction("dt"), axis=2)
            return write("Add", write("Gather", wide, rows, axis=0), bias), B, C
        weight_shape = write(
            "Concat", ints(self.count, -1), write("Shape", "dt_weight", start=1, end=2), axis=0
        )
        groups = write("Reshape", self._float("dt_weight"), weight_shape)
        weight = write(
            "Concat", write("Unsqueeze", write("Transpose", groups, perm=[0, 2, 1]), ints(1)), bias, axis=2
        )
        rank = write("Shape", weight, start=2, end=3)
        sizes = write("Concat", ints(n, n), rank, axis=0)
        B, C, steps = write.multiple("Split", [local, sizes], 3, axis=4)
        return write("MatMul", steps, weight), B, C
