"""What a report of a defect needs: versions, devices, runtimes, native libraries, compilers, the environment.

Nothing that is missing or broken is an error here: it is what the report is about. Nothing is loaded that using the
package would not load, and torch is not imported; providers of ONNX Runtime and native libraries are tried in processes
of their own. Where not even the command line starts, because a package that it needs is broken, `python -m
quartermap_deploy.doctor` still prints the report: it needs the standard library alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quartermap_deploy import __version__
from quartermap_deploy.gpu import find_gpu
from quartermap_deploy.machine import all_cores, instruction_sets, memory, processor, usable_cores
from quartermap_deploy.native import apart
from quartermap_deploy.native.build import find_nvcc
from quartermap_deploy.native.cpu_build import CPU_COMPILERS, built_folder
from quartermap_deploy.plain_text import printable_json
from quartermap_deploy.private_folders import check_private, own_folder

PACKAGES = re.compile(
    r"(torch|onnx|tensorrt|nvidia-|polygraphy|triton|mamba|numpy|safetensors|pillow|jsonschema|rich|scikit-learn|scipy"
    r"|aiohttp|grpcio|protobuf|jinja2|matplotlib|cryptography|pyyaml|quartermap)",
    re.IGNORECASE,
)
"""How the names begin of the packages whose versions matter."""
VARIABLES = re.compile(
    r"QUARTERMAP_|XDG_(CACHE|DATA)_HOME$|C(XX|C)$|CUDA|NVIDIA_|TENSORRT|TRT_|ORT_|(OMP|OPENBLAS|MKL)_NUM_THREADS$"
    r"|(OMP|MKL|KMP|GOMP)_|LD_(LIBRARY_PATH|PRELOAD)$|DYLD_|PYTHON(PATH|HOME)$|(VIRTUAL_ENV|CONDA_PREFIX)$"
)
"""How the names begin of the environment variables that matter."""
_OWN = re.compile(r"quartermap[-_]deploy", re.IGNORECASE)
PROBE_LIMIT = 60.0
"""Seconds that a provider may take to run a tiny model."""
REMOTE = {"AzureExecutionProvider"}
"""Providers that send models elsewhere, and are not tried."""
SECRET = re.compile(r"PASS|SECRET|TOKEN|CREDENTIAL|PRIVATE|KEY")
"""What is in the names of those whose values are nobody's business."""


def examine() -> dict[str, Any]:
    """Return all of it, as plain values for JSON; in the place of what could not be found out stands the reason."""
    return {
        "quartermap_deploy": {"version": __version__, "folder": str(Path(__file__).resolve().parent)},
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "executable": sys.executable,
        },
        "packages": _asked(_packages),
        "machine": _machine(),
        "onnxruntime": _asked(_onnxruntime),
        "native": {
            **{kind: apart.examine(kind) for kind in apart.LOOKED_FOR},
            "plugins": _asked(_plugins),
        },
        "compilers": _compilers(),
        "environment": {
            name: "(set, not shown)" if SECRET.search(name) else value
            for name, value in sorted(os.environ.items())
            if VARIABLES.match(name)
        },
        "folders": {
            "cache": _folder(lambda: own_folder("cache")),
            "CPU libraries": _folder(built_folder),
            "plugins": _folder(lambda: own_folder("plugins")),
        },
    }


def versions() -> dict[str, str]:
    """The versions of this package, of Python, and of the packages that the results depend on."""
    found = _asked(_packages)
    named = {name: text for name, text in found.items() if name != "error" and not _OWN.match(name)}
    return {"quartermap-deploy": __version__, "python": platform.python_version(), **named}


def _asked(question: Callable[[], Any]) -> Any:
    """Return an answer, or why there is none."""
    try:
        return question()
    except Exception as error:  # whatever a broken installation raises is the answer
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def _packages() -> dict[str, str]:
    found = {}
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"]
        # What was half removed has no name.
        if name and PACKAGES.match(name):
            found[name] = package.version
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _machine() -> dict[str, Any]:
    gpu = _asked(find_gpu)
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "processor": _asked(processor),
        "cores": {"usable": _asked(usable_cores), "all": _asked(all_cores)},
        "instruction_sets": _asked(instruction_sets),
        "memory": _asked(memory),
        "gpu": gpu
        if gpu is None or isinstance(gpu, dict)
        else {"name": gpu.name, "compute_capability": gpu.compute_capability},
    }


def _onnxruntime() -> dict[str, Any]:
    from quartermap_deploy.targets.execution import Provider
    from quartermap_deploy.targets.onnxruntime import packages, probing

    module = importlib.import_module("onnxruntime")
    names = list(module.get_available_providers())
    return {
        "version": module.__version__,
        **packages.describe(),
        "providers": names,
        # One after the other: what shares a device could fail by the other.
        "probes": [
            probing.probe(Provider(name), PROBE_LIMIT).to_dict() for name in names if name not in REMOTE
        ],
    }


def _plugins() -> list[dict[str, Any]]:
    from quartermap_deploy.native.store import stored_libraries

    return [library.to_dict() for library in stored_libraries()]


def _compilers() -> dict[str, str | None]:
    """Return the first line that each compiler prints about its version; None for one that is not there."""
    names = dict.fromkeys(("CXX", *CPU_COMPILERS, "nvcc", "cmake"))
    found: dict[str, str | None] = {}
    for name in names:
        command = os.environ.get("CXX", "") if name == "CXX" else name
        program = shutil.which(command.split()[0]) if command.strip() else None
        if name == "nvcc":
            program = find_nvcc()
        if name != "CXX" or command:
            found[name] = None if program is None else f"{_version_line(program)} ({program})"
    return found


def _version_line(program: str) -> str:
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, errors="replace", timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot be run: {error}"
    lines = [line.strip() for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    # nvcc has its name and its copyright first.
    return next((line for line in lines if re.search(r"\d+\.\d+", line)), "says no version")


def _folder(find: Callable[[], Path | None]) -> dict[str, Any]:
    """Describe a folder of this user's: its path, whether it is there, and what is wrong with it, or None."""
    path = _asked(find)
    if path is None or isinstance(path, dict):
        return {"path": None, "exists": False, "problem": None if path is None else path["error"]}
    exists = os.path.lexists(path)
    problem = _asked(lambda: check_private(path)) if exists else None
    return {"path": str(path), "exists": exists, "problem": None if problem is None else problem["error"]}


if __name__ == "__main__":
    print(printable_json(examine()))
