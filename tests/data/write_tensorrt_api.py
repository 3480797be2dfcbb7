"""Write down which names TensorRT's Python module has, as its own binding sources say it.

    git clone --bare https://github.com/NVIDIA/TensorRT
    python tests/data/write_tensorrt_api.py TensorRT.git v10.7.0 v11.1 > tests/data/tensorrt_api.json

Read from `python/src`, release by release: classes with their methods (argument names; "?" behind those that may be
left out; several lists for overloads) and properties (r, w or rw), enumerations with their members in their order,
functions of the module. Only the classes that this package and polygraphy's runner use are kept.
`tensorrt_stand_in.py` is held to it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

SOURCES = (
    "python/src/infer/pyFoundationalTypes.cpp",
    "python/src/infer/pyCore.cpp",
    "python/src/infer/pyGraph.cpp",
    "python/src/infer/pyPlugin.cpp",
    "python/src/parsers/pyOnnx.cpp",
)
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
    "ITensor",
    "ITimingCache",
    "OnnxParser",
    "ParserError",
    "Runtime",
)
ENUMS = (
    "BuilderFlag",
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

_TOKEN = re.compile(
    r"""
    py::(?P<kind>class_|enum_)\s*<                      # a binding begins; its template arguments follow
  | (?P<module>\bm)\s*\.\s*def\s*\(                     # a function of the module
  | (?P<variable>\b[A-Za-z_]\w*)\s*(?=\.\s*def\w*\s*\() # members of a class that was begun before
  | \.\s*(?P<member>def\w*|value)\s*\(                  # a member
    """,
    re.VERBOSE,
)
_PROPERTIES = {
    "def_property": "rw",
    "def_readwrite": "rw",
    "def_property_readonly": "r",
    "def_readonly": "r",
    "def_property_readonly_static": "r",
}


def read_api(text: str) -> dict[str, Any]:
    """Return classes, enumerations and functions of binding sources."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/|^#[^\n]*$", "", text, flags=re.DOTALL | re.MULTILINE)
    classes: dict[str, dict[str, Any]] = {}
    enums: dict[str, list[str]] = {}
    functions: dict[str, list[list[str]]] = {}
    variables: dict[str, str] = {}
    current = ""
    place = 0
    while found := _TOKEN.search(text, place):
        place = found.end()
        if found["kind"]:
            place = _closing(text, place - 1, "<>")
            # Either `py::class_<X>(m, "Name"` or `py::class_<X> name{m, "Name"`.
            begun = re.compile(r'\s*(\w+)?\s*[({]\s*\w+\s*,\s*"(\w+)"').match(text, place)
            if begun is None:
                continue
            current, place = begun[2], begun.end()
            if begun[1]:
                variables[begun[1]] = current
            if found["kind"] == "class_":
                classes.setdefault(current, {"methods": {}, "properties": {}})
            else:
                enums.setdefault(current, [])
            continue
        if found["variable"]:
            current = variables.get(found["variable"], current)
            continue
        arguments = list(_arguments(text, place - 1))
        place = place if found["member"] else _closing(text, place - 1, "()")
        name = re.match(r'"(\w+)"', arguments[0]) if arguments else None
        if found["module"]:
            if name:
                functions.setdefault(name[1], []).append(_names(arguments))
        elif found["member"] == "value":
            if name and current in enums:
                enums[current].append(name[1])
        elif current in classes:
            _add_member(classes[current], found["member"], name, arguments)
    return {
        "classes": {name: classes[name] for name in CLASSES if name in classes},
        "enums": {name: enums[name] for name in ENUMS if name in enums},
        "functions": {name: functions[name] for name in FUNCTIONS if name in functions},
    }


def _add_member(entry: dict[str, Any], kind: str, name: re.Match[str] | None, arguments: list[str]) -> None:
    if name is None:
        if arguments and arguments[0].startswith("py::init"):
            entry["methods"].setdefault("__init__", []).append(_names(arguments))
    elif kind in _PROPERTIES:
        access = _PROPERTIES[kind]
        entry["properties"][name[1]] = "w" if arguments[1].strip() == "nullptr" else access
    elif not name[1].startswith("__"):
        entry["methods"].setdefault(name[1], []).append(_names(arguments))


def _names(arguments: list[str]) -> list[str]:
    """The named arguments of a `def`."""
    found = []
    for argument in arguments[1:]:
        named = re.match(r'(?:"(\w+)"_a|py::arg\("(\w+)"\))\s*(=)?', argument)
        if named:
            found.append((named[1] or named[2]) + ("?" if named[3] else ""))
    return found


def _arguments(text: str, place: int) -> Iterator[str]:
    """The arguments between the bracket at a place and its partner, split at their commas."""
    end, start, depth = _closing(text, place, "()"), place + 1, 0
    quoted = False
    for index in range(place + 1, end - 1):
        character = text[index]
        if character == '"' and text[index - 1] != "\\":
            quoted = not quoted
        elif not quoted and character in "([{":
            depth += 1
        elif not quoted and character in ")]}":
            depth -= 1
        elif not quoted and character == "," and depth == 0:
            yield text[start:index].strip()
            start = index + 1
    yield text[start : end - 1].strip()


def _closing(text: str, place: int, brackets: str) -> int:
    """The place behind the partner of the bracket at a place."""
    depth, quoted = 0, False
    for index in range(place, len(text)):
        if text[index] == '"' and text[index - 1] != "\\":
            quoted = not quoted
        if not quoted and text[index] in brackets:
            depth += 1 if text[index] == brackets[0] else -1
            if depth == 0:
                return index + 1
    raise ValueError(f"no partner of the bracket at {text[place : place + 60]!r}")


def main() -> None:
    """Write the names of the releases that are named, as JSON."""
    repository, *tags = sys.argv[1:]
    result = {}
    for tag in tags:
        sources = [
            subprocess.run(
                ["git", "-C", repository, "show", f"{tag}:{source}"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for source in SOURCES
        ]
        result[tag.removeprefix("v")] = read_api("\n".join(sources))
    print("{")
    for last_release, (release, api) in _with_last(result):
        print(f" {json.dumps(release)}: {{")
        for last_kind, (kind, entries) in _with_last(api):
            print(f"  {json.dumps(kind)}: {{")
            for last, (name, entry) in _with_last(entries):
                print(f"   {json.dumps(name)}: {json.dumps(entry, sort_keys=True)}{'' if last else ','}")
            print(f"  }}{'' if last_kind else ','}")
        print(f" }}{'' if last_release else ','}")
    print("}")


def _with_last(entries: dict[str, Any]) -> list[tuple[bool, tuple[str, Any]]]:
    """Entries, each with whether it is the last: JSON with one name on a line, so that releases can be compared."""
    return [(index == len(entries) - 1, item) for index, item in enumerate(entries.items())]


if __name__ == "__main__":
    main()
