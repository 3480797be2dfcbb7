"""Which native libraries this installation would take, and why not others; loaded in a process of its own.

Loading a library runs code of it, and one that is broken in a way that its file does not show may end the process. So
`examine` asks another one. It needs the standard library alone, as `quartermap_deploy.doctor` does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quartermap_deploy.native.cpu_library import find_cpu_library
from quartermap_deploy.native.cuda_library import find_cuda_library
from quartermap_deploy.processes import ending

TIME_LIMIT = 60.0
"""Seconds for looking at one kind of library."""
PLUGIN_VARIABLE = "QUARTERMAP_PLUGIN"
"""As `targets.tensorrt.plugin` has it, which stands above this floor."""
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import main; main(sys.argv[2])"
)


def examine(kind: str) -> dict[str, Any]:
    """Return what was found of the libraries of a kind, as plain values for JSON, or under "error" why nobody knows.

    Args:
        kind: a name of `LOOKED_FOR`.
    """
    flags = ["-I", *(["-S"] if sys.flags.no_site else [])]
    command = [sys.executable, *flags, "-c", _CHILD.format(module=__name__), json.dumps(sys.path), kind]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIME_LIMIT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": f"no process found out about it: {error}"}
    lines = done.stdout.splitlines()
    try:
        found = json.loads(lines[-1]) if done.returncode == 0 and lines else None
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    said = done.stderr.strip().splitlines()
    return {
        "error": f"a library ended the process that loaded it ({ending(done.returncode)}); {_named()}"
        + (f": {said[-1]}" if said else "")
    }


def _named() -> str:
    """The variables that name libraries, for whoever looks for a broken one."""
    names = [name for name in sorted(os.environ) if name.startswith(("QUARTERMAP_NATIVE", PLUGIN_VARIABLE))]
    return f"it may be the one of {', '.join(names)}" if names else "build it anew"


# In the process of its own -------------------------------------------------------------------------------------------


def main(kind: str) -> None:
    """Print what was found as one line of JSON."""
    # What libraries print goes elsewhere.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        print(json.dumps(LOOKED_FOR[kind](), default=str), file=answers, flush=True)


def _plugin() -> dict[str, Any]:
    """The plugin library that the environment names, looked at; nothing where it names none."""
    from quartermap_deploy.native.contract import differences
    from quartermap_deploy.native.errors import PluginError
    from quartermap_deploy.native.library import describe, load

    named = os.environ.get(PLUGIN_VARIABLE, "")
    if not named:
        return {"library": None, "summary": f"{PLUGIN_VARIABLE} names none"}
    if not os.path.isabs(named):
        return {"library": None, "summary": f"{PLUGIN_VARIABLE} is {named!r}; expected a path from / on"}
    try:
        contract = describe(load(Path(named)), Path(named))
    except (PluginError, OSError) as error:
        return {"library": None, "summary": f"refused: {' '.join(str(error).split())}"}
    build: Mapping[str, Any] = contract.pop("build", None) or {}
    if wrong := differences(contract):
        return {"library": None, "summary": f"refused: it does not fit this release: {'; '.join(wrong)}"}
    return {"library": {"path": named, "build": build}, "summary": f"{named} ({PLUGIN_VARIABLE})"}


LOOKED_FOR: Mapping[str, Callable[[], dict[str, Any]]] = {
    "cpu": lambda: find_cpu_library().to_dict(),
    "cuda": lambda: find_cuda_library().to_dict(),
    "plugin": _plugin,
}
"""Kinds of libraries, and what looks for them."""
