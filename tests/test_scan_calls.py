"""QuarterMap inside the call of a one-dimensional scan: which steps the scan gets, and what is made of its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quartermap_deploy.errors import PlanError
from quartermap_deploy.pruning.orders import OUTSIDE, ScanOrder
from quartermap_deploy.pruning.plan import Subsample
from quartermap_deploy.pruning.scan_call import PrunedScans, on_map

SCAN = "block_1/scan"
ORDER = ScanOrder(2, 3, np.array([[OUTSIDE, 0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0, OUTSIDE]]), merged=False)
"""Two directions of a map of 2 × 3, with a class token at the start of one and at the end of the other."""
KEPT = [[0, 1, 3], [3, 5, 6]]
"""Their steps on row 0 and the columns 0 and 2, and the tokens."""
CHANNELS, STATES = 2, 3


class Scan:
    """A scan that returns its input twice as large, and remembers what it was given."""

    def __init__(self) -> None:
        self.given: tuple[Any, ...] = ()

    def __call__(self, *arguments: Any) -> Tensor:
        self.given = arguments
        return 2.0 * arguments[0]


def arguments(length: int = 7) -> list[Any]:
    """The arguments of a scan of two images in two directions, all numbers different."""
    sizes = [(2, 2 * CHANNELS, length)] * 2 + [(2, 2, STATES, length)] * 2
    u, delta, B, C = (
        torch.arange(float(np.prod(size))).reshape(size) + 1000 * (place + 1)
        for place, size in enumerate(sizes)
    )
    return [u, delta, torch.ones(4, STATES), B, C, torch.ones(4), torch.zeros(4), True]


def scans(order: ScanOrder | None = ORDER, *, pruned: bool = True, **options: Any) -> PrunedScans:
    orders = {} if order is None else {SCAN: order}
    return PrunedScans(orders, frozenset([SCAN] if pruned else []), Subsample(2), **options)


def run(
    own: PrunedScans, followed: Mapping[str, Any] | None = None, given: list[Any] | None = None
) -> tuple[Tensor, dict[str, Tensor], Scan]:
    scan = Scan()
    y, parts = own.run(SCAN, scan, arguments() if given is None else given, followed or {})
    return y, parts, scan


def test_a_pruned_scan_gets_the_kept_steps_of_each_direction() -> None:
    given = arguments()
    _, _, scan = run(scans(), given=given)
    for place in (0, 1, 3, 4):
        by_direction = given[place].unflatten(1, (2, CHANNELS)) if place < 2 else given[place]
        got = scan.given[place].unflatten(1, (2, CHANNELS)) if place < 2 else scan.given[place]
        for direction, steps in enumerate(KEPT):
            assert torch.equal(got[:, direction], by_direction[:, direction][..., steps])
    assert all(got is sent for got, sent in zip(scan.given[5:], given[5:], strict=True))
    assert scan.given[2] is given[2]


def test_every_step_takes_the_output_of_the_kept_position_that_stands_for_its_own() -> None:
    given = arguments()
    y, parts, _ = run(scans(), given=given)
    u = 2 * given[0].unflatten(1, (2, CHANNELS))
    # Columns 0 and 1 of each row take column 0, and column 2 itself; row 1 takes row 0.
    source = [[0, 1, 1, 3, 1, 1, 3], [3, 5, 5, 3, 5, 5, 6]]
    for direction, steps in enumerate(source):
        assert torch.equal(y.unflatten(1, (2, CHANNELS))[:, direction], u[:, direction][..., steps])
    small = torch.stack([u[:, k][..., steps] for k, steps in enumerate(KEPT)], 1)
    assert list(parts) == [SCAN] and torch.equal(parts[SCAN], small.flatten(1, 2))


def test_other_scans_run_as_they_are() -> None:
    given = arguments()
    for own in (scans(pruned=False), scans(None, pruned=False)):
        y, parts, scan = run(own, given=given)
        assert scan.given == tuple(given) and torch.equal(y, 2 * given[0])
        assert torch.equal(parts[SCAN], y)


def test_directions_that_are_summed_are_shown_as_a_map() -> None:
    order = ScanOrder.of_directions(2, 3, ("row", "column_reverse"))
    given = arguments(6)
    u = 2 * given[0].unflatten(1, (2, CHANNELS))
    for other in (None, np.zeros((2, CHANNELS, 2, 3))):
        followed = {} if other is None else {SCAN: other}
        _, parts, _ = run(scans(order, pruned=False), followed, given)
        expected = u[:, 0].unflatten(-1, (2, 3)) + u[:, 1].flip(-1).unflatten(-1, (3, 2)).mT
        assert torch.equal(parts[SCAN], expected)
    _, parts, _ = run(scans(order, pruned=False), {SCAN: np.zeros((2, 2 * CHANNELS, 6))}, given)
    assert torch.equal(parts[SCAN], u.flatten(1, 2))
    # Pruned, the map has the kept positions alone.
    _, parts, _ = run(scans(order), {}, given)
    assert parts[SCAN].shape == (2, CHANNELS, 1, 2)
    assert torch.equal(parts[SCAN][..., 0, 0], u[:, 0, :, 0] + u[:, 1, :, 5])


def test_the_parts_of_a_node_that_holds_several_scans_have_its_name() -> None:
    _, parts, _ = run(scans(pruned=False, nodes={SCAN: "block_1/together"}))
    assert list(parts) == ["block_1/together"]
    followed = {"block_1/together/1": np.zeros(1), "block_1/together/2": np.zeros(1)}
    _, parts, _ = run(scans(pruned=False, nodes={SCAN: "block_1/together"}), followed)
    assert list(parts) == ["block_1/together/1", "block_1/together/2"]


def test_a_direction_by_itself_is_shown_on_the_map_that_it_visits_or_in_one_row() -> None:
    # The even columns, and the odd ones from behind, of a map of 2 × 4.
    order = ScanOrder(2, 4, np.array([[0, 2, 4, 6], [7, 5, 3, 1]]), merged=False)
    given = arguments(4)
    u = 2 * given[0].unflatten(1, (2, CHANNELS))
    names = [f"{SCAN}/1", f"{SCAN}/2"]

    def parts(own: PrunedScans, *shape: int) -> list[Tensor]:
        followed = dict.fromkeys(names, np.zeros(shape))
        found = run(own, followed, given)[1]
        assert list(found) == names
        return [found[name] for name in names]

    one, two = parts(scans(order, pruned=False), 2, CHANNELS, 2, 2)
    assert torch.equal(one, u[:, 0].unflatten(-1, (2, 2)))
    assert torch.equal(two, u[:, 1].flip(-1).unflatten(-1, (2, 2)))
    for own, shape in (
        (scans(order, pruned=False), (2, CHANNELS, 1, 4)),
        (scans(order, pruned=False), (2, CHANNELS, 3, 2)),
        (scans(order, pruned=False), (2, CHANNELS, 4)),
        (scans(None, pruned=False), (2, CHANNELS, 2, 2)),
    ):
        for direction, found in enumerate(parts(own, *shape)):
            assert torch.equal(found, u[:, direction][:, :, None])


def test_orders_follow_the_shapes_of_the_inputs() -> None:
    asked: list[Mapping[str, Any]] = []

    def orders_at(shapes: Mapping[str, Any]) -> dict[str, ScanOrder]:
        asked.append(shapes)
        return {SCAN: ORDER}

    own = scans(None, orders_at=orders_at)
    assert own.at({"x": (1, 3, 8, 8)}).orders == {SCAN: ORDER} and asked == [{"x": (1, 3, 8, 8)}]
    assert own.at({"x": (1, 3, 8, 8)}).pruned == own.pruned
    fixed = scans()
    assert fixed.at({"x": (1, 3, 8, 8)}) is fixed


def test_scans_that_cannot_be_pruned_are_refused() -> None:
    with pytest.raises(PlanError, match=r"the order of block_1/scan is unknown"):
        run(scans(None))
    with pytest.raises(PlanError, match=r"has 2 directions of 6 steps, but its order is known for 2 of 7"):
        run(scans(), given=arguments(6))
    uneven = ScanOrder(2, 2, np.array([[0, 1, OUTSIDE], [1, 2, 3]]), merged=False)
    with pytest.raises(PlanError, match=r"different parts of the map, of which the plan keeps 2, 0 steps"):
        run(scans(uneven), given=arguments(3))


def test_steps_are_laid_out_on_their_map() -> None:
    y = torch.arange(8.0).reshape(1, 2, 4)
    found = on_map(y, np.array([5, OUTSIDE, 0, 1]), 2, 3)
    assert found.tolist() == [[[[2, 3, 0], [0, 0, 0]], [[6, 7, 0], [0, 0, 4]]]]
