"""The parser of the command line and of its commands: help as it was written, and errors in one line."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from quartermap_deploy.cli.messages import message

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction["CommandParser"]


HELP_WIDTH = 110


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
