"""JSON and TOML from files that somebody else may have written: of a size that was checked, plain values alone.

Whatever Python's readers make of a hostile file, it becomes a `ReadingError`: numbers of five thousand digits, brackets
nested ten thousand deep, a list of a hundred million zeros, a date where a number belongs, a pipe that never ends.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from quartermap_deploy.files import read_regular

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LARGEST_JSON = 64 << 20
"""Bytes of a file of JSON. Manifests, reports and results have kilobytes, some megabytes at most."""
LARGEST_TOML = 1 << 20
"""Bytes of a file of TOML. Recipes and cards have some hundreds, with the names of a thousand classes 20,000."""
LARGEST_VALUES = 4_000_000
"""Values of a file of JSON: an empty list has two bytes in a file, and fifty in memory."""
DEEPEST = 64
"""Lists and tables in each other. Our own files have seven."""
LARGEST_WHOLE = 1 << 63
"""No whole number is as large, negative or not."""

_STRINGS_AND_COMMENTS = re.compile(
    r""""{3}(?:\\.|[^\\])*?(?:"{3}|\Z)|'{3}.*?(?:'{3}|\Z)|"(?:\\.|[^"\\\n])*"?|'[^'\n]*'?|#[^\n]*""",
    re.DOTALL,
)
_BETWEEN_DOTS = re.compile(r"[][{}=,\n]")
"""What stands between two keys or values of TOML, so that dots without it between them are those of one key."""


class ReadingError(ValueError):
    """A file that cannot be read; the message says why, and ends a sentence about the file."""


def read_bytes(path: Path, largest: int) -> bytes:
    """Read a file that has no more than `largest` bytes.

    Raises:
        FileNotFoundError: if there is none.
        ReadingError: if it is larger or no plain file, or the system does not let us read it.
    """
    try:
        return read_regular(path, largest)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        # A name with a NUL in it is a ValueError.
        raise ReadingError(getattr(error, "strerror", None) or str(error)) from error


def read_text(path: Path, largest: int, encoding: str = "utf-8") -> str:
    """Read a text as `read_bytes` reads a file.

    Raises:
        FileNotFoundError: if there is none.
        ReadingError: as `read_bytes` raises it, and if it is no text of this encoding.
    """
    try:
        return read_bytes(path, largest).decode(encoding)
    except UnicodeDecodeError as error:
        raise ReadingError(f"it is no text in UTF-8: {error}") from error


def read_json(path: Path, largest: int = LARGEST_JSON, *, unicode: bool = False) -> Any:
    """Read a file of JSON.

    Args:
        path: the file.
        largest: how many bytes it may have.
        unicode: whether its texts must be such as every file can hold. Names of files that are in no known encoding are
            half characters in Python, and results may hold them.

    Returns:
        Dictionaries, lists, texts, numbers, booleans and None, at most `DEEPEST` in each other.

    Raises:
        FileNotFoundError: if there is no file.
        ReadingError: if it cannot be read, is no JSON, or holds more than anybody's files do.
    """
    return parse_json(read_bytes(path, largest), unicode=unicode)


def parse_json(data: bytes, *, unicode: bool = False, most: int = LARGEST_VALUES) -> Any:
    """Read JSON from bytes, of `most` values or fewer; `read_json` says how.

    Raises:
        ReadingError: if they are no JSON, or hold more than anybody's files do.
    """
    # Each value but the first stands behind one of these; commas in texts are few.
    if sum(map(data.count, (b",", b"[", b"{"))) > most:
        raise ReadingError(f"it holds more than {most:,} values")
    try:
        values = json.loads(data.decode("utf-8"), parse_int=_whole)
    except ReadingError:
        raise
    except RecursionError:
        raise ReadingError(_too_deep()) from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise ReadingError(str(error)) from error
    check_plain(values, unicode=unicode)
    return values


def read_toml(path: Path) -> dict[str, Any]:
    """Read a file of TOML.

    Returns:
        Its tables, with dictionaries, lists, texts, numbers and booleans, at most `DEEPEST` in each other.

    Raises:
        FileNotFoundError: if there is no file.
        ReadingError: if it cannot be read, is no TOML, or holds dates or more than anybody's files do.
    """
    text = read_text(path, LARGEST_TOML)
    # Python's reader takes n² steps, and as much memory, for a key of n parts.
    parts = _BETWEEN_DOTS.split(
        _STRINGS_AND_COMMENTS.sub(lambda found: "q" if found[0][0] != "#" else "", text)
    )
    if any(part.count(".") >= DEEPEST for part in parts):
        raise ReadingError(_too_deep())
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except RecursionError:
        raise ReadingError(_too_deep()) from None
    except ValueError as error:  # also of numbers with too many digits
        raise ReadingError(f"it is no valid TOML: {error}") from error
    check_plain(values)
    return values


def check_plain(values: object, *, unicode: bool = False) -> None:
    """Check that values are those that JSON has, and that nobody stumbles over them later.

    Raises:
        ReadingError: if lists or tables stand in each other more than `DEEPEST` deep, a whole number does not fit
            into 64 bits, a text has a NUL, which ends a name for the system, or half a character where `unicode` wants
            whole ones, or something has another type, such as a date.
    """
    waiting = [(values, 1)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, (dict, list)):
            if depth > DEEPEST:
                raise ReadingError(_too_deep())
            inner = (*value, *value.values()) if isinstance(value, dict) else value
            waiting.extend((item, depth + 1) for item in inner)
        elif isinstance(value, str):
            if "\0" in value:
                raise ReadingError(f"it has a NUL in the text {value[:80]!r}")
            if unicode and any("\ud800" <= character <= "\udfff" for character in value):
                raise ReadingError(f"it has half a character in the text {value[:80]!r}")
        elif type(value) is int:
            if abs(value) >= LARGEST_WHOLE:
                raise ReadingError("it has a whole number that does not fit into 64 bits")
        elif value is not None and not isinstance(value, (bool, float)):
            raise ReadingError(f"it holds a {type(value).__name__}, {str(value)[:80]}; write it as a text")


def _whole(digits: str) -> int:
    # Python's own limit is in the thousands, and older ones have none.
    if len(digits) > 20:
        raise ReadingError(f"it has a whole number of {len(digits):,} digits")
    return int(digits)


def _too_deep() -> str:
    return f"it has lists or tables in each other, more than {DEEPEST} deep"
