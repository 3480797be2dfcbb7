"""Threads that decode image files: large ones in a lane of their own, so that small ones overtake them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.machine import usable_cores
from quartermap_deploy.serving.images import ImageFile

Result = TypeVar("Result")

THREADS = min(4, usable_cores())
"""Images that are decoded at the same time, beside a large one; each needs up to 32 MB."""
LARGE = 4_000_000
"""Pixels above which an image is a large one. These are decoded one by one, as each may need 400 MB and a second."""


class Decoders:
    """The threads; a context manager, which leaves what is being decoded to itself at its end."""

    def __init__(self) -> None:
        self._small = ThreadPoolExecutor(THREADS, thread_name_prefix="decode")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="decode-large")
        self._running: set[Future[Any]] = set()

    @property
    def busy(self) -> bool:
        """Whether an image is being decoded, perhaps for a client that has gone."""
        return any(future.running() for future in list(self._running))

    async def prepare(self, data: bytes, preprocessing: Preprocessing, place: int) -> NDArray[np.float32]:
        """Decode an image file and prepare it for the model.

        Args:
            data: the file.
            preprocessing: how.
            place: which image of the request this is, from 1, for messages.

        Returns:
            (channels, height, width).

        Raises:
            Refusal: if it cannot be taken.
        """

        def begin() -> NDArray[np.float32] | ImageFile:
            file = ImageFile(data, preprocessing, place)
            return file if file.pixels > LARGE else file.prepare()

        found = await self._run(self._small, begin)
        return await self._run(self._large, found.prepare) if isinstance(found, ImageFile) else found

    async def encode(self, work: Callable[[], Result]) -> Result:
        """Do what would hold up the others for too long if it were done in the event loop."""
        return await self._run(self._small, work)

    def close(self) -> None:
        """Begin nothing more."""
        for pool in (self._small, self._large):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, pool: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        future = pool.submit(work)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return await asyncio.wrap_future(future)
