"""How much of a model's answers pruned forms of it keep: many of them at once, without labels or with.

Forms that prune the same of the first blocks compute the same up to there. So they are run as a tree: block by block,
each block once for every different beginning. All combinations of n blocks take two runs of each block where they would
take n/2 at the end, and none twice at the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.pruning.plan import Subsample

if TYPE_CHECKING:
    from torch import Tensor

    from quartermap_deploy.architectures.base import VisualStateSpaceModel

Form: TypeAlias = tuple["Subsample | None", ...]
"""A pruned form of a model: for each block, in order, how it is subsampled, or None."""


@dataclass(frozen=True)
class Fidelity:
    """How close a pruned form stays to the unpruned model, on some images.

    Attributes:
        agreement: share of the images on which both name the same class; accuracy cannot fall by more than the rest.
        divergence: mean Kullback-Leibler divergence of the form's class probabilities from the unpruned model's, in
            nats; 0 for the same, and much finer than the agreement.
        accuracy: share of the images whose class the form names; None without labels.
    """

    agreement: float
    divergence: float
    accuracy: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"agreement": self.agreement, "divergence": self.divergence, "accuracy": self.accuracy}


def fidelity(
    model: VisualStateSpaceModel,
    images: NDArray[np.float32],
    forms: Sequence[Form],
    labels: NDArray[np.int64] | None = None,
    *,
    batch: int = 32,
    progress: Progress = SILENT,
    title: str = "comparing pruned forms with the unpruned model",
) -> list[Fidelity]:
    """Compare pruned forms of a model with the unpruned model.

    Args:
        model: the model; how its blocks are subsampled is the same afterwards.
        images: (n, channels, height, width), prepared for the model.
        forms: what to compare; a form may be there twice.
        labels: (n), to measure accuracies too.
        batch: images at a time.
        progress: shows the images that the forms have seen.
        title: of the progress.

    Returns:
        One for each form, in order. Logits with NaN or infinite values agree with nothing and diverge without limit.
    """
    import torch

    counts = [_Counts() for _ in forms]
    device = next(model.parameters()).device
    total = len(images) * len(forms)
    with torch.inference_mode(), _subsampled(model), progress.step(title, total=total) as advance:
        for start in range(0, len(images), batch):
            x = model.stem(torch.from_numpy(images[start : start + batch]).to(device))
            truth = None if labels is None else torch.from_numpy(labels[start : start + batch]).to(device)
            expected = _unpruned_logits(model, x)
            for members, logits in _walk(model, x, forms):
                added = _Counts.of(logits, expected, truth)
                for member in members:
                    counts[member].add(added)
                advance(len(logits) * len(members))
    return [entry.result(len(images), labels is not None) for entry in counts]


@dataclass
class _Counts:
    agreeing: int = 0
    right: int = 0
    divergence: float = 0.0

    @classmethod
    def of(cls, logits: Tensor, expected: Tensor, labels: Tensor | None) -> _Counts:
        """What a form's logits on one batch, (n, classes), amount to."""
        p, q = (values.double().log_softmax(dim=1) for values in (expected, logits))
        finite = logits.isfinite().all(dim=1)
        named = logits.argmax(dim=1)
        divergence = (p.exp() * (p - q)).sum(dim=1)
        return cls(
            agreeing=int((finite & (named == expected.argmax(dim=1))).sum()),
            right=0 if labels is None else int((finite & (named == labels)).sum()),
            divergence=float(divergence.sum()) if bool(finite.all()) else float("inf"),
        )

    def add(self, other: _Counts) -> None:
        self.agreeing += other.agreeing
        self.right += other.right
        self.divergence += other.divergence

    def result(self, images: int, labelled: bool) -> Fidelity:
        # Rounding can take a divergence of nothing below zero.
        return Fidelity(
            agreement=self.agreeing / images,
            divergence=max(self.divergence / images, 0.0),
            accuracy=self.right / images if labelled else None,
        )


def _unpruned_logits(model: VisualStateSpaceModel, x: Tensor) -> Tensor:
    ((_, logits),) = _walk(model, x, [(None,) * sum(model.depths)])
    return logits


def _walk(
    model: VisualStateSpaceModel, x: Tensor, forms: Sequence[Form]
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Run forms on the output of the stem; yields logits with the positions of the forms that they belong to."""
    # Each block with the step that follows it: to the next stage after the last block of a stage.
    steps = [
        (block, stage.downsample if number == len(stage.blocks) else None)
        for stage in model.stages()
        for number, block in enumerate(stage.blocks, start=1)
    ]
    mixers = [block.mixer for block in model.blocks()]

    def descend(x: Tensor, index: int, members: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
        if index == len(steps):
            yield members, model.classify(x)
            return
        branches: dict[Subsample | None, list[int]] = {}
        for member in members:
            branches.setdefault(forms[member][index], []).append(member)
        module, downsample = steps[index]
        for subsample, branch in branches.items():
            mixers[index].subsample = subsample
            y = module(x)
            yield from descend(y if downsample is None else downsample(y), index + 1, branch)

    yield from descend(x, 0, range(len(forms)))


@contextmanager
def _subsampled(model: VisualStateSpaceModel) -> Iterator[None]:
    """While open, blocks may be subsampled in any way."""
    before = [(block.mixer, block.mixer.subsample) for block in model.blocks()]
    try:
        yield
    finally:
        for mixer, subsample in before:
            mixer.subsample = subsample
