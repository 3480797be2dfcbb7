"""`carry_library`: put the plugin that a bundle's engines were built with into the bundle, for others to install."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from quartermap_deploy.bundle import MANIFEST, Bundle, describe_file, load_bundle, new_bundle, write_json
from quartermap_deploy.errors import BundleError
from quartermap_deploy.native.build import PLUGIN_LIBRARY
from quartermap_deploy.native.library import inspect
from quartermap_deploy.plain_text import printable
from quartermap_deploy.rebuild import copy_files
from quartermap_deploy.targets.tensorrt.plugin import WantedLibrary, find_library, wrong_library


def carry_library(path: str | os.PathLike[str], library: Path | None = None) -> Bundle:
    """Put the plugin that a bundle's engines were built with into it. A signature of the bundle goes.

    Args:
        path: the bundle.
        library: the library; None looks where engines look for it.

    Returns:
        The bundle, loaded from disk.

    Raises:
        BundleError: if it is no bundle, has no engine with a plugin, or the library is another one.
        EngineError: if there is no such library.
        PluginError: if it is no library of this project for this machine.
    """
    bundle = load_bundle(path)
    entries = bundle.manifest["targets"].values()
    wanted = next((found for entry in entries if (found := WantedLibrary.of_entry(entry)) is not None), None)
    if wanted is None:
        raise BundleError(
            f"the bundle {printable(bundle.path)} has no engine with a plugin; there is nothing to carry"
        )
    source = find_library(library, wanted)
    if (reason := wrong_library(source, wanted)) is not None:
        raise BundleError(f"of the engine in {printable(bundle.path)}: {reason}; name that one with --plugin")
    inspect(source)
    with new_bundle(bundle.path, force=True) as draft:
        files = copy_files(bundle.path, draft, bundle.manifest["files"])
        (draft / PLUGIN_LIBRARY).write_bytes(source.read_bytes())
        files[PLUGIN_LIBRARY] = describe_file(draft / PLUGIN_LIBRARY)
        if files[PLUGIN_LIBRARY]["sha256"] != wanted.sha256:
            raise BundleError(
                f"{printable(source)} was changed while it was read; the bundle is what it was before"
            )
        write_json(draft / MANIFEST, {**bundle.manifest, "files": dict(sorted(files.items()))})
        made = load_bundle(draft)
    return dataclasses.replace(made, path=bundle.path)
