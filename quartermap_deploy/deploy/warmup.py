"""Warm-up requests from a bundle's golden inputs, in the bytes that Triton reads.

A tensor is its values, little-endian, row after row. Of strings each is its length, in four bytes, and itself.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.data.images import restored
from quartermap_deploy.data.preprocessing import Preprocessing


def tensor_bytes(values: NDArray[Any], kind: str) -> bytes:
    """Return values as raw ones of an element type, such as "float32"."""
    return values.astype(np.dtype(kind).newbyteorder("<")).tobytes()


def string_bytes(strings: Sequence[bytes]) -> bytes:
    """Return a tensor of strings."""
    return b"".join(struct.pack("<I", len(string)) + string for string in strings)


def encoded_image(image: NDArray[np.float32], preprocessing: Preprocessing) -> bytes:
    """Return a prepared image as a PNG file again.

    Args:
        image: (channels, height, width), prepared.
        preprocessing: as it was prepared; resizing is not taken back.
    """
    file = io.BytesIO()
    restored(image, preprocessing).save(file, "PNG")
    return file.getvalue()
