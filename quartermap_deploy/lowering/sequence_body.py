"""The `scan` body of SelectiveScan: ONNX Scan along the sequence, for CPUs.

The groups, the batch and the channels of a group stand side by side, (L, G, batch, 1, d), and `recurrence.py` walks
the sequence once. A length is not cut into lines, as maps are by their width: it need not have a divisor.
"""

from __future__ import annotations

import onnx

from quartermap_deploy.lowering.operator import ATTRIBUTES_1D, INPUTS_1D, SELECTIVE_SCAN, SequenceVariant
from quartermap_deploy.lowering.recurrence import write_recurrence
from quartermap_deploy.lowering.softplus import write_softplus
from quartermap_deploy.lowering.writer import Value, Writer, ints, scan_function


def sequence_body(variant: SequenceVariant, overload: str = "") -> onnx.FunctionProto:
    """Write the ONNX function of SelectiveScan for one variant.

    Args:
        variant: softplus, and which of the optional inputs are there.
        overload: the function's overload name, for models that hold more than one variant.

    Returns:
        A function in domain `quartermap` whose body has standard operators of opset 20 only. It computes in float32
        and casts the result to the type of u. Every size is read from its inputs.
    """
    write = Writer()

    def single(name: str) -> Value:
        return write("Cast", name, to=onnx.TensorProto.FLOAT)

    def grouped(name: str) -> Value:
        """(G·d, …) → (G, d, …)."""
        value = single(name)
        rest = write("Shape", value, start=1)
        return write("Reshape", value, write("Concat", groups, ints(-1), rest, axis=0))

    def sequence(name: str) -> Value:
        """(batch, G·c, L) or (batch, G, c, L) → (L, G, batch, 1, c)."""
        shape = write("Concat", ints(0), groups, ints(1, -1), length, axis=0)
        return write("Transpose", write("Reshape", single(name), shape), perm=[4, 1, 0, 2, 3])

    groups = write("Shape", "B", start=1, end=2)
    length = write("Shape", "u", start=2)
    u, delta = sequence("u"), sequence("delta")
    if variant.bias:
        delta = write("Add", delta, write("Unsqueeze", grouped("delta_bias"), ints(1, 2)))
    if variant.softplus:
        delta = write_softplus(write, delta)
    y = write_recurrence(write, grouped("A"), delta, sequence("B"), sequence("C"), u, in_lines=False)
    if variant.skip:
        y = write("Add", y, write("Mul", u, write("Unsqueeze", grouped("D"), ints(1, 2))))
    # (L, G, batch, 1, d) → (batch, G·d, L).
    rolled = write("Reshape", write("Transpose", y, perm=[2, 1, 3, 4, 0]), write("Shape", "u"))
    result = write("CastLike", rolled, "u")
    return scan_function(write, SELECTIVE_SCAN, INPUTS_1D, result, ATTRIBUTES_1D, overload)
