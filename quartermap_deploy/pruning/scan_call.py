"""QuarterMap inside the call of a one-dimensional scan: the PyTorch reference of models that are not ours.

A foreign module knows nothing of plans. But every scan that it makes is one call of the torch operator, and where the
order is known in which that call visits the positions of its map, the call can be pruned by itself: the steps on the
plan's rows and columns are kept, in their order, and scanned alone; then each direction's output is laid out on the
smaller map, brought back to the size of the map, and read in the direction's order again. No class is known by its
name, and nothing here is shared with the passes that prune the graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quartermap_deploy.errors import PlanError
from quartermap_deploy.pruning.orders import OUTSIDE, ScanOrder
from quartermap_deploy.pruning.plan import Subsample
from quartermap_deploy.pruning.positions import restore_positions

Scan = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class PrunedScans:
    """How the scans of a module are run: those that a plan names pruned, the others as they are.

    Attributes:
        orders: the order of each scan, by its name, where it is known.
        pruned: names of the scans that are pruned.
        subsample: how.
        nodes: for scans that are one node of the graph with others, such as one for each direction, the node's name.
        orders_at: where sizes are open, gives the orders at other shapes of the model's inputs, by their names.
    """

    orders: Mapping[str, ScanOrder]
    pruned: frozenset[str] = frozenset()
    subsample: Subsample = field(default_factory=Subsample)
    nodes: Mapping[str, str] = field(default_factory=dict)
    orders_at: Callable[[Mapping[str, Sequence[int]]], Mapping[str, ScanOrder]] | None = None

    def at(self, shapes: Mapping[str, Sequence[int]]) -> PrunedScans:
        """The same where the model's inputs, by name, have these shapes."""
        return self if self.orders_at is None else dataclasses.replace(self, orders=self.orders_at(shapes))

    def run(
        self, name: str, scan: Scan, arguments: Sequence[Any], followed: Mapping[str, NDArray[Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run one scan.

        Args:
            name: of the scan.
            scan: `selective_scan`.
            arguments: its arguments: u, delta, A, B, C, D, delta_bias, delta_softplus.
            followed: what a target returned, by name; it tells in which form the parts are wanted.

        Returns:
            What the scan returns, (batch, K·d, L), and its parts by name: what the scan of the kept steps returned, in
            the form in which the graph has it. Parts of one name of several scans are to be added up.

        Raises:
            PlanError: if the scan is to be pruned and its order is unknown, or does not fit the sequence.
        """
        groups, length = arguments[3].shape[1], arguments[0].shape[-1]
        order, node = self.orders.get(name), self.nodes.get(name, name)
        if name not in self.pruned:
            y = scan(*arguments)
            return y, _parts(node, y.unflatten(1, (groups, -1)), order, followed)
        if order is None:
            raise PlanError(f"the order of {name} is unknown, so it cannot be pruned")
        kept = _Kept.of(order, self.subsample, groups, length)
        u, delta, A, B, C, *rest = arguments
        small = [kept.take(t.unflatten(1, (groups, -1))).flatten(1, 2) for t in (u, delta)]
        y = scan(*small, A, kept.take(B), kept.take(C), *rest).unflatten(1, (groups, -1))
        return kept.restore(y).flatten(1, 2), _parts(node, y, kept.order, followed)


@dataclass(frozen=True, eq=False)
class _Kept:
    """Which steps of each direction are kept, and where their outputs go.

    Attributes:
        full: the order of the whole map.
        order: the order of the kept steps on the smaller map.
        steps: (K, L') indices of the kept steps in the whole sequence.
        subsample: how the map is subsampled.
    """

    full: ScanOrder
    order: ScanOrder
    steps: Tensor
    subsample: Subsample

    @classmethod
    def of(cls, order: ScanOrder, subsample: Subsample, groups: int, length: int) -> _Kept:
        if order.order.shape != (groups, length):
            raise PlanError(
                f"the scan has {groups} directions of {length} steps, but its order is known for "
                f"{order.order.shape[0]} of {order.order.shape[1]}"
            )
        rows, columns = subsample.kept_indices(order.height), subsample.kept_indices(order.width)
        smaller = {
            row * order.width + column: place
            for place, (row, column) in enumerate((r, c) for r in rows for c in columns)
        }
        steps = [
            [step for step, position in enumerate(one) if position == OUTSIDE or position in smaller]
            for one in order.order.tolist()
        ]
        if len({len(one) for one in steps}) != 1:
            raise PlanError(
                "the directions of the scan visit different parts of the map, of which the plan keeps "
                f"{', '.join(str(len(one)) for one in steps)} steps"
            )
        visits = [
            [smaller.get(position, OUTSIDE) for position in order.order[k, one].tolist()]
            for k, one in enumerate(steps)
        ]
        small = ScanOrder(len(rows), len(columns), np.array(visits), order.merged)
        return cls(order, small, torch.tensor(steps), subsample)

    def take(self, values: Tensor) -> Tensor:
        """(batch, K, c, L) → (batch, K, c, L'): the kept steps."""
        index = self.steps[None, :, None].expand(*values.shape[:3], -1)
        return values.gather(-1, index)

    def restore(self, y: Tensor) -> Tensor:
        """(batch, K, d, L') → (batch, K, d, L): each direction by way of the map; steps outside it keep their own."""
        size = (self.full.height, self.full.width)
        restored = []
        for k, (small, full) in enumerate(zip(self.order.order, self.full.order, strict=True)):
            laid_out = on_map(y[:, k], small, self.order.height, self.order.width)
            map_ = restore_positions(laid_out, size, self.subsample).flatten(2)
            inside = torch.from_numpy(np.flatnonzero(full != OUTSIDE))
            whole = y.new_zeros(*y.shape[:1], y.shape[2], len(full))
            whole[..., inside] = map_[..., torch.from_numpy(full[full != OUTSIDE].copy())]
            tokens = torch.from_numpy(np.flatnonzero(full == OUTSIDE))
            whole[..., tokens] = y[:, k][..., torch.from_numpy(np.flatnonzero(small == OUTSIDE))]
            restored.append(whole)
        return torch.stack(restored, dim=1)


def on_map(y: Tensor, steps: NDArray[np.int64], height: int, width: int) -> Tensor:
    """Lay the steps of one direction out on their map, (batch, d, L) → (batch, d, H, W); 0 where none goes."""
    inside = np.flatnonzero(steps != OUTSIDE)
    map_ = y.new_zeros(*y.shape[:2], height * width)
    map_[..., torch.from_numpy(steps[inside].copy())] = y[..., torch.from_numpy(inside)]
    laid_out: Tensor = map_.unflatten(-1, (height, width))
    return laid_out


def _parts(
    name: str, y: Tensor, order: ScanOrder | None, followed: Mapping[str, NDArray[Any]]
) -> dict[str, Tensor]:
    """What a scan returned, (batch, K, d, L), in the form in which a target has it.

    That is a sequence, (batch, K·d, L), a map, (batch, d, H, W), on which the directions are summed, or a part for each
    direction, as a map or as a sequence that lies in a map of one row.
    """
    by_direction = [f"{name}/{k + 1}" for k in range(y.shape[1])]
    if by_direction[0] in followed:
        return {
            part: _one(y[:, k], None if order is None else order.order[k], order, followed.get(part))
            for k, part in enumerate(by_direction)
        }
    other = followed.get(name)
    if order is not None and order.merged and (other is None or other.ndim == 4):
        maps = [on_map(y[:, k], steps, order.height, order.width) for k, steps in enumerate(order.order)]
        return {name: torch.stack(maps).sum(0)}
    return {name: y.flatten(1, 2)}


def _one(
    y: Tensor, steps: NDArray[np.int64] | None, order: ScanOrder | None, other: NDArray[Any] | None
) -> Tensor:
    """One direction, (batch, d, L), on its map if the target has it there, else as a map of one row.

    Its map is what it visits: a part of the map of `order`, or all of it.
    """
    sequence = y[:, :, None]
    if order is None or steps is None or other is None or other.shape == tuple(sequence.shape):
        return sequence
    visited = np.unique(steps[steps != OUTSIDE])
    sides = other.shape[2:]
    if len(sides) != 2 or sides[0] * sides[1] != len(visited):
        return sequence
    places = np.where(steps == OUTSIDE, OUTSIDE, np.searchsorted(visited, steps))
    return on_map(y, places, *sides)
