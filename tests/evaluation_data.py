"""Real image files for the tests of the evaluation: digits and photographs, laid out as data sets are published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from quartermap_deploy.data.digits import load_digits
from quartermap_deploy.data.images import sample_photographs

SYNSETS = tuple(f"n0{1440764 + 3 * index}" for index in range(10))
"""Ten names of the form of ImageNet's, in order."""

SUFFIXES = ("png", "JPEG", "bmp", "jpg")


def digit_folders(
    folder: Path, names: Sequence[str] | Mapping[int, str], per_class: int = 2, suffix: str = "png"
) -> Path:
    """Write held-out digits as folder/<name>/<digit>_<number>.<suffix>; without a loss as png or bmp.

    Args:
        folder: where to; made if it is not there.
        names: name of the folder of each digit; digits without one are left out.
        per_class: images of each.
        suffix: of the files.
    """
    digits = load_digits().held_out
    named = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
    for digit, name in named.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, index in enumerate(np.flatnonzero(digits.labels == digit)[:per_class]):
            Image.fromarray(digits.images[index]).save(folder / name / f"{digit}_{number}.{suffix}")
    return folder


def medmnist_file(path: Path, parts: Sequence[str] = ("train", "val", "test"), colour: bool = False) -> Path:
    """Write digits of 28x28 pixels as MedMNIST publishes its sets: compressed, labels (n, 1) of uint8."""
    digits = load_digits().held_out
    arrays = {}
    for number, part in enumerate(parts):
        chosen = np.arange(20 * number, 20 * number + 20)
        scans = [Image.fromarray(digits.images[index]).resize((28, 28)) for index in chosen]
        arrays[f"{part}_images"] = np.stack(
            [np.asarray(scan.convert("RGB") if colour else scan) for scan in scans]
        )
        arrays[f"{part}_labels"] = digits.labels[chosen].astype(np.uint8)[:, None]
    np.savez_compressed(path, **arrays)
    return path


def damaged(folder: Path) -> dict[str, bytes]:
    """Files that are no image any more, each in its own way, by name."""
    whole = folder / "whole.png"
    Image.fromarray(sample_photographs()["flower.jpg"]).save(whole)
    data = whole.read_bytes()
    whole.unlink()
    return {
        "empty.png": b"",
        "cut.png": data[: len(data) // 2],
        "text.jpg": b"this is no image",
        "garbled.png": data[:60] + bytes(200) + data[260:],
    }
