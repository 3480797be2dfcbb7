"""Another name for a shared library that is loaded already, on Linux.

Who opens a library by a bare name gets the one that is loaded under that name, and a library's name is the one that
stands in its file (SONAME). So a file with the wanted name in it, no code, and a dependency on the library that is
meant answers for it: symbols are looked up in what it depends on. It is written here, byte by byte, so that neither a
compiler nor a variable of the environment is needed, and is gone from the disk as soon as it is loaded.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import tempfile
from pathlib import Path

from quartermap_deploy.native.errors import PluginError

_MACHINES = {"x86_64": 62, "aarch64": 183}
"""Names that Python has for a machine, and ELF's numbers of them."""
_HEADER, _PROGRAM, _SYMBOL, _PAGE = 64, 56, 24, 0x10000
_LOAD, _DYNAMIC, _STACK = 1, 2, 0x6474E551
_NEEDED, _HASH, _STRTAB, _SYMTAB, _STRSZ, _SYMENT, _SONAME = 1, 4, 5, 6, 10, 11, 14
"""Entries of the dynamic section."""
_held: dict[str, ctypes.CDLL] = {}


def give_alias(alias: str, library: str) -> None:
    """Let a loaded library answer to another bare name for as long as the process lives.

    Args:
        alias: the name that is asked for, such as "libx.so".
        library: the name under which the library is loaded, such as "libx.so.1".

    Raises:
        PluginError: if the loader does not take it, or this kind of machine is not known.
    """
    if alias in _held:
        return
    with tempfile.TemporaryDirectory(prefix="quartermap-alias-") as folder:
        path = Path(folder) / alias
        try:
            path.write_bytes(alias_file(alias, library))
            _held[alias] = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        except OSError as error:
            raise PluginError(
                f"{library} cannot be given the name {alias}: {error}; a symbolic link of that name in a folder of "
                "LD_LIBRARY_PATH does the same"
            ) from error


def alias_file(alias: str, library: str) -> bytes:
    """A shared library without code: its name, and the library that it depends on.

    Headers, then one segment with the dynamic section, an empty table of symbols, its hash table, and the names.

    Raises:
        PluginError: if this kind of machine is not known.
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        raise PluginError(f"{library} cannot be given another name on a machine of kind {platform.machine()}")
    names = b"\0" + alias.encode() + b"\0" + library.encode() + b"\0"
    headers, entries = _HEADER + 3 * _PROGRAM, 8
    symbols = headers + 16 * entries
    table = symbols + _SYMBOL
    text = table + 16
    size = text + len(names)
    dynamic = [
        (_SONAME, 1),
        (_NEEDED, 2 + len(alias.encode())),
        (_HASH, table),
        (_STRTAB, text),
        (_SYMTAB, symbols),
        (_STRSZ, len(names)),
        (_SYMENT, _SYMBOL),
        (0, 0),
    ]
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bits, little end first
    start = struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, _HEADER, 0, 0, _HEADER, _PROGRAM, 3, 64, 0, 0)
    programs = [
        (_LOAD, 6, 0, size, _PAGE),
        (_DYNAMIC, 6, headers, 16 * entries, 8),
        (_STACK, 6, 0, 0, 16),  # without it the loader would make stacks executable
    ]
    return b"".join(
        [
            identity + start,
            *(
                struct.pack("<IIQQQQQQ", kind, flags, at, at, at, length, length, alignment)
                for kind, flags, at, length, alignment in programs
            ),
            *(struct.pack("<qQ", tag, value) for tag, value in dynamic),
            bytes(_SYMBOL),
            struct.pack("<4I", 1, 1, 0, 0),  # one bucket, one symbol: the empty one
            names,
        ]
    )
