"""Pictures of ablations: for each group speed and accuracy, and all groups together as accuracy over speed."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.errors import MissingDependencyError
from quartermap_deploy.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
COLOURS = ("#1b6ca8", "#c8553d", "#588157", "#8d5a97", "#b8860b")
"""One for each group, in their order; told apart by markers too."""
MARKERS = ("o", "s", "D", "^", "v")
LABELS = ((6, 4, "left"), (-6, 4, "right"), (6, -10, "left"), (-6, -10, "right"), (6, 4, "left"))
"""Where the names of points stand, in points of type; each group has its own place, as points of several meet."""
GREY = "#777777"


def require_matplotlib() -> None:
    """Check that matplotlib is there.

    Raises:
        MissingDependencyError: if it is not.
    """
    try:
        if sys.modules.get("matplotlib") is None:
            with _in_an_empty_folder():
                import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError.for_extra(
            "plots need", "matplotlib", "report", ", or leave the plots out with --no-plots"
        ) from error


@contextmanager
def _in_an_empty_folder() -> Iterator[None]:
    """While open, the current folder is another one.

    matplotlib reads its settings when it is imported, and those of a file `matplotlibrc` in the current folder, which
    may be anybody's, come first. Among them are programs to start.
    """
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        try:
            yield
        finally:
            os.chdir(before)


def write_plots(values: Mapping[str, Any], results: Path) -> list[Path]:
    """Draw the results of `ablate` and write the pictures beside them, as PNG and SVG.

    Args:
        values: the results.
        results: their file; `ablations.json` gets `ablations_every.png` and so on.

    Returns:
        The files.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
        OSError: if a file cannot be written; those that are there are whole.
    """
    require_matplotlib()
    figures = {group["name"]: _group_figure(values, group) for group in values["groups"]}
    if _measured(values["groups"]):
        figures["together"] = _together(values)
    written = []
    for name, figure in figures.items():
        for format in FORMATS:
            path = results.with_name(f"{results.stem}_{name}.{format}")
            write_whole(path, _drawn(figure, format))
            written.append(path)
    return written


def _drawn(figure: Figure, format: str) -> bytes:
    from matplotlib import rc_context

    data = io.BytesIO()
    # Text stays text, and nothing in the file tells when it was made, so that the same results give the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "quartermap"}):
        metadata = {"Date": None} if format == "svg" else {"Software": None}
        figure.savefig(data, format=format, dpi=150, metadata=metadata)
    return data.getvalue()


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    # A figure of its own, and none of pyplot's, which would look for a screen.
    return Figure(figsize=(width, height), layout="constrained")


def _group_figure(values: Mapping[str, Any], group: Mapping[str, Any]) -> Figure:
    """Speed with the quartiles of the rounds, and accuracy where it was measured; one line for each variant."""
    entries = group["variants"]
    judged = any(entry["accuracy"] for entry in entries)
    figure = _figure(9 if judged else 5.5, 1.4 + 0.32 * len(entries))
    axes = figure.subplots(1, 2 if judged else 1, sharey=True, squeeze=False)[0]
    _speeds(axes[0], entries)
    axes[0].set_yticks(range(len(entries)), [entry["name"] for entry in entries])
    axes[0].invert_yaxis()
    if judged:
        _accuracies(axes[1], entries)
    figure.suptitle(f"{values['model']['title']}: {group['title']}", fontsize=11)
    return figure


def _speeds(axes: Axes, entries: Sequence[Mapping[str, Any]]) -> None:
    for place, entry in enumerate(entries):
        low, high = entry["speed_quartiles"]
        axes.plot([low, high], [place, place], color=COLOURS[0], linewidth=2, alpha=0.5)
        axes.plot(entry["speed"], place, MARKERS[0], color=COLOURS[0])
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    _label(axes, "speed, relative to unpruned")


def _accuracies(axes: Axes, entries: Sequence[Mapping[str, Any]]) -> None:
    for place, entry in enumerate(entries):
        if entry["accuracy"]:
            axes.plot(100 * entry["accuracy"]["top1"], place, MARKERS[1], color=COLOURS[1])
    unpruned = entries[0]["accuracy"]
    if unpruned:
        axes.axvline(100 * unpruned["top1"], color=GREY, linewidth=0.8, linestyle=":")
    _label(axes, "top-1, %")


def _measured(groups: Sequence[Mapping[str, Any]]) -> bool:
    return any(entry["accuracy"] for group in groups for entry in group["variants"])


def _together(values: Mapping[str, Any]) -> Figure:
    """Accuracy over speed of all variants that differ in what they compute."""
    figure = _figure(8, 5.5)
    axes = figure.subplots()
    # The forms of the graph have one accuracy.
    groups = [group for group in values["groups"] if group["name"] != "form"]
    for group, colour, marker, (right, up, side) in zip(groups, COLOURS, MARKERS, LABELS, strict=False):
        entries = [entry for entry in group["variants"][1:] if entry["accuracy"]]
        axes.plot(
            [entry["speed"] for entry in entries],
            [100 * entry["accuracy"]["top1"] for entry in entries],
            marker,
            color=colour,
            label=group["title"],
        )
        for entry in entries:
            axes.annotate(
                entry["name"],
                (entry["speed"], 100 * entry["accuracy"]["top1"]),
                xytext=(right, up),
                textcoords="offset points",
                horizontalalignment=side,
                fontsize=7,
                color=colour,
            )
    unpruned = next((group["variants"][0]["accuracy"] for group in groups), None)
    if unpruned:
        axes.plot(1, 100 * unpruned["top1"], "*", color="black", markersize=11, label="unpruned")
    axes.margins(x=0.1, y=0.08)
    axes.set_ylabel("top-1, %")
    _label(axes, "speed, relative to unpruned")
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(values["model"]["title"], fontsize=11)
    return figure


def _label(axes: Axes, text: str) -> None:
    axes.set_xlabel(text)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
