"""The CUDA library: the operator SelectiveScan2D for ONNX Runtime's CUDA provider; how it is built, found and checked.

It is taken from the file that the environment variable QUARTERMAP_NATIVE_CUDA names, or from this user's own cache of
libraries that were built here from exactly these sources, and from nowhere else. Nothing is ever built by looking for
it: that takes minutes, and nvcc.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quartermap_deploy.errors import QuartermapError, TrustError
from quartermap_deploy.files import write_whole
from quartermap_deploy.native.build import (
    ONNXRUNTIME_LIBRARY,
    BuildOptions,
    build_plugin,
    plugin_sources,
)
from quartermap_deploy.native.contract import differences
from quartermap_deploy.native.cpu_build import hash_of_files
from quartermap_deploy.native.cpu_library import OFF, ON
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.native.library import LibraryKind, describe, load
from quartermap_deploy.plain_text import printable
from quartermap_deploy.private_folders import HOME_VARIABLE, check_private, make_private, own_folder
from quartermap_deploy.progress import SILENT, Progress

CUDA_VARIABLE = "QUARTERMAP_NATIVE_CUDA"
"""As `cpu_library.NATIVE_VARIABLE`: 0 turns the library off; a path from / on names one."""
KIND = LibraryKind("CUDA", "quartermap_plugin_contract", "quartermap native build --cuda")
REGISTER = "RegisterCustomOps"
"""The function by which ONNX Runtime takes a library of operators."""
_OWN = ("kernels", "contract", "onnxruntime", "onnxruntime_cuda", "CMakeLists.txt")
_OTHERS = "kernels/cpu/"


@dataclass(frozen=True)
class CudaLibrary:
    """A library that fits this release.

    Attributes:
        path: where it lies.
        cuda: version of the CUDA runtime in it.
        architectures: of GPUs that it holds code for, such as "80,90-real".
    """

    path: Path
    cuda: str
    architectures: str


@dataclass(frozen=True)
class CudaSearch:
    """What was found.

    Attributes:
        library: the one to use, or None.
        summary: in one line, which was chosen, or why none.
        named: whether the environment names one.
    """

    library: CudaLibrary | None
    summary: str
    named: bool = False

    @property
    def warning(self) -> str | None:
        """What whoever runs a model should know: why the library that the environment names is not used, or None."""
        return f"{self.summary}; it runs without it" if self.named and self.library is None else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        library = None if self.library is None else {**asdict(self.library), "path": str(self.library.path)}
        return {"library": library, "summary": self.summary}


def find_cuda_library() -> CudaSearch:
    """Look for a library that fits; one that does not is no error."""
    named = os.environ.get(CUDA_VARIABLE, "")
    if named.lower() in OFF:
        return CudaSearch(None, f"the CUDA library is turned off by {CUDA_VARIABLE}={named}")
    if named.lower() in ON:
        named = ""
    if named and not os.path.isabs(named):
        reason = f"{CUDA_VARIABLE} is {printable(named)!r}; expected 0, 1, or the path of a library from / on"
        return CudaSearch(None, reason, named=True)
    try:
        path = Path(named) if named else _cached()
        if not named and not path.is_file():
            return CudaSearch(None, f"no CUDA library was built here: {KIND.build}")
        if not named:
            check_private(path.parent)
        library = load_cuda_library(path)
    except (QuartermapError, OSError) as error:
        return CudaSearch(None, " ".join(str(error).split()), named=bool(named))
    return CudaSearch(library, printable(library.path), named=bool(named))


def load_cuda_library(path: Path) -> CudaLibrary:
    """Load a library, after a look at its file, and compare what it says about itself with this release.

    No GPU and no driver is needed for that.

    Args:
        path: the library; loading it runs code of it.

    Raises:
        PluginError: if it is missing, damaged, for another platform, of another release, or not this operator's.
    """
    library = load(path, kind=KIND)
    contract = describe(library, path, KIND)
    build = contract.pop("build", None) or {}
    name = printable(path)
    if not hasattr(library, REGISTER):
        raise PluginError(
            f"{name} holds kernels or a TensorRT plugin, and no operator of ONNX Runtime; build that: {KIND.build}"
        )
    if wrong := differences(contract):
        raise PluginError(
            f"the CUDA library {name} does not fit this release of quartermap-deploy; build it anew: {KIND.build}"
            "\n  " + "\n  ".join(wrong)
        )
    if not build.get("cuda"):
        raise PluginError(f"the CUDA library {name} runs its kernels on the CPU, which is for tests alone")
    return CudaLibrary(path, str(build["cuda"]), str(build.get("architectures")))


def build_cuda_library(
    output: Path | None = None,
    architectures: tuple[str, ...] = (),
    *,
    progress: Progress = SILENT,
    on_output: Callable[[str], None] | None = None,
) -> Path:
    """Build the library, in one piece or not at all.

    Args:
        output: a folder for it, made if it is not there. None puts it into this user's cache, where it is found by
            itself, and replaces what lies there.
        architectures: of GPUs, such as ("80", "90"); empty for all that the kernels and the compiler know.
        progress: is told of the steps.
        on_output: is given each line that CMake and the compilers print.

    Returns:
        The path of the library.

    Raises:
        MissingDependencyError: if CMake or nvcc is missing.
        PluginError: if it cannot be compiled or written.
        TrustError: if others could write to the cache.
    """
    options = BuildOptions(onnxruntime=True, cuda_architectures=architectures)
    if output is not None:
        return build_plugin(output, options, progress=progress, on_output=on_output)
    target = _cached()
    for folder in (target.parents[2], target.parents[1], target.parent):
        make_private(folder)
    with tempfile.TemporaryDirectory(prefix="quartermap-cuda-") as temporary:
        built = build_plugin(Path(temporary), options, progress=progress, on_output=on_output)
        write_whole(target, built.read_bytes(), mode=0o700)
    return target


def _cached() -> Path:
    """Where the library that is built from these sources lies; it need not be there.

    Raises:
        TrustError: if nobody knows this user's home.
        PluginError: if this installation brings no sources.
    """
    cache = own_folder("cache")
    if cache is None:
        raise TrustError(
            f"this user has no home to keep libraries in; name a folder in the environment variable {HOME_VARIABLE}, "
            "or one for the library with --out"
        )
    name = f"{sys.platform}-{platform.machine().lower()}-{sources_hash()[:16]}"
    return cache / "native-cuda" / name / ONNXRUNTIME_LIBRARY


@functools.cache
def sources_hash() -> str:
    """Return the SHA-256 of all sources of the library with their names, in hexadecimal.

    Raises:
        PluginError: if this installation brings none.
    """
    root = plugin_sources()
    files = [
        path
        for place in (root / name for name in _OWN)
        for path in ([place] if place.is_file() else place.rglob("*"))
        if path.is_file()
    ]
    named = {path.relative_to(root).as_posix(): path for path in files}
    return hash_of_files({name: named[name] for name in sorted(named) if not name.startswith(_OTHERS)})
