"""The plugin library of the target `tensorrt`: found, checked before it is trusted, and loaded once."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartermap_deploy.errors import EngineError
from quartermap_deploy.files import file_hash
from quartermap_deploy.lowering.operator import DOMAIN, SELECTIVE_SCAN_2D
from quartermap_deploy.plain_text import command
from quartermap_deploy.targets.tensorrt.flavour import version_numbers
from quartermap_deploy.targets.tensorrt.objects import last_error

PLUGIN_VARIABLE = "QUARTERMAP_PLUGIN"
_BUILD = "build it with `quartermap plugin build`"


@dataclass(frozen=True)
class PluginLibrary:
    """A library that holds the plugin for a GPU.

    Attributes:
        path: where it lies.
        sha256: its hash.
        tensorrt: the version of TensorRT whose headers it was built with.
        cuda: the version of CUDA that it was built with.
    """

    path: Path
    sha256: str
    tensorrt: str
    cuda: str

    def to_dict(self) -> dict[str, str]:
        """What a manifest says about it: enough to know it again, and to build it again. Not where it lay."""
        return {
            "file": self.path.name,
            "sha256": self.sha256,
            "tensorrt": self.tensorrt,
            "cuda": self.cuda,
        }


_loaded: dict[str, PluginLibrary] = {}
"""For each TensorRT module, the library that its registry has got from us. A registry lives as long as the process."""


def find_library(named: Path | None = None, expected: Mapping[str, Any] | None = None) -> Path:
    """Find the plugin library.

    One that is named is taken as it is. Otherwise it is the one of the environment variable QUARTERMAP_PLUGIN, or the
    one in ./plugin; where an engine asks for a certain one, that of the two which is it.

    Args:
        named: what the caller named.
        expected: what the manifest of an engine says about the library that it was built with.

    Raises:
        EngineError: if there is none.
    """
    from quartermap_deploy.native.build import DEFAULT_OUTPUT, PLUGIN_LIBRARY

    if named is not None:
        candidates = [Path(named)]
    else:
        variable, built_here = os.environ.get(PLUGIN_VARIABLE), DEFAULT_OUTPUT / PLUGIN_LIBRARY
        candidates = [Path(variable)] if variable else []
        candidates += [built_here] if built_here.is_file() else []
    if not candidates:
        what = "" if expected is None else f", for this engine {_described(expected)}"
        raise EngineError(
            f"the target tensorrt needs the SelectiveScan2D plugin{what}; {_BUILD}, and name the library with "
            f"--plugin, in the option plugin, or in the environment variable {PLUGIN_VARIABLE}"
        )
    if not candidates[0].is_file():
        raise EngineError(f"there is no plugin library {candidates[0]}; {_BUILD}")
    wanted = None if expected is None else expected.get("sha256")
    fitting = (path for path in candidates if wanted is not None and file_hash(path) == wanted)
    return next(fitting, candidates[0]).absolute()


def wrong_library(path: Path, expected: Mapping[str, Any]) -> str | None:
    """Why a library is not the one that an engine was built with, or None if it is.

    Args:
        path: the library at hand.
        expected: what the engine's manifest entry says about its plugin.
    """
    if file_hash(path) == expected["sha256"]:
        return None
    return f"it was built with the plugin {_described(expected)}, found another library {path}"


def _described(expected: Mapping[str, Any]) -> str:
    built = f", built for TensorRT {expected['tensorrt']}" if expected.get("tensorrt") else ""
    return f"{expected['file']}, sha256 {expected['sha256'][:12]}…{built}"


def check_library(trt: Any, path: Path) -> PluginLibrary:
    """Check that a file is our plugin, for a GPU and for this TensorRT.

    TensorRT itself maps whatever it is given: a file that was cut short ends the process, and a library for another
    major version has its functions at other places than TensorRT calls.

    Args:
        trt: the module.
        path: the library.

    Raises:
        PluginError: if it is missing, damaged, no library of ours, or of another release.
        EngineError: if it is ours but no plugin for a GPU, or for another TensorRT.
    """
    from quartermap_deploy.native import library as libraries
    from quartermap_deploy.native.contract import differences
    from quartermap_deploy.native.errors import PluginError

    found = libraries.describe(libraries.load(path), path)
    build = found.pop("build", None) or {}
    if wrong := differences(found):
        raise PluginError(
            f"the plugin library {path} does not fit this release of quartermap-deploy; {_BUILD}\n  "
            + "\n  ".join(wrong)
        )
    tensorrt, cuda = build.get("tensorrt"), build.get("cuda")
    if tensorrt is None:
        raise EngineError(f"{path} holds the kernels alone, without the plugin for TensorRT; {_BUILD}")
    if cuda is None:
        raise EngineError(f"{path} emulates the kernels on the CPU, which is for tests; {_BUILD}")
    if version_numbers(tensorrt)[0] != version_numbers(trt.__version__)[0]:
        raise EngineError(
            f"the plugin library {path} was built with the headers of TensorRT {tensorrt}, found TensorRT "
            f"{trt.__version__}; {_BUILD} and headers of the same major version"
        )
    return PluginLibrary(Path(path), file_hash(path), tensorrt, cuda)


def load_plugin(trt: Any, logger: Any, path: Path) -> PluginLibrary:
    """Load the plugin library into TensorRT's registry, unless it is there already.

    The registry keeps one creator of a name, the first. So a second, different library is refused: engines would be
    built and run with the first one, and their manifests would name the second.

    Args:
        trt: the module.
        logger: as `make_logger` returns it.
        path: the library.

    Raises:
        PluginError: as `check_library` says.
        EngineError: as `check_library` says, if TensorRT cannot load it, or another one is loaded in this process.
    """
    registry = trt.get_plugin_registry()
    before, mapped = has_creator(registry), _is_mapped(path)
    library = check_library(trt, path)
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
