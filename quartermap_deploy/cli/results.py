"""Results: tables and JSON, on standard output and nothing else there, so that they can be piped."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from quartermap_deploy.cli.messages import message
from quartermap_deploy.cli.streams import output, takes
from quartermap_deploy.plain_text import command, printable, printable_json

if TYPE_CHECKING:
    from rich.console import Console

    from quartermap_deploy.bundle import Bundle


PIPED_WIDTH = 160
"""Columns of a table that is not shown in a terminal, where a cut-off cell could not be widened."""


def results_only() -> AbstractContextManager[object]:
    """While open, what libraries print goes to standard error, so that standard output holds the result alone."""
    return contextlib.redirect_stdout(sys.stderr)


def print_json(value: Any) -> None:
    """Write a value to standard output as JSON; NaN and infinity, which JSON does not have, become null."""
    text = printable_json(_plain(value))
    with output():
        # In JSON a letter that the stream does not have can be written so that it stays that letter.
        print(text if takes(sys.stdout, text) else printable_json(_plain(value), ascii=True))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def console(stream: TextIO) -> Console:
    """Return a rich console on a stream, wide enough for tables where the stream is no terminal."""
    from rich.console import Console

    fixed = stream.isatty() or "COLUMNS" in os.environ
    return Console(file=stream, width=None if fixed else PIPED_WIDTH, highlight=False, soft_wrap=False)


def show(*parts: Any) -> None:
    """Write tables and lines to standard output."""
    out = console(sys.stdout)
    # By way of a string: rich has its own answer to a reader that has gone, and ours is in `program`.
    with output():
        with out.capture() as text:
            for part in parts:
                # Lines are not wrapped and brackets in them are no markup: they hold paths.
                line = isinstance(part, str)
                out.print(printable(part, None, lines=True) if line else part, markup=False, soft_wrap=line)
        lines = text.get().splitlines()
        # rich fills lines up with blanks, which are in the way outside a terminal.
        sys.stdout.writelines(f"{line if out.is_terminal else line.rstrip()}\n" for line in lines)


@contextmanager
def signatures_dropped(folder: Path) -> Iterator[None]:
    """While open, a bundle may be replaced by another; if it was signed, its signatures went, and that is said."""
    from quartermap_deploy.signatures import SIGNATURES

    path = folder / SIGNATURES
    signed = os.path.lexists(path)
    yield
    if signed and not os.path.lexists(path):
        line = command("quartermap", "sign", folder, "--key", "PRIVATE.pem")
        message(
            "warning", f"the bundle was changed, so its signatures were dropped; sign it again with: {line}"
        )


def bundle_json(bundle: Bundle) -> dict[str, Any]:
    """Return what `--json` prints about a bundle."""
    return {"path": bundle.path, "manifest": bundle.manifest, "report": bundle.report}
