"""How image files become the input of a bundle's model, where they can."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quartermap_deploy.batch_axis import batch_of
from quartermap_deploy.data.preprocessing import Color, Preprocessing
from quartermap_deploy.errors import InputError
from quartermap_deploy.model_facts import ModelFacts
from quartermap_deploy.tensor_info import TensorInfo

_COLORS: dict[int, Color] = {1: "grey", 3: "rgb", 4: "rgba"}
IMAGE, PROBABILITIES = "image", "probabilities"
ARRAYS = "give arrays to bundle.run instead"


@dataclass(frozen=True)
class ImageInterface:
    """The one input of a model, and how an image becomes it.

    Attributes:
        item: the input.
        preprocessing: how.
    """

    item: TensorInfo
    preprocessing: Preprocessing


def image_interface(bundle: ModelFacts, overrides: Mapping[str, Any] | None = None) -> ImageInterface:
    """Find out how images become the input of a bundle's model.

    Args:
        bundle: the bundle.
        overrides: values of its preprocessing to replace, by name; of a bundle that has none, all that it needs.

    Raises:
        InputError: if the model has several inputs or none for images, if nobody said how an image becomes the input,
            or if the preprocessing does not fit it.
    """
    if len(bundle.inputs) != 1:
        raise InputError(
            f"the model takes {_listed(bundle.inputs)}, and an image file is one input alone; {ARRAYS}, by name"
        )
    (item,) = bundle.inputs
    if not item.is_image:
        raise InputError(
            f"the model takes {_shown(item)} of {item.type}, which is no image: (batch, channels, height, width) with "
            f"1, 3 or 4 channels; {ARRAYS}"
        )
    owner = f"the bundle {bundle.path}"
    return ImageInterface(
        item, fitting_preprocessing(owner, item, bundle.preprocessing, overrides, f", or {ARRAYS}")
    )


def no_image_model(bundle: ModelFacts) -> str | None:
    """Say why a server cannot put images together for a bundle whose images become its input; None where it can."""
    batch = batch_of(bundle)
    if batch is None:
        return "its outputs do not belong to single images"
    if isinstance(batch, int) and batch > 1:
        return f"its graph takes {batch} images at once and no fewer"
    return None


def image_model_tensors(bundle: ModelFacts) -> tuple[str, str]:
    """Names for what a model that takes image files has beside a bundle's own tensors: the files, and probabilities."""
    taken = {item.name for item in (*bundle.inputs, *bundle.outputs)}
    return _free_name(IMAGE, taken), _free_name(PROBABILITIES, taken)


def _free_name(wanted: str, taken: Collection[str]) -> str:
    number, name = 1, wanted
    while name in taken:
        number, name = number + 1, f"{wanted}_{number + 1}"
    return name


def fitting_preprocessing(
    owner: str,
    item: TensorInfo,
    stored: Preprocessing | None,
    overrides: Mapping[str, Any] | None = None,
    instead: str = "",
) -> Preprocessing:
    """How an image becomes an input of images.

    Args:
        owner: whose input it is, for messages, as "the bundle bundles/tiny".
        item: the input, of four axes.
        stored: what the owner says, or None.
        overrides: values that replace those, by name; all that are needed where nothing is stored.
        instead: what else may be done where nobody says, for the message.

    Raises:
        InputError: if nobody says how, a value is wrong, or what comes out does not fit the input.
    """
    if stored is not None:
        found = stored.replace(overrides) if overrides else stored
    elif overrides:
        sides = [size for size in item.shape[2:] if isinstance(size, int)]
        size = (sides[0], sides[1]) if len(sides) == 2 else None
        color = _COLORS.get(item.shape[1]) if isinstance(item.shape[1], int) else None
        found = Preprocessing.from_dict({**({} if color is None else {"color": color}), **overrides}, size)
    else:
        raise InputError(
            f"{owner} does not say how an image becomes its input {_shown(item)}; say so by the mean and std of its "
            f"preprocessing (--preprocessing mean=0.5,0.5,0.5 std=0.5,0.5,0.5){instead}"
        )
    _check(item, found)
    return found


def _check(item: TensorInfo, preprocessing: Preprocessing) -> None:
    """Check that prepared images fit an input."""
    made = preprocessing.input_shape
    if any(isinstance(own, int) and own != side for own, side in zip(item.shape[1:], made, strict=True)):
        raise InputError(
            f"the preprocessing makes images of {made} (channels, height, width), and the model takes {_shown(item)}; "
            "set crop and color to what it takes"
        )


def _listed(items: Iterable[TensorInfo]) -> str:
    return " and ".join(map(_shown, items))


def _shown(item: TensorInfo) -> str:
    return f"{item.name} ({', '.join(map(str, item.shape))})"
