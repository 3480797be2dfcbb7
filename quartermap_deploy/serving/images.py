"""Image files from strangers: JPEG and PNG alone, and none that would fill the memory."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.architectures.cards import Preprocessing
from quartermap_deploy.data.images import open_image, prepare
from quartermap_deploy.errors import InputError
from quartermap_deploy.serving.refusal import invalid

FORMATS = ("JPEG", "PNG")
LARGEST = 50_000_000
"""Most pixels of an image: as RGB they take 150 MB."""


def prepare_file(data: bytes, preprocessing: Preprocessing, place: int) -> NDArray[np.float32]:
    """Decode an image file and prepare it as the model's card says.

    Args:
        data: the file.
        preprocessing: how.
        place: which image of the request this is, from 1, for messages.

    Returns:
        (3, height, width).

    Raises:
        Refusal: if it is neither JPEG nor PNG, damaged, or has too many pixels.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # Of the file only its head has been read so far: nothing of this size is in memory.
            if image.width * image.height > LARGEST:
                raise invalid(
                    f"image {place} has {image.width} x {image.height} pixels, at most {LARGEST:,} are taken; send a "
                    "smaller one"
                )
            pixels = open_image(image)
        prepared: NDArray[np.float32] = prepare([pixels], preprocessing)[0]
        return prepared
    except (InputError, Image.DecompressionBombError) as error:
        raise invalid(f"image {place} cannot be taken: {error}") from error
    except (OSError, SyntaxError, ValueError, MemoryError, EOFError, IndexError, TypeError) as error:
        # Pillow's readers raise all of these on damaged files.
        what = "is empty" if not data else f"of {len(data)} bytes cannot be read as JPEG or PNG"
        raise invalid(f"image {place} {what}") from error
