"""Run a compiler, unless what it would make is there already: CMake's launcher for the plugin's files.

    python object_cache.py FOLDER IDENTITY EVENTS COMPILER ARGUMENTS...

Objects are named by the content of the file, by what is said of everything it may include and of the compilers
(IDENTITY, see build.py: that of kernels, a colon, that of all other files), and by the arguments, without the places
where files lie. So a build that was interrupted goes on where it stopped, and libraries share their kernels. To EVENTS
a line is added as a file begins, and as it is done. For build folders that are made anew each time: with an object that
was kept comes no list of the headers that it depends on.

This file is run by itself, with the standard library alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

MOST_BYTES = 400_000_000
"""Of objects that are kept."""
_PLACES = ("-o", "-MF", "-MT", "-MQ")
"""Arguments that name a place, and nothing of what is made."""


def key_of(identity: str, command: Sequence[str], source: Path) -> str:
    """Return what an object is named by."""
    # Kernels include headers of their own alone; others may include any.
    kernel = source.suffix == ".cu"
    of_kernels, _, of_others = identity.partition(":")
    included = of_kernels if kernel else of_others
    digest = hashlib.sha256(f"{included}\0{source.parent.name}/{source.name}\0".encode())
    digest.update(hashlib.sha256(source.read_bytes()).digest())
    skip = False
    for argument in command:
        if skip or argument in _PLACES:
            skip = not skip
        elif argument == str(source) or argument.startswith(("-MD", "-MMD")):
            continue
        elif argument.startswith("-I"):
            if not kernel:
                digest.update(f"-I{Path(argument[2:]).name}\0".encode())
        else:
            digest.update(f"{argument}\0".encode())
    return digest.hexdigest()


def source_of(command: Sequence[str]) -> Path | None:
    """Return the one file that a command compiles; None if it does anything else."""
    if "-c" not in command or "-o" not in command:
        return None
    found = [each for each in command if each.endswith((".cu", ".cpp")) and Path(each).is_file()]
    return Path(found[0]) if len(found) == 1 else None


def run(folder: Path, identity: str, events: Path, command: Sequence[str]) -> int:
    """Make the object of a command, or copy it; returns the exit code."""
    source = source_of(command)
    if source is None:
        return subprocess.run(command).returncode
    target = Path(command[command.index("-o") + 1])
    kept = folder / f"{key_of(identity, command, source)}.o"
    try:
        shutil.copyfile(kept, target)
        os.utime(kept)
    except OSError:
        pass
    else:
        _note(events, f"kept {source.name}")
        return 0
    _note(events, f"begin {source.name}")
    try:
        code = subprocess.run(command).returncode
    finally:
        _note(events, f"end {source.name}")
    if code == 0:
        _keep(target, kept)
    return code


def _note(events: Path, line: str) -> None:
    # Short lines that are appended at once do not mix.
    with events.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def _keep(made: Path, kept: Path) -> None:
    """Copy an object into the cache in one piece. Without room for it, the build goes on all the same."""
    try:
        descriptor, draft = tempfile.mkstemp(dir=kept.parent, prefix=".draft-")
        os.close(descriptor)
        try:
            shutil.copyfile(made, draft)
            os.replace(draft, kept)
        except BaseException:
            os.unlink(draft)
            raise
    except OSError:
        return


def prune(folder: Path, most: int = MOST_BYTES) -> None:
    """Remove the objects that were not used for the longest time, until the others fit."""
    found = []
    for path in folder.glob("*.o"):
        try:
            facts = path.stat()
        except OSError:
            continue
        found.append((facts.st_mtime_ns, facts.st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > most:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:]))
