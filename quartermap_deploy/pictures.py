"""What there is to see of outputs; masks of classes and images, as arrays and as PNG files."""

from __future__ import annotations

import colorsys
import functools
import io
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.classes import Activation
from quartermap_deploy.data.images import restored
from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.model_facts import ModelFacts

if TYPE_CHECKING:
    from PIL.Image import Image

Shows = Literal["classes", "mask", "image", "tensors"]

_STEP = 0.618033988749895
"""Of the circle of hues, from class to class: the golden ratio's, which comes near no hue again soon."""
_TONES = ((0.6, 0.75), (0.9, 0.45), (0.45, 0.95), (0.9, 0.75), (0.75, 0.95))
"""Saturation and value, in turns: with them the first 40 colours differ by 56 of 255 at least, over the channels."""


def what_it_shows(bundle: ModelFacts, preprocessing: Preprocessing) -> Shows:
    """Return what there is to see of a bundle's first output: its classes, a mask of them, an image, or only numbers.

    Args:
        bundle: the bundle, whose one input takes images.
        preprocessing: how an image becomes it.
    """
    first = bundle.outputs[0]
    if bundle.task == "classification" and len(first.shape) == 2 and bundle.num_classes:
        return "classes"
    if bundle.task == "segmentation" and len(first.shape) == 4:
        return "mask"
    if bundle.task == "image" and len(first.shape) == 4:
        return "image" if has_known_range(preprocessing, first.shape[1]) else "tensors"
    return "tensors"


def mask_of(
    logits: NDArray[Any], size: tuple[int, int], activation: Activation
) -> NDArray[np.unsignedinteger[Any]]:
    """Return the most probable class of every pixel.

    Args:
        logits: (classes, height, width) of one image; with one class, the pixels above its threshold are of class 1.
        size: (height, width) of the mask. Where it is not that of the logits they are interpolated bilinearly first.
        activation: what makes probabilities of them, which sets the threshold of a single class.

    Returns:
        (height, width) of uint8; of uint16 where there are more classes than that holds.
    """
    wide = logits.astype(np.float32, copy=False)
    if wide.shape[1:] != size:
        wide = np.stack([_interpolated(plane, size) for plane in wide])
    if len(wide) == 1:
        above: NDArray[np.uint8] = (wide[0] > (0.5 if activation == "none" else 0.0)).astype(np.uint8)
        return above
    kind = np.uint8 if len(wide) <= 256 else np.uint16
    mask: NDArray[np.unsignedinteger[Any]] = wide.argmax(axis=0).astype(kind)
    return mask


def shares_of(mask: NDArray[Any]) -> dict[int, float]:
    """Return for each class that is in a mask which share of the pixels it has, the largest first."""
    classes, counts = np.unique(mask, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {int(classes[place]): float(counts[place] / mask.size) for place in order}


def mask_png(mask: NDArray[Any]) -> bytes:
    """Return a mask as a PNG file whose pixels are the classes: with a palette, or greys of 16 bits for uint16."""
    from PIL import Image

    if mask.dtype == np.uint8:
        picture = Image.fromarray(mask)
        picture.putpalette(palette().tobytes())
    else:
        picture = Image.fromarray(mask.astype(np.uint16))
    return png(picture)


@functools.cache
def palette() -> NDArray[np.uint8]:
    """Return colours for 256 classes, (256, 3): black for class 0, and hues far from each other for the next ones."""
    colors = np.zeros((256, 3), dtype=np.uint8)
    for index in range(1, 256):
        tone = _TONES[index % len(_TONES)]
        colors[index] = [round(255 * part) for part in colorsys.hsv_to_rgb(index * _STEP % 1, *tone)]
    return colors


def has_known_range(preprocessing: Preprocessing, channels: int | str) -> bool:
    """Whether it is known what the values of an image are that a model returns.

    They are if its input is not normalised but only scaled, and the output has the same channels: then the two have the
    same scale. Whether a model that takes normalised images returns normalised ones, nobody said.
    """
    plain = all(mean == 0 for mean in preprocessing.mean) and all(std == 1 for std in preprocessing.std)
    return plain and channels == preprocessing.channels


def picture_of(values: NDArray[Any], preprocessing: Preprocessing) -> Image:
    """Return the image that a model returned, (channels, height, width), where its range is known; it is clipped."""
    return restored(values.astype(np.float32), preprocessing)


def png(picture: Image) -> bytes:
    """Return a Pillow image as a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _interpolated(plane: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    from PIL import Image

    height, width = size
    return np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))
