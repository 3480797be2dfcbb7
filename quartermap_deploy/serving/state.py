"""What the server is about, and the requests that it has taken on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from quartermap_deploy.serving.models import VERSION, ServedModel
from quartermap_deploy.serving.refusal import Refusal, busy

STARTING, READY, STOPPING = "starting", "ready", "stopping"


class State:
    """The phase of the server, its models once it has them, and its open requests."""

    def __init__(self) -> None:
        self.phase = STARTING
        self.models: Mapping[str, ServedModel] = {}
        self.started = time.monotonic()
        self.taken_on = self.finished = self.answered = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return self.phase == READY

    @property
    def open(self) -> int:
        """Requests that were taken on and are not finished."""
        return self.taken_on - self.finished

    def become_ready(self, models: Mapping[str, ServedModel]) -> None:
        """Take requests from now on."""
        self.models, self.phase = models, READY

    def stop(self) -> None:
        """Take no request from now on."""
        self.phase = STOPPING

    async def idle(self, timeout: float) -> bool:
        """Wait until every request that was taken on is finished; return whether that was in time."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except asyncio.TimeoutError:
            return False
        return True

    @contextmanager
    def request(self) -> Iterator[None]:
        """While open, there is one more request; a server that stops waits for it.

        Raises:
            Refusal: if the server takes none now.
        """
        if self.phase != READY:
            raise busy(f"the server is {self.phase}")
        self.taken_on += 1
        self._idle.clear()
        try:
            yield
            self.answered += 1
        finally:
            self.finished += 1
            if self.open == 0:
                self._idle.set()

    def model(self, name: str, version: str = "") -> ServedModel:
        """Return a model.

        Raises:
            Refusal: if there is no such model, or not in this version.
        """
        if name not in self.models:
            known = ", ".join(map(repr, self.models)) or "none yet"
            raise Refusal(404, f"unknown model {name[:80]!r}; there are {known}")
        if version not in ("", VERSION):
            raise Refusal(404, f"model {name!r} has no version {version[:40]!r}; its only one is {VERSION}")
        return self.models[name]
