"""Packages of npm that tests use; `make node` fetches them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import REPOSITORY

WANTED = REPOSITORY / "tests" / "npm"
FOLDER = REPOSITORY / "build" / "node" / "node_modules"


def npm_package(name: str) -> Path:
    """Return the folder of a package; the test skips where it is not there."""
    path = FOLDER / name
    if not (path / "package.json").is_file():
        pytest.skip(f"the npm package {name} is not there; `make node` fetches it, where npm is installed")
    return path
