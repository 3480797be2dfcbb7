"""Memory of large blocks, given back as soon as they are free."""

from __future__ import annotations

import contextlib
import ctypes

_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc's mallopt."""
_BLOCK = 1 << 20


def give_back_large_blocks() -> None:
    """Let the C library ask the system for each block of 1 MiB or more by itself, where that is glibc.

    Otherwise its threshold rises to the largest block that was ever freed, up to 32 MiB. Bodies and images then come
    out of heaps, one for each thread, in which what is freed stays until all behind it is free, and where bodies that
    grow are copied.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _BLOCK)
