"""A private copy of the repository, in which faults are planted: the working tree is never touched."""

from __future__ import annotations

import os
import py_compile
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

LEFT_OUT = frozenset((".git", ".venv", "__pycache__", "build", "dist", "bundles", "demo", ".hypothesis"))
CACHES = "_cache"
Change = Callable[[str, bytes], bytes]


class Tree:
    """A copy of the repository.

    Attributes:
        path: its folder.
    """

    def __init__(
        self,
        repository: Path,
        path: Path,
        change: Change = lambda name, source: source,
        more: Mapping[str, bytes] | None = None,
    ) -> None:
        """Make the copy, or bring one that is there up to date.

        Args:
            repository: what is copied.
            path: the copy.
            change: returns what stands in the copy for a file, from its name and its bytes.
            more: further files, by name.
        """
        self.path = path
        self._wanted = {name: change(name, (repository / name).read_bytes()) for name in _names(repository)}
        self._wanted |= more or {}
        path.mkdir(parents=True, exist_ok=True)
        for name in sorted(set(_names(path)) - set(self._wanted)):
            (path / name).unlink()
        for name, content in self._wanted.items():
            if not (path / name).is_file() or (path / name).read_bytes() != content:
                self._write(name, content)
        self._stamps = {name: self._stamp(name) for name in self._wanted}

    def plant(self, name: str, content: bytes) -> None:
        """Put another content in the place of a file, until `mend`."""
        (self.path / name).write_bytes(content)

    def mend(self) -> None:
        """Undo what was planted, and what a fault did to the copy."""
        for name in set(_names(self.path)) - set(self._wanted):
            (self.path / name).unlink()
        for name, content in self._wanted.items():
            if self._stamp(name) != self._stamps[name]:
                self._write(name, content)
                self._stamps[name] = self._stamp(name)

    def _stamp(self, name: str) -> tuple[int, int] | None:
        try:
            found = (self.path / name).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size

    def _write(self, name: str, content: bytes) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if name.endswith(".py"):
            # Compiled code that is compared by the source's hash: times of files are too coarse for faults in seconds.
            py_compile.compile(str(path), invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


def _names(folder: Path) -> Iterator[str]:
    """Return the files of a folder, from it, with slashes."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT and not name.endswith(CACHES))
        for name in sorted(files):
            yield Path(parent, name).relative_to(folder).as_posix()


def remove(folder: Path) -> None:
    """Remove a folder, as far as that is allowed."""
    shutil.rmtree(folder, ignore_errors=True)
