"""Requests on their way in: those that take long give way where others could not get in otherwise."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from quartermap_deploy.serving.refusal import busy

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout

PATIENCE = 1.0
"""Seconds that a request may take to arrive whatever others want."""


class Arrival:
    """A request that is being received by a task."""

    def __init__(self, task: asyncio.Task[object]) -> None:
        self.since, self.gave_way, self._task = time.monotonic(), False, task

    @property
    def seconds(self) -> float:
        """How long it has been arriving."""
        return time.monotonic() - self.since

    @property
    def slow(self) -> bool:
        """Whether it has been arriving for longer than others have to put up with."""
        return self.seconds >= PATIENCE

    def give_way(self) -> None:
        """Break it off, which its sender is told."""
        self.gave_way = True
        self._task.cancel()


@contextmanager
def arriving() -> Iterator[Arrival]:
    """While open, the task that is running receives a request.

    Raises:
        Refusal: if it had to give way.
    """
    task = asyncio.current_task()
    assert task is not None
    arrival = Arrival(task)
    try:
        yield arrival
    except asyncio.CancelledError:
        if not arrival.gave_way:
            raise
        if sys.version_info >= (3, 11):
            task.uncancel()
        raise busy(
            f"the request was still on its way after {arrival.seconds:.1f} s, and others wait; send it faster, or "
            "fewer at a time"
        ) from None


class Turns:
    """At most so many arrivals at a time.

    Where none of them has come to its end for `PATIENCE` and others wait, the one that has been there longest gives
    way; twice as many the next time, until one comes to its end again. Senders who hold every turn stop nobody then,
    and those of a network that is slow for all are not all broken off at once.
    """

    def __init__(self, limit: int) -> None:
        self._free = asyncio.Semaphore(limit)
        self._arrivals: list[Arrival] = []  # the longest first
        self._waiting, self._leaving = 0, 1
        self._moved = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def turn(self, seconds: float) -> AsyncIterator[None]:
        """While open, one of the turns is taken; what is in it should be a request's arrival.

        Args:
            seconds: how long to wait for it.

        Raises:
            Refusal: if none became free in that time, or if this one had to give way.
        """
        self._waiting += 1
        try:
            if self._free.locked():
                self._watch()
            async with timeout(seconds):
                await self._free.acquire()
        except asyncio.TimeoutError:
            raise busy("too many requests are being received; try again later") from None
        finally:
            self._waiting -= 1
        try:
            with arriving() as arrival:
                self._arrivals.append(arrival)
                try:
                    yield
                    self._moved, self._leaving = time.monotonic(), 1
                finally:
                    self._arrivals.remove(arrival)
        finally:
            self._free.release()

    def _watch(self) -> None:
        """See to it that somebody looks at the turns when nothing has moved for long enough."""
        if self._timer is None and self._waiting:
            delay = max(0.0, self._moved + PATIENCE - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._waiting and time.monotonic() >= self._moved + PATIENCE:
            longest = self._arrivals[: min(self._leaving, self._waiting)]
            slow = [arrival for arrival in longest if arrival.slow]
            for arrival in slow:
                arrival.give_way()
            if slow:
                self._leaving *= 2
            self._moved = time.monotonic()
        self._watch()
