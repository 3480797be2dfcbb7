"""The `tree` body of SelectiveScan, for GPU runtimes without a plugin: the sequences of all groups at once.

They stand in (batch, G, L, N, d) and are scanned as `tree_scan.py` tells.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from quartermap_deploy.lowering.operator import ATTRIBUTES_1D, INPUTS_1D, SELECTIVE_SCAN, SequenceVariant
from quartermap_deploy.lowering.softplus_series import write_softplus_series
from quartermap_deploy.lowering.tree_scan import OPEN_LENGTH, write_tree_scan
from quartermap_deploy.lowering.writer import Value, Writer, ints, scan_function, shape_of


@dataclass(frozen=True)
class SequenceTreeVariant(SequenceVariant):
    """What a `tree` body of the one-dimensional operator depends on beside its tensors.

    Attributes:
        length: of the sequences, or None where it is open.
        longest: where it is open, the most that it may be.
    """

    length: int | None = None
    longest: int = OPEN_LENGTH


def sequence_tree_body(variant: SequenceVariant, overload: str = "") -> onnx.FunctionProto:
    """Write the ONNX function of SelectiveScan for one variant.

    Args:
        variant: softplus, and which of the optional inputs are there; a `SequenceTreeVariant` may also know the length
            of the sequences, or the most that it may be, for which fewer steps are needed.
        overload: the function's overload name, for models that hold more than one variant.

    Returns:
        A function in domain `quartermap` whose body has standard operators of opset 20 only, none of them a loop. It
        computes in float32 and casts the result to the type of u. Batch, groups, channels and states are read from its
        inputs. Without a length, the body serves sequences of up to `longest` elements, 65,536 if nobody says
        otherwise, and cannot run on longer ones.
    """
    write = Writer()
    sized = variant if isinstance(variant, SequenceTreeVariant) else SequenceTreeVariant(**vars(variant))
    length = sized.length
    groups, states = write("Shape", "B", start=1, end=2), write("Shape", "A", start=1, end=2)

    def single(name: str) -> Value:
        return write("Cast", name, to=onnx.TensorProto.FLOAT)

    def sequences(name: str) -> Value:
        """(batch, G·d, L) → (batch, G, L, d)."""
        by_group = write("Reshape", single(name), shape_of(write, 0, groups, -1, sides))
        return write("Transpose", by_group, perm=[0, 1, 3, 2])

    def columns(name: str) -> Value:
        """(batch, G, N, L) → (batch, G, L, N, 1)."""
        return write("Unsqueeze", write("Transpose", single(name), perm=[0, 1, 3, 2]), ints(4))

    def parameters(name: str) -> Value:
        """(G·d) → (G, 1, d)."""
        return write("Reshape", single(name), shape_of(write, groups, 1, -1))

    sides: int | Value = write("Shape", "u", start=2) if length is None else length
    u, dt = sequences("u"), sequences("delta")
    if variant.bias:
        dt = write("Add", dt, parameters("delta_bias"))
    if variant.softplus:
        dt = write_softplus_series(write, dt)
    A = write("Reshape", single("A"), shape_of(write, groups, 1, -1, states))
    y = write_tree_scan(
        write,
        write("Unsqueeze", dt, ints(3)),
        write("Unsqueeze", u, ints(3)),
        write("Transpose", A, perm=[0, 1, 3, 2]),
        columns("B"),
        columns("C"),
        length,
        (states, write("Shape", u, start=3)),
        longest=sized.longest,
    )
    if variant.skip:
        y = write("Add", y, write("Mul", u, parameters("D")))
    # (batch, G, L, d) → (batch, G·d, L).
    rolled = write("Reshape", write("Transpose", y, perm=[0, 1, 3, 2]), shape_of(write, 0, -1, sides))
    result = write("CastLike", rolled, "u")
    return scan_function(write, SELECTIVE_SCAN, INPUTS_1D, result, ATTRIBUTES_1D, overload)
