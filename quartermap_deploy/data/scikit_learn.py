"""The data that come with scikit-learn, read without it: importing it takes most of a second."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def packaged(kind: str, name: str) -> Path:
    """Return a file of scikit-learn's data sets, which is there wherever it is installed.

    Args:
        kind: the folder: "data" or "images".
        name: of the file.

    Raises:
        ModuleNotFoundError: if scikit-learn is not installed.
    """
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    return Path(found.submodule_search_locations[0]) / "datasets" / kind / name
