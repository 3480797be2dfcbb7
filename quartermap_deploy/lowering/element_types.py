"""The 16-bit element types: their range, and how values are rounded to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from quartermap_deploy.errors import UnknownNameError

FLOAT = int(TensorProto.FLOAT)


@dataclass(frozen=True)
class ElementType:
    """A 16-bit floating-point type.

    Attributes:
        name: as in recipes.
        number: its number in ONNX.
        largest: largest finite value.
        smallest_normal: smallest value with the full number of significant bits.
        digits: significant bits, the hidden one included.
        opset: the first opset in which every operator of our graphs takes the type.
    """

    name: str
    number: int
    largest: float
    smallest_normal: float
    digits: int
    opset: int

    @property
    def tensor_type(self) -> str:
        """The type as schemas spell it."""
        return f"tensor({self.name})"

    def rounded(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """Values in this type, rounded to nearest, ties to even; beyond the largest they become infinite."""
        with np.errstate(over="ignore"):
            return values.astype(helper.tensor_dtype_to_np_dtype(self.number))

    def tensor(self, values: NDArray[np.float32], name: str) -> onnx.TensorProto:
        """A tensor of this type."""
        return numpy_helper.from_array(self.rounded(values), name)


SIXTEEN_BIT = {
    "float16": ElementType("float16", int(TensorProto.FLOAT16), 65504.0, 2.0**-14, 11, 20),
    # Conv and the pools take bfloat16 from opset 22 on.
    "bfloat16": ElementType("bfloat16", int(TensorProto.BFLOAT16), 255 * 2.0**120, 2.0**-126, 8, 22),
}
"""By name."""

BY_NUMBER = {item.number: item for item in SIXTEEN_BIT.values()}
"""By the type's number in ONNX."""


def element_type(name: str) -> ElementType:
    """Return a 16-bit type.

    Raises:
        UnknownNameError: if there is none of this name.
    """
    if name not in SIXTEEN_BIT:
        raise UnknownNameError.for_choice("16-bit type", name, SIXTEEN_BIT)
    return SIXTEEN_BIT[name]


def types_of_values(graph: onnx.GraphProto) -> dict[str, int]:
    """The ONNX number of the element type of every value whose type the graph tells, weights included."""
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for info in (*graph.value_info, *graph.input, *graph.output):
        types[info.name] = info.type.tensor_type.elem_type
    return types


def types_present(graph: onnx.GraphProto) -> Iterable[ElementType]:
    """The 16-bit types that occur in a graph's weights, inputs, outputs and casts."""
    found = {tensor.data_type for tensor in graph.initializer}
    found |= {info.type.tensor_type.elem_type for info in (*graph.input, *graph.output)}
    found |= {a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"}
    return [item for number, item in BY_NUMBER.items() if number in found]
