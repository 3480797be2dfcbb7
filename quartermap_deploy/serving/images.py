"""Image files from strangers: JPEG and PNG alone, and none that would fill the memory."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.data import pixels
from quartermap_deploy.data.images import UNREADABLE, open_image, prepare
from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.errors import InputError
from quartermap_deploy.serving.refusal import invalid

if TYPE_CHECKING:
    from PIL.Image import Image

Result = TypeVar("Result")

FORMATS = ("JPEG", "PNG")
LARGEST = pixels.LARGEST
"""Most pixels of an image. RGBA of that size takes 400 MB while it is decoded: Pillow has four bytes for each pixel,
and holds the file's colours and the model's at once."""


class ImageFile:
    """A file whose head was read, and nothing else of it."""

    def __init__(self, data: bytes, preprocessing: Preprocessing, place: int) -> None:
        """Read the head.

        Args:
            data: the file.
            preprocessing: how it is going to be prepared.
            place: which image of the request this is, from 1, for messages.

        Raises:
            Refusal: if it is neither JPEG nor PNG, or has too many pixels, itself or resized.
        """
        self._size, self._place, self._preprocessing = len(data), place, preprocessing
        self._image, self._resized = self._guarded(lambda: self._open(data))

    @property
    def pixels(self) -> int:
        """How many pixels will be in memory: those of the file, or of its resized form if these are more."""
        width, height = self._image.size
        return max(width * height, self._resized[0] * self._resized[1])

    def prepare(self) -> NDArray[np.float32]:
        """Decode the file, and prepare it for the model; can be called once.

        Returns:
            (channels, height, width).

        Raises:
            Refusal: if it is damaged, or its values have no known meaning.
        """
        return self._guarded(self._prepare)

    def _open(self, data: bytes) -> tuple[Image, tuple[int, int]]:
        """Return the image, and its (width, height) once it is resized."""
        settings = self._preprocessing
        image = pixels.opened(io.BytesIO(data), FORMATS)
        return image, pixels.resized(
            image.width, image.height, settings.resize, stretch=settings.fit == "stretch"
        )

    def _prepare(self) -> NDArray[np.float32]:
        with self._image as image:
            decoded = open_image(image, self._preprocessing.color)
            if decoded is not image:
                image.close()
            prepared: NDArray[np.float32] = prepare([decoded], self._preprocessing)[0]
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
            raise invalid(f"image {self._place} {what}") from error
