"""`predict`: what a bundle makes of image files, by its task.

    classification      the most probable classes
    segmentation        a mask: the most probable class of every pixel
    image               the image that the model returns
    features, other     every output as an array, by name

Preprocessing, class names and task are the bundle's own. Needs NumPy, Pillow and the target's runtime, not torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.batch_axis import batch_of, largest_batch
from quartermap_deploy.classes import Activation, activation_of, class_labels, named, probabilities
from quartermap_deploy.data.image_files import images_in
from quartermap_deploy.data.images import ImageLike, is_one, prepare_into
from quartermap_deploy.errors import InputError
from quartermap_deploy.image_interface import ImageInterface, image_interface
from quartermap_deploy.model_facts import ModelFacts
from quartermap_deploy.pictures import has_known_range, mask_of, picture_of, shares_of
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.targets import Session
from quartermap_deploy.targets.execution import ON_CPU, Execution
from quartermap_deploy.tensor_info import TensorInfo

TOP = 5
"""Classes of an image where nobody says how many."""
BATCH = 8
"""Images at once where neither an engine nor a fixed batch says otherwise."""
SHOWN = 3
"""Broken images that a message names."""
BACKGROUND = "background"
"""Class 0 of a model that marks the pixels of one class alone."""


@dataclass(frozen=True)
class Score:
    """How probable a class is.

    Attributes:
        index: of the class.
        label: its name, or its number where it has none.
        probability: from 0 to 1.
    """

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Classes:
    """The classes of an image.

    Attributes:
        source: the image.
        scores: the most probable classes, the first one first.
    """

    source: str
    scores: tuple[Score, ...]

    @property
    def best(self) -> Score:
        """The most probable class."""
        return self.scores[0]


@dataclass(frozen=True, eq=False)
class Mask:
    """The classes of an image's pixels.

    Attributes:
        source: the image.
        mask: the class of every pixel of what the model saw, after resize and crop: (height, width) of uint8, or of
            uint16 where there are more than 256 classes.
        labels: names of the classes that are in it, by number.
    """

    source: str
    mask: NDArray[np.unsignedinteger[Any]]
    labels: Mapping[int, str]

    @property
    def shares(self) -> dict[int, float]:
        """For each class in the mask its share of the pixels, the largest first."""
        return shares_of(self.mask)


@dataclass(frozen=True, eq=False)
class Picture:
    """The image that a model returned for an image.

    Attributes:
        source: the image that it was given.
        values: what the network returned, (channels, height, width), in its own scale and its own order of channels.
        pixels: the same as an image, (height, width) or (height, width, channels) of uint8, RGB where it has colours;
            clipped to 0…255. Only where the scale is known: the model takes images that are scaled but not normalised
            (mean 0 and std 1), and returns as many channels. Otherwise None: whether a model that takes normalised
            images returns normalised ones, nobody said.
    """

    source: str
    values: NDArray[np.floating[Any]]
    pixels: NDArray[np.uint8] | None


@dataclass(frozen=True, eq=False)
class Arrays:
    """The outputs of a model for an image.

    Attributes:
        source: the image.
        arrays: every output by name, without the batch.
    """

    source: str
    arrays: Mapping[str, NDArray[Any]]


Prediction: TypeAlias = "Classes | Mask | Picture | Arrays"


@dataclass(frozen=True)
class Broken:
    """An image of which nothing was predicted.

    Attributes:
        source: the image.
        reason: what is wrong.
    """

    source: str
    reason: str


@dataclass(frozen=True, eq=False)
class Predictions(Sequence[Prediction]):
    """What a bundle made of images: a sequence of the predictions, in the order of the images.

    Attributes:
        task: the bundle's.
        results: a prediction for each image that could be used.
        broken: the other images.
    """

    task: str
    results: tuple[Prediction, ...]
    broken: tuple[Broken, ...]

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, place: Any) -> Any:
        return self.results[place]


def predict(
    bundle: ModelFacts,
    files: ImageLike | Iterable[ImageLike],
    *,
    top: int = TOP,
    batch: int | None = None,
    target: str | None = None,
    execution: Execution = ON_CPU,
    preprocessing: Mapping[str, Any] | None = None,
    labels: str | PathLike[str] | Sequence[str] | None = None,
    progress: Progress = SILENT,
) -> Predictions:
    """Run a bundle on image files; `Bundle.predict` says how."""
    images = listed(files)
    predictor = make_predictor(
        bundle,
        top=top,
        batch=batch,
        target=target,
        execution=execution,
        preprocessing=preprocessing,
        labels=labels,
    )
    results: list[Prediction] = []
    broken: list[Broken] = []
    with progress.step("predicting", total=len(images)) as advance:
        for found in predictor.each(images):
            advance(1)
            if isinstance(found, Broken):
                broken.append(found)
            else:
                results.append(found)
    require_some(len(results), broken)
    return Predictions(bundle.task, tuple(results), tuple(broken))


def listed(files: ImageLike | Iterable[ImageLike]) -> list[tuple[str, ImageLike]]:
    """Return images with names for messages, those in folders among them.

    Args:
        files: files, folders, arrays or Pillow images, or one of them, or an array of several images.

    Raises:
        InputError: if there is none, or a folder holds none.
    """
    found: list[tuple[str, ImageLike]] = []
    images: Iterable[ImageLike] = [files] if is_one(files) else files  # type: ignore[assignment, list-item]
    for place, image in enumerate(images, 1):
        if not isinstance(image, (str, PathLike)):
            found.append((f"image {place}", image))
        elif os.path.isdir(image):
            found += [(_text(path), path) for path in images_in(Path(image))]
        else:
            found.append((_text(image), image))
    if not found:
        raise InputError("there is no image to predict from; give files or folders of images")
    return found


def _text(path: str | PathLike[str]) -> str:
    """A path for messages and files; bytes that are no UTF-8 are escaped, as nothing could be written with them."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode()


