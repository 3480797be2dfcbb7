"""The inputs that parity is checked on: real images, and the edges of the input range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.data.image_files import images_in
from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.errors import InputError

COUNT = 2


def real_images(
    preprocessing: Preprocessing, folder: Path | None = None, count: int = COUNT, *, digits: bool = False
) -> NDArray[np.float32]:
    """Real images, prepared for a model.

    Args:
        preprocessing: how.
        folder: where to take images from, in the order of their names; None takes those that come with scikit-learn.
        count: how many; repeated from the first where there are fewer.
        digits: without a folder, handwritten digits instead of two photographs.

    Returns:
        (count, channels, height, width).

    Raises:
        InputError: if the folder has no images, or one of them cannot be read.
    """
    from quartermap_deploy.data.digits import load_digits
    from quartermap_deploy.data.images import prepare, sample_photographs

    if folder is not None:
        pictures: list[object] = list(_files(folder)[:count])
    elif digits:
        pictures = list(load_digits().held_out.images[:count])
    else:
        pictures = list(sample_photographs().values())
    chosen = [pictures[i % len(pictures)] for i in range(count)]
    return prepare(chosen, preprocessing)  # type: ignore[arg-type]


def _files(folder: Path) -> list[Path]:
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} with images to validate on")
    return images_in(folder)
