"""What a report is made of: sections of tables, figures and notes, before anything decides how they are written.

The page writes them as HTML, `markdown` writes tables as Markdown. Cells are plain text, set to the right where the
heading begins with ">", as in `tables.layout.table`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from quartermap_deploy.report.markup import Html

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Note:
    """A paragraph.

    Attributes:
        text: plain text.
        reason: whether it says why something is left out.
    """

    text: str
    reason: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        caption: what the table holds.
        columns: headings; one that starts with ">" is for numbers.
        rows: cells; None is shown as a dash.
        folded: whether the page shows it only when it is asked to, because it is long.
        marked: indices of rows that stand out: those that the text is about, or that failed.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    folded: bool = False
    marked: tuple[int, ...] = ()

    @property
    def headings(self) -> tuple[str, ...]:
        """The headings as they are shown."""
        return tuple(column.removeprefix(">") for column in self.columns)

    @property
    def numeric(self) -> tuple[bool, ...]:
        """For each column, whether it is for numbers."""
        return tuple(column.startswith(">") for column in self.columns)

    def cells(self) -> Iterator[list[str]]:
        """The rows as text."""
        for row in self.rows:
            yield ["–" if cell is None else str(cell) for cell in row]


@dataclass(frozen=True)
class Figure:
    """A picture with its caption.

    Attributes:
        caption: what it shows and how to read it.
        content: the picture, which holds its own text for those who do not see it.
    """

    caption: str
    content: Html


@dataclass(frozen=True)
class Heading:
    """A heading inside a section, for example a bundle's name."""

    text: str


Part: TypeAlias = Note | Table | Figure | Heading


@dataclass(frozen=True)
class Section:
    """One section of a report.

    Attributes:
        name: its anchor, a word in lower case.
        title: its heading.
        parts: what is in it, in order.
    """

    name: str
    title: str
    parts: tuple[Part, ...]

    @property
    def left_out(self) -> bool:
        """Whether it holds nothing but reasons why it is empty."""
        return all(
            isinstance(part, Heading) or (isinstance(part, Note) and part.reason) for part in self.parts
        )

    @property
    def reasons(self) -> str:
        """Why it is empty, each reason once."""
        found = dict.fromkeys(part.text for part in self.parts if isinstance(part, Note) and part.reason)
        return " ".join(found)


def left_out(name: str, title: str, reason: str) -> Section:
    """Return a section that says why it is empty."""
    return Section(name, title, (Note(reason, reason=True),))


def from_rich(table: RichTable, *, folded: bool = False) -> Table:
    """Return a table as a command shows it, so that both say the same."""
    columns = [f"{'>' * (column.justify == 'right')}{column.header}" for column in table.columns]
    rows = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    return Table(str(table.title or ""), tuple(columns), tuple(rows), folded=folded)


def markdown(table: Table) -> str:
    """Return a table in Markdown, without its caption."""
    rule = ["---:" if numeric else "---" for numeric in table.numeric]
    lines = [table.headings, rule, *table.cells()]
    return "".join(f"| {' | '.join(_escaped(line))} |\n" for line in lines)


def _escaped(cells: Sequence[str]) -> list[str]:
    return [" ".join(cell.replace("|", "\\|").split()) for cell in cells]
