"""The names that TensorRT's Python module has, release by release: read from the real module, and kept in a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

API_FILE = Path(__file__).parent / "data" / "tensorrt_api.json"
RELEASES = ("10.7", "11.4")
"""The releases in the file: the oldest that is supported, and the newest that is public."""
CLASSES = (
    "Builder",
    "EngineInspector",
    "IBuilderConfig",
    "ICudaEngine",
    "IDebugListener",
    "IExecutionContext",
    "IHostMemory",
    "ILayer",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IOutputAllocator",
    "IPluginCreatorV3One",
    "IPluginRegistry",
    "IProgressMonitor",
    "IRuntimeCache",
    "IRuntimeConfig",
    "ITensor",
    "ITimingCache",
    "OnnxParser",
    "ParserError",
    "Runtime",
)
"""Those that this package and polygraphy's runner use; TensorRT for RTX alone has some of them."""
ENUMS = (
    "BuilderFlag",
    "ComputeCapability",
    "DataType",
    "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel",
    "LayerInformationFormat",
    "LayerType",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "ProfilingVerbosity",
    "Severity",
    "TensorFormat",
    "TensorIOMode",
)
FUNCTIONS = ("get_plugin_registry", "init_libnvinfer_plugins")


def public_api(release: str) -> dict[str, Any]:
    """Return the names of a release, as the file has them."""
    found: dict[str, Any] = json.loads(API_FILE.read_text())[release]
    return found


def api_of_module(module: ModuleType) -> dict[str, Any]:
    """Return the names of a real module, as its docstrings and properties tell them.

    Classes with their methods (argument names; "?" behind those that may be left out; several lists for overloads) and
    properties (r, w or rw), enumerations with their members in their order, functions of the module.
    """
    kinds = {name: getattr(module, name) for name in CLASSES if hasattr(module, name)}
    scopes = (module, module.ILogger)
    enums = {
        name: list(kind.__members__)
        for name in ENUMS
        if (kind := next((getattr(scope, name) for scope in scopes if hasattr(scope, name)), None))
    }
    functions = [name for name in FUNCTIONS if hasattr(module, name)]
    return {
        "classes": {name: _members(kind) for name, kind in kinds.items()},
        "enums": enums,
        "functions": functions,
    }


def _members(kind: type) -> dict[str, Any]:
    members = {key: value for key, value in vars(kind).items() if key == "__init__" or key[0] != "_"}
    properties = {key: value for key, value in members.items() if isinstance(value, property)}
    methods = {key: _overloads(key, value) for key, value in members.items() if key not in properties}
    return {
        "methods": {key: overloads for key, overloads in methods.items() if overloads},
        "properties": {
            key: ("r" if value.fget else "") + ("w" if value.fset else "")
            for key, value in properties.items()
        },
    }


def _overloads(name: str, method: Any) -> list[list[str]]:
    found = []
    for arguments in re.findall(
        rf"^(?:\d+\. )?{name}\((self: .*?)\) -> ", method.__doc__ or "", re.MULTILINE
    ):
        if "*args" in arguments:
            continue
        # Types have commas and defaults have brackets of their own; names stand before ": ".
        names = re.findall(r", (\w+): [^=]*?(=)?(?=, \w+: |$| =)( =)?", arguments)
        found.append([name + ("?" if default or other else "") for name, default, other in names])
    return found
