"""A model that is ready to run, on whatever target."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.errors import InputError
from quartermap_deploy.targets.placement import Placement
from quartermap_deploy.targets.scan_form import ScanForm
from quartermap_deploy.tensor_info import TensorInfo


class Session(abc.ABC):
    """A model that is ready to run.

    Attributes:
        inputs: what it takes.
        outputs: what it gives.
        scans: what computes its scans; None of a target that has one way alone.
        placement: what of it runs where; None of a target that runs in one place alone.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    scans: ScanForm | None = None
    placement: Placement | None = None

    @abc.abstractmethod
    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the model on one batch.

        Args:
            feeds: an array for each input, by name.

        Returns:
            Every output, by name.

        Raises:
            InputError: if an input is missing, unknown, or of another type or shape than the model takes.
        """

    def run(self, images: NDArray[Any]) -> NDArray[Any]:
        """Run a model of one input and one output on an array.

        Raises:
            InputError: if it has several, or the array does not fit.
        """
        if len(self.inputs) != 1 or len(self.outputs) != 1:
            raise InputError(
                f"the model has the inputs {_names(self.inputs)} and the outputs {_names(self.outputs)}; give arrays "
                "by name, and get them by name, with infer({...})"
            )
        return self.infer({self.inputs[0].name: images})[self.outputs[0].name]

    @property
    def input_type(self) -> np.dtype[Any]:
        """The element type of the first input."""
        return np.dtype(self.inputs[0].type)


def check_feeds(inputs: tuple[TensorInfo, ...], feeds: Mapping[str, Any]) -> None:
    """Check that there is a fitting array for each input, and that open axes of one name have one size.

    Raises:
        InputError: if not.
    """
    names = [item.name for item in inputs]
    if absent := [name for name in names if name not in feeds]:
        raise InputError(f"there is no array for the input {absent[0]!r}; the model takes {_names(inputs)}")
    if unknown := [name for name in feeds if name not in names]:
        raise InputError(f"the model has no input {unknown[0]!r}; it takes {_names(inputs)}")
    sizes: dict[str, tuple[str, int]] = {}
    for item in inputs:
        array = feeds[item.name]
        if not _fits(item, array):
            what = "images" if len(inputs) == 1 and item.is_image else f"{item.name!r}"
            raise InputError(
                f"the model takes {what} of shape {_shape(item)} and {item.type}, found {_described(array, item)}"
            )
        for axis, size in enumerate(item.shape):
            if isinstance(size, str):
                first, known = sizes.setdefault(size, (item.name, array.shape[axis]))
                if size == "batch" and known != array.shape[axis]:
                    raise InputError(
                        f"{item.name!r} has a batch of {array.shape[axis]}, but {first!r} one of {known}; expected the "
                        "same for all inputs"
                    )


def _fits(item: TensorInfo, array: object) -> bool:
    return (
        isinstance(array, np.ndarray)
        and array.dtype == np.dtype(item.type)
        and array.ndim == len(item.shape)
        and array.size > 0
        and all(
            isinstance(size, str) or size == own for size, own in zip(item.shape, array.shape, strict=True)
        )
    )


def _shape(item: TensorInfo) -> str:
    return f"({', '.join(map(str, item.shape))})"


def _names(items: tuple[TensorInfo, ...]) -> str:
    return ", ".join(f"{item.name} {_shape(item)}" for item in items)


def _described(array: object, item: TensorInfo) -> str:
    """What was given instead, and how to put it right."""
    if not isinstance(array, np.ndarray):
        remedy = f'np.asarray(…, dtype="{item.type}") makes an array of it'
        return f"a {type(array).__name__}; {remedy}, if the values are prepared as the model wants them"
    found = f"{array.shape} of {array.dtype}"
    if array.size == 0 and array.ndim == len(item.shape):
        axis = array.shape.index(0)
        return f"{found}; its axis {axis} is empty, and a model runs on at least one value"
    if array.dtype == np.dtype(item.type) and array.ndim == len(item.shape):
        sizes = enumerate(zip(item.shape, array.shape, strict=True))
        other = [axis for axis, (size, own) in sizes if isinstance(size, int) and size != own]
        if other == [0]:
            return (
                f"{found}; the batch of this model is fixed at {item.shape[0]}: run it {item.shape[0]} at a time, or "
                "compile it with dynamic_batch = true"
            )
        if item.is_image and other and 1 not in other:
            return f"{found}; resize images as the model's preprocessing says, or compile it with dynamic_size = true"
    if array.dtype != np.dtype(item.type) and np.issubdtype(array.dtype, np.floating):
        return f'{found}; convert it with .astype("{item.type}")'
    # Whole numbers are pixels that nobody has normalised: another type alone would not make an input of them.
    return f"{found}; prepare images as the model's preprocessing says" if item.is_image else found
