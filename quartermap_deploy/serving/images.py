"""Image files from strangers: JPEG and PNG alone, nothing of them but pixels, and none that would fill the memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.data import pixels
from quartermap_deploy.data.images import UNREADABLE, open_image, prepare
from quartermap_deploy.data.preprocessing import Color, Preprocessing
from quartermap_deploy.errors import InputError
from quartermap_deploy.serving.pixel_data import Buffer, DamagedError, PixelData, pixel_data
from quartermap_deploy.serving.refusal import invalid

Result = TypeVar("Result")

FORMATS = ("JPEG", "PNG")
LARGEST = pixels.LARGEST
"""Most pixels of an image."""
MOST_HELD = 4 * LARGEST + 8_000_000
"""Bytes in memory while an image is decoded and resized, at most: Pillow has four for each pixel."""
BALLAST = 1 << 16
"""Bytes that any file may have beside its pixels: a profile, a thumbnail, what a camera writes."""
_GREYS = ("L", "I;16")
_COPIES = {"I;16": 7}
"""Bytes of a pixel of the copies that are made of greys of 16 bits, at most; of other colours there is one copy."""


class ImageFile:
    """A file whose headers were read, and nothing else of it.

    Attributes:
        held: bytes in memory while it is decoded and resized.
    """

    def __init__(self, data: Buffer, preprocessing: Preprocessing, place: int) -> None:
        """Read the headers.

        Args:
            data: the file.
            preprocessing: how it is going to be prepared.
            place: which image of the request this is, from 1, for messages.

        Raises:
            Refusal: if it is neither JPEG nor PNG, has too many pixels, itself or resized, or takes too much memory.
        """
        self._size, self._place, self._preprocessing = len(data), place, preprocessing
        self._data, self.held = self._guarded(lambda: self._open(data))

    @property
    def ballast(self) -> int:
        """Bytes beside the pixels where these are most of the file and many; else 0."""
        size = self._data.size
        beside = self._size - size
        return beside if beside > max(BALLAST, size) else 0

    def prepare(self) -> NDArray[np.float32]:
        """Decode the file, and prepare it for the model; can be called once.

        Returns:
            (channels, height, width).

        Raises:
            Refusal: if it is damaged, or its values have no known meaning.
        """
        return self._guarded(self._prepare)

    def _open(self, data: Buffer) -> tuple[PixelData, int]:
        """Return the pixels' data, and how many bytes are in memory while they are decoded and resized."""
        settings = self._preprocessing
        found = pixel_data(data)
        width, height = found.width, found.height
        if not width or not height:
            raise DamagedError("has no pixels")
        pixels.check_size(width, height)
        resized = pixels.resized(width, height, settings.resize, stretch=settings.fit == "stretch")
        held = self._bytes_held(found, *resized)
        if held > MOST_HELD:
            raise pixels.UnfitImageError(
                f"has {width} x {height} pixels, which take {held / 1e6:,.0f} MB to decode and resize, at most "
                f"{MOST_HELD / 1e6:,.0f} are taken; send a smaller one, not progressive and no strip"
            )
        found.check()
        return found, held

    def _bytes_held(self, data: PixelData, width: int, height: int) -> int:
        """Return the bytes in memory for an image that is resized to a width and height."""
        mode = pixels.MODES[self._color(data)]
        pixel = 1 if mode == "L" else 4
        count = data.width * data.height
        decoded = data.image + max(
            data.coefficients, count * _COPIES.get(data.mode, pixel * (data.mode != mode))
        )
        # To resize what has alpha, Pillow multiplies the colours by it, in another copy.
        resized = 2 * pixel * count if mode == "RGBA" else 0
        # Resized along one axis alone; which one comes first is Pillow's affair.
        between = pixel * max(width * data.height, data.width * height)
        return max(decoded, resized) + between

    def _color(self, data: PixelData) -> Color:
        """The colour that it is resized in: greys stay greys, as all channels of a colour would be the same."""
        color = self._preprocessing.color
        return "grey" if data.mode in _GREYS and color in ("rgb", "bgr") else color

    def _prepare(self) -> NDArray[np.float32]:
        settings = self._preprocessing
        with pixels.opened(self._data.open(), FORMATS) as image:
            if image.size != (self._data.width, self._data.height):
                raise DamagedError("says two sizes")
            color = self._color(self._data)
            decoded = open_image(image, color)
            if decoded is not image:
                image.close()
            if color != settings.color:
                stretch, interpolation = settings.fit == "stretch", settings.interpolation
                decoded = pixels.cropped(
                    decoded, settings.resize, settings.crop, stretch=stretch, interpolation=interpolation
                )
                settings = dataclasses.replace(settings, resize=settings.crop, fit="stretch")
            prepared: NDArray[np.float32] = prepare([decoded], settings)[0]
        return prepared

    def _guarded(self, work: Callable[[], Result]) -> Result:
        """Do something with the file, and make what Pillow raises a refusal."""
        from PIL import Image

        try:
            return work()
        except (InputError, pixels.UnfitImageError) as error:
            raise invalid(f"image {self._place} {str(error).removeprefix('the image ')}") from error
        except Image.DecompressionBombError:
            # Pillow's own limit, where its user has left it on.
            raise invalid(
                f"image {self._place} has too many pixels, at most {LARGEST:,} are taken; send a smaller one"
            ) from None
        except UNREADABLE as error:
            what = f"of {self._size} bytes cannot be read as JPEG or PNG" if self._size else "is empty"
            why = f": it {error}" if self._size and isinstance(error, DamagedError) else ""
            raise invalid(f"image {self._place} {what}{why}") from error
