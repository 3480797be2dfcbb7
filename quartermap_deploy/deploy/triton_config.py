"""Model configurations for Triton, as plain values for `textproto`.

The batch is no part of the shapes there: with `max_batch_size` n > 0 every shape begins with an open batch that is left
out, and with 0 the shapes are those of the graph, and requests are never put together. So n > 0 is for models whose
inputs and outputs all have one open batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quartermap_deploy.deploy.textproto import Enum, string_map
from quartermap_deploy.deploy.triton_source import Source
from quartermap_deploy.image_interface import ImageInterface
from quartermap_deploy.tensor_info import TensorInfo

LABELS_FILE = "labels.txt"

_TYPES = {
    **{f"float{bits}": Enum(f"TYPE_FP{bits}") for bits in (16, 32, 64)},
    **{
        f"{kind}{bits}": Enum(f"TYPE_{kind.upper()}{bits}")
        for kind in ("int", "uint")
        for bits in (8, 16, 32, 64)
    },
    "bool": Enum("TYPE_BOOL"),
}
_BYTES = Enum("TYPE_STRING")


def is_known_type(element_type: str) -> bool:
    """Whether Triton has one of NumPy's element types; it has bfloat16 too, and NumPy has not."""
    return element_type in _TYPES


@dataclass(frozen=True)
class Interface:
    """What all models of a repository agree on.

    Attributes:
        name: of the model; the others are named after it.
        inputs: what it takes.
        outputs: what it gives.
        max_batch: largest batch, or 0 where requests are never put together and the shapes are those of the graph.
        images: how image files become its input; None where there are no models that take some.
        classes: how many it tells apart, if its first output is their logits; None if it is not.
        files: name of the input of image files.
        probabilities: name of the output of probabilities.
    """

    name: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    max_batch: int
    images: ImageInterface | None
    classes: int | None
    files: str
    probabilities: str

    @property
    def ensemble(self) -> str:
        """Name of the model that takes images."""
        return f"{self.name}_image"

    @property
    def preprocess(self) -> str:
        """Name of the model that prepares them."""
        return f"{self.name}_preprocess"

    @property
    def softmax(self) -> str:
        """Name of the model that makes probabilities of logits."""
        return f"{self.name}_probabilities"

    def tensor(self, item: TensorInfo, **more: Any) -> dict[str, Any]:
        """Return an input or output of a configuration."""
        shape = self.dims([size if isinstance(size, int) else -1 for size in item.shape])
        # Triton has no shape without axes. Without a batch it takes no empty one to reshape to either: its ONNX Runtime
        # backend gives an output without axes the shape that stands here.
        reshape: dict[str, Any] = {"reshape": {"shape": []}} if not shape and self.max_batch else {}
        return {
            "name": item.name,
            "data_type": _TYPES[item.type],
            "dims": shape or [1],
            **reshape,
            **more,
        }

    def output(self, item: TensorInfo) -> dict[str, Any]:
        """Return an output, with the file of labels where it has classes."""
        labelled = self.classes is not None and item.name in (self.outputs[0].name, self.probabilities)
        return self.tensor(item, **({"label_filename": LABELS_FILE} if labelled else {}))

    def dims(self, shape: Sequence[int]) -> list[int]:
        """A shape with its batch as Triton wants it."""
        return list(shape)[1 if self.max_batch else 0 :]

    @property
    def prepared(self) -> TensorInfo:
        """The input that takes images, in the size that files are prepared for."""
        assert self.images is not None
        item = self.images.item
        return replace(item, shape=(item.shape[0], *self.images.preprocessing.input_shape))

    @property
    def probability_output(self) -> TensorInfo:
        """The probabilities of the classes."""
        return TensorInfo(self.probabilities, self.outputs[0].shape, "float32")


