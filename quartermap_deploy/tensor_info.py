"""Inputs and outputs of a model: how they are called, and what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quartermap_deploy.errors import InputError

if TYPE_CHECKING:
    import onnx

TYPES = (
    *("float16", "bfloat16", "float32", "float64", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)
"""Element types that an input or output may have."""


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a model.

    Attributes:
        name: by which it is fed or read.
        shape: size of each axis; an open axis is a string, such as "batch".
        type: element type, by NumPy's name.
    """

    name: str
    shape: tuple[int | str, ...]
    type: str = "float32"

    @property
    def is_image(self) -> bool:
        """Whether it can hold images: (batch, 1, 3 or 4 channels, height, width) of floating-point numbers."""
        return len(self.shape) == 4 and self.shape[1] in (1, 3, 4) and self.type.startswith("float")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"name": self.name, "shape": list(self.shape), "type": self.type}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TensorInfo:
        """Read what `to_dict` wrote.

        Raises:
            InputError: if a value is missing or of another kind.
        """
        name, shape, kind = values.get("name"), values.get("shape"), values.get("type")
        fits = isinstance(shape, (list, tuple)) and all(
            (type(size) is int and size >= 0) or isinstance(size, str) for size in shape
        )
        if not isinstance(name, str) or shape is None or not fits or kind not in TYPES:
            raise InputError(f"{dict(values)!r} is no input or output; expected name, shape and type")
        return cls(name, tuple(shape), kind)

    @classmethod
    def of_value(cls, value: onnx.ValueInfoProto) -> TensorInfo:
        """What a graph says of an input or output.

        An axis of which it says nothing is named "any"; what is no tensor has the type "unknown".
        """
        import onnx

        tensor = value.type.tensor_type
        shape = tuple(
            int(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "any"
            for dim in tensor.shape.dim
        )
        try:
            kind = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        except KeyError:
            kind = "unknown"
        return cls(value.name, shape, kind)
