"""Changes to what others own, each with its way back.

A place (a dictionary's item, a function's code, an attribute) may be changed by several owners at once: blocks may be
nested, and threads may open and close theirs in any order. The change that came last is in force, and when the last
owner lets go, the place is what it was.
"""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any, Protocol

_MISSING = object()


class Place(Protocol):
    """Somewhere a value is held."""

    @property
    def key(self) -> Hashable:
        """What tells this place from all others."""

    def read(self) -> Any:
        """Return the value, or raise KeyError or AttributeError where there is none."""

    def write(self, value: Any) -> None:
        """Put a value in."""

    def clear(self) -> None:
        """Leave the place without a value."""


@dataclass(frozen=True, eq=False)
class Item:
    """An item of a dictionary: the globals of a module, `sys.modules`."""

    mapping: MutableMapping[str, Any]
    name: str

    @property
    def key(self) -> Hashable:
        """The dictionary by its identity, and the name."""
        return id(self.mapping), self.name

    def read(self) -> Any:
        """Return the item."""
        return self.mapping[self.name]

    def write(self, value: Any) -> None:
        """Set the item."""
        self.mapping[self.name] = value

    def clear(self) -> None:
        """Delete the item, if it is still there."""
        self.mapping.pop(self.name, None)


@dataclass(frozen=True, eq=False)
class Code:
    """The code of a function: every name the function goes by, in whatever module, follows."""

    function: FunctionType

    @property
    def key(self) -> Hashable:
        """The function by its identity."""
        return id(self.function)

    def read(self) -> CodeType:
        """Return the code."""
        return self.function.__code__

    def write(self, value: CodeType) -> None:
        """Set the code; its number of free variables must be that of the function."""
        self.function.__code__ = value

    def clear(self) -> None:
        """Never called: a function always has code."""
        raise AssertionError("a function always has code")


@dataclass
class _Change:
    place: Place
    original: Any
    values: list[tuple[object, Any, Any]] = field(default_factory=list)


class Patches:
    """The places that are changed now. Not locked: its user does."""

    def __init__(self) -> None:
        self._changes: dict[Hashable, _Change] = {}

    def put(self, owner: object, place: Place, value: Any, needs: Any = None) -> None:
        """Change a place for an owner until `release`; `needs` is kept alive as long.

        What the same owner changed there before is forgotten.
        """
        change = self._changes.get(place.key)
        if change is None:
            try:
                original = place.read()
            except (KeyError, AttributeError):
                original = _MISSING
            change = self._changes[place.key] = _Change(place, original)
        place.write(value)
        change.values = [item for item in change.values if item[0] is not owner] + [(owner, value, needs)]

    def share(self, owner: object, place: Place) -> None:
        """Let a change that another owner made last until this one lets go, too."""
        values = self._changes[place.key].values
        if all(item[0] is not owner for item in values):
            values.append((owner, *values[-1][1:]))

    def holds(self, place: Place) -> bool:
        """Return whether anybody has changed a place."""
        return place.key in self._changes

    def release(self, owner: object) -> None:
        """Take back all that an owner changed, the last first."""
        for key, change in reversed(list(self._changes.items())):
            kept = [item for item in change.values if item[0] is not owner]
            if len(kept) == len(change.values):
                continue
            change.values = kept
            if kept:
                change.place.write(kept[-1][1])
                continue
            del self._changes[key]
            if change.original is _MISSING:
                change.place.clear()
            else:
                change.place.write(change.original)
