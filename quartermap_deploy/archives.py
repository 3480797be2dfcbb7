"""Zip files of others, whose entries are looked at before anything of them is unpacked."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LARGEST_DIRECTORY = 16 << 20
"""Bytes of the list of entries; an entry takes about a hundred there, and six times as many in Python."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 1
_DAMAGE = (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, OverflowError, UnicodeDecodeError)
"""What Python's reader raises on damaged files."""


class ArchiveError(ValueError):
    """A zip file that cannot be read, or is none; the message says why."""


class _Guarded:
    """A file whose reads are bounded while the list of entries is read, which zipfile reads at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.guarded = file, True

    def read(self, size: int = -1) -> bytes:
        if not self.guarded:
            return self._file.read(size)
        if size > LARGEST_DIRECTORY:
            raise ArchiveError(f"its list of entries has {size:,} bytes")
        return self._file.read(LARGEST_DIRECTORY if size < 0 else size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def is_archive(file: Path | IO[bytes]) -> bool:
    """Whether a file is a zip file, whole or damaged.

    Raises:
        OSError: if it cannot be read.
    """
    try:
        return zipfile.is_zipfile(file)
    except _DAMAGE:
        return True


@contextmanager
def opened_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip file whose entries have different names, and are neither encrypted nor packed in an unusual way.

    What Python's reader makes of a damaged file while it is open becomes an `ArchiveError` too.

    Raises:
        ArchiveError: if it is no such file.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        if not is_archive(file):
            raise ArchiveError("it is no archive")
        guarded = _Guarded(file)
        try:
            with zipfile.ZipFile(guarded) as archive:
                guarded.guarded = False
                _check_entries(archive)
                yield archive
        except _DAMAGE as error:
            raise ArchiveError(str(error)) from error


def _check_entries(archive: zipfile.ZipFile) -> None:
    names: set[str] = set()
    for entry in archive.infolist():
        if entry.filename in names:
            raise ArchiveError(f"it has two entries {entry.filename[:80]!r}")
        if entry.flag_bits & _ENCRYPTED or entry.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise ArchiveError(
                f"its entry {entry.filename[:80]!r} is packed in another way than zip files are"
            )
        names.add(entry.filename)


def stored_places(archive: zipfile.ZipFile) -> dict[str, tuple[int, int]]:
    """Where entries that are not compressed lie in the file: by name, their first byte and how many they have.

    Raises:
        ArchiveError: if one is compressed, or lies outside the file.
    """
    places = {}
    file = archive.fp
    assert file is not None
    end = file.seek(0, 2)
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ArchiveError(f"its entry {entry.filename[:80]!r} is compressed")
        file.seek(entry.header_offset)
        head = file.read(_LOCAL_HEADER.size)
        if len(head) != _LOCAL_HEADER.size or not head.startswith(b"PK\3\4"):
            raise ArchiveError(f"its entry {entry.filename[:80]!r} is not where its list says")
        _, name, extra = _LOCAL_HEADER.unpack(head)
        start = entry.header_offset + _LOCAL_HEADER.size + name + extra
        if start + entry.file_size > end:
            raise ArchiveError(f"its entry {entry.filename[:80]!r} ends after the file does")
        places[entry.filename] = start, entry.file_size
    return places
