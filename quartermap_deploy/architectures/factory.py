"""Building models by name."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Literal

from quartermap_deploy.architectures.base import VisualStateSpaceModel
from quartermap_deploy.architectures.cards import ModelCard, freeze_lists, load_card
from quartermap_deploy.architectures.checkpoint import (
    canonical_state_dict,
    head_classes,
    load_state,
    read_checkpoint,
)
from quartermap_deploy.architectures.medmamba import MedMamba, MedMambaConfig
from quartermap_deploy.architectures.vmamba import VMamba, VMambaConfig
from quartermap_deploy.errors import InputError, QuartermapError


@dataclass(frozen=True)
class Weights:
    """Where the weights of a model come from.

    Attributes:
        source: "checkpoint" for a file that was given, "included" for the one that comes with the package, "new" for
            newly initialised ones.
        new_head: whether the last layer is newly initialised, as all of "new" is, or as its number of classes is not
            the file's.
    """

    source: Literal["checkpoint", "included", "new"]
    new_head: bool


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
) -> VisualStateSpaceModel:
    """Build a model in eval mode.

    Without a checkpoint the weights are newly initialised, from torch's global random generator, except that
    `vmamba_digits` comes with trained weights.

    Args:
        name: one of `list_models()`.
        num_classes: size of the output. None takes it from the checkpoint or else from the model's card.
            Another number than the checkpoint's leaves the last layer newly initialised.
        checkpoint: file with weights, in any public spelling; see `checkpoint.py`. Where it holds a moving
            average of the weights, that is taken.

    Raises:
        UnknownNameError: if there is no such model; the message names similar ones.
        CheckpointError: if the checkpoint is missing, damaged or unsafe, or does not fit the model.
        InputError: if num_classes is no whole number of at least 1.
    """
    return create_with_weights(name, num_classes=num_classes, checkpoint=checkpoint)[0]


def create_with_weights(
    name: str,
    *,
    num_classes: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
) -> tuple[VisualStateSpaceModel, Weights]:
    """`create_model` that also says where the weights come from."""
    card = load_card(name)
    # A bool is an int in Python, and True classes are a mistake.
    if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
        raise InputError(f"num_classes = {num_classes!r} is not a whole number of at least 1")
    path = card.weights_path if checkpoint is None else checkpoint
    if path is None:
        return build(card, num_classes=num_classes).eval(), Weights("new", new_head=True)
    state = read_checkpoint(path)
    trained_classes = head_classes(state)
    model = build(card, num_classes=num_classes or trained_classes)
    state = canonical_state_dict(state, model)
    new_head = num_classes is not None and num_classes != trained_classes
    if new_head:
        initialised = model.state_dict()
        state.update(
            {key: initialised[key] for key in (f"{model.head_path}.weight", f"{model.head_path}.bias")}
        )
    load_state(model, state, source=str(path))
    return model.eval(), Weights("included" if checkpoint is None else "checkpoint", new_head)


def build(card: ModelCard, *, num_classes: int | None = None) -> VisualStateSpaceModel:
    """Build the model that a card describes, newly initialised, in training mode.

    Raises:
        QuartermapError: if the card's family is unknown or its settings do not fit the family.
    """
    settings = freeze_lists(card.architecture)
    if num_classes is not None:
        settings["num_classes"] = num_classes
    try:
        if card.family == "vmamba":
            return VMamba(VMambaConfig(**settings))
        if card.family == "medmamba":
            return MedMamba(MedMambaConfig(**settings))
    except (TypeError, ValueError) as error:
        raise QuartermapError(
            f"the card of {card.name} does not describe a {card.family} model: {error}"
        ) from error
    raise QuartermapError(f"the card of {card.name} names the unknown family {card.family!r}")
