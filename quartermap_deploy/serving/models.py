"""What is served: the model itself, and beside it one that takes image files."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.classes import Activation, probabilities
from quartermap_deploy.image_interface import ImageInterface
from quartermap_deploy.serving.batcher import Batcher
from quartermap_deploy.serving.decoders import Decoders
from quartermap_deploy.serving.refusal import Refusal, busy
from quartermap_deploy.serving.requests import InferRequest, classified
from quartermap_deploy.serving.statistics import ModelStatistics, Timings
from quartermap_deploy.serving.tensors import BYTES, TensorSpec, count_of, element_type_of

VERSION = "1"
JSON_VALUE = 48
"""Bytes of the longest number that a client has a reason to write, on a line of its own and indented."""
JSON_ROOM = 1 << 16
"""Bytes of JSON for everything but values: names, shapes, parameters, an id."""
JSON_FILES = 16 << 20
"""Bytes of all files of a request in JSON, as base64. Nothing else is done while they are read; bytes take no time."""
OPEN_VALUES = 1 << 21
"""Most numbers in the JSON of a request where height or width of the input are open: 14 images of 224 x 224."""


@dataclass(frozen=True)
class Description:
    """What clients are told about a model.

    Attributes:
        name: what they call it.
        platform: what runs it.
        inputs: what it takes.
        outputs: what it gives; all of them numbers.
        max_batch: most images at once.
        max_delay: seconds that an image may wait for others.
        labels: names of the classes; nothing where it has none.
        properties: where the model comes from, and what computes its scans.
        batch_axis: whether the first axis of every input and output is one and the same batch.
    """

    name: str
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int
    max_delay: float
    labels: tuple[str, ...]
    properties: dict[str, str] = field(default_factory=dict)
    batch_axis: bool = True

    @property
    def joins(self) -> bool:
        """Whether requests are put together: if they may have batches of any size."""
        return self.batch_axis and self.inputs[0].shape[0] == -1

    def images(self, inputs: Mapping[str, NDArray[Any]]) -> int:
        """How many images a request has, of a model without a batch one."""
        return len(next(iter(inputs.values()))) if self.batch_axis else 1

    @functools.cached_property
    def most_values(self) -> int:
        """Most numbers, or strings, that the inputs of a request have; `OPEN_VALUES` where sides are open."""
        return sum(self._values(spec.shape) for spec in self.inputs)

    @functools.cached_property
    def most_rows(self) -> int:
        """Most lists that these values are in where they are nested as their shapes."""
        return sum(2 * self._values(spec.shape[:-1]) + len(spec.shape) for spec in self.inputs)

    @functools.cached_property
    def most_json(self) -> int:
        """Bytes of the longest JSON of a request."""
        if self._takes_files:
            return JSON_ROOM + JSON_FILES
        return JSON_ROOM + JSON_VALUE * self.most_values

    @functools.cached_property
    def most_bytes(self) -> int | None:
        """Bytes of the longest request, its values in JSON or behind it; None where nothing tells."""
        closed = all(-1 not in spec.shape[1:] for spec in self.inputs)
        return self.most_json if closed and not self._takes_files else None

    @property
    def _takes_files(self) -> bool:
        return any(spec.datatype == BYTES for spec in self.inputs)

    def _values(self, shape: Sequence[int]) -> int:
        """How many values a shape has at most; an open first axis is the batch."""
        if -1 in shape[1:]:
            return OPEN_VALUES
        return count_of([self.max_batch if size == -1 else size for size in shape])


class ServedModel(Protocol):
    """A model that answers requests."""

    description: Description
    statistics: ModelStatistics

    async def compute(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[dict[str, NDArray[Any]], Timings]:
        """Return the outputs for inputs that were checked, and where the time went.

        Raises:
            Refusal: if the inputs cannot be taken, now or ever.
        """
        ...


async def infer(model: ServedModel, request: InferRequest, arrived: int) -> dict[str, NDArray[Any]]:
    """Answer a request, and count it.

    Args:
        model: which.
        request: checked against the model's description.
        arrived: when it came, in nanoseconds of the monotonic clock.

    Returns:
        The outputs that were asked for, in that order: numbers, or strings where classes were asked for.

    Raises:
        Refusal: if the request cannot be carried out; the caller counts it.
    """
    outputs, timings = await model.compute(request.inputs)
    images = model.description.images(request.inputs)
    answer = {
        output.name: classified(outputs[output.name], output.classes, model.description.labels)
        if output.classes
        else outputs[output.name]
        for output in request.outputs
    }
    model.statistics.succeeded(images, time.monotonic_ns() - arrived, timings)
    return answer


class TensorModel:
    """The model itself: arrays in, arrays out."""

    def __init__(self, description: Description, batcher: Batcher, statistics: ModelStatistics) -> None:
        self.description, self.batcher, self.statistics = description, batcher, statistics

    async def compute(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[dict[str, NDArray[Any]], Timings]:
        """Return its outputs."""
        return await self.batcher.run(inputs, self.description.images(inputs))


class ImageModel:
    """Image files in, by way of the model itself, whose statistics count these requests too.

    Of a model that tells classes apart it gives probabilities, of another one what that gives.
    """

    def __init__(
        self,
        description: Description,
        model: TensorModel,
        interface: ImageInterface,
        decoders: Decoders,
        activation: Activation | None,
    ) -> None:
        """Describe the model.

        Args:
            description: what clients are told.
            model: the model itself.
            interface: how images become its input.
            decoders: threads that decode.
            activation: what makes probabilities of the first output; None where it is given as it is.
        """
        self.description, self.model, self.interface = description, model, interface
        self.statistics = ModelStatistics(description.name, VERSION)
        self._decoders, self._activation = decoders, activation
        (given,) = model.description.inputs
        self._type = element_type_of(given.datatype)
        self._decoding = 0

    async def compute(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[dict[str, NDArray[Any]], Timings]:
        """Return probabilities, (n, classes), or the outputs of the model."""
        (given,) = inputs.values()
        files: Sequence[bytes] = given.reshape(-1).tolist()
        arrived = time.monotonic_ns()
        images = await self._prepare(files)
        prepared = time.monotonic_ns()
        try:
            outputs, timings = await self.model.compute({self.interface.item.name: images})
        except Refusal:
            self.model.statistics.failed(time.monotonic_ns() - prepared)
            raise
        end = time.monotonic_ns()
        self.model.statistics.succeeded(len(files), end - prepared, timings)
        timings = timings.plus(input=prepared - arrived)
        self.statistics.executed(len(files), timings)
        if self._activation is None:
            return outputs, timings
        logits = outputs[self.model.description.outputs[0].name]
        (made,) = self.description.outputs
        return {made.name: probabilities(logits, self._activation).astype(np.float32)}, timings

    async def _prepare(self, files: Sequence[bytes]) -> NDArray[Any]:
        batcher = self.model.batcher
        if self._decoding + batcher.waiting + len(files) > batcher.limit:
            raise busy(
                f"{self._decoding} images are being decoded and {batcher.waiting} wait already, at most "
                f"{batcher.limit} do; try again later"
            )
        self._decoding += len(files)
        try:
            jobs = [
                asyncio.ensure_future(self._decoders.prepare(data, self.interface.preprocessing, place))
                for place, data in enumerate(files, 1)
            ]
            try:
                return np.stack(await asyncio.gather(*jobs)).astype(self._type, copy=False)
            finally:
                # A job that failed holds its error, which holds what is here: that circle would hold the files.
                while jobs:
                    jobs.pop().cancel()
        finally:
            self._decoding -= len(files)


def file_input(name: str) -> TensorSpec:
    """The input of the image model: one file for each image, with or without a side of 1 behind the batch."""
    return TensorSpec(name, BYTES, (-1, 1), optional_sides=1)
