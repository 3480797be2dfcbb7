"""The tables of `quartermap compare`, from its result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quartermap_deploy.tables.layout import table
from quartermap_deploy.tables.words import (
    count_text,
    error_text,
    how_measured,
    milliseconds,
    ranges,
    rate_text,
    speed_text,
)

if TYPE_CHECKING:
    from rich.table import Table


def tables(values: Mapping[str, Any]) -> list[object]:
    """Return the tables of a comparison, one for each batch, and what they show."""
    parts: list[object] = []
    for timing in values["timings"]:
        parts += [_table(values, timing), ""]
    parts += how_measured(values)
    parts.append(
        "Scan and added: the time in the scans, and in what pruning or merging puts around them, by their shares of "
        "recorded calls."
    )
    forms = dict.fromkeys(entry.get("scans") for entry in values["variants"])
    if forms.keys() - {None}:
        parts.append(
            f"What computes the scans: {', '.join(filter(None, forms))}. Portable: the same files, their scans in the "
            "portable form, relative to the unpruned model in that form."
        )
    if values["model"]["weights"] == "new":
        parts.append("The weights are new: they decide no time.")
    return parts


def _table(values: Mapping[str, Any], timing: Mapping[str, Any]) -> Table:
    variants = {entry["name"]: entry for entry in values["variants"]}
    portable = any(entry.get("portable") for entry in timing["variants"])
    rows = []
    for entry in timing["variants"]:
        variant = variants[entry["name"]]
        accuracy, parity = variant["accuracy"], variant["parity"]
        rows.append(
            [
                entry["name"],
                ranges(variant["blocks"]) or None,
                count_text(variant["tokens"]),
                count_text(variant["flops"]),
                None if accuracy is None else f"{accuracy['top1']:.2%}",
                rate_text(entry["images_per_second"]),
                speed_text(entry["speed"], entry["speed_quartiles"]),
                speed_text(entry["speed_to_tome"], None),
                *([_portable_text(entry)] if portable else []),
                _scan_text(entry),
                milliseconds(entry["added_ms"]),
                None if parity is None else error_text(parity["relative_error"]),
            ]
        )
    columns = [
        "variant",
        "blocks",
        ">tokens",
        ">FLOPs",
        ">top-1",
        ">images/s",
        ">speed",
        ">to ToMe",
        *([">portable images/s"] if portable else []),
        ">scan ms",
        ">added ms",
        ">parity",
    ]
    return table(f"{values['model']['title']}, batch {timing['batch']}", columns, rows)


def _portable_text(entry: Mapping[str, Any]) -> str | None:
    """How fast a variant is with its scans in the portable form, and relative to the unpruned model in that form."""
    found = entry.get("portable")
    return None if found is None else f"{rate_text(found['images_per_second'])} ({found['speed']:.2f} ×)"


def _scan_text(entry: Mapping[str, Any]) -> str | None:
    text, share = milliseconds(entry["scan_ms"]), entry["scan_share"]
    return text if share is None else f"{text} ({share:.0%})"
