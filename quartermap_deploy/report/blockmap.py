"""The block map of a model as a picture: its stages, its blocks, and what of each map the scans still walk."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from quartermap_deploy.report.markup import Html, element
from quartermap_deploy.tables.words import size_text

_LARGEST, _SMALLEST = 60.0, 8.0
"""Pixels of a side, of the model's largest map and of maps too small to be seen."""
_MOST_KEPT = 6
"""Kept positions along a side that are drawn."""


def block_map(blocks: Sequence[Mapping[str, Any]]) -> Html:
    """Return the picture of a manifest's blocks: a row of tiles for each stage.

    A tile shows the block's map as an outline and, filled, what is scanned of it: all, or the lattice of the kept
    positions, of which a few stand for all where they are too many to be seen. Areas are as the square root of the
    positions, so that the small maps of the last stages can still be seen. A sequence, which has a map of one row, is a
    strip.
    """
    largest = max(max(_sides(block["map_size"])) for block in blocks)
    rows = [
        _stage(stage, list(members), largest)
        for stage, members in itertools.groupby(blocks, key=lambda block: block["stage"])
    ]
    return element("ol", {"class": "stages"}, *rows)


def _stage(stage: int, blocks: Sequence[Mapping[str, Any]], largest: float) -> Html:
    count = f"{len(blocks)} block{'s' if len(blocks) > 1 else ''}"
    sizes = dict.fromkeys(map_text(block["map_size"]) for block in blocks)
    title = element(
        "p",
        {"class": "stage"},
        element("strong", None, f"Stage {stage}"),
        f" {count}, {' and '.join(sizes)}",
    )
    tiles = element("ol", {"class": "blocks"}, *(_tile(block, largest) for block in blocks))
    return element("li", None, title, tiles)


def map_text(size: Sequence[int]) -> str:
    """Return "maps of 14x14", or "sequences of 196" for maps of one row."""
    return f"sequences of {size[1]:,}" if size[0] == 1 else f"maps of {size_text(size)}"


def _tile(block: Mapping[str, Any], largest: float) -> Html:
    pruned = bool(block["pruned"])
    lines = [element("strong", None, f"Block {block['index']}")]
    if pruned:
        lines.append(element("span", {"class": "badge"}, "pruned"))
        lines.append(
            element("span", None, f"{size_text(block['map_size'])} → {size_text(block['scanned_size'])}")
        )
        lines.append(element("span", None, f"{block['tokens_unpruned']:,} → {block['tokens']:,} tokens"))
    else:
        lines.append(element("span", None, size_text(block["map_size"])))
        lines.append(element("span", None, f"{block['tokens']:,} tokens"))
    return element(
        "li",
        {"class": "block pruned" if pruned else "block", "title": block["path"] or None},
        _drawing(block, largest),
        element("span", {"class": "about"}, *lines, separator=" "),
    )


def _drawing(block: Mapping[str, Any], largest: float) -> Html:
    """The outline of the map and, in it, the positions that are scanned."""
    height, width = (_pixels(side, largest) for side in _sides(block["map_size"]))
    height = _SMALLEST if block["map_size"][0] == 1 else height
    shares = [kept / side for kept, side in zip(block["scanned_size"], block["map_size"], strict=True)]
    left, top = (64 - width) / 2, (64 - height) / 2
    rows, columns = (
        _kept(start, side, share, kept)
        for start, side, share, kept in zip(
            (top, left), (height, width), shares, block["scanned_size"], strict=True
        )
    )
    lattice = "".join(f"M{x:.1f} {y:.1f}h{w:.1f}v{h:.1f}h-{w:.1f}z" for y, h in rows for x, w in columns)
    return element(
        "svg",
        {"width": 64, "height": 64, "viewBox": "0 0 64 64", "aria-hidden": "true"},
        element("rect", {"class": "whole", "x": left, "y": top, "width": width, "height": height}),
        element("path", {"class": "scanned", "d": lattice}),
    )


def _kept(start: float, side: float, share: float, kept: int) -> list[tuple[float, float]]:
    """Where kept positions begin along a side, and how long each is: their share of it is that of all positions."""
    if share >= 1:
        return [(start, side)]
    count = min(kept, _MOST_KEPT)
    step = side / count
    return [(start + number * step, step * share) for number in range(count)]


def _sides(size: Sequence[int]) -> tuple[float, float]:
    """The sides to draw: a sequence is as long as the map of so many positions is wide."""
    height, width = size
    return (math.sqrt(width), math.sqrt(width)) if height == 1 else (height, width)


def _pixels(side: float, largest: float) -> float:
    return max(_LARGEST * math.sqrt(side / largest), _SMALLEST)
