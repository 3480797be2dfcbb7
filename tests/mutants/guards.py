"""Which tests guard which function, found by running them once with every function reporting that it was called."""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutants import forked, inside
from mutants.faults import Fault, functions, is_docstring
from mutants.tree import Tree

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SEEN = f"""
import atexit, os, tempfile
NAMES = set()
add = NAMES.add
def _leave():
    if folder := os.environ.get({inside.SEEN_VARIABLE!r}):
        handle, path = tempfile.mkstemp(dir=folder)
        os.write(handle, "\\n".join(sorted(NAMES)).encode())
        os.close(handle)
atexit.register(_leave)
"""
"""The module that functions report to. Processes that a test starts leave what they saw in a folder when they end."""
OTHERS = 0.25
"""The share of the time for tests of the same files that do not call the function: they may look at what a test before
them computed, and kept."""


@dataclass(frozen=True)
class Area:
    """Files that are measured together.

    Attributes:
        name: of the area.
        least: the share of its faults that must be caught.
        sources: patterns of its files, from the repository.
        tests: test files that may guard them.
        late: parts of the names of tests that run after all others, as they build something of their own first.
    """

    name: str
    least: float
    sources: tuple[str, ...]
    tests: tuple[str, ...]
    late: tuple[str, ...] = ()

    def files(self, repository: Path) -> list[str]:
        """Return the area's files, by name."""
        found = {path for pattern in self.sources for path in repository.glob(pattern) if path.is_file()}
        return sorted(path.relative_to(repository).as_posix() for path in found)

    def is_late(self, guard: Guard) -> bool:
        """Whether a test runs after all others."""
        return any(part in guard.name for part in self.late)


def read_areas(path: Path) -> list[Area]:
    """Read the table of areas."""
    with path.open("rb") as file:
        found = tomllib.load(file)["area"]
    return [
        Area(
            each["name"],
            each["least"],
            tuple(each["sources"]),
            tuple(f"tests/{name}" for name in each["tests"]),
            tuple(each.get("late", ())),
        )
        for each in found
    ]


def matches(file: str, patterns: Sequence[str]) -> bool:
    """Whether a file, or the end of its path, is meant by one of the patterns, or there are none."""
    return not patterns or any(
        fnmatch.fnmatch(file, form) for pattern in patterns for form in (pattern, f"*/{pattern}")
    )


@dataclass(frozen=True)
class Guard:
    """A test that passes without a fault.

    Attributes:
        name: by pytest.
        file: that it stands in.
        seconds: of processors that it takes, with what it sets up, which a test before it may have done.
        wall: seconds that it takes by the clock.
        functions: that it runs, as file::function.
    """

    name: str
    file: str
    seconds: float
    wall: float
    functions: frozenset[str]


