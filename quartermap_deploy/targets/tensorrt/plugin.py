"""The plugin library of engines: found where the user put it, checked, and then loaded, once."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartermap_deploy.errors import EngineError
from quartermap_deploy.files import file_hash
from quartermap_deploy.lowering.operator import DOMAIN, SELECTIVE_SCAN_2D
from quartermap_deploy.plain_text import command, printable
from quartermap_deploy.targets.tensorrt.flavour import TENSORRT_RTX, version_numbers
from quartermap_deploy.targets.tensorrt.objects import last_error

PLUGIN_VARIABLE = "QUARTERMAP_PLUGIN"
_ORIN = (8, 7)
_BUILD = "build it with `quartermap plugin build`"


@dataclass(frozen=True)
class PluginLibrary:
    """A library that holds the plugin for a GPU.

    Attributes:
        path: where it lies.
        sha256: its hash.
        tensorrt: which TensorRT it serves, such as "10, 11, rtx".
        cuda: the version of CUDA that it was built with.
        architectures: of GPUs that it holds code for, as nvcc was told them, such as ("80", "89-real").
    """

    path: Path
    sha256: str
    tensorrt: str
    cuda: str
    architectures: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """What a manifest says about it: enough to know it again, and to build it again. Not where it lay."""
        return {
            "file": self.path.name,
            "sha256": self.sha256,
            "tensorrt": self.tensorrt,
            "cuda": self.cuda,
            "architectures": list(self.architectures),
        }


_loaded: dict[str, PluginLibrary] = {}
"""For each TensorRT module, the library that its registry has got from us. A registry lives as long as the process."""


@dataclass(frozen=True)
class WantedLibrary:
    """The library that an engine was built with, as its manifest entry says: what it is, never where it is.

    Attributes:
        sha256: its hash, by which it is known.
        file: what its file was called.
        tensorrt: which TensorRT it serves, as the manifest says, or None.
    """

    sha256: str
    file: str
    tensorrt: str | None

    @classmethod
    def of_entry(cls, entry: Mapping[str, Any]) -> WantedLibrary | None:
        """The library that an engine wants, or None if it needs none.

        Args:
            entry: the engine's manifest entry.

        Raises:
            EngineError: if what the entry says about it means nothing.
        """
        values = entry.get("plugin")
        if values is None:
            return None
        sha256 = values.get("sha256") if isinstance(values, Mapping) else None
        if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise EngineError(
                "the manifest says that the engine needs a plugin, but not which one: expected its sha256, 64 letters "
                "from 0 to f"
            )
        tensorrt = values.get("tensorrt")
        return cls(sha256, str(values.get("file")), None if tensorrt is None else str(tensorrt))

    def __str__(self) -> str:
        built = f", for TensorRT {printable(self.tensorrt)}" if self.tensorrt else ""
        return f"{printable(self.file)}, sha256 {self.sha256[:12]}…{built}"


def find_library(named: Path | None = None, wanted: WantedLibrary | None = None) -> Path:
    """Find the plugin library, where the user or the administrator put it, and nowhere else.

    One that is named is taken as it is. Otherwise it is the one of the environment variable QUARTERMAP_PLUGIN, or one
    of the user's store: that which an engine wants, or the one that was built here last. Neither a bundle, a recipe
    nor the current folder is looked into.

    Args:
        named: what the caller named.
        wanted: what an engine was built with.

    Raises:
        EngineError: if there is none.
        TrustError: if others could put libraries into the store.
    """
    from quartermap_deploy.native.store import find_stored, newest_built

    if named is not None:
        candidates = [Path(named)]
    else:
        stored = newest_built() if wanted is None else find_stored(wanted.sha256)
        candidates = [path for path in (_of_environment(), stored) if path is not None]
    if not candidates:
        what, carried = "", ""
        if wanted is not None:
            what = f", for this engine {wanted}"
            carried = "; one that a bundle carries is taken over by `quartermap plugin install BUNDLE`"
        raise EngineError(
            f"scans need the SelectiveScan2D plugin{what}; {_BUILD}, or name the library in the "
            f"environment variable {PLUGIN_VARIABLE}, or with --plugin where there is that option{carried}"
        )
    if not candidates[0].is_file():
        raise EngineError(f"there is no plugin library {printable(candidates[0])}; {_BUILD}")
    fitting = (path for path in candidates if wanted is not None and file_hash(path) == wanted.sha256)
    return next(fitting, candidates[0]).absolute()


def _of_environment() -> Path | None:
    """The library that the environment names.

    Raises:
        EngineError: if its path is relative: in a folder of somebody else it would be somebody else's library.
    """
    value = os.environ.get(PLUGIN_VARIABLE)
    if not value:
        return None
    if not os.path.isabs(value):
        raise EngineError(
            f"the environment variable {PLUGIN_VARIABLE} is {printable(value)!r}; expected a path from / on, so that "
            "it means the same library wherever a command is called"
        )
    return Path(value)


def wrong_library(path: Path, wanted: WantedLibrary) -> str | None:
    """Why a library is not the one that an engine was built with, or None if it is. Nothing of it is run.

    Args:
        path: the library at hand.
        wanted: what the engine was built with.
    """
    if file_hash(path) == wanted.sha256:
        return None
    return f"it was built with the plugin {wanted}, found another library {printable(path)}"


def check_library(trt: Any, path: Path, sha256: str | None = None) -> PluginLibrary:
    """Check that a file is our plugin, for a GPU and for this TensorRT.

    TensorRT itself maps whatever it is given: a file that was cut short ends the process. Its hash and its form are
    looked at before it is loaded, and what it says about itself after that, as it is the library that says it.

    Args:
        trt: the module.
        path: the library.
        sha256: its hash, where a certain one is wanted.

    Raises:
        PluginError: if it is missing, damaged, no library of ours, or of another release.
        EngineError: if it is ours but no plugin for a GPU, or not for this TensorRT.
    """
    from quartermap_deploy.native import library as libraries
    from quartermap_deploy.native.contract import differences
    from quartermap_deploy.native.errors import PluginError

    sha256 = sha256 or libraries.inspect(path)
    found = libraries.describe(libraries.load(path, sha256), path)
    build = found.pop("build", None) or {}
    if wrong := differences(found):
        raise PluginError(
            f"the plugin library {path} does not fit this release of quartermap-deploy; {_BUILD}\n  "
            + "\n  ".join(wrong)
        )
    served, cuda = libraries.served_tensorrt(build, path), build.get("cuda")
    if not served:
        raise EngineError(f"{path} holds the kernels alone, without the plugin for TensorRT; {_BUILD}")
    if cuda is None:
        raise EngineError(f"{path} emulates the kernels on the CPU, which is for tests; {_BUILD}")
    wanted = "rtx" if trt.__name__ == TENSORRT_RTX.module else str(version_numbers(trt.__version__)[0])
    if wanted not in served:
        raise EngineError(
            f"the plugin library {path} serves TensorRT {', '.join(served)}, found {trt.__name__} {trt.__version__}; "
            f"{_BUILD}, with a release of quartermap-deploy that knows it"
        )
    architectures = tuple(str(build.get("architectures") or "").split(","))
    return PluginLibrary(Path(path), sha256, ", ".join(served), cuda, architectures)


def require_code(library: PluginLibrary, capabilities: Iterable[str]) -> None:
    """Check that a library holds code for GPUs.

    Args:
        library: as `check_library` returns it.
        capabilities: compute capabilities, such as "8.9".

    Raises:
        EngineError: if it holds none for one of them.
    """
    lacking = [wanted for wanted in capabilities if not runs_on(library.architectures, wanted)]
    if lacking:
        listed = ",".join([*library.architectures, *(wanted.replace(".", "") for wanted in lacking)])
        raise EngineError(
            f"the plugin library {library.path} holds code for the architectures {', '.join(library.architectures)}, "
            f"none for compute capability {' and '.join(lacking)}; "
            f"build it with `quartermap plugin build --cuda-architectures {listed}`"
        )


def runs_on(architectures: Iterable[str], capability: str) -> bool:
    """Whether code for architectures runs on a GPU.

    Machine code runs on the same major version with the same or a later minor one, that of Jetson's 8.7 there alone,
    PTX on any later GPU. "80-real" is machine code, "80-virtual" PTX, "80" both; "90a" runs on 9.0 alone, "100f" on
    10.x.

    Args:
        architectures: as nvcc is told them.
        capability: of the GPU, such as "8.9".
    """
    gpu = version_numbers(capability)[:2]
    return any(_code_runs_on(name, gpu) for name in architectures)


def _code_runs_on(architecture: str, gpu: tuple[int, ...]) -> bool:
    parts = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
    if parts is None:
        return False
    own, only, form = (int(parts[1]), int(parts[2])), parts[3], parts[4]
    later = own[0] == gpu[0] and own <= gpu
    if own == gpu:
        return True
    if only:
        return only == "f" and later
    machine_code = form != "-virtual" and later and own != _ORIN
    return machine_code or (form != "-real" and own <= gpu)


def load_plugin(trt: Any, logger: Any, path: Path, sha256: str | None = None) -> PluginLibrary:
    """Load the plugin library into TensorRT's registry, unless it is there already.

    The registry keeps one creator of a name, the first. So a second, different library is refused: engines would be
    built and run with the first one, and their manifests would name the second.

    Args:
        trt: the module.
        logger: as `make_logger` returns it.
        path: the library.
        sha256: its hash, where a certain one is wanted.

    Raises:
        PluginError: as `check_library` says.
        EngineError: as `check_library` says, if TensorRT cannot load it, or another one is loaded in this process.
    """
    registry = trt.get_plugin_registry()
    before, mapped = has_creator(registry), _is_mapped(path)
    library = check_library(trt, path, sha256)
    ours = _loaded.get(trt.__name__)
    if before and ours is not None and ours.sha256 == library.sha256:
        # As after an earlier build in this process: TensorRT refuses to load the same plugins twice.
        return library
    if before and (ours is not None or not mapped):
        other = "another one" if ours is None else f"{ours.path}, sha256 {ours.sha256[:12]}…,"
        raise EngineError(
            f"this process has loaded a plugin library already, {other} and TensorRT keeps the first; use {path} "
            f"(sha256 {library.sha256[:12]}…) in a process of its own"
        )
    try:
        handle = registry.load_library(str(path))
    except Exception as error:  # pybind11 passes on whatever the library throws
        raise EngineError(f"TensorRT cannot load the plugin {path}: {error}") from error
    if handle is None or not has_creator(registry):
        raise EngineError(
            f"the plugin {path} brought no creator of {SELECTIVE_SCAN_2D} ({last_error(logger)}); look at it with "
            f"`{command('quartermap', 'plugin', 'check', path)}`"
        )
    _loaded[trt.__name__] = library
    return library


def has_creator(registry: Any) -> bool:
    """Whether TensorRT's registry knows our plugin."""
    return any(
        (creator.name, creator.plugin_namespace) == (SELECTIVE_SCAN_2D, DOMAIN)
        for creator in registry.all_creators
    )


def _is_mapped(path: Path) -> bool:
    """Whether this very file is loaded in this process already, as by `enable_cuda_kernels` or LD_PRELOAD.

    It then registered its creator by itself, and loading it by the registry is no conflict.
    """
    if not hasattr(os, "RTLD_NOLOAD") or not Path(path).is_file():
        return False
    try:
        ctypes.CDLL(str(Path(path).resolve()), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    return True
