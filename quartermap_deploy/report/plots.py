"""Plots of results: accuracy over speed for comparisons and ablations, and what a search for blocks tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quartermap_deploy.report.charts import Point, Series, chart, linear_axis, root_axis
from quartermap_deploy.report.parts import Figure
from quartermap_deploy.tables.words import ranges

SPEED = "speed, relative to the unpruned model"
STYLES = (("circle", "a"), ("diamond", "b"), ("square", "c"), ("triangle", "d"), ("star", "quiet"))
"""Shape and colour of series, in their order."""


def comparison_plot(values: Mapping[str, Any]) -> list[Figure]:
    """Return accuracy over speed of every variant of `quartermap compare`; nothing where no accuracy was measured."""
    accuracies = {
        entry["name"]: entry["accuracy"]["top1"] for entry in values["variants"] if entry["accuracy"]
    }
    several = len(values["timings"]) > 1
    series = []
    for name, (shape, colour) in zip(accuracies, STYLES, strict=False):
        points = tuple(
            Point(
                entry["speed"],
                100 * accuracies[name],
                f"{name}, batch {timing['batch']}: {entry['speed']:.2f} ×, {accuracies[name]:.2%}",
                f"batch {timing['batch']}" if several and entry["speed"] != 1 else "",
            )
            for timing in values["timings"]
            for entry in timing["variants"]
            if entry["name"] == name
        )
        series.append(Series(name, points, shape, colour))
    return _accuracy_over_speed(series, f"{values['model']['title']}: accuracy over speed")


def ablation_plot(values: Mapping[str, Any]) -> list[Figure]:
    """Return accuracy over speed of every variant of `quartermap ablate`; nothing where no accuracy was measured."""
    series = []
    for group, (shape, colour) in zip(values["groups"], STYLES, strict=False):
        points = tuple(
            Point(
                entry["speed"],
                100 * entry["accuracy"]["top1"],
                f"{group['title']}, {entry['setting']}: {entry['speed']:.2f} ×, {entry['accuracy']['top1']:.2%}",
            )
            for entry in group["variants"]
            if entry["accuracy"] and entry["plan"] is not None
        )
        series.append(Series(group["title"], points, shape, colour))
    return _accuracy_over_speed(
        series, f"{values['model']['title']}: accuracy over speed, by what was varied"
    )


def _accuracy_over_speed(series: Sequence[Series], caption: str) -> list[Figure]:
    points = [point for entry in series for point in entry.points]
    if not points:
        return []
    description = (
        f"{len(points)} variants: top-1 from {min(p.y for p in points):.2f} to {max(p.y for p in points):.2f} %, speed "
        f"from {min(p.x for p in points):.2f} to {max(p.x for p in points):.2f}"
    )
    x = linear_axis(SPEED, [1.0, *(point.x for point in points)], unit=" ×")
    y = linear_axis("top-1 accuracy, in percent", [point.y for point in points], most=100)
    return [Figure(f"{caption}.", chart(series, x, y, description))]


# Search for blocks --------------------------------------------------------------------------------------------------


def search_plots(values: Mapping[str, Any]) -> list[Figure]:
    """Return the plot of everything that `quartermap tune` tried, and that of what it verified on other images."""
    return [_tried_plot(values), *_verified_plot(values)]


def _tried_plot(values: Mapping[str, Any]) -> Figure:
    tried = tuple(
        Point(speed, 100 * _drop(entry, values), _plan_text(entry, speed, _drop(entry, values)))
        for entry in values["tried"]
        if (speed := _speed(entry, values)) is not None
    )
    front = tuple(_point(entry, "calibration") for entry in values["front"])
    fixed = tuple(_point(entry["fixed"], "calibration", f"k = {entry['every']}") for entry in values["fixed"])
    chosen = values["chosen"]
    best = () if chosen is None else (_point(chosen, "calibration", "chosen"),)
    series = [
        Series("tried", tried, "circle", "quiet"),
        Series("front: nothing tried is both faster and better", front, "circle", "a", line=True),
        Series("every k-th block", fixed, "diamond", "b"),
        Series("chosen", best, "star", "c"),
    ]
    every = [*tried, *front, *fixed, *best]
    drops, speeds = ([getattr(point, axis) for point in every] for axis in "yx")
    description = (
        f"{len(tried)} plans: drop from {min(drops):.2f} to {max(drops):.2f} % over speed from {min(speeds):.2f} to "
        f"{max(speeds):.2f}; {len(front)} of them are on the front"
    )
    drawn = chart(
        series,
        linear_axis(_speed_text(values), speeds, unit=" ×"),
        root_axis(f"drop of {values['judged_by']}, in percent", drops),
        description,
    )
    caption = (
        f"Everything that was tried, on the {values['calibration']['images']} images to calibrate on: lower and "
        "further right is better."
    )
    return Figure(caption, drawn)


def _verified_plot(values: Mapping[str, Any]) -> list[Figure]:
    """Every k-th block against what is at least as fast, on images that no plan was calibrated on."""
    entries = [entry for entry in values["fixed"] if entry["fixed"]["verification"] is not None]
    if not entries:
        return []
    fixed = tuple(_point(entry["fixed"], "verification", f"k = {entry['every']}") for entry in entries)
    beside = tuple(
        _point(entry["tuned"], "verification") for entry in entries if entry["tuned"]["verification"]
    )
    chosen = values["chosen"]
    best = () if chosen is None else (_point(chosen, "verification", "chosen"),)
    series = [
        Series("every k-th block", fixed, "diamond", "b"),
        Series("found, at least as fast as one of them", beside, "circle", "a"),
        Series("chosen", best, "star", "c"),
    ]
    every = [*fixed, *beside, *best]
    images = values["verification"]
    drawn = chart(
        series,
        linear_axis(_speed_text(values), [point.x for point in every], unit=" ×"),
        root_axis(f"drop of {values['judged_by']}, in percent", [point.y for point in every]),
        f"{len(fixed)} plans of every k-th block, with a drop of up to {max(p.y for p in fixed):.2f} %, and what was "
        f"found, with a drop of up to {max((p.y for p in (*beside, *best)), default=0):.2f} %",
    )
    return [
        Figure(
            f"The same on {images['images']} images of {images['name']}, on which no plan was calibrated.",
            drawn,
        )
    ]


def _speed_text(values: Mapping[str, Any]) -> str:
    return f"{SPEED}, by the sum of what its blocks save in {values['measure']}"


def _point(entry: Mapping[str, Any], images: str, label: str = "") -> Point:
    drop = entry[images]["drop"]
    return Point(entry["speed"], 100 * drop, _plan_text(entry, entry["speed"], drop), label)


def _plan_text(entry: Mapping[str, Any], speed: float, drop: float) -> str:
    return f"blocks {ranges(entry['blocks'])} at stride {entry['stride']}: {speed:.3f} ×, drop {drop:.2%}"


def _speed(entry: Mapping[str, Any], values: Mapping[str, Any]) -> float | None:
    """Speed of a plan by the savings of its blocks, as the search reckons it; None where one of them is not known."""
    savings = {(found["block"], found["stride"]): found["saving"] for found in values["sensitivity"]}
    keys = [(block, entry["stride"]) for block in entry["blocks"]]
    if not all(key in savings for key in keys):
        return None
    return 1 / max(1 - sum(float(savings[key]) for key in keys), 1e-6)


def _drop(entry: Mapping[str, Any], values: Mapping[str, Any]) -> float:
    """What a plan costs on the images to calibrate on, as the search reckons it."""
    unpruned = values["calibration"]["unpruned_accuracy"]
    if values["judged_by"] == "accuracy" and entry["accuracy"] is not None and unpruned is not None:
        return max(float(unpruned) - float(entry["accuracy"]), 0.0)
    return 1 - float(entry["agreement"])
