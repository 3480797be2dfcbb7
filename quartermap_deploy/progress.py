"""How long work reports its progress: a protocol without any dependency.

The library calls ``progress.step(title, total)`` around anything that may take more than two seconds; who shows it, and
how, is decided by the caller. `SILENT` shows nothing and is the default everywhere; the command line brings its own.

    with progress.step("checking parity", total=len(cases)) as advance:
        for case in cases:
            check(case)
            advance(1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["SILENT", "Progress", "Silent", "Titled"]


class Progress(Protocol):
    """Something that shows steps of work to somebody."""

    def step(self, title: str, total: int | None = None) -> AbstractContextManager[Callable[[int], None]]:
        """Open one step; it ends when the context does, by success or by an error.

        Args:
            title: what is being done, in words for the person waiting ("exporting to ONNX").
            total: how many units the step has; None when that is unknown (a spinner instead of a bar).

        Returns:
            A context manager that gives a function ``advance(units)``; a step without a total may leave it alone.
        """
        ...


class Silent:
    """Progress that shows nothing."""

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Do nothing."""
        yield _ignore


def _ignore(units: int) -> None:
    return None


class Titled:
    """Progress whose steps say what they belong to."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress, self._title = progress, title

    def step(self, title: str, total: int | None = None) -> AbstractContextManager[Callable[[int], None]]:
        """Open a step."""
        return self._progress.step(f"{self._title}: {title}", total)


SILENT: Progress = Silent()
"""The progress of library calls that were not given another one."""
