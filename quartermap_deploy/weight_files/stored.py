"""Tensors as a file describes them: of which type and shape, and where in the file their numbers lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_AXES = 64


class WeightsError(ValueError):
    """A file of weights that cannot be read; the message says why."""


class CodeError(WeightsError):
    """A file that names something of a running program; the message is its name, empty if there is none."""


# The three below are tuples, and no dataclasses: a pickle may write into the fields of an object that has any.


class Storage(NamedTuple):
    """Numbers in a row, of which tensors are views.

    Attributes:
        key: its name in the file.
        dtype: what its numbers are; None where they are bytes, and the tensor says of what.
        start: where it begins in what has this name, in bytes.
        bytes: how long it is.
    """

    key: str
    dtype: torch.dtype | None
    start: int
    bytes: int


class StoredTensor(NamedTuple):
    """A tensor in a file, as `stored_tensor` makes it.

    Attributes:
        storage: its numbers.
        dtype: their type.
        offset: of its first number in the storage, in numbers.
        shape: its sizes.
        stride: how many numbers lie between neighbours of each axis.
    """

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """How many bytes it takes in memory, once it is copied."""
        return math.prod(self.shape) * self.dtype.itemsize


class OtherTensor(NamedTuple):
    """A tensor that is no weight; its kind is for messages."""

    kind: str


def stored_tensor(
    storage: object, dtype: object, offset: object, shape: object, stride: object
) -> StoredTensor:
    """Make a `StoredTensor` of what a file says.

    Raises:
        WeightsError: if it is none, or has a number outside of its storage.
    """
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise WeightsError("it holds a tensor without numbers")
    if not isinstance(shape, (tuple, list)) or not isinstance(stride, (tuple, list)):
        raise WeightsError("it holds a tensor without a shape")
    if not len(shape) == len(stride) <= MOST_AXES:
        raise WeightsError("it holds a tensor without a proper shape")
    sizes: tuple[Any, ...] = tuple(shape)
    steps: tuple[Any, ...] = tuple(stride)
    if not all(type(value) is int and 0 <= value < 1 << 62 for value in (offset, *sizes, *steps)):
        raise WeightsError("it holds a tensor without a proper shape")
    found = StoredTensor(storage, dtype, offset, sizes, steps)  # type: ignore[arg-type]
    last = sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    end = 0 if 0 in sizes else found.offset + last + 1
    if end * dtype.itemsize > storage.bytes:
        raise WeightsError("it holds a tensor with numbers outside of the file")
    return found


@dataclass(frozen=True)
class Content:
    """What a file of `torch.save` holds, with `StoredTensor` in the place of tensors.

    Attributes:
        path: the file.
        values: what was saved.
        places: where storages lie, by their keys: the first byte, and how many there are.
    """

    path: Path
    values: Any
    places: Mapping[str, tuple[int, int]]

    def tensors(self, state: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
        """Map tensors of the file into memory: nothing of them is read before it is used.

        Raises:
            WeightsError: if they would take much more memory than the file, as views of the same numbers do.
        """
        size = self.path.stat().st_size
        # What has two names is stored once, and small buffers may be one number, expanded.
        if (needed := sum(tensor.bytes for tensor in state.values())) > 4 * size + (64 << 20):
            raise WeightsError(
                f"its tensors would have {needed:,} bytes in memory, in a file of {size:,}: they are expanded from "
                "fewer numbers"
            )
        whole: Any = torch.UntypedStorage.from_file(str(self.path), False, size)
        return {key: self._tensor(whole, tensor) for key, tensor in state.items()}

    def _tensor(self, whole: Any, described: StoredTensor) -> Tensor:
        storage = described.storage
        start = self.places[storage.key][0] + storage.start
        part = whole[start : start + storage.bytes]
        if start % described.dtype.itemsize:
            # Kernels want numbers at multiples of their size.
            part = part.clone()
        empty = torch.empty(0, dtype=described.dtype)
        return empty.set_(part, described.offset, described.shape, described.stride)
