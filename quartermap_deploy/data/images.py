"""Preparing images for a model, with Pillow and NumPy alone, as the model's card says."""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Iterable
from os import PathLike
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.architectures.cards import Preprocessing
from quartermap_deploy.data import pixels
from quartermap_deploy.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

ImageLike: TypeAlias = "str | PathLike[str] | NDArray[np.uint8] | Image"
"""A file, an array (H, W) or (H, W, 3) of uint8, or a Pillow image."""

UNREADABLE = (OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, struct.error, zlib.error)
"""What Pillow's readers raise on damaged files, beside its own errors."""


def prepare(images: Iterable[ImageLike], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Turn images into one input batch: RGB, resized, cropped at the centre and normalised.

    Greyscale images are repeated over the three channels, and of 16 bits the upper 8 are taken. Sizes and rounding are
    those of torchvision's Resize and CenterCrop on Pillow images, with which the public models were evaluated.

    Returns:
        The batch, (N, 3, height, width) with the height and width of `preprocessing.crop`.

    Raises:
        InputError: if an image cannot be read, is no image, has values of no known meaning, or is a strip that the
            resize would make larger than `pixels.LARGEST`; or if there is none.
    """
    given = list(images)
    if not given:
        raise InputError("there is no image to prepare")
    batch = np.empty((len(given), 3, *preprocessing.crop), dtype=np.float32)
    for image, place in zip(given, batch, strict=True):
        prepare_into(place, image, preprocessing)
    return batch


def prepare_into(place: NDArray[np.float32], image: ImageLike, preprocessing: Preprocessing) -> None:
    """Prepare one image as `prepare` does, into an array (3, height, width) that is there already.

    Raises:
        InputError: if the image cannot be read, is no image, has values of no known meaning, or is too narrow a strip.
    """
    centre = np.asarray(_cropped(open_image(image), preprocessing))
    for channel, values in enumerate(_levels(preprocessing.mean, preprocessing.std)):
        # An 8-bit pixel has 256 values, so looking each up is exact; it takes a quarter of the time of computing it.
        np.take(values, centre[..., channel], out=place[channel], mode="clip")


def open_image(image: ImageLike) -> Image:
    """Return an image as a Pillow image in RGB; one that is in RGB already comes back itself.

    Raises:
        InputError: if it cannot be read, is no image, or has values of no known meaning, such as NaN.
    """
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    if isinstance(image, (str, PathLike)):
        try:
            with pillow.open(image) as opened:
                return _rgb(opened, f"the image {image}")
        except (*UNREADABLE, UnidentifiedImageError, pillow.DecompressionBombError) as error:
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
    try:
        converted: Image = pixels.rgb(image)
    except pixels.UnfitImageError as error:
        raise InputError(f"{name} {error}") from error
    return converted


@functools.lru_cache(maxsize=16)
def _levels(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """What each of the 256 values of a pixel becomes in each channel, (3, 256)."""
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    means, stds = (np.asarray(part, dtype=np.float32)[:, None] for part in (mean, std))
    return np.broadcast_to((values - means) / stds, (3, 256))


def _cropped(image: Image, preprocessing: Preprocessing) -> Image:
    """Resize an image, and cut out its centre."""
    try:
        centre: Image = pixels.cropped(
            image,
            preprocessing.resize,
            preprocessing.crop,
            stretch=preprocessing.fit == "stretch",
            interpolation=preprocessing.interpolation,
        )
    except pixels.UnfitImageError as error:
        raise InputError(f"the image {error}") from error
    return centre


def sample_photographs() -> dict[str, NDArray[np.uint8]]:
    """Return the two photographs that come with scikit-learn, (427, 640, 3) of uint8, by file name."""
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    return {
        str(name).rsplit("/", 1)[-1]: image
        for name, image in zip(samples.filenames, samples.images, strict=True)
    }
