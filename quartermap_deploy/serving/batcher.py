"""Putting requests together into batches, and running them in threads.

Where all inputs and outputs of a model have one batch as their first axis, requests of one size are put together along
it, every input with its own. Of another model each request is run by itself.

Requests wait in one queue for all workers. A worker that is free takes the oldest one and those behind it, as many as
go into a batch, once the batch is full or its oldest request has waited for long enough. While all workers are busy
the queue fills up by itself, so that under load batches become large without any waiting for the sake of it. Where
requests have come one by one for a while, as from a single client, none waits.

On a CPU one batch is fastest with all the cores, and many batches are with a core for each: operators of these models
are short, and cores that share them wait for each other. So there may be a wide session beside those of the workers. It
runs a batch that has the machine to itself, and as soon as there are batches for all workers these run side by side.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.errors import InputError
from quartermap_deploy.serving.refusal import Refusal, busy, invalid
from quartermap_deploy.serving.statistics import ModelStatistics, Timings
from quartermap_deploy.targets import Session

Arrays: TypeAlias = "Mapping[str, NDArray[Any]]"

LONELY = 8
"""Requests in a row, each alone for the whole delay, after which none waits for others."""


@dataclass(eq=False)
class _Job:
    """A request that waits.

    Attributes:
        inputs: by name.
        images: how many it counts for: the size of its batch.
        answer: gets outputs and timings, in the thread of the event loop.
        since: when it came, in nanoseconds of the monotonic clock.
    """

    inputs: Arrays
    images: int
    answer: asyncio.Future[tuple[dict[str, NDArray[Any]], Timings]]
    since: int = field(default_factory=time.monotonic_ns)

    def goes_with(self, other: _Job) -> bool:
        """Whether both can be in one batch."""
        return all(values.shape[1:] == other.inputs[name].shape[1:] for name, values in self.inputs.items())


_Outcome = tuple[_Job, "tuple[dict[str, NDArray[Any]], Timings] | Exception"]
_Batch = tuple[int, Timings]
"""A batch that was run: its images, and where the time went."""


class Batcher:
    """A queue of requests, and the workers that take batches from it."""

    def __init__(
        self,
        sessions: Sequence[Session],
        statistics: ModelStatistics,
        *,
        max_batch: int,
        max_delay: float,
        queue: int,
        joins: bool = True,
        wide: Session | None = None,
        on_error: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """Start the workers.

        Args:
            sessions: one for each worker; they may be one and the same, if it can be run by several threads at a time.
            wide: what runs a batch when there is no other.
            statistics: where batches are counted.
            max_batch: most images of a batch.
            max_delay: seconds that an image may wait for others while a worker is free. None waits after `LONELY` that
                came alone, until two come within that time again.
            queue: most images that may wait.
            joins: whether requests are put together.
            on_error: told, in the thread of the event loop, of what a session raises.
        """
        self.max_batch, self.limit, self._joins = max_batch, queue, joins
        self._wide, self._statistics, self._on_error = wide, statistics, on_error
        self._delay = int(max_delay * 1e9)
        self._loop = asyncio.get_running_loop()
        self._ready = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._waiting = 0
        self._running = 0
        self._arrived = self._alone = 0
        self._runs_wide = self._crowded = False
        self._stopping = False
        # Daemons: a session that never returns must not keep the process from ending.
        self._workers = [
            threading.Thread(target=self._work, args=(session,), name=f"worker-{index}", daemon=True)
            for index, session in enumerate(sessions)
        ]
        for worker in self._workers:
            worker.start()

    @property
    def waiting(self) -> int:
        """Images that wait."""
        return self._waiting

    @property
    def busy(self) -> bool:
        """Whether a worker has not ended, as one that runs a batch."""
        return any(worker.is_alive() for worker in self._workers)

    async def run(self, inputs: Arrays, images: int) -> tuple[dict[str, NDArray[Any]], Timings]:
        """Run a request, together with others or without.

        Args:
            inputs: by name, in the shapes and element types of the sessions.
            images: the size of their batch, from 1 to `max_batch`; 1 where they have none.

        Returns:
            The outputs by name, and where the time went.

        Raises:
            Refusal: if too many images wait already, the session refuses these, or it fails.
        """
        job = _Job(inputs, images, self._loop.create_future())
        with self._ready:
            if self._stopping:
                raise busy("the server is stopping")
            if self._waiting + images > self.limit:
                raise busy(f"{self._waiting} images wait already, at most {self.limit} do; try again later")
            self._alone = self._alone + 1 if job.since - self._arrived > self._delay else 0
            self._arrived = job.since
            self._jobs.append(job)
            self._waiting += images
            self._ready.notify()
        self._statistics.pending += 1
        try:
            return await job.answer
        except asyncio.CancelledError:
            self._abandon(job)
            raise
        finally:
            self._statistics.pending -= 1

    async def stop(self, timeout: float) -> bool:
        """Run what waits, then end the workers; return whether they ended within a number of seconds."""
        with self._ready:
            self._stopping = True
            self._ready.notify_all()
        deadline = time.monotonic() + timeout
        while self.busy:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.01)
        return True

    def _abandon(self, job: _Job) -> None:
        with self._ready:
            if job in self._jobs:
                self._jobs.remove(job)
                self._waiting -= job.images

    # In the threads of the workers.

    def _work(self, session: Session) -> None:
        while (batch := self._take(session)) is not None:
            chosen, jobs = batch
            batches: list[_Batch] = []
            outcomes = self._outcomes(chosen, jobs, batches)
            self._leave()
            # One call for all of it, as each wakes the loop.
            try:
                self._loop.call_soon_threadsafe(self._answer, batches, outcomes)
            except RuntimeError:  # the loop is closed: the time for stopping was over before this batch was
                return

    def _take(self, session: Session) -> tuple[Session, list[_Job]] | None:
        """Wait for a batch; returns what is to run it, and None when the worker is to end."""
        with self._ready:
            while True:
                if not self._jobs:
                    if self._stopping:
                        return None
                    self._ready.wait()
                    continue
                if self._runs_wide:
                    self._ready.wait()
                    continue
                count, full = self._front()
                wait = self._jobs[0].since + self._delay - time.monotonic_ns()
                if not (full or self._stopping or self._alone > LONELY or wait <= 0):
                    self._ready.wait(wait / 1e9)
                    continue
                taken = [self._jobs.popleft() for _ in range(count)]
                self._waiting -= sum(job.images for job in taken)
                if self._wide is not None and not self._running and not self._crowded:
                    session, self._runs_wide = self._wide, True
                self._running += 1
                if self._jobs:
                    self._ready.notify()
                return session, taken

    def _leave(self) -> None:
        """A batch has been run."""
        with self._ready:
            self._running -= 1
            # What waits now arrived while something ran: if it is a batch for every other worker, more will come.
            self._crowded = self._waiting >= self.max_batch * (len(self._workers) - 1)
            if self._runs_wide:
                self._runs_wide = False
                # Those who were told of jobs while nobody else could run any.
                self._ready.notify_all()

    def _front(self) -> tuple[int, bool]:
        """How many jobs at the front of the queue go into one batch, and whether no other could still join them."""
        if not self._joins:
            return 1, True
        images = 0
        for count, job in enumerate(self._jobs):
            images += job.images
            if images > self.max_batch or not job.goes_with(self._jobs[0]):
                return count, True
        return len(self._jobs), images == self.max_batch

    def _outcomes(self, session: Session, jobs: list[_Job], batches: list[_Batch]) -> list[_Outcome]:
        """Run jobs, and add the batches that they became to `batches`."""
        try:
            return self._run(session, jobs, batches)
        except Exception as error:
            if len(jobs) == 1:
                return [(jobs[0], error)]
        # Which of them is to blame, nobody knows; alone, the others get their answers.
        return [outcome for job in jobs for outcome in self._outcomes(session, [job], batches)]

    def _run(self, session: Session, jobs: list[_Job], batches: list[_Batch]) -> list[_Outcome]:
        start = time.monotonic_ns()
        first, *others = jobs
        images = sum(job.images for job in jobs)
        if others:
            feeds = {name: np.concatenate([job.inputs[name] for job in jobs]) for name in first.inputs}
        else:
            # Values that lie behind JSON begin anywhere, and runtimes expect them at whole addresses.
            feeds = {
                name: np.require(values, requirements=["C", "A"]) for name, values in first.inputs.items()
            }
        prepared = time.monotonic_ns()
        outputs = session.infer(feeds)
        ran = time.monotonic_ns()
        parts = self._parts(outputs, jobs, images) if self._joins else [_numbers(outputs)]
        end = time.monotonic_ns()
        spent = Timings(0, prepared - start, ran - prepared, end - ran)
        batches.append((images, spent))
        return [
            (job, part if isinstance(part, Exception) else (part, spent.plus(queue=start - job.since)))
            for job, part in zip(jobs, parts, strict=True)
        ]

    def _parts(
        self, outputs: dict[str, NDArray[Any]], jobs: list[_Job], images: int
    ) -> list[dict[str, NDArray[Any]] | Exception]:
        """Take the outputs of a batch apart."""
        for name, values in outputs.items():
            if values.shape[0] != images:
                raise RuntimeError(
                    f"the session returned {values.shape[0]} rows of {name!r} for {images} images"
                )
        # One look at all of them is cheaper than one for each job, and mostly enough.
        sound = not isinstance(_numbers(outputs), Refusal)
        parts: list[dict[str, NDArray[Any]] | Exception] = []
        position = 0
        for job in jobs:
            rows = slice(position, position := position + job.images)
            part = {name: values[rows] for name, values in outputs.items()}
            parts.append(part if sound else _numbers(part))
        return parts

    # In the thread of the event loop again.

    def _answer(self, batches: list[_Batch], outcomes: list[_Outcome]) -> None:
        for images, spent in batches:
            self._statistics.executed(images, spent)
        for job, outcome in outcomes:
            if isinstance(outcome, Exception) and not isinstance(outcome, (InputError, Refusal)):
                self._on_error(outcome)
            if job.answer.done():
                continue
            if isinstance(outcome, InputError):
                job.answer.set_exception(invalid(str(outcome)))
            elif isinstance(outcome, Refusal):
                job.answer.set_exception(outcome)
            elif isinstance(outcome, Exception):
                job.answer.set_exception(
                    Refusal(500, f"the model could not be run: {str(outcome).strip()[:300]}")
                )
            else:
                job.answer.set_result(outcome)


def _numbers(outputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]] | Refusal:
    """Return outputs if all of their values are numbers."""
    for name, values in outputs.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            return Refusal(
                500,
                f"the model's output {name!r} has values that are NaN or infinite; its input is far out of its range",
            )
    return outputs
