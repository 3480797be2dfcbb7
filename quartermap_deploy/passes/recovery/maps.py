"""The forms in which a graph holds a feature map, and the grid of positions that it stands on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LAYOUTS = ("NCHW", "NHWC", "NCL", "NLC")
"""N: batch, C: channels, H and W: the map's sides, L: its positions in raster order, or those of a sequence."""


@dataclass(frozen=True)
class MapForm:
    """How a value of the graph holds a map of `channels` channels.

    Attributes:
        layout: one of `LAYOUTS`.
        batch: images.
        channels: channels.
        sides: (H, W), or (L,) where the value does not tell them apart.
    """

    layout: str
    batch: int
    channels: int
    sides: tuple[int, ...]

    @classmethod
    def all_of(cls, shape: tuple[int, ...], channels: int) -> list[MapForm]:
        """The forms that a value of this shape can have; more than one where sizes happen to be equal."""
        found = []
        for layout in LAYOUTS:
            if len(layout) == len(shape) and shape[layout.index("C")] == channels:
                sides = tuple(size for axis, size in zip(layout, shape, strict=True) if axis in "HWL")
                found.append(cls(layout, shape[0], channels, sides))
        return found

    @property
    def positions(self) -> int:
        """How many positions the map has."""
        return int(np.prod(self.sides))

    def write(self, flat: Array) -> Array:
        """(batch, channels, positions) → an array of this form."""
        if self.layout.endswith("C"):
            return np.asarray(flat.transpose(0, 2, 1).reshape(self.batch, *self.sides, self.channels))
        return np.asarray(flat.reshape(self.batch, self.channels, *self.sides))

    def read(self, array: Array) -> Array:
        """An array of this form → (batch, channels, positions)."""
        if self.layout.endswith("C"):
            return np.asarray(array.reshape(self.batch, self.positions, self.channels).transpose(0, 2, 1))
        return np.asarray(array.reshape(self.batch, self.channels, self.positions))
