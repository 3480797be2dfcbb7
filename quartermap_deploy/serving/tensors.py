"""Tensors of the protocol: element types, shapes, and values as raw bytes and as JSON.

Raw values are little-endian, row after row; of a string, its length in four bytes and then itself.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.serving.refusal import Refusal, invalid, shown

BYTES = "BYTES"
_NUMBERS: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    **{f"UINT{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    **{f"INT{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_NAMES = {element.name: name for name, element in _NUMBERS.items()}
_KINDS = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}
"""Kinds of NumPy's numbers that numbers of a kind may be written as in JSON."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model.

    Attributes:
        name: its name.
        datatype: "BYTES", or a type of numbers such as "FP32", "INT64" or "BOOL".
        shape: its sizes; -1 for an open one. An open first one is the batch.
        optional_sides: how many of the last sizes may be left out, each of them 1.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional_sides: int = 0

    def check(self, datatype: object, shape: object, max_batch: int) -> tuple[int, ...]:
        """Check what a request says about this input, before any of its values are read.

        Args:
            datatype: what the request says.
            shape: likewise.
            max_batch: the largest batch, where that is open.

        Returns:
            The shape.

        Raises:
            Refusal: if the model does not take it.
        """
        if datatype != self.datatype:
            raise invalid(f"input {self.name!r} is {shown(datatype)}, the model takes {self.datatype}")
        sizes = _sizes(self.name, shape)
        takes = [self.shape[: len(self.shape) - cut] for cut in range(self.optional_sides + 1)]
        if not any(_fits(sizes, expected) for expected in takes):
            raise invalid(
                f"input {self.name!r} has shape {shown(list(sizes))}, the model takes {list(self.shape)}, where -1 "
                "is any size"
            )
        if not self.shape or self.shape[0] != -1:
            return sizes
        if sizes[0] == 0:
            raise invalid(f"input {self.name!r} is an empty batch; send at least one image")
        if sizes[0] > max_batch:
            raise invalid(
                f"input {self.name!r} is a batch of {sizes[0]}, at most {max_batch} are taken at once"
            )
        return sizes


def datatype_of(element_type: str) -> str | None:
    """The protocol's name of one of NumPy's element types, such as float32; None where it has none."""
    return _NAMES.get(element_type)


def element_type_of(datatype: str) -> np.dtype[Any]:
    """The element type of numbers."""
    return _NUMBERS[datatype]


def datatype_of_values(values: NDArray[Any]) -> str:
    """The protocol's name for what is in an array of an answer: numbers, or strings."""
    return BYTES if values.dtype == object else _NAMES[values.dtype.name]


def count_of(shape: Sequence[int]) -> int:
    """How many values a shape has."""
    # Not np.prod, which overflows without a word.
    count = 1
    for size in shape:
        count *= size
    return count


def from_raw(spec: TensorSpec, shape: tuple[int, ...], data: memoryview) -> NDArray[Any]:
    """Read raw values.

    Raises:
        Refusal: if their number does not fit the shape, or if one is NaN or infinite, or neither true nor false.
    """
    if spec.datatype == BYTES:
        return _strings(list(_split(spec.name, data, count_of(shape))), shape)
    element = _NUMBERS[spec.datatype]
    expected = count_of(shape) * element.itemsize
    if len(data) != expected:
        raise invalid(
            f"input {spec.name!r} has {len(data)} bytes, its shape {list(shape)} of {spec.datatype} needs {expected}"
        )
    if element.kind == "b" and np.frombuffer(data, dtype=np.uint8).max(initial=0) > 1:
        raise invalid(
            f"input {spec.name!r} has bytes that are neither 0 nor 1, which is what BOOL is made of"
        )
    return _finite(spec.name, np.frombuffer(data, dtype=element).reshape(shape))


def from_json(spec: TensorSpec, shape: tuple[int, ...], data: object) -> NDArray[Any]:
    """Read values as JSON has them, in one list or in lists that are nested as the shape; strings are base64.

    Raises:
        Refusal: if they are no such values, their number does not fit the shape, or a number is NaN or infinite.
    """
    if not isinstance(data, list):
        raise invalid(f"the data of input {spec.name!r} is no list")
    if spec.datatype == BYTES:
        nested = any(isinstance(item, list) for item in data)
        items = _rows(spec.name, data, shape) if nested else data
        return from_strings(spec, shape, [_base64(spec.name, item) for item in items])
    try:
        # Without an element type, so that text does not become numbers.
        values = np.asarray(data)
    except (ValueError, OverflowError):
        values = np.empty(0, dtype=object)
    kinds = _KINDS[_NUMBERS[spec.datatype].kind]
    if values.dtype.kind not in kinds:
        what = {"b": "true and false", "iu": "whole numbers", "iuf": "numbers"}[kinds]
        raise invalid(
            f"the data of input {spec.name!r} has something other than {what}, or rows of unequal length"
        )
    if values.ndim > 1 and values.shape != shape:
        raise _other_nesting(spec.name, values.shape, shape)
    return from_values(spec, shape, values)


