"""Results of other commands, as their --json prints them, and the sections that are made of them.

A result is known by its keys, so that a file may have any name. Tables are those that the commands themselves show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from quartermap_deploy.errors import ReportError
from quartermap_deploy.reading import ReadingError, read_json
from quartermap_deploy.report.parts import Heading, Note, Part, Section, Table, from_rich, left_out
from quartermap_deploy.report.plots import ablation_plot, comparison_plot, search_plots
from quartermap_deploy.tables import ablation, comparison, search, timing
from quartermap_deploy.tables.words import ranges

Values: TypeAlias = Mapping[str, Any]

KINDS: dict[str, frozenset[str]] = {
    "eval": frozenset({"top1", "per_class", "target", "source"}),
    "compare": frozenset({"variants", "timings", "repeats"}),
    "ablate": frozenset({"groups", "every", "repeats"}),
    "tune": frozenset({"front", "fixed", "sensitivity", "tried"}),
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
        content = read_json(path)
    except FileNotFoundError:
        raise ReportError(f"there is no file {path} with results") from None
    except ReadingError as error:
        raise ReportError(f"the results {path} cannot be read as JSON: {error}") from error
    entries = content if isinstance(content, list) else [content]
    return [Result(kind_of(path, entry), path.stem, entry) for entry in entries]


def kind_of(path: Path, entry: object) -> str:
    """Return which command printed a result.

    Args:
        path: its file, for the message.
        entry: what is in it.

    Raises:
        ReportError: if none that is known here did.
    """
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
    entries: Sequence[Values], caption: str = "one run of quartermap eval in each line"
) -> Table:
    """Return the accuracies of several runs of `quartermap eval`.

    Where one of them was told otherwise than its bundle or card says how images are prepared or what its classes are, a
    column says in what.
    """
    otherwise = [", ".join(entry.get("overridden", ())) for entry in entries]
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
            len(entry["broken"]),
            *((said or None,) if any(otherwise) else ()),
        )
        for entry, said in zip(entries, otherwise, strict=True)
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
        *(("set otherwise",) if any(otherwise) else ()),
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


# Speed, ablations, choice of blocks ---------------------------------------------------------------------------------


def _bench_parts(results: Sequence[Result]) -> list[Part]:
    return [
        part
        for result in results
        for part in (
            Heading(f"{result.name}: quartermap bench"),
            from_rich(timing.result_table(result.values)),
        )
    ]


def _compare_parts(results: Sequence[Result]) -> list[Part]:
    parts: list[Part] = []
    for result in results:
        parts += [
            Heading(f"{result.name}: quartermap compare"),
            *shown(comparison.tables(result.values)),
            *comparison_plot(result.values),
            Note(measured_on(result.values)),
        ]
    return parts


def _ablate_parts(results: Sequence[Result]) -> list[Part]:
    parts: list[Part] = []
    for result in results:
        parts += [
            Heading(f"{result.name}: quartermap ablate"),
            *ablation_plot(result.values),
            *shown(ablation.tables(result.values)),
            Note(measured_on(result.values)),
        ]
    return parts


def _tune_parts(results: Sequence[Result]) -> list[Part]:
    parts: list[Part] = []
    for result in results:
        values = result.values
        parts += [
            Heading(f"{result.name}: quartermap tune"),
            Note(search_text(values)),
            *search_plots(values),
            from_rich(search.fixed_table(values)),
            from_rich(search.front_table(values), folded=True),
            from_rich(search.sensitivity_table(values), folded=True),
        ]
    return parts


def search_text(values: Values) -> str:
    """Return in words what `quartermap tune` looked for, on which images, and what it chose."""
    goal, chosen = values["goal"], values["chosen"]
    wanted = (
        f"the fastest plan with a drop of at most {goal['budget']:.2%}"
        if goal["budget"] is not None
        else f"the plan of at least {goal['speedup']:.2f} times the speed with the smallest drop"
    )
    images = (
        f"calibrated on {values['calibration']['images']} images of {values['calibration']['name']}, verified on "
        f"{values['verification']['images']} of {values['verification']['name']}"
    )
    all_of_them = "all that there are" if values["exhaustive"] else "a guided search"
    plans = f"{len(values['tried'])} plans were run, {all_of_them}"
    found = "Nothing reaches it."
    if chosen is not None:
        found = (
            f"Chosen: blocks {ranges(chosen['blocks'])} at stride {chosen['stride']}, {chosen['speed']:.3f} times as "
            f"fast by {values['measure']} ({values['measure_note']}), agreement with the unpruned model "
            f"{chosen['verification']['agreement']:.2%} on the images to verify on."
        )
    return f"Wanted for {values['model']}: {wanted}, by {values['judged_by']}; {images}. {plans}. {found}"


def measured_on(values: Values) -> str:
    """Return in words on which machine and when a result was measured."""
    machine = values["machine"]
    where = ", ".join(str(machine[name]) for name in ("processor", "gpu", "system") if machine.get(name))
    versions = ", ".join(
        f"{name} {values['versions'][name]}" for name in _NAMED if name in values["versions"]
    )
    return f"Measured on {where}, {machine['cores']} cores, {values['created'][:10]}, with {versions}."


_NAMED = ("onnxruntime", "torch")
"""Packages that decide how fast a model is."""


def shown(items: Sequence[object]) -> list[Part]:
    """Return what a command shows, its tables and its lines."""
    parts: list[Part] = []
    for item in items:
        if isinstance(item, str):
            parts += [Note(item)] if item else []
        else:
            parts.append(from_rich(item))  # type: ignore[arg-type]
    return parts


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
    "compare": _compare_parts,
    "bench": _bench_parts,
    "ablate": _ablate_parts,
    "tune": _tune_parts,
}

SECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("accuracy", "Accuracy", ("eval",)),
    ("speed", "Speed", ("compare", "bench")),
    ("ablations", "Ablations", ("ablate",)),
    ("choice", "Choice of blocks", ("tune",)),
)
"""Anchor, title and commands of each section."""
