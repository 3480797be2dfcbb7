"""Charts in SVG that follow the page: its width, its text size, and its colours in light and dark.

Across, positions are shares of the width, in percent, so that a narrow screen squeezes the marks together and leaves
the text as large as it is. Colours come from the page's style sheet by class; series also differ in the shape of their
marks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from quartermap_deploy.report.markup import Html, element, joined

HEIGHT = 240
"""Height of the plotted area, in pixels."""
LOWER = "\n"
"""Begins the text of a tick that stands a line lower."""
_OFFSETS = (4, -9, 17, -22, 30, -35)
"""Pixels below the middle of a mark at which its label may stand, the best first."""
_LINE = 12
"""Pixels from one line of text to the next."""
_LETTER = 7.0 / 300
"""Width of a letter as a share of the chart's. The browser alone knows it; this is enough for the charts of a screen of
390 pixels, which have 300, and leaves more room than is needed on wider ones."""

_SHAPES = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "square": "M-4 -4h8v8h-8z",
    "diamond": "M0 -5.5L5.5 0L0 5.5L-5.5 0z",
    "triangle": "M0 -5.5L5.2 4.2H-5.2z",
    "bar": "M-10 0H10",
    "cross": "M-4.5 -4.5L4.5 4.5M-4.5 4.5L4.5 -4.5",
    "star": "M0 -7L1.9 -2.3L6.8 -2.1L2.9 1L4.3 5.8L0 3L-4.3 5.8L-2.9 1L-6.8 -2.1L-1.9 -2.3z",
}


@dataclass(frozen=True)
class Point:
    """One mark.

    Attributes:
        x: position across, in the units of its axis.
        y: position up, in the units of its axis.
        title: what a pointer that rests on it shows.
        label: text written beside it, or nothing.
    """

    x: float
    y: float
    title: str
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: what the legend says.
        points: the marks.
        shape: one of circle, square, diamond, triangle, bar, cross, star.
        colour: class in the page's style sheet: one of a, b, c, d, quiet, bad, limit.
        line: whether the points are connected in their order.
    """

    name: str
    points: tuple[Point, ...]
    shape: str = "circle"
    colour: str = "a"
    line: bool = False


@dataclass(frozen=True)
class Axis:
    """A range of values along one side of a chart.

    Attributes:
        label: what it measures, with the unit.
        low: value at its start.
        high: value at its end, larger.
        ticks: values that are written, with their texts; across, one that begins with `LOWER` stands a line lower.
        scale: "linear"; "logarithmic", where equal steps are equal ratios; or "root", which spreads small values and
            still has a zero.
    """

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    scale: Literal["linear", "logarithmic", "root"] = "linear"

    def share(self, value: float) -> float:
        """Return where a value lies, from 0 at the start to 1 at the end; values outside stay at the edge."""
        low, high, at = (self._scaled(max(number, self.low)) for number in (self.low, self.high, value))
        return min(max((at - low) / (high - low), 0.0), 1.0)

    def _scaled(self, value: float) -> float:
        if self.scale == "logarithmic":
            return math.log10(value)
        if self.scale == "root":
            return math.copysign(math.sqrt(abs(value)), value)
        return value


def linear_axis(
    label: str, values: Iterable[float], ticks: int = 5, unit: str = "", most: float = math.inf
) -> Axis:
    """Return an axis around values, with about as many ticks at round numbers, none of them above `most`."""
    found = list(values)
    low, high = min(found), max(found)
    alike = high - low < 1e-9 * max(abs(high), 1e-3)
    margin = (abs(high) * 0.05 or 0.5) if alike else (high - low) * 0.08
    low, high = low - margin, high + margin
    step = _round_step((high - low) / ticks)
    digits = max(0, -math.floor(math.log10(step)))
    first = math.ceil(low / step)
    marks = [index * step for index in range(first, math.floor(min(high, most) / step + 1e-9) + 1)]
    return Axis(label, low, high, tuple((mark, f"{mark:.{digits}f}{unit}") for mark in marks))


def logarithmic_axis(label: str, values: Iterable[float]) -> Axis:
    """Return a logarithmic axis over whole decades around positive values, at most six of them with a text."""
    found = list(values)
    low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
    high = max(high, low + 1)
    every = math.ceil((high - low) / 6)
    decades = range(low, high + 1, every)
    return Axis(label, 10.0**low, 10.0**high, tuple((10.0**e, f"1e{e}") for e in decades), "logarithmic")


def root_axis(label: str, values: Iterable[float]) -> Axis:
    """Return an axis from 0 on which small values are spread, over values of 0 and more, such as drops in percent."""
    high = max(max(values) * 1.15, 0.1)
    # A little below 0, so that marks at 0 are whole.
    axis = Axis(label, -high / 400, high, (), "root")
    ticks = [0.0]
    for mark in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 60, 80, 100):
        if mark <= high and axis.share(mark) - axis.share(ticks[-1]) > 0.08:
            ticks.append(float(mark))
    return dataclasses.replace(axis, ticks=tuple((mark, f"{mark:g}") for mark in ticks))


def counting_axis(label: str, texts: Sequence[str], most: int = 12) -> Axis:
    """Return an axis of places 1, 2, 3 …, each with its text.

    Of more than `most`, every second or third one is written, and the last. Where it is crowded, the last one, which
    may be a longer word, stands a line lower than the others.
    """
    every = math.ceil(len(texts) / most)
    crowded = len(texts) > most / 2
    ticks = [(i + 1.0, texts[i]) for i in range(0, len(texts) - 1, every)]
    ticks.append((float(len(texts)), LOWER * crowded + texts[-1]))
    return Axis(label, 0.5, len(texts) + 0.5, tuple(ticks))


