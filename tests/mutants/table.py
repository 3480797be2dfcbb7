"""What came of the planted faults: a table for people, and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mutants.faults import Fault
from mutants.guards import Area
from mutants.results import Result


@dataclass(frozen=True)
class Judged:
    """A fault and what became of it.

    Attributes:
        area: that its file belongs to.
        fault: the fault.
        result: what the tests said; None for one that changes nothing.
        reason: why it changes nothing, or "".
    """

    area: Area
    fault: Fault
    result: Result | None
    reason: str = ""

    @property
    def verdict(self) -> str:
        """Return "caught", "survived", "not covered" or "equivalent"."""
        return "equivalent" if self.result is None else self.result.verdict

    def to_dict(self) -> dict[str, Any]:
        """Return it for a JSON file."""
        result = self.result
        return {
            "area": self.area.name,
            "file": self.fault.file,
            "line": self.fault.number,
            "kind": self.fault.kind,
            "before": self.fault.line,
            "after": self.fault.becomes,
            "verdict": self.verdict,
            "how": result.how if result else "",
            "test": result.test if result else "",
            "seconds": result.seconds if result else 0.0,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Count:
    """How many faults of each verdict; the share leaves out those that change nothing."""

    caught: int
    survived: int
    not_covered: int
    equivalent: int
    by_time: int

    @classmethod
    def of(cls, judged: Sequence[Judged]) -> Count:
        """Count verdicts."""
        verdicts = [each.verdict for each in judged]
        return cls(
            verdicts.count("caught"),
            verdicts.count("survived"),
            verdicts.count("not covered"),
            verdicts.count("equivalent"),
            sum(each.result is not None and each.result.how == "time" for each in judged),
        )

    @property
    def planted(self) -> int:
        """How many could be caught."""
        return self.caught + self.survived + self.not_covered

    @property
    def share(self) -> float:
        """The share that was caught; NaN if none was planted."""
        return self.caught / self.planted if self.planted else float("nan")

    def cells(self) -> list[str]:
        """Return the cells of a row."""
        numbers = [self.caught, self.survived, self.not_covered, self.equivalent, self.by_time]
        share = f"{self.share:.0%}" if self.planted else "–"
        return [*(str(number) if number else "·" for number in numbers), share]


def show(judged: Sequence[Judged], console: Console) -> None:
    """Print the table, and below it each fault that was not caught."""
    table = Table(box=None, pad_edge=False)
    table.add_column("file")
    for name in ("caught", "survived", "not covered", "equivalent", "by time", "share"):
        table.add_column(name, justify="right")
    for area in dict.fromkeys(each.area for each in judged):
        own = [each for each in judged if each.area == area]
        count = Count.of(own)
        bound = "" if not count.planted or count.share >= area.least else f", but {area.least:.0%} are wanted"
        table.add_row(f"[bold]{area.name}[/bold]{bound}", *(f"[bold]{cell}[/bold]" for cell in count.cells()))
        for file in dict.fromkeys(each.fault.file for each in own):
            table.add_row(f"  {file}", *Count.of([each for each in own if each.fault.file == file]).cells())
    console.print(table)
    for verdict, title in (("survived", "Survived"), ("not covered", "In functions that no test calls")):
        left = [each.fault for each in judged if each.verdict == verdict]
        if left:
            console.print(f"\n[bold]{title}[/bold]")
        for fault in left:
            where = f"{fault.file}:{fault.number}"
            console.print(
                f"{where} ({fault.kind})\n  - {escape(fault.line)}\n  + {escape(fault.becomes)}",
                soft_wrap=True,
            )


def failing(judged: Sequence[Judged]) -> list[str]:
    """Return the names of the areas of which fewer faults were caught than have to be."""
    found = []
    for area in dict.fromkeys(each.area for each in judged):
        count = Count.of([each for each in judged if each.area == area])
        if count.planted and count.share < area.least:
            found.append(area.name)
    return found
