"""The parts of JPEG and PNG files that pixels come from, without everything else that a stranger can put into them.

Files hold texts, profiles, thumbnails, further frames and whatever their writers like, and readers unpack and parse it:
a PNG of some kilobytes holds hundreds of megabytes of text, a JPEG of 4 MB a million comments that take two seconds to
read. A model sees pixels alone. So the rest is stepped over by its length, and never handed to a decoder. What decoding
the pixels takes is known before any of it is decoded.
"""

from __future__ import annotations

import bisect
import io
import itertools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

Buffer: TypeAlias = "bytes | bytearray | memoryview"

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8"
FEW, LEAST = 2048, 4096
"""Parts that any file may have, and bytes that each further one has on the average: each is a step in Python."""
MOST_SCANS = 500
"""Passes over the pixels of a JPEG; a progressive one has about 10."""
SCANNED = 1_000_000_000
"""Most passes times pixels, which is what decoding takes the time for: about a second."""
MOST_READ = 1 << 20
"""Bytes that are copied at once."""
_WINDOW = 1 << 16
"""Bytes that are looked through at once, before other threads have their turn."""
_PNG_KEPT = {b"IHDR": 13, b"PLTE": 768, b"tRNS": 256}
"""Parts of a PNG that say what its pixels mean, and the bytes that each has at most."""
_PNG_MODES = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}
"""Pillow's names of the colours, by colour type."""
_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
"""Likewise, by the number of colours."""
_BYTES = {"L": 1, "P": 1, "I;16": 2}
"""Bytes of a pixel in Pillow; 4 where it is none of these."""
MOST_FILLING = 16
"""Bytes of filling before a marker, of which libjpeg wants to see all at once: Pillow hands it all of them again with
each further block, so that a file of nothing else is read for hours."""
_FILLING = b"\xff" * MOST_FILLING
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)
"""Markers of frames that libjpeg decodes: sequential and progressive ones, each with one of two codes."""
_PROGRESSIVE = (0xC2, 0xCA)
_TABLES = (0xC4, 0xCC, 0xDB, 0xDD)
_COLORS = (0xE0, 0xEE)
"""Segments of JFIF and Adobe, which say what the colours are."""
_START_OF_SCAN, _END = 0xDA, 0xD9


class DamagedError(ValueError):
    """A file that is neither a JPEG nor a PNG, or not one that anybody would write; the message ends a sentence."""


