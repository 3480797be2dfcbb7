"""Faults that are listed in files: those of C++, by the text that they replace, and those that change nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mutants.faults import Fault, fault_at

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def native_faults(table: Path, repository: Path) -> dict[str, list[Fault]]:
    """Return the faults of a table by the file that they stand in.

    Raises:
        SystemExit: if a text is not in its file exactly once; the table has to follow the code.
    """
    found: dict[str, list[Fault]] = {}
    with table.open("rb") as file:
        entries = tomllib.load(file)["fault"]
    for entry in entries:
        source = (repository / entry["file"]).read_bytes()
        before = entry["before"].encode()
        if source.count(before) != 1:
            raise SystemExit(
                f"{table.name}: {entry['before']!r} stands {source.count(before)} times in {entry['file']}, "
                "and has to stand there once; change the entry as the code has changed"
            )
        start = source.index(before)
        fault = fault_at(
            entry["file"], source, start, start + len(before), entry["after"], entry["what"], function=""
        )
        found.setdefault(entry["file"], []).append(fault)
    return found


class Equivalents:
    """Faults that change nothing that anyone could see, each with its reason."""

    def __init__(self, table: Path) -> None:
        with table.open("rb") as file:
            entries = tomllib.load(file).get("fault", [])
        self._reasons = {
            (entry["file"], entry["line"], entry["becomes"]): entry["reason"] for entry in entries
        }

    @property
    def files(self) -> set[str]:
        """Return the files that have such faults."""
        return {file for file, _, _ in self._reasons}

    def reason(self, fault: Fault) -> str | None:
        """Return why a fault changes nothing, or None if it does change something."""
        return self._reasons.get((fault.file, fault.line, fault.becomes))

    def outdated(self, file: str, faults: Sequence[Fault]) -> list[str]:
        """Return the lines of a file that are listed, and no longer are a fault of it."""
        there = {(fault.line, fault.becomes) for fault in faults}
        return [
            line for name, line, becomes in self._reasons if name == file and (line, becomes) not in there
        ]
