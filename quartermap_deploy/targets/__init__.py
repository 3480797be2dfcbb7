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

from quartermap_deploy.errors import UnknownNameError
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.targets.session import Session

if TYPE_CHECKING:
    from quartermap_deploy.targets.tensorrt.options import EngineOptions

__all__ = ["DEFAULT", "ENGINE_TARGETS", "Session", "Target", "Wanted", "list_targets", "load_target"]

ENGINE_TARGETS = ("tensorrt", "tensorrt-rtx")
"""Targets that need an engine of their own beside the portable model."""
_MODULES = {"onnxruntime": "onnxruntime_cpu", "tensorrt": "tensorrt.target", "tensorrt-rtx": "tensorrt.rtx"}
DEFAULT = "onnxruntime"


class Wanted(Protocol):
    """What a target asks of a recipe."""

    @property
    def engine(self) -> EngineOptions:
        """How engines are built."""

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
