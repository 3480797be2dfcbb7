"""Pixels of images that are being decoded: their colours, and the part that a model sees.

`quartermap deploy triton` puts the text of this file into a model of its repositories, which are served where this
package is not installed. So it imports NumPy and Pillow alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

LARGEST = 50_000_000
"""Most pixels of an image, and of what a resize makes of it. As RGB they take 200 MB in Pillow."""

LARGEST_TILE = 1 << 22
"""Most pixels of a tile of a TIFF that may be larger than the image."""

MODES = {"rgb": "RGB", "bgr": "RGB", "grey": "L", "rgba": "RGBA"}
"""Pillow's name for an image that has the colours of a model."""


class UnfitImageError(ValueError):
    """An image that can be read, and is none that a model could be given; the message ends a sentence about it."""


def opened(file: Any, formats: tuple[str, ...], largest: int = LARGEST) -> Any:
    """Return a Pillow image of which only the head was read; the one place where image files are opened.

    Pillow knows dozens of formats, goes by the content and not by the name, and starts Ghostscript on one of them.

    Args:
        file: its path, or a file that is open.
        formats: Pillow's names of the formats that it may have.
        largest: how many pixels it may have.

    Raises:
        UnfitImageError: if it has more pixels, or says that it lies in tiles that do.
        Exception: of many kinds, if it has another format or is damaged.
    """
    from PIL import Image

    image = Image.open(file, formats=formats)
    try:
        check_size(image.width, image.height, largest)
        _check_tiles(image)
    except Exception:
        image.close()
        raise
    return image


def _check_tiles(image: Any) -> None:
    """Refuse a TIFF whose tiles are much larger than itself: each is unpacked whole, whatever it is called for.

    Raises:
        UnfitImageError: if it is one.
    """
    tags = getattr(image, "tag_v2", {})
    width, height = (tags.get(tag, 0) for tag in (322, 323))
    if not isinstance(width, int) or not isinstance(height, int):
        raise UnfitImageError(f"has tiles of {width!r} x {height!r} pixels")
    if width * height > LARGEST_TILE and width * height > 4 * image.width * image.height:
        raise UnfitImageError(
            f"has {image.width} x {image.height} pixels in tiles of {width} x {height}; write it without tiles"
        )


def check_size(width: int, height: int, largest: int = LARGEST) -> None:
    """Check that an image has no more than `largest` pixels.

    Raises:
        UnfitImageError: if it has.
    """
    if width * height > largest:
        raise UnfitImageError(
            f"has {width} x {height} pixels, at most {largest:,} are taken; give a smaller one"
        )


def with_mode(image: Any, mode: str) -> Any:
    """Return a Pillow image in a mode, one of the values of `MODES`: the image itself if it is in that already.

    Colours become the luminance of ITU-R BT.601, as Pillow computes it, and what says nothing of its alpha is opaque.
    Of 16 bits the upper 8 are taken, as Pillow does when it reads colours of 16 bits; its conversion of greys would cut
    off what is above 255 instead.

    Raises:
        UnfitImageError: if values are NaN, infinite, negative or above what their type is for.
    """
    from PIL import Image

    if image.mode == mode:
        image.load()
        return image
    if image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise UnfitImageError("has NaN or infinite values")
        if values.min() < 0 or values.max() > 255:
            raise UnfitImageError(
                f"has values from {values.min():g} to {values.max():g}, and does not say which is white; expected "
                "0 to 255 in images of floating-point numbers"
            )
        image = image.convert("L")
    elif image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UnfitImageError(
                f"has values from {values.min()} to {values.max()}; expected 0 to 65535 in images of more than 8 bits"
            )
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)


def planes(image: Any, color: str) -> list[Any]:
    """Return the channels of an image as arrays (H, W) of uint8, in the order of `color`, a key of `MODES`."""
    values = np.asarray(image)
    if values.ndim == 2:
        return [values]
    order = range(values.shape[2])
    return [values[..., channel] for channel in (reversed(order) if color == "bgr" else order)]


def levels(mean: Any, std: Any, scale: float) -> Any:
    """Return what each of the 256 values of a pixel becomes in each channel, (channels, 256) of float32.

    An 8-bit pixel has 256 values, so looking each up is exact; it takes a quarter of the time of computing it.
    """
    # The product is rounded once: for 1/255 these are the values that a division by 255 in float32 gives.
    values = (np.arange(256) * scale).astype(np.float32)
    means, stds = (np.asarray(part, dtype=np.float32)[:, None] for part in (mean, std))
    return (values - means) / stds


def resized(
    width: int, height: int, target: tuple[int, int], *, stretch: bool, largest: int = LARGEST
) -> tuple[int, int]:
    """Return width and height after the resize to `target`, (height, width).

    Raises:
        UnfitImageError: if that is more than `largest` pixels, or what lies between is: a narrow strip grows with the
            ratio of its sides.
    """
    target_height, target_width = target
    if stretch:
        check_size(target_width, target_height, largest)
        # Pillow resizes along the width first.
        if target_width * height > largest:
            raise UnfitImageError(
                f"has {width} x {height} pixels, which are {target_width} x {height} on the way to "
                f"{target_width} x {target_height}, at most {largest:,} are taken; cut it first"
            )
        return target_width, target_height
    if target_height * width >= target_width * height:
        new = max(target_width, target_height * width // height), target_height
    else:
        new = target_width, max(target_height, target_width * height // width)
    if new[0] * new[1] > largest:
        raise UnfitImageError(
            f"has {width} x {height} pixels, which the resize of its shorter side to {min(target)} makes "
            f"{new[0]} x {new[1]}, at most {largest:,} are taken; cut it first"
        )
    return new


def cropped(
    image: Any,
    target: tuple[int, int],
    crop: tuple[int, int],
    *,
    stretch: bool,
    interpolation: str,
    largest: int = LARGEST,
) -> Any:
    """Resize an image, and cut out its centre.

    Args:
        image: a Pillow image.
        target: (height, width) that the resized image has at least.
        crop: (height, width) of the centre.
        stretch: whether the resized image has exactly the size of `target`, instead of the ratio of its sides.
        interpolation: Pillow's name of a filter, in small letters.
        largest: most pixels of the resized image.

    Raises:
        UnfitImageError: if the resized image would be too large.
    """
    from PIL import Image

    width, height = image.size
    width, height = resized(width, height, target, stretch=stretch, largest=largest)
    # Not Pillow's resize of a box, which computes the centre alone: its box is in single precision, and pixels differ.
    image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    crop_height, crop_width = crop
    top, left = round((height - crop_height) / 2), round((width - crop_width) / 2)
    return image.crop((left, top, left + crop_width, top + crop_height))
