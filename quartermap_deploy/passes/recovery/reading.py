"""What is read of a group of scans, part by part, until all of it is known or something refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.lowering.operator import DIRECTIONS
from quartermap_deploy.passes.recovery.checking import check_replacement
from quartermap_deploy.passes.recovery.concrete import Concrete
from quartermap_deploy.passes.recovery.group import GroupSizes, ScanGroup
from quartermap_deploy.passes.recovery.maps import MapForm
from quartermap_deploy.passes.recovery.merging import Merge, NotSummed, read_merge, read_merge_at
from quartermap_deploy.passes.recovery.projections import Projections, check_projections, read_projections
from quartermap_deploy.passes.recovery.refusal import Refused
from quartermap_deploy.passes.recovery.unrolling import Unrolling, read_unrolling, read_unrolling_from
from quartermap_deploy.passes.recovery.writing import Replacement, ScanParameters, write_map_scan
from quartermap_deploy.pruning.orders import OUTSIDE, ScanOrder


@dataclass(frozen=True)
class Reading:
    """What is known of a group of scans.

    Attributes:
        group: the scans.
        directions: K of each of them.
        unrolling: where their steps come from.
        merge: where their outputs go.
        projections: their projections.
        replacement: the nodes that take their place, or None if they are refused.
        refused: why.
        unsummed: whether something else than a sum reads the directions, such as a gate for each.
        apart: whether each direction became a scan of its own.
    """

    group: ScanGroup
    directions: tuple[int, ...] | None = None
    unrolling: Unrolling | None = None
    merge: Merge | None = None
    projections: Projections | None = None
    replacement: Replacement | None = None
    refused: str | None = None
    unsummed: bool = False
    apart: bool = False

    @property
    def orders(self) -> dict[str, ScanOrder]:
        """The order of each scan, by its name, where it is known."""
        if self.unrolling is None or self.directions is None:
            return {}
        unrolling = self.unrolling
        merged = self.merge is not None and self.merge.is_in_place(unrolling)
        parts = np.split(unrolling.order, np.cumsum(self.directions)[:-1])
        return {
            name: ScanOrder(unrolling.height, unrolling.width, part, merged)
            for name, part in zip(self.group.names, parts, strict=True)
        }


def read_group(group: ScanGroup, probes: Sequence[Concrete]) -> Reading:
    """Read a group of scans and write the one scan of a map that it is, or say why it is none."""
    reading = Reading(group)
    try:
        reading = replace(reading, directions=GroupSizes.of(group, probes[0]).directions)
        unrolling = read_unrolling(group, probes[0])
        reading = replace(reading, unrolling=unrolling)
        try:
            reading = replace(reading, merge=read_merge(group, unrolling, probes[0]))
        except Refused as refusal:
            reading = replace(reading, unsummed=isinstance(refusal, NotSummed))
            # That an order is none of a map's says more than what follows from it.
            _require_map_order(unrolling)
            raise
        directions = _require_map_order(unrolling)
        assert reading.merge is not None
        replacement, projections = _written(group, unrolling, reading.merge, directions, probes)
        return replace(reading, replacement=replacement, projections=projections)
    except Refused as refusal:
        return replace(reading, refused=str(refusal))


def _written(
    group: ScanGroup,
    unrolling: Unrolling,
    merge: Merge,
    directions: Sequence[str],
    probes: Sequence[Concrete],
) -> tuple[Replacement, Projections]:
    """The scan of the map, after all checks.

    Raises:
        Refused: if one fails.
    """
    if not merge.is_in_place(unrolling):
        raise Refused(f"a direction is put back into {merge.target} elsewhere than it was taken from")
    if not merge.is_even:
        raise Refused(f"its directions are added to {merge.target} with different weights")
    others = [_same_at(concrete, group, unrolling, merge) for concrete in probes[1:]]
    projections = agreed_projections(group, (unrolling, *others), probes)
    replacement = write_map_scan(
        group.names[0],
        (unrolling.source, unrolling.form),
        (merge.target, merge.form),
        (unrolling.height, unrolling.width),
        projections,
        scan_parameters(group, probes[0]),
        directions,
        float(merge.share[0]),
    )
    check_at_all(replacement, unrolling.source, probes)
    return replacement, projections


def agreed_projections(
    group: ScanGroup, unrollings: Sequence[Unrolling], probes: Sequence[Concrete]
) -> Projections:
    """The projections at the first size, the same at the others.

    Raises:
        Refused: if they are not affine in one position, or others there.
    """
    projections = read_projections(group, unrollings[0], probes[0])
    for concrete, other in zip(probes[1:], unrollings[1:], strict=True):
        check_projections(projections, group, other, concrete)
    return projections


def check_at_all(replacement: Replacement, source: str, probes: Sequence[Concrete]) -> None:
    """Compare a replacement with what it replaces at every size.

    Raises:
        Refused: if they differ.
    """
    for seed, concrete in enumerate(probes):
        check_replacement(concrete, source, replacement, seed)


def scan_parameters(group: ScanGroup, concrete: Concrete) -> ScanParameters:
    """What the scans of a group take besides maps, all directions together.

    Raises:
        Refused: if one of it depends on the data.
    """
    sizes = GroupSizes.of(group, concrete)
    channels = [count * sizes.d_inner for count in sizes.directions]

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate(
            [
                _parameter(name, value, concrete) if value else np.zeros(length, np.float32)
                for value, length in zip(group.inputs(name), channels, strict=True)
            ]
        )

    return ScanParameters(joined("A"), joined("D"), joined("delta_bias"), group.softplus)


def _parameter(name: str, value: str, concrete: Concrete) -> NDArray[Any]:
    if not concrete.is_fixed(value):
        raise Refused(f"its {name} depends on the data")
    return concrete.array(value)


def _require_map_order(unrolling: Unrolling) -> tuple[str, ...]:
    """The names of the directions.

    Raises:
        Refused: if one is none along whole rows or columns of a map.
    """
    source = unrolling.source
    if unrolling.height == 1 and len(unrolling.form.sides) == 1:
        raise Refused(f"its steps follow a sequence, {source}, not the rows or columns of a map")
    for place, (name, steps) in enumerate(zip(unrolling.directions, unrolling.order, strict=True), start=1):
        visited = int((steps != OUTSIDE).sum())
        if visited < unrolling.form.positions:
            raise Refused(
                f"direction {place} visits {visited} of the {unrolling.form.positions} positions of {source}"
            )
        if name is None:
            raise Refused(
                f"direction {place} visits the positions of {source} in an order that is none of "
                f"{', '.join(DIRECTIONS)}"
            )
    return tuple(name for name in unrolling.directions if name is not None)


def _same_at(concrete: Concrete, group: ScanGroup, unrolling: Unrolling, merge: Merge) -> Unrolling:
    """The unrolling at another size.

    Raises:
        Refused: if directions, layouts or weights are not the same there, or the graph does not tell a side.
    """
    other = read_unrolling_from(unrolling.source, form_at(unrolling, concrete), group, concrete)
    found = read_merge_at(merge.target, group, other, concrete)
    same = (
        other.directions == unrolling.directions
        and found.form.layout == merge.form.layout
        and found.is_in_place(other)
        and np.array_equal(found.share, merge.share)
    )
    require_same(same, unrolling, other)
    return other


def require_same(same: bool, unrolling: Unrolling, other: Unrolling) -> None:
    """Refuse a scan that differs at another size, or whose sides are open where the graph does not tell them.

    Raises:
        Refused: if so.
    """
    if not same:
        raise Refused(
            f"it scans a map of {other.height}×{other.width} otherwise than one of "
            f"{unrolling.height}×{unrolling.width}"
        )
    sides = (other.height, other.width)
    if len(unrolling.form.sides) == 1 and sides != (unrolling.height, unrolling.width):
        raise Refused(
            f"the sides of the map are open, and {unrolling.source}, which holds it as a sequence, does not tell them"
        )


def form_at(unrolling: Unrolling, concrete: Concrete) -> MapForm:
    """The form of the map at other sizes."""
    form = unrolling.form
    shape = concrete.shape(unrolling.source)
    sides = tuple(size for axis, size in zip(form.layout, shape, strict=True) if axis in "HWL")
    return replace(form, batch=shape[0], sides=sides)
