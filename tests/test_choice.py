"""The choice among plans that were tried, on numbers that are made up: what is verified, timed, taken and refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quartermap_deploy.bench import Timing
from quartermap_deploy.errors import GoalError
from quartermap_deploy.evaluation.choice import AT_ONCE, ROUNDS, VERIFIED, Chooser
from quartermap_deploy.evaluation.fidelity import Fidelity
from quartermap_deploy.evaluation.savings import Savings
from quartermap_deploy.evaluation.search import Candidate, Goal, Judge
from quartermap_deploy.pruning import QuarterMap

SHARES = {(block, 2): block / 100 for block in range(1, 31)}
"""Block 20 by itself saves 20 % of the time, and so on: the speed is 1 / 0.8."""


def only(block: int) -> Candidate:
    return Candidate((block,), 2)


class Images:
    """Runs candidates on other images: what each loses there is given."""

    def __init__(self, drops: Mapping[int, float]) -> None:
        self.dataset, self.drops = SimpleNamespace(name="others"), drops
        self.calls: list[list[int]] = []

    def run(self, candidates: Sequence[Candidate]) -> dict[Candidate, Fidelity]:
        self.calls.append([c.blocks[0] for c in candidates])
        return {c: Fidelity(1 - self.drops.get(c.blocks[0], 0.0), 0.0, None) for c in candidates}


class Clock:
    """Times plans: the unpruned model takes 10 ms in one round and 20 in another, a pruned one what its speed says."""

    def __init__(self, speeds: Mapping[int, float]) -> None:
        self.speeds, self.calls = speeds, list[list[int]]()

    def times(self, plans: Sequence[QuarterMap]) -> list[tuple[Timing, Timing]]:
        blocks = [plan.blocks[0] for plan in plans if plan.blocks]
        self.calls.append(blocks)
        unpruned = Timing((0.01, 0.02))
        return [(Timing(tuple(t / self.speeds[b] for t in unpruned.samples)), unpruned) for b in blocks]


def chooser(
    drops: Mapping[int, float],
    images: Images | None = None,
    clock: Clock | None = None,
    measure: Any = "flops",
) -> Chooser:
    judge = Judge(Savings(measure, SHARES, {}, "made up"), None)
    found = {only(block): Fidelity(1 - drop, drop / 10, None) for block, drop in drops.items()}
    own: Any = images if images is not None else Images({})
    timer: Any = clock
    return Chooser(judge, judge, found, own, timer, Path("tried.json"))


def test_the_fastest_that_keeps_to_the_budget_on_both_sets_is_taken() -> None:
    images = Images({30: 0.5, 29: 0.02, 28: 0.01})
    own = chooser({block: 0.01 for block in range(1, 31)}, images)
    assert own.choose(Goal(budget=0.01)) == only(28)
    assert images.calls == [[30, 29, 28, 27]] and list(own.verified) == [only(b) for b in (30, 29, 28, 27)]
    assert own.warnings == [
        "2 faster plans keep to the budget on the images that they were chosen by, but not on the others; more images "
        "to calibrate on would tell them apart"
    ]
    # What was run is not run again.
    own.verify([only(28), only(1), only(1)])
    assert images.calls[1:] == [[1]] and own.verified[only(1)].agreement == 1
    own.verify([only(1)])
    assert len(images.calls) == 2


def test_one_plan_that_is_passed_over_is_told_of_and_none_is_not() -> None:
    own = chooser({3: 0.0, 2: 0.0}, Images({3: 0.5}))
    assert own.choose(Goal(budget=0.0)) == only(2)
    assert [text.split(";")[0] for text in own.warnings] == [
        "1 faster plan keeps to the budget on the images that it was chosen by, but not on the others"
    ]
    own = chooser({3: 0.0, 2: 0.0})
    assert own.choose(Goal(budget=0.0)) == only(3) and own.warnings == []


def test_so_many_are_verified_and_no_more() -> None:
    drops = {block: 0.5 for block in range(2, 31)} | {2: 0.4}
    images = Images({**drops, 20: 0.3})
    own = chooser({block: 0.0 for block in drops}, images)
    with pytest.raises(GoalError) as refused:
        own.choose(Goal(budget=0.1))
    assert [len(call) for call in images.calls] == [AT_ONCE] * (VERIFIED // AT_ONCE)
    assert str(refused.value) == (
        "the budget of 10.00% cannot be kept: 29 plans keep it on the images that they were chosen by, but none of the "
        "fastest 16 does on the others; the most careful of these loses 30.00% there: block 20 at stride 2 (1.250 "
        "times as fast by flops, a drop of 0.00% on the images to calibrate on); allow more. All that was tried is in "
        "tried.json"
    )
    # The last of them may do, and one beyond them is not looked at.
    images = Images({block: 0.5 for block in range(16, 31)})
    assert chooser({block: 0.0 for block in drops}, images).choose(Goal(budget=0.1)) == only(15)
    images = Images({block: 0.5 for block in range(15, 31)})
    with pytest.raises(GoalError, match="none of the fastest 16"):
        chooser({block: 0.0 for block in drops}, images).choose(Goal(budget=0.1))


def test_a_budget_that_nothing_keeps_or_nothing_faster_does() -> None:
    with pytest.raises(GoalError, match=r"the most careful plan that was found is block 2 at .*allow more"):
        chooser({2: 0.2, 3: 0.3, 5: 0.25}).choose(Goal(budget=0.1))
    own = chooser({2: 0.0})
    own.judge = Judge(Savings("flops", {(2, 2): 0.0}, {}, "made up"), None)
    with pytest.raises(GoalError, match="no plan that was tried is faster than the unpruned model"):
        own.choose(Goal(budget=0.1))


def test_of_those_that_are_fast_enough_the_one_that_costs_the_least_is_taken() -> None:
    own = chooser({10: 0.0, 20: 0.02, 25: 0.01, 30: 0.03})
    assert own.choose(Goal(speedup=1.25)) == only(25)
    assert own.beside(only(20)) == only(25) and own.beside(only(30)) == only(30)
    assert chooser({10: 0.0}).beside(only(30)) == only(30)
    with pytest.raises(GoalError) as refused:
        own.choose(Goal(speedup=2.0))
    assert str(refused.value) == (
        "a speed of 2 times cannot be reached: the fastest plan that was found is block 30 at stride 2 (1.429 times "
        "as fast by flops, a drop of 3.00% on the images to calibrate on); ask for less. All that was tried is in "
        "tried.json"
    )


def test_plans_are_timed_once_and_in_milliseconds() -> None:
    clock = Clock({3: 2.0, 4: 4.0})
    own = chooser({3: 0.0, 4: 0.0}, clock=clock, measure="time")
    own.time([only(3), only(3)])
    own.time([only(4), only(3)])
    own.time([only(4)])
    assert clock.calls == [[3], [4]]
    found = own.measured[only(3)]
    assert found.pop("quartiles") == pytest.approx([2.0, 2.0])
    assert found == pytest.approx({"speed": 2.0, "median_ms": 7.5, "unpruned_ms": 15.0})
    assert own.measured[only(4)]["speed"] == pytest.approx(4.0)
    without = chooser({3: 0.0})
    without.time([only(3)])
    assert without.measured == {}


def test_where_speed_is_a_time_plans_are_timed_until_one_is_fast_enough() -> None:
    drops = {10: 0.0, 15: 0.01, 20: 0.02, 25: 0.03, 28: 0.04, 30: 0.05}
    # As fast as the sums say: the cheapest of those that reach it.
    clock = Clock({block: 1 / (1 - block / 100) for block in drops})
    assert chooser(drops, clock=clock, measure="time").choose(Goal(speedup=1.15)) == only(15)
    assert clock.calls == [[15, 20, 25, 28]]
    # Times stay behind the sums, so that faster ones are asked for.
    clock = Clock({block: 1 / (1 - block / 100) / 1.12 for block in drops})
    assert chooser(drops, clock=clock, measure="time").choose(Goal(speedup=1.2)) == only(28)
    assert clock.calls == [[20, 25, 28, 30]]
    # The times of the first round stay so far behind that the sum of block 30 alone promises enough for the next.
    drops |= {block: 0.001 * block for block in (16, 17, 18, 19)}
    clock = Clock({block: 1.0 if block < 20 else 1.3 for block in drops})
    assert chooser(drops, clock=clock, measure="time").choose(Goal(speedup=1.15)) == only(30)
    assert clock.calls == [[15, 16, 17, 18], [30]]


def test_a_speed_that_no_plan_has_when_it_is_timed_is_given_up() -> None:
    drops = {block: block / 1000 for block in range(5, 31)}
    clock = Clock({block: 1.01 + block / 10_000 for block in drops})
    with pytest.raises(GoalError) as refused:
        chooser(drops, clock=clock, measure="time").choose(Goal(speedup=1.25))
    assert len(clock.calls) == ROUNDS and [len(call) for call in clock.calls] == [AT_ONCE] * ROUNDS
    assert str(refused.value) == (
        "a speed of 1.25 times cannot be reached: of 12 plans that were timed by themselves the fastest is 1.013 times "
        "as fast as the unpruned model, block 30 at stride 2 (1.429 times as fast by time, a drop of 3.00% on the "
        "images to calibrate on); ask for less. All that was tried is in tried.json"
    )


def test_noise_is_told_of_where_times_were_wanted() -> None:
    own = chooser({3: 0.5}, clock=Clock({}))
    words = "Times were too noisy to choose by, so speeds are ratios of operations"
    with pytest.raises(GoalError, match=words):
        own.choose(Goal(budget=0.1))
    for other in (chooser({3: 0.5}), chooser({3: 0.5}, clock=Clock({}), measure="time")):
        with pytest.raises(GoalError) as refused:
            other.choose(Goal(budget=0.1))
        assert words not in str(refused.value)


def test_several_blocks_are_named_as_several() -> None:
    own = chooser({})
    own.found = {Candidate((3, 7), 2): Fidelity(0.5, 0.1, None)}
    with pytest.raises(GoalError, match="is blocks 3, 7 at stride 2"):
        own.choose(Goal(budget=0.1))
