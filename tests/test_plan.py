"""QuarterMap plans: which blocks they select, what they refuse, and how they are written down."""

from __future__ import annotations

import importlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quartermap_deploy.errors import PlanError
from quartermap_deploy.pruning import UPSAMPLE_MODES, QuarterMap, Subsample

STRIDES = [(stride, keep) for stride in range(2, 9) for keep in range(1, stride)]


def test_blocks_may_be_numpy_numbers() -> None:
    assert QuarterMap(blocks=np.array([6, 3])).blocks == (3, 6)  # type: ignore[arg-type]


class TestPlan:
    """Which blocks a plan selects, and what it refuses."""

    @pytest.mark.parametrize(
        ("plan", "depths", "selected"),
        [
            (QuarterMap(), (2, 2, 8, 2), (3, 6, 9, 12)),
            (QuarterMap(), (2, 2, 15, 2), (3, 6, 9, 12, 15, 18, 21)),
            (QuarterMap(every=2), (2, 2, 4, 2), (4, 6, 8, 10)),
            (QuarterMap(every=1), (2, 2, 4, 2), (3, 4, 5, 6, 7, 8, 9, 10)),
            (QuarterMap(every=1, exclude_stages=()), (2, 2), (1, 2, 3, 4)),
            (QuarterMap(every=2, exclude_stages=(2, 3)), (2, 2, 2, 2), (2, 8)),
            (QuarterMap(blocks=(7, 1)), (2, 2, 4, 2), (1, 7)),
        ],
    )
    def test_known_selections(
        self, plan: QuarterMap, depths: tuple[int, ...], selected: tuple[int, ...]
    ) -> None:
        assert plan.select(depths) == selected

    @given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 12), st.data())
    def test_selection_follows_its_definition(
        self, depths: list[int], every: int, data: st.DataObject
    ) -> None:
        excluded = data.draw(st.sets(st.integers(1, len(depths))))
        first = 1
        expected = []
        for stage, depth in enumerate(depths, start=1):
            expected += [i for i in range(first, first + depth) if stage not in excluded and i % every == 0]
            first += depth
        plan = QuarterMap(every=every, exclude_stages=tuple(excluded))
        if expected:
            assert plan.select(depths) == tuple(expected)
        else:
            with pytest.raises(PlanError, match="prunes nothing"):
                plan.select(depths)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"every": 0}, "every = 0 must be at least 1"),
            ({"every": 2.0}, "not a whole number"),
            ({"every": True}, "not a whole number"),
            ({"stride": 1}, "stride = 1 must be at least 2"),
            ({"keep": 0}, "keep = 0 must be at least 1"),
            ({"keep": 2}, "keep must be 1$"),
            ({"stride": 4, "keep": 5}, "keep must be 1 to 3"),
            ({"upsample": "nearst"}, "Did you mean 'nearest'"),
            ({"upsample": None}, "unknown upsample"),
            ({"blocks": ()}, "prunes nothing"),
            ({"blocks": (3, 5, 3)}, "names 3 more than once"),
            ({"blocks": (0,)}, "numbered from 1"),
            ({"blocks": "3"}, "not a list"),
            ({"blocks": 3}, "not a list"),
            ({"exclude_stages": (1, 1)}, "more than once"),
        ],
    )
    def test_a_wrong_value_is_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(PlanError, match=message):
            QuarterMap(**settings)

    def test_blocks_and_stages_that_do_not_exist_are_refused_with_the_range(self) -> None:
        with pytest.raises(PlanError, match="blocks 11, 12, but the model has blocks 1 to 10"):
            QuarterMap(blocks=(3, 11, 12)).select((2, 2, 4, 2))
        with pytest.raises(PlanError, match="stage 5, but the model has stages 1 to 4"):
            QuarterMap(exclude_stages=(1, 5)).select((2, 2, 4, 2))
        with pytest.raises(PlanError, match=r"prunes nothing.*every = 11"):
            QuarterMap(every=11).select((2, 2, 4, 2))

    @given(
        st.integers(1, 9),
        st.none() | st.sets(st.integers(1, 40), min_size=1).map(tuple),
        st.sets(st.integers(1, 4)).map(tuple),
        st.sampled_from(STRIDES),
        st.sampled_from(UPSAMPLE_MODES),
    )
    def test_json_round_trip(
        self,
        every: int,
        blocks: tuple[int, ...] | None,
        excluded: tuple[int, ...],
        strides: tuple[int, int],
        upsample: Any,
    ) -> None:
        plan = QuarterMap(None if blocks else every, blocks, excluded, *strides, upsample)
        values = json.loads(json.dumps(plan.to_dict()))
        assert None not in values.values()
        assert QuarterMap.from_dict(values) == plan

    def test_two_ways_of_choosing_blocks_contradict(self) -> None:
        with pytest.raises(PlanError, match=r"every = 3 and blocks = \[1\] both say which blocks are pruned"):
            QuarterMap(every=3, blocks=[1])  # type: ignore[arg-type]
        assert QuarterMap(blocks=(1,)).every is None and QuarterMap().every == 3
        # As manifests have both.
        assert QuarterMap.from_dict({"every": 3, "blocks": [1]}) == QuarterMap(blocks=(1,))

    def test_defaults_and_unknown_keys_of_a_table(self) -> None:
        assert QuarterMap.from_dict({}) == QuarterMap(3, None, (1,), 2, 1, "nearest")
        with pytest.raises(PlanError, match="Did you mean every"):
            QuarterMap.from_dict({"evry": 2})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 2}, "keep = 2 with stride = 2 drops nothing; keep must be 1"),
        ({"stride": 3, "keep": 3}, "keep = 3 with stride = 3 drops nothing; keep must be 1 to 2"),
        ({"keep": True}, "keep = True is not a whole number"),
        ({"stride": "2"}, "stride = '2' is not a whole number"),
        (
            {"upsample": "bicubicc"},
            "unknown upsample 'bicubicc'; expected one of nearest, bilinear, bicubic. Did you mean 'bicubic'?",
        ),
        ({"upsample": "xyz"}, "unknown upsample 'xyz'; expected one of nearest, bilinear, bicubic."),
    ],
)
def test_what_keeps_no_positions_or_all_is_told_whole(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as refused:
        Subsample(**settings)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": (3, True)}, "a number in blocks = True is not a whole number"),
        (
            {"exclude_stages": [0]},
            "a number in exclude_stages = 0 must be at least 1: blocks and stages are numbered from 1",
        ),
        ({"blocks": [5, 3, 5, 3]}, "blocks names 3, 5 more than once"),
        ({"every": 0}, "every = 0 must be at least 1: every counts blocks"),
    ],
)
def test_numbers_of_blocks_and_stages_are_told_whole(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as refused:
        QuarterMap(**settings)
    assert str(refused.value) == message


def test_blocks_and_stages_that_are_not_there_are_told_whole() -> None:
    with pytest.raises(PlanError) as refused:
        QuarterMap(blocks=(4, 5)).select((1, 3))
    assert str(refused.value) == "the plan names block 5, but the model has blocks 1 to 4"
    assert QuarterMap(blocks=(4,)).select((1, 3)) == (4,)
    with pytest.raises(PlanError) as refused:
        QuarterMap(exclude_stages=(2, 4, 3)).select((1, 3))
    assert str(refused.value) == "the plan excludes stages 3, 4, but the model has stages 1 to 2"
    with pytest.raises(PlanError) as refused:
        QuarterMap.from_dict({"strid": 2})
    names = "every, blocks, exclude_stages, stride, keep, upsample"
    assert (
        str(refused.value)
        == f"unknown key 'strid' in a QuarterMap plan; expected {names}. Did you mean stride?"
    )
    with pytest.raises(PlanError, match=r"expected every, .*, upsample\.$"):
        QuarterMap.from_dict({"xyz": 2})


def test_a_plan_is_written_as_lists_without_what_it_leaves_open() -> None:
    written = {"every": 3, "exclude_stages": [1], "stride": 2, "keep": 1, "upsample": "nearest"}
    assert QuarterMap().to_dict() == written
    assert QuarterMap(blocks=(7, 2)).to_dict() == {**written, "blocks": [2, 7]}


@pytest.mark.parametrize(("stride", "keep"), STRIDES)
def test_kept_positions_are_counted_as_they_are_listed(stride: int, keep: int) -> None:
    subsample = Subsample(stride, keep)
    for size in (*range(20), 94, 512):
        kept = [i for i in range(size) if i % stride < keep]
        assert list(subsample.kept_indices(size)) == kept and subsample.kept_size(size) == len(kept)


@pytest.mark.parametrize(
    ("package", "late"),
    [
        ("quartermap_deploy", "QuarterMap"),
        ("quartermap_deploy.architectures", "create_model"),
        ("quartermap_deploy.pruning", "prune"),
    ],
)
def test_packages_that_import_late_have_what_they_name_and_nothing_else(package: str, late: str) -> None:
    module = importlib.import_module(package)
    assert callable(getattr(module, late))
    with pytest.raises(AttributeError, match=f"^module '{package}' has no attribute 'nothing'$"):
        _ = module.nothing
