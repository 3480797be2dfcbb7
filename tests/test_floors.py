"""The package's floors: whatever a file imports stands below it, and no circle of imports goes through any file.

Late imports and imports for types alone count too. A package's own `__init__` hands names on, and is left out where it
imports its own files; that of the whole package is left out altogether.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import quartermap_deploy

ROOT = Path(quartermap_deploy.__file__).parent
NAME = ROOT.name


def module_name(path: Path) -> str:
    parts = (NAME, *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(module: str) -> Iterator[str]:
    """The files that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{module} imports relative to itself"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def arrows() -> dict[str, set[str]]:
    found = {}
    for module, path in FILES.items():
        own = f"{module}." if path.name == "__init__.py" else None
        below = {name for name in imported(module) if name in FILES and name not in (module, NAME)}
        if module != NAME:
            found[module] = {name for name in below if own is None or not name.startswith(own)}
    return found


def room(module: str) -> str:
    """The file or folder right under the package that a module lies in."""
    return module.split(".")[1]


def rooms(files: Mapping[str, set[str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for module, below in files.items():
        found.setdefault(room(module), set()).update(
            room(name) for name in below if room(name) != room(module)
        )
    return found


@pytest.mark.parametrize("kind", ["files", "rooms"])
def test_nothing_imports_what_stands_above_it(kind: str) -> None:
    graph = arrows() if kind == "files" else rooms(arrows())
    assert len(graph) > 20
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        # Each imports the one before it.
        pytest.fail("a circle of imports: " + " <- ".join(error.args[1]))


def test_a_circle_is_found() -> None:
    graph = {
        "quartermap_deploy.a.x": {"quartermap_deploy.b.y"},
        "quartermap_deploy.b.z": {"quartermap_deploy.a.v"},
    }
    assert rooms(graph) == {"a": {"b"}, "b": {"a"}}
    with pytest.raises(CycleError):
        TopologicalSorter(rooms(graph)).prepare()
