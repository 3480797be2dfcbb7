"""Loading a built library, and reading what it says about itself."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

from quartermap_deploy.plugin.errors import PluginError

CONTRACT_FUNCTION = "quartermap_plugin_contract"


def load(path: Path) -> ctypes.CDLL:
    """Load a library into this process.

    Raises:
        PluginError: if it is missing, damaged, or built for another machine.
    """
    if not path.is_file():
        raise PluginError(
            f"there is no plugin library {path}; build one: quartermap plugin build --output {path.parent}"
        )
    try:
        # By its absolute path: the loader searches a bare name elsewhere.
        return ctypes.CDLL(str(path.resolve()))
    except OSError as error:
        raise PluginError(
            f"the plugin library {path} cannot be loaded: {error}. It is damaged or was built for another machine; "
            "build it here: quartermap plugin build"
        ) from error


def describe(library: ctypes.CDLL, path: Path) -> dict[str, Any]:
    """Return the contract and the build of a loaded library.

    Args:
        library: as `load` returned it.
        path: for the message.

    Raises:
        PluginError: if it is no library of this project.
    """
    try:
        function = library[CONTRACT_FUNCTION]
    except AttributeError:
        raise PluginError(
            f"{path} is a library, but no plugin of quartermap-deploy: it has no function {CONTRACT_FUNCTION}"
        ) from None
    function.restype = ctypes.c_char_p
    try:
        found = json.loads(function())
    except (ValueError, TypeError) as error:
        raise PluginError(f"the plugin library {path} does not describe itself: {error}") from error
    if not isinstance(found, dict):
        raise PluginError(
            f"the plugin library {path} does not describe itself: expected an object, got {found!r}"
        )
    return found
