"""How a table is laid out, for a terminal; `report.parts.from_rich` takes it from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from quartermap_deploy.plain_text import printable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Return a table.

    Args:
        title: a line above it, or None.
        columns: headings; one that starts with ">" is for numbers, set to the right.
        rows: cells; None is shown as a dash.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Two blanks between columns and none around them: eight columns of numbers have to fit 80 characters.
    result = Table(
        title=_title(title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )
    for column in columns:
        right = column.startswith(">")
        # A Text, as brackets in a string would be markup.
        result.add_column(
            Text(_shown(column.removeprefix(">"))), justify="right" if right else "left", overflow="fold"
        )
    for row in rows:
        result.add_row(
            *("–" if cell is None else cell if isinstance(cell, Text) else Text(_shown(cell)) for cell in row)
        )
    return result


def facts(title: str | None, rows: Mapping[str, object]) -> Table:
    """Return a table of names and values; a None is shown as a dash."""
    from rich.table import Table
    from rich.text import Text

    result = Table(title=_title(title), title_justify="left", box=None, show_header=False, pad_edge=False)
    result.add_column(style="dim", no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in rows.items():
        result.add_row(
            _shown(name),
            "–" if value is None else value if isinstance(value, Text) else Text(_shown(value)),
        )
    return result


def _shown(value: object) -> str:
    return printable(value, None, lines=True)


def with_verdict(passed: bool, text: str) -> Text:
    """Return "passed, …" or "FAILED, …", in colour where there is colour."""
    from rich.text import Text

    word = Text("passed", style="green") if passed else Text("FAILED", style="bold red")
    return Text.assemble(word, ", ", printable(text, None))


def _title(title: str | None) -> Text | None:
    from rich.text import Text

    # As above: VMamba-T [s1l8].
    return None if title is None else Text(_shown(title), style="bold")
