"""The CPU library for tests, built once for all processes of a test run, or not at all where `make` has built it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from made_once import made_once

from quartermap_deploy.errors import MissingDependencyError
from quartermap_deploy.native.cpu_build import CPU_LIBRARY, build_cpu_library, find_compiler
from quartermap_deploy.native.cpu_library import find_cpu_library

BUILT_VARIABLE = "QUARTERMAP_TEST_CPU_LIBRARY"


def remember_cpu_library() -> None:
    """Keep where this user's own library lies, if there is one, before tests get folders of their own."""
    found = find_cpu_library().library
    os.environ[BUILT_VARIABLE] = "" if found is None else str(found.path)


def cpu_library_path() -> Path:
    """Return a library that was built from exactly these sources in the usual way; skip where there is no compiler."""
    if named := os.environ.get(BUILT_VARIABLE):
        return Path(named)
    require_compiler()

    def make(folder: Path) -> None:
        # The folder appears with the library in it, since others wait for it.
        build_cpu_library(folder.with_suffix(".made")).parent.rename(folder)

    return made_once("cpu-library", make) / CPU_LIBRARY


def require_compiler() -> None:
    """Skip where nothing can be compiled."""
    try:
        find_compiler()
    except MissingDependencyError as error:
        pytest.skip(str(error))


def put_into_cache(library: Path, home: Path) -> Path:
    """Let a new home have a library in its cache, as if it had been built there; returns where it lies."""
    from quartermap_deploy.native.cpu_build import cache_name

    folder = home / "cache" / "native" / cache_name()
    folder.mkdir(mode=0o700, parents=True)
    for place in (home / "cache", folder.parent):
        place.chmod(0o700)
    return Path(shutil.copy(library, folder / CPU_LIBRARY))
