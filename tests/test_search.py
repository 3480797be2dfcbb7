"""The search for the set of blocks: against running every set, on costs that add up and on costs that do not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quartermap_deploy.architectures import create_model
from quartermap_deploy.errors import InputError
from quartermap_deploy.evaluation.fidelity import Fidelity, fidelity
from quartermap_deploy.evaluation.savings import Savings, counted_savings
from quartermap_deploy.evaluation.search import Candidate, Goal, Judge, _chain, count_sets, every_set, search
from quartermap_deploy.pruning import QuarterMap, Subsample, prune

BLOCKS = tuple(range(1, 9))


def savings(values: Sequence[float], strides: Sequence[int] = (2,)) -> Savings:
    shares = {(block, stride): value for stride in strides for block, value in enumerate(values, start=1)}
    return Savings("flops", shares, {}, "made up")


def oracle(
    costs: Sequence[float], interaction: float, seed: int, calls: list[Candidate] | None = None
) -> Callable[[Sequence[Candidate]], Mapping[Candidate, Fidelity]]:
    """Candidates whose divergence is the sum of their blocks' costs, with a share of it more or less for each pair."""
    random = np.random.default_rng(seed)
    pairs = random.uniform(-1, 1, (len(costs) + 1, len(costs) + 1))

    def run(candidates: Sequence[Candidate]) -> Mapping[Candidate, Fidelity]:
        found = {}
        for candidate in candidates:
            divergence = sum(costs[block - 1] for block in candidate.blocks)
            for one, other in itertools.combinations(candidate.blocks, 2):
                divergence += interaction * pairs[one, other] * min(costs[one - 1], costs[other - 1])
            divergence = max(divergence, 0.0) * (1 + 0.2 * (candidate.stride - 2))
            found[candidate] = Fidelity(1 - min(divergence, 1.0), divergence, None)
            if calls is not None:
                calls.append(candidate)
        return found

    return run


costs = st.lists(st.floats(0.001, 0.2), min_size=8, max_size=8)
shares = st.lists(st.floats(0.005, 0.09), min_size=8, max_size=8)
goals = st.one_of(
    st.floats(1.02, 1.5).map(lambda speed: Goal(speedup=speed)),
    st.floats(0.01, 0.5).map(lambda drop: Goal(budget=drop)),
)


@given(costs, shares, goals, st.integers(0, 99))
def test_all_sets_are_run_where_there_are_few(
    cost: list[float], share: list[float], goal: Goal, seed: int
) -> None:
    judge, run = Judge(savings(share), None), oracle(cost, 0.5, seed)
    found = search(BLOCKS, (2,), goal, judge, run, evaluations=255)
    assert set(found) == set(every_set(BLOCKS, (2,))) and len(found) == count_sets(BLOCKS, (2,)) == 255


@given(costs, shares, goals, st.integers(0, 99), st.sampled_from([(2,), (3, 2)]))
def test_the_guided_search_comes_close_to_running_all(
    cost: list[float], share: list[float], goal: Goal, seed: int, strides: tuple[int, ...]
) -> None:
    """With a tenth to a third of the runs, and pairs that cost up to a third more or less together than alone."""
    judge, run = Judge(savings(share, strides), None), oracle(cost, 0.3, seed)
    everything = run(list(every_set(BLOCKS, strides)))
    found = search(BLOCKS, strides, goal, judge, run, evaluations=90)
    assert len(found) <= 90
    best, ours = judge.satisfying(goal, everything), judge.satisfying(goal, found)
    assert bool(ours) == bool(best)
    if best and goal.speedup is not None:
        assert judge.speed(ours[0]) >= goal.speedup - 1e-9
        assert judge.drop(found[ours[0]]) <= judge.drop(everything[best[0]]) * 1.1 + 0.005
    elif best:
        assert goal.budget is not None and judge.drop(found[ours[0]]) <= goal.budget + 1e-9
        assert judge.speed(ours[0]) - 1 >= (judge.speed(best[0]) - 1) * 0.9


@given(costs, shares, goals)
def test_what_adds_up_is_solved(cost: list[float], share: list[float], goal: Goal) -> None:
    """If costs add up, sets in the order of cost for each part saved are on the front; the search begins with them."""
    judge, run = Judge(savings(share), None), oracle(cost, 0.0, 0)
    everything = run(list(every_set(BLOCKS, (2,))))
    found = search(BLOCKS, (2,), goal, judge, run, evaluations=120)
    best, ours = judge.satisfying(goal, everything), judge.satisfying(goal, found)
    assert bool(ours) == bool(best)
    if best:
        assert judge.drop(found[ours[0]]) <= judge.drop(everything[best[0]]) + 0.02 or goal.speedup is None
        assert judge.speed(ours[0]) >= judge.speed(best[0]) * 0.98 or goal.budget is None