def from_values(spec: TensorSpec, shape: tuple[int, ...], values: NDArray[Any]) -> NDArray[Any]:
    """Read numbers of any type.

    Raises:
        Refusal: if their number does not fit the shape, or one is NaN or infinite in the type of the input, or out of
            the range of its whole numbers.
    """
    if values.size != count_of(shape):
        raise invalid(
            f"input {spec.name!r} has {values.size} values, its shape {list(shape)} needs {count_of(shape)}"
        )
    element = _NUMBERS[spec.datatype]
    if element.kind in "iu" and values.size:
        limits = np.iinfo(element)
        smallest, largest = int(values.min()), int(values.max())
        if smallest < limits.min or largest > limits.max:
            raise invalid(
                f"input {spec.name!r} has values from {smallest} to {largest}; {spec.datatype} holds {limits.min} to "
                f"{limits.max}"
            )
    with np.errstate(over="ignore"):
        return _finite(spec.name, values.astype(element).reshape(shape))


def from_strings(
    spec: TensorSpec, shape: tuple[int, ...], strings: Sequence[bytes | bytearray]
) -> NDArray[Any]:
    """Read strings.

    Raises:
        Refusal: if their number does not fit the shape.
    """
    if len(strings) != count_of(shape):
        raise invalid(
            f"input {spec.name!r} has {len(strings)} strings, its shape {list(shape)} needs {count_of(shape)}"
        )
    return _strings(strings, shape)


def to_raw(values: NDArray[Any]) -> bytes:
    """Write values as raw bytes."""
    if values.dtype == object:
        return b"".join(struct.pack("<I", len(item)) + item for item in values.reshape(-1))
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def to_json(values: NDArray[Any]) -> list[Any]:
    """Write values as one list for JSON; strings are text."""
    if values.dtype == object:
        return [item.decode() for item in values.reshape(-1)]
    items: list[Any] = values.reshape(-1).tolist()
    return items


def _sizes(name: str, shape: object) -> tuple[int, ...]:
    whole = isinstance(shape, Sequence) and not isinstance(shape, (str, bytes))
    if not whole or not all(type(size) is int and 0 <= size < 1 << 31 for size in shape):  # type: ignore[attr-defined]
        raise invalid(
            f"the shape of input {name!r} is {shown(shape)}; expected a list of whole numbers from 0 to 2^31 - 1"
        )
    return tuple(shape)  # type: ignore[arg-type]


def _fits(sizes: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    # Only the batch may be 0, which has a message of its own.
    return len(sizes) == len(expected) and all(
        size == own or (own == -1 and (axis == 0 or size > 0))
        for axis, (size, own) in enumerate(zip(sizes, expected, strict=True))
    )


def _finite(name: str, values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise invalid(f"input {name!r} has values that are NaN or infinite")
    return values


def _strings(strings: Iterable[bytes | bytearray], shape: tuple[int, ...]) -> NDArray[Any]:
    # One by one: NumPy would look into the strings, and drop the zeros at their ends.
    items = list(strings)
    values = np.empty(len(items), dtype=object)
    for place, item in enumerate(items):
        values[place] = item
    return values.reshape(shape)


def _split(name: str, data: memoryview, count: int) -> Iterator[bytes]:
    """Cut raw strings apart."""
    position = 0
    for _ in range(count):
        if position + 4 > len(data):
            raise invalid(f"input {name!r} ends before its {count} strings do")
        (length,) = struct.unpack_from("<I", data, position)
        position += 4
        if position + length > len(data):
            raise invalid(
                f"a string of input {name!r} claims {length} bytes, and {len(data) - position} are left"
            )
        yield bytes(data[position : position + length])
        position += length
    if position != len(data):
        raise invalid(f"input {name!r} goes on for {len(data) - position} bytes behind its {count} strings")


def _rows(name: str, data: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """Return what is in lists that are nested as a shape."""
    items, sizes = data, [len(data)]
    for _ in shape[1:]:
        lengths = {len(item) if isinstance(item, list) else -1 for item in items}
        if len(lengths) != 1 or -1 in lengths:
            raise invalid(f"the data of input {name!r} has rows of unequal length")
        sizes.append(lengths.pop())
        items = [value for item in items for value in item]
    if tuple(sizes) != shape:
        raise _other_nesting(name, sizes, shape)
    return items


def _other_nesting(name: str, found: Sequence[int], shape: tuple[int, ...]) -> Refusal:
    return invalid(
        f"the data of input {name!r} is nested as {shown(list(found))}, and its shape is {list(shape)}; nest it as "
        "the shape, or send one flat list"
    )


def _base64(name: str, item: object) -> bytes:
    try:
        if isinstance(item, str):
            return base64.b64decode(item, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise invalid(
        f"the data of input {name!r} is not base64; send files as base64, or as binary data behind the JSON"
    )
