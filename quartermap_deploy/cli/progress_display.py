"""Progress on standard error: lines for logs, bars for people."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from quartermap_deploy.plain_text import printable
from quartermap_deploy.progress import SILENT, Progress

if TYPE_CHECKING:
    from rich.console import Console


def make_progress(options: argparse.Namespace) -> Progress:
    """Return the progress that a command's options ask for, on standard error."""
    if getattr(options, "quiet", False):
        return SILENT
    return TerminalProgress() if sys.stderr.isatty() else LineProgress(sys.stderr)


class LineProgress:
    """Progress as plain lines, each with the seconds since the first: for logs.

    There is one as a step begins, and one whenever nothing was said for `QUIET` seconds, so that a long step is not
    taken for one that hangs.
    """

    QUIET = 20.0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._start = self._said = time.monotonic()

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Write a line as the step begins."""
        title, done, ended = printable(title, None), 0, threading.Event()
        self._say(title)

        def advance(units: int) -> None:
            nonlocal done
            done += units

        def remind() -> None:
            while not ended.wait(max(0.01, self._said + self.QUIET - time.monotonic())):
                if time.monotonic() >= self._said + self.QUIET:
                    self._say(f"still {title}" + ("" if total is None else f", {done:,} of {total:,}"))

        reminder = threading.Thread(target=remind, name="progress", daemon=True)
        reminder.start()
        try:
            yield advance
        finally:
            ended.set()
            reminder.join()

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        print(f"[{self._said - self._start:6.1f} s] {text}", file=self._stream, flush=True)


class TerminalProgress:
    """Progress as a spinner or a bar with the elapsed time, by rich; finished steps stay as one line each."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            SpinnerColumn,
            Task,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.progress import Progress as Display

        class Total(MofNCompleteColumn):
            """The units done, for steps that have a number of them."""

            def render(self, task: Task) -> Any:
                return "" if task.total is None else super().render(task)

        class Bar(BarColumn):
            """A bar, for steps that have a number of units."""

            def render(self, task: Task) -> Any:
                return "" if task.total is None else super().render(task)

        self._console = console or Console(stderr=True, highlight=False)
        text = TextColumn("{task.description}", markup=False)
        self._display = Display(
            SpinnerColumn(), text, Bar(), Total(), TimeElapsedColumn(), console=self._console, transient=True
        )
        self._open = 0

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show the step until it ends."""
        from rich.text import Text

        title = printable(title, None)
        if self._open == 0:
            self._display.start()
        self._open += 1
        start = time.monotonic()
        task = self._display.add_task(title, total=total)
        try:
            yield lambda units: self._display.advance(task, units)
            self._console.print(Text(f"  {title}  {time.monotonic() - start:.1f} s", style="dim"))
        finally:
            self._display.remove_task(task)
            self._open -= 1
            if self._open == 0:
                self._display.stop()
