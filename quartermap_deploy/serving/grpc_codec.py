"""Requests and answers over gRPC: messages, with values in them or as raw bytes beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.serving.grpc_messages import messages
from quartermap_deploy.serving.models import VERSION, Description
from quartermap_deploy.serving.refusal import invalid
from quartermap_deploy.serving.requests import (
    InferRequest,
    RequestedOutput,
    class_count,
    match_inputs,
    match_outputs,
)
from quartermap_deploy.serving.tensors import (
    BYTES,
    TensorSpec,
    count_of,
    datatype_of,
    from_raw,
    from_strings,
    from_values,
    to_raw,
)

_CONFIG_TYPES = {"FP16": 10, "FP32": 11, BYTES: 13}
"""Numbers of the element types in Triton's model configuration."""
CONFIG_NAMES = {10: "TYPE_FP16", 11: "TYPE_FP32", 13: "TYPE_STRING"}
"""Their names there."""


def parse_request(request: Any, model: Description) -> InferRequest:
    """Read a ModelInferRequest.

    Raises:
        Refusal: if it is not one for this model.
    """
    specs = match_inputs(model.inputs, [tensor.name for tensor in request.inputs])
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise invalid(f"there are {len(raw)} raw_input_contents for {len(request.inputs)} inputs")
    inputs = {}
    for index, (spec, tensor) in enumerate(zip(specs, request.inputs, strict=True)):
        shape = spec.check(tensor.datatype, list(tensor.shape), model.max_batch)
        if "shared_memory_region" in tensor.parameters:
            raise invalid("there is no shared memory here; send the values with the request")
        if not raw:
            inputs[spec.name] = _contents(spec, shape, tensor.contents)
        elif tensor.HasField("contents"):
            raise invalid(f"input {spec.name!r} has contents, and there are raw_input_contents; expected one")
        else:
            inputs[spec.name] = from_raw(spec, shape, memoryview(raw[index]))
    return InferRequest(inputs, _outputs(request, model), request.id, raw=bool(raw))


def build_response(model: Description, request: InferRequest, outputs: Mapping[str, NDArray[Any]]) -> Any:
    """Return a ModelInferResponse, with raw bytes if the request had them."""
    response = messages()["ModelInferResponse"](model_name=model.name, model_version=VERSION, id=request.id)
    for wanted in request.outputs:
        values = outputs[wanted.name]
        kind = BYTES if values.dtype == object else datatype_of(values.dtype.name)
        tensor = response.outputs.add(name=wanted.name, datatype=kind, shape=values.shape)
        # 16-bit numbers have no contents.
        if request.raw or kind == "FP16":
            response.raw_output_contents.append(to_raw(values))
        elif kind == BYTES:
            tensor.contents.bytes_contents.extend(values.reshape(-1).tolist())
        else:
            tensor.contents.fp32_contents.extend(values.reshape(-1).tolist())
    return response


def _contents(spec: TensorSpec, shape: tuple[int, ...], contents: Any) -> NDArray[Any]:
    values = contents.bytes_contents if spec.datatype == BYTES else contents.fp32_contents
    if len(values) > count_of(shape):
        # Before all of them become objects of Python.
        raise invalid(
            f"input {spec.name!r} has {len(values)} values, its shape {list(shape)} needs {count_of(shape)}"
        )
    if spec.datatype == BYTES:
        return from_strings(spec, shape, list(values))
    if spec.datatype == "FP16":
        raise invalid(f"input {spec.name!r} is FP16, which goes into raw_input_contents alone")
    return from_values(spec, shape, np.array(values, dtype=np.float32))


def _outputs(request: Any, model: Description) -> list[RequestedOutput]:
    if not request.outputs:
        return [RequestedOutput(spec.name) for spec in model.outputs]
    wanted = []
    for output in request.outputs:
        if "shared_memory_region" in output.parameters:
            raise invalid("there is no shared memory here; take the values with the answer")
        classes = 0
        if "classification" in output.parameters:
            classes = class_count(output.parameters["classification"].int64_param)
        wanted.append(RequestedOutput(output.name, classes=classes))
    return match_outputs(model.outputs, wanted)


def metadata(model: Description) -> Any:
    """Return a ModelMetadataResponse."""
    response = messages()["ModelMetadataResponse"](
        name=model.name, versions=[VERSION], platform=model.platform, properties=dict(model.properties)
    )
    for specs, tensors in ((model.inputs, response.inputs), (model.outputs, response.outputs)):
        for spec in specs:
            tensors.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
    return response


def configuration(model: Description) -> dict[str, Any]:
    """Return the part of Triton's model configuration that clients ask for, by the names of its fields.

    Shapes are without the batch there, except where batches have a fixed size of 1.
    """
    values: dict[str, Any] = {
        "name": model.name,
        "platform": model.platform,
        "max_batch_size": model.max_batch if model.inputs[0].shape[0] == -1 else 0,
    }
    skipped = 1 if values["max_batch_size"] else 0
    for key, specs in (("input", model.inputs), ("output", model.outputs)):
        values[key] = [
            {
                "name": spec.name,
                "data_type": _CONFIG_TYPES[spec.datatype],
                "dims": list(spec.shape[skipped:]),
            }
            for spec in specs
        ]
    if model.max_batch > 1:
        values["dynamic_batching"] = {"max_queue_delay_microseconds": int(model.max_delay * 1e6)}
    # Triton's client for gRPC has no properties in its metadata, so the provenance is here, too.
    values["parameters"] = {name: {"string_value": text} for name, text in model.properties.items()}
    return values


def configuration_message(model: Description) -> Any:
    """Return the configuration as a ModelConfig."""
    values = configuration(model)
    parameters = values.pop("parameters")
    message = messages()["ModelConfig"](**values)
    for name, parameter in parameters.items():
        message.parameters[name].string_value = parameter["string_value"]
    return message


def statistics(models: list[dict[str, Any]]) -> Any:
    """Return a ModelStatisticsResponse from the plain values of the models' statistics."""
    kinds = messages()
    response = kinds["ModelStatisticsResponse"]()
    for values in models:
        response.model_stats.append(kinds["ModelStatistics"](**values))
    return response
