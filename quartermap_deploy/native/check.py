"""Checking a plugin library: what it is, whether it is ours, and whether a TensorRT of this machine takes it."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quartermap_deploy.native.contract import CONTRACT, differences
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.native.library import describe, load, served_tensorrt

MODULES = ("tensorrt", "tensorrt_rtx")
"""Python modules whose plugin registry can load the library, in the order in which they are tried."""

WITHOUT_REGISTRY = "no TensorRT is installed here (pip install tensorrt-cu13), so no registry was asked"


@dataclass(frozen=True)
class Creator:
    """A creator that a registry lists.

    Attributes:
        name: of the plugin.
        version: of the plugin.
        namespace: of the plugin.
        fields: name and type of each of its fields.
    """

    name: str
    version: str
    namespace: str
    fields: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PluginReport:
    """What was found in a library.

    Attributes:
        path: the library.
        contract: what it says about itself, without `build`.
        build: which TensorRT it serves, the version of CUDA, and the GPU architectures; None for what is not there.
        registry: module and version of the TensorRT that loaded it, or None if none did.
        creators: what that TensorRT's registry lists from the library.
        note: why no registry was asked, or None.
    """

    path: str
    contract: dict[str, Any]
    build: dict[str, Any]
    registry: str | None
    creators: tuple[Creator, ...]
    note: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def check_plugin(path: Path) -> PluginReport:
    """Load a library, compare its contract with this package's, and let a TensorRT registry load it if there is one.

    Args:
        path: the library that `quartermap plugin build` made.

    Raises:
        PluginError: if it is missing, damaged, of another release, or refused by TensorRT.
    """
    library = load(path)
    found = describe(library, path)
    build = found.pop("build", {})
    if wrong := differences(found):
        raise PluginError(
            f"the plugin library {path} does not fit this release of quartermap-deploy; build it anew: "
            "quartermap plugin build\n  " + "\n  ".join(wrong)
        )
    if not served_tensorrt(build, path):
        note = "kernels only: this library holds no TensorRT plugin"
        return PluginReport(str(path), found, build, None, (), note)
    if not (hasattr(library, "getCreators") and hasattr(library, "setLoggerFinder")):
        raise PluginError(
            f"the plugin library {path} does not export getCreators and setLoggerFinder; build it anew"
        )
    module = _first_module()
    if module is None:
        return PluginReport(str(path), found, build, None, (), WITHOUT_REGISTRY)
    creators = _registered(module, path)
    _compare(creators, path)
    return PluginReport(str(path), found, build, f"{module.__name__} {module.__version__}", creators, None)


def _first_module() -> Any | None:
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except Exception:  # tensorrt raises what it likes where its libraries are missing
            continue
        # A folder of that name somewhere on the path is a module without anything in it.
        if hasattr(module, "get_plugin_registry"):
            return module
    return None


def _registered(module: Any, path: Path) -> tuple[Creator, ...]:
    """Let a registry load the library and return what it then lists, and unload it again."""
    logger = _recording_logger(module)
    # The first object made gives its logger to the registry. TensorRT for RTX needs no driver for that; asking TensorRT
    # without one may end the process. Where there is no logger, it writes to standard error.
    runtime = module.Runtime(logger) if module.__name__ == "tensorrt_rtx" else None
    registry = module.get_plugin_registry()
    handle = registry.load_library(str(path.resolve()))
    try:
        if handle is None:
            raise PluginError(
                f"{module.__name__} {module.__version__} refuses the plugin library {path}: "
                f"{'; '.join(logger.errors) or 'no reason given'}"
            )
        creators = tuple(
            Creator(
                creator.name,
                creator.plugin_version,
                creator.plugin_namespace,
                tuple((field.name, field.type.name) for field in creator.field_names),
            )
            for creator in registry.all_creators
            if creator.plugin_namespace == CONTRACT.namespace
        )
    finally:
        if handle is not None:
            registry.deregister_library(handle)
        del runtime
    return creators


def _recording_logger(module: Any) -> Any:
    class Recorder(module.ILogger):  # type: ignore[misc]
        """Keeps errors; without a GPU there is one about the driver that says nothing about the library."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            serious = severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR)
            if serious and "CUDA driver" not in message:
                self.errors.append(message)

    return Recorder()


def _compare(creators: tuple[Creator, ...], path: Path) -> None:
    expected = Creator(
        CONTRACT.name,
        CONTRACT.version,
        CONTRACT.namespace,
        tuple((field.name, field.type) for field in CONTRACT.fields),
    )
    if expected not in creators:
        raise PluginError(
            f"the plugin library {path} registers {list(creators) or 'nothing'}; expected {expected}"
        )
