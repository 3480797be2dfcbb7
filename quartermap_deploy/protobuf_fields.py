"""Messages as protobuf writes them, field by field, without their definitions and without copies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Malformed(Exception):
    """A file that is no protobuf, or departs from what any writer makes; the message says how."""


Fields = Iterator[tuple[int, Any]]
"""The number of each field, and an int or its bytes."""


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place >= len(data) or shift > 63:
            raise Malformed("a number in it has no end")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7


def fields_of(data: memoryview) -> Fields:
    """The fields of a message: their numbers, and an int or the bytes of each."""
    place, end = 0, len(data)
    while place < end:
        key = data[place]
        if key < 0x80:
            place += 1
        else:
            key, place = _varint(data, place)
            if key >> 32:
                # Some readers drop the bits above, and find another field than is seen here.
                raise Malformed("it has a field of an unknown kind")
        kind = key & 7
        if kind == 2:
            size, place = _varint(data, place)
            if place + size > end:
                raise Malformed("a field of it ends after the file does")
            yield key >> 3, data[place : place + size]
            place += size
        elif kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
            if place > end:
                raise Malformed("a field of it ends after the file does")
            yield key >> 3, data[place - (8 if kind == 1 else 4) : place]
        else:
            raise Malformed("it has a field of an unknown kind")


def message_of(value: Any) -> memoryview:
    """The bytes of a message."""
    if not isinstance(value, memoryview):
        raise Malformed("it has a number where a message belongs")
    return value


def text_of(value: Any) -> str:
    """A text; what is no UTF-8 in it is replaced."""
    return bytes(message_of(value)).decode("utf-8", "replace")


def number_of(value: Any) -> int:
    """A signed whole number of 64 bits."""
    if not isinstance(value, int):
        raise Malformed("it has a message where a number belongs")
    low: int = value & (1 << 64) - 1
    return low - (1 << 64) if low >> 63 else low


def numbers_of(value: Any) -> list[int]:
    """Whole numbers: one, or as many as there are packed together."""
    if isinstance(value, int):
        return [number_of(value)]
    found, place = [], 0
    while place < len(value):
        number, place = _varint(value, place)
        found.append(number_of(number))
    return found


def text_in(data: memoryview, wanted: int) -> str:
    """The text of one field of a message; the last one, as protobuf takes it."""
    name = ""
    for number, value in fields_of(data):
        if number == wanted:
            name = text_of(value)
    return name
