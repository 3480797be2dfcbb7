"""Building models by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Literal

import torch
from torch import Tensor

from quartermap_deploy.architectures.backbone import Backbone
from quartermap_deploy.architectures.base import VisualStateSpaceModel
from quartermap_deploy.architectures.cards import ModelCard, freeze_lists, list_models, load_card
from quartermap_deploy.architectures.checkpoint import (
    Checkpoint,
    canonical_state_dict,
    load_state,
    misfit,
    neutral_key,
    read_checkpoint,
    require_fit,
)
from quartermap_deploy.architectures.medmamba import MedMamba, MedMambaConfig
from quartermap_deploy.architectures.vmamba import VMamba, VMambaConfig
from quartermap_deploy.errors import CheckpointError, InputError, QuartermapError


@dataclass(frozen=True)
class Weights:
    """Where the weights of a model come from.

    Attributes:
        source: "checkpoint" for a file that was given, "included" for the one that comes with the package, "new" for
            newly initialised ones.
        new_head: whether the last layer is newly initialised, as all of "new" is, or as its number of classes is not
            the file's.
        notes: what has to be said about loading them: what was taken off the keys, what was left out, what is new.
    """

    source: Literal["checkpoint", "included", "new"]
    new_head: bool
    notes: tuple[str, ...] = ()


MOST = {"num_classes": 1_000_000, "in_chans": 4096}
"""Classes and channels of an image: a recipe may be a stranger's, and each takes memory."""


def create_model(
    name: str,
    *,
    pretrained: bool | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
) -> VisualStateSpaceModel:
    """Build a model in eval mode.

    Without a checkpoint the weights are newly initialised, from torch's global random generator, except that
    `vmamba_digits` comes with trained weights.

    Args:
        name: one of `list_models()`.
        pretrained: True insists on the weights that come with this package, False on new ones. None takes them where
            there are some.
        num_classes: size of the output. None takes it from the checkpoint or else from the model's card.
            Another number than the checkpoint's leaves the last layer newly initialised.
        in_chans: channels of the image. None takes it from the checkpoint or else from the model's card.
        checkpoint: file with weights, in any public spelling; see `checkpoint.py`. Where it holds a moving
            average of the weights, that is taken.
        features_only: build a `Backbone` instead, which returns the maps of the stages. Checkpoints of classifiers,
            and of detectors and segmenters with such a backbone, will do; their heads are left out.
        out_indices: of which stages, from 0; None is all of them.

    Raises:
        UnknownNameError: if there is no such model; the message names similar ones.
        CheckpointError: if the checkpoint is missing, damaged or unsafe, or does not fit the model; or if `pretrained`
            is True and no weights come with the package.
        InputError: if num_classes or in_chans is no whole number of at least 1, out_indices are no stages, or the
            arguments contradict each other.
    """
    return create_with_weights(
        name,
        pretrained=pretrained,
        num_classes=num_classes,
        in_chans=in_chans,
        checkpoint=checkpoint,
        features_only=features_only,
        out_indices=out_indices,
    )[0]


def create_with_weights(
    name: str,
    *,
    pretrained: bool | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
) -> tuple[VisualStateSpaceModel, Weights]:
    """`create_model` that also says where the weights come from."""
    card = load_card(name)
    for argument, value in (("num_classes", num_classes), ("in_chans", in_chans)):
        # A bool is an int in Python, and True classes are a mistake.
        if value is not None and (type(value) is not int or value < 1):
            raise InputError(f"{argument} = {value!r} is not a whole number of at least 1")
        if value is not None and value > MOST[argument]:
            raise InputError(f"{argument} = {value} is too many; at most {MOST[argument]:,} can be had")
    if features_only and num_classes is not None:
        raise InputError(f"a backbone has no classes; leave num_classes = {num_classes} or features_only out")
    if out_indices is not None and not features_only:
        raise InputError(f"out_indices = {out_indices!r} are for features_only = True; leave them out")
    if pretrained is not None and checkpoint is not None:
        raise InputError(
            f"pretrained = {pretrained} and checkpoint = {checkpoint} contradict each other; leave one out"
        )
    if pretrained and card.weights_path is None:
        raise CheckpointError(
            f"no weights of {name} come with this package; get {card.source.checkpoint_file or 'a checkpoint'} from "
            f"{card.source.checkpoint_page} and give it as checkpoint"
        )

    path = card.weights_path if checkpoint is None and pretrained is not False else checkpoint
    # The weights that come with the package are for the card's channels alone.
    if path is None or (checkpoint is None and in_chans not in (None, card.in_chans)):
        model = build(card, num_classes=num_classes, in_chans=in_chans)
        model = as_backbone(model, out_indices) if features_only else model
        return model.eval(), Weights("new", new_head=not features_only)
    stored = read_checkpoint(path)
    source: Literal["checkpoint", "included"] = "included" if checkpoint is None else "checkpoint"
    sizes = {
        "num_classes": num_classes or stored.num_classes,
        "in_chans": _in_chans(stored, in_chans),
    }
    new_head = not features_only and num_classes is not None and num_classes != stored.num_classes
    # The file says how large the model is, so its tensors are compared with a model that takes no memory first.
    with torch.device("meta"):
        classifier = build(card, **sizes)
        empty = as_backbone(classifier, out_indices) if features_only else classifier
        _require_fit(empty, _state_of(empty, classifier, stored, new_head)[0], stored, card)
    classifier = build(card, **sizes)
    made = as_backbone(classifier, out_indices) if features_only else classifier
    state, notes = _state_of(made, classifier, stored, new_head)
    load_state(made, state, source=str(stored.path))
    return made.eval(), Weights(source, new_head, notes)