def test_the_search_is_the_same_every_time_and_runs_nothing_twice() -> None:
    random = np.random.default_rng(0)
    cost, share = random.uniform(0.001, 0.1, 8).tolist(), random.uniform(0.01, 0.08, 8).tolist()
    judge = Judge(savings(share), None)
    calls: list[list[Candidate]] = [[], []]
    for own in calls:
        search(BLOCKS, (2,), Goal(speedup=1.25), judge, oracle(cost, 0.3, 0, own), evaluations=60)
    assert calls[0] == calls[1] and len(set(calls[0])) == len(calls[0]) <= 60


def test_blocks_that_save_nothing_are_left_alone() -> None:
    judge = Judge(savings([0.1, -0.02, 0.0, 0.1, 0.1, 0.1, 0.1, 0.1]), None)
    run = oracle([0.01, 0.0001, 0.0001, *[0.01] * 5], 0.0, 0)
    found = search(BLOCKS, (2,), Goal(speedup=2.4), judge, run, evaluations=60)
    best = judge.satisfying(Goal(speedup=2.4), found)[0]
    assert best.blocks == (1, 4, 5, 6, 7, 8)


# Judging --------------------------------------------------------------------------------------------------------


def test_the_front_is_what_nothing_beats() -> None:
    random = np.random.default_rng(1)
    judge = Judge(savings(random.uniform(0.01, 0.1, 8).tolist()), None)
    found = oracle(random.uniform(0.001, 0.1, 8).tolist(), 0.5, 1)(list(every_set(BLOCKS, (2,))))
    front = judge.front(found)
    for one in found:
        beaten = [
            c
            for c in front
            if judge.speed(c) >= judge.speed(one) and judge.cost(found[c]) <= judge.cost(found[one])
        ]
        assert beaten, one
    speeds = [judge.speed(c) for c in front]
    assert speeds == sorted(speeds) and [judge.cost(found[c]) for c in front] == sorted(
        judge.cost(found[c]) for c in front
    )