def _round_step(step: float) -> float:
    scale = float(10.0 ** math.floor(math.log10(step)))
    return next((factor * scale for factor in (1.0, 2.0, 5.0) if factor * scale >= step), 10 * scale)


def chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    description: str,
    limits: Sequence[tuple[float, str]] = (),
) -> Html:
    """Return a chart with its legend.

    Args:
        series: what is drawn, the last on top.
        x: the axis across.
        y: the axis up.
        description: what the chart shows, for those who do not see it.
        limits: horizontal lines at values of y, with their texts.
    """
    drawing = element(
        "svg",
        {"width": "100%", "height": HEIGHT, "role": "img", "aria-label": description},
        *_grid(x, y),
        *_limits(y, limits),
        *(mark for entry in series for mark in _marks(entry, x, y)),
        *_labels(series, x, y),
    )
    return joined(
        _legend(series),
        element("p", {"class": "axis-label"}, y.label),
        # Texts of the axes stand outside the drawing, in the space that the style sheet leaves around it.
        element("div", {"class": "chart"}, drawing),
        element("p", {"class": "axis-label across"}, x.label),
    )


def _grid(x: Axis, y: Axis) -> list[Html]:
    parts = [element("rect", {"class": "frame", "width": "100%", "height": HEIGHT})]
    for value, text in y.ticks:
        at = _up(y, value)
        parts.append(element("line", {"class": "grid", "x1": 0, "x2": "100%", "y1": at, "y2": at}))
        parts.append(element("text", {"class": "tick", "x": -8, "y": at + 4, "text-anchor": "end"}, text))
    for value, text in x.ticks:
        at_x = _across(x, value)
        parts.append(element("line", {"class": "grid", "x1": at_x, "x2": at_x, "y1": 0, "y2": HEIGHT}))
        row = HEIGHT + 18 + _LINE * text.startswith(LOWER)
        place = {"x": at_x, "y": row, "text-anchor": "middle"}
        parts.append(element("text", {"class": "tick", **place}, text.removeprefix(LOWER)))
    return parts


def _limits(y: Axis, limits: Sequence[tuple[float, str]]) -> list[Html]:
    parts = []
    for value, text in limits:
        at = _up(y, value)
        parts.append(element("line", {"class": "limit", "x1": 0, "x2": "100%", "y1": at, "y2": at}))
        parts.append(element("text", {"class": "limit-text", "x": 6, "y": at - 5}, text))
    return parts


def _marks(series: Series, x: Axis, y: Axis) -> list[Html]:
    parts = []
    if series.line:
        for start, end in zip(series.points, series.points[1:], strict=False):
            ends = {
                "x1": _across(x, start.x),
                "y1": _up(y, start.y),
                "x2": _across(x, end.x),
                "y2": _up(y, end.y),
            }
            parts.append(element("line", {"class": f"line {series.colour}", **ends}))
    for point in series.points:
        mark = element("path", {"class": f"mark {series.colour} {series.shape}", "d": _SHAPES[series.shape]})
        # A path takes no percentages; the drawing around it does.
        at = {"class": "at", "x": _across(x, point.x), "y": _up(y, point.y)}
        parts.append(element("svg", at, element("title", None, point.title), mark))
    return parts


def _labels(series: Sequence[Series], x: Axis, y: Axis) -> list[Html]:
    """The texts beside marks, above all marks, and each where it lies on as few marks and texts as can be."""
    parts: list[Html] = []
    every = {point for entry in series for point in entry.points}
    taken = [(x.share(point.x) - _LETTER / 2, _LETTER, _up(y, point.y)) for point in every]
    points = {(point.label, point.x, point.y) for point in every if point.label}
    for label, at_x, at_y in sorted(points, key=lambda found: (found[1], -found[2])):
        # Beside the mark, towards the middle, so that no text leaves the chart.
        right = x.share(at_x) < 0.6
        width, up = _LETTER * len(label), _up(y, at_y)
        left = x.share(at_x) + _LETTER if right else x.share(at_x) - _LETTER - width

        def lies_on(offset: int, left: float = left, width: float = width, up: float = up) -> int:
            outside = not 8 < up + offset < HEIGHT
            return 2 * outside + sum(
                left < other + reach and other < left + width and abs(up + offset - 4 - row) < _LINE
                for other, reach, row in taken
            )

        offset = min(_OFFSETS, key=lies_on)
        taken.append((left, width, up + offset - 4))
        place = {"x": 9 if right else -9, "y": offset, "text-anchor": "start" if right else "end"}
        text = element("text", {"class": "label", **place}, label)
        parts.append(element("svg", {"class": "at", "x": _across(x, at_x), "y": up}, text))
    return parts


def _legend(series: Sequence[Series]) -> Html:
    entries = [
        element(
            "li",
            None,
            element(
                "svg",
                {"width": 16, "height": 16, "viewBox": "-8 -8 16 16", "aria-hidden": "true"},
                element("path", {"class": f"mark {entry.colour} {entry.shape}", "d": _SHAPES[entry.shape]}),
            ),
            element("span", None, entry.name),
        )
        for entry in series
        if entry.points
    ]
    return element("ul", {"class": "legend"}, *entries)


def _across(axis: Axis, value: float) -> str:
    return f"{axis.share(value) * 100:.2f}%"


def _up(axis: Axis, value: float) -> float:
    return HEIGHT * (1 - axis.share(value))
