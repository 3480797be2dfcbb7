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
    check_batch,
    class_count,
    match_inputs,
    match_outputs,
)
from quartermap_deploy.serving.tensors import (
    BYTES,
    TensorSpec,
    count_of,
    datatype_of_values,
    element_type_of,
    from_raw,
    from_strings,
    from_values,
    to_raw,
)

_CONFIG_TYPES = {
    **{
        "BOOL": 1,
        "UINT8": 2,
        "UINT16": 3,
        "UINT32": 4,
        "UINT64": 5,
        "INT8": 6,
        "INT16": 7,
        "INT32": 8,
        "INT64": 9,
    },
    **{"FP16": 10, "FP32": 11, "FP64": 12, BYTES: 13},
}
"""Numbers of the element types in Triton's model configuration."""
CONFIG_NAMES = {
    number: "TYPE_STRING" if name == BYTES else f"TYPE_{name}" for name, number in _CONFIG_TYPES.items()
}
"""Their names there."""
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}
"""Where in a message the values of a type are; those of FP16 are raw alone."""


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
        # No more of a long shape becomes objects of Python than says that it is wrong.
        shape = spec.check(tensor.datatype, list(tensor.shape[: len(spec.shape) + 1]), model.max_batch)
        if "shared_memory_region" in tensor.parameters:
            raise invalid("there is no shared memory here; send the values with the request")
        if not raw:
            inputs[spec.name] = _contents(spec, shape, tensor.contents)
        elif tensor.HasField("contents"):
            raise invalid(f"input {spec.name!r} has contents, and there are raw_input_contents; expected one")
        else:
            inputs[spec.name] = from_raw(spec, shape, memoryview(raw[index]))
    if model.batch_axis:
        check_batch(inputs)
    return InferRequest(inputs, _outputs(request, model), request.id, raw=bool(raw))


def build_response(model: Description, request: InferRequest, outputs: Mapping[str, NDArray[Any]]) -> Any:
    """Return a ModelInferResponse, with raw bytes if the request had them."""
    response = messages()["ModelInferResponse"](model_name=model.name, model_version=VERSION, id=request.id)
    # Either all are raw or none is.
    raw = request.raw or any(outputs[wanted.name].dtype == np.float16 for wanted in request.outputs)
    for wanted in request.outputs:
        values = outputs[wanted.name]
        kind = datatype_of_values(values)
        tensor = response.outputs.add(name=wanted.name, datatype=kind, shape=values.shape)
        if raw:
            response.raw_output_contents.append(to_raw(values))
        else:
            getattr(tensor.contents, _CONTENTS[kind]).extend(values.reshape(-1).tolist())
    return response


def _contents(spec: TensorSpec, shape: tuple[int, ...], contents: Any) -> NDArray[Any]:
    if spec.datatype not in _CONTENTS:
        raise invalid(f"input {spec.name!r} is {spec.datatype}, which goes into raw_input_contents alone")
    values = getattr(contents, _CONTENTS[spec.datatype])
    if len(values) > count_of(shape):
        # Before all of them become objects of Python.
        raise invalid(
            f"input {spec.name!r} has {len(values)} values, its shape {list(shape)} needs {count_of(shape)}"
        )
    if spec.datatype == BYTES:
        return from_strings(spec, shape, list(values))
    element = element_type_of(spec.datatype)
    # In a message small whole numbers are of 32 bits, which may be too large for them.
    wide = {"i": np.dtype(np.int64), "u": np.dtype(np.uint64)}.get(element.kind, element)
    return from_values(spec, shape, np.array(values, dtype=wide))


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

    Shapes are without the batch there, except where requests are never put together.
    """
    values: dict[str, Any] = {
        "name": model.name,
        "platform": model.platform,
        "max_batch_size": model.max_batch if model.joins else 0,
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
    if model.joins and model.max_batch > 1:
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
