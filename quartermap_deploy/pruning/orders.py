"""The order in which a scan visits the positions of a map, as it was read off a foreign graph.

NumPy alone: the PyTorch reference and the graph passes both prune a scan by its order, each in its own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quartermap_deploy.errors import PlanError
from quartermap_deploy.lowering.operator import DIRECTIONS, Direction

OUTSIDE = -1
"""What an order holds for a step that visits no position of the map: padding or a class token."""


@dataclass(frozen=True, eq=False)
class ScanOrder:
    """Which position of a map each step of each direction of one scan visits.

    Attributes:
        height: rows H of the map.
        width: columns W of the map.
        order: (K, L) int64, read-only: the raster position r·W + c that step l of direction k visits, or `OUTSIDE`.
        merged: whether the outputs of the directions are put back where they were taken from and summed there.
        directions: the K names out of `DIRECTIONS`, or None where a direction has none; derived from `order`.

    Raises:
        PlanError: if the order does not fit the map, or a direction visits a position twice.
    """

    height: int
    width: int
    order: NDArray[np.int64]
    merged: bool
    directions: tuple[str, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        order = np.array(self.order, dtype=np.int64)
        if order.ndim != 2 or not order.size:
            raise PlanError(f"a scan order has the shape (directions, steps), not {order.shape}")
        if order.min() < OUTSIDE or order.max() >= self.height * self.width:
            raise PlanError(
                f"a scan order of a {self.height}×{self.width} map holds positions from 0 to "
                f"{self.height * self.width - 1} or {OUTSIDE}, not {order.min()} to {order.max()}"
            )
        for direction, steps in enumerate(order, start=1):
            visited = steps[steps != OUTSIDE]
            if len(np.unique(visited)) != len(visited):
                raise PlanError(f"direction {direction} of a scan order visits a position twice")
        order.flags.writeable = False
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "directions", _names(order, self.height, self.width))

    @classmethod
    def of_directions(
        cls, height: int, width: int, directions: Sequence[str], *, merged: bool = True
    ) -> ScanOrder:
        """The order of named directions on a map of this size.

        Raises:
            PassError: if a name is unknown.
        """
        return cls(height, width, np.stack([steps_of(name, height, width) for name in directions]), merged)

    def at(self, height: int, width: int) -> ScanOrder:
        """The same order on a map of another size.

        Raises:
            PlanError: if it is another size and a direction has no name, so that nothing tells how it goes there.
        """
        if (height, width) == (self.height, self.width):
            return self
        if self.directions is None:
            raise PlanError(
                f"this scan's order is known on a {self.height}×{self.width} map and is none of "
                f"{', '.join(DIRECTIONS)}, so its order on a {height}×{width} map is unknown; use the size that the "
                "model was exported with"
            )
        return ScanOrder.of_directions(height, width, self.directions, merged=self.merged)

    @property
    def covers_map(self) -> bool:
        """Whether every direction visits every position; steps outside the map may stand between."""
        return bool(((self.order != OUTSIDE).sum(axis=1) == self.height * self.width).all())

    @property
    def walks_lines(self) -> bool:
        """Whether every direction visits whole rows, or whole columns, one after the other, each in either direction.

        Rows and columns of the map, forwards or backwards, and snakes do. Windows do not: they walk pieces of
        rows.
        """
        return self.covers_map and all(self._walks_lines(steps[steps != OUTSIDE]) for steps in self.order)

    def _walks_lines(self, steps: NDArray[np.int64]) -> bool:
        """Whether steps go from one position to its neighbour all along each row, or all along each column."""
        by_row = np.diff(steps.reshape(self.height, self.width), axis=1)
        by_column = np.diff(steps.reshape(self.width, self.height), axis=1)
        same_row = (steps // self.width).reshape(self.height, self.width)
        rows = (np.abs(by_row) == 1).all() and (same_row == same_row[:, :1]).all()
        return bool(rows or (np.abs(by_column) == self.width).all())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ScanOrder):
            return NotImplemented
        same_map = (self.height, self.width, self.merged) == (other.height, other.width, other.merged)
        return same_map and np.array_equal(self.order, other.order)

    def __hash__(self) -> int:
        return hash((self.height, self.width, self.merged, self.order.tobytes()))


def steps_of(name: str, height: int, width: int) -> NDArray[np.int64]:
    """The raster positions of a map in the order of a named direction, (H·W,).

    Raises:
        PassError: if the name is unknown.
    """
    direction = Direction.parse(name)
    raster = np.arange(height * width, dtype=np.int64).reshape(height, width)
    steps = (raster.T if direction.orientation == "column" else raster).ravel()
    return steps[::-1] if direction.reverse else steps


def direction_named(steps: ArrayLike, height: int, width: int) -> str | None:
    """The direction that visits a map in this order, (L,), or None.

    Where a map of one row or one column makes two of them the same, the earlier in `DIRECTIONS`.
    """
    found = np.asarray(steps)
    return next((name for name in DIRECTIONS if np.array_equal(steps_of(name, height, width), found)), None)


def _names(order: NDArray[np.int64], height: int, width: int) -> tuple[str, ...] | None:
    names = [direction_named(steps, height, width) for steps in order]
    known = tuple(name for name in names if name is not None)
    return known if len(known) == len(names) else None
