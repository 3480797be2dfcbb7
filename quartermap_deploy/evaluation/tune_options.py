"""How `tune` searches for a plan, as options."""

from __future__ import annotations

from dataclasses import dataclass

from quartermap_deploy.errors import InputError, UnknownNameError
from quartermap_deploy.evaluation.runs import TORCH
from quartermap_deploy.evaluation.savings import MEASURES
from quartermap_deploy.targets import DEFAULT, list_targets


@dataclass(frozen=True)
class TuneOptions:
    """How plans are searched for.

    Attributes:
        strides: to choose from.
        exclude_stages: stages whose blocks are not pruned.
        labels: judge by accuracy; False judges by agreement with the unpruned model and needs no labels. None takes
            labels where all images have some.
        measure: of speed: "time" on the target, or "flops" or "tokens", which are counted.
        target: "torch" or a target of `targets`, for "time".
        batch: images per call, for "time".
        repeats: timed rounds, for "time".
        evaluations: candidates to run. If all sets of blocks are no more, all are run.

    Raises:
        InputError: if a value is out of range.
        UnknownNameError: if there is no such measure or target.
    """

    strides: tuple[int, ...] = (2, 3)
    exclude_stages: tuple[int, ...] = ()
    labels: bool | None = None
    measure: str = "time"
    target: str = DEFAULT
    batch: int = 8
    repeats: int = 15
    evaluations: int = 128

    def __post_init__(self) -> None:
        strides = self.strides
        if not strides or any(stride < 2 for stride in strides) or len(set(strides)) != len(strides):
            raise InputError(f"strides = {strides!r}; expected different numbers of at least 2, as 2,3")
        if self.measure not in MEASURES:
            raise UnknownNameError.for_choice("measure of speed", self.measure, MEASURES)
        if self.target not in (TORCH, *list_targets()):
            raise UnknownNameError.for_choice("target", self.target, (TORCH, *list_targets()))
        for name in ("batch", "repeats", "evaluations"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)} must be at least 1")
