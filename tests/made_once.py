"""What takes long to make, made once for all processes of a test run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def made_once(name: str, make: Callable[[Path], object], seconds: float = 600) -> Path:
    """Return a file or folder of the test run, which whichever of its processes asks first makes.

    Args:
        name: of the file or folder.
        make: writes it to a path, whole.
        seconds: how long to wait for another process that makes it.
    """
    folder = Path(os.environ["QUARTERMAP_TEST_FOLDER"])
    path, lock = folder / name, folder / f"{name}.lock"
    deadline = time.monotonic() + seconds
    while not path.exists():
        try:
            lock.touch(exist_ok=False)
        except FileExistsError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process was to make {path}, and did not") from None
            time.sleep(0.2)
            continue
        try:
            make(path)
        finally:
            lock.unlink()
    return path
