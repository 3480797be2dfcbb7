"""Bodies of requests: how much of them is in memory, and unpacking those that are compressed."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from quartermap_deploy.serving.arrivals import PATIENCE, Arrival, arriving
from quartermap_deploy.serving.refusal import Refusal, busy, invalid
from quartermap_deploy.serving.timeouts import timeout

ENCODINGS = ("gzip", "deflate")
"""Compressions of bodies: those that Triton takes."""
PIECE = 1 << 20
"""Bytes that are unpacked at once: some milliseconds, after which other requests have their turn."""


BODIES = 4
"""How many bodies of the largest size are held beside the prepared images that the queue has room for."""
SMALL = 4 << 20
"""Bytes of a small request at most: an image file, or a batch of prepared images."""
BESIDE = 24_000_000
"""Bytes of large requests that there is room for beside an image of the largest size that is being decoded."""
MUCH = 4
"""How many times as large a request is that gives way to another one even if it is not slow."""


class Pot:
    """Some of the memory, for some of the requests."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self.receiving: set[Share] = set()
        self.waiting: list[asyncio.Future[None]] = []

    def give_back(self, size: int) -> None:
        """Hold so much less, of which those who wait for it are told."""
        self.held -= size
        for place in self.waiting if size else ():
            if not place.done():
                place.set_result(None)


class Budget:
    """How many bytes of requests are held, from when they arrive until they are answered.

    Small ones have a part for themselves, so that a few large ones do not keep them out.
    """

    def __init__(self, max_body: int, images: int, decoded: int = 0) -> None:
        """Plan.

        Args:
            max_body: bytes of the largest request. `BODIES` of them are held at most, one of them being for small ones.
            images: bytes of prepared images that the queue has room for; they are held beside these.
            decoded: bytes of the largest image while it is decoded; there has to be room for it, too, among the large.
        """
        self.most_small = min(SMALL, max_body // BODIES)
        self._decoding = 0
        largest = decoded + BESIDE if decoded else 0
        self.small, self.large = Pot(max_body + images), Pot(max((BODIES - 1) * max_body, largest))

    @property
    def held(self) -> int:
        """Bytes that are held."""
        return self.small.held + self.large.held

    async def take_room(self, size: int, seconds: float) -> None:
        """Wait until there is room for an image of so many bytes, and hold it until `give_back_room`.

        Raises:
            Refusal: if there is none in that many seconds.
        """
        pot = self.large
        try:
            async with timeout(seconds):
                while pot.held + size > pot.limit:
                    await self._freed(size)
        except asyncio.TimeoutError:
            raise busy("there is no room to decode the image in; try again later") from None
        pot.held += size
        self._decoding += size

    def give_back_room(self, size: int) -> None:
        """Hold what an image took no more."""
        self._decoding -= size
        self.large.give_back(size)

    async def _freed(self, size: int) -> None:
        """Wait until something was given back; slow senders do at once where nobody else can."""
        pot = self.large
        slow = [share for share in pot.receiving if share.slow]
        if slow and pot.held - self._decoding + size > pot.limit:
            max(slow, key=lambda share: share.held).give_way()
            return
        place = asyncio.get_running_loop().create_future()
        pot.waiting.append(place)
        try:
            # A sender may become slow meanwhile.
            await asyncio.wait({place}, timeout=PATIENCE)
        finally:
            pot.waiting.remove(place)

    @contextmanager
    def share(self) -> Iterator[Share]:
        """While open, what one request holds of it."""
        share = Share(self)
        try:
            yield share
        finally:
            share.leave()


class Share:
    """What one request holds."""

    def __init__(self, budget: Budget) -> None:
        self.held, self._budget, self._pot = 0, budget, budget.small
        self._arrival: Arrival | None = None

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """While open, the request is received, and gives way to others if it is slow.

        Raises:
            Refusal: if it had to.
        """
        try:
            with arriving() as self._arrival:
                self._pot.receiving.add(self)
                yield
        finally:
            self._arrival = None
            self._pot.receiving.discard(self)

    def add(self, size: int) -> None:
        """Hold some more bytes.

        Where too many would be held, requests that are on their way give way if they have been so for long, or are much
        larger; those with the most bytes first. Who sends much of a body and not the rest must not hold up the others.

        Raises:
            Refusal: if that is not enough.
        """
        held = self.held + size
        self.leave()
        pot = self._budget.small if held <= self._budget.most_small else self._budget.large
        self._pot, self.held = pot, held
        pot.held += held
        if self._arrival is not None:
            pot.receiving.add(self)
        while pot.held > pot.limit:
            yielding = [
                share
                for share in pot.receiving
                if share is not self and (share.slow or share.held >= MUCH * self.held)
            ]
            if not yielding:
                raise busy("the requests that are open have too many bytes together; try again later")
            max(yielding, key=lambda share: share.held).give_way()

    @property
    def slow(self) -> bool:
        """Whether the request has been on its way for longer than others have to put up with."""
        return self._arrival is not None and self._arrival.slow

    def give_way(self) -> None:
        """Break off the request, which must be on its way."""
        assert self._arrival is not None
        self._arrival.give_way()
        self.leave()

    def leave(self) -> None:
        """Hold nothing any more."""
        self._pot.receiving.discard(self)
        self._pot.give_back(self.held)
        self.held = 0


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
