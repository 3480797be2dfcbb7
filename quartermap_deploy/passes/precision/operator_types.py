"""Which inputs and outputs of an operator have the 16-bit type, by its ONNX schema or the definition of our scans."""

from __future__ import annotations

import onnx

from quartermap_deploy.lowering.element_types import ElementType
from quartermap_deploy.lowering.operator import (
    DOMAIN,
    INPUTS_1D,
    INPUTS_2D,
    SELECTIVE_SCAN,
    SELECTIVE_SCAN_2D,
)

ANY_TYPE = ("Cast", "Shape", "Size")
"""Operators whose input may have any type, whatever their output is."""
MAKERS = ("Cast", "ConstantOfShape")
"""Operators whose output type is an attribute."""
MOVERS = (
    "Flatten",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
"""Operators that only move the values of their first input."""
EXACT = frozenset((*MOVERS, "Concat", "Expand"))
"""Operators that make no new number."""

_SCAN_INPUTS = {SELECTIVE_SCAN_2D: INPUTS_2D, SELECTIVE_SCAN: INPUTS_1D}
_FLOAT32_PARAMETERS = ("A", "D", "dt_bias", "delta_bias")


def typed_inputs(node: onnx.NodeProto, opset: int, kind: ElementType) -> frozenset[int]:
    """Positions of the inputs that an operator takes in its own type; empty if it has no form of the type."""
    if node.domain == DOMAIN:
        names = _SCAN_INPUTS.get(node.op_type, ())
        return frozenset(i for i, name in enumerate(names) if name not in _FLOAT32_PARAMETERS)
    if node.op_type in MAKERS or not onnx.defs.has(node.op_type, node.domain):
        return frozenset()
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    # The type of the first output is what the operator computes in; BatchNormalization's parameters, or the scales of
    # Resize, have types of their own.
    own = schema.outputs[0].type_str
    allowed = {item.type_param_str: item.allowed_type_strs for item in schema.type_constraints}
    if kind.tensor_type not in allowed.get(own, ()):
        return frozenset()
    formal = [schema.inputs[min(i, len(schema.inputs) - 1)] for i in range(len(node.input))]
    return frozenset(i for i, item in enumerate(formal) if item.type_str == own)


def typed_outputs(node: onnx.NodeProto) -> range:
    """Positions of the outputs that have the operator's own type."""
    # The further outputs of a normalisation are its statistics.
    alone = node.op_type in ("LayerNormalization", "BatchNormalization")
    return range(1 if alone else len(node.output))
