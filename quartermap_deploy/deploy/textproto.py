"""Protocol buffers' text format, as Triton's `config.pbtxt` is written in, from plain values.

Written here because the generated classes of Triton's model configuration come with its client alone, which nobody
needs in order to write one. The tests read what is written with those classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


class Enum(str):
    """The name of an enumeration's value, which stands without quotes."""


def textproto(message: Mapping[str, Any]) -> str:
    """Return a message as text.

    Args:
        message: fields by name: strings, `Enum`s, booleans, whole numbers, messages, and lists of them for repeated
            fields. A map is a list of messages with `key` and `value`. A None leaves its field out.
    """
    return "".join(f"{line}\n" for line in _fields(message, ""))


def string_map(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a map field, in the order of its keys."""
    return [{"key": key, "value": value} for key, value in sorted(values.items())]


def _fields(message: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in message.items():
        items = value if isinstance(value, list) else [] if value is None else [value]
        messages = [item for item in items if isinstance(item, Mapping)]
        for item in messages:
            yield f"{indent}{name} {{"
            yield from _fields(item, f"{indent}  ")
            yield f"{indent}}}"
        if items and not messages:
            scalars = ", ".join(map(_scalar, items))
            yield f"{indent}{name}: [{scalars}]" if isinstance(value, list) else f"{indent}{name}: {scalars}"


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, str):
        # JSON's escapes are read by the text format too, as long as nothing but ASCII needs them.
        return json.dumps(value, ensure_ascii=False)
    assert isinstance(value, int), f"no field of a model configuration takes a {type(value).__name__}"
    return str(value)
