"""The choice among the plans that were tried: verified on other images, and timed by itself where speed is a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quartermap_deploy.errors import GoalError
from quartermap_deploy.evaluation.fidelity import Fidelity
from quartermap_deploy.evaluation.savings import PlanTimer
from quartermap_deploy.evaluation.search import Candidate, Goal, Judge
from quartermap_deploy.evaluation.trial import Trial
from quartermap_deploy.progress import SILENT, Progress

VERIFIED = 16
"""Candidates within the budget on the calibration images that are tried on the other ones, the fastest first."""

AT_ONCE = 4
"""Candidates that are verified or timed before it is seen whether one will do."""

ROUNDS = 3
"""Times that candidates are timed, each time faster ones, before a speed-up is given up."""


class Chooser:
    """Chooses among candidates that were run on the calibration images.

    Attributes:
        judge: orders candidates on the calibration images.
        verifier: orders them on the other images.
        found: the candidates to choose from.
        verified: those that were run on the other images.
        measured: those that were timed: `speed` relative to the unpruned model, its `quartiles`, and `median_ms`.
        warnings: what has to be known about the choice.
    """

    def __init__(
        self,
        judge: Judge,
        verifier: Judge,
        found: Mapping[Candidate, Fidelity],
        verification: Trial,
        timer: PlanTimer | None,
        kept: Path,
        progress: Progress = SILENT,
    ) -> None:
        self.judge, self.verifier, self.found = judge, verifier, found
        self.verified: dict[Candidate, Fidelity] = {}
        self.measured: dict[Candidate, dict[str, Any]] = {}
        self.warnings: list[str] = []
        self._verification, self._timer, self._kept, self._progress = verification, timer, kept, progress

    def choose(self, goal: Goal) -> Candidate:
        """Return the best candidate that reaches a goal.

        Raises:
            GoalError: if there is none.
        """
        if goal.budget is not None:
            return self._within(goal.budget)
        assert goal.speedup is not None
        ranking = self.judge.satisfying(goal, self.found)
        unmet = f"a speed of {goal.speedup:g} times cannot be reached"
        if not ranking:
            best = max(self.found, key=self.judge.speed)
            raise self._error(
                f"{unmet}: the fastest plan that was found is {self._words(best)}; ask for less"
            )
        if self.judge.savings.measure == "time":
            return self._timed(goal.speedup, unmet)
        return ranking[0]

    def beside(self, other: Candidate) -> Candidate:
        """Return the candidate that costs the least among those that are at least as fast as another one."""
        return next(iter(self.judge.at_least(self.judge.speed(other), self.found)), other)

    def verify(self, candidates: Iterable[Candidate]) -> None:
        """Run candidates on the other images, unless that was done."""
        new = [c for c in dict.fromkeys(candidates) if c not in self.verified]
        if new:
            with self._progress.step(f"running {len(new)} plans on {self._verification.dataset.name}"):
                self.verified |= self._verification.run(new)

    def time(self, candidates: Iterable[Candidate]) -> None:
        """Time candidates, unless that was done, or speed is counted."""
        new = [c for c in dict.fromkeys(candidates) if c not in self.measured]
        if self._timer is None or not new:
            return
        for candidate, (pruned, unpruned) in zip(new, self._timer.times([c.plan for c in new]), strict=True):
            self.measured[candidate] = {
                "speed": unpruned.ratio(pruned),
                "quartiles": list(unpruned.ratio_spread(pruned)),
                "median_ms": pruned.median * 1e3,
                "unpruned_ms": unpruned.median * 1e3,
            }

    def _within(self, budget: float) -> Candidate:
        """The fastest candidate that keeps to a budget on both sets of images."""
        unmet = f"the budget of {budget:.2%} cannot be kept"
        faster = [c for c in self.found if self.judge.speed(c) > 1]
        if not faster:
            raise self._error(f"{unmet}: no plan that was tried is faster than the unpruned model")
        ranking = self.judge.satisfying(Goal(budget=budget), self.found)
        if not ranking:
            best = min(faster, key=lambda c: self.judge.cost(self.found[c]))
            raise self._error(
                f"{unmet}: the most careful plan that was found is {self._words(best)}; allow more"
            )
        for start in range(0, min(len(ranking), VERIFIED), AT_ONCE):
            part = ranking[start : start + AT_ONCE]
            self.verify(part)
            for number, candidate in enumerate(part, start):
                if self.verifier.drop(self.verified[candidate]) <= budget + 1e-9:
                    self._warn_of_passed_over(number)
                    return candidate
        best = min(self.verified, key=lambda c: self.verifier.cost(self.verified[c]))
        raise self._error(
            f"{unmet}: {len(ranking)} plans keep it on the images that they were chosen by, but none of the fastest "
            f"{len(self.verified)} does on the others; the most careful of these loses "
            f"{self.verifier.drop(self.verified[best]):.2%} there: {self._words(best)}; allow more"
        )

    def _warn_of_passed_over(self, number: int) -> None:
        if number:
            plans, they = ("plan keeps", "it was") if number == 1 else ("plans keep", "they were")
            self.warnings.append(
                f"{number} faster {plans} to the budget on the images that {they} chosen by, but not on the others; "
                "more images to calibrate on would tell them apart"
            )

    def _timed(self, wanted: float, unmet: str) -> Candidate:
        """The candidate that costs the least of those that are fast enough when timed themselves."""
        needed = wanted
        for _ in range(ROUNDS):
            ranking = self.judge.at_least(needed, self.found)
            new = [c for c in ranking if c not in self.measured]
            # Where the sums promise nothing any more, the plans that they call the fastest are the last hope.
            new = new or sorted(set(self.found) - set(self.measured), key=lambda c: (-self.judge.speed(c), c))
            self.time(new[:AT_ONCE])
            fast = [c for c, times in self.measured.items() if times["speed"] >= wanted]
            if fast:
                return min(fast, key=lambda c: (self.judge.cost(self.found[c]), c))
            # How far a time stays behind the sum of the savings of single blocks tells what sum is needed.
            behind = [times["speed"] / self.judge.speed(c) for c, times in self.measured.items()]
            needed = wanted / max(min(behind), 0.5)
        best = max(self.measured, key=lambda c: float(self.measured[c]["speed"]))
        raise self._error(
            f"{unmet}: of {len(self.measured)} plans that were timed by themselves the fastest is "
            f"{self.measured[best]['speed']:.3f} times as fast as the unpruned model, {self._words(best)}; ask for less"
        )

    def _words(self, candidate: Candidate) -> str:
        numbers = ", ".join(map(str, candidate.blocks))
        return (
            f"block{'s' if len(candidate.blocks) > 1 else ''} {numbers} at stride {candidate.stride} "
            f"({self.judge.speed(candidate):.3f} times as fast by {self.judge.savings.measure}, a drop of "
            f"{self.judge.drop(self.found[candidate]):.2%} on the images to calibrate on)"
        )

    def _error(self, text: str) -> GoalError:
        if self._timer is not None and self.judge.savings.measure != "time":
            text += ". Times were too noisy to choose by, so speeds are ratios of operations"
        return GoalError(f"{text}. All that was tried is in {self._kept}")
