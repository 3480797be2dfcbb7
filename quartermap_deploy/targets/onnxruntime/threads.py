"""How many threads a session of ONNX Runtime gets on the CPU."""

from __future__ import annotations

import os

from quartermap_deploy.errors import InputError
from quartermap_deploy.limits import MOST_THREADS
from quartermap_deploy.machine import all_cores, usable_cores

THREADS_VARIABLE = "QUARTERMAP_THREADS"


def threads_wanted() -> int:
    """The number in the environment, or that of a process that may not use all cores, or else 0 for all of them.

    Raises:
        InputError: if it is no number of threads.
    """
    text = os.environ.get(THREADS_VARIABLE)
    if text is not None and (not text.isdecimal() or len(text) > 10 or not 1 <= int(text) <= MOST_THREADS):
        raise InputError(
            f"the environment variable {THREADS_VARIABLE} is {text!r}; expected a number of threads from 1 to "
            f"{MOST_THREADS}"
        )
    usable = usable_cores()
    # By itself ONNX Runtime takes as many threads as the machine has cores, in a container with two of 64 as well.
    return int(text) if text is not None else (usable if usable < all_cores() else 0)


def default_threads() -> int:
    """The threads that one operator gets where a session is made without a number: the environment's, or all cores.

    Raises:
        InputError: if the environment holds no number.
    """
    return threads_wanted() or usable_cores()
