"""Images in folders, as ImageNet-1K is laid out.

    val/n01440764/*.JPEG    a folder for each class, named by synset, by index, or by any name
    val/*_n01440764.JPEG    or one flat folder whose file names hold the synset
    val/labels.csv          or one flat folder, and lines "file,class" for it

Folders named by index say which logit they mean. All other classes are numbered in the order of their names, as
ImageNet-1K numbers its synsets, until a model says that its classes have these names (`Dataset.for_model`). Where the
folders are only some of a model's classes, a list of all of them beside them, one a line in the order of the logits,
tells which: classes.txt, or LOC_synset_mapping.txt, whose lines go on with words.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quartermap_deploy.data.image_files import IMAGE_SUFFIXES
from quartermap_deploy.errors import InputError
from quartermap_deploy.evaluation.datasets import NAMED, Dataset, fingerprint
from quartermap_deploy.reading import ReadingError, read_text

DEFAULT_SPLITS = ("val", "validation", "test")
LABELS_FILE = "labels.csv"
CLASS_LISTS = ("classes.txt", "LOC_synset_mapping.txt")
COMPANIONS = (LABELS_FILE, *CLASS_LISTS)
"""Files that belong to the images of a flat folder and are none of them."""
LARGEST_LIST = 64 << 20
"""Bytes of one of them; a million images and their classes take some 40 MB."""
SHOWN = 3
"""Names in a note; the rest is counted."""
_SYNSET = re.compile(r"(?<![0-9A-Za-z])n\d{8}(?!\d)")
_LARGEST_INDEX = 1_000_000
"""An index beyond it is a name made of digits, such as a date."""


def read_imagefolder(path: Path, split: str | None) -> Dataset:
    """Read a folder of labelled images; none of them is opened.

    Args:
        path: the folder.
        split: a folder in it; None takes one of `DEFAULT_SPLITS` if it is there, or else `path` itself.

    Raises:
        InputError: if the folder cannot be read, or holds no image, or the class of an image is not known.
    """
    folder = _split_folder(path, split)
    try:
        found = _contents(folder)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or folder}: {error.strerror or error}") from error
    if not found.images:
        raise InputError(
            f"{folder} holds no image; expected <class>/*, with files ending in {', '.join(IMAGE_SUFFIXES)}"
            f"{_left_out_text(folder, found.left_out)}"
        )
    numbers, classes, closed = _numbering(folder, path, found.classes)
    named = sorted(found.images, key=lambda item: (numbers[item[1]], item[0]))
    labels = np.array([numbers[name] for _, name in named], dtype=np.int64)
    item_names = [file.relative_to(folder).as_posix() for file, _ in named]
    sizes = np.array([_size(file) for file, _ in named], dtype="<i8")
    return Dataset(
        name=folder.name if folder == path else f"{path.name}, {folder.name}",
        classes=classes,
        labels=labels,
        pictures=[file for file, _ in named],
        item_names=item_names,
        fingerprint=fingerprint(
            b"imagefolder",
            "\0".join(item_names).encode("utf-8", "surrogateescape"),
            labels.astype("<i8").tobytes(),
            sizes.tobytes(),
        ),
        closed=closed,
        guess=_guess(folder, path, classes, closed),
        notes=(
            *_missing_notes(folder, found.missing),
            *_left_out_notes(folder, found.left_out),
        ),
    )


def read_images(path: Path) -> Dataset:
    """Read a folder of images without labels, and the folders in it; none of the images is opened.

    Raises:
        InputError: if the folder cannot be read, or holds no image.
    """
    _require_folder(path)
    try:
        files, left_out = _below(path)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
    if not files:
        raise InputError(
            f"{path} holds no image; expected files ending in {', '.join(IMAGE_SUFFIXES)}"
            f"{_left_out_text(path, left_out)}"
        )
    names = [file.relative_to(path).as_posix() for file in files]
    sizes = np.array([_size(file) for file in files], dtype="<i8")
    return Dataset(
        name=path.name,
        classes=(),
        labels=np.full(len(files), -1, dtype=np.int64),
        pictures=files,
        item_names=names,
        fingerprint=fingerprint(
            b"images", "\0".join(names).encode("utf-8", "surrogateescape"), sizes.tobytes()
        ),
        closed=False,
        notes=_left_out_notes(path, left_out),
    )


@dataclass(frozen=True)
class _Contents:
    """What a folder of labelled images holds.

    Attributes:
        images: (file, class) of each.
        classes: all of them, those without images too: the model has logits for them.
        missing: files that a list of labels names and that are not there.
        left_out: files that are not read, as their kind is not known, or they lie beside class folders.
    """

    images: list[tuple[Path, str]]
    classes: set[str]
    missing: list[str]
    left_out: list[Path]


def _require_folder(path: Path) -> None:
    try:
        if path.is_dir():
            return
        hint = "it is a file" if path.is_file() else "there is no such folder"
    except OSError as error:  # a folder above it may not be entered
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    raise InputError(f"cannot read {path}: {hint}; expected a folder of images")


def _split_folder(path: Path, split: str | None) -> Path:
    _require_folder(path)
    try:
        there = sorted(entry.name for entry in _entries(path) if entry.is_dir())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if split is not None:
        if split not in there:
            raise InputError(
                f"{path} has no part {split!r}; it has {', '.join(there[:8]) or 'no folder'}"
                f"{', …' if len(there) > 8 else ''}"
            )
        return path / split
    chosen = next((name for name in DEFAULT_SPLITS if name in there), None)
    if chosen is not None:
        return path / chosen
    if there == ["train"]:
        raise InputError(
            f"{path} has a part to train on and no other; name it with the split train if you mean it"
        )
    return path


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(
            (entry for entry in entries if not _is_hidden(entry.name)), key=lambda entry: entry.name
        )


def _is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the data's: hidden, or what the archives of macOS put beside it."""
    return name.startswith(".") or name == "__MACOSX"


