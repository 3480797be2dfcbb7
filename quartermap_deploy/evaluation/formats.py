"""The layouts of sets of images, and `open_dataset`, which opens each.

It reads class folders as ImageNet-1K has them, the files of MedMNIST, the handwritten digits that come with
scikit-learn, and folders of images without labels. Images of folders are opened one by one, when they are needed.
"""

from __future__ import annotations

from pathlib import Path

from quartermap_deploy.errors import InputError, UnknownNameError
from quartermap_deploy.evaluation import FORMATS, UNLABELLED
from quartermap_deploy.evaluation.datasets import Dataset, fingerprint


def open_dataset(path: Path | None, format: str, *, split: str | None = None) -> Dataset:
    """Open a data set.

    Args:
        path: its folder ("imagefolder", "images") or .npz file ("medmnist"); None for "digits".
        format: "imagefolder", "medmnist", "digits", or "images" for a folder of images without labels.
        split: which part. Digits have "held_out" (the default), which no model of this package was trained on, and
            "training"; MedMNIST has "train", "val" and "test" (the default); of a folder it is a folder in it (by
            default "val", "validation" or "test" if there is one, or else the folder itself).

    Raises:
        UnknownNameError: if there is no such format or part.
        InputError: if the data cannot be read, has no image, or its labels are not those of its classes.
    """
    if format not in (*FORMATS, UNLABELLED):
        raise UnknownNameError.for_choice("format of a data set", format, (*FORMATS, UNLABELLED))
    if format == "digits":
        if path is not None:
            raise InputError(
                f"the digits come with scikit-learn and are not read from {path}; leave the path out"
            )
        return _digits(split or "held_out")
    if path is None:
        kind = "the .npz file" if format == "medmnist" else "the folder of the images"
        raise InputError(f"the format {format} needs a path: {kind}")
    if format == "medmnist":
        from quartermap_deploy.evaluation.medmnist import read_medmnist

        return read_medmnist(Path(path), split or "test")
    from quartermap_deploy.evaluation.imagefolder import read_imagefolder, read_images

    if format == UNLABELLED:
        if split is not None:
            raise InputError(
                f"images without labels have no parts such as {split!r}; give their folder itself"
            )
        return read_images(Path(path))
    return read_imagefolder(Path(path), split)


def _digits(split: str) -> Dataset:
    from quartermap_deploy.data.digits import load_digits

    digits = load_digits()
    parts = {"held_out": digits.held_out, "training": digits.training}
    if split not in parts:
        raise UnknownNameError.for_choice("part of the digits", split, parts)
    part = parts[split]
    return Dataset(
        name=f"digits, {split}",
        classes=tuple(str(digit) for digit in range(10)),
        labels=part.labels,
        pictures=part.images,
        item_names=None,
        fingerprint=fingerprint(b"digits", part.images.tobytes(), part.labels.astype("<i8").tobytes()),
    )