class Guards:
    """The tests of the areas, measured once for each test file, and again when it or the functions have changed."""

    def __init__(self, repository: Path, build: Path, areas: Sequence[Area]) -> None:
        self._repository, self._build, self._areas = repository, build, areas
        self._tree: Tree | None = None
        self._found: dict[str, list[Guard] | None] = {}

    def of_file(self, file: str, measure: bool = True) -> list[Guard] | None:
        """Return the tests of a test file; None if they are not measured, and are not to be."""
        if self._found.get(file) is None:
            self._found[file] = self._read(file) or (self._measure(file) if measure else None)
        return self._found[file]

    def _path(self, file: str) -> Path:
        return self._build / "guards" / f"{Path(file).stem}.json"

    def _key(self, file: str) -> str:
        """Return what a measurement belongs to: the test file, and the names of the functions that it may guard."""
        parts = [(self._repository / file).read_bytes()]
        for area in self._areas:
            if file in area.tests:
                for source in area.files(self._repository):
                    parts.append(f"{source}: {_names(self._repository / source)}".encode())
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    def _read(self, file: str) -> list[Guard] | None:
        try:
            found = json.loads(self._path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return _guards(file, found) if found["key"] == self._key(file) else None

    def _measure(self, file: str) -> list[Guard]:
        if self._tree is None:
            wanted = {name for area in self._areas for name in area.files(self._repository)}
            self._tree = Tree(
                self._repository,
                self._build / "measured",
                lambda name, source: reporting(name, source) if name in wanted else source,
                {"mutants_seen.py": SEEN.encode()},
            )
        print(f"measuring {file}", end=" ", file=sys.stderr, flush=True)
        run = forked.run_tests(self._tree.path, self._build / "scratch", [file], measure=True)
        self._tree.mend()
        if "tests" not in run.data:
            raise SystemExit(f"{file} did not end ({run.outcome}):\n{run.data['log'][-3000:]}")
        print(f"{len(run.data['tests'])} tests, {run.seconds:.0f} s", file=sys.stderr)
        found = {"key": self._key(file), "imported": run.data["imported"], "tests": run.data["tests"]}
        self._path(file).parent.mkdir(parents=True, exist_ok=True)
        self._path(file).write_text(json.dumps(found), encoding="utf-8")
        return _guards(file, found)


def _guards(file: str, found: dict[str, Any]) -> list[Guard]:
    imported = frozenset(found["imported"])
    return [
        Guard(name, file, test["seconds"], test["wall"], imported | frozenset(test["functions"]))
        for name, test in found["tests"].items()
    ]


def _names(path: Path) -> list[str]:
    if path.suffix != ".py":
        return []
    return sorted({name for name, _ in functions(ast.parse(path.read_bytes()))})


def reporting(name: str, source: bytes) -> bytes:
    """Return a Python file whose functions report that they were called."""
    if not name.endswith(".py"):
        return source
    tree = ast.parse(source)
    for function, node in functions(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            place = 1 if is_docstring(node.body[0]) else 0
            # A file that is run by itself, apart from this copy, reports nothing.
            call = f"__import__('mutants_seen').add({f'{name}::{function}'!r})"
            node.body[place:place] = ast.parse(f"try:\n    {call}\nexcept ImportError:\n    pass").body
    return ast.unparse(ast.fix_missing_locations(tree)).encode()


def chosen(fault: Fault, guards: Sequence[Guard], seconds: float) -> list[Guard]:
    """Return the tests to run on a fault, first those that are likely to catch it soon.

    Args:
        fault: the fault.
        guards: of all its area's test files.
        seconds: about how long they may take together; on a fault of C++ all run, as no function of it reports.
    """
    if not fault.file.endswith(".py"):
        return [guard for _, group in _in_order(guards) for guard in group]
    own = f"{fault.file}::{fault.function}"
    if fault.function:
        calling = {guard.name for guard in guards if own in guard.functions}
    else:  # a value of the module: whoever runs any function of it may need it
        calling = {guard.name for guard in guards if any(name.startswith(own) for name in guard.functions)}
    files = _in_order([guard for guard in guards if guard.name in calling])
    slowest = _slowest(guards)
    begun: set[str] = set()
    found = list(
        _within([guard for _, group in files for guard in group], seconds * (1 - OTHERS), slowest, begun)
    )
    rest = [
        guard
        for file, _ in files
        for guard in sorted(guards, key=lambda guard: guard.seconds)
        if guard.file == file and guard.name not in calling
    ]
    return [*found, *_within(rest, seconds * OTHERS, slowest, begun)]


def _in_order(guards: Sequence[Guard]) -> list[tuple[str, list[Guard]]]:
    """Group tests by file, those files first whose slowest test costs least, and in them the cheapest tests."""
    groups: dict[str, list[Guard]] = {}
    for guard in sorted(guards, key=lambda guard: guard.seconds):
        groups.setdefault(guard.file, []).append(guard)
    slowest = _slowest(guards)
    return sorted(groups.items(), key=lambda item: slowest[item[0]])


def _within(
    guards: Sequence[Guard], seconds: float, slowest: Mapping[str, float], begun: set[str]
) -> Iterator[Guard]:
    """Return tests that fit into a time, one at least.

    The first of a file may have to set up or compute what the others then share, so it counts as the file's slowest.
    """
    for guard in guards:
        cost = guard.seconds if guard.file in begun else slowest[guard.file]
        if cost > seconds and begun:
            continue
        seconds -= cost
        begun.add(guard.file)
        yield guard


def _slowest(guards: Sequence[Guard]) -> dict[str, float]:
    """Return the seconds of each file's slowest test."""
    found: dict[str, float] = {}
    for guard in guards:
        found[guard.file] = max(found.get(guard.file, 0.0), guard.seconds)
    return found


def expected_seconds(guards: Sequence[Guard]) -> float:
    """Return about how long tests take together by the clock, at the most."""
    slowest: dict[str, float] = {}
    for guard in guards:
        slowest[guard.file] = max(slowest.get(guard.file, 0.0), guard.wall)
    return sum(guard.wall for guard in guards) + sum(slowest.values())
