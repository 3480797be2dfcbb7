"""Inputs and outputs of a model: how they are called, and what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
        """Read what `to_dict` wrote."""
        return cls(str(values["name"]), tuple(values["shape"]), str(values["type"]))
