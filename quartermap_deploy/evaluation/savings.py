"""What pruning each block saves: measured in turns on the target, or counted in operations or scanned positions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.bench import Timing, interleave
from quartermap_deploy.evaluation.runs import TORCH, call_of, exported_run, pruned, torch_run
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.pruning.plan import QuarterMap
from quartermap_deploy.recipe import Recipe

if TYPE_CHECKING:
    from quartermap_deploy.architectures.base import VisualStateSpaceModel
    from quartermap_deploy.evaluation.accuracy import Run
    from quartermap_deploy.sources.architectures import ArchitectureSource
    from quartermap_deploy.sources.source_model import Traced

MEASURES = ("time", "flops", "tokens")

TOGETHER = 4
"""Pruned models that are timed in turns with the unpruned one; more would need the memory of more models."""

NOISE_LIMIT = 1 / 3
"""Times are not chosen by where their standard error is more than this part of what all blocks together save."""


@dataclass(frozen=True)
class Savings:
    """What pruning single blocks saves.

    Attributes:
        measure: "time", "flops" (multiply-accumulates, as `complexity` counts them) or "tokens" (scanned positions).
        shares: by (block, stride), the share of the unpruned model's cost that is saved; below 0 where pruning costs.
        errors: by (block, stride), standard error of the share; empty for what is counted.
        note: how it was measured, for people.
        noisy: whether too little is known of the savings to choose by them.
    """

    measure: str
    shares: Mapping[tuple[int, int], float]
    errors: Mapping[tuple[int, int], float]
    note: str
    noisy: bool = False

    def speed(self, blocks: Sequence[int], stride: int) -> float:
        """Speed of a model with these blocks pruned, relative to the unpruned one, if the savings add up.

        Counted savings add up exactly.
        """
        return 1 / max(1 - sum(self.shares[block, stride] for block in blocks), 1e-6)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `from_dict` reads them back."""
        return {
            "measure": self.measure,
            "note": self.note,
            "noisy": self.noisy,
            "blocks": [
                {"block": block, "stride": stride, "share": share, "error": self.errors.get((block, stride))}
                for (block, stride), share in self.shares.items()
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Savings:
        """Read what `to_dict` returned."""
        entries = {(entry["block"], entry["stride"]): entry for entry in values["blocks"]}
        return cls(
            measure=values["measure"],
            shares={key: entry["share"] for key, entry in entries.items()},
            errors={key: entry["error"] for key, entry in entries.items() if entry["error"] is not None},
            note=values["note"],
            noisy=values["noisy"],
        )


def counted_savings(
    model: VisualStateSpaceModel, input_size: tuple[int, int], strides: Sequence[int], measure: str
) -> Savings:
    """Count what each block saves.

    Args:
        model: the unpruned model.
        input_size: (height, width) of the input.
        strides: to count for.
        measure: "flops" or "tokens".
    """
    from quartermap_deploy.complexity import measure as count
    from quartermap_deploy.pruning.reference import prune

    before = count(model, input_size)
    everything = tuple(range(1, sum(model.depths) + 1))
    shares = {}
    for stride in strides:
        after = count(prune(model, QuarterMap(blocks=everything, stride=stride)), input_size)
        for old, new in zip(before.blocks, after.blocks, strict=True):
            saved = old.flops - new.flops if measure == "flops" else old.tokens - new.tokens
            shares[old.index, stride] = saved / (before.flops if measure == "flops" else before.tokens)
    what = "multiply-accumulates" if measure == "flops" else "positions that the scans walk"
    return Savings(measure, shares, {}, f"counted: {what}, of pruned blocks in the paper's form")


class PlanTimer:
    """Times pruned forms of one model against the unpruned model, in turns.

    Args:
        recipe: model and export settings; its plan is not used.
        source: the model, unpruned.
        target: "torch" or a target of `targets`.
        images: the batch that is timed.
        repeats: timed rounds.
        progress: told about the steps.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: ArchitectureSource,
        target: str,
        images: NDArray[np.float32],
        repeats: int,
        progress: Progress = SILENT,
    ) -> None:
        self.target, self.images, self.repeats = target, images, repeats
        self._recipe, self._source, self._progress = recipe, source, progress
        self._traced: Traced | None = None
        self._unpruned: Run | None = None

    def times(self, plans: Sequence[QuarterMap]) -> list[tuple[Timing, Timing]]:
        """Time plans; returns the timings of each and of the unpruned model in the same rounds."""
        if self._unpruned is None:
            with self._progress.step(f"making the unpruned model ready on {self.target}"):
                self._unpruned = self._run(None)
        found: list[tuple[Timing, Timing]] = []
        with self._progress.step(f"timing {len(plans)} plans on {self.target}", total=len(plans)) as advance:
            for start in range(0, len(plans), TOGETHER):
                found += self._times_together(self._unpruned, plans[start : start + TOGETHER])
                advance(len(plans[start : start + TOGETHER]))
        return found

    def _times_together(self, unpruned: Run, plans: Sequence[QuarterMap]) -> list[tuple[Timing, Timing]]:
        # Whose models are gone when it returns: those of the next plans may be large too.
        runs = [unpruned]
        with self._progress.step(f"making {len(plans)} plans ready", total=len(plans)) as advance:
            for plan in plans:
                runs.append(self._run(plan))
                advance(1)
        calls = {str(number): call_of(run, self.images) for number, run in enumerate(runs)}
        first, *others = interleave(calls, self.repeats, progress=self._progress).values()
        return [(timing, first) for timing in others]

    def savings(self, strides: Sequence[int]) -> Savings:
        """Time what pruning saves: each stage with all its blocks pruned, as they are all alike, and the whole model.

        A block alone saves so little of a model's time that it is lost in the noise of most machines. What the stages
        save is scaled to add up to what the whole model saves, of which more is known.
        """
        stages: dict[int, list[int]] = {}
        for block in self._source.blocks:
            stages.setdefault(block.stage, []).append(block.index)
        everything = [number for numbers in stages.values() for number in numbers]
        sets = [tuple(numbers) for numbers in (everything, *stages.values())]
        plans = [QuarterMap(blocks=numbers, stride=stride) for stride in strides for numbers in sets]
        found = [_saved(pruned, unpruned) for pruned, unpruned in self.times(plans)]
        shares: dict[tuple[int, int], float] = {}
        errors: dict[tuple[int, int], float] = {}
        noisy = True
        for number, stride in enumerate(strides):
            whole, *parts = found[number * len(sets) : (number + 1) * len(sets)]
            noisy = noisy and is_noisy(whole)
            for numbers, (share, error) in zip(sets[1:], scaled(whole, parts), strict=True):
                for index in numbers:
                    shares[index, stride] = share / len(numbers)
                    errors[index, stride] = error / len(numbers)
        note = f"measured in turns on {self.target}, stage by stage, {self.settings()}"
        return Savings("time", shares, errors, note, noisy)

    def settings(self) -> str:
        """What was timed, in words."""
        return f"batch {len(self.images)}, {self.repeats} rounds"

    def _run(self, plan: QuarterMap | None) -> Run:
        from quartermap_deploy.compiling.export import export_model

        if self.target == TORCH:
            return torch_run(pruned(self._source, plan))
        recipe = dataclasses.replace(self._recipe, quartermap=plan, targets=(self.target,))
        exported = export_model(recipe, self._source, SILENT, self._traced)
        self._traced = exported.traced
        return exported_run(exported, recipe, self._source.inputs[0].shape[0])


def is_noisy(whole: tuple[float, float]) -> bool:
    """Whether too little is known of what all blocks together save: a share of the time, and its standard error."""
    share, error = whole
    return not (share > 0 and error <= NOISE_LIMIT * share)


def scaled(whole: tuple[float, float], parts: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Scale what the stages save, each with its standard error, to add up to what the whole model saves.

    By 2 at most, or 1/2: beyond that the two measurements contradict each other.
    """
    total = sum(share for share, _ in parts)
    scale = min(max(whole[0] / total, 0.5), 2.0) if whole[0] > 0 and total > 0 else 1.0
    return [(scale * share, scale * error) for share, error in parts]


def _saved(pruned: Timing, unpruned: Timing) -> tuple[float, float]:
    """The share of the time that is saved, and its standard error."""
    low, high = pruned.ratio_spread(unpruned)
    # Of a median of normal values: 1.253 standard deviations, which are 1 / 1.349 of the quartiles' distance.
    error = 1.253 / 1.349 * (high - low) / math.sqrt(len(pruned.samples))
    return 1 - pruned.ratio(unpruned), error
