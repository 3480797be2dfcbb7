"""Preparing images for a model, with Pillow and NumPy alone, as the model's card says."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.architectures.cards import Preprocessing
from quartermap_deploy.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

ImageLike: TypeAlias = "str | PathLike[str] | NDArray[np.uint8] | Image"
"""A file, an array (H, W) or (H, W, 3) of uint8, or a Pillow image."""


def prepare(images: Iterable[ImageLike], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Turn images into one input batch: RGB, resized, cropped at the centre and normalised.

    Greyscale images are repeated over the three channels. Sizes and rounding are those of torchvision's
    Resize and CenterCrop on Pillow images, with which the public models were evaluated.

    Returns:
        The batch, (N, 3, height, width) with the height and width of `preprocessing.crop`.

    Raises:
        InputError: if an image cannot be read, is no image or has NaN or infinite values, or if there is none.
    """
    batch = [_prepare_one(open_image(image), preprocessing) for image in images]
    if not batch:
        raise InputError("there is no image to prepare")
    return np.stack(batch)


def open_image(image: ImageLike) -> Image:
    """Return an image as a Pillow image in RGB.

    Raises:
        InputError: if it cannot be read, is no image, or has NaN or infinite values.
    """
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    if isinstance(image, (str, PathLike)):
        try:
            with pillow.open(image) as opened:
                return _rgb(opened, f"the image {image}")
        except (OSError, UnidentifiedImageError, pillow.DecompressionBombError) as error:
            raise InputError(f"the image {image} cannot be read: {error}") from error
    if isinstance(image, np.ndarray):
        grey_or_colour = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
        if image.dtype != np.uint8 or not grey_or_colour or 0 in image.shape:
            raise InputError(
                f"an array of shape {image.shape} and type {image.dtype} is no image; expected (H, W) or "
                "(H, W, 3) of uint8"
            )
        return pillow.fromarray(image).convert("RGB")
    if not isinstance(image, pillow.Image):
        raise InputError(f"a {type(image).__name__} is no image; expected a file, an array or a Pillow image")
    return _rgb(image, "the image")


def _rgb(image: Image, name: str) -> Image:
    # Pillow's only type with such values, and its conversion makes a colour of them without a word.
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise InputError(f"{name} has NaN or infinite values")
    converted: Image = image.convert("RGB")
    return converted


def _prepare_one(image: Image, preprocessing: Preprocessing) -> NDArray[np.float32]:
    from PIL import Image as pillow

    filters: dict[str, Any] = {
        "nearest": pillow.Resampling.NEAREST,
        "bilinear": pillow.Resampling.BILINEAR,
        "bicubic": pillow.Resampling.BICUBIC,
    }
    width, height = _resized(image.size, preprocessing)
    image = image.resize((width, height), filters[preprocessing.interpolation])
    crop_height, crop_width = preprocessing.crop
    top, left = round((height - crop_height) / 2), round((width - crop_width) / 2)
    image = image.crop((left, top, left + crop_width, top + crop_height))
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    mean = np.asarray(preprocessing.mean, dtype=np.float32)
    std = np.asarray(preprocessing.std, dtype=np.float32)
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def _resized(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Return (width, height) after the resize, for an image of (width, height)."""
    width, height = size
    target_height, target_width = preprocessing.resize
    if preprocessing.fit == "stretch":
        return target_width, target_height
    if target_height * width >= target_width * height:
        return max(target_width, target_height * width // height), target_height
    return target_width, max(target_height, target_width * height // width)


def sample_photographs() -> dict[str, NDArray[np.uint8]]:
    """Return the two photographs that come with scikit-learn, (427, 640, 3) of uint8, by file name."""
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    return {
        str(name).rsplit("/", 1)[-1]: image
        for name, image in zip(samples.filenames, samples.images, strict=True)
    }
