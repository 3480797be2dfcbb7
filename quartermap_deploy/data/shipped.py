"""Where the files lie that come with the package and are no code."""

from __future__ import annotations

from pathlib import Path


def models_directory() -> Path:
    """Return the directory with the model cards, the weights beside them, and the names of classes in `labels/`.

    It is `models/` of the repository, and `quartermap_deploy/_models` of an installed wheel.
    """
    package = Path(__file__).resolve().parents[1]
    installed = package / "_models"
    return installed if installed.is_dir() else package.parent / "models"
