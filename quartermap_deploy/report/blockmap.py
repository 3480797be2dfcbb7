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


def block_map(blocks: Sequence[Mapping[str, Any]]) -> Html:
    """Return the picture of a manifest's blocks: a row of tiles for each stage.

    A tile shows the block's map as an outline and the part that is scanned, filled. Areas are as the square root of the
    positions, so that the small maps of the last stages can still be seen.
    """
    largest = max(side for block in blocks for side in block["map_size"])
    rows = [
        _stage(stage, list(members), largest)
        for stage, members in itertools.groupby(blocks, key=lambda block: block["stage"])
    ]
    return element("ol", {"class": "stages"}, *rows)


def _stage(stage: int, blocks: Sequence[Mapping[str, Any]], largest: int) -> Html:
    count = f"{len(blocks)} block{'s' if len(blocks) > 1 else ''}"
    title = element(
        "p",
        {"class": "stage"},
        element("strong", None, f"Stage {stage}"),
        f" {count}, maps of {size_text(blocks[0]['map_size'])}",
    )
    tiles = element("ol", {"class": "blocks"}, *(_tile(block, largest) for block in blocks))
    return element("li", None, title, tiles)


def _tile(block: Mapping[str, Any], largest: int) -> Html:
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
        {"class": "block pruned" if pruned else "block"},
        _drawing(block, largest),
        element("span", {"class": "about"}, *lines, separator=" "),
    )


def _drawing(block: Mapping[str, Any], largest: int) -> Html:
    """The outline of the map and, in it, the scanned part."""
    height, width = (_pixels(side, largest) for side in block["map_size"])
    shares = [kept / side for kept, side in zip(block["scanned_size"], block["map_size"], strict=True)]
    left, top = (64 - width) / 2, (64 - height) / 2
    inside = {"x": left, "y": top, "width": width * shares[1], "height": height * shares[0]}
    return element(
        "svg",
        {"width": 64, "height": 64, "viewBox": "0 0 64 64", "aria-hidden": "true"},
        element("rect", {"class": "whole", "x": left, "y": top, "width": width, "height": height}),
        element("rect", {"class": "scanned", **inside}),
    )


def _pixels(side: int, largest: int) -> float:
    return max(_LARGEST * math.sqrt(side / largest), _SMALLEST)
