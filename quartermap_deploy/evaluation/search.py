"""The search for the set of blocks to prune: all sets for small models, else a guided search that runs what it names.

Three things make the search short. A pruned block saves nearly the same whatever else is pruned, so the saving of a set
is the sum of its blocks' savings. Divergences add up roughly, which orders sets before they are run. And sets that take
blocks in the order of divergence for each part saved are the best ones if divergences add up exactly; the search starts
from them and exchanges blocks as long as that helps. What is chosen has always been run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from quartermap_deploy.errors import InputError
from quartermap_deploy.evaluation.fidelity import Fidelity, Form
from quartermap_deploy.evaluation.savings import Savings
from quartermap_deploy.pruning.plan import QuarterMap, Subsample

AT_ONCE = 8
"""Sets that a round of the guided search runs."""


@dataclass(frozen=True, order=True)
class Candidate:
    """A set of blocks, and the stride at which they are subsampled.

    Attributes:
        blocks: numbers of the pruned blocks, in order.
        stride: the plan's stride.
    """

    blocks: tuple[int, ...]
    stride: int

    @property
    def plan(self) -> QuarterMap:
        """The plan that prunes so."""
        return QuarterMap(blocks=self.blocks, stride=self.stride)

    def form(self, count: int) -> Form:
        """Return how each of a model's `count` blocks is subsampled."""
        subsample = Subsample(self.stride)
        return tuple(subsample if block in self.blocks else None for block in range(1, count + 1))


@dataclass(frozen=True)
class Goal:
    """What a plan is to reach; exactly one of the two.

    Attributes:
        budget: largest drop, a share of the images; then the fastest plan is wanted.
        speedup: least speed relative to the unpruned model; then the plan with the smallest drop is wanted.

    Raises:
        InputError: if there is not exactly one, or it is out of range.
    """

    budget: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.speedup is None):
            raise InputError("a goal is either a budget or a speed-up; give one of them")
        if self.budget is not None and not 0 <= self.budget < 1:
            raise InputError(
                f"budget = {self.budget} is no share of images; expected 0 to 1, as 0.01 for one in 100"
            )
        if self.speedup is not None and not 1 < self.speedup < float("inf"):
            raise InputError(f"speedup = {self.speedup} must be more than 1, the speed of the unpruned model")


@dataclass(frozen=True)
class Judge:
    """Orders candidates by what they cost and save.

    Attributes:
        savings: what each block saves.
        accuracy: of the unpruned model on the images that candidates were run on; None judges by agreement.
    """

    savings: Savings
    accuracy: float | None

    def speed(self, candidate: Candidate) -> float:
        """Speed relative to the unpruned model, by the sum of the savings."""
        return self.savings.speed(candidate.blocks, candidate.stride)

    def drop(self, found: Fidelity) -> float:
        """Share of the images that is lost: of accuracy with labels, else of agreement; never less than 0."""
        if self.accuracy is None or found.accuracy is None:
            return 1 - found.agreement
        # A set that names more images right than the unpruned model was lucky, and is preferred to no other for that.
        return max(self.accuracy - found.accuracy, 0.0)

    def cost(self, found: Fidelity) -> tuple[float, float]:
        """What orders candidates by their answers: the drop, and the divergence where drops are equal."""
        return self.drop(found), found.divergence

    def satisfying(self, goal: Goal, found: Mapping[Candidate, Fidelity]) -> list[Candidate]:
        """The candidates that reach a goal, the best first."""
        if goal.budget is not None:
            # The rounding of a share must not shut out what is just allowed.
            within = [c for c, f in found.items() if self.drop(f) <= goal.budget + 1e-9 and self.speed(c) > 1]
            return sorted(within, key=lambda c: (-self.speed(c), self.cost(found[c]), c))
        assert goal.speedup is not None
        return self.at_least(goal.speedup, found)

    def at_least(self, speed: float, found: Mapping[Candidate, Fidelity]) -> list[Candidate]:
        """The candidates of at least this speed, the one that costs the least first."""
        fast = [c for c in found if self.speed(c) >= speed - 1e-9]
        return sorted(fast, key=lambda c: (self.cost(found[c]), -self.speed(c), c))

    def front(self, found: Mapping[Candidate, Fidelity]) -> list[Candidate]:
        """The candidates that none other beats in both speed and cost, the slowest first."""
        best: list[Candidate] = []
        for candidate in sorted(found, key=lambda c: (-self.speed(c), self.cost(found[c]), c)):
            if not best or self.cost(found[candidate]) < self.cost(found[best[-1]]):
                best.append(candidate)
        return best[::-1]


Run = Callable[[Sequence[Candidate]], Mapping[Candidate, Fidelity]]
"""Runs candidates."""


