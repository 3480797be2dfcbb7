"""The log of the server: one line for each event, as JSON or as text.

Lines are written by a thread of their own, so that a reader who stops reading stops no request; what does not fit into
its queue is dropped, and the number of lines that were is said once there is room again.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

from quartermap_deploy.plain_text import printable

FORMATS = ("auto", "json", "text")
LIBRARIES = ("aiohttp", "asyncio", "grpc", "py.warnings")
"""Loggers of what the server is built on, and of Python's warnings."""
SELDOM = 1.0
"""Seconds between lines about what happens again and again."""
_WAITING = 10_000
_KINDS = 100


class EventLog:
    """Events, in the order in which they happened."""

    def __init__(self, style: str = "auto", stream: TextIO | None = None) -> None:
        """Open the log.

        Args:
            style: "json", "text", or "auto" for text in a terminal and JSON elsewhere.
            stream: where to write; None for standard error.
        """
        # There is no standard error in a process that was started without one.
        self._stream = stream or sys.stderr or open(os.devnull, "w")  # noqa: SIM115
        self._json = style == "json" or (style == "auto" and not self._stream.isatty())
        self._lines: queue.Queue[str | None] = queue.Queue(_WAITING)
        self._dropped = 0
        self._seldom: dict[str, tuple[float, int, tuple[str, str, dict[str, Any]]]] = {}
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def info(self, event: str, **values: Any) -> None:
        """Write down that something happened."""
        self._put("info", event, values)

    def warning(self, event: str, **values: Any) -> None:
        """Write down that something is not as it should be."""
        self._put("warning", event, values)

    def error(self, event: str, **values: Any) -> None:
        """Write down that something went wrong."""
        self._put("error", event, values)

    def seldom(self, kind: str, level: str, event: str, **values: Any) -> None:
        """Write down something that strangers can make happen at will: at most one line a second of each kind.

        The next line of the kind, or the end of the log, tells how many there were since the last.
        """
        now = time.monotonic()
        last, more = self._seldom[kind][:2] if kind in self._seldom else (-math.inf, 0)
        entry = (level, event, values)
        if now - last < SELDOM:
            self._seldom[kind] = (last, more + 1, entry)
            return
        if len(self._seldom) >= _KINDS:
            self._tell_rest()
        self._seldom[kind] = (now, 0, entry)
        self._put(level, event, {**values, "times": more + 1} if more else values)

    def _tell_rest(self) -> None:
        for _, more, (level, event, values) in self._seldom.values():
            if more:
                self._put(level, event, {**values, "times": more})
        self._seldom.clear()

    def close(self, timeout: float = 2.0) -> None:
        """Write what is left, as far as somebody reads it."""
        self._tell_rest()
        try:
            self._lines.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    @contextlib.contextmanager
    def libraries(self) -> Iterator[None]:
        """While open, warnings and errors of the libraries below are events, too."""
        handler = _Forward(self)
        loggers = [logging.getLogger(name) for name in LIBRARIES]
        before = [(logger, logger.propagate) for logger in loggers]
        for logger in loggers:
            logger.addHandler(handler)
            logger.propagate = False
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)
            for logger, propagate in before:
                logger.removeHandler(handler)
                logger.propagate = propagate

    def _put(self, level: str, event: str, values: dict[str, Any]) -> None:
        if self._dropped:
            values = {**values, "lines_dropped": self._dropped}
        try:
            self._lines.put_nowait(self._format(level, event, values))
            self._dropped = 0
        except queue.Full:
            self._dropped += 1

    def _format(self, level: str, event: str, values: dict[str, Any]) -> str:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        if self._json:
            return json.dumps({"time": now, "level": level, "event": event, **values}, default=str)
        text = "  ".join(f"{name}={_word(value)}" for name, value in values.items())
        return f"{now[11:23]} {'' if level == 'info' else f'{level}: '}{event}{'  ' if text else ''}{text}"

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                # Neither control characters of a request nor the end of a line may reach a terminal.
                self._stream.write(printable(line, None) + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # nobody reads it any more
                return


def _word(value: object) -> str:
    """Return a value as it stands in a line of text: what has blanks in it is quoted, as it could look like more."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if " " in text else text


class _Forward(logging.Handler):
    """Makes records of the standard library's logging events of a log."""

    def __init__(self, log: EventLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write down a record, without its traceback."""
        error = record.exc_info[1] if record.exc_info else None
        reason = "" if error is None else " ".join(repr(error).split())[:500]
        level = "error" if record.levelno >= logging.ERROR else "warning"
        self._log.seldom(
            f"{record.name} {record.msg}"[:200],
            level,
            "library",
            logger=record.name,
            message=record.getMessage()[:500],
            error=reason,
        )
