"""Threads that decode image files: large ones have lanes of their own, so that small ones overtake them."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.machine import usable_cores
from quartermap_deploy.serving.bodies import Budget
from quartermap_deploy.serving.images import ImageFile
from quartermap_deploy.serving.pace import Pace
from quartermap_deploy.serving.pixel_data import Buffer
from quartermap_deploy.serving.refusal import Refusal, busy

Result = TypeVar("Result")

THREADS = min(4, usable_cores())
"""Images that are decoded at the same time, of the small ones and of the middle ones."""
SMALL = 1_000_000
"""Bytes in memory up to which an image is a small one: some milliseconds of decoding."""
MIDDLE = 16_000_000
"""Bytes up to which it is a middle one: 4 million pixels. Larger ones are decoded one by one, for up to a second."""
BYTES_A_SECOND = 20_000_000
"""How much earlier a smaller image is decoded than a larger one that came in the same moment: by what they differ."""
BALLAST_A_SECOND = 4_000_000
"""Bytes beside pixels that files have, of which most is that: nobody sends many of these who means no harm."""
NICE = 10
"""How far the threads of the lanes for larger images stand back where the cores are wanted."""
ROOM = 10.0
"""Seconds that an image waits for memory."""


class Decoders:
    """The threads; a context manager, which leaves what is being decoded to itself at its end."""

    def __init__(self, budget: Budget) -> None:
        """Start them.

        Args:
            budget: how much of requests may be in memory.
        """
        self._budget, self._ballast = budget, Pace()
        self._small = _Lane("decode", THREADS)
        self._middle = _Lane("decode-middle", THREADS, NICE)
        self._large = _Lane("decode-large", 1, NICE)

    @property
    def busy(self) -> bool:
        """Whether an image is being decoded, perhaps for a client that has gone."""
        return any(lane.busy for lane in (self._small, self._middle, self._large))

    async def prepare(self, data: Buffer, preprocessing: Preprocessing, place: int) -> NDArray[np.float32]:
        """Decode an image file and prepare it for the model.

        Args:
            data: the file.
            preprocessing: how.
            place: which image of the request this is, from 1, for messages.

        Returns:
            (channels, height, width).

        Raises:
            Refusal: if it cannot be taken, now or ever.
        """

        def begin() -> NDArray[np.float32] | ImageFile:
            file = ImageFile(data, preprocessing, place)
            later = file.held > SMALL or len(data) > SMALL or file.ballast
            return file if later else file.prepare()

        found = await asyncio.wrap_future(self._lane(min(len(data), MIDDLE)).submit(len(data), begin))
        if not isinstance(found, ImageFile):
            return found
        if found.ballast:
            await self._wait_with_ballast(found.ballast)
        return await self._decode(found)

    async def _wait_with_ballast(self, size: int) -> None:
        """Wait for the turn of a file of which most is no pixel: one alone has it at once."""
        delay = self._ballast.turn(size / BALLAST_A_SECOND)
        if delay > ROOM:
            raise busy("too many files of which most is no pixel are being decoded; send them without that")
        await asyncio.sleep(delay)

    async def _decode(self, file: ImageFile) -> NDArray[np.float32]:
        """Decode an image that does not go first."""
        loop, size = asyncio.get_running_loop(), file.held
        await self._budget.take_room(size, ROOM)
        future = self._lane(size).submit(size, file.prepare)

        def end(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(self._budget.give_back_room, size)

        # Not as soon as nobody wants it any more, as a thread goes on all the same.
        future.add_done_callback(end)
        return await asyncio.wrap_future(future)

    def _lane(self, size: int) -> _Lane:
        """The lane for so many bytes."""
        return self._small if size <= SMALL else self._middle if size <= MIDDLE else self._large

    async def encode(self, work: Callable[[], Result]) -> Result:
        """Do what would hold up the others for too long if it were done in the event loop."""
        return await asyncio.wrap_future(self._middle.submit(SMALL, work))

    def close(self) -> None:
        """Begin nothing more."""
        for lane in (self._small, self._middle, self._large):
            lane.close()


class _Lane:
    """Threads with a queue, from which what is due first is taken."""

    def __init__(self, name: str, threads: int, nice: int = 0) -> None:
        self._jobs: list[tuple[float, int, Future[Any], Callable[[], Any]]] = []
        self._numbers = itertools.count()
        self._ready = threading.Condition()
        self._running, self._closed, self._nice = 0, False, nice
        for number in range(threads):
            # Daemons: Python is not to wait for a decoder; whoever ends the process looks whether one is busy.
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True).start()

    @property
    def busy(self) -> bool:
        """Whether a thread does something."""
        return self._running > 0

    def submit(self, size: int, work: Callable[[], Result]) -> Future[Result]:
        """Do something in one of the threads; the smaller it is, the earlier."""
        future: Future[Result] = Future()
        due = time.monotonic() + size / BYTES_A_SECOND
        with self._ready:
            heapq.heappush(self._jobs, (due, next(self._numbers), future, work))
            self._ready.notify()
        return future

    def close(self) -> None:
        """Begin nothing more."""
        with self._ready:
            self._closed = True
            for _, _, future, _ in self._jobs:
                future.cancel()
            self._jobs.clear()
            self._ready.notify_all()

    def _work(self) -> None:
        if self._nice and sys.platform == "linux":
            # On Linux each thread has a priority of its own.
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._nice)
        while (job := self._take()) is not None:
            future, work = job
            try:
                result = work()
            except Refusal as refusal:
                future.set_exception(refusal.bare())
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
            # Nothing of a request is kept until the next one comes.
            del job, future, work
            with self._ready:
                self._running -= 1

    def _take(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        with self._ready:
            while True:
                while not self._jobs and not self._closed:
                    self._ready.wait()
                if self._closed:
                    return None
                _, _, future, work = heapq.heappop(self._jobs)
                if future.set_running_or_notify_cancel():
                    self._running += 1
                    return future, work
