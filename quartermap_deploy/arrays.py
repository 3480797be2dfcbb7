"""Arrays from files of others, .npy and .npz: their shape and type are read and bounded before memory is taken."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.archives import ArchiveError, opened_archive

LARGEST_HEADER = 10_000
"""Characters of the head of an array; NumPy's own limit."""
LARGEST_SMALL, LARGEST_RATIO = 256 << 20, 64
"""Bytes that a file of any size may unpack to, and how many times its size a larger one may. Photographs are hardly
compressed at all, drawings by a factor of 20."""
_KINDS = "biufc"


class ArrayError(ValueError):
    """A file of arrays that cannot be read; the message says why."""


@dataclass(frozen=True)
class ArrayFile:
    """An .npz file that is open; nothing of it was unpacked."""

    _archive: zipfile.ZipFile

    @property
    def names(self) -> list[str]:
        """The names of its arrays."""
        return [name.removesuffix(".npy") for name in self._archive.namelist() if name.endswith(".npy")]

    def read(self, name: str) -> NDArray[Any]:
        """Unpack one array.

        Raises:
            ArrayError: if it is none of plain numbers, or is damaged.
        """
        entry = self._archive.getinfo(f"{name}.npy")
        try:
            with self._archive.open(entry) as file:
                return read_array(file, entry.file_size)
        except (zlib.error, zipfile.BadZipFile, NotImplementedError, OSError, EOFError) as error:
            raise ArrayError(f"{name} is damaged: {error}") from error
        except ArrayError as error:
            raise ArrayError(f"{name[:80]}: {error}") from error


@contextmanager
def opened_arrays(path: Path) -> Iterator[ArrayFile]:
    """An .npz file, whose arrays take no more memory than such files honestly do.

    Raises:
        ArrayError: if it is no such file, or would unpack to much more than its own size.
        OSError: if it cannot be read.
    """
    try:
        with opened_archive(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > max(LARGEST_SMALL, LARGEST_RATIO * path.stat().st_size):
                raise ArrayError(
                    f"it would unpack to {unpacked:,} bytes, from a file of {path.stat().st_size:,}; save it with "
                    "numpy.savez, which does not compress"
                )
            yield ArrayFile(archive)
    except ArchiveError as error:
        raise ArrayError(str(error)) from error


def array_of(data: bytes) -> NDArray[Any]:
    """Read an array from the bytes of an .npy file.

    Raises:
        ArrayError: if it is none of plain numbers, or is damaged.
    """
    return read_array(io.BytesIO(data), len(data))


def read_array(file: IO[bytes], size: int) -> NDArray[Any]:
    """Read an array as an .npy file holds it.

    Args:
        file: where it begins.
        size: how many bytes there are.

    Raises:
        ArrayError: if it is none of plain numbers, or they are not as many as it says.
    """
    shape, in_fortran_order, dtype, head = _head(file)
    if dtype.kind not in _KINDS or dtype.hasobject or dtype.subdtype is not None:
        raise ArrayError(f"it holds {printed(dtype)}, expected plain numbers")
    if not all(type(side) is int and side >= 0 for side in shape) or len(shape) > 32:
        raise ArrayError("it has no proper shape")
    if math.prod(shape) * dtype.itemsize != size - head:
        raise ArrayError(f"it has {size - head:,} bytes of numbers, and says that its shape is {shape}")
    flat = np.empty(math.prod(shape), dtype=dtype)
    view = flat.view(np.uint8).data if flat.size else memoryview(b"")
    done = 0
    while done < len(view):
        chunk = file.read(min(1 << 20, len(view) - done))
        if not chunk:
            raise ArrayError("it ends too early")
        view[done : done + len(chunk)] = chunk
        done += len(chunk)
    if dtype.kind == "b" and flat.view(np.uint8).max(initial=0) > 1:
        raise ArrayError("it holds booleans that are neither true nor false")
    try:
        return flat.reshape(shape, order="F" if in_fortran_order else "C")
    except ValueError as error:
        raise ArrayError(f"it has no proper shape: {error}") from error


def printed(dtype: np.dtype[Any]) -> str:
    """A type for a message; that of a record may have a thousand names."""
    return str(dtype)[:80]


def _head(file: IO[bytes]) -> tuple[tuple[Any, ...], bool, np.dtype[Any], int]:
    """Shape, order and type of an array, and how many bytes its head has."""
    counted = _Counted(file)
    readers: dict[tuple[int, int], Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(counted)  # type: ignore[arg-type]
        if version not in readers:
            raise ArrayError(f"it is of version {version} of the format, expected one of plain numbers")
        shape, order, dtype = readers[version](counted, max_header_size=LARGEST_HEADER)
    except ArrayError:
        raise
    except Exception as error:  # the head is read by Python's own parser, which raises errors of many kinds
        raise ArrayError(f"it is no array of NumPy: {' '.join(str(error).split())[:200]}") from error
    return tuple(shape), bool(order), dtype, counted.bytes


class _Counted:
    """A file that counts what was read of it, of which a head cannot ask for more than a head has."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.bytes = file, 0

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, 8 * LARGEST_HEADER))
        self.bytes += len(data)
        return data
