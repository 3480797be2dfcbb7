"""Batches of prepared images, made by background threads while the model runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.data.images import prepare_into
from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.errors import InputError
from quartermap_deploy.evaluation.datasets import Dataset
from quartermap_deploy.progress import SILENT, Progress


@dataclass(frozen=True, eq=False)
class Batch:
    """Some images of a data set, ready for a model.

    Attributes:
        images: (n, 3, H, W), float32.
        labels: (n) of int64.
        indices: (n) of int64, positions in the data set.
        broken: (name, reason) of each image that could not be read; it is in none of the arrays.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    broken: tuple[tuple[str, str], ...]


def batches(
    dataset: Dataset, preprocessing: Preprocessing, size: int, *, workers: int = 1, start: int = 0
) -> Iterator[Batch]:
    """Yield the images of a data set in order, prepared in the background.

    At most `workers` + 1 batches are kept ahead of the one that is given out. A broken image makes its batch smaller,
    down to none: every batch covers `size` positions of the data set, except the last.

    Args:
        dataset: where images and labels come from.
        preprocessing: how images are prepared.
        size: positions of the data set in one batch.
        workers: threads that prepare images, each a batch of its own.
        start: the first position.

    Raises:
        InputError: if size or workers is less than 1.
    """
    if size < 1 or workers < 1:
        raise InputError(f"a batch of {size} images by {workers} workers; both must be at least 1")
    ranges = iter([range(i, min(i + size, len(dataset))) for i in range(start, len(dataset), size)])
    ahead: deque[Future[Batch]] = deque()
    executor = ThreadPoolExecutor(workers, thread_name_prefix="preparing")
    try:
        for positions in ranges:
            ahead.append(executor.submit(_batch, dataset, preprocessing, positions))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def prepare_all(
    dataset: Dataset, preprocessing: Preprocessing, *, workers: int = 1, progress: Progress = SILENT
) -> Batch:
    """Prepare a whole data set as one batch, for sets that are run many times and fit the memory."""
    parts = []
    with progress.step(f"preparing the images of {dataset.name}", total=len(dataset)) as advance:
        for part in batches(dataset, preprocessing, 64, workers=workers):
            parts.append(part)
            advance(len(part.labels) + len(part.broken))
    return Batch(
        images=np.concatenate([part.images for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        indices=np.concatenate([part.indices for part in parts]),
        broken=tuple(entry for part in parts for entry in part.broken),
    )


def _batch(dataset: Dataset, preprocessing: Preprocessing, positions: range) -> Batch:
    images = np.empty((len(positions), *preprocessing.input_shape), dtype=np.float32)
    indices: list[int] = []
    broken: list[tuple[str, str]] = []
    for index in positions:
        try:
            prepare_into(images[len(indices)], dataset.image(index), preprocessing)
            indices.append(index)
        except InputError as error:
            broken.append((dataset.item_name(index), str(error)))
    return Batch(
        images=images[: len(indices)],
        labels=dataset.labels[indices],
        indices=np.array(indices, dtype=np.int64),
        broken=tuple(broken),
    )
