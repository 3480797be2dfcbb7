"""The images of a data set as PNG files in a folder for each class, as `imagefolder` reads them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quartermap_deploy.data.images import open_image
from quartermap_deploy.errors import InputError
from quartermap_deploy.evaluation.datasets import Dataset
from quartermap_deploy.evaluation.imagefolder import CLASS_LISTS
from quartermap_deploy.files import FolderKind
from quartermap_deploy.progress import SILENT, Progress

INDEX = "images.json"
FOLDER = FolderKind("folder of images", INDEX, InputError)
UNLABELLED_FOLDER = "images"
"""Where images without a class go."""


@dataclass(frozen=True)
class WrittenImages:
    """What was written.

    Attributes:
        files: the images, relative to the folder, in the order of the data set.
        broken: names of images that cannot be read, and why.
    """

    files: tuple[str, ...]
    broken: tuple[tuple[str, str], ...]


def write_images(
    dataset: Dataset, folder: Path, *, force: bool = False, progress: Progress = SILENT
) -> WrittenImages:
    """Write the images of a data set as PNG files, a folder for each class.

    The folder is written whole or not at all. It holds `images.json`, which says where the images come from, and
    `classes.txt`, so that a part of the classes is known as one.

    Args:
        dataset: the images.
        folder: to write.
        force: replace a folder that this function wrote.
        progress: is told of each image.

    Raises:
        InputError: if the folder may not be written, or no image can be read.
    """
    folders = _folder_names(dataset.classes)
    width = len(str(max(len(dataset) - 1, 0)))
    files: list[str] = []
    broken: list[tuple[str, str]] = []
    with (
        FOLDER.new(folder, force) as draft,
        progress.step(f"writing {len(dataset)} images", total=len(dataset)) as advance,
    ):
        for index in range(len(dataset)):
            place = folders[dataset.labels[index]] if dataset.labelled else UNLABELLED_FOLDER
            name = f"{place}/{index:0{width}d}.png"
            try:
                image = open_image(dataset.image(index))
            except InputError as error:
                broken.append((dataset.item_name(index), str(error)))
            else:
                (draft / place).mkdir(exist_ok=True)
                image.save(draft / name, format="PNG")
                files.append(name)
            advance(1)
        if not files:
            raise InputError(f"none of the {len(dataset)} images of {dataset.name} can be read")
        if dataset.labelled:
            (draft / CLASS_LISTS[0]).write_text("".join(f"{name}\n" for name in folders), encoding="utf-8")
        index_text = json.dumps(
            {"from": dataset.name, "fingerprint": dataset.fingerprint, "images": files}, indent=1
        )
        (draft / INDEX).write_text(index_text + "\n", encoding="utf-8")
    return WrittenImages(tuple(files), tuple(broken))


def _folder_names(classes: Sequence[str]) -> list[str]:
    """Names for the folders of classes that no file system refuses; where two would be the same, with their numbers."""
    names = [re.sub(r"[^\w. -]+", "_", name).strip(". ")[:100] for name in classes]
    folded = Counter(name.casefold() for name in names)
    return [
        name if name and folded[name.casefold()] == 1 else f"{index}_{name}".rstrip("_")
        for index, name in enumerate(names)
    ]
