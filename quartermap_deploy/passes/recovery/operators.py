"""Which standard operators only move elements, and which are linear in what they read.

Recovery never trusts a node's spelling beyond this: what a chain of such nodes does is read off by running it.
"""

from __future__ import annotations

import onnx

from quartermap_deploy.passes.recovery.concrete import Concrete
from quartermap_deploy.passes.recovery.programs import acts_on_single_positions

_MOVED_INPUTS = {
    "DepthToSpace": (0,),
    "Expand": (0,),
    "Flatten": (0,),
    "Gather": (0,),
    "GatherElements": (0,),
    "GatherND": (0,),
    "Identity": (0,),
    "Pad": (0, 2),
    "Reshape": (0,),
    "ReverseSequence": (0,),
    "ScatterElements": (0, 2),
    "ScatterND": (0, 2),
    "Slice": (0,),
    "SpaceToDepth": (0,),
    "Split": (0,),
    "Squeeze": (0,),
    "Tile": (0,),
    "Transpose": (0,),
    "Trilu": (0,),
    "Unsqueeze": (0,),
    "Where": (1, 2),
}
"""For each operator that moves elements, the inputs that it moves; the others say where to, and must be fixed."""

_SUMS = ("Add", "Sum", "Sub", "Neg", "ReduceSum", "ReduceMean")
_PRODUCTS = ("MatMul", "Gemm", "Einsum", "Mul")


def moves(node: onnx.NodeProto, concrete: Concrete) -> bool:
    """Whether a node puts elements elsewhere, and nothing but sizes says where."""
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "Concat":
        return True
    if node.op_type == "Cast":
        return is_float(node.input[0], concrete) and is_float(node.output[0], concrete)
    moved = _MOVED_INPUTS.get(node.op_type)
    if moved is None or attribute_reduces(node):
        return False
    return all(
        concrete.is_fixed(name) for place, name in enumerate(node.input) if name and place not in moved
    )


def depends_on_data(node: onnx.NodeProto, concrete: Concrete) -> bool:
    """Whether a node moves elements to places that the data says."""
    return node.op_type in _MOVED_INPUTS and not attribute_reduces(node) and not moves(node, concrete)


def attribute_reduces(node: onnx.NodeProto) -> bool:
    """Whether a scattering node adds or multiplies what meets at one place."""
    return any(item.name == "reduction" and item.s not in (b"", b"none") for item in node.attribute)


def sums(node: onnx.NodeProto, concrete: Concrete) -> bool:
    """Whether a node adds up elements of what it reads, all of which comes from the data, or is zero.

    Sums often begin with a map of zeros, to which one direction after the other is added.
    """
    if node.op_type == "Einsum":
        # Of one operand it can only move and add up.
        return len(node.input) == 1
    if node.op_type not in _SUMS:
        return False
    operands = node.input[:1] if node.op_type.startswith("Reduce") else node.input
    return all(not concrete.is_fixed(name) or not concrete.array(name).any() for name in operands)


def is_affine(node: onnx.NodeProto, concrete: Concrete) -> bool:
    """Whether each element that a node makes is a weighted sum of those that it reads, plus a constant."""
    if node.domain not in ("", "ai.onnx"):
        return False
    if moves(node, concrete) or node.op_type in _SUMS:
        return True
    data = [name for name in node.input if name and not concrete.is_fixed(name)]
    if node.op_type in _PRODUCTS:
        return len(data) <= 1 or (node.op_type == "Gemm" and concrete.is_fixed(node.input[1]))
    if node.op_type == "Div":
        return concrete.is_fixed(node.input[1])
    if node.op_type == "Conv":
        fixed = all(concrete.is_fixed(name) for name in node.input[1:] if name)
        return fixed and acts_on_single_positions(node, concrete.shape(node.input[1]))
    return False


def is_float(value: str, concrete: Concrete) -> bool:
    """Whether a value is of a floating-point type."""
    kind = concrete.element_type(value)
    return bool(kind) and onnx.helper.tensor_dtype_to_np_dtype(kind).kind not in "iub"
