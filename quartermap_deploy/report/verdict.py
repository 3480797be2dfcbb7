"""The verdict on bundles, with which a report opens: is each proved, what does it gain, and what does it cost?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quartermap_deploy.bench import scatter
from quartermap_deploy.report.parts import Note
from quartermap_deploy.tables.words import error_text, worst_error

if TYPE_CHECKING:
    from quartermap_deploy.bundle import Bundle
    from quartermap_deploy.report.results import Result


def verdicts(bundles: Mapping[str, Bundle], results: Sequence[Result]) -> tuple[Note, ...]:
    """Return a paragraph for each bundle, by its name in the report."""
    return tuple(
        Note(
            f"{name}: {_proved(bundle)} {_gain(name, bundle, results)} {_cost(name, bundle, results)}".rstrip()
        )
        for name, bundle in bundles.items()
    )


def _proved(bundle: Bundle) -> str:
    report = bundle.report
    if not report["passed"]:
        return "NOT PROVED: it departs from the PyTorch model."
    error, tolerance = error_text(worst_error(report)), report["tolerance"]["relative"]
    return (
        f"proved: it computes what the PyTorch model computes, to {error} of the largest value (tolerance "
        f"{tolerance:.0e})."
    )


def _gain(name: str, bundle: Bundle, results: Sequence[Result]) -> str:
    totals = bundle.manifest["totals"]
    flops, tokens = (1 - totals[key] / totals[f"{key}_unpruned"] for key in ("flops", "tokens"))
    if bundle.manifest["plan"] is None:
        text = "Nothing is pruned"
    else:
        text = f"It gains: {flops:.1%} fewer operations, {tokens:.1%} fewer positions scanned"
    for result in results:
        if result.kind == "bench":
            text += _speed(name, result.values["bundles"])
    return f"{text}."


def _speed(name: str, entries: Sequence[Mapping[str, Any]]) -> str:
    first = entries[0]
    own = next((entry for entry in entries[1:] if entry["name"] == name), None)
    if own is None:
        return ""
    if (unknown := scatter(own)) is not None:
        return f"; against {first['name']}, rounds too scattered to tell {unknown}"
    return f"; {own['speed']:.2f} times as fast as {first['name']} on {own['target']}"


def _cost(name: str, bundle: Bundle, results: Sequence[Result]) -> str:
    runs = [result.values for result in results if result.kind == "eval"]
    own = next((run for run in runs if run["source"] == name), None)
    if own is None:
        if bundle.manifest["plan"] is None:
            return ""
        return "What it costs in accuracy is not known here: give what `quartermap eval --json` prints with --results."
    top = f"top-1 {own['top1']:.2%} on {own['images']:,} images of {own['data']['name']}"
    same = (run for run in runs if run["plan"] is None and run["data"]["name"] == own["data"]["name"])
    unpruned = next(same, None)
    if own["plan"] is None:
        return f"It has {top}."
    if unpruned is None:
        return f"It has {top}; what that costs, an eval of the unpruned model would tell."
    lost = unpruned["top1"] - own["top1"]
    return f"It costs: {top}, {100 * lost:.2f} points less than the {unpruned['top1']:.2%} unpruned."
