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

from quartermap_deploy.data import pixels
from quartermap_deploy.data.preprocessing import Color, Preprocessing
from quartermap_deploy.data.scikit_learn import packaged
from quartermap_deploy.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

ImageLike: TypeAlias = "str | PathLike[str] | NDArray[np.uint8] | Image"
"""A file, an array (H, W), (H, W, 3) or (H, W, 4) of uint8, or a Pillow image."""

FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
"""Pillow's names of what files may be, whatever they are called; `image_files.IMAGE_SUFFIXES` has their endings."""
LARGEST_FILE = 178_956_970
"""Most pixels of a file, those at which Pillow refuses by itself. As RGB they take 720 MB in Pillow."""
UNREADABLE = (
    *(
        OSError,
        SyntaxError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        AssertionError,
    ),
    *(EOFError, MemoryError, RuntimeError, RuntimeWarning, struct.error, zlib.error),
)
"""What Pillow's readers raise on damaged files, beside its own errors."""


def prepare(images: ImageLike | Iterable[ImageLike], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Turn images into one input batch: in the model's colours, resized, cropped at the centre and normalised.

    Greyscale images are repeated over the channels of a colour, colours become luminance for a grey model, alpha is
    dropped unless the model takes it, and of 16 bits the upper 8 are taken. Sizes and rounding are those of
    torchvision's Resize and CenterCrop on Pillow images, with which the public models were evaluated.

    Args:
        images: files, arrays or Pillow images, or one of them, which is a batch of one; or an array of several images.
        preprocessing: what the model wants.

    Returns:
        The batch, (N, channels, height, width) with the channels and the crop of `preprocessing`.

    Raises:
        InputError: if an image cannot be read, is no image, has values of no known meaning, or is a strip that the
            resize would make larger than `pixels.LARGEST`; or if there is none.
    """
    given: list[ImageLike] = [images] if is_one(images) else list(images)  # type: ignore[arg-type, list-item]
    if not given:
        raise InputError("there is no image to prepare")
    batch = np.empty((len(given), *preprocessing.input_shape), dtype=np.float32)
    for image, place in zip(given, batch, strict=True):
        prepare_into(place, image, preprocessing)
    return batch


def is_one(files: object) -> bool:
    """Whether this is an image, not several: a text is no list of letters, and (H, W, 3) is no list of rows."""
    if isinstance(files, np.ndarray):
        return files.ndim < 3 or (files.ndim == 3 and files.shape[2] in (3, 4))
    return isinstance(files, (str, PathLike)) or not isinstance(files, Iterable)


def prepare_into(place: NDArray[np.float32], image: ImageLike, preprocessing: Preprocessing) -> None:
    """Prepare one image as `prepare` does, into an array (channels, height, width) that is there already.

    Raises:
        InputError: if the image cannot be read, is no image, has values of no known meaning, or is too narrow a strip.
    """
    centre = _cropped(open_image(image, preprocessing.color), preprocessing)
    levels = _levels(preprocessing.mean, preprocessing.std, preprocessing.scale)
    planes = pixels.planes(centre, preprocessing.color)
    for plane, values, prepared in zip(planes, levels, place, strict=True):
        np.take(values, plane, out=prepared, mode="clip")


def restored(prepared: NDArray[np.float32], preprocessing: Preprocessing) -> Image:
    """Return the picture that a model sees; resizing and cropping are not taken back.

    Args:
        prepared: (channels, height, width), as `prepare` makes it.
        preprocessing: as it was prepared.
    """
    from PIL import Image as pillow

    mean, std = (
        np.asarray(part, dtype=np.float32)[:, None, None] for part in (preprocessing.mean, preprocessing.std)
    )
    values = np.rint((prepared * std + mean) / np.float32(preprocessing.scale))
    channels = list(np.clip(values, 0, 255).astype(np.uint8))
    if preprocessing.color == "bgr":
        channels.reverse()
    return pillow.fromarray(channels[0] if len(channels) == 1 else np.stack(channels, axis=-1))


def open_image(image: ImageLike, color: Color = "rgb") -> Image:
    """Return an image as a Pillow image of a model's colours; one that is so already comes back itself.

    Args:
        image: the image; an array of four channels has alpha in the last.
        color: the model's colours. Their order is Pillow's: also for "bgr" the image is in RGB.

    Raises:
        InputError: if it cannot be read, is no image, or has values of no known meaning, such as NaN.
    """
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    if isinstance(image, (str, PathLike)):
        try:
            with pixels.opened(image, FORMATS, LARGEST_FILE) as opened:
                return _with_color(opened, color, f"the image {image}")
        except pixels.UnfitImageError as error:
            raise InputError(f"the image {image} {error}") from error
        except (*UNREADABLE, UnidentifiedImageError, pillow.DecompressionBombError) as error:
            raise InputError(f"the image {image} cannot be read: {error}") from error
    if isinstance(image, np.ndarray):
        grey_or_colour = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
        if image.dtype != np.uint8 or not grey_or_colour or 0 in image.shape:
            raise InputError(
                f"an array of shape {image.shape} and type {image.dtype} is no image; expected (H, W) or "
                "(H, W, 3) of uint8, or (H, W, 4) with alpha"
            )
        return _with_color(pillow.fromarray(image), color, "the image")
    if not isinstance(image, pillow.Image):
        raise InputError(f"a {type(image).__name__} is no image; expected a file, an array or a Pillow image")
    return _with_color(image, color, "the image")


def _with_color(image: Image, color: Color, name: str) -> Image:
    try:
        converted: Image = pixels.with_mode(image, pixels.MODES[color])
    except pixels.UnfitImageError as error:
        raise InputError(f"{name} {error}") from error
    return converted


@functools.lru_cache(maxsize=16)
def _levels(mean: tuple[float, ...], std: tuple[float, ...], scale: float) -> NDArray[np.float32]:
    """`pixels.levels`, computed once for all images of a model."""
    levels: NDArray[np.float32] = pixels.levels(mean, std, scale)
    return levels


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
    found = {}
    for name in ("china.jpg", "flower.jpg"):
        with pixels.opened(packaged("images", name), ("JPEG",)) as image:
            found[name] = np.array(image)
    return found
