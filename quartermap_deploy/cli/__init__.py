"""The command line, `quartermap`: one file per command, `program.py` around them, `common.py` for what they share."""

from __future__ import annotations

import sys

# Not from typing, see quartermap_deploy/__init__.py.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what stands after `quartermap`; None takes them from the process.

    Returns:
        The exit code; `--help` and wrong usage leave by SystemExit, as argparse has it.
    """
    try:
        # Here, as importing takes long enough to be interrupted.
        from quartermap_deploy.cli.program import run

        return run(arguments)
    except KeyboardInterrupt:
        # `common.message` may not be there yet.
        print("quartermap: error: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
