"""The inputs that parity is checked on: real images, what the user gave, other sizes, and the edges of the range."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


def batch_case(inputs: Sequence[TensorInfo], example: Mapping[str, NDArray[Any]]) -> Feeds | None:
    """Three different entries in one batch, made of an example of a single one; None where there is nothing to open.

    The graph was traced with two, and the example has one.
    """
    opened = {item.name for item in inputs if item.shape and isinstance(item.shape[0], str)}
    if not opened or any(len(example[name]) > 1 for name in opened):
        return None
    return {
        name: np.concatenate([array, np.flip(array, -1), np.roll(array, 1, -1)])
        if name in opened and array.ndim > 1
        else np.repeat(array, 3, axis=0)
        if name in opened
        else array
        for name, array in example.items()
    }


def size_cases(
    inputs: Sequence[TensorInfo], example: Mapping[str, NDArray[Any]], takes: Callable[[Feeds], bool]
) -> dict[str, Feeds]:
    """Inputs of other heights and widths, where these are open: one size that divides as the example does, one odd.

    Args:
        inputs: what the model takes.
        example: the user's example inputs.
        takes: whether inputs can be run.

    Returns:
        "another size" and "an odd size", each if one is found that can be run.
    """
    found: dict[str, Feeds] = {}
    for case, resized in (("another size", _alike), ("an odd size", _odd)):
        for feeds in _resized(inputs, example, resized):
            if takes(feeds):
                found[case] = feeds
                break
    return found


def _alike(height: int, width: int) -> list[tuple[int, int]]:
    other = [(width, height)] if height != width else []
    more = [(height, width + width // 2), (height, 2 * width), (2 * height, width), (2 * height, 2 * width)]
    return [*other, *more, (height // 2, width // 2)]


def _odd(height: int, width: int) -> list[tuple[int, int]]:
    return [
        (height + down, width + right)
        for down, right in ((1, 3), (3, 1), (-1, -1), (1, 0), (0, 1), (-1, 0), (0, -1))
    ]


def _resized(
    inputs: Sequence[TensorInfo],
    example: Mapping[str, NDArray[Any]],
    sizes: Callable[[int, int], Sequence[tuple[int, int]]],
) -> Iterator[Feeds]:
    """The example at each of some sizes, cut off or repeated along height and width where these are open."""
    opened = {item.name for item in inputs if len(item.shape) == 4 and isinstance(item.shape[2], str)}
    offered = {name: sizes(*example[name].shape[2:]) for name in opened}
    for sides in zip(*offered.values(), strict=False):
        if all(side > 0 for pair in sides for side in pair):
            wanted = dict(zip(offered, sides, strict=True))
            yield {
                name: array[:, :, np.arange(wanted[name][0]) % array.shape[2]][
                    ..., np.arange(wanted[name][1]) % array.shape[3]
                ]
                if name in wanted
                else array
                for name, array in example.items()
            }
