"""A built library: looked at as a file first, then loaded, then asked what it is.

Whatever is loaded runs: the constructors of a library do before any function of it is called. So `inspect` reads the
file alone, and `load` loads nothing that it refuses.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartermap_deploy.files import read_regular
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.native.library_format import FormatError, check_format
from quartermap_deploy.native.seal import SealError, check_seal
from quartermap_deploy.plain_text import printable

LARGEST_LIBRARY = 1 << 30
"""Bytes; those for every GPU of today have less than 20 million."""


@dataclass(frozen=True)
class LibraryKind:
    """A kind of library of this project.

    Attributes:
        name: for messages.
        contract: its function that says what it is, as JSON.
        build: the command that builds one.
        always_sealed: whether there is none without a seal. Plugins of earlier releases have none; engines want them by
            their hash.
    """

    name: str
    contract: str
    build: str
    always_sealed: bool = True


PLUGIN = LibraryKind("plugin", "quartermap_plugin_contract", "quartermap plugin build", always_sealed=False)
CPU = LibraryKind("CPU", "quartermap_cpu_contract", "quartermap native build")


def load(path: Path, sha256: str | None = None, kind: LibraryKind = PLUGIN) -> ctypes.CDLL:
    """Load a library into this process, after a look at its file.

    Args:
        path: the library, of which the user said where it is.
        sha256: its hash, where a certain one is wanted.
        kind: what it should be.

    Raises:
        PluginError: if it is missing, damaged, another one, no library of this kind, or built for another machine.
    """
    found = inspect(path, kind)
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
            f"the {kind.name} library {printable(path)} cannot be loaded: {printable(error)}. It is damaged or was "
            f"built for another machine; build it here: {kind.build}"
        ) from error


def inspect(path: Path, kind: LibraryKind = PLUGIN) -> str:
    """Look at the file of a library, without running anything of it; returns its SHA-256, in hexadecimal.

    Raises:
        PluginError: if it is missing, or what `check_bytes` refuses.
    """
    if path.is_dir():
        raise PluginError(f"{printable(path)} is a folder; name the library in it")
    if not path.is_file():
        raise PluginError(
            f"there is no {kind.name} library {printable(path)}; `{kind.build}` makes one, in a store of yours if not "
            "told otherwise"
        )
    try:
        data = read_regular(path, LARGEST_LIBRARY)
    except OSError as error:
        raise PluginError(f"{printable(path)} cannot be read: {error.strerror}") from error
    check_bytes(data, printable(path), kind)
    return hashlib.sha256(data).hexdigest()


def check_bytes(data: bytes, name: str, kind: LibraryKind = PLUGIN) -> None:
    """Refuse what is no library of this project for this machine, ends before its own tables say, or is damaged.

    Whoever wants to deceive can write all of this into a file of his own: it says what a file is, not who made it.

    Args:
        data: the file.
        name: what to call it in messages.
        kind: what it should be.

    Raises:
        PluginError: if so.
    """
    try:
        check_format(data)
    except FormatError as error:
        why = "" if error.elsewhere else "it is damaged or no library; "
        raise PluginError(f"{name} {error}; {why}build it here: {kind.build}") from error
    # macOS puts an underscore before names of C.
    if not any(before + kind.contract.encode() + b"\0" in data for before in (b"\0", b"\0_")):
        raise PluginError(f"{name} {_stranger(kind)}")
    try:
        check_seal(data, required=kind.always_sealed)
    except SealError as error:
        raise PluginError(f"{name} {error}; nothing of it was run; build it here: {kind.build}") from error


def describe(library: ctypes.CDLL, path: Path, kind: LibraryKind = PLUGIN) -> dict[str, Any]:
    """Return the contract and the build of a loaded library.

    Args:
        library: as `load` returned it.
        path: for the message.
        kind: what it should be.

    Raises:
        PluginError: if it is no library of this kind.
    """
    try:
        function = library[kind.contract]
    except AttributeError:
        raise PluginError(f"{printable(path)} {_stranger(kind)}") from None
    function.restype = ctypes.c_char_p
    try:
        found = json.loads(function())
    except (ValueError, TypeError) as error:
        raise PluginError(
            f"the {kind.name} library {printable(path)} does not describe itself: {error}"
        ) from error
    if not isinstance(found, dict):
        raise PluginError(
            f"the {kind.name} library {printable(path)} does not describe itself: expected an object, got {found!r}"
        )
    return found


def served_tensorrt(build: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Which TensorRT a plugin library serves: major versions, such as "10", and "rtx". Empty for kernels alone.

    Args:
        build: as the library's contract has it.
        path: for the message.

    Raises:
        PluginError: if it was built by an earlier release, for one version of TensorRT alone.
    """
    found = build.get("tensorrt")
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise PluginError(
            f"the plugin library {printable(path)} was built by an earlier release, for TensorRT {printable(found)} "
            f"alone; build it anew: {PLUGIN.build}"
        )
    return tuple(found)


def _stranger(kind: LibraryKind) -> str:
    what = "plugin" if kind == PLUGIN else f"{kind.name} library"
    return f"is a library, but no {what} of quartermap-deploy: it has no function {kind.contract}"
