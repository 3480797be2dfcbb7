"""The `tree` body of SelectiveScan2D, for GPU runtimes without a plugin: the sequences of all directions at once.

Maps are unrolled into (batch, K, L, N, d_inner), scanned as `tree_scan.py` tells, and added up in raster order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx

from quartermap_deploy.lowering.operator import (
    ATTRIBUTES_2D,
    INPUTS_2D,
    SELECTIVE_SCAN_2D,
    Direction,
    ScanVariant,
)
from quartermap_deploy.lowering.softplus_series import write_softplus_series
from quartermap_deploy.lowering.tree_scan import OPEN_LENGTH, write_tree_scan
from quartermap_deploy.lowering.writer import Value, Writer, ints, scan_function, shape_of


@dataclass(frozen=True)
class TreeVariant(ScanVariant):
    """What a `tree` body depends on beside its tensors.

    Attributes:
        size: (H, W) of the maps, or None where it is open.
        longest: where it is open, the most positions that a map may have.
    """

    size: tuple[int, int] | None = None
    longest: int = OPEN_LENGTH


def tree_body(variant: ScanVariant, overload: str = "") -> onnx.FunctionProto:
    """Write the ONNX function of SelectiveScan2D for one variant.

    Args:
        variant: directions, softplus, state size and rank of the time step; a `TreeVariant` may also know the size of
            the maps, or the most positions that they may have, for which fewer steps are needed.
        overload: the function's overload name, for models that hold more than one variant.

    Returns:
        A function in domain `quartermap` whose body has standard operators of opset 20 only, none of them a loop. It
        computes in float32 and casts the result to the type of x. The batch is open. Without a size, the body serves
        maps of up to `longest` positions, 65,536 if nobody says otherwise, and cannot run on larger ones.
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
        sized = variant if isinstance(variant, TreeVariant) else TreeVariant(**vars(variant))
        size, self.longest = sized.size, sized.longest
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
        A = write("Transpose", A, perm=[0, 1, 3, 2])
        sizes = (n, self.d_inner)
        y = write_tree_scan(write, dt, x, A, B, C, self.length, sizes, longest=self.longest)
        skip = write("ReduceSum", write("Reshape", self._float("D"), ints(count, -1)), ints(0), keepdims=0)
        total = write("Add", self._merged(y), write("Mul", raster_x, skip))
        return write("CastLike", write("Transpose", total, perm=[0, 3, 1, 2]), "x")

    # Layout ----------------------------------------------------------------------------------------------------

    def _float(self, name: str) -> Value:
        return self.write("Cast", name, to=onnx.TensorProto.FLOAT)

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
                made[raster, forward] = write("Reshape", turned, shape_of(write, 0, 1, -1, channels))
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
            raster = write("Reshape", sequence, shape_of(write, 0, *sides, self.d_inner))
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
        shape = shape_of(self.write, 0, self.count, -1, self.height, self.width)
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
            B, C, steps = write.multiple("Split", [joined, shape_of(write, n, n, rank)], 3, axis=3)
            shape = shape_of(write, self.count, -1, rank)
            weight = write("Transpose", write("Reshape", self._float("dt_weight"), shape), perm=[0, 2, 1])
            wide = write("MatMul", steps, weight)
        return write("Add", wide, bias), write("Unsqueeze", B, ints(4)), write("Unsqueeze", C, ints(4))
