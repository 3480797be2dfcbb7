"""Libraries that a bundle carries for others to install on purpose. Nothing is ever loaded from a bundle."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from quartermap_deploy.errors import BundleError
from quartermap_deploy.files import read_regular
from quartermap_deploy.native.library import LARGEST_LIBRARY, check_bytes
from quartermap_deploy.plain_text import printable

if TYPE_CHECKING:
    from quartermap_deploy.bundle import Bundle

_LIBRARY_NAME = re.compile(r"\.(so|dll|dylib)(\.\d+)*(?![\s\S])", re.IGNORECASE)


@dataclass(frozen=True)
class CarriedLibrary:
    """A library among the files of a bundle.

    Attributes:
        name: of the file.
        sha256: its hash, as the manifest lists it.
        targets: those whose engines were built with it; none for a library that nothing in the bundle asks for.
    """

    name: str
    sha256: str
    targets: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "targets": list(self.targets)}


def carried_libraries(manifest: Mapping[str, Any]) -> tuple[CarriedLibrary, ...]:
    """What a bundle carries: files that its engines were built with, and whatever else has the name of a library.

    Args:
        manifest: of the bundle.
    """
    wanted: dict[str, list[str]] = {}
    for target, entry in manifest["targets"].items():
        plugin = entry.get("plugin") if isinstance(entry, Mapping) else None
        if isinstance(plugin, Mapping) and isinstance(plugin.get("sha256"), str):
            wanted.setdefault(plugin["sha256"], []).append(target)
    hashes = {name: str(entry["sha256"]) for name, entry in manifest["files"].items()}
    return tuple(
        CarriedLibrary(name, sha256, tuple(wanted.get(sha256, ())))
        for name, sha256 in hashes.items()
        if sha256 in wanted or _LIBRARY_NAME.search(name)
    )


def read_carried(bundle: Bundle) -> tuple[CarriedLibrary, bytes]:
    """The library of a bundle that its engines were built with, looked at but not run, and its bytes.

    Raises:
        BundleError: if the bundle carries none, or the file is another by now.
        PluginError: if the file is no library of this project for this machine.
    """
    found = [library for library in carried_libraries(bundle.manifest) if library.targets]
    if not found:
        raise BundleError(
            f"the bundle {printable(bundle.path)} carries no plugin that an engine of it was built with; build one "
            "here: quartermap plugin build"
        )
    library = found[0]
    path = bundle.path / library.name
    try:
        data = read_regular(path, LARGEST_LIBRARY, follow=False)
    except OSError as error:
        raise BundleError(f"{printable(path)} cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != library.sha256:
        raise BundleError(f"{printable(path)} was changed while it was looked at; nothing was installed")
    check_bytes(data, printable(path))
    return library, data
