"""Imports under `public_code`: what is missing is supplied, and what is loaded is looked through for scans.

Two finders stand in `sys.meta_path`. The last one supplies the modules that nothing else finds. The first one asks the
others, and wraps the loaders of code that may hold scans, so that the module is reported as soon as it is loaded; and
where the real module is there but cannot be loaded (an extension built for another torch, a helper that wants a
package for language models), the stand-in takes its place.

Triton is another matter: torch asks for it, too, and would use what it finds. So it is no module of `sys.modules`:
`__import__` hands it to the code that may have it, as told by the name of the module that asks.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from quartermap_deploy.sources.public_code import fake_triton, stand_ins

FOREIGN = frozenset(
    {
        "accelerate",
        "einops",
        "functorch",
        "huggingface_hub",
        "numpy",
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "onnxscript",
        "quartermap_deploy",
        "safetensors",
        "scipy",
        "sympy",
        "timm",
        "torch",
        "torchaudio",
        "torchgen",
        "torchvision",
        "transformers",
        "triton",
        "xformers",
    }
)
"""Packages that hold no scan of a model, and must not believe that there is a Triton."""


def foreign(name: str) -> bool:
    """Return whether a module, by its name, is of a library and not of a model."""
    root = name.split(".")[0]
    return root in FOREIGN or root in sys.stdlib_module_names


def installed(origin: str | None) -> bool:
    """Return whether a module's file was installed by a package manager, beside other libraries."""
    return origin is not None and ("site-packages" in origin or "dist-packages" in origin)


def may_hold_scans(name: str, origin: str | None) -> bool:
    """Return whether a module that is imported may define a scan: a model's own code, or a package we know."""
    if stand_ins.of_scan_package(name):
        return True
    return not foreign(name) and not installed(origin)


_stood_in: set[str] = set()
"""The names of modules that were supplied since they were last forgotten: `sys.modules` holds thousands of others."""


class _StandInLoader(Loader):
    """Fills a module with what stands in for it."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        found = stand_ins.contents(module.__name__)
        assert found is not None
        vars(module).update(found)
        _stood_in.add(module.__name__)


def stand_in(name: str) -> ModuleType:
    """Return a module with what stands in for the module of that name, without importing it."""
    module = ModuleType(name)
    vars(module).update(stand_ins.contents(name) or {})
    return module


def is_stand_in(module: ModuleType | None) -> bool:
    """Return whether a module of `sys.modules` is one that we supplied."""
    return isinstance(getattr(getattr(module, "__spec__", None), "loader", None), _StandInLoader)


class _WatchedLoader(Loader):
    """Loads as another loader does, and reports the module; stands in where that fails."""

    def __init__(
        self, own: Any, loaded: Callable[[ModuleType], None], supplied: Callable[[str], None]
    ) -> None:
        self._own, self._loaded, self._supplied = own, loaded, supplied

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        # Nobody but importlib, which goes on with the loader that the spec has, shall see this one.
        spec.loader = self._own
        try:
            created: ModuleType | None = self._own.create_module(spec)
        except ImportError:
            if stand_ins.contents(spec.name) is None:
                raise
            self._supplied(spec.name)
            spec.loader = _StandInLoader()
            return None
        spec.loader = self
        return created

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self._own
        try:
            self._own.exec_module(module)
        except ImportError:
            if stand_ins.contents(spec.name) is None:
                raise
            self._supplied(spec.name)
            spec.loader = module.__loader__ = _StandInLoader()
            spec.loader.exec_module(module)
        self._loaded(module)


class Supplier(MetaPathFinder):
    """Finds the modules that nothing else finds, and that something stands in for."""

    def __init__(self, supplied: Callable[[str], None]) -> None:
        self._supplied = supplied

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a stand-in."""
        if stand_ins.contents(name) is None:
            return None
        self._supplied(name)
        return ModuleSpec(name, _StandInLoader(), is_package=not stand_ins.is_extension(name))


class Watcher(MetaPathFinder):
    """Wraps the loaders of what may hold scans; finds nothing itself."""

    def __init__(self, loaded: Callable[[ModuleType], None], supplied: Callable[[str], None]) -> None:
        self._loaded, self._supplied = loaded, supplied

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the others find, with its loader wrapped."""
        if foreign(name):
            return None
        for finder in list(sys.meta_path):
            if isinstance(finder, (Watcher, Supplier)) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                break
        else:
            return None
        if hasattr(spec.loader, "exec_module") and may_hold_scans(name, spec.origin):
            spec.loader = _WatchedLoader(spec.loader, self._loaded, self._supplied)
        return spec


def triton_importer(original: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return an `__import__` that knows a Triton where public code asks for it, or None where there is a real one."""
    if "triton" in sys.modules or importlib.util.find_spec("triton") is not None:
        return None

    def import_(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if level == 0 and (name == "triton" or name.startswith("triton.")):
            asking = str((globals or {}).get("__name__", ""))
            if not foreign(asking):
                return fake_triton.module(name if fromlist else "triton")
        return original(name, globals, locals, fromlist, level)

    return import_


def forget_stand_ins() -> None:
    """Take the modules that we supplied out of `sys.modules`, and off the packages that hold them."""
    while _stood_in:
        name = _stood_in.pop()
        module = sys.modules.get(name)
        if not is_stand_in(module):
            continue
        del sys.modules[name]
        parent, _, child = name.rpartition(".")
        holder = sys.modules.get(parent)
        if holder is not None and vars(holder).get(child) is module:
            delattr(holder, child)
