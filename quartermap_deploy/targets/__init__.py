"""Targets: what a bundle is built for and run by, behind one small interface.

A target is a module with `check(recipe)`, which refuses early what it cannot do; `build(model_path, directory)`, which
writes what it needs beside the portable model and returns its entry for the manifest; and `open(bundle_path, entry)`,
which returns a session.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.errors import UnknownNameError

_MODULES = {"onnxruntime": "onnxruntime_cpu"}
DEFAULT = "onnxruntime"


class Session(Protocol):
    """A model that is ready to run."""

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits, (batch, num_classes), for images (batch, channels, height, width)."""
        ...


class Target(Protocol):
    """The functions of a target module."""

    def build(self, model_path: Path, directory: Path) -> dict[str, Any]:
        """Write what the target needs into `directory` and return its entry for the manifest."""
        ...

    def open(self, bundle_path: Path, entry: dict[str, Any]) -> Session:
        """Return a session for a bundle that was built for this target."""
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
