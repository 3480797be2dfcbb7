"""A built library: looked at as a file first, then loaded, then asked what it is.

Whatever is loaded runs: the constructors of a library do before any function of it is called. So `inspect` reads the
file alone, and `load` loads nothing that it refuses.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import platform
import struct
from pathlib import Path
from typing import Any

from quartermap_deploy.files import read_regular
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.plain_text import printable

CONTRACT_FUNCTION = "quartermap_plugin_contract"
LARGEST_LIBRARY = 1 << 30
"""Bytes; those for every GPU of today have less than 20 million."""
_MACHINES = {"x86_64": 62, "amd64": 62, "aarch64": 183, "arm64": 183}
"""Names that Python has for a machine, and the number that stands for it in an ELF file."""
_SHARED_OBJECT = 3
_MEND = "it is damaged or no library; build it here: quartermap plugin build"


def load(path: Path, sha256: str | None = None) -> ctypes.CDLL:
    """Load a library into this process, after a look at its file.

    Args:
        path: the library, of which the user said where it is.
        sha256: its hash, where a certain one is wanted.

    Raises:
        PluginError: if it is missing, damaged, another one, no library of this project, or built for another machine.
    """
    found = inspect(path)
    if sha256 not in (None, found):
        raise PluginError(
            f"{printable(path)} is another library than the one that is wanted: its sha256 is {found[:12]}…, expected "
            f"{str(sha256)[:12]}…; nothing of it was run"
        )
    try:
        # By its absolute path: the loader searches a bare name elsewhere.
        return ctypes.CDLL(str(path.resolve()))
    except OSError as error:
        raise PluginError(
            f"the plugin library {printable(path)} cannot be loaded: {printable(error)}. It is damaged or was built "
            "for another machine; build it here: quartermap plugin build"
        ) from error


def inspect(path: Path) -> str:
    """Look at the file of a library, without running anything of it; returns its SHA-256, in hexadecimal.

    Raises:
        PluginError: if it is missing, or what `check_bytes` refuses.
    """
    if path.is_dir():
        raise PluginError(f"{printable(path)} is a folder; name the library in it")
    if not path.is_file():
        raise PluginError(
            f"there is no plugin library {printable(path)}; `quartermap plugin build` makes one, in a store of yours "
            "if not told otherwise"
        )
    try:
        data = read_regular(path, LARGEST_LIBRARY)
    except OSError as error:
        raise PluginError(f"{printable(path)} cannot be read: {error.strerror}") from error
    check_bytes(data, printable(path))
    return hashlib.sha256(data).hexdigest()


def check_bytes(data: bytes, name: str) -> None:
    """Refuse what is no library of this project for this machine, or ends before its own tables say.

    The loader maps a file by its tables; reading behind the end of one that was cut short kills the process. Whoever
    wants to deceive can write all of this into a file of his own: it says what a file is, not who made it.

    Args:
        data: the file.
        name: what to call it in messages.

    Raises:
        PluginError: if so.
    """
    if len(data) < 64 or data[:5] != b"\x7fELF\x02":
        raise PluginError(f"{name} is no 64-bit ELF library; {_MEND}")
    if data[5] != 1:
        raise PluginError(
            f"{name} was built for another kind of machine; build it here: quartermap plugin build"
        )
    kind, machine = struct.unpack_from("<HH", data, 16)
    if kind != _SHARED_OBJECT:
        raise PluginError(f"{name} is no shared library; {_MEND}")
    here = _MACHINES.get(platform.machine().lower())
    if here not in (None, machine):
        raise PluginError(
            f"{name} was built for another kind of machine than this {platform.machine()}; build it here: quartermap "
            "plugin build"
        )
    programs, sections = struct.unpack_from("<QQ", data, 32)
    program_size, program_count, section_size, section_count = struct.unpack_from("<4H", data, 54)
    ends = [programs + program_size * program_count, sections + section_size * section_count]
    if max(ends) <= len(data):
        if program_count and program_size < 56:
            raise PluginError(f"{name} has program headers of {program_size} bytes, expected 56; {_MEND}")
        for index in range(program_count):
            # Offset in the file and bytes in it of one segment.
            offset, _, _, length = struct.unpack_from("<4Q", data, programs + index * program_size + 8)
            ends.append(offset + length)
    if max(ends) > len(data):
        raise PluginError(f"{name} is cut short: it has {len(data):,} bytes of {max(ends):,}; {_MEND}")
    if b"\0" + CONTRACT_FUNCTION.encode() + b"\0" not in data:
        raise PluginError(
            f"{name} is a library, but no plugin of quartermap-deploy: it has no function {CONTRACT_FUNCTION}"
        )


def describe(library: ctypes.CDLL, path: Path) -> dict[str, Any]:
    """Return the contract and the build of a loaded library.

    Args:
        library: as `load` returned it.
        path: for the message.

    Raises:
        PluginError: if it is no library of this project.
    """
    try:
        function = library[CONTRACT_FUNCTION]
    except AttributeError:
        raise PluginError(
            f"{path} is a library, but no plugin of quartermap-deploy: it has no function {CONTRACT_FUNCTION}"
        ) from None
    function.restype = ctypes.c_char_p
    try:
        found = json.loads(function())
    except (ValueError, TypeError) as error:
        raise PluginError(f"the plugin library {path} does not describe itself: {error}") from error
    if not isinstance(found, dict):
        raise PluginError(
            f"the plugin library {path} does not describe itself: expected an object, got {found!r}"
        )
    return found
