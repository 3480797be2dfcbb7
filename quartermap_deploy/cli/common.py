"""What the commands share: options, messages, tables, JSON and progress.

Standard output holds the result and nothing else, so that it can be piped; messages and progress go to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import math
import os
import re
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from quartermap_deploy.cli.streams import output, takes
from quartermap_deploy.plain_text import command, printable, printable_json
from quartermap_deploy.progress import SILENT, Progress

if TYPE_CHECKING:
    from rich.console import Console

    from quartermap_deploy.bundle import Bundle

    Subparsers = argparse._SubParsersAction["CommandParser"]

HELP_WIDTH = 110
PIPED_WIDTH = 160
"""Columns of a table that is not shown in a terminal, where a cut-off cell could not be widened."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help with descriptions as they were written, and options beside their texts."""

    def __init__(self, prog: str, **settings: Any) -> None:
        columns = shutil.get_terminal_size((HELP_WIDTH, 24)).columns
        super().__init__(prog, max_help_position=30, width=min(HELP_WIDTH, columns), **settings)


class CommandParser(argparse.ArgumentParser):
    """A parser that says what was wrong in one line, as every other error is said."""

    def __init__(self, **settings: Any) -> None:
        # An abbreviation that works today is ambiguous as soon as there is a second option like it.
        super().__init__(**{"allow_abbrev": False, **settings})
        # By argparse's own, -1% would be taken for an option, and the message be about a missing value.
        self._negative_number_matcher = re.compile(r"^-(\d+|\d*\.\d+)%?$")

    def error(self, problem: str) -> NoReturn:
        """Leave with exit code 2."""
        message("error", f"{problem}{'' if problem.endswith('?') else '.'} See {self.prog} --help")
        raise SystemExit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            # The name that the help shows: of an option, or else in capitals, as COMMAND.
            name = "/".join(action.option_strings) or str(action.metavar or action.dest).lower()
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"
            raise argparse.ArgumentError(None, f"unknown {name} {str(value)!r}; {hint}")


def add_command(
    subparsers: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], None],
    *,
    summary: str,
    description: str,
    examples: str,
) -> CommandParser:
    """Add a command to the command line.

    Args:
        subparsers: where to add it.
        name: as it is typed.
        run: carries it out.
        summary: one line for `quartermap --help`.
        description: what it does, for its own help.
        examples: commands to copy, one a line.
    """
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=textwrap.dedent(description).strip(),
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "),
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_output_options(parser: argparse.ArgumentParser, *, quiet: bool = True) -> None:
    """Add --json, --verbose and, to commands that take a while, --quiet."""
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of tables (default: tables for people)"
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="with an error, also show where in the code it came from (default: its message alone)",
    )
    if quiet:
        parser.add_argument(
            "-q",
            "--quiet",
            action="store_true",
            help="show no progress and no tables; warnings, errors and --json remain (default: show them)",
        )


def add_bundle_argument(parser: argparse.ArgumentParser) -> None:
    """Add the bundle that a command is about."""
    parser.add_argument(
        "bundle", type=file_or_folder, metavar="BUNDLE", help="folder that `quartermap compile` wrote"
    )


def add_plugin_option(options: Any, dest: str = "plugin", default: object = None) -> None:
    """Add the plugin library, to a parser or a group of one.

    Args:
        options: where to.
        dest: the attribute that it sets.
        default: of the attribute.
    """
    options.add_argument(
        "--plugin",
        dest=dest,
        type=file_or_folder,
        metavar="FILE",
        default=default,
        help="plugin library of engines (default: the environment variable QUARTERMAP_PLUGIN, or your own "
        "store, which `quartermap plugin build` fills; never one of a bundle or a recipe)",
    )


def add_signature_option(options: Any, what: str = "the bundle") -> None:
    """Add who must have signed a bundle, to a parser or a group of one.

    Args:
        options: where to.
        what: has to be signed.
    """
    options.add_argument(
        "--require-signature",
        dest="signed_by",
        type=file_or_folder,
        action="append",
        default=[],
        metavar="KEY",
        help=f"PEM file of a public key by which {what} must be signed (`quartermap sign`), which is checked before "
        "anything of it is believed; may be given several times, and then all must have signed (default: none)",
    )


def add_factory_option(options: Any, when: str) -> None:
    """Add what makes a module of the user's, to a parser or a group of one.

    Args:
        options: where to.
        when: for what it is needed.
    """
    options.add_argument(
        "--factory",
        metavar="MODULE:NAME",
        help=f"{when}, what makes the module: package.module:name or path/to/model.py:Net (default: none, as nothing "
        "that a bundle names is ever run)",
    )


def add_run_module_option(options: Any) -> None:
    """Add the consent to run what a recipe file names."""
    options.add_argument(
        "--run-module",
        action="store_true",
        help="run the module that a recipe file names in [module], as you trust who wrote it (default: refuse)",
    )