def search(
    blocks: Sequence[int],
    strides: Sequence[int],
    goal: Goal,
    judge: Judge,
    run: Run,
    *,
    evaluations: int,
    also: Iterable[Candidate] = (),
) -> dict[Candidate, Fidelity]:
    """Run candidates until the goal is reached as well as can be found.

    The same arguments lead to the same candidates in the same order, whatever `run` remembers.

    Args:
        blocks: that may be pruned.
        strides: to choose from; a plan has one for all its blocks.
        goal: what is wanted.
        judge: orders the candidates.
        run: runs them.
        evaluations: how many may be run. If all sets are no more than that, all are; otherwise single blocks, the sets
            that the search starts from and `also` are run in any case, and the search ends when the number is reached.
        also: more candidates to run and to choose from.

    Returns:
        All that were run.
    """
    found: dict[Candidate, Fidelity] = {}

    def run_new(candidates: Iterable[Candidate]) -> None:
        found.update(run([candidate for candidate in dict.fromkeys(candidates) if candidate not in found]))

    if count_sets(blocks, strides) <= evaluations:
        run_new([*every_set(blocks, strides), *also])
        return found
    singles = {stride: [Candidate((block,), stride) for block in blocks] for stride in strides}
    run_new([*itertools.chain.from_iterable(singles.values()), *also])
    divergence = {c: found[c].divergence for group in singles.values() for c in group}
    run_new(c for group in singles.values() for c in _chain(group, divergence, judge))
    best: Candidate | None = None
    while len(found) < evaluations:
        satisfying = judge.satisfying(goal, found)
        if satisfying and satisfying[0] == best:
            break
        best = satisfying[0] if satisfying else None
        promising = _promising(blocks, goal, judge, found, divergence, best)
        if not promising:
            break
        run_new(promising[: min(AT_ONCE, evaluations - len(found))])
    return found


def count_sets(blocks: Sequence[int], strides: Sequence[int]) -> int:
    """How many candidates there are."""
    return len(strides) * ((1 << len(blocks)) - 1)


def every_set(blocks: Sequence[int], strides: Sequence[int]) -> Iterator[Candidate]:
    """Every set of blocks but the empty one, at every stride."""
    for stride in strides:
        for size in range(1, len(blocks) + 1):
            for chosen in itertools.combinations(sorted(blocks), size):
                yield Candidate(chosen, stride)


def _chain(
    singles: Sequence[Candidate], divergence: Mapping[Candidate, float], judge: Judge
) -> list[Candidate]:
    """Sets of 2, 3, … blocks in the order of divergence for each part saved; blocks that save nothing come last."""

    def order(single: Candidate) -> tuple[float, float]:
        saved = 1 - 1 / judge.speed(single)
        return (divergence[single] / saved, 0.0) if saved > 0 else (float("inf"), -saved)

    ordered = [single.blocks[0] for single in sorted(singles, key=order)]
    stride = singles[0].stride
    return [Candidate(tuple(sorted(ordered[:count])), stride) for count in range(2, len(ordered) + 1)]


def _promising(
    blocks: Sequence[int],
    goal: Goal,
    judge: Judge,
    found: Mapping[Candidate, Fidelity],
    divergence: Mapping[Candidate, float],
    best: Candidate | None,
) -> list[Candidate]:
    """Sets that were not run and may be better than the best, the most promising first.

    They are a step away from the best or from the front: a block more, a block less, or one exchanged. How much they
    diverge is foreseen from the set that they are a step away from.
    """
    foreseen: dict[Candidate, float] = {}
    for base in {*judge.front(found), *([best] if best else [])}:
        for near in _steps(base, blocks):
            if near not in found:
                change = sum(
                    divergence[Candidate((b,), base.stride)] for b in {*near.blocks} - {*base.blocks}
                )
                change -= sum(
                    divergence[Candidate((b,), base.stride)] for b in {*base.blocks} - {*near.blocks}
                )
                guess = max(found[base].divergence + change, 0.0)
                foreseen[near] = min(guess, foreseen.get(near, guess))
    if goal.speedup is not None:
        wanted = goal.speedup
        usable = [c for c in foreseen if judge.speed(c) >= wanted - 1e-9]
    else:
        fastest = judge.speed(best) if best else 1.0
        usable = [c for c in foreseen if judge.speed(c) > fastest]
    return sorted(usable, key=lambda c: (foreseen[c], -judge.speed(c), c))


def _steps(base: Candidate, blocks: Sequence[int]) -> Iterator[Candidate]:
    inside, outside = base.blocks, [block for block in blocks if block not in base.blocks]
    for block in outside:
        yield Candidate(tuple(sorted((*inside, block))), base.stride)
    for gone in inside:
        rest = tuple(block for block in inside if block != gone)
        if rest:
            yield Candidate(rest, base.stride)
        for block in outside:
            yield Candidate(tuple(sorted((*rest, block))), base.stride)