def require_some(results: int, broken: Sequence[Broken]) -> None:
    """Check that something was predicted.

    Raises:
        InputError: if not; the message names the broken images.
    """
    if results or not broken:
        return
    if len(broken) == 1:
        raise InputError(f"{broken[0].source} {broken[0].reason}")
    raise InputError(f"none of {len(broken)} images can be used: {broken_text(broken)}")


def broken_text(broken: Sequence[Broken]) -> str:
    """Name some broken images, each with its reason."""
    text = "; ".join(f"{one.source} {one.reason}" for one in broken[:SHOWN])
    return text + (f"; and {len(broken) - SHOWN} more" if len(broken) > SHOWN else "")


# Predictors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Predictor:
    """A bundle that is ready to predict.

    Attributes:
        bundle: the bundle.
        target: by which of its targets.
        session: what runs it.
        interface: how images become its input.
        labels: names of its classes; nothing where nobody gave any.
        batch: images at once.
        pads: whether a smaller batch has to be filled up, as the graph has no other.
        finish: makes a prediction of the outputs for one image, by name.
    """

    bundle: ModelFacts
    target: str
    session: Session
    interface: ImageInterface
    labels: tuple[str, ...]
    batch: int
    pads: bool
    finish: Callable[[str, Mapping[str, NDArray[Any]]], Prediction | Broken]

    def each(self, images: Iterable[tuple[str, ImageLike]]) -> Iterator[Prediction | Broken]:
        """Predict from images with their names, batch by batch; one result for each, in their order.

        Raises:
            InputError: if the model does not take the size of the prepared images.
        """
        waiting: list[tuple[str, ImageLike]] = []
        for image in images:
            waiting.append(image)
            if len(waiting) == self.batch:
                yield from self._batch(waiting)
                waiting = []
        if waiting:
            yield from self._batch(waiting)

    def _batch(self, images: Sequence[tuple[str, ImageLike]]) -> Iterator[Prediction | Broken]:
        settings = self.interface.preprocessing
        prepared = np.empty((len(images), *settings.input_shape), dtype=np.float32)
        broken: dict[int, Broken] = {}
        for place, (source, image) in enumerate(images):
            try:
                prepare_into(prepared[place], image, settings)
            except InputError as error:
                broken[place] = Broken(source, _reason(str(error), source))
        whole = [place for place in range(len(images)) if place not in broken]
        found = dict(zip(whole, self._run(prepared[whole]), strict=True)) if whole else {}
        for place, (source, _) in enumerate(images):
            yield broken[place] if place in broken else self.finish(source, found[place])

    def _run(self, batch: NDArray[np.float32]) -> list[dict[str, NDArray[Any]]]:
        """The outputs for each image, by name."""
        count = len(batch)
        if self.pads and count < self.batch:
            batch = np.concatenate([batch, np.repeat(batch[-1:], self.batch - count, axis=0)])
        item = self.interface.item
        outputs = self.session.infer({item.name: batch.astype(self.session.input_type, copy=False)})
        leading = {output.name for output in self.bundle.outputs if _leads(output, item)}
        return [
            {
                name: np.asarray(values[place]) if name in leading else values
                for name, values in outputs.items()
            }
            for place in range(count)
        ]


def make_predictor(
    bundle: ModelFacts,
    *,
    top: int = TOP,
    batch: int | None = None,
    target: str | None = None,
    execution: Execution = ON_CPU,
    preprocessing: Mapping[str, Any] | None = None,
    labels: str | PathLike[str] | Sequence[str] | None = None,
) -> Predictor:
    """Open a bundle for predicting; `Bundle.predict` says what the arguments are and what is raised."""
    for name, value in (("top", top), ("batch", 1 if batch is None else batch)):
        if type(value) is not int or value < 1:
            raise InputError(f"{name} = {value!r}; expected a whole number of at least 1")
    chosen = bundle.target(target)
    interface = image_interface(bundle, preprocessing)
    names = class_labels(bundle, labels)
    size, pads = _batch_size(bundle, interface.item, chosen, batch)
    finish = _finisher(bundle, interface, names, top)
    return Predictor(
        bundle, chosen, bundle.session(chosen, execution=execution), interface, names, size, pads, finish
    )


