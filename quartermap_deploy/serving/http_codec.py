"""Requests and answers over HTTP: JSON, and the bytes of binary tensors behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from quartermap_deploy.serving.models import VERSION, Description
from quartermap_deploy.serving.refusal import Refusal, invalid, shown
from quartermap_deploy.serving.requests import (
    InferRequest,
    RequestedOutput,
    check_batch,
    class_count,
    match_inputs,
    match_outputs,
)
from quartermap_deploy.serving.tensors import (
    TensorSpec,
    datatype_of_values,
    from_json,
    from_raw,
    to_json,
    to_raw,
)

HEADER_LENGTH = "Inference-Header-Content-Length"
"""The HTTP header with the length of the JSON, where binary tensors follow it."""
_OTHER_VALUES = 1000
"""Most values in the JSON that are none of the inputs' values."""


def parse_request(body: bytes | bytearray, header_length: str | None, model: Description) -> InferRequest:
    """Read the body of an inference request.

    Args:
        body: JSON, and binary tensors behind it.
        header_length: the HTTP header that says how long the JSON is; None where all of it is.
        model: what the request is for.

    Raises:
        Refusal: if it is no such request, not one for this model, or has more JSON than one for it needs.
    """
    length = _header_length(header_length, len(body))
    check_json(length, model)
    text = body[:length] if length < len(body) else body
    _check_values(text, model)
    head = _json(text)
    parameters = _parameters(head, "the request")
    inputs, end = _inputs(head, memoryview(body), length, model)
    if end != len(body):
        raise invalid(
            f"{len(body) - end} bytes follow the binary tensors; expected none. The sizes of the tensors are in their "
            "parameters binary_data_size"
        )
    if model.batch_axis:
        check_batch(inputs)
    name = head.get("id", "")
    if not isinstance(name, str):
        raise invalid("the id of the request is no string")
    binary = _flag(parameters, "binary_data_output")
    return InferRequest(inputs, _outputs(head, binary, model), name)


def check_json(length: int, model: Description) -> None:
    """Check that the JSON of a request is no longer than the model has a use for.

    Raises:
        Refusal: if it is longer.
    """
    limit = model.most_json
    if length > limit:
        raise Refusal(
            413,
            f"the JSON of the request has {length:,} bytes, and {model.name!r} takes {limit:,} at most; send the "
            "values as binary data behind it",
        )


def _check_values(text: bytes | bytearray, model: Description) -> None:
    """Check that there are not many more values in the JSON than the model has a use for, before they become objects.

    Parsing holds up everybody else, and makes hundreds of bytes of some bytes; counting does neither.
    """
    for signs, limit in (((b"[", b"{"), model.most_rows), ((b",",), model.most_rows + model.most_values)):
        found = sum(map(text.count, signs))
        if found > limit + _OTHER_VALUES:
            what = "values" if signs == (b",",) else "lists and objects"
            raise Refusal(
                413,
                f"the JSON of the request has {found:,} {what}, and {model.name!r} takes {limit:,} at most; send one "
                f"flat list of at most {model.most_values:,} values, or binary data behind the JSON",
            )


def build_response(
    model: Description, request: InferRequest, outputs: Mapping[str, NDArray[Any]]
) -> tuple[bytes, dict[str, str]]:
    """Return the body of an answer, and the HTTP headers that go with it."""
    entries: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for wanted in request.outputs:
        values = outputs[wanted.name]
        kind = datatype_of_values(values)
        entry: dict[str, Any] = {"name": wanted.name, "datatype": kind, "shape": list(values.shape)}
        if wanted.binary:
            data = to_raw(values)
            entry["parameters"] = {"binary_data_size": len(data)}
            tail.append(data)
        else:
            entry["data"] = to_json(values)
        entries.append(entry)
    head: dict[str, Any] = {"model_name": model.name, "model_version": VERSION, "outputs": entries}
    if request.id:
        head["id"] = request.id
    text = json.dumps(head, allow_nan=False, separators=(",", ":")).encode("ascii")
    if not tail:
        return text, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return b"".join([text, *tail]), headers


def _header_length(text: str | None, available: int) -> int:
    if text is None:
        return available
    # Not int(), which takes signs, blanks and underscores, and digits of other scripts.
    if not (text.isascii() and text.isdigit()) or len(text) > 12 or int(text) > available:
        raise invalid(
            f"the header {HEADER_LENGTH} is {text[:40]!r}; expected the length of the JSON, at most the {available} "
            "bytes of the body"
        )
    return int(text)


def _json(text: bytes | bytearray) -> dict[str, Any]:
    try:
        head = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        hint = f"; where binary tensors follow it, the header {HEADER_LENGTH} says how long it is"
        raise invalid(f"the request is no JSON ({reason}){hint}") from None
    if not isinstance(head, dict):
        raise invalid("the request is no JSON object")
    return head


def _inputs(
    head: Mapping[str, Any], body: memoryview, position: int, model: Description
) -> tuple[dict[str, NDArray[Any]], int]:
    """Return the inputs by name, and where in the body the last binary one ends."""
    entries = _objects(head.get("inputs"), "inputs")
    specs = match_inputs(model.inputs, [entry.get("name") for entry in entries])
    inputs = {}
    for spec, entry in zip(specs, entries, strict=True):
        shape = spec.check(entry.get("datatype"), entry.get("shape"), model.max_batch)
        parameters = _parameters(entry, f"input {spec.name!r}")
        if "shared_memory_region" in parameters:
            raise invalid("there is no shared memory here; send the values with the request")
        size = parameters.get("binary_data_size")
        if size is None:
            if "data" not in entry:
                raise invalid(f"input {spec.name!r} has neither data nor a parameter binary_data_size")
            inputs[spec.name] = from_json(spec, shape, entry["data"])
            continue
        if "data" in entry:
            raise invalid(f"input {spec.name!r} has both data and a parameter binary_data_size")
        if type(size) is not int or not 0 <= size <= len(body) - position:
            raise invalid(
                f"the binary_data_size of input {spec.name!r} is {shown(size, 40)}, and {len(body) - position} bytes "
                "are left of the body"
            )
        inputs[spec.name] = from_raw(spec, shape, body[position : position + size])
        position += size
    return inputs, position


def _outputs(head: Mapping[str, Any], binary: bool, model: Description) -> list[RequestedOutput]:
    entries = _objects(head.get("outputs", []), "outputs")
    if not entries:
        return [RequestedOutput(spec.name, binary) for spec in model.outputs]
    wanted = []
    for entry in entries:
        name = entry.get("name")
        if not isinstance(name, str):
            raise invalid(f"the name of an output is {shown(name)}; expected a string")
        parameters = _parameters(entry, f"output {shown(name)}")
        if "shared_memory_region" in parameters:
            raise invalid("there is no shared memory here; take the values with the answer")
        wanted.append(
            RequestedOutput(
                name,
                _flag(parameters, "binary_data", binary),
                class_count(parameters.get("classification", 0)),
            )
        )
    return match_outputs(model.outputs, wanted)


def _objects(value: object, name: str) -> Sequence[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise invalid(f"{name} of the request is no list of objects")
    return value


def _parameters(entry: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = entry.get("parameters")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid(f"parameters of {name} is no object")
    return value


def _flag(parameters: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise invalid(f"the parameter {name} is {shown(value, 40)}; expected true or false")
    return value


def metadata(model: Description) -> dict[str, Any]:
    """Return a model's metadata, as the protocol has it."""
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": model.platform,
        "inputs": [_spec(spec) for spec in model.inputs],
        "outputs": [_spec(spec) for spec in model.outputs],
        "properties": dict(model.properties),
    }


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
