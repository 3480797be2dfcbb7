"""Answers to uploaded files: classes, masks and images, for people and their scripts."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.classes import named
from quartermap_deploy.pictures import mask_of, mask_png, palette, picture_of, png, shares_of
from quartermap_deploy.predicting import mask_labels
from quartermap_deploy.serving.refusal import Refusal
from quartermap_deploy.serving.startup import Plan

CLASSIFY, PICTURE = "/classify", "/picture"
PATHS = {"classes": CLASSIFY, "mask": PICTURE, "image": PICTURE}
"""Where files are uploaded to, by what the answer shows."""


def require_path(plan: Plan, path: str) -> None:
    """Check that files may be uploaded to a path.

    Raises:
        Refusal: if the model has no answer of that kind; the message says what it has.
    """
    shows = None if plan.images is None else plan.images.shows
    if shows is not None and PATHS.get(shows) == path:
        return
    if plan.images is None or shows is None:
        raise Refusal(404, f"there is no {path}, as the model takes no image files: {plan.no_images}")
    other = f"POST {PATHS[shows]}" if shows in PATHS else f"ask the model {plan.images.description.name!r}"
    raise Refusal(404, f"there is no {path} for the task {plan.bundle.task}; {other}")


def classes_answer(plan: Plan, row: NDArray[Any], top: int) -> dict[str, Any]:
    """The most probable classes of an image.

    Args:
        plan: what is served.
        row: the probabilities of all classes.
        top: how many.
    """
    labels = plan.model.labels
    order = np.argsort(-row, kind="stable")[:top]
    return {
        "classes": [
            {"class": int(index), "label": labels[index], "probability": float(row[index])} for index in order
        ]
    }


def picture_answer(plan: Plan, values: NDArray[Any]) -> dict[str, Any]:
    """A picture of an image's output, as a PNG file in base64; of a mask also its classes, with their colours.

    Args:
        plan: what is served; its images show a mask or an image.
        values: the first output for the image, (channels, height, width).
    """
    images = plan.images
    assert images is not None
    preprocessing = images.interface.preprocessing
    if images.shows == "image":
        picture = picture_of(values, preprocessing)
        return {"size": [picture.height, picture.width], "picture": _base64(png(picture))}
    mask = mask_of(values, preprocessing.crop, images.activation)
    labels, colors = mask_labels(images.labels, len(values)), palette()
    return {
        "size": list(mask.shape),
        "picture": _base64(mask_png(mask)),
        "classes": [
            {
                "class": index,
                "label": named(labels, index),
                "share": share,
                "color": f"#{bytes(colors[index]).hex()}" if index < len(colors) else None,
            }
            for index, share in shares_of(mask).items()
        ],
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