@dataclass(frozen=True)
class PixelData:
    """What a decoder is given of a file.

    Attributes:
        parts: the file, without what is no pixel: pieces of it, one behind the other.
        width: in pixels.
        height: likewise.
        mode: Pillow's name of its colours.
        coefficients: bytes in memory that decoding takes beside the pixels.
        coded: of a JPEG, what follows the head of its first scan.
        several: whether there may be more than one scan.
    """

    parts: tuple[Buffer, ...]
    width: int
    height: int
    mode: str
    coefficients: int = 0
    coded: memoryview | None = None
    several: bool = False

    @property
    def size(self) -> int:
        """Bytes of its parts."""
        return sum(map(len, self.parts))

    @property
    def image(self) -> int:
        """Bytes of its pixels in Pillow."""
        return self.width * self.height * _BYTES.get(self.mode, 4)

    def check(self) -> None:
        """Look through what is coded, which takes longer than reading the headers does, the longer the file is.

        Raises:
            DamagedError: if decoding it takes longer than its pixels are worth.
        """
        if self.coded is not None:
            _check_filling(self.coded)
            if self.several:
                _check_scans(self.coded, max(1, min(MOST_SCANS, SCANNED // (self.width * self.height))))

    def open(self) -> io.RawIOBase:
        """Return it as a file."""
        return _Pieces(self.parts)


def pixel_data(data: Buffer) -> PixelData:
    """Step through the headers of a file; nothing is decoded, and nothing copied.

    Raises:
        DamagedError: if it is no JPEG or PNG, or one that nobody would write.
    """
    view = memoryview(data)
    try:
        if bytes(view[: len(PNG)]) == PNG:
            return _png(view)
        if bytes(view[:2]) == JPEG:
            return _jpeg(view)
    except (struct.error, IndexError):
        raise DamagedError("ends before its pixels do") from None
    raise DamagedError("is neither JPEG nor PNG")


def _png(view: memoryview) -> PixelData:
    kept: dict[bytes, memoryview] = {}
    pixels: list[memoryview] = []
    whole = False
    for kind, start, end in _chunks(view):
        if kind == b"IDAT":
            pixels.append(view[start : min(end, len(view))])
        elif pixels:
            # Frames, texts and the end: the pixels lie in one row of chunks.
            whole = True
            break
        elif kind in _PNG_KEPT:
            if kind in kept or end - start > _PNG_KEPT[kind]:
                raise DamagedError(f"has a damaged {kind.decode()}")
            kept[kind] = view[start - 8 : end + 4]
    if b"IHDR" not in kept or next(iter(kept)) != b"IHDR" or not pixels:
        raise DamagedError("has no pixels")
    width, height, depth, color = struct.unpack_from(">IIBB", kept[b"IHDR"], 8)
    mode = "I;16" if (color, depth) == (0, 16) else _PNG_MODES.get(color, "")
    length = sum(map(len, pixels))
    head = struct.pack(">I4s", length, b"IDAT")
    # Nobody looks at the check sum of pixels, which have another one in them.
    tail = b"\0\0\0\0" + b"\0\0\0\0IEND\xaeB`\x82" if whole else b""
    return PixelData((PNG, *kept.values(), head, *pixels, tail), width, height, mode)


def _chunks(view: memoryview) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of what is in each chunk of a PNG."""
    position, most = len(PNG), FEW + len(view) // LEAST
    while position + 8 <= len(view):
        length, kind = struct.unpack_from(">I4s", view, position)
        end = position + 8 + length
        yield kind, position + 8, end
        position, most = end + 4, most - 1
        if most < 0:
            raise DamagedError("has too many parts for its size")


@dataclass(frozen=True)
class _Frame:
    """What a JPEG says about its pixels.

    Attributes:
        width: in pixels.
        height: likewise.
        components: colours.
        coefficients: bytes of all coefficients, which are in memory at once where there is more than one scan.
        progressive: whether there is.
    """

    width: int
    height: int
    components: int
    coefficients: int
    progressive: bool


def _jpeg(view: memoryview) -> PixelData:
    parts: list[Buffer] = [view[:2]]
    frame: _Frame | None = None
    for marker, start, end in _segments(view):
        if marker == _START_OF_SCAN and frame is not None:
            several = frame.progressive or view[start] < frame.components
            return PixelData(
                (*parts, view[start - 4 :]),
                frame.width,
                frame.height,
                _JPEG_MODES.get(frame.components, ""),
                several * frame.coefficients,
                view[end:],
                several,
            )
        if marker in _FRAMES:
            if frame is not None:
                raise DamagedError("has more than one frame")
            frame = _frame(view[start:end], marker in _PROGRESSIVE)
        elif marker not in _TABLES and marker not in _COLORS:
            continue
        parts.append(view[start - 4 : end])
    raise DamagedError("has no pixels of a kind that is taken")


def _segments(view: memoryview) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of what is in each segment of a JPEG, until the pixels of the first scan begin."""
    position, most = 2, FEW + len(view) // LEAST
    while position + 4 <= len(view):
        most -= 1
        if most < 0:
            raise DamagedError("has too many parts for its size")
        marker = view[position + 1]
        if view[position] != 0xFF or marker in (0x00, 0xFF):
            # Filling, and what careless writers leave between segments.
            position += 1
            continue
        (length,) = struct.unpack_from(">H", view, position + 2)
        start, end = position + 4, position + 2 + length
        if length < 2 or end > len(view) or marker == _END:
            return
        yield marker, start, end
        if marker == _START_OF_SCAN:
            return
        position = end


def _frame(segment: memoryview, progressive: bool) -> _Frame:
    """Read the segment that says how large the image is, and how many samples its colours have."""
    height, width, count = struct.unpack_from(">HHB", segment, 1)
    samples = [(segment[place] >> 4) * (segment[place] & 15) for place in range(7, 7 + 3 * count, 3)]
    if not width or not height or not count or 0 in samples or max(samples) > 16:
        raise DamagedError("has no pixels")
    # Two bytes for each sample; the colour with the most of them has one for each pixel.
    coefficients = 2 * width * height * sum(samples) // max(samples)
    return _Frame(width, height, count, coefficients, progressive)


def _check_filling(view: memoryview) -> None:
    for position in range(0, len(view), _WINDOW):
        if _FILLING in bytes(view[position : position + _WINDOW + MOST_FILLING]):
            raise DamagedError(f"has {MOST_FILLING} bytes of filling in a row")


def _check_scans(view: memoryview, most: int) -> None:
    """Count the scans behind the first one."""
    scans, position = 1, 0
    for _ in range(FEW):
        marker, position = _next_marker(view, position)
        if marker in (None, _END):
            return
        (length,) = struct.unpack_from(">H", view, position) if position + 2 <= len(view) else (2,)
        position += length
        scans += marker == _START_OF_SCAN
        if scans > most:
            break
    raise DamagedError(
        f"has more than {most} scans, or too many parts between them; save it as a baseline JPEG or as PNG"
    )


def _next_marker(view: memoryview, position: int) -> tuple[int | None, int]:
    """Find the next marker behind coded pixels; returns it, or None at the end, and where it ends."""
    while position < len(view):
        if (found := _MARKER.search(view, position, position + _WINDOW)) is not None:
            return view[found.end() - 1], found.end()
        # A marker may begin with the last byte that was looked at.
        position += _WINDOW - 1
    return None, position


class _Pieces(io.RawIOBase):
    """Pieces of a file, one behind the other, as a file that can be read; nothing is copied but what is read."""

    def __init__(self, parts: tuple[Buffer, ...]) -> None:
        self._parts = [memoryview(part) for part in parts]
        self._starts = list(itertools.accumulate((len(part) for part in parts), initial=0))
        self._position = 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be read from anywhere."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go somewhere."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._starts[-1]}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        """Return where it is."""
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Read some bytes, of which there may be fewer than asked for where these are many."""
        wanted = MOST_READ if size is None or size < 0 else min(size, MOST_READ)
        found: list[memoryview] = []
        place = bisect.bisect_right(self._starts, self._position) - 1
        while wanted > 0 and place < len(self._parts):
            start = self._position - self._starts[place]
            piece = self._parts[place][start : start + wanted]
            found.append(piece)
            self._position += len(piece)
            wanted -= len(piece)
            place += 1
        return b"".join(found)
