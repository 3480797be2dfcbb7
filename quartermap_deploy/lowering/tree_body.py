"""The `tree` body of SelectiveScan2D: a scan of logarithmic depth without any loop, for GPU runtimes without a plugin.

The sequences of all K directions stand in one tensor, (batch, K, L, N, d_inner), channels last, so that a shift along a
sequence is a shift by whole rows. A step of width s joins each element with the one s before it,

    (e, b)[t]  →  (e[t] + e[t-s], b[t] + exp(e[t])·b[t-s])

and after the steps of widths 1, 2, 4, … the b are the states (Hillis and Steele 1986); e is the exponent dt·A of the
decay. Exponents are added instead of decays multiplied: where the steps are small and the map is even, every decay is
rounded the same way, and over a thousand positions a product would gather a thousand times that error. Nothing is
divided by a product of decays, so large time steps are exact too.

Long sequences of known length are cut into lines of about √L elements: all lines at once, then their last elements over
the lines, then each line takes up the state before it. That halves the steps over the whole tensor.

Why not chunks whose elements are written out one by one, which need fewer operations: TensorRT-RTX fuses several levels
of them into one kernel, and its source then has one path for every element of every level. For a map of 56 × 56 that
was 6 to 59 MB in the engine, against 4 MB here, at the same number of kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx

from quartermap_deploy.lowering.operator import (
    INPUTS_2D,
    SELECTIVE_SCAN_2D,
    Direction,
    ScanVariant,
)
from quartermap_deploy.lowering.softplus_series import write_softplus_series
from quartermap_deploy.lowering.writer import Value, Writer, ints, scan_function

LONG = 256
"""Sequences up to this length are not cut into lines: they take no more kernels in one piece."""
OPEN_LENGTH = 1 << 16
"""The longest sequence where the length is open, as of a map of 256 × 256."""


@dataclass(frozen=True)
class TreeVariant(ScanVariant):
    """What a `tree` body depends on beside its tensors.

    Attributes:
        size: (H, W) of the maps, or None where it is open.
    """

    size: tuple[int, int] | None = None


def tree_body(variant: ScanVariant, overload: str = "") -> onnx.FunctionProto:
    """Write the ONNX function of SelectiveScan2D for one variant.

    Args:
        variant: directions, softplus, state size and rank of the time step; a `TreeVariant` may also know the size of
            the maps, for which fewer steps are needed.
        overload: the function's overload name, for models that hold more than one variant.

    Returns:
        A function in domain `quartermap` whose body has standard operators of opset 20 only, none of them a loop. It
        computes in float32 and casts the result to the type of x. The batch is open. Without a size, the body serves
        maps of up to 65,536 positions and cannot run on larger ones.
    """
    writer = _BodyWriter(variant)
    result = writer.write_body()
    inputs = INPUTS_2D if variant.low_rank else INPUTS_2D[:-1]
    return scan_function(
        writer.write, SELECTIVE_SCAN_2D, inputs, result, ("directions", "softplus"), overload
    )


def lines(length: int) -> tuple[int, int]:
    """How a sequence is cut: (lines, elements of a line), whose product is at least its length.

    One line where it is short; else lines of about √L, evenly if a divisor is near.
    """
    if length <= LONG:
        return 1, length
    root = math.isqrt(length - 1) + 1
    size = next((size for size in range(root, root // 2, -1) if length % size == 0), root)
    return -(-length // size), size


class _BodyWriter:
    def __init__(self, variant: ScanVariant) -> None:
        self.write = Writer()
        self.variant = variant
        self.directions = [Direction.parse(name) for name in variant.directions]
        self.count = len(self.directions)
        size = variant.size if isinstance(variant, TreeVariant) else None
        self.height: int | Value = size[0] if size else self.write("Shape", "x", start=2, end=3)
        self.width: int | Value = size[1] if size else self.write("Shape", "x", start=3, end=4)
        self.length = math.prod(size) if size else None
        self.d_inner = self.write("Shape", "x", start=1, end=2)

    def write_body(self) -> Value:
        write, count, n = self.write, self.count, self.variant.d_state
        raster_x = write("Transpose", self._float("x"), perm=[0, 2, 3, 1])
        x = write("Unsqueeze", self._sequences([raster_x] * count), ints(3))
        dt, B, C = self._projections()
        if self.variant.softplus:
            dt = write_softplus_series(write, dt)
        dt = write("Unsqueeze", dt, ints(3))
        # (K·d, N) → (K, 1, N, d), which fits sequences (batch, K, L, N, d).
        A = write("Reshape", self._float("A"), ints(count, 1, -1, n))
        exponent = write("Mul", dt, write("Transpose", A, perm=[0, 1, 3, 2]))
        drive = write("Mul", write("Mul", dt, x), B)
        y = self._over_states(write("Mul", self._states(exponent, drive), C))
        skip = write("ReduceSum", write("Reshape", self._float("D"), ints(count, -1)), ints(0), keepdims=0)
        total = write("Add", self._merged(y), write("Mul", raster_x, skip))
        return write("CastLike", write("Transpose", total, perm=[0, 3, 1, 2]), "x")

    # The scan --------------------------------------------------------------------------------------------------

    def _states(self, exponent: Value, drive: Value) -> Value:
        """The states of the decays' exponents and the drive, all (batch, K, L, N, d)."""
        write = self.write
        if self.length is None:
            return self._states_of_open_length(exponent, drive)
        count, size = lines(self.length)
        if count == 1:
            return self._scanned(exponent, drive, 2, self.length)[1]
        shape = self._shape(0, 0, count, size, self.variant.d_state, self.d_inner)
        missing = count * size - self.length
        exponent, drive = (
            write("Reshape", self._filled(value, missing), shape) for value in (exponent, drive)
        )
        sums, own = self._scanned(exponent, drive, 3, size, sums=True)
        total, last = (
            write("Squeeze", self._cut(value, 3, size - 1, 1)[1], ints(3)) for value in (sums, own)
        )
        _, ends = self._scanned(total, last, 2, count)
        # The first line starts from zero, the others from where the line before ended.
        first, _ = self._cut(ends, 2, 1, count - 1)
        others, _ = self._cut(ends, 2, count - 1, 1)
        before = write("Concat", write("Sub", first, first), others, axis=2)
        states = write("Add", own, write("Mul", write("Exp", sums), write("Unsqueeze", before, ints(3))))
        joined = write("Reshape", states, self._shape(0, 0, -1, self.variant.d_state, self.d_inner))
        return self._cut(joined, 2, self.length, missing)[0] if missing else joined

    def _scanned(
        self, exponent: Value, drive: Value, axis: int, length: int, *, sums: bool = False
    ) -> tuple[Value, Value]:
        """All steps along an axis of `length` elements: the sums of the exponents, if wanted, and the states."""
        write, width = self.write, 1
        while width < length:
            early_exponent, late_exponent = self._cut(exponent, axis, width, length - width)
            early, late = self._cut(drive, axis, width, length - width)
            before, _ = self._cut(drive, axis, length - width, width)
            moved = write("Mul", write("Exp", late_exponent), before)
            drive = write("Concat", early, write("Add", late, moved), axis=axis)
            if sums or 2 * width < length:
                exponent_before, _ = self._cut(exponent, axis, length - width, width)
                joined = write("Add", late_exponent, exponent_before)
                exponent = write("Concat", early_exponent, joined, axis=axis)
            width *= 2
        return exponent, drive

    def _states_of_open_length(self, exponent: Value, drive: Value) -> Value:
        # As in `_scanned`. Past the end, everything behind `width` is empty, and a step changes nothing.
        write, width = self.write, 1
        while width < OPEN_LENGTH:
            late = self._slice(exponent, width)
            moved = write("Mul", write("Exp", late), self._slice(drive, 0, -width))
            joined = write("Add", self._slice(drive, width), moved)
            total = write("Add", late, self._slice(exponent, 0, -width))
            exponent = write("Concat", self._slice(exponent, 0, width), total, axis=2)
            drive = write("Concat", self._slice(drive, 0, width), joined, axis=2)
            width *= 2
        # A longer sequence would be wrong: cut off, it does not fit its map.
        return self._slice(drive, 0, OPEN_LENGTH)

    def _cut(self, value: Value, axis: int, *sizes: int) -> list[Value]:
        """Split instead of Slice, which TensorRT's parser turns into three times as many layers for an open batch."""
        return self.write.multiple("Split", [value, ints(*sizes)], len(sizes), axis=axis)

    def _slice(self, value: Value, start: int, end: int = np.iinfo(np.int64).max) -> Value:
        return self.write("Slice", value, ints(start), ints(end), ints(2))

    def _filled(self, row: Value, missing: int) -> Value:
        """Sequences whose last element is repeated; no state flows back from there."""
        return self.write("Concat", row, *[self._slice(row, -1)] * missing, axis=2) if missing else row

    def _over_states(self, product: Value) -> Value:
        """The sum over the states, (batch, K, L, N, d) → (batch, K, L, d)."""
        if self.variant.d_state == 1:
            return self.write("Squeeze", product, ints(3))
        return self.write("ReduceSum", product, ints(3), keepdims=0)

    # Layout ----------------------------------------------------------------------------------------------------

    def _float(self, name: str) -> Value:
        return self.write("Cast", name, to=onnx.TensorProto.FLOAT)

    def _shape(self, *sides: int | Value) -> Value | np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        if all(isinstance(side, int) for side in sides):
            return ints(*(side for side in sides if isinstance(side, int)))
        return self.write("Concat", *(ints(s) if isinstance(s, int) else s for s in sides), axis=0)

    def _sequences(self, rasters: list[Value]) -> Value:
        """One raster (batch, H, W, c) for each direction → (batch, K, L, c), each in the order of its direction."""
        write, sequences = self.write, []
        made: dict[tuple[Value, Direction], Value] = {}
        for raster, direction in zip(rasters, self.directions, strict=True):
            forward = Direction(direction.orientation, False)
            if (raster, forward) not in made:
                column = direction.orientation == "column"
                turned = write("Transpose", raster, perm=[0, 2, 1, 3]) if column else raster
                channels = write("Shape", raster, start=3)
                made[raster, forward] = write("Reshape", turned, self._shape(0, 1, -1, channels))
            sequence = made[raster, forward]
            sequences.append(self._reversed(sequence) if direction.reverse else sequence)
        return sequences[0] if len(sequences) == 1 else write("Concat", *sequences, axis=1)

    def _merged(self, y: Value) -> Value:
        """Sequences (batch, K, L, d) → the sum of their rasters, (batch, H, W, d)."""
        write, total = self.write, None
        for part, direction in zip(self._split(y, axis=1), self.directions, strict=True):
            sequence = self._reversed(part) if direction.reverse else part
            column = direction.orientation == "column"
            sides = (self.width, self.height) if column else (self.height, self.width)
            raster = write("Reshape", sequence, self._shape(0, *sides, self.d_inner))
            raster = write("Transpose", raster, perm=[0, 2, 1, 3]) if column else raster
            total = raster if total is None else write("Add", total, raster)
        assert total is not None
        return total

    def _reversed(self, sequence: Value) -> Value:
        far = np.iinfo(np.int64).min
        return self.write("Slice", sequence, ints(-1), ints(far), ints(2), ints(-1))

    def _split(self, value: Value, axis: int) -> list[Value]:
        if self.count == 1:
            return [value]
        return self.write.multiple("Split", [value], self.count, axis=axis, num_outputs=self.count)

    def _by_direction(self, name: str) -> Value:
        """A map (batch, K·c, H, W) → (batch, K, H, W, c)."""
        shape = self._shape(0, self.count, -1, self.height, self.width)
        return self.write("Transpose", self.write("Reshape", self._float(name), shape), perm=[0, 1, 3, 4, 2])

    def _ordered(self, by_direction: Value) -> Value:
        """(batch, K, H, W, c) → (batch, K, L, c), each in the order of its direction."""
        return self._sequences(
            [self.write("Squeeze", part, ints(1)) for part in self._split(by_direction, 1)]
        )

    def _projections(self) -> tuple[Value, Value, Value]:
        """The time step before softplus, (batch, K, L, d), and B and C, (batch, K, L, N, 1)."""
        write, n = self.write, self.variant.d_state
        bias = write("Reshape", self._float("dt_bias"), ints(self.count, 1, -1))
        narrow = [self._by_direction(name) for name in ("B", "C")]
        if not self.variant.low_rank:
            wide = self._ordered(self._by_direction("dt"))
            B, C = write.multiple(
                "Split", [self._ordered(write("Concat", *narrow, axis=4)), ints(n, n)], 2, axis=3
            )
        else:
            rank = write("Shape", "dt_weight", start=1, end=2)
            joined = self._ordered(write("Concat", *narrow, self._by_direction("dt"), axis=4))
            B, C, steps = write.multiple("Split", [joined, self._shape(n, n, rank)], 3, axis=3)
            shape = self._shape(self.count, -1, rank)
            weight = write("Transpose", write("Reshape", self._float("dt_weight"), shape), perm=[0, 2, 1])
            wide = write("MatMul", steps, weight)
        return write("Add", wide, bias), write("Unsqueeze", B, ints(4)), write("Unsqueeze", C, ints(4))
