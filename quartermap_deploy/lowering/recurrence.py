"""The recurrence of the selective scan in ONNX Scan, shared by the function bodies of both operators.

Sequences stand in one layout, (T, G, batch, P, channels): G groups, each cut into P lines of T positions, one after the
other. Where that takes one number of state for each channel, three Scans solve all of them at once:

1. along all lines at once from a zero state, for the last state of each line;
2. across the lines, (G, batch, d) at a time, for the state each line starts from: the product of the decays of a line
   is exp(A·Σdt), a sum, so no running product is needed;
3. along all lines at once from the right state; h·C is the output.

Sequences in one piece, P = 1, take only the third Scan. The decay and the drive, which would be d_state maps each, are
then formed inside it.

In the bodies the state is the first factor: OpenVINO 2026.4 reads a product whose second factor is the state wrongly.
"""

from __future__ import annotations

import numpy as np

from quartermap_deploy.lowering.writer import Value, Writer, ints, scalar


def write_recurrence(
    write: Writer, A: Value, dt: Value, B: Value, C: Value, x: Value, *, in_lines: bool
) -> Value:
    """Append h_t = exp(dt·A)·h_{t-1} + dt·B·x, y_t = C·h_t, and return the name of y.

    Args:
        write: where to.
        A: state matrix, (G, d, N).
        dt: time step after bias and softplus, (T, G, batch, P, d).
        B: input matrix, (T, G, batch, P, N).
        C: output matrix, (T, G, batch, P, N).
        x: input, (T, G, batch, P, d).
        in_lines: whether sequences are cut into lines, which takes N = 1; without, P = 1 and N is any.

    Returns:
        y, (T, G, batch, P, d), all float32.
    """
    return (_in_lines if in_lines else _in_one_piece)(write, A, dt, B, C, x)


def _in_lines(write: Writer, A: Value, dt: Value, B: Value, C: Value, x: Value) -> Value:
    exponent = write("Mul", dt, _states_first(write, A))
    decay = write("Exp", exponent)
    # B first: were x multiplied by B, both unrolled, ONNX Runtime could move the unrolling behind the product.
    drive = write("Mul", write("Mul", dt, B), x)
    total_decay = write("Exp", _sum_over_steps(write, exponent))
    zero = write("Sub", total_decay, total_decay)

    along = Writer("line_")
    last = along("Add", along("Mul", "state", "decay"), "drive")
    own = write(
        "Scan",
        zero,
        decay,
        drive,
        body=along.subgraph("line", ["state", "decay", "drive"], [last]),
        num_scan_inputs=2,
    )
    again = Writer("output_")
    state = again("Add", again("Mul", "state", "decay"), "drive")
    output = again("Mul", state, "weight")
    _, y = write.multiple(
        "Scan",
        [_states_before_lines(write, own, total_decay, zero), decay, drive, C],
        2,
        body=again.subgraph("output", ["state", "decay", "drive", "weight"], [state, output]),
        num_scan_inputs=3,
    )
    return y


def _sum_over_steps(write: Writer, value: Value) -> Value:
    """(T, …) → (…), by a product with ones: ONNX Runtime's ReduceSum over a short first axis takes twice as long."""
    count = write("Concat", ints(1), write("Shape", value, start=0, end=1), axis=0)
    ones = write("Expand", scalar(1.0), count)
    total = write("MatMul", ones, write("Flatten", value, axis=1))
    return write("Reshape", total, write("Shape", value, start=1))


def _states_before_lines(write: Writer, own: Value, total_decay: Value, zero: Value) -> Value:
    """From the last states and total decays of the lines, (G, batch, P, d), the states they start from."""
    body = Writer("across_")
    following = body("Add", body("Mul", "carry", "decay"), "own")
    before = body("Identity", "carry")
    # Lines first, as a Scan along another axis does it by itself. ONNX Runtime's symbolic shape inference finds the
    # axis by its size, and takes the directions for the lines where there are as many.
    lines_first = [write("Transpose", value, perm=[2, 0, 1, 3]) for value in (own, total_decay)]
    _, starts = write.multiple(
        "Scan",
        [write("Gather", zero, np.array(0), axis=2), *lines_first],
        2,
        body=body.subgraph("across", ["carry", "own", "decay"], [following, before]),
        num_scan_inputs=2,
    )
    return write("Transpose", starts, perm=[1, 2, 0, 3])


def _in_one_piece(write: Writer, A: Value, dt: Value, B: Value, C: Value, x: Value) -> Value:
    # The state is (G, batch, N, d).
    A = _states_first(write, A)
    # The axis of the one line becomes the axis of the states; B turns its states into a column.
    column = write("Transpose", B, perm=[0, 1, 2, 4, 3])
    first = write("Gather", dt, np.array(0), axis=0)
    zero = write("Mul", write("Sub", first, first), write("Sub", A, A))

    body = Writer("line_")
    decay = body("Exp", body("Mul", "dt", A))
    state = body("Add", body("Mul", "state", decay), body("Mul", "driven", "column"))
    output = body("MatMul", "row", state)
    _, y = write.multiple(
        "Scan",
        [zero, dt, write("Mul", dt, x), column, C],
        2,
        body=body.subgraph("line", ["state", "dt", "driven", "column", "row"], [state, output]),
        num_scan_inputs=4,
    )
    return y


def _states_first(write: Writer, A: Value) -> Value:
    """(G, d, N) → (G, 1, N, d).

    Not by a Reshape that keeps sizes by a 0: tools that make one Reshape of two (onnxoptimizer 0.4, onnxsim 0.4) read
    the 0 as a size of what comes before both.
    """
    return write("Unsqueeze", write("Transpose", A, perm=[0, 2, 1]), ints(1))
