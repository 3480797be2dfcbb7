"""Bodies of requests: how much of them is in memory, and unpacking those that are compressed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from quartermap_deploy.serving.refusal import Refusal, busy, invalid

ENCODINGS = ("gzip", "deflate")
"""Compressions of bodies: those that Triton takes."""
PIECE = 1 << 20
"""Bytes that are unpacked at once: some milliseconds, after which other requests have their turn."""


class Budget:
    """How many bytes of requests are held, from when they arrive until they are answered."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0

    @contextmanager
    def share(self) -> Iterator[Share]:
        """While open, what one request holds of it."""
        share = Share(self)
        try:
            yield share
        finally:
            self.held -= share.held


class Share:
    """What one request holds."""

    def __init__(self, budget: Budget) -> None:
        self.held, self._budget = 0, budget

    def add(self, size: int) -> None:
        """Hold some more bytes.

        Raises:
            Refusal: if all requests together hold too many.
        """
        self.held += size
        self._budget.held += size
        if self._budget.held > self._budget.limit:
            raise busy("too many large requests are open; try again later")


class Unpacker:
    """A compressed body, unpacked as it comes."""

    def __init__(self, encoding: str) -> None:
        """Begin.

        Args:
            encoding: the header Content-Encoding.

        Raises:
            Refusal: if it is none of `ENCODINGS`.
        """
        self._encoding = encoding.strip().lower()
        if self._encoding not in ENCODINGS:
            raise Refusal(
                415,
                f"the body is compressed as {encoding[:40]!r}; expected {' or '.join(ENCODINGS)}, or neither",
            )
        self._stream: zlib._Decompress | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what some more bytes unpack to, in pieces of at most `PIECE` bytes.

        Raises:
            Refusal: if these are no such bytes.
        """
        try:
            more = bool(data)
            while more:
                if self._stream is None:
                    self._stream = self._begin(data)
                elif self._stream.eof:
                    if self._encoding != "gzip":
                        raise invalid("the body goes on behind its compressed data")
                    # A file of gzip may have several members.
                    self._stream = self._begin(data)
                piece = self._stream.decompress(data, PIECE)
                ended = self._stream.eof
                data = self._stream.unused_data if ended else self._stream.unconsumed_tail
                # What fills a piece to its end may have left something inside of zlib.
                more = bool(data) or (len(piece) == PIECE and not ended)
                yield piece
        except zlib.error as error:
            raise invalid(f"the body cannot be unpacked as {self._encoding}: {str(error)[:200]}") from None

    def end(self) -> None:
        """Check that nothing is missing.

        Raises:
            Refusal: if something is.
        """
        if self._stream is None or not self._stream.eof:
            raise invalid(f"the body ends before its {self._encoding} data do")

    def _begin(self, data: bytes) -> zlib._Decompress:
        if self._encoding == "gzip":
            return zlib.decompressobj(16 + zlib.MAX_WBITS)
        # Some clients leave out zlib's head, whose first byte ends in 8.
        return zlib.decompressobj(zlib.MAX_WBITS if data[0] & 15 == 8 else -zlib.MAX_WBITS)
