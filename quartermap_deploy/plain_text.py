"""Text from outside (files, requests, names of files) on its way to a terminal, a log or a line to copy.

A terminal obeys what it prints: `ESC [2J` clears it, a carriage return writes over a line, marks of writing direction
turn words around. So whatever somebody else may have written goes through `printable`.
"""

from __future__ import annotations

import json
import os
import shlex

__all__ = ["command", "encoded", "printable", "printable_json"]

CUT = "…"


def printable(text: object, limit: int | None = 200, *, lines: bool = False) -> str:
    r"""Return a text with escapes, such as `\x1b`, for all that is neither letter, digit, sign nor blank.

    Args:
        text: anything that has a text.
        limit: letters that are kept of it; None keeps all.
        lines: leave ends of lines as they are.
    """
    text = str(text)
    if limit is not None and len(text) > limit:
        text = text[:limit] + CUT
    if text.isprintable():
        return text
    return "".join(
        letter
        if letter.isprintable() or (lines and letter == "\n")
        else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def printable_json(value: object, *, ascii: bool = False) -> str:
    """Return a value as indented JSON of one meaning, in which a terminal finds nothing to obey either.

    Args:
        value: plain values.
        ascii: escape all that is not ASCII.

    Raises:
        TypeError: if JSON has nothing for it.
    """
    text = json.dumps(value, indent=2, ensure_ascii=ascii)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1] for letter in text
    )


def encoded(text: str) -> bytes:
    r"""Return a text in UTF-8, as files hold it; bytes of a file's name that are in no encoding become `\udcff`.

    In JSON that stays the same text.
    """
    return text.encode("utf-8", "backslashreplace")


def command(*words: str | os.PathLike[str]) -> str:
    """Return a line that a shell reads as these words and nothing else, to be copied from a message."""
    return shlex.join([os.fspath(word) for word in words])
