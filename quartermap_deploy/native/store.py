"""The store of plugin libraries of this user: each in a folder named by its hash, in a folder that is the user's alone.

    <sha256>/libquartermap_plugin.so
    <sha256>/origin.json

`quartermap plugin build` and `quartermap plugin install` put libraries there, and nothing else does. Engines find the
library that they were built with by its hash.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from quartermap_deploy.drafts import draft_folder
from quartermap_deploy.errors import TrustError
from quartermap_deploy.files import file_hash
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.plain_text import printable
from quartermap_deploy.private_folders import HOME_VARIABLE, check_private, make_private, own_folder
from quartermap_deploy.reading import read_json

ORIGIN_FILE = "origin.json"
SHORTEST_HASH = 8
"""Letters by which a library is named at least."""
How = Literal["built here", "kernels built here", "installed from a bundle"]

BUILT: How = "built here"
KERNELS: How = "kernels built here"
INSTALLED: How = "installed from a bundle"


@dataclass(frozen=True)
class StoredLibrary:
    """A library in the store.

    Attributes:
        path: where it lies.
        sha256: its hash, which is also the name of its folder.
        how: how it came: `BUILT`, `KERNELS` (without the plugin for TensorRT), or `INSTALLED`.
        origin: where it came from, in words; of an installed one as its bundle says.
        added: when, in ISO 8601.
    """

    path: Path
    sha256: str
    how: str
    origin: str
    added: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "path": str(self.path)}


def store_folder() -> Path:
    """Where the store is; it need not be there yet.

    Raises:
        TrustError: if nobody knows this user's home.
    """
    folder = own_folder("plugins")
    if folder is None:
        raise TrustError(
            f"this user has no home to keep plugins in; name a folder in the environment variable {HOME_VARIABLE}"
        )
    return folder


def open_store() -> Path:
    """Make the store, unless it is there; returns its folder.

    Raises:
        TrustError: if others could put libraries there.
        PluginError: if it cannot be made.
    """
    folder = store_folder()
    try:
        return make_private(folder)
    except OSError as error:
        raise PluginError(
            f"the store of plugins {printable(folder)} cannot be made: {error.strerror}; name another place in the "
            f"environment variable {HOME_VARIABLE}"
        ) from error


def add_library(data: bytes, name: str, how: How, origin: str) -> StoredLibrary:
    """Put a library into the store; one that is there already is described anew.

    Args:
        data: the library.
        name: what its file is called.
        how: how it came.
        origin: where it came from, in words.

    Raises:
        TrustError: if others could put libraries there.
        PluginError: if it cannot be written.
    """
    folder, sha256 = open_store(), hashlib.sha256(data).hexdigest()
    added = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    values = {"how": how, "origin": origin, "added": added}
    try:
        with draft_folder(folder / sha256) as draft:
            (draft.path / name).write_bytes(data)
            (draft.path / name).chmod(0o700)
            (draft.path / ORIGIN_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            if (folder / sha256).exists():
                shutil.rmtree(folder / sha256)
            draft.path.rename(folder / sha256)
    except OSError as error:
        raise PluginError(f"the plugin cannot be put into {printable(folder)}: {error.strerror}") from error
    return StoredLibrary(folder / sha256 / name, sha256, how, origin, added)


def find_stored(sha256: str) -> Path | None:
    """The library with a hash, or None if there is none in the store.

    Raises:
        TrustError: if others could put libraries there.
        PluginError: if the library there is another one by now.
    """
    return next((library.path for library in stored_libraries() if library.sha256 == sha256), None)


def newest_built() -> Path | None:
    """The plugin that was built here last, or None. One that came with a bundle serves the engines that want it alone.

    Raises:
        TrustError: if others could put libraries there.
    """
    built = [library for library in stored_libraries() if library.how == BUILT]
    return max(built, key=lambda library: library.added).path if built else None


def stored_libraries() -> list[StoredLibrary]:
    """What is in the store, the oldest first; what is no library of it is passed over.

    Raises:
        TrustError: if others could put libraries there.
    """
    folder = own_folder("plugins")
    if folder is None or not os.path.lexists(folder):
        return []
    check_private(folder)
    return sorted(_read(folder), key=lambda library: (library.added, library.sha256))


def _read(folder: Path) -> Iterator[StoredLibrary]:
    for place in folder.iterdir():
        if not re.fullmatch(r"[0-9a-f]{64}", place.name) or place.is_symlink():
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            values = read_json(place / ORIGIN_FILE)
            (path,) = place.glob("*.so")
            known = {name: str(values[name]) for name in ("how", "origin", "added")}
            if path.is_file() and not path.is_symlink() and file_hash(path) == place.name:
                yield StoredLibrary(path, place.name, **known)


def remove_library(sha256: str) -> StoredLibrary:
    """Take a library out of the store.

    Args:
        sha256: its hash, or how that begins.

    Raises:
        TrustError: if others could put libraries there.
        PluginError: if there is no such library, or are several, or it cannot be removed.
    """
    if not re.fullmatch(rf"[0-9a-f]{{{SHORTEST_HASH},64}}", sha256):
        raise PluginError(
            f"{printable(sha256)!r} is no hash of a library; give {SHORTEST_HASH} letters of it at least, as "
            "`quartermap plugin list` shows it"
        )
    found = [library for library in stored_libraries() if library.sha256.startswith(sha256)]
    if len(found) != 1:
        raise PluginError(
            f"{len(found) or 'no'} libraries in the store have a hash that begins with {sha256}; `quartermap plugin "
            "list` shows them"
        )
    try:
        shutil.rmtree(found[0].path.parent)
    except OSError as error:
        raise PluginError(f"{printable(found[0].path)} cannot be removed: {error.strerror}") from error
    return found[0]
