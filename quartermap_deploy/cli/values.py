"""What the texts of options mean, for argparse."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path


def file_or_folder(text: str) -> Path:
    """Read a path, for argparse.

    An empty one, as an unset variable of a shell leaves behind, would mean the current folder.
    """
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def numbers(text: str) -> tuple[int, ...]:
    """Read `3,6,9`, for argparse."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 3,6,9") from None


def numbers_or_none(text: str) -> tuple[int, ...]:
    """Read `1,2`, or `none` for an empty list, for argparse."""
    return () if text == "none" else numbers(text)


def words(text: str) -> tuple[str, ...]:
    """Read `onnxruntime,tensorrt`, for argparse."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of names such as onnxruntime,tensorrt")
    return found


def whole(least: int, most: int = (1 << 31) - 1) -> Callable[[str], int]:
    """Return what reads a whole number between two bounds, both included, for argparse."""
    bounds = (
        f"of at least {least}, and below 2^31" if most == (1 << 31) - 1 else f"from {least:,} to {most:,}"
    )

    def read(text: str) -> int:
        # Longer texts are not even converted.
        if not text.isdecimal() or len(text) > 10 or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number {bounds}")
        return int(text)

    return read


at_least_one = whole(1)


def integer(text: str) -> int:
    """Read a whole number, also a negative one, of no more than 64 bits, for argparse."""
    if not re.fullmatch(r"-?[0-9]{1,19}", text) or not -(1 << 63) <= int(text) < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def delay_ms(text: str) -> float:
    """Read a delay in milliseconds, from 0 to a minute, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 60_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of milliseconds from 0 to 60000")
    return value