def test_with_labels_luck_is_no_merit() -> None:
    """Of two plans that lose nothing, the one that stays closer to the unpruned model is the better one."""
    judge = Judge(savings([0.1, 0.1]), accuracy=0.9)
    lucky, close = Candidate((1,), 2), Candidate((2,), 2)
    found = {lucky: Fidelity(0.8, 0.5, 0.95), close: Fidelity(1.0, 0.001, 0.9)}
    assert judge.drop(found[lucky]) == judge.drop(found[close]) == 0
    assert judge.satisfying(Goal(speedup=1.05), found) == [close, lucky]
    # Without labels the lucky one has lost a fifth of the answers.
    assert Judge(savings([0.1, 0.1]), None).drop(found[lucky]) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "goal",
    [
        {},
        {"budget": 0.1, "speedup": 2.0},
        {"budget": 1.0},
        {"budget": -0.1},
        {"speedup": 1.0},
        {"speedup": float("inf")},
    ],
)
def test_goals_that_are_none(goal: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Goal(**goal)


def made(drop: float, divergence: float) -> Fidelity:
    return Fidelity(1 - drop, divergence, None)


def test_candidates_are_ordered_by_what_they_cost_and_then_by_speed() -> None:
    judge = Judge(savings([0.1, 0.2, 0.2, 0.3]), None)
    a, b, c, d = (Candidate((block,), 2) for block in range(1, 5))
    found = {a: made(0.0, 0.1), b: made(0.0, 0.1), c: made(0.25, 0.0), d: made(0.5, 0.9)}
    assert judge.at_least(1 / 0.9, found) == [b, a, c, d]
    assert judge.at_least(1.2, found) == [b, c, d]
    assert judge.at_least(1.5, found) == []
    # The fastest within a budget, that which costs less of two that are equally fast.
    assert judge.satisfying(Goal(budget=0.25), found) == [b, c, a]
    assert judge.satisfying(Goal(budget=0.2), found) == [b, a]
    assert judge.front(found) == [b, d]
    assert judge.cost(found[c]) == (0.25, 0.0)


def test_a_goal_may_allow_no_loss_at_all() -> None:
    assert Goal(budget=0.0).budget == 0.0
    judge = Judge(savings([0.1, 0.2]), None)
    kept, lost = Candidate((1,), 2), Candidate((2,), 2)
    found = {kept: made(0.0, 0.1), lost: made(0.001, 0.1)}
    assert judge.satisfying(Goal(budget=0.0), found) == [kept]


def test_a_candidate_says_how_each_block_is_subsampled() -> None:
    assert Candidate((1, 3), 3).form(4) == (Subsample(3), None, Subsample(3), None)
    assert Candidate((2,), 2).plan == QuarterMap(blocks=(2,), stride=2)


def test_sets_are_counted_and_listed_at_every_stride() -> None:
    assert count_sets((1, 2, 5), (2, 3)) == 14
    listed = list(every_set((5, 1, 2), (2, 3)))
    assert len(listed) == len(set(listed)) == 14
    assert [c.blocks for c in listed[:7]] == [(1,), (2,), (5,), (1, 2), (1, 5), (2, 5), (1, 2, 5)]
    assert [c.stride for c in listed] == [2] * 7 + [3] * 7


def test_a_search_runs_single_blocks_then_sets_in_order_of_cost_for_what_they_save() -> None:
    """Of 8 blocks with few runs: each alone, what was asked for, and the sets that the search starts from."""
    judge = Judge(savings([0.08, 0.01, 0.04, 0.0, -0.01, 0.05, 0.02, 0.03]), None)
    costs = [0.008, 0.02, 0.02, 0.001, 0.001, 0.002, 0.05, 0.009]
    calls: list[Candidate] = []
    also = Candidate((4, 5), 2)
    search(BLOCKS, (2,), Goal(speedup=1.1), judge, oracle(costs, 0.0, 0, calls), evaluations=16, also=[also])
    assert calls[:9] == [*(Candidate((block,), 2) for block in BLOCKS), also]
    # Cost for each part saved: 0.1, 2, 0.5, nothing saved, less, 0.04, 2.5, 0.3.
    in_order = [6, 1, 8, 3, 2, 7, 4, 5]
    assert calls[9:16] == [Candidate(tuple(sorted(in_order[:count])), 2) for count in range(2, 9)]
    assert len(calls) == 16


def test_blocks_that_save_nothing_come_last_even_behind_those_that_lose_everything() -> None:
    judge = Judge(savings([0.1, -0.02, 0.1, 0.0]), None)
    singles = [Candidate((block,), 2) for block in (1, 2, 3, 4)]
    divergence = dict(zip(singles, [float("inf"), 0.0, 0.5, 0.0], strict=True))
    assert [c.blocks for c in _chain(singles, divergence, judge)] == [(1, 3), (1, 3, 4), (1, 2, 3, 4)]


# What it rests on -----------------------------------------------------------------------------------------------


def test_counted_savings_add_up_exactly() -> None:
    """Operations and positions of a plan are those of its blocks, whatever else is pruned."""
    from quartermap_deploy.complexity import measure

    model = create_model("vmamba_digits")
    before = measure(model, (64, 64))
    for blocks, stride in (((2, 3, 7), 2), ((1, 10), 3), (tuple(range(1, 11)), 2)):
        after = measure(prune(model, QuarterMap(blocks=blocks, stride=stride)), (64, 64))
        flops = counted_savings(model, (64, 64), (2, 3), "flops")
        assert flops.speed(blocks, stride) == pytest.approx(before.flops / after.flops, rel=1e-12)
        tokens = counted_savings(model, (64, 64), (2, 3), "tokens")
        assert tokens.speed(blocks, stride) == pytest.approx(before.tokens / after.tokens, rel=1e-12)
        assert Savings.from_dict(flops.to_dict()) == flops
    assert flops.note == "counted: multiply-accumulates, of pruned blocks in the paper's form"
    assert tokens.note == "counted: positions that the scans walk, of pruned blocks in the paper's form"


def test_forms_run_together_are_those_run_alone() -> None:
    """The tree of forms gives what `prune` gives, in any batch size, and leaves the model as it was."""
    import torch
    from helpers import reference

    for name in ("vmamba_s2_channel_first", "medmamba"):
        given = reference(name)
        model, images = given.model, torch.cat([given.input, given.input.flip(-1), -given.input]).float()
        count = sum(model.depths)
        candidates = [Candidate((1,), 2), Candidate((1, 2), 3), Candidate(tuple(range(1, count + 1)), 2)]
        forms = [
            (None,) * count,
            *(candidate.form(count) for candidate in candidates),
            candidates[0].form(count),
        ]
        model.blocks()[0].mixer.subsample = Subsample(3)
        try:
            found = fidelity(model, images.numpy(), forms, np.zeros(len(images), np.int64), batch=2)
            assert model.blocks()[0].mixer.subsample == Subsample(3)
        finally:
            model.blocks()[0].mixer.subsample = None
        with torch.inference_mode():
            expected = model(images).double()
            p = expected.softmax(dim=1)
            for candidate, entry in zip(candidates, found[1:], strict=False):
                logits = prune(model, candidate.plan)(images).double()
                q = logits.softmax(dim=1)
                assert entry.divergence == pytest.approx(
                    float((p * (p / q).log()).sum(dim=1).mean()), rel=1e-3
                )
                agreeing = logits.argmax(dim=1) == expected.argmax(dim=1)
                assert entry.agreement == pytest.approx(float(agreeing.double().mean()))
                assert entry.accuracy == pytest.approx(float((logits.argmax(dim=1) == 0).double().mean()))
        assert found[0].agreement == 1 and found[0].divergence == 0 and found[-1] == found[1]


def test_logits_that_are_no_numbers_agree_with_nothing() -> None:
    import torch

    model = create_model("vmamba_digits")
    with torch.no_grad():
        model.get_parameter("classifier.head.bias")[3] = float("nan")
    images = np.zeros((3, 3, 64, 64), np.float32)
    (found,) = fidelity(model, images, [(None,) * 10], np.zeros(3, np.int64))
    assert found.agreement == 0 == found.accuracy and found.divergence == float("inf")
