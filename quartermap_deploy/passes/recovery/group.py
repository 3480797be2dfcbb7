"""Scans that are read together: mostly one, with K directions, or K with one direction each that end in one sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from quartermap_deploy.lowering.operator import INPUTS_1D
from quartermap_deploy.passes.recovery.concrete import Concrete
from quartermap_deploy.passes.recovery.graph_index import GraphIndex, attribute
from quartermap_deploy.passes.recovery.refusal import Refused


@dataclass(frozen=True)
class ScanGroup:
    """One-dimensional scans of one graph.

    Attributes:
        index: the graph.
        places: the places of the scans in it.
    """

    index: GraphIndex
    places: tuple[int, ...]

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """The scans."""
        return [self.index.nodes[place] for place in self.places]

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(node.name for node in self.nodes)

    def inputs(self, name: str) -> list[str]:
        """The value that each scan reads as the input `name` of its operator; "" where it has none."""
        place = INPUTS_1D.index(name)
        return [node.input[place] if place < len(node.input) else "" for node in self.nodes]

    @property
    def outputs(self) -> list[str]:
        """What each scan makes."""
        return [node.output[0] for node in self.nodes]

    @property
    def softplus(self) -> bool:
        """Whether the scans apply softplus to their time steps.

        Raises:
            Refused: if some do and others do not.
        """
        found = {bool(attribute(node, "delta_softplus", 0)) for node in self.nodes}
        if len(found) > 1:
            raise Refused("one direction has a softplus on its time step and another has none")
        return found.pop()


@dataclass(frozen=True)
class GroupSizes:
    """The sizes of a group's scans: u is (batch, K·d_inner, steps), B and C are (batch, K, d_state, steps).

    Attributes:
        directions: K of each scan.
        batch: sequences.
        d_inner: channels of a direction.
        d_state: N.
        steps: L.
    """

    directions: tuple[int, ...]
    batch: int
    d_inner: int
    d_state: int
    steps: int

    @property
    def count(self) -> int:
        """How many directions the group has."""
        return sum(self.directions)

    @classmethod
    def of(cls, group: ScanGroup, concrete: Concrete) -> GroupSizes:
        """Read the sizes.

        Raises:
            Refused: if the scans of the group differ in them.
        """
        found = set()
        directions = []
        for u, B in zip(group.inputs("u"), group.inputs("B"), strict=True):
            batch, channels, steps = concrete.shape(u)
            _, count, d_state, _ = concrete.shape(B)
            directions.append(count)
            found.add((batch, channels // count, d_state, steps))
        if len(found) > 1:
            raise Refused("its directions differ in channels, state size or length")
        return cls(tuple(directions), *found.pop())

    def by_direction(self, parts: list[NDArray[Any]]) -> NDArray[Any]:
        """Arrays (batch, K·c, L) or (batch, K, c, L), one of each scan → (batch, all K, c, L)."""
        return np.concatenate(
            [
                part.reshape(self.batch, count, -1, self.steps)
                for part, count in zip(parts, self.directions, strict=True)
            ],
            axis=1,
        )

    def by_scan(self, array: NDArray[Any]) -> list[NDArray[Any]]:
        """(batch, all K, d_inner, L) → an array (batch, K·d_inner, L) for each scan."""
        parts = np.split(array, np.cumsum(self.directions)[:-1], axis=1)
        return [part.reshape(self.batch, -1, self.steps) for part in parts]
