"""Hand-made heads of shared libraries, for the checks of their formats."""

from __future__ import annotations

import struct

X86, ARM = 62, 183


def elf(
    segments: list[tuple[int, int]],
    *,
    machine: int = X86,
    kind: int = 3,
    sections: tuple[int, int] = (0, 0),
    header: int = 56,
    order: int = 1,
) -> bytes:
    """The head of an ELF file: its segments (offset, bytes); where its section headers begin, and how many they are."""
    identity = b"\x7fELF\x02" + bytes([order]) + bytes(10)
    where, count = sections
    head = struct.pack(
        "<HHIQQQIHHHHHH", kind, machine, 1, 0, 64, where, 0, 64, header, len(segments), 64, count, 0
    )
    tables = b"".join(
        struct.pack("<IIQQQQQQ", 1, 5, offset, 0, 0, length, 0, 0)[:header] for offset, length in segments
    )
    return identity + head + tables
