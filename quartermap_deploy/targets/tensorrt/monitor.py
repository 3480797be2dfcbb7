"""What TensorRT says while it builds: messages, progress, memory."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from quartermap_deploy.progress import Progress

Result = TypeVar("Result")
_SHOWN_DEPTH = 1
"""Phases further down last milliseconds, and there are hundreds."""


def make_logger(trt: Any) -> Any:
    """A logger that keeps errors and warnings, in `errors` and `warnings`, and prints nothing."""

    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message.strip())
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message.strip())

    return Collector()


def interruptible(call: Callable[[], Result], stop: Callable[[], None] | None = None) -> Result:
    """Call TensorRT in a thread of its own, so that Ctrl-C reaches this one.

    Python raises KeyboardInterrupt in the main thread, in whatever Python that runs next. While TensorRT works in it,
    that is one of our callbacks, and TensorRT's bindings swallow what it raises.

    Args:
        call: what to do.
        stop: asks it to end early. Without one, Ctrl-C is answered when it has ended.

    Returns:
        What it returns.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when the call has ended. At a second one it is left behind.
        Exception: what it raises.
    """
    outcome: list[Result] = []
    errors: list[BaseException] = []
    # Not the thread's own join: interrupted, that takes the thread for ended (bpo-45274).
    ended = threading.Event()

    def work() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=work, name="tensorrt", daemon=True).start()
    try:
        _wait(ended)
    except KeyboardInterrupt:
        if stop is not None:
            stop()
        _wait(ended)
        raise
    if errors:
        raise errors[0]
    return outcome[0]


def _wait(event: threading.Event) -> None:
    # Windows answers Ctrl-C only between waits that end.
    while not event.wait(0.2):
        pass


class Phases:
    """Phases of a build, shown as steps of our progress.

    TensorRT calls from threads of its own, and an exception must not go up into it: the first one stops the build and
    waits in `error`.
    """

    def __init__(self, progress: Progress) -> None:
        self.error: BaseException | None = None
        self._progress = progress
        self._lock = threading.Lock()
        self._depths: dict[str, int] = {}
        self._open: dict[str, tuple[AbstractContextManager[Any], Callable[[int], None], int]] = {}

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self._lock, self._kept():
            depth = 0 if parent is None else self._depths.get(parent, _SHOWN_DEPTH) + 1
            self._depths[name] = depth
            if depth == _SHOWN_DEPTH and name not in self._open:
                step = self._progress.step(f"  {name[0].lower()}{name[1:]}", steps if steps > 1 else None)
                self._open[name] = (step, step.__enter__(), 0)

    def step(self, name: str, index: int) -> bool:
        """A step of a phase is done; returns whether to go on."""
        with self._lock, self._kept():
            if name in self._open:
                step, advance, done = self._open[name]
                advance(max(0, index + 1 - done))
                self._open[name] = (step, advance, max(done, index + 1))
        return self.error is None

    def finish(self, name: str) -> None:
        """A phase ends."""
        with self._lock, self._kept():
            self._depths.pop(name, None)
            if name in self._open:
                self._open.pop(name)[0].__exit__(None, None, None)

    def stop(self) -> None:
        """Let the build end after its present step."""
        self.error = self.error or KeyboardInterrupt()

    def close(self) -> None:
        """End what is still open, as after an error of TensorRT."""
        for name in list(self._open):
            self.finish(name)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.error = self.error or error


def make_monitor(trt: Any, phases: Phases) -> Any:
    """TensorRT's progress monitor over `phases`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return phases.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


class PeakMemory:
    """The most resident memory of this process while open, sampled 20 times a second.

    Attributes:
        before: bytes when it was opened, or None where the system does not tell.
        peak: the most bytes since.
    """

    def __init__(self) -> None:
        self.before: int | None = None
        self.peak: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = resident_bytes()
        if self.before is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak or 0, resident_bytes() or 0)


def resident_bytes() -> int | None:
    """Resident memory of this process, or None where the system does not tell."""
    if sys.platform == "win32":
        return None
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ImportError):
        return None
    return pages * resource.getpagesize()


def seconds_since(start: float) -> float:
    """Seconds since a `time.perf_counter()`, rounded for a manifest."""
    return round(time.perf_counter() - start, 2)
