"""The order of a scan: what it holds, the directions it names, and the order at another size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quartermap_deploy.errors import PlanError
from quartermap_deploy.lowering.operator import DIRECTIONS
from quartermap_deploy.pruning.orders import OUTSIDE, ScanOrder, direction_named, steps_of
from quartermap_deploy.pruning.parts import MapPart, order_at, part_of

sides = st.integers(2, 6)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("row", [0, 1, 2, 3, 4, 5]),
        ("column", [0, 3, 1, 4, 2, 5]),
        ("row_reverse", [5, 4, 3, 2, 1, 0]),
        ("column_reverse", [5, 2, 4, 1, 3, 0]),
    ],
)
def test_directions_of_a_map_of_two_rows_and_three_columns(name: str, steps: list[int]) -> None:
    assert steps_of(name, 2, 3).tolist() == steps
    assert direction_named(steps, 2, 3) == name


@given(height=sides, width=sides, names=st.lists(st.sampled_from(DIRECTIONS), min_size=1, max_size=4))
def test_an_order_names_its_directions_and_gives_them_at_another_size(
    height: int, width: int, names: list[str]
) -> None:
    read = ScanOrder(height, width, ScanOrder.of_directions(height, width, names).order, merged=True)
    assert read.directions == tuple(names)
    assert read.covers_map
    other = read.at(width + 1, height)
    assert (other.height, other.width) == (width + 1, height)
    assert other.order.tolist() == [steps_of(name, width + 1, height).tolist() for name in names]
    assert read.at(height, width) == read


def test_an_order_without_names_is_known_at_its_own_size_alone() -> None:
    with_class_token = ScanOrder(2, 2, np.array([[0, 1, OUTSIDE, 2, 3]]), merged=False)
    assert with_class_token.directions is None
    assert with_class_token.covers_map
    assert with_class_token.at(2, 2) is with_class_token
    with pytest.raises(PlanError, match=r"2×2 map.*its order on a 3×4 map is unknown"):
        with_class_token.at(3, 4)


def test_a_part_of_a_map_is_no_whole_map() -> None:
    assert not ScanOrder(2, 2, np.array([[0, 1, 2, 3], [0, 1, OUTSIDE, OUTSIDE]]), merged=True).covers_map


def test_orders_are_equal_by_what_they_hold() -> None:
    first = ScanOrder.of_directions(2, 3, ("row",))
    assert first == ScanOrder(2, 3, np.arange(6)[None], merged=True)
    assert hash(first) == hash(ScanOrder(2, 3, np.arange(6)[None], merged=True))
    assert first != ScanOrder.of_directions(3, 2, ("row",))
    assert first != ScanOrder.of_directions(2, 3, ("row",), merged=False)
    with pytest.raises(ValueError, match="read-only"):
        first.order[0, 0] = 1


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 2, 3], r"shape \(directions, steps\)"),
        ([[0, 1, 2, 4]], "0 to 4"),
        ([[0, 1, 2, -2]], "-2 to 2"),
        ([[0, 1, 2, 3], [0, 1, 1, 3]], "direction 2 .* visits a position twice"),
    ],
)
def test_what_is_no_order_of_the_map_is_refused(order: list[object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ScanOrder(2, 2, np.array(order), merged=True)


def test_lines_and_snakes_walk_lines_and_windows_do_not() -> None:
    height, width = 4, 6
    raster = np.arange(height * width).reshape(height, width)
    snake = raster.copy()
    snake[1::2] = snake[1::2, ::-1]
    windows = raster.reshape(2, 2, 2, 3).transpose(0, 2, 1, 3).reshape(-1)
    shuffled = np.random.default_rng(0).permutation(height * width)
    token = np.insert(raster.reshape(-1), 7, OUTSIDE)

    def walks(steps: np.ndarray[Any, np.dtype[np.int64]]) -> bool:
        return ScanOrder(height, width, steps.reshape(1, -1), merged=False).walks_lines

    for steps in (raster, raster.T, raster[::-1, ::-1], raster.T[::-1], snake, snake[:, ::-1], token):
        assert walks(np.ascontiguousarray(steps).reshape(-1))
    for steps in (windows, shuffled, raster.reshape(-1)[:12]):
        assert not walks(steps)


# Parts of a map ------------------------------------------------------------------------------------------------------


@given(
    sides=st.tuples(sides, sides),
    first=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    direction=st.sampled_from(DIRECTIONS),
)
def test_a_part_is_told_by_its_steps(
    sides: tuple[int, int], first: tuple[int, int], stride: tuple[int, int], direction: str
) -> None:
    part = MapPart(first, stride, direction)
    steps = part.steps(*sides)
    raster = np.arange(sides[0] * sides[1]).reshape(sides)[first[0] :: stride[0], first[1] :: stride[1]]
    assert part.sides(*sides) == raster.shape
    if not raster.size:
        return
    assert sorted(steps) == sorted(raster.ravel())
    found = part_of(steps, *sides)
    assert found is not None and found.first == first
    assert found.steps(*sides).tolist() == steps.tolist()
    if min(raster.shape) > 1:
        # Written out it shows its numbers alone, which repr of NumPy's would not.
        assert found == part and repr(found) == repr(part)
        order = ScanOrder(*sides, steps[None], merged=False)
        assert order_at(order, 7, 9).order.tolist() == [part.steps(7, 9).tolist()]


@pytest.mark.parametrize(
    "steps",
    [
        [0, 1, 4, 5],  # does not reach the last row and column
        [0, 2, 8, OUTSIDE],
        [0, 2, 10, 8],  # a snake
        [0, 2, 8],  # no rows and columns
        [0, 1, 3, 8, 9, 11],  # not evenly spaced
    ],
)
def test_other_positions_are_no_part(steps: list[int]) -> None:
    assert part_of(np.array(steps), 4, 4) is None
    with pytest.raises(PlanError, match="unknown"):
        order_at(ScanOrder(4, 4, np.array([steps]), merged=False), 6, 6)


def test_parts_that_differ_in_size_have_no_order() -> None:
    parts = [MapPart(first, (2, 2), "row") for first in ((0, 0), (1, 1))]
    order = ScanOrder(4, 4, np.stack([part.steps(4, 4) for part in parts]), merged=False)
    assert order_at(order, 6, 8).order.shape == (2, 12)
    with pytest.raises(PlanError, match="not equally large on one of 5×5"):
        order_at(order, 5, 5)
    assert [part.describe() for part in parts] == [
        "row (every 2. row from 0, every 2. column from 0)",
        "row (every 2. row from 1, every 2. column from 1)",
    ]
