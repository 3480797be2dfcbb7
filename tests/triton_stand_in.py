"""A stand-in for what Triton gives to a model of its Python backend, and for how it reads a repository. Not Triton.

The real `triton_python_backend_utils` exists inside of Triton's server alone. This one has the few classes that our
models use, with the same arguments. Configurations are read by Triton's own protobuf, which its client brings.
"""

from __future__ import annotations

import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

Array = np.ndarray[Any, Any]

TYPES = {
    "TYPE_FP32": np.dtype("<f4"),
    "TYPE_FP16": np.dtype("<f2"),
    "TYPE_INT64": np.dtype("<i8"),
    "TYPE_BOOL": np.dtype("?"),
}


class Tensor:
    """A named array."""

    def __init__(self, name: str, array: Array) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Array:
        return self._array


class TritonError:
    """An error in the answer to one request."""

    INVALID_ARG = "INVALID_ARG"

    def __init__(self, message: str, code: str = "INTERNAL") -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> str:
        return self._code


class TritonModelException(Exception):
    """A model that cannot be used."""


class InferenceRequest:
    """A request with its inputs."""

    def __init__(self, inputs: list[Tensor]) -> None:
        self._inputs = inputs

    def inputs(self) -> list[Tensor]:
        return self._inputs


class InferenceResponse:
    """Outputs, or an error."""

    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self._outputs, self._error = output_tensors or [], error

    def output_tensors(self) -> list[Tensor]:
        return self._outputs

    def error(self) -> TritonError | None:
        return self._error


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


def read_config(repository: Path, model: str) -> Any:
    """Read a model's configuration, as Triton does: an unknown field is an error."""
    text = (repository / model / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def models(repository: Path) -> list[str]:
    """The models of a repository: to Triton every folder in it is one."""
    return sorted(path.name for path in repository.iterdir() if path.is_dir())


def load_model(repository: Path, model: str) -> Any:
    """Load a model of the Python backend from a repository, with this module in the place of Triton's."""
    path = repository / model / "1" / "model.py"
    before = sys.modules.get("triton_python_backend_utils")
    sys.modules["triton_python_backend_utils"] = sys.modules[__name__]
    try:
        spec = importlib.util.spec_from_file_location(f"model_of_{model}", path)
        assert spec is not None and spec.loader is not None
        module = ModuleType(spec.name)
        spec.loader.exec_module(module)
    finally:
        if before is None:
            del sys.modules["triton_python_backend_utils"]
        else:
            sys.modules["triton_python_backend_utils"] = before
    loaded = module.TritonPythonModel()
    config = json_format.MessageToJson(read_config(repository, model), preserving_proto_field_name=True)
    loaded.initialize({"model_config": config, "model_name": model, "model_version": "1"})
    return loaded


def strings(values: list[bytes], shape: tuple[int, ...]) -> Array:
    """Strings as Triton hands them to Python: an array of bytes objects."""
    array = np.empty(len(values), dtype=np.object_)
    array[:] = values
    return array.reshape(shape)


def ask(model: Any, *arrays: Array, name: str) -> list[InferenceResponse]:
    """Send several requests at once, each of one input."""
    answers: list[InferenceResponse] = model.execute([InferenceRequest([Tensor(name, a)]) for a in arrays])
    assert len(answers) == len(arrays)
    return answers


def warmup_batch(repository: Path, model: str, sample: Any, name: str) -> Array:
    """The batch that Triton makes of a warm-up sample: one request for each, all with the same data, put together."""
    config = read_config(repository, model)
    meta = sample.inputs[name]
    data = (repository / model / "warmup" / meta.input_data_file).read_bytes()
    kind = model_config_pb2.DataType.Name(meta.data_type)
    if kind == "TYPE_STRING":
        values, place = [], 0
        while place < len(data):
            (length,) = struct.unpack_from("<I", data, place)
            values.append(data[place + 4 : place + 4 + length])
            place += 4 + length
        assert place == len(data)
        one = strings(values, tuple(meta.dims))
    else:
        one = np.frombuffer(data, dtype=TYPES[kind]).reshape(tuple(meta.dims))
    if config.max_batch_size == 0:
        assert sample.batch_size == 1
        return one
    assert 1 <= sample.batch_size <= config.max_batch_size
    return np.stack([one] * sample.batch_size)


def check_ensemble(repository: Path, model: str) -> None:
    """Check an ensemble by the rules of Triton's core: steps exist, and types and shapes fit from tensor to tensor."""
    ensemble = read_config(repository, model)
    batched = ensemble.max_batch_size > 0
    assert ensemble.platform == "ensemble" and not ensemble.backend
    assert not ensemble.instance_group and not ensemble.model_warmup and not ensemble.HasField("optimization")

    def described(tensor: Any, with_batch: bool) -> tuple[int, list[int]]:
        return tensor.data_type, [*([-1] if with_batch else []), *tensor.dims]

    def agree(one: tuple[int, list[int]], other: tuple[int, list[int]]) -> bool:
        if one[0] != other[0] or len(one[1]) != len(other[1]):
            return False
        return all(a == b or -1 in (a, b) for a, b in zip(one[1], other[1], strict=True))

    tensors = {tensor.name: described(tensor, batched) for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        part = read_config(repository, step.model_name)
        assert step.model_version == -1
        assert part.max_batch_size >= ensemble.max_batch_size
        inputs = {tensor.name: described(tensor, part.max_batch_size > 0) for tensor in part.input}
        outputs = {tensor.name: described(tensor, part.max_batch_size > 0) for tensor in part.output}
        assert set(step.input_map) == set(inputs)
        assert set(step.output_map) <= set(outputs)
        for name, tensor in step.input_map.items():
            assert agree(tensors[tensor], inputs[name]), (tensor, tensors[tensor], inputs[name])
        for name, tensor in step.output_map.items():
            assert tensor not in tensors
            tensors[tensor] = outputs[name]
    for output in ensemble.output:
        assert agree(tensors[output.name], described(output, batched))