def _contents(folder: Path) -> _Contents:
    entries = _entries(folder)
    classes = [entry for entry in entries if entry.is_dir()]
    files = [Path(entry.path) for entry in entries if not entry.is_dir()]
    flat = [file for file in files if _is_image(file.name)]
    if not classes:
        named, classes_named, missing = _flat(folder, flat) if flat else ([], set(), [])
        others = [file for file in files if not _is_image(file.name) and file.name not in COMPANIONS]
        return _Contents(named, classes_named, missing, others)
    images: list[tuple[Path, str]] = []
    left_out = flat
    for entry in classes:
        found, others = _below(Path(entry.path))
        images += [(file, entry.name) for file in found]
        left_out = left_out + others
    return _Contents(images, {entry.name for entry in classes}, [], left_out)


def _below(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images in a folder and the folders in it, in order, and the other files; what is hidden is neither."""
    images: list[Path] = []
    others: list[Path] = []
    for above, folders, files in os.walk(folder, onerror=_give):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in sorted(files):
            if not _is_hidden(name):
                (images if _is_image(name) else others).append(Path(above) / name)
    return images, others


def _give(error: OSError) -> None:
    # os.walk would pass over a folder that cannot be read, and the accuracy would be that of another set.
    raise error


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _flat(folder: Path, files: list[Path]) -> tuple[list[tuple[Path, str]], set[str], list[str]]:
    """(file, class) of each image of a folder without class folders, all classes, and files that are not there."""
    labels_file = folder / LABELS_FILE
    if labels_file.is_file():
        return _listed(labels_file, files)
    found = []
    for file in files:
        synsets = _SYNSET.findall(file.stem.replace("_", "-"))
        if len(synsets) != 1:
            raise InputError(
                f"the class of {file} is not known: its images lie in no class folder, its name holds no synset, "
                f'and there is no {LABELS_FILE} with lines "file,class" beside it'
            )
        found.append((file, synsets[0]))
    return found, {name for _, name in found}, []


def _listed(labels_file: Path, files: list[Path]) -> tuple[list[tuple[Path, str]], set[str], list[str]]:
    """As `_flat`, by the list of labels."""
    labels = _read_labels(labels_file)
    names = {name for file in files for name in (file.name, file.stem)}
    # A first line that names no image and no file there is one of headings.
    if (first := next(iter(labels), None)) is not None and first not in names and not _is_image(first):
        del labels[first]
    found = []
    for file in files:
        name = labels.get(file.name) or labels.get(file.stem)
        if name is None:
            raise InputError(
                f"{labels_file} says nothing about {file.name}; add a line, or take the image away"
            )
        found.append((file, name))
    return found, set(labels.values()), [name for name in labels if name not in names]


def _read_labels(path: Path) -> dict[str, str]:
    """Lines "file,class" by file; what follows a class after a blank, as in LOC_val_solution.csv, is left out."""
    try:
        # Spreadsheets write a mark of the encoding first.
        text = read_text(path, LARGEST_LIST, "utf-8-sig")
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except (ReadingError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if bad := next((row for row in rows if len(row) < 2 or not row[1].strip()), None):
        line = ",".join(bad)
        other = next((mark for mark in (";", "\t") if mark in line), None)
        hint = "" if other is None else f", with a comma between them and no {other!r}"
        raise InputError(f'{path} has the line {line!r}; expected "file,class"{hint}')
    return {row[0].strip(): row[1].split()[0] for row in rows}


def _numbering(folder: Path, root: Path, names: set[str]) -> tuple[Mapping[str, int], tuple[str, ...], bool]:
    """The logit of each class, the names of all of them, and whether there are no more."""
    listed = _class_list(folder, root)
    if listed is not None:
        path, classes = listed
        numbers = {name: number for number, name in enumerate(classes)}
        if absent := sorted(names - set(numbers)):
            raise InputError(
                f"{path} does not list the class {absent[0]!r} of {folder}; add it, or take it away"
            )
        return numbers, classes, True
    if all(name.isdecimal() and int(name) <= _LARGEST_INDEX for name in names):
        numbers = {name: int(name) for name in names}
        if len(set(numbers.values())) != len(numbers):
            raise InputError(f"{folder} has two folders for one index: {', '.join(sorted(names))}")
        return numbers, tuple(str(number) for number in range(max(numbers.values()) + 1)), False
    odd = sorted(name for name in names if not name.isdecimal())
    if odd and 2 * len(odd) < len(names):
        raise InputError(
            f"the classes of {folder} are named by numbers, but for {', '.join(odd[:NAMED])}; name all of them by the "
            f"index of their logit, or put a {CLASS_LISTS[0]} beside them, one class a line in the order of logits"
        )
    classes = tuple(sorted(names))
    return {name: number for number, name in enumerate(classes)}, classes, True


def _class_list(folder: Path, root: Path) -> tuple[Path, tuple[str, ...]] | None:
    for path in (place / name for place in dict.fromkeys((folder, root)) for name in CLASS_LISTS):
        if not path.is_file():
            continue
        try:
            text = read_text(path, LARGEST_LIST, "utf-8-sig")
        except (OSError, ReadingError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        words = path.name == CLASS_LISTS[1]
        classes = tuple(line.split()[0] if words else line for line in lines)
        if len(set(classes)) != len(classes) or not classes:
            raise InputError(
                f"{path} names a class twice, or none; expected one class a line, in the order of logits"
            )
        return path, classes
    return None


def _guess(folder: Path, root: Path, classes: tuple[str, ...], closed: bool) -> str | None:
    if (
        not closed
        or all(_SYNSET.fullmatch(name) for name in classes)
        or _class_list(folder, root) is not None
    ):
        return None
    shown = [f"{name} = {number}" for number, name in enumerate(classes[:SHOWN])]
    return (
        f"the classes of {folder} are numbered by name: {', '.join(shown)}{', …' if len(classes) > SHOWN else ''}; "
        f"put a {CLASS_LISTS[0]} beside them if the model counts otherwise"
    )


def _missing_notes(folder: Path, missing: list[str]) -> tuple[str, ...]:
    if not missing:
        return ()
    count = "1 file that is" if len(missing) == 1 else f"{len(missing)} files that are"
    return (f"{folder / LABELS_FILE} names {count} not there: {_named(missing)}",)


def _left_out_notes(folder: Path, left_out: list[Path]) -> tuple[str, ...]:
    loose = [file for file in left_out if _is_image(file.name)]
    others = [file for file in left_out if not _is_image(file.name)]
    kinds = f"is not read, as images end in {', '.join(IMAGE_SUFFIXES)}"
    texts = ((loose, "lies beside the class folders, so its class is not known"), (others, kinds))
    return tuple(
        f"left out of {folder}: {_named([file.relative_to(folder).as_posix() for file in files])}; "
        f"{len(files)} in all, each {text}"
        for files, text in texts
        if files
    )


def _left_out_text(folder: Path, left_out: list[Path]) -> str:
    names = [file.relative_to(folder).as_posix() for file in left_out]
    return f"; found {_named(names)}" if names else ""


def _named(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _size(path: Path) -> int:
    """Size of a file, or -1 if it is gone: then it is a broken image, not a broken set."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
