"""What is known of faults already, in a file that grows by a line for each."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mutants.faults import Fault


@dataclass(frozen=True)
class Result:
    """What tests made of one fault.

    Attributes:
        key: of the fault.
        verdict: "caught", "survived" or "not covered".
        how: of a caught one: "failed", "crashed" or "time".
        test: that caught it, or "".
        tests: how many were to run.
        seconds: that it took.
        budget: seconds of a processor that the tests had.
        source: hash of the file without the fault.
        guards: hash of what the verdict rests on, see `Results.known`.
    """

    key: str
    verdict: str
    how: str = ""
    test: str = ""
    tests: int = 0
    seconds: float = 0.0
    budget: float = 0.0
    source: str = ""
    guards: str = ""


class Results:
    """Results of earlier runs, and where new ones are kept.

    A fault that was caught stays caught while its file and the function that caught it are unchanged; any other is
    tried again as soon as one of the area's test files has changed.
    """

    def __init__(self, repository: Path, path: Path) -> None:
        self._repository, self._path = repository, path
        self._found: dict[str, Result] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                result = Result(**json.loads(line))
                self._found[result.key] = result

    def known(self, fault: Fault, tests: tuple[str, ...], budget: float = 0.0) -> Result | None:
        """Return what is known of a fault and still holds; one that survived less time than now is tried again."""
        result = self._found.get(fault.key)
        if result is None or result.source != self._hash(fault.file):
            return None
        if result.verdict == "survived" and result.budget < budget:
            return None
        return result if result.guards == self._guards(result, tests) else None

    def earlier(self, fault: Fault) -> Result | None:
        """Return what was found the last time, whether it holds or not."""
        return self._found.get(fault.key)

    def add(self, fault: Fault, result: Result, tests: tuple[str, ...]) -> Result:
        """Keep a result."""
        hashes = {"source": self._hash(fault.file), "guards": self._guards(result, tests)}
        result = Result(**{**asdict(result), **hashes})
        self._found[result.key] = result
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        return result

    def _guards(self, result: Result, tests: tuple[str, ...]) -> str:
        if result.verdict == "caught" and result.test:
            return self._of_test(result.test)
        return hashlib.sha256("".join(map(self._hash, tests)).encode()).hexdigest()

    @functools.cache  # noqa: B019 - one object for each run
    def _hash(self, file: str) -> str:
        path = self._repository / file
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    @functools.cache  # noqa: B019
    def _of_test(self, name: str) -> str:
        """Return the hash of a test function's text; of the whole file where it is none."""
        file, *parts = name.split("[")[0].split("::")
        path = self._repository / file
        source = path.read_text(encoding="utf-8") if path.is_file() else ""
        found = [source]
        if parts:
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef) and node.name == parts[-1]:
                    found = [
                        ast.get_source_segment(source, part) or "" for part in (*node.decorator_list, node)
                    ]
        return hashlib.sha256("\0".join(found).encode()).hexdigest()
