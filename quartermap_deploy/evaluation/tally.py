"""The counts of an evaluation under way, and the small file that lets it go on after an interruption."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.errors import InputError
from quartermap_deploy.files import folders_for, obstacle_to, write_whole
from quartermap_deploy.reading import ReadingError, read_json

FORMAT = 1
TOP = 5


@dataclass(frozen=True, eq=False)
class Tally:
    """What was counted up to a position of the data set.

    It does not change: an interruption between two steps of counting would leave a state that counts images twice.

    Attributes:
        position: images of the data set that were looked at, broken ones included.
        correct: images of each class whose largest logit is that of the class.
        total: images of each class.
        top5: images whose class is among the five largest logits.
        not_finite: images with a NaN or infinite logit, which count as wrong.
        broken: (name, reason) of each image that could not be read.
        seconds: time of the evaluation, over all runs that it took.
        compute_seconds: the part of it in which the model ran.
    """

    position: int
    correct: NDArray[np.int64]
    total: NDArray[np.int64]
    top5: int = 0
    not_finite: int = 0
    broken: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    compute_seconds: float = 0.0

    @classmethod
    def empty(cls, num_classes: int) -> Tally:
        """Return the counts before the first image."""
        return cls(0, np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64))

    def plus(
        self,
        logits: NDArray[np.float32],
        labels: NDArray[np.int64],
        broken: tuple[tuple[str, str], ...] = (),
        seconds: float = 0.0,
        compute_seconds: float = 0.0,
    ) -> Tally:
        """Return the counts with one more batch.

        Args:
            logits: (n, classes).
            labels: (n).
            broken: (name, reason) of the images of the batch that could not be read.
            seconds: what the batch took.
            compute_seconds: the part of it in which the model ran.
        """
        finite = np.isfinite(logits).all(axis=1)
        rank = ranks(logits, labels)
        return Tally(
            position=self.position + len(labels) + len(broken),
            correct=self.correct + np.bincount(labels[finite & (rank < 1)], minlength=len(self.correct)),
            total=self.total + np.bincount(labels, minlength=len(self.total)),
            top5=self.top5 + int((finite & (rank < TOP)).sum()),
            not_finite=self.not_finite + int((~finite).sum()),
            broken=self.broken + broken,
            seconds=self.seconds + seconds,
            compute_seconds=self.compute_seconds + compute_seconds,
        )

    def save(self, path: Path, key: str) -> None:
        """Write the counts, whole or not at all.

        Raises:
            OSError: if the file cannot be written; it is then what it was before.
        """
        values: dict[str, Any] = {"format": FORMAT, "key": key, **dataclasses.asdict(self)}
        values.update(correct=self.correct.tolist(), total=self.total.tolist())
        with folders_for(path):
            write_whole(path, (json.dumps(values) + "\n").encode())

    @classmethod
    def load(cls, path: Path, key: str, num_classes: int) -> Tally:
        """Read counts; those before the first image if there is no file.

        Raises:
            InputError: if the file is damaged, or belongs to another evaluation.
        """
        try:
            values = read_json(path)
        except FileNotFoundError:
            return cls.empty(num_classes)
        except ReadingError as error:
            raise InputError(
                f"the state {path} cannot be read: {error}; delete it to begin anew, or name another file"
            ) from error
        try:
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            found = values.pop("key")
            correct, total = (np.array(values.pop(name), np.int64) for name in ("correct", "total"))
            broken = tuple((str(name), str(reason)) for name, reason in values.pop("broken"))
            tally = cls(correct=correct, total=total, broken=broken, **values)
            if found == key and not (tally.correct.shape == tally.total.shape == (num_classes,)):
                raise ValueError("another number of classes")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is no state of an evaluation; delete it to begin anew, or name another file"
            ) from error
        if found != key:
            raise InputError(
                f"the state {path} belongs to another evaluation: model, data, preprocessing or batch size differ; "
                "delete it to begin anew, or name another file"
            )
        return tally


def check_place(path: Path) -> None:
    """Check, before any work, that counts can be kept in `path`; folders that it is to lie in may be missing.

    Raises:
        InputError: if it is a folder, or cannot be written.
    """
    if path.is_dir():
        raise InputError(f"the state {path} is a folder; name a file in it, such as {path / 'state.json'}")
    if (obstacle := obstacle_to(path)) is not None:
        raise InputError(f"the state cannot be written to {path}: {obstacle}; name another file")


def ranks(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many classes come before the right one, (n); among equal logits the first class does, as in argmax."""
    own = logits[np.arange(len(labels)), labels][:, None]
    before = np.arange(logits.shape[1]) < labels[:, None]
    counts: NDArray[np.int64] = ((logits > own) | ((logits == own) & before)).sum(axis=1)
    return counts
