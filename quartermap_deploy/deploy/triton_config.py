"""Model configurations for Triton, as plain values for `textproto`.

The batch is no part of the shapes there: with `max_batch_size` n > 0 every shape begins with an open batch that is left
out, and with 0 the shapes are those of the graph, and requests are never put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quartermap_deploy.deploy.textproto import Enum, string_map
from quartermap_deploy.deploy.triton_source import Source

LABELS_FILE = "labels.txt"
IMAGE, PROBABILITIES = "image", "probabilities"
"""Names of the tensors of the image models."""

_TYPES = {"float32": Enum("TYPE_FP32"), "float16": Enum("TYPE_FP16")}
_BYTES = Enum("TYPE_STRING")


@dataclass(frozen=True)
class Interface:
    """What all models of a repository agree on.

    Attributes:
        name: of the model; the others are named after it.
        input: name of its input.
        output: name of its output.
        image_shape: (channels, height, width); -1 for an open size.
        classes: how many.
        type: of both, "float32" or "float16".
        max_batch: largest batch, or 0 where the graph has a batch of its own, of one image.
    """

    name: str
    input: str
    output: str
    image_shape: tuple[int, ...]
    classes: int
    type: str
    max_batch: int

    @property
    def ensemble(self) -> str:
        """Name of the model that takes images."""
        return f"{self.name}_image"

    @property
    def preprocess(self) -> str:
        """Name of the model that prepares them."""
        return f"{self.name}_preprocess"

    @property
    def probabilities(self) -> str:
        """Name of the model that makes probabilities of logits."""
        return f"{self.name}_probabilities"

    def tensor(self, name: str, kind: Enum, shape: Sequence[int], **more: Any) -> dict[str, Any]:
        """Return an input or output of a configuration; the shape is that of one image."""
        return {"name": name, "data_type": kind, "dims": self.dims(shape), **more}

    def dims(self, shape: Sequence[int]) -> list[int]:
        """The shape of one image as Triton wants it."""
        return list(shape) if self.max_batch else [1, *shape]


@dataclass(frozen=True)
class Sample:
    """One warm-up request.

    Attributes:
        name: for Triton's log.
        file: its data, in the folder `warmup` of the model.
        batch: how many of them at once.
    """

    name: str
    file: str
    batch: int = 1


def model_config(
    interface: Interface,
    source: Source,
    samples: Sequence[Sample],
    sample_shape: Sequence[int],
    *,
    gpu: bool,
    instances: int,
    threads: int,
    max_delay_us: int,
) -> dict[str, Any]:
    """Return the configuration of the model itself.

    Args:
        interface: see there.
        source: what is served.
        samples: warm-up requests.
        sample_shape: (channels, height, width) of their images.
        gpu: whether it runs on GPUs.
        instances: how many on each GPU, or on the CPU.
        threads: of an instance on the CPU; 0 for all cores.
        max_delay_us: how long a request may wait for others, in microseconds.
    """
    kind = _TYPES[interface.type]
    images = interface.tensor(interface.input, kind, interface.image_shape)
    group: dict[str, Any] = {"count": instances, "kind": Enum("KIND_GPU" if gpu else "KIND_CPU")}
    if len(source.profiles) > 1:
        # Without names Triton takes the first profile alone.
        group["profile"] = [str(index) for index in range(len(source.profiles))]
    platform = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}[source.backend]
    config: dict[str, Any] = {
        "name": interface.name,
        "platform": platform,
        "backend": source.backend,
        "default_model_filename": source.default_file,
        "cc_model_filenames": string_map(source.capability_files),
        "max_batch_size": interface.max_batch,
        "input": [images],
        "output": [interface.tensor(interface.output, kind, [interface.classes], label_filename=LABELS_FILE)],
        "instance_group": [group],
    }
    if interface.max_batch > 1:
        # Sizes to wait for pay where several profiles are each tuned for one; else they only cut large batches up.
        sizes = {profile.batch[1] for profile in source.profiles} | {interface.max_batch}
        preferred = sorted(sizes) if len(source.profiles) > 1 else []
        config["dynamic_batching"] = {
            "preferred_batch_size": [size for size in preferred if 1 < size <= interface.max_batch],
            "max_queue_delay_microseconds": max_delay_us,
        }
    if not gpu:
        config["parameters"] = _parameters(intra_op_thread_count=str(threads))
    config["model_warmup"] = [
        _warmup(sample, interface.input, kind, interface.dims(sample_shape)) for sample in samples
    ]
    return config


def preprocess_config(
    interface: Interface, settings: str, size: tuple[int, int], sample: Sample, instances: int
) -> dict[str, Any]:
    """Return the configuration of the model that decodes and prepares images.

    Args:
        interface: see there.
        settings: for its script, which says what is in them.
        size: (height, width) of what it makes.
        sample: a warm-up request.
        instances: how many images are decoded at the same time.
    """
    shape = (interface.image_shape[0], *size)
    return {
        "name": interface.preprocess,
        "backend": "python",
        "max_batch_size": interface.max_batch,
        "input": [_image(interface)],
        "output": [interface.tensor(interface.input, _TYPES[interface.type], shape)],
        "instance_group": [{"count": instances, "kind": Enum("KIND_CPU")}],
        "parameters": _parameters(preprocessing=settings),
        "model_warmup": [_warmup(sample, IMAGE, _BYTES, [1])],
    }


def probabilities_config(interface: Interface) -> dict[str, Any]:
    """Return the configuration of the model that makes probabilities of logits."""
    shape = [interface.classes]
    return {
        "name": interface.probabilities,
        "backend": "python",
        "max_batch_size": interface.max_batch,
        "input": [interface.tensor(interface.output, _TYPES[interface.type], shape)],
        "output": [
            interface.tensor(PROBABILITIES, _TYPES["float32"], shape, label_filename=LABELS_FILE),
        ],
        "instance_group": [{"count": 1, "kind": Enum("KIND_CPU")}],
    }


def ensemble_config(interface: Interface) -> dict[str, Any]:
    """Return the configuration of the model that takes images and gives probabilities, by the other three."""
    steps = (
        (interface.preprocess, IMAGE, interface.input),
        (interface.name, interface.input, interface.output),
        (interface.probabilities, interface.output, PROBABILITIES),
    )
    return {
        "name": interface.ensemble,
        "platform": "ensemble",
        "max_batch_size": interface.max_batch,
        "input": [_image(interface)],
        "output": [
            interface.tensor(
                PROBABILITIES, _TYPES["float32"], [interface.classes], label_filename=LABELS_FILE
            )
        ],
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": model,
                    "model_version": -1,
                    "input_map": string_map({given: given}),
                    "output_map": string_map({made: made}),
                }
                for model, given, made in steps
            ]
        },
    }


def _image(interface: Interface) -> dict[str, Any]:
    """The input of encoded images: one for each image of a batch, or one alone."""
    return {"name": IMAGE, "data_type": _BYTES, "dims": [1]}


def _parameters(**values: str) -> list[dict[str, Any]]:
    return string_map({name: {"string_value": value} for name, value in values.items()})


def _warmup(sample: Sample, name: str, kind: Enum, dims: list[int]) -> dict[str, Any]:
    data = {"data_type": kind, "dims": dims, "input_data_file": sample.file}
    return {"name": sample.name, "batch_size": sample.batch, "inputs": string_map({name: data})}