@dataclass(frozen=True)
class Sample:
    """One warm-up request.

    Attributes:
        name: for Triton's log.
        files: the file with the values of each input, in the folder `warmup` of the model.
        shapes: the shape of each input, without the batch where there is one.
        batch: how many of them at once.
    """

    name: str
    files: Mapping[str, str]
    shapes: Mapping[str, Sequence[int]]
    batch: int = 1


def model_config(
    interface: Interface,
    source: Source,
    samples: Sequence[Sample],
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
        gpu: whether it runs on GPUs.
        instances: how many on each GPU, or on the CPU.
        threads: of an instance on the CPU; 0 for all cores.
        max_delay_us: how long a request may wait for others, in microseconds.
    """
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
        "input": [interface.tensor(item) for item in interface.inputs],
        "output": [interface.output(item) for item in interface.outputs],
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
    types = {item.name: _TYPES[item.type] for item in interface.inputs}
    config["model_warmup"] = [_warmup(sample, types) for sample in samples]
    return config


def preprocess_config(interface: Interface, settings: str, instances: int) -> dict[str, Any]:
    """Return the configuration of the model that decodes and prepares images.

    Args:
        interface: see there.
        settings: for its script, which says what is in them.
        instances: how many images are decoded at the same time.
    """
    return {
        "name": interface.preprocess,
        "backend": "python",
        "max_batch_size": interface.max_batch,
        "input": [_files(interface)],
        "output": [interface.tensor(interface.prepared)],
        "instance_group": [{"count": instances, "kind": Enum("KIND_CPU")}],
        "parameters": _parameters(preprocessing=settings),
    }


def probabilities_config(interface: Interface, activation: str) -> dict[str, Any]:
    """Return the configuration of the model that makes probabilities of logits.

    Args:
        interface: see there.
        activation: how, for its script: "softmax", "sigmoid", or "none" where they are probabilities already.
    """
    return {
        "name": interface.softmax,
        "backend": "python",
        "max_batch_size": interface.max_batch,
        "input": [interface.tensor(interface.outputs[0])],
        "output": [interface.output(interface.probability_output)],
        "instance_group": [{"count": 1, "kind": Enum("KIND_CPU")}],
        "parameters": _parameters(activation=activation),
    }


def ensemble_config(interface: Interface) -> dict[str, Any]:
    """Return the configuration of the model that takes images, by the others.

    It gives probabilities where there are classes, and otherwise what the model itself does.
    """
    prepared, logits = interface.prepared.name, interface.outputs[0].name
    made = [item.name for item in interface.outputs]
    outputs = [interface.output(item) for item in interface.outputs]
    steps = [(interface.preprocess, interface.files, [prepared])]
    if interface.classes is None:
        steps.append((interface.name, prepared, made))
    else:
        steps += [
            (interface.name, prepared, [logits]),
            (interface.softmax, logits, [interface.probabilities]),
        ]
        outputs = [interface.output(interface.probability_output)]
    return {
        "name": interface.ensemble,
        "platform": "ensemble",
        "max_batch_size": interface.max_batch,
        "input": [_files(interface)],
        "output": outputs,
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": model,
                    "model_version": -1,
                    "input_map": string_map({given: given}),
                    "output_map": string_map({name: name for name in names}),
                }
                for model, given, names in steps
            ]
        },
    }


def _files(interface: Interface) -> dict[str, Any]:
    """The input of encoded images: one for each image of a batch, or one alone."""
    return {"name": interface.files, "data_type": _BYTES, "dims": [1]}


def _parameters(**values: str) -> list[dict[str, Any]]:
    return string_map({name: {"string_value": value} for name, value in values.items()})


def _warmup(sample: Sample, types: Mapping[str, Enum]) -> dict[str, Any]:
    inputs = {
        name: {
            "data_type": types[name],
            "dims": list(sample.shapes[name]) or [1],
            "input_data_file": file,
        }
        for name, file in sample.files.items()
    }
    return {"name": sample.name, "batch_size": sample.batch, "inputs": string_map(inputs)}
