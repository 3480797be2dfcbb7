"""The scan of the `tree` bodies: of logarithmic depth and without any loop, for GPU runtimes without a plugin.

The sequences of all directions, or groups, stand in one tensor, (batch, G, L, N, d), channels last, so that a shift
along a sequence is a shift by whole rows. A step of width s joins each element with the one s before it,

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

import numpy as np

from quartermap_deploy.lowering.writer import Value, Writer, ints, shape_of

LONG = 256
"""Sequences up to this length are not cut into lines: they take no more kernels in one piece."""
OPEN_LENGTH = 1 << 16
"""The longest sequence where the length is open and nobody knows better, as of a map of 256 × 256."""
POSITIONS, STATES = 2, 3
"""Axes of the sequences."""


def write_tree_scan(
    write: Writer,
    dt: Value,
    x: Value,
    A: Value,
    B: Value,
    C: Value,
    length: int | None,
    sizes: tuple[int | Value, int | Value],
    *,
    longest: int = OPEN_LENGTH,
) -> Value:
    """Append h_t = exp(dt·A)·h_{t-1} + dt·B·x, y_t = C·h_t, and return the name of y.

    Args:
        write: where to.
        dt: time step after bias and softplus, (batch, G, L, 1, d).
        x: input, (batch, G, L, 1, d).
        A: state matrix, (G, 1, N, d).
        B: input matrix, (batch, G, L, N, 1).
        C: output matrix, (batch, G, L, N, 1).
        length: L, or None where it is open.
        sizes: N and d.
        longest: where the length is open, the most that it may be: there are steps for no more, and a longer sequence
            does not fit what it is multiplied with.

    Returns:
        y, (batch, G, L, d), all float32.
    """
    exponent = write("Mul", dt, A)
    drive = write("Mul", write("Mul", dt, x), B)
    if length is None:
        states = _states_of_open_length(write, exponent, drive, longest)
    else:
        states = _states(write, exponent, drive, length, sizes)
    product = write("Mul", states, C)
    if sizes[0] == 1:
        return write("Squeeze", product, ints(STATES))
    return write("ReduceSum", product, ints(STATES), keepdims=0)


def lines(length: int) -> tuple[int, int]:
    """How a sequence is cut: (lines, elements of a line), whose product is at least its length.

    One line where it is short; else lines of about √L, evenly if a divisor is near.
    """
    if length <= LONG:
        return 1, length
    root = math.isqrt(length - 1) + 1
    size = next((size for size in range(root, root // 2, -1) if length % size == 0), root)
    return -(-length // size), size


def _states(
    write: Writer, exponent: Value, drive: Value, length: int, sizes: tuple[int | Value, int | Value]
) -> Value:
    """The states of the decays' exponents and the drive, all (batch, G, L, N, d)."""
    count, size = lines(length)
    if count == 1:
        return _scanned(write, exponent, drive, POSITIONS, length)[1]
    shape = shape_of(write, 0, 0, count, size, *sizes)
    missing = count * size - length
    exponent, drive = (write("Reshape", _filled(write, value, missing), shape) for value in (exponent, drive))
    sums, own = _scanned(write, exponent, drive, POSITIONS + 1, size, sums=True)
    total, last = (
        write("Squeeze", _cut(write, value, POSITIONS + 1, size - 1, 1)[1], ints(POSITIONS + 1))
        for value in (sums, own)
    )
    _, ends = _scanned(write, total, last, POSITIONS, count)
    # The first line starts from zero, the others from where the line before ended.
    first, _ = _cut(write, ends, POSITIONS, 1, count - 1)
    others, _ = _cut(write, ends, POSITIONS, count - 1, 1)
    before = write("Concat", write("Sub", first, first), others, axis=POSITIONS)
    carried = write("Mul", write("Exp", sums), write("Unsqueeze", before, ints(POSITIONS + 1)))
    joined = write("Reshape", write("Add", own, carried), shape_of(write, 0, 0, -1, *sizes))
    return _cut(write, joined, POSITIONS, length, missing)[0] if missing else joined


def _scanned(
    write: Writer, exponent: Value, drive: Value, axis: int, length: int, *, sums: bool = False
) -> tuple[Value, Value]:
    """All steps along an axis of `length` elements: the sums of the exponents, if wanted, and the states."""
    width = 1
    while width < length:
        early_exponent, late_exponent = _cut(write, exponent, axis, width, length - width)
        early, late = _cut(write, drive, axis, width, length - width)
        before, _ = _cut(write, drive, axis, length - width, width)
        moved = write("Mul", write("Exp", late_exponent), before)
        drive = write("Concat", early, write("Add", late, moved), axis=axis)
        if sums or 2 * width < length:
            exponent_before, _ = _cut(write, exponent, axis, length - width, width)
            joined = write("Add", late_exponent, exponent_before)
            exponent = write("Concat", early_exponent, joined, axis=axis)
        width *= 2
    return exponent, drive


def _states_of_open_length(write: Writer, exponent: Value, drive: Value, longest: int) -> Value:
    # As in `_scanned`. Past the end, everything behind `width` is empty, and a step changes nothing.
    width = 1
    while width < longest:
        late = _slice(write, exponent, width)
        moved = write("Mul", write("Exp", late), _slice(write, drive, 0, -width))
        joined = write("Add", _slice(write, drive, width), moved)
        total = write("Add", late, _slice(write, exponent, 0, -width))
        exponent = write("Concat", _slice(write, exponent, 0, width), total, axis=POSITIONS)
        drive = write("Concat", _slice(write, drive, 0, width), joined, axis=POSITIONS)
        width *= 2
    # A longer sequence would be wrong: cut off, it does not fit its map.
    return _slice(write, drive, 0, longest)


def _cut(write: Writer, value: Value, axis: int, *sizes: int) -> list[Value]:
    """Split instead of Slice, which TensorRT's parser turns into three times as many layers for an open batch."""
    return write.multiple("Split", [value, ints(*sizes)], len(sizes), axis=axis)


def _slice(write: Writer, value: Value, start: int, end: int = np.iinfo(np.int64).max) -> Value:
    return write("Slice", value, ints(start), ints(end), ints(POSITIONS))


def _filled(write: Writer, row: Value, missing: int) -> Value:
    """Sequences whose last element is repeated; no state flows back from there."""
    if not missing:
        return row
    return write("Concat", row, *[_slice(write, row, -1)] * missing, axis=POSITIONS)
