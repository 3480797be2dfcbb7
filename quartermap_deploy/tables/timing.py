"""The table of `quartermap bench`, from its result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quartermap_deploy.bench import scatter
from quartermap_deploy.tables.layout import table

if TYPE_CHECKING:
    from rich.table import Table


def result_table(values: Mapping[str, Any]) -> Table:
    """Return the table of what `--json` prints."""
    return table(
        f"batch {values['batch']}, {values['threads']} threads, {values['repeats']} rounds",
        [
            "bundle",
            "target",
            "providers",
            "scans",
            ">median ms",
            ">fastest",
            ">slowest",
            f">{values['unit']}/s",
            ">speed",
        ],
        [_row(result) for result in values["bundles"]],
    )


def _row(result: Mapping[str, Any]) -> list[object]:
    """Return the line of one bundle."""
    low, high = result["speed_quartiles"]
    # As if it were known, it is not given where the rounds scatter.
    speed = "?" if scatter(result) else f"{result['speed']:.2f} ×"
    return [
        result["name"],
        result["target"],
        result.get("providers") or "",
        result.get("scans") or "",
        f"{result['median_ms']:.2f}",
        f"{result['minimum_ms']:.2f}",
        f"{result['maximum_ms']:.2f}",
        f"{result['images_per_second']:,.1f}",
        f"{speed} [{low:.2f} – {high:.2f}]",
    ]
