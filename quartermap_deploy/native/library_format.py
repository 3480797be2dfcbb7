"""The file formats of shared libraries: for which system and machine a file is, and whether it is all there.

The loader maps a file by its tables; reading behind the end of one that was cut short kills the process. So the ends
that the tables name are compared with the size of the file before it is loaded.
"""

from __future__ import annotations

import platform
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass

ELF, MACH_O, PE = "64-bit ELF", "64-bit Mach-O", "64-bit PE"
_SYSTEMS = {ELF: "Linux", MACH_O: "macOS", PE: "Windows"}
_HERE = {"darwin": MACH_O, "win32": PE}.get(sys.platform, ELF)
_X86 = {ELF: 62, MACH_O: 0x0100_0007, PE: 0x8664}
_ARM = {ELF: 183, MACH_O: 0x0100_000C, PE: 0xAA64}
_MACHINES = {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}
"""Names that Python has for a machine, and the number that stands for it in each format."""


class FormatError(ValueError):
    """What is wrong with a file; the message ends a sentence that begins with its name.

    Attributes:
        elsewhere: whether it is a library, but one for another system or machine.
    """

    def __init__(self, text: str, *, elsewhere: bool = False) -> None:
        super().__init__(text)
        self.elsewhere = elsewhere


@dataclass(frozen=True)
class _Tables:
    """What the tables of a file say.

    Attributes:
        machine: the number of its machine.
        shared: whether it is a shared library.
        end: the byte behind everything that the tables name.
    """

    machine: int
    shared: bool
    end: int


def check_format(data: bytes) -> None:
    """Check that a file is a whole shared library for this system and machine.

    Raises:
        FormatError: if not.
    """
    found = _format(data)
    if found is None:
        raise FormatError(f"is no {_HERE} library")
    if found != _HERE:
        raise FormatError(f"was built for {_SYSTEMS[found]}, and this is {_SYSTEMS[_HERE]}", elsewhere=True)
    if found == ELF and data[5] != 1:
        raise FormatError("was built for another kind of machine", elsewhere=True)
    try:
        tables = {ELF: _elf, MACH_O: _mach_o, PE: _pe}[found](data)
    except struct.error:
        raise FormatError(f"is cut short: its tables go on behind its {len(data):,} bytes") from None
    if not tables.shared:
        raise FormatError("is no shared library")
    here = _MACHINES.get(platform.machine().lower())
    if here is not None and here[found] != tables.machine:
        raise FormatError(
            f"was built for another kind of machine than this {platform.machine()}", elsewhere=True
        )
    if tables.end > len(data):
        raise FormatError(f"is cut short: it has {len(data):,} bytes of {tables.end:,}")


def _format(data: bytes) -> str | None:
    if len(data) < 64:
        return None
    if data[:5] == b"\x7fELF\x02":
        return ELF
    if data[:4] == b"\xcf\xfa\xed\xfe":
        return MACH_O
    (header,) = struct.unpack_from("<I", data, 0x3C)
    return PE if data[:2] == b"MZ" and data[header : header + 4] == b"PE\0\0" else None


def _elf(data: bytes) -> _Tables:
    kind, machine = struct.unpack_from("<HH", data, 16)
    programs, sections = struct.unpack_from("<QQ", data, 32)
    program_size, program_count, section_size, section_count = struct.unpack_from("<4H", data, 54)
    ends = [programs + program_size * program_count, sections + section_size * section_count]
    if max(ends) <= len(data):
        if program_count and program_size < 56:
            raise FormatError(f"has program headers of {program_size} bytes, expected 56")
        for index in range(program_count):
            # Offset in the file and bytes in it of one segment.
            offset, _, _, length = struct.unpack_from("<4Q", data, programs + index * program_size + 8)
            ends.append(offset + length)
    return _Tables(machine, kind == 3, max(ends))


def _mach_o(data: bytes) -> _Tables:
    machine, _, kind, count, size = struct.unpack_from("<5I", data, 4)
    ends = [32 + size, *_mach_o_segments(data, count)]
    return _Tables(machine, kind in (6, 8), max(ends))


def _mach_o_segments(data: bytes, count: int) -> Iterator[int]:
    place = 32
    for _ in range(count):
        command, size = struct.unpack_from("<II", data, place)
        if size < 8:
            raise FormatError(f"has a load command of {size} bytes, expected 8 at least")
        if command == 0x19:  # LC_SEGMENT_64
            offset, length = struct.unpack_from("<QQ", data, place + 40)
            yield offset + length
        place += size


def _pe(data: bytes) -> _Tables:
    (header,) = struct.unpack_from("<I", data, 0x3C)
    machine, count = struct.unpack_from("<HH", data, header + 4)
    optional, flags = struct.unpack_from("<HH", data, header + 20)
    first = header + 24 + optional
    ends = [first + 40 * count]
    for index in range(count):
        length, offset = struct.unpack_from("<II", data, first + 40 * index + 16)
        ends.append(offset + length)
    return _Tables(machine, bool(flags & 0x2000), max(ends))
