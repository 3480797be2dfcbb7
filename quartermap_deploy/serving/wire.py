"""What a message of gRPC would take in memory, known before it is parsed.

An empty message in a message takes two bytes on the wire and a hundred in memory, a small number one and eight: 64 MiB
of either are gigabytes, for which everybody waits. So the fields of a message are counted first, without a look at what
is in them.
"""

from __future__ import annotations

from typing import Any

from quartermap_deploy.serving.refusal import Refusal, invalid

MOST_FIELDS = 1024
"""Fields of a message and of those in it; one with a batch of files has one for each file."""
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_WIDEST = 8
"""Bytes of a number in memory that may have one on the wire."""
_SMALL = (3, 4, 5, 8, 13)
"""Types of these: int64, uint64, int32, bool and uint32, by protobuf's numbers."""


def size_in_memory(data: bytes, message: Any) -> int:
    """Return how many bytes the fields of a message take at most.

    Args:
        data: the message as it came.
        message: the class of the message.

    Raises:
        Refusal: if it is no message, or has too many fields.
    """
    try:
        _, size = _walk(memoryview(data), message.DESCRIPTOR, MOST_FIELDS)
    except (IndexError, ValueError):
        raise invalid(f"the message of {len(data)} bytes cannot be read") from None
    return size


def _walk(data: memoryview, descriptor: Any, left: int) -> tuple[int, int]:
    """Return how many fields are left of the most, and the size."""
    position, size, fields = 0, 0, descriptor.fields_by_number
    while position < len(data):
        left -= 1
        if left < 0:
            raise Refusal(
                413, f"the message has more than {MOST_FIELDS:,} fields; send fewer values, or raw ones"
            )
        tag, position = _varint(data, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, position = _varint(data, position)
            continue
        if kind in (_EIGHT_BYTES, _FOUR_BYTES):
            position += 8 if kind == _EIGHT_BYTES else 4
            continue
        if kind != _LENGTH:
            raise ValueError("a group, which nobody writes any more")
        length, start = _varint(data, position)
        position = start + length
        if position > len(data):
            raise ValueError("a field goes on behind the end")
        field = fields.get(number)
        if field is not None and field.message_type is not None:
            left, inside = _walk(data[start:position], field.message_type, left)
            size += inside
        else:
            size += length * (_WIDEST if field is not None and field.type in _SMALL else 1)
    return left, size


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """Read a number of variable length; returns it, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number of more than ten bytes")
