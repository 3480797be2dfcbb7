"""Requests on their way in: those that take long give way where others could not get in otherwise."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from quartermap_deploy.serving.refusal import Refusal, busy
from quartermap_deploy.serving.timeouts import timeout

PATIENCE = 1.0
"""Seconds that a request may take to arrive whatever others want."""
MOST_WAITING = 512
"""Those who wait for a turn at once; when there are more, the longest of them is refused."""


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
    way; twice as many the next time, after half the time, until one comes to its end again. Until then the latest of
    those who wait is the next, as the earlier ones are likely to be as slow. Senders who hold every turn stop nobody
    then, and those of a network that is slow for all are not all broken off at once.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._arrivals: list[Arrival] = []  # the longest first
        self._waiting: deque[asyncio.Future[None]] = deque()  # the longest first
        self._leaving, self._patience = 1, PATIENCE
        self._moved = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def turn(self, seconds: float) -> AsyncIterator[None]:
        """While open, one of the turns is taken; what is in it should be a request's arrival.

        Args:
            seconds: how long to wait for it.

        Raises:
            Refusal: if none became free in that time, too many wait, or this one had to give way.
        """
        await self._take(seconds)
        try:
            with arriving() as arrival:
                self._arrivals.append(arrival)
                try:
                    yield
                    self._moved, self._leaving, self._patience = time.monotonic(), 1, PATIENCE
                finally:
                    self._arrivals.remove(arrival)
        finally:
            self._release()

    async def _take(self, seconds: float) -> None:
        if self._taken < self._limit:
            self._taken += 1
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        if len(self._waiting) > MOST_WAITING:
            self._waiting.popleft().set_exception(_too_many())
        self._watch()
        try:
            async with timeout(seconds):
                await place
        except BaseException as error:
            if place in self._waiting:
                self._waiting.remove(place)
            elif place.done() and not place.cancelled() and place.exception() is None:
                # The turn came in the same moment.
                self._release()
            if isinstance(error, asyncio.TimeoutError):
                raise _too_many() from None
            raise

    def _release(self) -> None:
        """Hand a turn on: to the one who has waited longest, or to the latest where nothing moves."""
        while self._waiting:
            place = self._waiting.pop() if self._leaving > 1 else self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._taken -= 1

    def _watch(self) -> None:
        """See to it that somebody looks at the turns when nothing has moved for long enough."""
        if self._timer is None and self._waiting:
            delay = max(0.0, self._moved + self._patience - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._waiting and time.monotonic() >= self._moved + self._patience:
            longest = self._arrivals[: min(self._leaving, len(self._waiting))]
            slow = [arrival for arrival in longest if arrival.seconds >= self._patience]
            if slow:
                self._leaving *= 2
                self._patience = max(PATIENCE / 8, self._patience / 2)
            for arrival in slow:
                arrival.give_way()
            self._moved = time.monotonic()
        self._watch()


def _too_many() -> Refusal:
    return busy("too many requests are being received; try again later")
