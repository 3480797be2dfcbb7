"""Names of classes."""

from __future__ import annotations

from pathlib import Path

from quartermap_deploy.errors import InputError


def read_labels(path: Path | None, classes: int) -> tuple[str, ...]:
    """Return the names of a model's classes.

    Args:
        path: a file with the name of a class on each line; None names them by their numbers, from 0.
        classes: how many there are.

    Raises:
        InputError: if the file cannot be read, or has not one name for each class.
    """
    if path is None:
        return tuple(map(str, range(classes)))
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the labels {path} cannot be read: {error}") from error
    names = tuple(line.strip() for line in lines)
    if len(names) != classes or not all(names):
        raise InputError(
            f"the labels {path} have {len(names)} lines, {sum(map(bool, names))} of them not empty; expected one for "
            f"each of {classes} classes"
        )
    return names
