"""The CUDA runtime library that sessions use: where it is, and which version it has. No GPU is needed to ask.

Polygraphy loads it and looks for it in the usual places, but not where NVIDIA's packages for CUDA 13 put it on Linux,
`nvidia/cu13/lib` among Python's packages. So polygraphy is shown that folder where it finds none by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quartermap_deploy.errors import MissingDependencyError

INSTALL = (
    "pip install nvidia-cuda-runtime (nvidia-cuda-runtime-cu12 for CUDA 12), or install the CUDA toolkit"
)
_SEARCHED = "LD_LIBRARY_PATH"


def require_runtime(purpose: str) -> None:
    """Check that there is a CUDA runtime library.

    Args:
        purpose: what it is needed for, for the message.

    Raises:
        MissingDependencyError: if there is none.
    """
    if _runtime() is None:
        raise MissingDependencyError(
            f"{purpose} needs the CUDA runtime library, and none is found; {INSTALL}"
        )


@functools.cache
def runtime_version() -> str | None:
    """The version of the CUDA runtime library, such as "12.6", or None where there is none."""
    runtime = _runtime()
    version = ctypes.c_int()
    if runtime is None or runtime.handle.cudaRuntimeGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _runtime() -> Any | None:
    """Polygraphy's wrapper of the library, which is also the one that sessions work with."""
    from polygraphy import cuda
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    for folders in ([], wheel_folders()):
        # Polygraphy also prints what it raises.
        with _also_searched(folders), G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            try:
                return cuda.wrapper()
            except (OSError, PolygraphyException):
                continue
    return None


def wheel_folders() -> list[str]:
    """The folders in which NVIDIA's packages for CUDA 13 and later keep the runtime library, newest first."""
    try:
        spec = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        return []
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [folder for place in places for folder in Path(place).glob("cu[0-9]*/lib")]
    return [str(folder) for folder in sorted(found, reverse=True)]


@contextlib.contextmanager
def _also_searched(folders: list[str]) -> Iterator[None]:
    """While open, polygraphy looks into these folders too; it asks the environment each time that it looks."""
    before = os.environ.get(_SEARCHED)
    if folders:
        os.environ[_SEARCHED] = os.pathsep.join([*folders, *([before] if before else [])])
    try:
        yield
    finally:
        if before is not None:
            os.environ[_SEARCHED] = before
        elif folders:
            os.environ.pop(_SEARCHED, None)
