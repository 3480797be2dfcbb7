"""The inputs that parity is checked on: real images, and the edges of the input range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.architectures.cards import ModelCard
from quartermap_deploy.errors import InputError

COUNT = 2
LARGE = 1000.0
"""Factor of the case "large": far beyond any normalised pixel, and still far from the limits of float32."""

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def real_images(
    card: ModelCard, size: tuple[int, int], folder: Path | None = None, count: int = COUNT
) -> NDArray[np.float32]:
    """Images prepared as the card says.

    Args:
        card: the model's card.
        size: (height, width) of the input.
        folder: where to take images from, in the order of their names; None takes handwritten digits for the model
            that was trained on them, and two photographs for all others.
        count: how many; repeated from the first where there are fewer.

    Returns:
        (count, channels, height, width).

    Raises:
        InputError: if the folder has no images, or one of them cannot be read.
    """
    from quartermap_deploy.data.digits import load_digits
    from quartermap_deploy.data.images import prepare, sample_photographs

    if folder is not None:
        pictures: list[object] = list(_files(folder)[:count])
    elif card.weights is not None and "digits" in card.name:
        pictures = list(load_digits().held_out.images[:count])
    else:
        pictures = list(sample_photographs().values())
    chosen = [pictures[i % len(pictures)] for i in range(count)]
    return prepare(chosen, card.preprocessing.with_size(*size))  # type: ignore[arg-type]


def parity_cases(images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """The cases by name: the images, the same in another batch size, zeros, and values far out of range."""
    return {
        "images": images,
        "single image": images[:1],
        "zeros": np.zeros_like(images),
        "large values": images * np.float32(LARGE),
    }


def _files(folder: Path) -> list[Path]:
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} with images to validate on")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError(
            f"the folder {folder} holds no image; expected files ending in {', '.join(IMAGE_SUFFIXES)}"
        )
    return files
