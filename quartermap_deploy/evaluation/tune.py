"""Which blocks to prune, and at which stride, to keep to a budget or to reach a speed-up.

    savings → answers of the unpruned model → search → choice, verified on other images → recipe, and all that was tried

Candidates are run in PyTorch, by the reference that every target is compared with. All that was run is kept in a file
beside the recipe from the first moment on: who stops a search loses nothing, and the next one goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quartermap_deploy.errors import GoalError, InputError, PlanError, RecipeError
from quartermap_deploy.evaluation.choice import Chooser
from quartermap_deploy.evaluation.datasets import Dataset, fingerprint
from quartermap_deploy.evaluation.fidelity import Fidelity
from quartermap_deploy.evaluation.runs import TORCH, on_device, weights_hash
from quartermap_deploy.evaluation.savings import PlanTimer, Savings, counted_savings
from quartermap_deploy.evaluation.search import Candidate, Goal, Judge, search
from quartermap_deploy.evaluation.subject import load_subject
from quartermap_deploy.evaluation.trial import Trial
from quartermap_deploy.evaluation.tried import Tried
from quartermap_deploy.evaluation.tune_options import TuneOptions
from quartermap_deploy.files import obstacle_to, write_whole
from quartermap_deploy.native.cpu_library import find_cpu_library
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.pruning.plan import QuarterMap
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.targets import load_target

if TYPE_CHECKING:
    from quartermap_deploy.architectures.base import VisualStateSpaceModel
    from quartermap_deploy.data.preprocessing import Preprocessing
    from quartermap_deploy.sources.architectures import ArchitectureSource

ENOUGH = 128
"""Images, below which shares of them say little."""
FIXED = range(1, 7)
"""The k of the plans "every k-th block" that the result is compared with."""
SAVED_AFTER = 16
"""Candidates after which what was tried is written."""


@dataclass(frozen=True)
class Tuned:
    """What a search came to.

    Attributes:
        recipe: the given recipe with the plan that was found.
        report: what the file beside the recipe holds.
        warnings: what has to be known before the result is believed.
    """

    recipe: Recipe
    report: Mapping[str, Any]
    warnings: tuple[str, ...]


def tune(
    recipe: Recipe,
    goal: Goal,
    calibration: Dataset,
    verification: Dataset,
    out: Path,
    options: TuneOptions | None = None,
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> Tuned:
    """Find a plan, verify it on other images, and write a recipe with it.

    Args:
        recipe: what is to be pruned; its own plan, if it has one, is not used.
        goal: what is wanted.
        calibration: images that plans are chosen by.
        verification: other images. With a budget, the fastest plan that keeps to it on them too is taken.
        out: the recipe to write, .toml. Beside it, as .json, all that was tried is written; if that file is there and
            belongs to the same model and images, what it holds is not run again.
        options: how to search.
        force: replace a recipe that is there, and what was tried for another model or other images.
        progress: told about the steps.

    Raises:
        GoalError: if no plan reaches the goal; the message names the best that was found, and what was tried is kept.
        InputError: if images or their labels do not fit the model, or none can be read.
        RecipeError: if there is something in the way of the recipe.
        QuartermapError: of the model or the target, if they are not to be had.
    """
    return _Tuning(recipe, goal, options or TuneOptions(), out, force, progress).run(
        calibration, verification
    )


def divide(dataset: Dataset, calibration: int, verification: int, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Divide a data set at random into images to calibrate on and others to verify on.

    Args:
        dataset: the images.
        calibration: how many to calibrate on; half of all if there are fewer than twice as many.
        verification: how many of the others to verify on at most.
        seed: of the draw.

    Raises:
        InputError: if there are fewer than two images.
    """
    if len(dataset) < 2:
        raise InputError(
            f"{dataset.name} has {len(dataset)} image; expected some to calibrate on and others to verify on"
        )
    order = np.random.RandomState(seed).permutation(len(dataset))
    count = min(calibration, len(dataset) // 2)
    return (
        dataset.subset(np.sort(order[:count])),
        dataset.subset(np.sort(order[count : count + verification])),
    )


class _Tuning:
    """One search, step by step; what later steps need of earlier ones."""

    source: ArchitectureSource
    tried: Tried

    def __init__(
        self, recipe: Recipe, goal: Goal, options: TuneOptions, out: Path, force: bool, progress: Progress
    ) -> None:
        self.recipe = dataclasses.replace(recipe, quartermap=None)
        self.goal, self.options, self.out, self.force, self.progress = goal, options, out, force, progress
        self.warnings: list[str] = []

    @property
    def model(self) -> VisualStateSpaceModel:
        """The model, unpruned."""
        return self.source.module

    def run(self, calibration: Dataset, verification: Dataset) -> Tuned:
        from quartermap_deploy.evaluation.tune_report import recipe_text, report

        _check_out(self.out, self.force)
        self._check_target()
        labels = _use_labels(self.options.labels, calibration, verification)
        calibration, verification = self._load_model(calibration, verification)
        blocks, fixed = self._blocks(), self._fixed()
        self.tried = self._open_tried(calibration, labels)
        self.calibration, other = self._trials(calibration, verification, labels)
        timer = self._timer()
        savings = self._savings(timer)
        judge = Judge(savings, self.calibration.unpruned.accuracy)
        found = search(
            blocks,
            self.options.strides,
            self.goal,
            judge,
            self._run,
            evaluations=self.options.evaluations,
            also=[c for c in fixed.values() if set(c.blocks) <= set(blocks)],
        )
        verifier = Judge(savings, other.unpruned.accuracy if labels else None)
        chooser = Chooser(judge, verifier, found, other, timer, self.tried.path, self.progress)

        def written(chosen: Candidate | None) -> dict[str, Any]:
            self.warnings += chooser.warnings
            return self.tried.write(
                report(
                    self.recipe, self.model, self.goal, self.options, chosen, chooser, self.tried.found, fixed
                )
                | {"calibration": self.calibration.to_dict(), "verification": other.to_dict()}
                | {"warnings": self.warnings}
            )

        try:
            chosen = chooser.choose(self.goal)
        except GoalError:
            # On a full disk the file stays what it was, which has all that was tried too.
            with contextlib.suppress(OSError):
                written(None)
            raise
        self._compare(chosen, fixed, chooser)
        recipe = dataclasses.replace(self.recipe, quartermap=chosen.plan)
        try:
            values = written(chosen)
            write_whole(self.out, recipe_text(recipe, self.out, values).encode())
        except OSError as error:
            raise RecipeError(
                f"cannot write {error.filename or self.out}: {error.strerror or error}. The plan that was found: "
                f"blocks = {list(chosen.blocks)}, stride = {chosen.stride}"
            ) from error
        return Tuned(recipe, values, tuple(self.warnings))

    def _check_target(self) -> None:
        """Refuse, before any work, a target or a provider that cannot run here; note a library that is passed over.

        Raises:
            QuartermapError: if so, as `Target.check` says.
        """
        target = self.options.target
        if (warning := find_cpu_library().warning) is not None:
            # Plans are run in PyTorch with it, too.
            self.warnings.append(warning)
        if target != TORCH and self.options.measure == "time":
            load_target(target).check(dataclasses.replace(self.recipe, targets=(target,)))

    def _load_model(self, calibration: Dataset, verification: Dataset) -> tuple[Dataset, Dataset]:
        """Load the model; returns the images with their classes as it counts them."""
        self.source = load_subject(self.recipe, self.progress)
        count, names = self.model.num_classes, self.source.labels
        calibration, verification = (
            dataset.for_model(count, names) for dataset in (calibration, verification)
        )
        if not self.source.weights.trained:
            self.warnings.append(
                f"{self.recipe.model} has newly initialised weights, so its answers, and what is chosen by them, mean "
                "nothing; give the trained ones"
            )
        # Both may be parts of one set.
        self.warnings += dict.fromkeys((*calibration.warnings, *verification.warnings))
        return calibration, verification

    def _trials(self, calibration: Dataset, verification: Dataset, labels: bool) -> tuple[Trial, Trial]:
        first = self._trial(calibration, labels)
        try:
            # Now, so that what cannot be written is told before the search.
            self.tried.write()
        except OSError as error:
            raise RecipeError(f"cannot write to {self.tried.path}: {error.strerror or error}") from error
        # Accuracy on the other images is worth knowing, whatever plans are judged by.
        second = self._trial(verification, verification.labelled)
        # On a full disk the file stays what it was, and the search goes on.
        with contextlib.suppress(OSError):
            self.tried.write()
        self.warnings += [
            *_image_warnings(first, "calibrate on", self.goal),
            *_image_warnings(second, "verify on", self.goal),
        ]
        return first, second

    def _trial(self, dataset: Dataset, labels: bool) -> Trial:
        """A trial, whose unpruned pass is not run again where it is known."""
        key = (dataset.fingerprint, labels)
        trial = Trial(
            on_device(self.model),
            dataset,
            self._preprocessing,
            labels=labels,
            known=self.tried.unpruned.get(key),
            progress=self.progress,
        )
        self.tried.unpruned[key] = trial.unpruned
        return trial

    @property
    def _preprocessing(self) -> Preprocessing:
        return self.source.image_preprocessing(self.source.inputs[0])

    def _open_tried(self, calibration: Dataset, labels: bool) -> Tried:
        """What was tried before."""
        preprocessing = self._preprocessing.to_dict()
        key = fingerprint(
            weights_hash(self.model).encode(),
            calibration.fingerprint.encode(),
            repr((preprocessing, labels)).encode(),
        )
        return Tried(self.out.with_suffix(".json"), key, self.force)

    def _blocks(self) -> tuple[int, ...]:
        """The blocks that may be pruned."""
        excluded, stages = self.options.exclude_stages, len(self.model.depths)
        if absent := [stage for stage in excluded if not 1 <= stage <= stages]:
            raise PlanError(f"stage {absent[0]} is to be excluded, but the model has stages 1 to {stages}")
        blocks = tuple(block.index for block in self.model.blocks() if block.stage not in excluded)
        if not blocks:
            raise PlanError("all stages are excluded, so there is no block to prune; exclude fewer")
        self._check_strides(blocks)
        return blocks

    def _check_strides(self, blocks: Sequence[int]) -> None:
        """Refuse strides that keep one position of every map: beyond the largest map they all do the same."""
        from quartermap_deploy.complexity import measure

        found = measure(self.model, self.source.size).blocks
        largest = max(max(block.map_size) for block in found if block.index in blocks)
        if (stride := max(self.options.strides)) > largest:
            raise PlanError(
                f"a stride of {stride} is more than the {largest} positions along the largest map of the blocks that "
                "may be pruned; take a smaller one"
            )

    def _fixed(self) -> dict[int, Candidate]:
        """The plans "every k-th block" by k; a short model has not all of them."""
        stride = 2 if 2 in self.options.strides else self.options.strides[0]
        fixed = {}
        for every in FIXED:
            with contextlib.suppress(PlanError):
                fixed[every] = Candidate(QuarterMap(every=every).select(self.model.depths), stride)
        return fixed

    def _timer(self) -> PlanTimer | None:
        options, images = self.options, self.calibration.images
        if options.measure != "time":
            return None
        batch = np.ascontiguousarray(images[np.arange(options.batch) % len(images)])
        return PlanTimer(self.recipe, self.source, options.target, batch, options.repeats, self.progress)

    def _savings(self, timer: PlanTimer | None) -> Savings:
        options, tried = self.options, self.tried
        size = self.source.size
        if timer is None:
            return counted_savings(self.model, size, options.strides, options.measure)
        key = {name: getattr(options, name) for name in ("target", "batch", "repeats")}
        key["strides"] = list(options.strides)
        key |= {} if self.recipe.execution.on_cpu else {"execution": str(self.recipe.execution)}
        if tried.savings is None or tried.savings_key != key:
            tried.savings, tried.savings_key = timer.savings(options.strides), key
            tried.write()
        if not tried.savings.noisy:
            return tried.savings
        self.warnings.append(
            f"what blocks save is lost in the noise of the times on {options.target}, so plans were chosen by "
            "operations, and speeds are ratios of them; a quieter machine, a larger --batch or more --repeats helps"
        )
        counted = counted_savings(self.model, size, options.strides, "flops")
        return dataclasses.replace(
            counted, note=f"{counted.note}; times on {options.target}, {timer.settings()}, were too noisy"
        )

    def _run(self, candidates: Sequence[Candidate]) -> dict[Candidate, Fidelity]:
        """Run candidates, unless that was done before."""
        found = self.tried.found
        # Sets with the same first blocks are run together, which runs these blocks once.
        new = sorted(set(candidates) - set(found), key=lambda c: (c.stride, c.blocks))
        if new:
            with self.progress.step(f"running {len(new)} plans", total=len(new)) as advance:
                for start in range(0, len(new), SAVED_AFTER):
                    part = new[start : start + SAVED_AFTER]
                    found.update(self.calibration.run(part))
                    # On a full disk the file stays what it was, and the search goes on.
                    with contextlib.suppress(OSError):
                        self.tried.write()
                    advance(len(part))
        return {candidate: found[candidate] for candidate in candidates}

    def _compare(self, chosen: Candidate, fixed: Mapping[int, Candidate], chooser: Chooser) -> None:
        """Verify and time what the choice is compared with: every k-th block, and what is at least as fast."""
        self._run(list(fixed.values()))
        compared = [chosen, *fixed.values(), *map(chooser.beside, fixed.values())]
        chooser.verify(compared)
        chooser.time(compared)
        times = chooser.measured.get(chosen)
        if times is not None and (warning := time_warning(times, self.options.target)):
            self.warnings.append(warning)


def time_warning(times: Mapping[str, Any], target: str) -> str | None:
    """What to know of a plan that was timed by itself and is not clearly faster than the unpruned model, or None."""
    speed, (low, high) = times["speed"], times["quartiles"]
    if speed <= 1:
        return f"timed by itself, the plan is no faster than the unpruned model on {target} ({speed:.3f} times as fast)"
    if low <= 1:
        return (
            f"timed by itself, the plan is {speed:.3f} times as fast, but the rounds scatter: half of them say "
            f"{low:.3f} to {high:.3f}; time it again on a quiet machine with `quartermap bench`, or give more --repeats"
        )
    return None


def _use_labels(wanted: bool | None, *datasets: Dataset) -> bool:
    without = next((dataset for dataset in datasets if not dataset.labelled), None)
    if wanted and without is not None:
        raise InputError(
            f"{without.name} has no labels; leave --labels out, and plans are judged by agreement"
        )
    return without is None if wanted is None else wanted


def _image_warnings(trial: Trial, purpose: str, goal: Goal) -> list[str]:
    count, warnings = len(trial.images), []
    if trial.broken:
        name, reason = trial.broken[0]
        warnings.append(
            f"{len(trial.broken)} images to {purpose} cannot be read and were left out; the first, {name}: {reason}"
        )
    if count < ENOUGH:
        warnings.append(
            f"{count} images to {purpose} are few, each is {1 / count:.1%} of them; expected {ENOUGH} or more"
        )
    elif goal.budget and count * goal.budget < 1:
        warnings.append(
            f"each of {count} images to {purpose} is {1 / count:.2%} of them, more than the budget; more images would "
            "tell small drops from none"
        )
    return warnings


def _check_out(out: Path, force: bool) -> None:
    if out.suffix != ".toml":
        raise RecipeError(f"{out} is no name for a recipe; expected one that ends in .toml")
    if out.is_dir() or (out.exists() and not force):
        raise RecipeError(f"{out} exists already; choose another recipe, or replace it with --force")
    if (obstacle := obstacle_to(out)) is not None:
        raise RecipeError(f"cannot write to {out}: {obstacle}; choose another place")
