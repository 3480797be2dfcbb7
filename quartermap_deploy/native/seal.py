"""The seal at the end of a library that was built here: a checksum of all that stands before it.

A library that was changed by a few bytes still looks like one, and ends the process once they are run. Loaders pass
over what stands behind the last part of a file, so the checksum lies there, and goes wherever the file is copied to.
Whoever wants to deceive can write a new one: it says that a file is whole, not who made it.
"""

from __future__ import annotations

import hashlib
import re

_SEAL = re.compile(rb"\nquartermap sha256 ([0-9a-f]{64})\n", re.ASCII)
_LENGTH = len("\nquartermap sha256 \n") + 64


class SealError(ValueError):
    """What is wrong with a seal; the message ends a sentence that begins with the file's name."""


def sealed(data: bytes) -> bytes:
    """Return a library with its seal; one that has a seal already gets it anew."""
    body = data[:-_LENGTH] if _sum_of(data) is not None else data
    return body + f"\nquartermap sha256 {hashlib.sha256(body).hexdigest()}\n".encode("ascii")


def check_seal(data: bytes, *, required: bool) -> None:
    """Compare a library with its seal.

    Args:
        data: the file.
        required: whether one without a seal is refused, too.

    Raises:
        SealError: if it is another library than the one that was sealed, or has no seal and needs one.
    """
    found = _sum_of(data)
    if found is None:
        if required:
            raise SealError(
                "has no checksum at its end: it is cut short, was changed since it was built, or is of an earlier "
                "release"
            )
    elif found != hashlib.sha256(data[:-_LENGTH]).hexdigest():
        raise SealError("is damaged: its checksum is not that of the library that was built")


def _sum_of(data: bytes) -> str | None:
    """The checksum at the end of a file, in hexadecimal; None where there is none."""
    match = _SEAL.fullmatch(data[-_LENGTH:])
    return None if match is None else match[1].decode("ascii")
