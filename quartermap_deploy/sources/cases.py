"""The inputs that parity is checked on: real images, what the user gave, and the edges of the input range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.sources.description import Feeds
from quartermap_deploy.tensor_info import TensorInfo

LARGE = 1000.0
"""Factor of the case "large values": far beyond any normalised pixel, and still far from the limits of float32."""


def image_cases(name: str, images: NDArray[np.float32], dynamic_batch: bool) -> dict[str, Feeds]:
    """The cases of a model of this package: images, the same in another batch size, zeros, and far out of range."""
    cases = {
        "images": images,
        "single image": images[:1],
        "zeros": np.zeros_like(images),
        "large values": images * np.float32(LARGE),
    }
    return {case: {name: batch if dynamic_batch else batch[:1]} for case, batch in cases.items()}


def module_cases(
    inputs: Sequence[TensorInfo], example: Mapping[str, NDArray[Any]], images: Mapping[str, NDArray[Any]]
) -> dict[str, Feeds]:
    """The cases of a module of the user's.

    Args:
        inputs: what it takes.
        example: the user's example inputs.
        images: real images for the inputs that can hold some; the others keep their example.

    Returns:
        "example"; "images" and "single image", where an input can hold images; "zeros", where all of its inputs are of
        floating-point numbers.
    """
    cases: dict[str, Feeds] = {"example": dict(example)}
    open_batch = all(isinstance(item.shape[0], str) for item in inputs if item.shape)
    if images:
        batch = {name: images.get(name, array) for name, array in example.items()}
        cases["images"] = batch
        first = next(iter(images.values()))
        if open_batch and len(first) > 1:
            cases["single image"] = {name: array[:1] for name, array in batch.items()}
    elif open_batch and all(len(array) > 1 for array in example.values()):
        cases["single example"] = {name: array[:1] for name, array in example.items()}
    if all(np.issubdtype(array.dtype, np.floating) for array in example.values()):
        cases["zeros"] = {name: np.zeros_like(array) for name, array in cases.get("images", example).items()}
    return cases
