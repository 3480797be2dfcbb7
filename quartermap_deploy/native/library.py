"""Loading a built library, and reading what it says about itself."""

from __future__ import annotations

import ctypes
import json
import struct
from pathlib import Path
from typing import Any

from quartermap_deploy.native.errors import PluginError

CONTRACT_FUNCTION = "quartermap_plugin_contract"


def load(path: Path) -> ctypes.CDLL:
    """Load a library into this process.

    Raises:
        PluginError: if it is missing, damaged, or built for another machine.
    """
    if path.is_dir():
        raise PluginError(f"{path} is a folder; name the library in it")
    if not path.is_file():
        raise PluginError(
            f"there is no plugin library {path}; `quartermap plugin build` makes one, in ./plugin if not told otherwise"
        )
    _require_whole(path)
    try:
        # By its absolute path: the loader searches a bare name elsewhere.
        return ctypes.CDLL(str(path.resolve()))
    except OSError as error:
        raise PluginError(
            f"the plugin library {path} cannot be loaded: {error}. It is damaged or was built for another machine; "
            "build it here: quartermap plugin build"
        ) from error


def _require_whole(path: Path) -> None:
    """Refuse a file that is no 64-bit ELF library, or that ends before its own tables say.

    The loader maps a file by its tables; reading behind the end of one that was cut short kills the process.

    Raises:
        PluginError: if so.
    """
    size = path.stat().st_size
    mend = "it is damaged or no library; build it here: quartermap plugin build"
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:5] != b"\x7fELF\x02":
            raise PluginError(f"{path} is no 64-bit ELF library; {mend}")
        programs, sections = struct.unpack_from("<QQ", header, 32)
        program_size, program_count, section_size, section_count = struct.unpack_from("<4H", header, 54)
        ends = [programs + program_size * program_count, sections + section_size * section_count]
        if max(ends) <= size:
            file.seek(programs)
            for _ in range(program_count):
                # Offset in the file and bytes in it of one segment.
                offset, _, _, length = struct.unpack_from("<4Q", file.read(program_size), 8)
                ends.append(offset + length)
    if max(ends) > size:
        raise PluginError(f"{path} is cut short: it has {size:,} bytes of {max(ends):,}; {mend}")


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
