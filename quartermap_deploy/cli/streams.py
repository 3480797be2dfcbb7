"""Standard output and standard error, made able to take whatever a command writes, in every encoding.

Only what the interpreter has at its start is imported, as in `interruption`.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import sys

# Not from typing, see quartermap_deploy/__init__.py.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

__all__ = ["OUTPUT", "output", "prepare_streams", "takes"]

HANDLER = "quartermap"
"""The name under which Python knows how letters are written that an encoding does not have."""
OUTPUT = "standard output"
PLAIN = {
    "…": "...",
    "–": "-",
    "—": "-",
    "−": "-",
    "·": "*",
    "•": "*",
    "×": "x",
    "²": "^2",
    "→": "->",
    "│": "|",
}
PLAIN |= {"─": "-", "±": "+-", "≤": "<=", "≥": ">=", "µ": "u"}
"""Signs that we write ourselves, in letters that every encoding has."""


def prepare_streams() -> None:
    """Let both streams write every text; one that is closed, as after `2>&-`, takes it and forgets it."""
    codecs.register_error(HANDLER, _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            # What captures output in this process may have no such method, and takes every text.
            stream.reconfigure(errors=HANDLER)


@contextlib.contextmanager
def output() -> Iterator[None]:
    """While open, standard output is written to; when the block ends, it has taken everything.

    Raises:
        OSError: if it does not take it, such as a file on a full disk; its file is `OUTPUT`.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, OUTPUT) from error


def takes(stream: TextIO, text: str) -> bool:
    """Whether a stream's encoding has all letters of a text."""
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(
        PLAIN.get(letter) or letter.encode("ascii", "backslashreplace").decode() for letter in letters
    ), error.end
