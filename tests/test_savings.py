"""What pruning saves, from measured times: scaled to the whole, and told apart from noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quartermap_deploy.bench import Timing
from quartermap_deploy.evaluation.savings import TOGETHER, PlanTimer, Savings, _saved, is_noisy, scaled
from quartermap_deploy.pruning import QuarterMap


@pytest.mark.parametrize(
    ("share", "error", "noisy"),
    [
        (0.3, 0.0, False),
        (0.3, 0.099, False),
        (0.3, 0.101, True),
        (0.03, 0.0099, False),
        (0.03, 0.0101, True),
        (0.0, 0.0, True),
        (-0.1, 0.01, True),
        (math.nan, 0.01, True),
        (0.3, math.nan, True),
    ],
)
def test_savings_are_noise_where_their_error_is_more_than_a_third_of_them(
    share: float, error: float, noisy: bool
) -> None:
    assert is_noisy((share, error)) is noisy


@pytest.mark.parametrize(
    ("whole", "parts", "scale"),
    [
        (0.3, (0.1, 0.1), 1.5),
        (0.2, (0.2, 0.2), 0.5),
        (0.1, (0.2, 0.2), 0.5),  # a quarter would be a contradiction
        (0.9, (0.1, 0.1), 2.0),
        (-0.1, (0.1, 0.1), 1.0),
        (0.1, (0.1, -0.2), 1.0),
    ],
)
def test_stages_add_up_to_the_whole_within_a_factor_of_two(
    whole: float, parts: tuple[float, ...], scale: float
) -> None:
    found = scaled((whole, 0.01), [(share, 0.02) for share in parts])
    assert found == [(pytest.approx(scale * share), pytest.approx(scale * 0.02)) for share in parts]


def test_what_is_saved_is_the_share_of_the_unpruned_time_of_the_same_round() -> None:
    unpruned, pruned = Timing((1.0, 2.0, 4.0)), Timing((0.5, 1.5, 3.6))
    share, error = _saved(pruned, unpruned)
    assert share == pytest.approx(0.25)
    # The quartiles of 0.5, 0.75 and 0.9 are 0.625 and 0.825.
    assert error == pytest.approx(1.253 / 1.349 * 0.2 / math.sqrt(3))
    assert _saved(unpruned, unpruned) == (0.0, 0.0)


def test_the_speed_of_several_blocks_is_that_of_what_is_left() -> None:
    savings = Savings("time", {(1, 2): 0.1, (2, 2): 0.15, (2, 3): 0.5}, {}, "for this test")
    assert savings.speed((), 2) == 1.0
    assert savings.speed((1, 2), 2) == pytest.approx(1 / 0.75)
    assert savings.speed((2,), 3) == pytest.approx(2.0)
    assert Savings.from_dict(savings.to_dict()) == savings


class MadeUp(PlanTimer):
    """Times that are made up: what each set of blocks at a stride saves, in two rounds that differ by `noise`."""

    def __init__(self, saved: dict[tuple[tuple[int, ...], int], float], noise: float = 0.0) -> None:
        blocks = [
            SimpleNamespace(stage=stage, index=index)
            for stage, index in ((1, 1), (1, 2), (2, 3), (2, 4), (2, 5))
        ]
        source: Any = SimpleNamespace(blocks=blocks)
        recipe: Any = None
        super().__init__(recipe, source, "torch", np.zeros((4, 3, 8, 8), np.float32), repeats=2)
        self.saved, self.noise, self.made, self.groups = saved, noise, list[QuarterMap | None](), list[int]()

    def _run(self, plan: QuarterMap | None) -> Any:
        self.made.append(plan)
        return plan

    def _times_together(self, unpruned: Any, plans: Sequence[QuarterMap]) -> list[tuple[Timing, Timing]]:
        assert unpruned is None
        self.groups.append(len(plans))
        shares = [self.saved[plan.blocks or (), plan.stride] for plan in plans]
        return [
            (Timing((1 - share - self.noise, 1 - share + self.noise)), Timing((1.0, 1.0))) for share in shares
        ]


ALL, FIRST, SECOND = (1, 2, 3, 4, 5), (1, 2), (3, 4, 5)


def test_each_block_has_its_part_of_what_its_stage_saves() -> None:
    saved = {
        (ALL, 2): 0.5,
        (FIRST, 2): 0.1,
        (SECOND, 2): 0.3,
        (ALL, 3): 0.4,
        (FIRST, 3): 0.2,
        (SECOND, 3): 0.2,
    }
    found = MadeUp(saved).savings((2, 3))
    # At stride 2 the stages save 0.4 together and the whole 0.5, so each is scaled by 1.25.
    expected = {(block, 2): 0.125 / 2 if block < 3 else 0.375 / 3 for block in ALL}
    expected |= {(block, 3): 0.2 / 2 if block < 3 else 0.2 / 3 for block in ALL}
    assert found.shares == pytest.approx(expected) and found.errors == dict.fromkeys(expected, 0.0)
    assert found.measure == "time" and not found.noisy
    assert found.note == "measured in turns on torch, stage by stage, batch 4, 2 rounds"


def test_the_error_of_a_stage_is_shared_too_and_noise_at_all_strides_is_noise() -> None:
    saved = {(blocks, stride): 0.2 for blocks in (ALL, FIRST, SECOND) for stride in (2, 3)}
    found = MadeUp(saved, noise=0.02).savings((2,))
    # The quartiles of two rounds lie half of their distance apart, 0.02; the stages are scaled by a half.
    error = 0.5 * 1.253 / 1.349 * 0.02 / math.sqrt(2)
    assert found.errors == pytest.approx({(b, 2): error / (2 if b < 3 else 3) for b in ALL})
    assert not found.noisy
    loud = {key: 0.01 for key in saved}
    assert MadeUp(loud, noise=0.1).savings((2, 3)).noisy
    assert not MadeUp({**loud, (ALL, 3): 0.9}, noise=0.1).savings((2, 3)).noisy


def test_plans_are_timed_a_few_at_a_time_beside_one_unpruned_model() -> None:
    timer = MadeUp({((block,), 2): block / 100 for block in range(1, 2 * TOGETHER + 2)})
    plans = [QuarterMap(blocks=(block,)) for block in range(1, 2 * TOGETHER + 2)]
    found = timer.times(plans)
    assert [1 - pruned.median for pruned, _ in found] == pytest.approx(
        [b / 100 for b in range(1, 2 * TOGETHER + 2)]
    )
    assert timer.groups == [TOGETHER, TOGETHER, 1] and timer.made[0] is None
    timer._unpruned = timer.made[0]
    assert timer.settings() == "batch 4, 2 rounds"
