"""Targets: what a bundle is built for and run by, behind one small interface.

A target is a module with `check`, which refuses early what cannot be built here; `build`, which writes what it needs
beside the portable model and returns its entry for the manifest; `cannot_run`, which says why that cannot be run here;
and `open`, which returns a session. `PRECISIONS` names the element types that it takes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quartermap_deploy.errors import InputError, UnknownNameError
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.targets.execution import ON_CPU, Execution
from quartermap_deploy.targets.session import Session

if TYPE_CHECKING:
    from quartermap_deploy.targets.tensorrt.options import EngineOptions

__all__ = [
    "DEFAULT",
    "ENGINE_TARGETS",
    "Session",
    "Target",
    "Wanted",
    "list_targets",
    "load_target",
    "open_session",
]

ENGINE_TARGETS = ("tensorrt", "tensorrt-rtx")
"""Targets that need an engine of their own beside the portable model."""
_MODULES = {
    "onnxruntime": "onnxruntime.target",
    "tensorrt": "tensorrt.target",
    "tensorrt-rtx": "tensorrt.rtx",
}
DEFAULT = "onnxruntime"


class Wanted(Protocol):
    """What a target asks of a recipe."""

    @property
    def engine(self) -> EngineOptions:
        """How engines are built."""

    @property
    def execution(self) -> Execution:
        """The providers of ONNX Runtime."""

    @property
    def targets(self) -> tuple[str, ...]:
        """All that are built."""


class Target(Protocol):
    """The functions of a target module."""

    PRECISIONS: tuple[str, ...]

    def check(self, recipe: Wanted) -> None:
        """Refuse, before any work, what cannot be built here."""
        ...

    def build(
        self,
        model_path: Path,
        directory: Path,
        options: EngineOptions | None = None,
        *,
        examples: Sequence[Mapping[str, Sequence[int]]] = (),
        progress: Progress = SILENT,
    ) -> dict[str, Any]:
        """Write what the target needs into `directory` and return its entry for the manifest."""
        ...

    def cannot_run(self, entry: Mapping[str, Any]) -> str | None:
        """Why what was built, with this entry, cannot be run on this machine; None if nothing speaks against it."""
        ...

    def open(
        self,
        bundle_path: Path,
        entry: Mapping[str, Any],
        *,
        plugin: Path | None = None,
        native: bool | None = None,
        built_here: bool = False,
    ) -> Session:
        """Return a session for a bundle that was built for this target.

        Args:
            bundle_path: the bundle.
            entry: its manifest entry for the target.
            plugin: the plugin library, for a target that has one; None lets the target look for it.
            native: for `onnxruntime`, whether its native operator computes the scans; None where it is there and takes
                the model.
            built_here: this process has just built it, so that code which it carries is trusted.
        """
        ...


def list_targets() -> list[str]:
    """Names of the targets."""
    return sorted(_MODULES)


def load_target(name: str) -> Target:
    """Return a target's module.

    Raises:
        UnknownNameError: if there is no such target.
    """
    if name not in _MODULES:
        raise UnknownNameError.for_choice("target", name, _MODULES)
    module: Any = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return module  # type: ignore[no-any-return]


def open_session(
    name: str,
    bundle_path: Path,
    entry: Mapping[str, Any],
    *,
    plugin: Path | None = None,
    native: bool | None = None,
    execution: Execution = ON_CPU,
) -> Session:
    """Return a session for a bundle, by the target of a name; `Target.open` says what the others are.

    Args:
        name: of the target.
        bundle_path: the bundle.
        entry: its manifest entry for the target.
        plugin: the plugin library, for a target that has one.
        native: whether the native operator computes the scans, for `onnxruntime`.
        execution: the providers that run it, for `onnxruntime`.

    Raises:
        InputError: if another target is to run by providers, or by the native operator.
    """
    target: Any = load_target(name)
    if name == DEFAULT:
        return target.open(bundle_path, entry, native=native, execution=execution)  # type: ignore[no-any-return]
    refuse_providers(name, execution)
    return target.open(bundle_path, entry, plugin=plugin, native=native)  # type: ignore[no-any-return]


def refuse_providers(name: str, execution: Execution) -> None:
    """Check that a target which is not ONNX Runtime's is not asked to run by its providers.

    Raises:
        InputError: if it is.
    """
    if name != DEFAULT and not execution.on_cpu:
        raise InputError(
            f"devices and providers ({execution}) are ONNX Runtime's, and the target {name} takes none; leave them "
            f"out, or take the target {DEFAULT}"
        )
