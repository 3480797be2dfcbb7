"""The handwritten digits of scikit-learn (1,797 scans of 8x8 pixels), with one fixed held-out part.

The demo model is trained on the one part and every accuracy in this project is stated on the other.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.data.scikit_learn import packaged

SPLIT_SEED = 1797
HELD_OUT_PER_CLASS = 45


@dataclass(frozen=True)
class Digits:
    """Some digits.

    Attributes:
        images: (N, 8, 8) of uint8, white on black.
        labels: (N) of int64, 0 to 9.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DigitsSplit:
    """The digits, split once and for all.

    Attributes:
        training: 1,347 digits to train on.
        held_out: 450 digits to evaluate on, 45 of each class.
        fingerprint: hash of which digits are held out; a trained model records it.
    """

    training: Digits
    held_out: Digits
    fingerprint: str


def load_digits() -> DigitsSplit:
    """Return the digits that come with scikit-learn, split by class with a fixed seed."""
    # One digit on each line: its 64 pixels, and which it is.
    table = np.loadtxt(packaged("data", "digits.csv.gz"), delimiter=",")
    # Pixels count 0 to 16 dark dots; they are stretched to the range of an ordinary image.
    pixels = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = table[:, -1].astype(np.int64)
    # The legacy generator: NumPy promises never to change its stream, so the split is the same everywhere.
    generator = np.random.RandomState(SPLIT_SEED)
    held_out = np.sort(
        np.concatenate(
            [
                generator.permutation(np.flatnonzero(labels == digit))[:HELD_OUT_PER_CLASS]
                for digit in range(10)
            ]
        )
    )
    training = np.setdiff1d(np.arange(len(labels)), held_out)
    return DigitsSplit(
        training=Digits(pixels[training], labels[training]),
        held_out=Digits(pixels[held_out], labels[held_out]),
        fingerprint=hashlib.sha256(held_out.astype("<i8").tobytes()).hexdigest()[:16],
    )
