"""The files of MedMNIST: one .npz for each set, with images and labels of its three parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.arrays import ArrayError, opened_arrays
from quartermap_deploy.errors import InputError
from quartermap_deploy.evaluation.datasets import Dataset, fingerprint

SPLITS = ("train", "val", "test")
_LABELS = tuple(f"{split}_labels" for split in SPLITS)


def read_medmnist(path: Path, split: str) -> Dataset:
    """Read one part of a published 2D set: `<split>_images`, (n, H, W) or (n, H, W, 3) of uint8, and `<split>_labels`.

    Classes are named by their index: the files do not hold their names. There are as many as the labels of all parts
    name.

    Raises:
        InputError: if the file cannot be read, lacks the part, or holds something else.
    """
    if not path.is_file():
        hint = "it is a folder" if path.is_dir() else "there is no such file"
        raise InputError(f"cannot read {path}: {hint}; expected an .npz file of MedMNIST")
    try:
        with opened_arrays(path) as file:
            _check_split(path, split, file.names)
            images, labels = file.read(f"{split}_images"), file.read(f"{split}_labels")
            others = [file.read(name) for name in file.names if name in _LABELS]
    except (OSError, ArrayError) as error:
        raise InputError(f"{path} is no .npz file that can be read: {error}") from error
    name = f"{path.stem}, {split}"
    images = _images(name, images)
    flat = _labels(name, labels, len(images))
    count = max((int(np.max(other)) for other in others if other.size), default=0) + 1
    return Dataset(
        name=name,
        classes=tuple(str(label) for label in range(count)),
        labels=flat,
        pictures=images,
        item_names=[f"{split} {index}" for index in range(len(images))],
        fingerprint=fingerprint(
            b"medmnist", str(images.shape).encode(), images.tobytes(), flat.astype("<i8").tobytes()
        ),
    )


def _check_split(path: Path, split: str, names: list[str]) -> None:
    if {f"{split}_images", f"{split}_labels"} <= set(names):
        return
    for given, absent in (("images", "labels"), ("labels", "images")):
        if f"{split}_{given}" in names:
            raise InputError(
                f"{path} has {split}_{given}, but no {split}_{absent}; take the file as MedMNIST publishes it, or "
                "another part"
            )
    there = [part for part in SPLITS if {f"{part}_images", f"{part}_labels"} <= set(names)]
    if not there:
        raise InputError(
            f"{path} is no file of MedMNIST: it holds {', '.join(names[:6]) or 'nothing'}; expected {split}_images and "
            f"{split}_labels"
        )
    raise InputError(f"{path} has no part {split!r}; it has {', '.join(there)}")


def _images(name: str, images: NDArray[Any]) -> NDArray[np.uint8]:
    grey_or_colour = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
    if images.dtype != np.uint8 or not grey_or_colour:
        remedy = (
            "its 3D sets are for other models"
            if images.ndim == 4
            else "the file is none of MedMNIST's 2D sets"
        )
        raise InputError(
            f"the images of {name} are {images.shape} of {images.dtype}; expected (n, H, W) or (n, H, W, 3) of uint8: "
            f"{remedy}"
        )
    if 0 in images.shape:
        raise InputError(f"{name} holds no image: the array has shape {images.shape}")
    return images


def _labels(name: str, labels: NDArray[Any], count: int) -> NDArray[np.int64]:
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise InputError(
            f"{name} has {labels.shape[1]} labels for each image (several may hold at once); accuracy is measured on "
            "sets with one class for each image"
        )
    if labels.dtype.kind not in "iu" or labels.size != count:
        raise InputError(
            f"the labels of {name} are {labels.shape} of {labels.dtype}; expected a whole number for each of {count} "
            "images"
        )
    flat = labels.reshape(-1).astype(np.int64)
    if flat.min() < 0:
        raise InputError(f"{name} has the label {flat.min()}; classes are numbered from 0")
    return flat
