"""The tables of `quartermap tune`, from its result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quartermap_deploy.tables.layout import table
from quartermap_deploy.tables.words import ranges

if TYPE_CHECKING:
    from rich.table import Table


def sensitivity_table(report: Mapping[str, Any]) -> Table:
    """Return what each block costs and saves when it alone is pruned."""
    return table(
        "one block pruned, on the images to calibrate on",
        ["block", ">stage", ">stride", ">saves", ">drop", ">agreement", ">divergence"],
        [
            (
                entry["block"],
                entry["stage"],
                entry["stride"],
                f"{entry['saving']:.2%}",
                f"{entry['drop']:.2%}",
                f"{entry['agreement']:.2%}",
                f"{float(entry['divergence']):.2g}",
            )
            for entry in report["sensitivity"]
        ],
    )


def fixed_table(report: Mapping[str, Any]) -> Table:
    """Return every k-th block beside what was found that is at least as fast, on the images to verify on."""
    answers = "accuracy" if report["verification"]["unpruned_accuracy"] is not None else "agreement"
    rows = []
    for entry in report["fixed"]:
        fixed, tuned = entry["fixed"], entry["tuned"]
        if fixed["verification"] is None or tuned["verification"] is None:
            continue  # of a goal that was not met, nothing was verified
        rows.append(
            (
                entry["every"],
                ranges(fixed["blocks"]),
                _speed(fixed),
                f"{fixed['verification'][answers]:.2%}",
                f"{ranges(tuned['blocks'])} at {tuned['stride']}",
                _speed(tuned),
                f"{tuned['verification'][answers]:.2%}",
            )
        )
    return table(
        "to verify: every k-th block, and the best plan at least as fast",
        [">k", "blocks", ">speed", f">{answers}", "blocks", ">speed", f">{answers}"],
        rows,
    )


def _speed(entry: Mapping[str, Any]) -> str:
    """The speed of a plan as it was timed by itself, or else by what its blocks save."""
    return f"{(entry['measured'] or entry)['speed']:.3f} ×"


def front_table(report: Mapping[str, Any]) -> Table:
    """Return the Pareto front of what was tried."""
    return table(
        "Pareto front, on the images to calibrate on",
        ["blocks", ">stride", ">speed", ">drop", ">divergence"],
        [
            (
                ranges(entry["blocks"]),
                entry["stride"],
                f"{entry['speed']:.3f} ×",
                f"{entry['calibration']['drop']:.2%}",
                f"{float(entry['calibration']['divergence']):.2g}",
            )
            for entry in report["front"]
        ],
    )
