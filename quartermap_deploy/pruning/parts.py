"""Parts of a map that are maps themselves: every so many-th row and column of it, from one on.

NumPy alone, as `orders.py`: recovery tells by it that a direction scans a smaller map, and parity how large that is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.errors import PlanError
from quartermap_deploy.pruning.orders import OUTSIDE, ScanOrder, direction_named, steps_of


@dataclass(frozen=True)
class MapPart:
    """The map that one direction scans, and how.

    Attributes:
        first: the row and the column of its first position.
        stride: how many rows and columns of the whole map lie from one of its own to the next.
        direction: one of `DIRECTIONS`, on the part.
    """

    first: tuple[int, int]
    stride: tuple[int, int]
    direction: str

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the map."""
        return self.first == (0, 0) and self.stride == (1, 1)

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the part of a map of this size."""
        rows, columns = (
            math.ceil((side - first) / stride)
            for side, first, stride in zip((height, width), self.first, self.stride, strict=True)
        )
        return rows, columns

    def steps(self, height: int, width: int) -> NDArray[np.int64]:
        """The raster positions of a map of this size in the order in which the direction visits them."""
        raster = np.arange(height * width, dtype=np.int64).reshape(height, width)
        part = raster[self.first[0] :: self.stride[0], self.first[1] :: self.stride[1]]
        return np.asarray(part.ravel()[steps_of(self.direction, *part.shape)])

    def describe(self) -> str:
        """In words, as "column of every 2nd row from 0 and every 2nd column from 1"."""
        if self.is_whole:
            return self.direction
        axes = [
            f"every {name}" if stride == 1 else f"every {stride}. {name} from {first}"
            for name, first, stride in zip(("row", "column"), self.first, self.stride, strict=True)
        ]
        return f"{self.direction} ({axes[0]}, {axes[1]})"


Parts = tuple[MapPart | None, ...]
"""The part that each direction of a scan visits; None for one that visits none, or in an order without a name."""


def part_of(steps: NDArray[np.int64], height: int, width: int) -> MapPart | None:
    """The part of a map that is visited in this order, (L,), and the direction in which it is.

    None if it is no part that reaches to the last row and column, or is visited in an order that has no name, or with
    steps outside of it.
    """
    if (steps == OUTSIDE).any():
        return None
    rows, columns = np.unique(steps // width), np.unique(steps % width)
    if len(rows) * len(columns) != len(steps):
        return None
    first = int(rows[0]), int(columns[0])
    # Of a single row nothing tells the stride; that to the end is as good as any.
    stride = (
        int(rows[1] - rows[0]) if len(rows) > 1 else height - first[0],
        int(columns[1] - columns[0]) if len(columns) > 1 else width - first[1],
    )
    inside = np.searchsorted(rows, steps // width) * len(columns) + np.searchsorted(columns, steps % width)
    direction = direction_named(inside, len(rows), len(columns))
    if direction is None:
        return None
    part = MapPart(first, stride, direction)
    return part if np.array_equal(part.steps(height, width), steps) else None


def parts_of(order: ScanOrder) -> Parts:
    """The part that each direction of a scan visits."""
    return tuple(part_of(steps, order.height, order.width) for steps in order.order)


def order_at(order: ScanOrder, height: int, width: int) -> ScanOrder:
    """The order on a map of another size, of which the same parts are visited.

    Raises:
        PlanError: if a direction visits no part, or the parts are not equally large there.
    """
    parts = parts_of(order)
    if order.directions is not None or None in parts or (height, width) == (order.height, order.width):
        return order.at(height, width)
    steps = [part.steps(height, width) for part in parts if part is not None]
    if len({len(one) for one in steps}) != 1 or not len(steps[0]):
        raise PlanError(
            f"the directions of this scan visit parts of the map that are not equally large on one of {height}×{width}"
        )
    return ScanOrder(height, width, np.stack(steps), order.merged)
