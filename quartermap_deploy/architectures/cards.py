"""Model cards: what a model is built from, how its images are prepared, and what was published about it.

One TOML file per model lies in `models/` of the repository, and in `quartermap_deploy/_models` of an
installed wheel, beside the weights that come with the package. Reading a card needs neither torch nor NumPy.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartermap_deploy.data.labels import check_labels, label_sets, shipped_labels
from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.data.shipped import models_directory
from quartermap_deploy.errors import InputError, QuartermapError, UnknownNameError
from quartermap_deploy.reading import read_toml


@dataclass(frozen=True)
class Sizes:
    """How large a model is, at the input size and the number of classes of its card.

    Attributes:
        parameters: parameters of the model as built here.
        published_parameters_millions: what its authors state, or None.
        published_gflops: what its authors state, in 10⁹ multiply-accumulates (see `complexity`), or None.
    """

    parameters: int
    published_parameters_millions: float | None = None
    published_gflops: float | None = None


@dataclass(frozen=True)
class Accuracy:
    """One accuracy that somebody stated.

    Attributes:
        dataset: data set and part of it.
        top1: share of images whose most probable class is right, in percent.
        source: who stated it, and what has to be known about it.
    """

    dataset: str
    top1: float
    source: str


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        paper: its paper.
        repository: its public implementation.
        licence: licence of that implementation and its weights, as far as it is stated.
        checkpoint_page: page that describes the public checkpoint, or None.
        checkpoint_file: file name of the public checkpoint, or None.
    """

    paper: str
    repository: str
    licence: str
    checkpoint_page: str | None = None
    checkpoint_file: str | None = None


@dataclass(frozen=True)
class ModelCard:
    """One model that this package can build.

    Attributes:
        name: name for `create_model`.
        title: name that its authors use.
        family: "vmamba" or "medmamba".
        architecture: settings of the family's configuration, under their public names.
        preprocessing: how images are prepared.
        sizes: parameters and operations.
        accuracy: what was published about its accuracy.
        source: where it comes from.
        weights: file with trained weights beside the card, or None if the package brings none.
        label_set: which class names of `data/labels.py` are the model's, or None if the classes depend on the
            checkpoint. In the file its key is `labels`.
        task: what the model does, as its outputs are named and shown.
    """

    name: str
    title: str
    family: str
    architecture: Mapping[str, Any]
    preprocessing: Preprocessing
    sizes: Sizes
    source: Source
    accuracy: tuple[Accuracy, ...] = ()
    weights: str | None = None
    label_set: str | None = None
    task: str = "classification"

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes of the model as published, in order; empty if they depend on the checkpoint."""
        return () if self.label_set is None else shipped_labels(self.label_set)

    @property
    def num_classes(self) -> int:
        """Classes of the model as published."""
        return int(self.architecture["num_classes"])

    @property
    def in_chans(self) -> int:
        """Channels of the model's image as published."""
        return int(self.architecture["in_chans"])

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (channels, height, width) of one image."""
        return (self.in_chans, *self.preprocessing.crop)

    @property
    def weights_path(self) -> Path | None:
        """Where the weights that come with the package lie, or None."""
        return None if self.weights is None else models_directory() / self.weights


def list_models(pattern: str | None = None) -> list[str]:
    """Return the names of the models, sorted.

    Args:
        pattern: of the names, as "vmamba_tiny*", with *, ? and [] as in a shell; None is all.
    """
    names = sorted(path.stem for path in models_directory().glob("*.toml"))
    return names if pattern is None else fnmatch.filter(names, pattern)


@functools.cache
def load_card(name: str) -> ModelCard:
    """Return the card of a model.

    Raises:
        UnknownNameError: if there is no such model; the message names similar ones.
        QuartermapError: if the card is damaged.
    """
    if name not in list_models():
        raise UnknownNameError.for_choice("model", name, list_models())
    return read_card(models_directory() / f"{name}.toml")


def read_card(path: Path) -> ModelCard:
    """Read a card from a TOML file.

    Raises:
        QuartermapError: if the file is no TOML, or a key is missing, unknown or in the wrong place.
    """
    try:
        values = read_toml(path)
        parts: dict[str, Any] = {
            "preprocessing": Preprocessing.from_dict(values.pop("preprocessing")),
            "sizes": Sizes(**values.pop("sizes")),
            "source": Source(**values.pop("source")),
            "accuracy": tuple(Accuracy(**entry) for entry in values.pop("accuracy", [])),
            "label_set": values.pop("labels", None),
        }
        card = ModelCard(**values, **parts)
        _check_labels(card)
    except (OSError, ValueError, TypeError, KeyError, InputError, UnknownNameError) as error:
        raise QuartermapError(f"the model card {path} cannot be read: {error}") from error
    if card.name != path.stem:
        raise QuartermapError(
            f"the model card {path} names the model {card.name!r}; name and file must agree"
        )
    return card


def _check_labels(card: ModelCard) -> None:
    if card.label_set is None:
        return
    if card.label_set not in label_sets():
        raise UnknownNameError.for_choice("set of class names", card.label_set, label_sets())
    check_labels(card.labels, card.num_classes, f"the labels {card.label_set!r}")


def freeze_lists(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a TOML table with its lists as tuples, as frozen dataclasses take them."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