def build(
    card: ModelCard, *, num_classes: int | None = None, in_chans: int | None = None
) -> VisualStateSpaceModel:
    """Build the classifier that a card describes, newly initialised, in training mode.

    Raises:
        QuartermapError: if the card's family is unknown or its settings do not fit the family.
    """
    settings = freeze_lists(card.architecture)
    if num_classes is not None:
        settings["num_classes"] = num_classes
    if in_chans is not None:
        settings["in_chans"] = in_chans
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


def as_backbone(classifier: VisualStateSpaceModel, out_indices: Sequence[int] | None = None) -> Backbone:
    """Return the backbone of a classifier, with the maps of all stages unless some are named.

    Raises:
        InputError: if `out_indices` are no stages.
    """
    stages = range(len(classifier.layers))
    return Backbone(classifier, stages if out_indices is None else out_indices)


def _in_chans(stored: Checkpoint, wanted: int | None) -> int | None:
    """The channels of the image: the checkpoint's, which have to be those that are asked for."""
    found = stored.in_chans
    if None not in (found, wanted) and found != wanted:
        raise CheckpointError(
            f"the first convolution of the checkpoint {stored.path} takes {found} channel{'s' if found != 1 else ''}, "
            f"expected {wanted}; say in_chans = {found} (--in-chans {found}), or leave it out"
        )
    return wanted if found is None else found


def _require_fit(
    model: VisualStateSpaceModel, state: dict[str, Tensor], stored: Checkpoint, card: ModelCard
) -> None:
    """Check that a state dict in the model's spelling fits; if it does not, say which model it is of."""
    # Looking at every other model takes a second, so only a checkpoint that does not fit pays for it.
    if misfit(model, state):
        require_fit(model, state, source=str(stored.path), advice=_advice(stored, card, model.task))


def _state_of(
    model: VisualStateSpaceModel, classifier: VisualStateSpaceModel, stored: Checkpoint, new_head: bool
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """What of a checkpoint goes into a model, in its spelling, and notes.

    Args:
        model: the classifier, or its backbone, for which the checkpoint may be of a backbone, a detector or segmenter,
            or a classifier.
        classifier: the classifier.
        stored: the checkpoint.
        new_head: leave the last layer of the classifier as it is.
    """
    if isinstance(model, Backbone):
        return _state_of_backbone(model, classifier, stored)
    state = canonical_state_dict({**stored.state, **stored.others}, model)
    if new_head:
        initialised = model.state_dict()
        state.update(
            {key: initialised[key] for key in (f"{model.head_path}.weight", f"{model.head_path}.bias")}
        )
    return state, _prefix_note(stored)


def _state_of_backbone(
    backbone: Backbone, classifier: VisualStateSpaceModel, stored: Checkpoint
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    state, surplus, norms = _backbone_state(backbone, classifier, stored)
    notes = list(_prefix_note(stored))
    if left_out := Counter(key.partition(".")[0] for key in (*surplus, *stored.others)):
        counted = ", ".join(f"{count} of {part}" for part, count in left_out.items())
        notes.append(f"tensors that are no part of the backbone were left out: {counted}")
    if norms:
        names = ", ".join(dict.fromkeys(key.partition(".")[0] for key in norms))
        notes.append(f"the checkpoint has no {names}, so these normalise with scale 1 and shift 0")
    return state, tuple(notes)


def _backbone_state(
    backbone: Backbone, classifier: VisualStateSpaceModel, stored: Checkpoint
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """What of a checkpoint is a backbone's, in its spelling; which keys are not; and which norms it has not."""
    state, own = canonical_state_dict(stored.state, backbone), backbone.state_dict()
    # Stages that are not asked for, and what only a classifier has, are no part of it.
    whole = {neutral_key(key) for key in classifier.state_dict()}
    surplus = [
        key
        for key in state
        if key not in own
        and (neutral_key(key) in whole or neutral_key(key).startswith(("classifier.", "outnorm")))
    ]
    norms = [key for key in own if key.startswith("outnorm") and key not in state]
    kept = {key: tensor for key, tensor in state.items() if key not in surplus}
    return kept | {key: own[key] for key in norms}, surplus, norms


def _prefix_note(stored: Checkpoint) -> tuple[str, ...]:
    return (f"{stored.removed_prefix!r} was taken off the keys",) if stored.removed_prefix else ()


def _advice(stored: Checkpoint, card: ModelCard, task: str) -> str:
    """What to do about a checkpoint that does not fit a card's model."""
    if task == "classification" and stored.num_classes is None and _fits(stored, card, features_only=True):
        return "It holds a backbone and no classifier: build it with features_only = True (--features-only)"
    fitting = [
        name
        for name in list_models()
        if name != card.name and _fits(stored, load_card(name), features_only=task == "features")
    ]
    if fitting:
        return f"It fits {' and '.join(fitting)}: give that as the model"
    return "Choose the model that the checkpoint was trained as"


def _fits(stored: Checkpoint, card: ModelCard, *, features_only: bool) -> bool:
    """Whether a checkpoint is one of a card's model, with any number of classes and channels; no memory is taken."""
    if stored.depths != tuple(card.architecture["depths"]):
        return False
    with torch.device("meta"):
        model = build(card, num_classes=stored.num_classes, in_chans=stored.in_chans)
        if features_only:
            backbone = as_backbone(model)
            return not misfit(backbone, _backbone_state(backbone, model, stored)[0])
        return not misfit(model, canonical_state_dict({**stored.state, **stored.others}, model))
