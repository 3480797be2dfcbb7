"""Results of other commands, as their --json prints them, and the sections that are made of them.

A result is known by its keys, so that a file may have any name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from quartermap_deploy.cli.common import ranges
from quartermap_deploy.errors import ReportError
from quartermap_deploy.report.parts import Heading, Part, Section, Table, left_out

Values: TypeAlias = Mapping[str, Any]

KINDS: dict[str, frozenset[str]] = {
    "eval": frozenset({"top1", "per_class", "target", "source"}),
    "bench": frozenset({"bundles", "threads", "repeats"}),
    "validate": frozenset({"cases", "tolerance", "passed", "target"}),
}
"""For each command, keys that its result has, and those of no other command all have."""


@dataclass(frozen=True)
class Result:
    """What a command printed.

    Attributes:
        kind: the command.
        name: the file's name, without its ending.
        values: what is in it.
    """

    kind: str
    name: str
    values: Values


def read_results(paths: Sequence[Path]) -> list[Result]:
    """Read the results of commands.

    Raises:
        ReportError: if a file cannot be read, or is no result of a command that is known here.
    """
    return [result for path in paths for result in _read(path)]


def _read(path: Path) -> list[Result]:
    """One result, or several in a list."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReportError(f"the results {path} cannot be read as JSON: {error}") from error
    entries = content if isinstance(content, list) else [content]
    return [Result(_kind(path, entry), path.stem, entry) for entry in entries]


def _kind(path: Path, entry: object) -> str:
    if isinstance(entry, dict):
        for kind, keys in KINDS.items():
            if keys <= entry.keys():
                return kind
    found = ", ".join(list(entry)[:6]) if isinstance(entry, dict) else type(entry).__name__
    raise ReportError(
        f"{path} holds no result that a report knows (found {found or 'nothing'}); expected what one of "
        f"{', '.join(KINDS)} prints with --json"
    )


def result_sections(results: Sequence[Result]) -> list[Section]:
    """Return the sections of accuracy, speed, ablations and the choice of blocks."""
    return [_section(name, title, commands, results) for name, title, commands in SECTIONS]


def _section(name: str, title: str, commands: Sequence[str], results: Sequence[Result]) -> Section:
    found = {kind: [result for result in results if result.kind == kind] for kind in commands}
    parts: list[Part] = []
    for kind, entries in found.items():
        if entries:
            parts += _written(kind, entries)
    if not parts:
        wanted = " or ".join(f"quartermap {command} --json" for command in commands)
        return left_out(name, title, f"Left out: no result of {wanted} was given with --results.")
    return Section(name, title, tuple(parts))


def _written(kind: str, entries: list[Result]) -> list[Part]:
    try:
        return _PARTS[kind](entries)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        names = ", ".join(sorted({entry.name for entry in entries}))
        raise ReportError(
            f"the results of {kind} in {names} are not what this version of quartermap {kind} prints "
            f"({type(error).__name__}: {error}); run it again"
        ) from error


# Accuracy ---------------------------------------------------------------------------------------------------------


def accuracy_table(
    entries: Sequence[Values], caption: str = "accuracy, one run of eval in each line"
) -> Table:
    """Return the accuracies of several runs of `quartermap eval`."""
    rows = tuple(
        (
            entry["source"],
            entry["target"],
            plan_name(entry["plan"]),
            entry["data"]["name"],
            f"{entry['images']:,}",
            f"{entry['top1']:.2%}",
            None if entry["top5"] is None else f"{entry['top5']:.2%}",
            f"{entry['images_per_second']:,.0f}",
            len(entry["broken"]) or "",
        )
        for entry in entries
    )
    columns = (
        "model",
        "target",
        "plan",
        "data",
        ">images",
        ">top-1",
        ">top-5",
        ">images/s",
        ">broken",
    )
    return Table(caption, columns, rows)


def _accuracy_parts(results: Sequence[Result]) -> list[Part]:
    entries = [result.values for result in results]
    return [accuracy_table(entries), *_class_tables(entries)]


def _class_tables(entries: Sequence[Values]) -> list[Part]:
    """For each data set, the accuracy of every class, one column for each run."""
    parts: list[Part] = []
    for data in dict.fromkeys(entry["data"]["name"] for entry in entries):
        runs = [entry for entry in entries if entry["data"]["name"] == data]
        classes = dict.fromkeys(name for entry in runs for name in entry["per_class"])
        rows = tuple((name, *(_class_share(entry, name) for entry in runs)) for name in classes)
        columns = ("class", *(f">{entry['source']}, {entry['target']}" for entry in runs))
        parts.append(Table(f"accuracy of every class of {data}", columns, rows, folded=True))
    return parts


def _class_share(entry: Values, name: str) -> str | None:
    counts = entry["per_class"].get(name)
    return f"{counts['correct'] / counts['images']:.1%}" if counts else None


# Speed --------------------------------------------------------------------------------------------------------------


def bench_table(entry: Values) -> Table:
    """Return the times of one run of `quartermap bench`."""
    return Table(
        f"batch {entry['batch']}, {entry['threads']} threads, {entry['repeats']} rounds in turns; speed is relative to "
        "the first line, with the quartiles of the rounds",
        ("bundle", ">median ms", ">fastest", ">slowest", ">images/s", ">speed"),
        tuple(
            (
                bundle["name"],
                f"{bundle['median_ms']:.2f}",
                f"{bundle['minimum_ms']:.2f}",
                f"{bundle['maximum_ms']:.2f}",
                f"{bundle['images_per_second']:,.1f}",
                speed_text(bundle["speed"], bundle["speed_quartiles"]),
            )
            for bundle in entry["bundles"]
        ),
    )


def speed_text(speed: float, quartiles: Sequence[float] | None) -> str:
    """Return 1.10 × [1.08 – 1.12]."""
    spread = f" [{quartiles[0]:.2f} – {quartiles[1]:.2f}]" if quartiles else ""
    return f"{speed:.2f} ×{spread}"


def _bench_parts(results: Sequence[Result]) -> list[Part]:
    return [
        part for result in results for part in (Heading(f"{result.name}: bench"), bench_table(result.values))
    ]


# Shared -------------------------------------------------------------------------------------------------------------


def plan_name(plan: Values | None) -> str:
    """Return a plan in few words: k = 3, or its blocks; what is not the default is added."""
    if plan is None:
        return "no pruning"
    blocks = plan.get("blocks")
    words = [f"blocks {ranges(blocks)}" if blocks else f"k = {plan['every']}"]
    if not blocks and list(plan["exclude_stages"]) != [1]:
        words.append(f"without stages {ranges(plan['exclude_stages']) or 'none'}")
    if (plan["stride"], plan["keep"]) != (2, 1):
        words.append(f"keep {plan['keep']} of {plan['stride']}")
    if plan["upsample"] != "nearest":
        words.append(str(plan["upsample"]))
    return ", ".join(words)


_PARTS: dict[str, Callable[[Sequence[Result]], list[Part]]] = {
    "eval": _accuracy_parts,
    "bench": _bench_parts,
}

SECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("accuracy", "Accuracy", ("eval",)),
    ("speed", "Speed", ("bench",)),
)
"""Anchor, title and commands of each section."""
