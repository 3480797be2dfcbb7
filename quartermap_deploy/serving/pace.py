"""How fast uploads come in: not so fast that the event loop has time for nothing else.

A client on the same machine or in the same rack sends as fast as the loop can read. A few of them, whatever they send
and however it ends, would take most of its time. So uploads, and what still comes of a body that was refused, share a
part of its time among them; what is small comes in at once.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

REST = 5
"""How much longer than reading and parsing took the loop does something else before it reads more of an upload."""
RATE = 100_000_000
"""Bytes a second that all uploads come in with at most: much of what reading takes is the system's time."""
AT_ONCE = 1 << 17
"""Bytes of each request that come in beside that."""


class Pace:
    """Time that many share, one behind the other."""

    def __init__(self) -> None:
        self._free = 0.0

    def turn(self, seconds: float) -> float:
        """Return in how many seconds it is somebody's turn who takes so many; at once where nobody came before."""
        now = time.monotonic()
        start = max(now, self._free)
        self._free = start + seconds
        return start - now

    def wait(self, spent: float, size: int) -> float:
        """Return the seconds to wait after so many were spent on so many bytes, behind all that were before."""
        seconds = max(REST * spent, size / RATE)
        return self.turn(seconds) + seconds


class PacedTransport:
    """A transport that is read from at a pace while it is told to; otherwise it is the one that it is made of.

    There may be two reasons not to read, the pace and whoever uses the transport, and it goes on when there is none.
    """

    def __init__(self, transport: asyncio.Transport, pace: Pace) -> None:
        self._transport, self._pace = transport, pace
        self._loop = asyncio.get_running_loop()
        self._left: int | None = None
        self._spent = 0.0
        self._paused = self._waits = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def slow_down(self) -> None:
        """Read at the pace from now on, but for the first bytes."""
        if self._left is None:
            self._left, self._spent = AT_ONCE, 0.0

    def speed_up(self) -> None:
        """Read as fast as it goes from now on."""
        self._left = None

    def spend(self, seconds: float) -> None:
        """So much of the loop's time went into what was read."""
        self._spent += seconds

    def received(self, size: int) -> None:
        """So many bytes were read."""
        if self._left is None:
            return
        self._left = max(0, self._left - size)
        if self._left == 0 and not self._waits:
            self._waits = True
            self._transport.pause_reading()
            self._loop.call_later(self._pace.wait(self._spent, size), self._go_on)
            self._spent = 0.0

    def pause_reading(self) -> None:
        """Read nothing."""
        self._paused = True
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on, as soon as that is in order."""
        self._paused = False
        if not self._waits:
            self._transport.resume_reading()

    def _go_on(self) -> None:
        self._waits = False
        if not self._paused and not self._transport.is_closing():
            self._transport.resume_reading()