def _batch_size(bundle: ModelFacts, item: TensorInfo, target: str, wanted: int | None) -> tuple[int, bool]:
    """How many images are run at once, and whether no fewer can be."""
    limit, shared = largest_batch(bundle, target), batch_of(bundle)
    if shared is None:
        if limit not in (None, 1) and isinstance(item.shape[0], int):
            raise InputError(
                f"the model takes {limit} images at once and does not answer for each of them; give arrays to "
                "bundle.run instead"
            )
        # What an output has that has no batch belongs to all images of a run.
        limit = 1
    if wanted is not None and limit is not None and wanted > limit:
        raise InputError(
            f"batches of {wanted} are asked for, and the model takes {limit} at most; ask for less"
        )
    if isinstance(shared, int):
        return shared, True
    return wanted or min(BATCH, limit or BATCH), False


def _leads(output: TensorInfo, item: TensorInfo) -> bool:
    """Whether the first axis of an output is the batch of the input."""
    return output.shape[:1] == item.shape[:1]


def _finisher(
    bundle: ModelFacts, interface: ImageInterface, labels: tuple[str, ...], top: int
) -> Callable[[str, Mapping[str, NDArray[Any]]], Prediction | Broken]:
    """What makes predictions of outputs, by the bundle's task."""
    first, task = bundle.outputs[0], bundle.task
    axes = {"classification": ("batch", "classes"), "segmentation": ("batch", "classes", "height", "width")}
    expected = axes.get(task, ())
    if expected and (len(first.shape) != len(expected) or not _leads(first, interface.item)):
        raise InputError(
            f"the task is {task}, and the output {first.name} has the shape ({', '.join(map(str, first.shape))}); "
            f"expected ({', '.join(expected)}); give arrays to bundle.run instead"
        )
    if task == "classification":
        return _finite(first.name, _to_classes(first.name, labels, activation_of(bundle), top))
    if task == "segmentation":
        return _finite(first.name, _to_mask(first.name, labels, activation_of(bundle), interface))
    if task == "image" and len(first.shape) == 4 and _leads(first, interface.item):
        return _finite(first.name, _to_picture(first, interface))
    return lambda source, outputs: Arrays(source, dict(outputs))


Finish = Callable[[str, Mapping[str, NDArray[Any]]], Prediction]


def _finite(name: str, finish: Finish) -> Callable[[str, Mapping[str, NDArray[Any]]], Prediction | Broken]:
    """Predict nothing of an output that is no number."""

    def checked(source: str, outputs: Mapping[str, NDArray[Any]]) -> Prediction | Broken:
        if not np.isfinite(outputs[name]).all():
            return Broken(source, f"makes the model's output {name} NaN or infinite")
        return finish(source, outputs)

    return checked


def _to_classes(name: str, labels: tuple[str, ...], activation: Activation, top: int) -> Finish:
    def finish(source: str, outputs: Mapping[str, NDArray[Any]]) -> Classes:
        (row,) = probabilities(outputs[name][None], activation)
        order = np.argsort(-row, kind="stable")[:top]
        return Classes(source, tuple(Score(int(i), named(labels, int(i)), float(row[i])) for i in order))

    return finish


def _to_mask(name: str, labels: tuple[str, ...], activation: Activation, interface: ImageInterface) -> Finish:
    size = interface.preprocessing.crop

    def finish(source: str, outputs: Mapping[str, NDArray[Any]]) -> Mask:
        mask = mask_of(outputs[name], size, activation)
        names = mask_labels(labels, len(outputs[name]))
        return Mask(source, mask, {int(index): named(names, int(index)) for index in np.unique(mask)})

    return finish


def mask_labels(labels: tuple[str, ...], classes: int) -> tuple[str, ...]:
    """Names of the numbers in a mask: those of the classes; where there is one class alone, it is number 1."""
    return (BACKGROUND, named(labels, 0) if labels else "1") if classes == 1 else labels


def _to_picture(item: TensorInfo, interface: ImageInterface) -> Finish:
    known = has_known_range(interface.preprocessing, item.shape[1])

    def finish(source: str, outputs: Mapping[str, NDArray[Any]]) -> Picture:
        values = outputs[item.name]
        pixels = np.asarray(picture_of(values, interface.preprocessing)) if known else None
        return Picture(source, values, pixels)

    return finish


def _reason(message: str, source: str) -> str:
    """What is wrong with an image, without its name."""
    for name in (f"the image {source} ", "the image "):
        if message.startswith(name):
            return message[len(name) :]
    return f"cannot be used: {message}"