# Values of options ----------------------------------------------------------------------------------------------


def file_or_folder(text: str) -> Path:
    """Read a path, for argparse.

    An empty one, as an unset variable of a shell leaves behind, would mean the current folder.
    """
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def numbers(text: str) -> tuple[int, ...]:
    """Read `3,6,9`, for argparse."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 3,6,9") from None


def numbers_or_none(text: str) -> tuple[int, ...]:
    """Read `1,2`, or `none` for an empty list, for argparse."""
    return () if text == "none" else numbers(text)


def words(text: str) -> tuple[str, ...]:
    """Read `onnxruntime,tensorrt`, for argparse."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of names such as onnxruntime,tensorrt")
    return found


def whole(least: int, most: int = (1 << 31) - 1) -> Callable[[str], int]:
    """Return what reads a whole number between two bounds, both included, for argparse."""
    bounds = (
        f"of at least {least}, and below 2^31" if most == (1 << 31) - 1 else f"from {least:,} to {most:,}"
    )

    def read(text: str) -> int:
        # Longer texts are not even converted.
        if not text.isdecimal() or len(text) > 10 or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number {bounds}")
        return int(text)

    return read


at_least_one = whole(1)


def integer(text: str) -> int:
    """Read a whole number, also a negative one, of no more than 64 bits, for argparse."""
    if not re.fullmatch(r"-?[0-9]{1,19}", text) or not -(1 << 63) <= int(text) < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def delay_ms(text: str) -> float:
    """Read a delay in milliseconds, from 0 to a minute, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 60_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of milliseconds from 0 to 60000")
    return value


# Messages -------------------------------------------------------------------------------------------------------


def message(kind: str, text: str) -> None:
    """Write an error or a warning to standard error, as one message; further lines of it are set in.

    So a name in somebody's file cannot begin a line that looks like another message.
    """
    shown = printable(text, None, lines=True).replace("\n", "\n    ")
    print(f"quartermap: {kind}: {shown}", file=sys.stderr, flush=True)


def about_users_files(error: OSError) -> bool:
    """Whether an error of the operating system is about the user's files and disks, not a defect of ours."""
    return error.errno in {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
    }


# Results --------------------------------------------------------------------------------------------------------


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


# Progress -------------------------------------------------------------------------------------------------------


def make_progress(options: argparse.Namespace) -> Progress:
    """Return the progress that a command's options ask for, on standard error."""
    if getattr(options, "quiet", False):
        return SILENT
    return TerminalProgress() if sys.stderr.isatty() else LineProgress(sys.stderr)


class LineProgress:
    """Progress as plain lines, each with the seconds since the first: for logs.

    There is one as a step begins, and one whenever nothing was said for `QUIET` seconds, so that a long step is not
    taken for one that hangs.
    """

    QUIET = 20.0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._start = self._said = time.monotonic()

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Write a line as the step begins."""
        title, done, ended = printable(title, None), 0, threading.Event()
        self._say(title)

        def advance(units: int) -> None:
            nonlocal done
            done += units

        def remind() -> None:
            while not ended.wait(max(0.01, self._said + self.QUIET - time.monotonic())):
                if time.monotonic() >= self._said + self.QUIET:
                    self._say(f"still {title}" + ("" if total is None else f", {done:,} of {total:,}"))

        reminder = threading.Thread(target=remind, name="progress", daemon=True)
        reminder.start()
        try:
            yield advance
        finally:
            ended.set()
            reminder.join()

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        print(f"[{self._said - self._start:6.1f} s] {text}", file=self._stream, flush=True)


class TerminalProgress:
    """Progress as a spinner or a bar with the elapsed time, by rich; finished steps stay as one line each."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            SpinnerColumn,
            Task,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.progress import Progress as Display

        class Total(MofNCompleteColumn):
            """The units done, for steps that have a number of them."""

            def render(self, task: Task) -> Any:
                return "" if task.total is None else super().render(task)

        class Bar(BarColumn):
            """A bar, for steps that have a number of units."""

            def render(self, task: Task) -> Any:
                return "" if task.total is None else super().render(task)

        self._console = console or Console(stderr=True, highlight=False)
        text = TextColumn("{task.description}", markup=False)
        self._display = Display(
            SpinnerColumn(), text, Bar(), Total(), TimeElapsedColumn(), console=self._console, transient=True
        )
        self._open = 0

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show the step until it ends."""
        from rich.text import Text

        title = printable(title, None)
        if self._open == 0:
            self._display.start()
        self._open += 1
        start = time.monotonic()
        task = self._display.add_task(title, total=total)
        try:
            yield lambda units: self._display.advance(task, units)
            self._console.print(Text(f"  {title}  {time.monotonic() - start:.1f} s", style="dim"))
        finally:
            self._display.remove_task(task)
            self._open -= 1
            if self._open == 0:
                self._display.stop()


# Bundles --------------------------------------------------------------------------------------------------------


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
