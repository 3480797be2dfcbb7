"""Labelled sets of images, as the evaluation reads them; `formats.py` opens them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.data.images import ImageLike
from quartermap_deploy.errors import InputError

NAMED = 12
"""Classes that a message names where there are more."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with their classes.

    Attributes:
        name: for people, as "digits, held_out".
        classes: names of the classes, in the order of the model's logits; none without labels.
        labels: (n) of int64, positions in `classes`; -1 without labels.
        pictures: n images as `data.images.prepare` takes them.
        item_names: a name for each image; None numbers them.
        fingerprint: hash that another set, or the same images in another order, does not have.
        closed: whether `classes` are all that there are; where they are known by their index alone, a model may have
            more.
        guess: how the classes were numbered where nothing says how the model counts them, in a line; None where that is
            known. `for_model` settles it for a model whose classes have names.
        notes: what else has to be known before numbers that were measured on it are believed, a line each.
    """

    name: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    pictures: Sequence[ImageLike] | NDArray[np.uint8]
    item_names: Sequence[str] | None
    fingerprint: str
    closed: bool = True
    guess: str | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        """Whether the classes of the images are known."""
        return bool(self.classes)

    @property
    def warnings(self) -> tuple[str, ...]:
        """All that has to be known before numbers that were measured on it are believed, a line each."""
        return self.notes if self.guess is None else (self.guess, *self.notes)

    def image(self, index: int) -> ImageLike:
        """Return an image as `data.images.prepare` takes it."""
        return self.pictures[index]

    def item_name(self, index: int) -> str:
        """Return the name of an image."""
        return f"image {index}" if self.item_names is None else self.item_names[index]

    def subset(self, indices: Iterable[int] | NDArray[np.int64]) -> Dataset:
        """Return the images at these positions, in this order, with the same classes.

        Raises:
            InputError: if there is no such position.
        """
        chosen = np.asarray(list(indices), dtype=np.int64)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= len(self)):
            outside = chosen[(chosen < 0) | (chosen >= len(self))][0]
            raise InputError(f"{self.name} has images 0 to {len(self) - 1}, found {outside}")
        return Dataset(
            name=f"{self.name}, {len(chosen)} of {len(self)}",
            classes=self.classes,
            labels=self.labels[chosen],
            pictures=self.pictures[chosen]
            if isinstance(self.pictures, np.ndarray)
            else [self.pictures[index] for index in chosen],
            item_names=[self.item_name(int(index)) for index in chosen],
            fingerprint=fingerprint(self.fingerprint.encode(), chosen.astype("<i8").tobytes()),
            closed=self.closed,
            guess=self.guess,
            notes=self.notes,
        )

    def sample(self, count: int, seed: int = 0) -> Dataset:
        """Return `count` images drawn without replacement, in the order of the set; all of them if it has no more."""
        if count >= len(self):
            return self
        # The legacy generator: NumPy promises never to change its stream.
        return self.subset(np.sort(np.random.RandomState(seed).permutation(len(self))[:count]))

    def for_model(self, num_classes: int, names: Sequence[str] = ()) -> Dataset:
        """Return the set with its classes as a model counts and calls them, after a check that they fit.

        Classes whose numbers were a guess are found by their names among the model's, whatever case and underscores
        they are written in. Classes that are known by their index alone get the model's names.

        Args:
            num_classes: how many the model tells apart.
            names: what it calls them; nothing if that is not known.

        Raises:
            InputError: if the number of classes differs, a label is outside the model's, or only some of the classes
                have names of the model's.
        """
        found = self
        if self.guess is not None and names:
            found = self._numbered_by(names)
        found.check_classes(num_classes)
        indices = tuple(map(str, range(len(found.classes))))
        if names and found.classes == indices:
            return dataclasses.replace(found, classes=tuple(names[: len(indices)]))
        return found

    def _numbered_by(self, names: Sequence[str]) -> Dataset:
        """The set with its classes numbered as the names of a model's are, if they are called so."""
        places = {_plain(name): place for place, name in enumerate(names)}
        numbers = [places.get(_plain(name)) for name in self.classes]
        if all(number is None for number in numbers) or len(places) < len(names):
            return self
        if None in numbers:
            other = self.classes[numbers.index(None)]
            shown = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
            raise InputError(
                f"some classes of {self.name} have names of the model's classes, but {other!r} is none of them; "
                f"expected {shown}: rename it, or give the names of the model's classes with --labels"
            )
        labels = np.array(numbers, dtype=np.int64)[self.labels]
        return dataclasses.replace(
            self,
            classes=tuple(names),
            labels=labels,
            fingerprint=fingerprint(self.fingerprint.encode(), labels.astype("<i8").tobytes()),
            guess=None,
        )

    def check_classes(self, num_classes: int) -> None:
        """Check that a model with so many classes can be evaluated on this set, if it has labels.

        Raises:
            InputError: if the number of classes differs, or a label is outside the model's.
        """
        own = len(self.classes)
        if not self.labelled or own == num_classes or (not self.closed and own < num_classes):
            return
        remedy = "take the data that the model was trained for, or the model that was trained for this data"
        if own > num_classes and self.classes == tuple(map(str, range(own))):
            largest = int(self.labels.max(initial=-1))
            # The largest class may have no image in this part.
            found = f"images of class {largest}" if largest >= num_classes else f"classes 0 to {own - 1}"
            raise InputError(
                f"{self.name} has {found}, but the model has classes 0 to {num_classes - 1}; {remedy}"
            )
        names = ", ".join(self.classes[:NAMED]) + (", …" if own > NAMED else "")
        raise InputError(
            f"{self.name} has {own} classes, but the model has {num_classes}; found {names}; {remedy}"
        )


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def fingerprint(*parts: bytes) -> str:
    """Hash of what identifies a data set."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
