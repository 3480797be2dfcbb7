"""How other processes ended, in words."""

from __future__ import annotations

import contextlib
import signal


def ending(code: int) -> str:
    """How a process ended: by a signal, or with an exit code.

    Args:
        code: as `subprocess` has it, negative for a signal.
    """
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"by {signal.Signals(-code).name}"
    return f"with exit code {code}"
