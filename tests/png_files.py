"""PNG files of every kind, written chunk by chunk, as Pillow writes only some."""

from __future__ import annotations

import struct
import zlib
from typing import Any

from numpy.typing import NDArray


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(
    samples: NDArray[Any], depth: int, color: int, *, interlaced: bool = False, more: bytes = b""
) -> bytes:
    """A PNG file of samples (height, width, channels), without filters, as Pillow cannot write all kinds."""
    height, width, _ = samples.shape
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [
            (0, 0, 8, 8),
            (4, 0, 8, 8),
            (0, 4, 4, 8),
            (2, 0, 4, 4),
            (0, 2, 2, 4),
            (1, 0, 2, 2),
            (0, 1, 1, 2),
        ]
    lines = b""
    for left, top, across, down in passes:
        for row in samples[top::down, left::across]:
            if row.size:
                bits = "".join(f"{int(value):0{depth}b}" for value in row.ravel())
                bits += "0" * (-len(bits) % 8)
                lines += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + more
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )
