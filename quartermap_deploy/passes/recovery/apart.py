"""Directions that are scanned one by one: each becomes a SelectiveScan2D of a map of its own.

    map ─ unroll ─ project ─ SelectiveScan (K groups) ─ y
    →
    map ─┬─ every s-th row and column ─┬─ Conv ─ Split ─┐
         │                             └─ SelectiveScan2D <one direction> ─ its steps ─┬─ Concat ─ y
         └─ … for each direction                                                       ┘

For scans whose directions are no whole map summed in place: they scan parts of it (EfficientVMamba), have a gate each
before they are added up, or scan windows (LocalMamba). What the scan of sequences makes is made anew, step by step, so
that whatever reads it stays as it is.

A direction along rows or columns of the map, or of every so many-th of them, is taken from the map, and the graph's
unrolling of it falls away. One in another order, as windows, is scanned as it is unrolled, as a map of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.passes.recovery.concrete import Concrete
from quartermap_deploy.passes.recovery.group import GroupSizes, ScanGroup
from quartermap_deploy.passes.recovery.projections import Projections
from quartermap_deploy.passes.recovery.reading import (
    Reading,
    agreed_projections,
    check_at_all,
    form_at,
    require_same,
    scan_parameters,
)
from quartermap_deploy.passes.recovery.refusal import Refused
from quartermap_deploy.passes.recovery.unrolling import Unrolling, read_unrolling_from
from quartermap_deploy.passes.recovery.writing import NodeWriter, Replacement, ScanParameters
from quartermap_deploy.pruning.orders import OUTSIDE, ScanOrder
from quartermap_deploy.pruning.parts import Parts, parts_of

NARROWEST = 96
"""Channels of a direction from which scanning several directions one by one is faster. Measured (ADR 0013)."""
NARROWEST_IN_LINES = 32
"""The same where d_state is 1: a map is then walked in lines, all at once, in far fewer steps than a sequence."""
NARROWEST_UNROLLED = 128
"""The same where a direction is scanned as it is unrolled, so that unrolling it is not saved."""


def read_apart(reading: Reading, probes: Sequence[Concrete]) -> Reading:
    """Read a scan that is none of a whole map as one scan of a map for each direction.

    Args:
        reading: of one scan, refused.
        probes: the graph, at the sizes to look at it.

    Returns:
        The reading with a replacement, or as it was; where it is nearly such a scan, with what is missing behind what
        it was refused for.
    """
    unrolling = reading.unrolling
    if unrolling is None or not _is_apart(reading, unrolling):
        return reading
    group, parts = reading.group, _parts(unrolling)
    try:
        _require_pays(GroupSizes.of(group, probes[0]), parts)
        others = [_same_at(concrete, group, unrolling, parts) for concrete in probes[1:]]
        projections = agreed_projections(group, (unrolling, *others), probes)
        parameters = scan_parameters(group, probes[0])
        replacement = _written(group, unrolling, parts, projections, parameters)
        check_at_all(replacement, unrolling.source, probes)
    except Refused as refusal:
        return replace(
            reading, refused=f"{reading.refused}; and its directions are not scanned one by one: {refusal}"
        )
    return replace(reading, projections=projections, replacement=replacement, refused=None, apart=True)


def _is_apart(reading: Reading, unrolling: Unrolling) -> bool:
    """Whether the directions are parts or windows of a map, or directions of it that are not only added up.

    Sequences, and snakes, whose steps are neighbours, are not. Nor is what is added up in other places than it was
    taken from: that is more likely a mistake than a model.
    """
    if unrolling.height == 1 or unrolling.width == 1:
        return False
    named = all(name is not None for name in unrolling.directions)
    if reading.merge is None:
        summed_rightly = reading.unsummed
    else:
        summed_rightly = not named and reading.merge.is_even and reading.merge.gives_back(unrolling)
    return summed_rightly and not any(_is_snake(steps, unrolling) for steps in unrolling.order)


def _is_snake(steps: NDArray[np.int64], unrolling: Unrolling) -> bool:
    """Whether steps go along whole lines, but not all from the same end."""
    visited = steps[steps != OUTSIDE]
    order = ScanOrder(unrolling.height, unrolling.width, visited[None], merged=False)
    return order.directions is None and order.walks_lines


def _require_pays(sizes: GroupSizes, parts: Parts) -> None:
    """Refuse narrow scans, of which the directions are faster together.

    A scan of K groups walks its sequences once, and K scans walk K times; each step costs the runtime a fixed time
    besides what it computes. What is saved grows with the channels: the unrolled time step of full width, and mostly
    the unrolled map.

    Raises:
        Refused: if they are.
    """
    if None in parts:
        narrowest = NARROWEST_UNROLLED
    elif sizes.count == 1:
        return
    else:
        narrowest = NARROWEST_IN_LINES if sizes.d_state == 1 else NARROWEST
    if sizes.d_inner < narrowest:
        raise Refused(f"with {sizes.d_inner} channels that would be slower; it pays from {narrowest} on")


def _parts(unrolling: Unrolling) -> Parts:
    """The part of the map that each direction scans; None for one that is scanned as it is unrolled."""
    return parts_of(ScanOrder(unrolling.height, unrolling.width, unrolling.order, merged=False))


def _same_at(concrete: Concrete, group: ScanGroup, unrolling: Unrolling, parts: Parts) -> Unrolling:
    """The unrolling at another size.

    Raises:
        Refused: if other parts are scanned there, or the graph does not tell a side.
    """
    other = read_unrolling_from(unrolling.source, form_at(unrolling, concrete), group, concrete)
    require_same(_parts(other) == parts, unrolling, other)
    return other


def _written(
    group: ScanGroup, unrolling: Unrolling, parts: Parts, projections: Projections, parameters: ScanParameters
) -> Replacement:
    """One scan for each direction; they have the directions' numbers behind the name of the scan that they replace."""
    (target,) = group.outputs
    write, count, d_inner = NodeWriter(group.names[0]), len(parts), projections.dt.shape[2]
    map_ = sequences = None
    made = []
    for place, part in enumerate(parts):
        own = write.below(str(place + 1))
        if part is not None:
            map_ = map_ or write.to_map(unrolling.source, unrolling.form, unrolling.height, unrolling.width)
            x, direction = own.part(map_, part), part.direction
        else:
            if sequences is None:
                sequences = _sequences(write, group, count, d_inner)
            axis = own.constant("row_axis", np.array([2], np.int64))
            x, direction = own("Unsqueeze", "row", [sequences[place], axis]), "row"
        y = own.scan(own.prefix, x, projections.of(place), parameters.of(place, count), [direction])
        made.append(own.sequence(y, direction, target if count == 1 else ""))
    if count > 1:
        write("Concat", "joined", made, target, axis=1)
    return write.replacement([target])


def _sequences(write: NodeWriter, group: ScanGroup, count: int, d_inner: int) -> list[str]:
    """What each direction scans, (batch, d_inner, L), as the graph unrolls it."""
    (u,) = group.inputs("u")
    return (
        [u] if count == 1 else write.split("own", u, [(f"u_{place + 1}", d_inner) for place in range(count)])
    )
