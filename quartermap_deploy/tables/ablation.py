"""The tables of `quartermap ablate`, from its result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quartermap_deploy.tables.layout import table
from quartermap_deploy.tables.words import count_text, error_text, how_measured, ranges, rate_text, speed_text

if TYPE_CHECKING:
    from rich.table import Table


def tables(values: Mapping[str, Any]) -> list[object]:
    """Return the tables of the ablations, one for each group, and what they show."""
    parts: list[object] = []
    for group in values["groups"]:
        parts += [_table(values, group), ""]
    return [*parts, *how_measured(values, f", batch {values['batch']}")]


def _table(values: Mapping[str, Any], group: Mapping[str, Any]) -> Table:
    rows = []
    for entry in group["variants"]:
        accuracy, parity = entry["accuracy"], entry["parity"]
        rows.append(
            [
                entry["name"],
                ranges(entry["blocks"]) or None,
                count_text(entry["tokens"]),
                count_text(entry["flops"]),
                None if accuracy is None else f"{accuracy['top1']:.2%}",
                rate_text(entry["images_per_second"]),
                speed_text(entry["speed"], entry["speed_quartiles"]),
                None if parity is None else error_text(parity["relative_error"]),
            ]
        )
    columns = ["variant", "blocks", ">tokens", ">FLOPs", ">top-1", ">images/s", ">speed", ">parity"]
    return table(f"{values['model']['title']}: {group['title']}", columns, rows)
