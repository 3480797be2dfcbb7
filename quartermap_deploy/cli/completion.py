"""`quartermap completion`: what a shell needs to complete commands and options."""

from __future__ import annotations

import argparse
import functools
from typing import TYPE_CHECKING

from quartermap_deploy.cli.parsing import CommandParser, add_command

if TYPE_CHECKING:
    from quartermap_deploy.cli.parsing import Subparsers

SHELLS = ("bash", "zsh", "fish")


def add_parser(subparsers: Subparsers, program: CommandParser) -> None:
    """Add the command.

    Args:
        subparsers: where to.
        program: the parser of the whole command line, as it is when the command runs.
    """
    parser = add_command(
        subparsers,
        "completion",
        functools.partial(run, program),
        summary="print completions for a shell",
        description="""
            Print a script by which a shell completes commands, options and paths.
            """,
        examples="""
            quartermap completion bash > ~/.local/share/bash-completion/completions/quartermap
            quartermap completion zsh > ~/.zfunc/_quartermap      # with fpath+=~/.zfunc before compinit
            quartermap completion fish > ~/.config/fish/completions/quartermap.fish
            """,
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"one of {', '.join(SHELLS)}")


def run(program: CommandParser, options: argparse.Namespace) -> None:
    """Print the script."""
    import shtab

    for action in every_action(program):
        if action.type is not None and getattr(action.type, "__name__", "") == "file_or_folder":
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(program, options.shell))


def every_action(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options and arguments of a parser and of all commands in it."""
    found: list[argparse.Action] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found += every_action(command)
        else:
            found.append(action)
    return found
