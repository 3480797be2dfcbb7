"""Names of classes: those that come with the package, and files of users.

Both are text files with the name of a class on each line, in the order of a model's outputs. `models/labels/` holds
ImageNet's 1,000 (the first of WordNet's words for each, told apart where two are equal), the ten digits, and those of
the twelve 2D sets of MedMNIST.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from quartermap_deploy.data.shipped import models_directory
from quartermap_deploy.errors import InputError
from quartermap_deploy.reading import ReadingError, read_text

LARGEST = 16 << 20
"""Bytes of a file of class names; those of ImageNet-21K take 0.5 MB."""


def label_sets() -> tuple[str, ...]:
    """Return the names of the sets of class names that come with the package."""
    return tuple(sorted(path.stem for path in _folder().glob("*.txt")))


@functools.cache
def shipped_labels(name: str) -> tuple[str, ...]:
    """Return the class names of one of `label_sets()`."""
    return tuple((_folder() / f"{name}.txt").read_text(encoding="utf-8").splitlines())


def read_labels(
    given: str | PathLike[str] | None, classes: int, default: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the names of a model's classes.

    Args:
        given: one of `label_sets()`, or a file with the name of a class on each line. A file with the name of a set is
            told by its folder, as in ./imagenet.
        classes: how many there are.
        default: the names where none are given, as a model's card has them. They are taken if there is one for each
            class; otherwise numbers are, from 0.

    Raises:
        InputError: if the file cannot be read, or has not one name for each class, each different.
    """
    if given is None:
        return tuple(default) if len(default) == classes else tuple(map(str, range(classes)))
    if (name := str(given)) in label_sets():
        return check_labels(shipped_labels(name), classes, f"the labels {name!r}")
    try:
        # Editors on Windows begin a file with a mark, which is no part of the first name.
        lines = read_text(Path(given), LARGEST, "utf-8-sig").splitlines()
    except FileNotFoundError:
        raise InputError(
            f"the labels {given} cannot be read: there is no such file, nor a set of that name among "
            f"{', '.join(label_sets())}"
        ) from None
    except ReadingError as error:
        raise InputError(f"the labels {given} cannot be read: {error}") from error
    return check_labels([line.strip() for line in lines], classes, f"the labels {given}", "line")


def check_labels(names: object, classes: int, source: str, unit: str = "name") -> tuple[str, ...]:
    """Return names of classes as a tuple.

    Args:
        names: a list or tuple.
        classes: how many there have to be.
        source: where they come from, in the plural, for messages.
        unit: what holds one name, for messages.

    Raises:
        InputError: if they are no list of texts, not one for each class, or not different, or if one is empty or cannot
            be printed on a line.
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{source} are {names!r}; expected a list of texts")
    if len(names) != classes or not all(names):
        fitting = [name for name in label_sets() if len(shipped_labels(name)) == classes]
        hint = f" ({', '.join(fitting)} would fit)" if fitting else ""
        raise InputError(
            f"{source} have {len(names)} {unit}s, {sum(map(bool, names))} of them not empty; expected one for each of "
            f"{classes} classes{hint}"
        )
    places: dict[str, int] = {}
    for place, name in enumerate(names, 1):
        if not name.isprintable():
            raise InputError(f"{source} have characters that cannot be printed in {unit} {place}: {name!r}")
        if name in places:
            raise InputError(
                f"{source} have {name!r} twice, in {unit}s {places[name]} and {place}; give each class its own name"
            )
        places[name] = place
    return tuple(names)


def _folder() -> Path:
    return models_directory() / "labels"


def class_names(
    given: str | PathLike[str] | Sequence[str] | None, classes: int, default: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the names of a model's classes, or nothing where nobody knows them.

    Args:
        given: as for `read_labels`, or the names themselves.
        classes: how many there are.
        default: the names where none are given; they are taken if there is one for each class.

    Raises:
        InputError: as `read_labels` and `check_labels` say.
    """
    if given is None:
        return tuple(default) if len(default) == classes else ()
    if isinstance(given, (list, tuple)):
        return check_labels(given, classes, "the labels")
    return read_labels(given, classes)  # type: ignore[arg-type]
