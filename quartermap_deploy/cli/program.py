"""The program around the commands: its parser, and how it ends."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from quartermap_deploy.cli import (
    ablate,
    bench,
    compare,
    compile,
    completion,
    deploy,
    doctor,
    eval,
    images,
    inspect,
    models,
    native,
    plugin,
    predict,
    rebuild,
    report,
    serve,
    sign,
    tune,
    validate,
)
from quartermap_deploy.cli.interruption import Interruptible
from quartermap_deploy.cli.messages import about_users_files, message
from quartermap_deploy.cli.parsing import CommandParser, HelpFormatter
from quartermap_deploy.cli.streams import OUTPUT, output
from quartermap_deploy.errors import QuartermapError
from quartermap_deploy.plain_text import printable

__all__ = ["build_parser", "run"]

OK, DEFECT, USER_ERROR, BROKEN_PIPE = 0, 1, 2, 141

COMMANDS = (
    models,
    compile,
    inspect,
    validate,
    predict,
    images,
    bench,
    eval,
    compare,
    ablate,
    tune,
    report,
    serve,
    deploy,
    sign,
    rebuild,
    native,
    plugin,
    doctor,
)

DESCRIPTION = """\
Deployment compiler for visual state-space models. A model, pruned by QuarterMap or not, goes in; a bundle comes
out: one portable ONNX file, proof that it computes what the PyTorch model computes, and a manifest.
"""

EPILOG = """\
examples:
  quartermap models                                              what can be compiled
  quartermap compile vmamba_digits                               compile, and prove the result
  quartermap compile vmamba_digits --every 3                     the same, with every third block pruned
  quartermap inspect bundles/vmamba_digits_k3                    which blocks are pruned, what is in the graph
  quartermap validate bundles/vmamba_digits_k3                   prove it again, on this machine
  quartermap predict bundles/vmamba_digits_k3 digit.png          which digit it is
  quartermap bench bundles/vmamba_digits bundles/vmamba_digits_k3
  quartermap eval bundles/vmamba_digits_k3                       accuracy on images that training never saw
  quartermap report bundles/vmamba_digits_k3 -o report.html      all of it on one page

exit codes:
  0    done
  1    a defect of quartermap-deploy, with a traceback
  2    something that you can put right, with a message
  130  interrupted (143: terminated)
"""


def build_parser() -> CommandParser:
    """Return the parser of the whole command line."""
    parser = CommandParser(
        prog="quartermap", description=DESCRIPTION, epilog=EPILOG, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--version",
        action="store_true",
        help="print the versions of this package and of what it runs on, and exit",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for command in COMMANDS:
        command.add_parser(subparsers)
    completion.add_parser(subparsers, parser)
    return parser


def print_versions() -> None:
    """Print what `quartermap doctor` knows of versions, a line each."""
    from quartermap_deploy.doctor import versions

    for name, version in versions().items():
        print(f"{name} {version}")


def run(arguments: Sequence[str] | None, interruption: Interruptible) -> int:
    """Run the command line; `cli.main` says how.

    Args:
        arguments: what stands after `quartermap`; None takes them from the process.
        interruption: knows whether a signal came.

    Raises:
        KeyboardInterrupt: if the command was interrupted.
    """
    parser = build_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        # Left to argparse, this would point to the help of the whole program instead of the command's.
        command = f"quartermap {options.command}" if options.command else "quartermap"
        message("error", f"unknown option or argument {' '.join(unknown)}. See {command} --help")
        return USER_ERROR
    try:
        if options.version:
            print_versions()
        elif options.command is None:
            parser.print_help()
        else:
            options.run(options)
        with output():
            # What is written by now, and would fail at the end of the process.
            pass
    except Exception as error:
        if interruption.number is not None:
            # It is what a library made of the interruption.
            raise KeyboardInterrupt from error
        return _told(error, getattr(options, "verbose", False))
    return OK


def _drop_output() -> None:
    """Forget what standard output has not taken; Python would complain of it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _told(error: Exception, verbose: bool) -> int:
    """Say what ended a command, where `verbose` with the lines that led there; returns the exit code."""
    if isinstance(error, QuartermapError):
        if verbose:
            print(printable(traceback.format_exc(), None, lines=True), end="", file=sys.stderr)
        message("error", str(error))
        return USER_ERROR
    if isinstance(error, BrokenPipeError):
        # Who read the output wants no more of it, as with `| head`.
        _drop_output()
        return BROKEN_PIPE
    if isinstance(error, OSError) and error.filename == OUTPUT:
        _drop_output()
        message("error", f"cannot write to {OUTPUT}: {error.strerror}; make room, or send it elsewhere")
        return USER_ERROR
    if isinstance(error, OSError) and about_users_files(error):
        message("error", f"{error.strerror}: {error.filename}" if error.filename else str(error))
        return USER_ERROR
    print(printable(traceback.format_exc(), None, lines=True), end="", file=sys.stderr)
    message("error", "this is a defect of quartermap-deploy; please report it with the lines above")
    return DEFECT
