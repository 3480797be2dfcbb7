"""Accuracy of a model on a data set: batched, prefetched, and resumable."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.errors import InputError
from quartermap_deploy.evaluation.batches import Batch, batches
from quartermap_deploy.evaluation.datasets import Dataset
from quartermap_deploy.evaluation.tally import TOP, Tally, check_place
from quartermap_deploy.progress import SILENT, Progress

Run: TypeAlias = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Images (n, 3, H, W) → logits (n, classes)."""

SAVE_AFTER = 5.0
"""Seconds between two writings of the state: so much work at most is lost when the power goes."""


@dataclass(frozen=True)
class Accuracy:
    """How well a model does on a data set.

    Attributes:
        images: images that were evaluated; broken ones are not among them.
        top1: share of them whose largest logit is that of their class.
        top5: share of them whose class is among the five largest logits; None where there are no more than five
            classes, as it would be 1 for any model.
        per_class: (right, all) images of each class that has some, by name.
        not_finite: images with a NaN or infinite logit; they count as wrong.
        broken: (name, reason) of each image that could not be read.
        seconds: time of the evaluation, reading of images included, over all the runs that it took.
        compute_seconds: the part of it in which the model ran.
    """

    images: int
    top1: float
    top5: float | None
    per_class: Mapping[str, tuple[int, int]]
    not_finite: int
    broken: tuple[tuple[str, str], ...]
    seconds: float
    compute_seconds: float

    @property
    def images_per_second(self) -> float:
        """Images evaluated in a second, reading of images included."""
        return self.images / self.seconds if self.seconds > 0 else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = dataclasses.asdict(self)
        values["per_class"] = {
            name: {"correct": right, "images": all_} for name, (right, all_) in self.per_class.items()
        }
        values["broken"] = [{"image": name, "reason": reason} for name, reason in self.broken]
        return {**values, "images_per_second": self.images_per_second}


def evaluate(
    run: Run,
    dataset: Dataset,
    preprocessing: Preprocessing,
    *,
    batch: int = 32,
    progress: Progress = SILENT,
    checkpoint: Path | None = None,
    identity: str = "",
    workers: int = 1,
) -> Accuracy:
    """Run a model over a data set and count.

    Args:
        run: the model.
        dataset: images and labels.
        preprocessing: how the images are prepared for the model.
        batch: images per call.
        progress: shows the images.
        checkpoint: file that holds the counts so far; folders that are missing are made. It is written every few
            seconds and when the evaluation is interrupted; if it is there, the evaluation goes on from it. A finished
            one answers at once. Where it cannot be written any more later on, as on a full disk, it stays as it was
            and the evaluation goes on.
        identity: what the state in `checkpoint` has to belong to, as `Runner.identity`; data set, preprocessing and
            batch size are always part of that.
        workers: threads that read and prepare images.

    Raises:
        InputError: if there is no image or no label, all are broken, the classes are not the model's, or the state
            belongs to another evaluation or cannot be written.
    """
    if len(dataset) == 0:
        raise InputError(f"{dataset.name} has no image to evaluate on")
    if not dataset.labelled:
        raise InputError(f"{dataset.name} has no labels, so there is no accuracy to measure")
    key = _key(dataset, preprocessing, batch, identity)
    tally = _first_state(checkpoint, key, len(dataset.classes))
    saved = lap = time.perf_counter()
    with progress.step(f"evaluating on {dataset.name}", total=len(dataset)) as advance:
        advance(tally.position)
        try:
            for part in batches(dataset, preprocessing, batch, workers=workers, start=tally.position):
                logits, elapsed = _timed(run, part, dataset)
                now = time.perf_counter()
                tally = tally.plus(logits, part.labels, part.broken, now - lap, elapsed)
                lap = now
                advance(len(part.labels) + len(part.broken))
                if now - saved >= SAVE_AFTER:
                    _save(tally, checkpoint, key)
                    saved = now
        finally:
            _save(tally, checkpoint, key)
    return _accuracy(tally, dataset)


def _timed(run: Run, part: Batch, dataset: Dataset) -> tuple[NDArray[np.float32], float]:
    """The logits of a batch, and the seconds that the model took."""
    if not len(part.labels):
        return np.empty((0, len(dataset.classes)), np.float32), 0.0
    start = time.perf_counter()
    logits = run(part.images)
    elapsed = time.perf_counter() - start
    _check_logits(logits, part.labels, dataset)
    return logits, elapsed


def _save(tally: Tally, path: Path | None, key: str) -> None:
    if path is not None:
        # The file is what it was before if this fails, as on a full disk; that is no reason to lose the evaluation.
        with contextlib.suppress(OSError):
            tally.save(path, key)


def logits_of(
    run: Run,
    dataset: Dataset,
    preprocessing: Preprocessing,
    batch: int = 32,
    progress: Progress = SILENT,
    workers: int = 1,
) -> NDArray[np.float32]:
    """Return the logits of a data set, (n, classes) in its order; NaN for an image that cannot be read.

    Raises:
        InputError: if there is no image, all are broken, or the classes are not the model's.
    """
    result: NDArray[np.float32] | None = None
    with progress.step(f"running on {dataset.name}", total=len(dataset)) as advance:
        for part in batches(dataset, preprocessing, batch, workers=workers):
            if len(part.labels):
                logits = run(part.images)
                _check_logits(logits, part.labels, dataset)
                if result is None:
                    result = np.full((len(dataset), logits.shape[1]), np.nan, np.float32)
                result[part.indices] = logits
            advance(len(part.labels) + len(part.broken))
    if result is None:
        raise InputError(f"{dataset.name} has no image that can be read")
    return result


def _first_state(path: Path | None, key: str, num_classes: int) -> Tally:
    if path is None:
        return Tally.empty(num_classes)
    check_place(path)
    tally = Tally.load(path, key, num_classes)
    try:
        # Before any work, so that a wrong path is not found out after an hour.
        tally.save(path, key)
    except OSError as error:
        raise InputError(f"the state cannot be written to {path}: {error.strerror or error}") from error
    return tally


def _key(dataset: Dataset, preprocessing: Preprocessing, batch: int, identity: str) -> str:
    settings = {
        "dataset": dataset.fingerprint,
        "classes": dataset.classes,
        "preprocessing": dataclasses.asdict(preprocessing),
        "batch": batch,
        "identity": identity,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _check_logits(logits: NDArray[np.float32], labels: NDArray[np.int64], dataset: Dataset) -> None:
    if logits.ndim != 2 or len(logits) != len(labels):
        raise InputError(
            f"the model returned {logits.shape} for {len(labels)} images; expected a row of logits for each image"
        )
    dataset.check_classes(logits.shape[1])


def _accuracy(tally: Tally, dataset: Dataset) -> Accuracy:
    images = int(tally.total.sum())
    if images == 0:
        name, reason = tally.broken[0]
        raise InputError(
            f"none of the {len(tally.broken)} images of {dataset.name} can be read; the first, {name}: {reason}"
        )
    return Accuracy(
        images=images,
        top1=int(tally.correct.sum()) / images,
        top5=tally.top5 / images if len(dataset.classes) > TOP else None,
        per_class={
            name: (int(right), int(total))
            for name, right, total in zip(dataset.classes, tally.correct, tally.total, strict=True)
            if total
        },
        not_finite=tally.not_finite,
        broken=tally.broken,
        seconds=tally.seconds,
        compute_seconds=tally.compute_seconds,
    )
