"""A compiler launcher for CMake: what was compiled in this test run, from the same text by the same flags, is copied.

The libraries whose kernels run on the CPU, emulated, share nearly all of their files. What the compiler warns of is
not kept, so that everyone who compiles it is told.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

FOLDER = "QUARTERMAP_TEST_FOLDER"


def key_of(command: list[str]) -> str | None:
    """Return a hash of what a command compiles: the preprocessed text and the flags; None if it compiles nothing."""
    if "-c" not in command or "-o" not in command:
        return None
    flags: list[str] = []
    parts = iter(command)
    for part in parts:
        if part in ("-o", "-MF", "-MT", "-MQ"):
            next(parts)
        elif not part.startswith(("-D", "-I", "-M")) and part != "-c":
            flags.append(part)
    # This writes the list of headers for CMake, too, which a copy would lack.
    output = command.index("-o")
    preprocess = [part for part in command[:output] + command[output + 2 :] if part != "-c"]
    done = subprocess.run([*preprocess, "-E"], capture_output=True)
    if done.returncode != 0:
        return None
    return hashlib.sha256("\0".join(flags).encode() + b"\0" + done.stdout).hexdigest()


def compile_once(command: list[str]) -> int:
    """Run a compiler, or copy what it made before; returns its exit code."""
    key = key_of(command) if FOLDER in os.environ else None
    if key is None:
        return subprocess.run(command).returncode
    target = Path(command[command.index("-o") + 1])
    kept = Path(os.environ[FOLDER]) / "objects" / f"{key}.o"
    kept.parent.mkdir(exist_ok=True)
    lock, deadline = kept.with_suffix(".lock"), time.monotonic() + 250
    while not kept.exists() and time.monotonic() < deadline:
        try:
            lock.mkdir()
        except FileExistsError:
            time.sleep(0.1)
            continue
        try:
            done = subprocess.run(command, stderr=subprocess.PIPE)
            sys.stderr.buffer.write(done.stderr)
            if done.returncode == 0 and not done.stderr:
                draft = kept.with_suffix(".draft")
                shutil.copy(target, draft)
                draft.rename(kept)
        finally:
            lock.rmdir()
        return done.returncode
    if not kept.exists():
        return subprocess.run(command).returncode
    shutil.copy(kept, target)
    return 0


if __name__ == "__main__":
    sys.exit(compile_once(sys.argv[1:]))
