"""Image files from strangers: JPEG and PNG alone, nothing of them but pixels, and none that would fill the memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.data import pixels
from quartermap_deploy.data.images import UNREADABLE, open_image, prepare
from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.errors import InputError
from quartermap_deploy.serving.pixel_data import Buffer, DamagedError, PixelData, pixel_data
from quartermap_deploy.serving.refusal import invalid

if TYPE_CHECKING:
    from PIL.Image import Image

Result = TypeVar("Result")

FORMATS = ("JPEG", "PNG")
LARGEST = pixels.LARGEST
"""Most pixels of an image."""
MOST_HELD = 4 * LARGEST + 8_000_000
"""Bytes in memory while an image is decoded and resized, at most: Pillow has four for each pixel."""
STRIP = 1_000_000
"""Pixels that are brought to the model's colours and width at once, where an image has more."""


class ImageFile:
    """A file whose headers were read, and nothing else of it."""

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
        self._data, self._resized = self._guarded(lambda: self._open(data))

    @property
    def held(self) -> int:
        """Bytes in memory while it is decoded and resized."""
        # Resized in its width alone, it has all of its rows.
        between = self._resized[0] * self._data.height * 4
        strip = 4 * min(STRIP, self._data.width * self._data.height)
        return self._data.held + between + strip

    def prepare(self) -> NDArray[np.float32]:
        """Decode the file, and prepare it for the model; can be called once.

        Returns:
            (channels, height, width).

        Raises:
            Refusal: if it is damaged, or its values have no known meaning.
        """
        return self._guarded(self._prepare)

    def _open(self, data: Buffer) -> tuple[PixelData, tuple[int, int]]:
        """Return the pixels' data, and (width, height) of the resized image."""
        settings = self._preprocessing
        found = pixel_data(data)
        width, height = found.width, found.height
        if not width or not height:
            raise DamagedError("has no pixels")
        pixels.check_size(width, height)
        resized = pixels.resized(width, height, settings.resize, stretch=settings.fit == "stretch")
        if (held := found.held + resized[0] * height * 4) > MOST_HELD:
            raise pixels.UnfitImageError(
                f"has {width} x {height} pixels, which take {held / 1e6:,.0f} MB to decode and resize, at most "
                f"{MOST_HELD / 1e6:,.0f} are taken; send a smaller one, not progressive and no strip"
            )
        found.check()
        return found, resized

    def _prepare(self) -> NDArray[np.float32]:
        from PIL import Image

        with Image.open(cast("IO[bytes]", self._data.open()), formats=FORMATS) as image:
            if image.size != (self._data.width, self._data.height):
                raise DamagedError("says two sizes")
            image.load()
            narrowed, settings = image, self._preprocessing
            if image.width * image.height > STRIP:
                narrowed = self._narrowed(image)
                image.close()
                width, height = self._resized
                settings = dataclasses.replace(settings, resize=(height, width), fit="stretch")
            prepared: NDArray[np.float32] = prepare([narrowed], settings)[0]
        return prepared

    def _narrowed(self, image: Image) -> Image:
        """Bring an image to the model's colours and to its resized width, strip by strip.

        Pillow resizes the width first, row by row, and rounds to whole numbers before it resizes the height; so what
        comes of both is the same as at once, and the image is never in memory twice.
        """
        from PIL import Image as pillow

        settings = self._preprocessing
        width, rows = self._resized[0], max(1, STRIP // image.width)
        interpolation = pillow.Resampling[settings.interpolation.upper()]
        whole = pillow.new(pixels.MODES[settings.color], (width, image.height))
        for top in range(0, image.height, rows):
            bottom = min(top + rows, image.height)
            strip = open_image(image.crop((0, top, image.width, bottom)), settings.color)
            whole.paste(strip.resize((width, bottom - top), interpolation), (0, top))
        return whole

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
        except (*UNREADABLE, MemoryError) as error:
            what = f"of {self._size} bytes cannot be read as JPEG or PNG" if self._size else "is empty"
            why = f": it {error}" if self._size and isinstance(error, DamagedError) else ""
            raise invalid(f"image {self._place} {what}{why}") from error
