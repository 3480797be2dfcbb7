"""Files and folders that are written whole or not at all, and files known again by their hash."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quartermap_deploy.drafts import Draft, draft_file, draft_folder
from quartermap_deploy.errors import QuartermapError, WriteError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a disk, or a share of one, that takes no more."""


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that this package writes.

    Attributes:
        name: for messages, such as "bundle".
        marker: the file by which such a folder is known; nothing else is ever replaced.
        error: what is raised where one cannot be written.
    """

    name: str
    marker: str
    error: type[QuartermapError]

    def check_destination(self, path: Path, force: bool) -> None:
        """Check, before any work, that such a folder may be written to `path`.

        Raises:
            QuartermapError: of the kind's own class, if something is there and `force` is not given, or if it is no
                such folder, which is never removed.
        """
        if not path.exists() and not path.is_symlink():
            if (obstacle := obstacle_to(path)) is not None:
                raise self.error(f"cannot write to {path}: {obstacle}")
            return
        if not force:
            remedy = "choose another folder"
            if (path / self.marker).is_file():
                remedy += ", or replace it with --force"
            raise self.error(f"{path} exists already; {remedy}")
        folder = path.is_dir() and not path.is_symlink()
        if folder and ((path / self.marker).is_file() or not any(path.iterdir())):
            return
        raise self.error(
            f"{path} exists and is no {self.name}, so --force does not replace it; choose another folder"
        )

    @contextmanager
    def new(self, path: Path, force: bool = False) -> Iterator[Path]:
        """A folder to write into, which takes its place under `path` when the block ends without an error.

        Whatever goes wrong, `path` then is what it was before, and nothing else is left behind.
        """
        path = Path(path)
        self.check_destination(path, force)
        made = [parent for parent in path.absolute().parents if not parent.exists()]
        with contextlib.ExitStack() as stack:
            # Folders that were made for it go when it did not come; those that hold something stay.
            stack.callback(_remove_empty, made)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                draft = stack.enter_context(draft_folder(path))
            except OSError as error:
                raise self.error(f"cannot write to {path.parent}: {error}") from error
            if draft.is_second():
                raise self.error(
                    f"another process is writing {path} now; wait for it, or choose another folder"
                )
            try:
                yield draft.path
                self._publish(draft, path, force)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                # What it names may be the source of a copy.
                raise self.error(
                    f"cannot write {path}: {error.strerror}; make room, or choose another place"
                ) from error

    def _publish(self, draft: Draft, path: Path, force: bool) -> None:
        """Let a finished draft take its place."""
        # Drafts are for their owner alone; these are shared like any other file.
        if not draft.set_mode(0o777 & ~_umask()):
            raise self.error(
                f"somebody else replaced {draft.path} while it was written; choose a folder that only you can write to"
            )
        self.check_destination(path, force)
        if not path.exists():
            draft.path.rename(path)
            return
        try:
            path.rename(draft.replaced)
            draft.path.rename(path)
        except BaseException:
            if not path.exists():
                draft.replaced.rename(path)
            raise
        shutil.rmtree(draft.replaced)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def check_outside(path: Path, folders: Iterable[Path], error: type[QuartermapError]) -> None:
    """Check that what is written to a path does not end up in a bundle, whose manifest knows all of its files.

    Args:
        path: where something is going to be written.
        folders: the bundles.
        error: what is raised if it would.
    """
    place = path.resolve()
    for folder in folders:
        if place.is_relative_to(folder.resolve()):
            raise error(
                f"{path} is in the bundle {folder}, which would be none any more with other files in it; choose a "
                "place outside of it"
            )


def obstacle_to(path: Path) -> str | None:
    """Say what stands in the way of writing to `path`, whose folders need not be there yet; None if nothing does."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        return f"{above} is no folder that you may write to"
    try:
        # Permissions do not tell for the superuser, nor for file systems that hold no files of ours, such as /proc.
        os.rmdir(tempfile.mkdtemp(prefix=f".{path.name}.", dir=above))
    except OSError as error:
        return f"nothing can be written to {above}: {error.strerror}"
    return None


@contextmanager
def folders_for(path: Path) -> Iterator[None]:
    """Make the folders that a file is to lie in. Those that were made go again if the block ends with an error.

    Raises:
        OSError: if they cannot be made.
    """
    made = [parent for parent in path.absolute().parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        _remove_empty(made)
        raise


@contextmanager
def pending_file(path: Path, data: bytes, mode: int | None = None) -> Iterator[None]:
    """Write a file under a temporary name in its folder, and rename it when the block ends without an error.

    Args:
        path: where to; a file that is there is replaced.
        data: its content.
        mode: its permissions; None for those of any new file.

    Raises:
        WriteError: if it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with _writing(path):
            draft, handle = stack.enter_context(draft_file(path))
            wanted = 0o666 & ~_umask() if mode is None else mode
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                if hasattr(os, "fchmod"):
                    os.fchmod(file.fileno(), wanted)
        yield
        with _writing(path):
            os.replace(draft.path, path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """While open, what the system has against writing is an error about the file that was asked for."""
    try:
        yield
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), str(path)) from error


def read_regular(path: Path, most: int, *, follow: bool = True) -> bytes:
    """Return what is in a file that somebody else may have made.

    Args:
        path: the file.
        most: how many bytes it may have.
        follow: whether it may be a link.

    Raises:
        OSError: if it cannot be read, is no plain file (a pipe may never end), is too large, or a link that may be
            none; its `strerror` says which.
    """
    if not follow and path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link", str(path))
    # Opening a pipe waits for somebody who writes into it, unless it is told not to.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    with os.fdopen(descriptor, "rb") as file:
        size = status.st_size
        # Some file systems hold files whose size they do not tell.
        data = b"" if size > most else file.read(size + 1 if size else most + 1)
    if max(size, len(data)) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return data


def write_whole(path: Path, data: bytes, mode: int | None = None) -> None:
    """Write a file so that nobody ever reads half of it; the arguments are those of `pending_file`."""
    with pending_file(path, data, mode):
        pass


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
