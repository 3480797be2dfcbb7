"""The command line, `quartermap`: one file per command, `program.py` around them.

What they share: `parsing.py`, `options.py`, `values.py`, `messages.py`, `results.py`, `progress_display.py`.
"""

from __future__ import annotations

import sys

# Not from typing, see quartermap_deploy/__init__.py.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

__all__ = ["main", "script"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what stands after `quartermap`; None takes them from the process.

    Returns:
        The exit code; `--help` and wrong usage leave by SystemExit, as argparse has it.
    """
    code, text = 130, "quartermap: error: interrupted"
    try:
        # Here, as importing takes long enough to be interrupted.
        from quartermap_deploy.cli.interruption import Interruptible
        from quartermap_deploy.cli.streams import prepare_streams

        prepare_streams()
        with Interruptible() as interruption:
            try:
                from quartermap_deploy.cli.program import run

                code = run(arguments, interruption)
            except KeyboardInterrupt:
                code = interruption.code
            # Something may have swallowed it.
            if interruption.number is None and code != interruption.code:
                return code
            code, text = interruption.code, interruption.text
    except KeyboardInterrupt:
        pass
    # `messages.message` may not be there yet.
    print(text, file=sys.stderr, flush=True)
    return code


def script() -> NoReturn:
    """Run the command line as a process of its own, and end it."""
    code = main()
    import signal

    # Until it has ended, Python would answer Ctrl-C with a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)
