"""Drafts: files and folders under temporary names beside the place that they take when they are whole.

A process that is killed leaves its drafts behind. So each holds a lock that ends with its process: the next one that
writes to the same place removes what is not locked any more, and knows by what is that somebody else writes there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUFFIX, REPLACED = ".draft", ".replaced"
SETTLED = 60.0
"""Seconds after which a draft without a lock is nobody's; between making one and locking it lie microseconds."""

_open: dict[Path, Draft] = {}
"""The drafts of this process."""


class Draft:
    """A file or folder that was just made, held open, so that it is known again whatever its name leads to later.

    Where others may write, they can put a link in its place; permissions set by its name would be those of the link's
    target.

    Attributes:
        path: its temporary name.
    """

    def __init__(self, place: Path, path: Path, descriptor: int | None) -> None:
        """Hold a draft for a place; the descriptor is None where the system opens no folders, as Windows."""
        self.path, self._place, self._descriptor = path, place, descriptor
        if descriptor is not None:
            # At most somebody looks just now whether it has a lock.
            _lock(descriptor, wait=True)
        _open[path] = self

    @property
    def replaced(self) -> Path:
        """Where what is in its place goes while it takes that."""
        return self.path.with_suffix(REPLACED)

    def set_mode(self, mode: int) -> bool:
        """Set its permissions; returns whether its name still is its own."""
        if self._descriptor is None:
            return True
        os.fchmod(self._descriptor, mode)
        return self.path.exists() and os.path.samestat(self.path.lstat(), os.fstat(self._descriptor))

    def is_second(self) -> bool:
        """Whether somebody else began before to write to the same place."""
        if self._descriptor is None:
            return False
        own = _age(self.path)
        return any(_is_held(path) and _age(path) < own for path in _drafts(self._place) if path != self.path)

    def remove(self) -> None:
        """Remove what is there under its name, and let go of it."""
        _removed(self.path)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        _open.pop(self.path, None)


@contextmanager
def draft_folder(place: Path) -> Iterator[Draft]:
    """A new folder for a place, for its owner alone. When the block ends, what is left of it is removed.

    Raises:
        OSError: if it cannot be made.
    """
    _sweep(place)
    path = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=SUFFIX, dir=place.parent))
    # Windows opens no folders, and has other permissions.
    flags = getattr(os, "O_DIRECTORY", None)
    draft = Draft(place, path, None if flags is None else os.open(path, flags | os.O_NOFOLLOW))
    try:
        yield draft
    finally:
        draft.remove()


@contextmanager
def draft_file(place: Path) -> Iterator[tuple[Draft, int]]:
    """A new file for a place, and a descriptor to write it by. When the block ends, what is left of it is removed.

    Raises:
        OSError: if it cannot be made.
    """
    _sweep(place)
    handle, path = tempfile.mkstemp(prefix=f".{place.name}.", suffix=SUFFIX, dir=place.parent)
    # The caller closes its own.
    draft = Draft(place, Path(path), os.dup(handle))
    try:
        yield draft, handle
    finally:
        draft.remove()


def remove_drafts() -> None:
    """Remove all drafts of this process, which ends."""
    for path in list(_open):
        _removed(path)


def _sweep(place: Path) -> None:
    """Remove the drafts that killed processes left for a place, and put back what one of them had taken away."""
    drafts = _drafts(place)
    if any(map(_is_held, drafts)):
        return
    with contextlib.suppress(OSError):
        for path in _drafts(place, REPLACED):
            if place.exists():
                _removed(path)
            else:
                path.rename(place)
    for path in drafts:
        if _is_abandoned(path):
            _removed(path)


def _drafts(place: Path, suffix: str = SUFFIX) -> list[Path]:
    """What there is under temporary names for a place; no links."""
    with contextlib.suppress(OSError):
        return [
            Path(entry.path)
            for entry in os.scandir(place.parent)
            if entry.name.startswith(f".{place.name}.")
            and entry.name.endswith(suffix)
            and not entry.is_symlink()
        ]
    return []


def _age(path: Path) -> tuple[int, str]:
    """By which drafts are ordered: the one that was begun first is the smallest."""
    try:
        # What is made in a folder makes its times newer.
        begun = path.is_dir() and any(path.iterdir())
        return 0 if begun else path.lstat().st_ctime_ns, path.name
    except OSError:
        # It has just gone.
        return time.time_ns(), path.name


def _is_held(path: Path) -> bool:
    """Whether a process that lives holds a draft."""
    return path in _open or _try(path) is False


def _is_abandoned(path: Path) -> bool:
    """Whether a draft is this user's, and the process that made it is gone."""
    try:
        status = path.lstat()
    except OSError:
        return False
    own = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return own and time.time() - status.st_mtime > SETTLED and path not in _open and _try(path) is True


def _try(path: Path) -> bool | None:
    """Whether a lock could be had; None where there are none, or the draft cannot be opened."""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, os.O_RDONLY | flags)
    except OSError:
        return None
    try:
        return _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool = False) -> bool | None:
    """Lock what is open, until it is closed; returns whether that was possible, None where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _removed(path: Path) -> None:
    with contextlib.suppress(OSError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
