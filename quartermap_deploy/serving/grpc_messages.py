"""The messages of the protocol over gRPC, built from the tables below when they are first needed.

Generated code would be bound to the protobuf that generated it, and this package to that protobuf. Names, numbers and
types are those of the Open Inference Protocol, of Triton's extensions for statistics and configuration, and of gRPC's
health checking; what is not used here is left out, and readers pass over what they do not know. The messages live in a
pool of their own, so that a process may hold other definitions of the same names.
"""

from __future__ import annotations

import functools
import re
from typing import Any

INFERENCE, HEALTH = "inference", "grpc.health.v1"
SERVICES = {INFERENCE: "inference.GRPCInferenceService", HEALTH: "grpc.health.v1.Health"}

_NAME_VERSION = "string name = 1, string version = 2"
_DURATION = "StatisticDuration"

_MESSAGES = {
    INFERENCE: {
        "ServerLiveRequest": "",
        "ServerLiveResponse": "bool live = 1",
        "ServerReadyRequest": "",
        "ServerReadyResponse": "bool ready = 1",
        "ModelReadyRequest": _NAME_VERSION,
        "ModelReadyResponse": "bool ready = 1",
        "ServerMetadataRequest": "",
        "ServerMetadataResponse": "string name = 1, string version = 2, repeated string extensions = 3",
        "ModelMetadataRequest": _NAME_VERSION,
        "TensorMetadata": "string name = 1, string datatype = 2, repeated int64 shape = 3",
        "ModelMetadataResponse": "string name = 1, repeated string versions = 2, string platform = 3, "
        "repeated TensorMetadata inputs = 4, repeated TensorMetadata outputs = 5, map string properties = 6",
        "InferParameter": "oneof bool bool_param = 1, oneof int64 int64_param = 2, oneof string string_param = 3, "
        "oneof double double_param = 4, oneof uint64 uint64_param = 5",
        "InferTensorContents": "repeated bool bool_contents = 1, repeated int32 int_contents = 2, "
        "repeated int64 int64_contents = 3, repeated uint32 uint_contents = 4, repeated uint64 uint64_contents = 5, "
        "repeated float fp32_contents = 6, repeated double fp64_contents = 7, repeated bytes bytes_contents = 8",
        "InferInputTensor": "string name = 1, string datatype = 2, repeated int64 shape = 3, "
        "map InferParameter parameters = 4, InferTensorContents contents = 5",
        "InferRequestedOutputTensor": "string name = 1, map InferParameter parameters = 2",
        "ModelInferRequest": "string model_name = 1, string model_version = 2, string id = 3, "
        "map InferParameter parameters = 4, repeated InferInputTensor inputs = 5, "
        "repeated InferRequestedOutputTensor outputs = 6, repeated bytes raw_input_contents = 7",
        "InferOutputTensor": "string name = 1, string datatype = 2, repeated int64 shape = 3, "
        "map InferParameter parameters = 4, InferTensorContents contents = 5",
        "ModelInferResponse": "string model_name = 1, string model_version = 2, string id = 3, "
        "map InferParameter parameters = 4, repeated InferOutputTensor outputs = 5, "
        "repeated bytes raw_output_contents = 6",
        "ModelConfigRequest": _NAME_VERSION,
        "ModelInput": "string name = 1, int32 data_type = 2, repeated int64 dims = 4",
        "ModelOutput": "string name = 1, int32 data_type = 2, repeated int64 dims = 3",
        "ModelDynamicBatching": "uint64 max_queue_delay_microseconds = 2",
        "ModelParameter": "string string_value = 1",
        "ModelConfig": "string name = 1, string platform = 2, int32 max_batch_size = 4, repeated ModelInput input = 5, "
        "repeated ModelOutput output = 6, ModelDynamicBatching dynamic_batching = 11, "
        "map ModelParameter parameters = 14",
        "ModelConfigResponse": "ModelConfig config = 1",
        "ModelStatisticsRequest": _NAME_VERSION,
        _DURATION: "uint64 count = 1, uint64 ns = 2",
        "InferStatistics": ", ".join(
            f"{_DURATION} {name} = {number}"
            for number, name in enumerate(
                (
                    "success",
                    "fail",
                    "queue",
                    "compute_input",
                    "compute_infer",
                    "compute_output",
                    "cache_hit",
                    "cache_miss",
                ),
                1,
            )
        ),
        "InferBatchStatistics": f"uint64 batch_size = 1, {_DURATION} compute_input = 2, "
        f"{_DURATION} compute_infer = 3, {_DURATION} compute_output = 4",
        "ModelStatistics": "string name = 1, string version = 2, uint64 last_inference = 3, "
        "uint64 inference_count = 4, uint64 execution_count = 5, InferStatistics inference_stats = 6, "
        "repeated InferBatchStatistics batch_stats = 7",
        "ModelStatisticsResponse": "repeated ModelStatistics model_stats = 1",
        "RepositoryIndexRequest": "string repository_name = 1, bool ready = 2",
        "ModelIndex": "string name = 1, string version = 2, string state = 3, string reason = 4",
        "RepositoryIndexResponse": "repeated ModelIndex models = 1",
    },
    HEALTH: {
        "HealthCheckRequest": "string service = 1",
        "HealthCheckResponse": "int32 status = 1",
    },
}
"""Packages, their messages and the fields of these. An enumeration is an int32 here, which is the same on the wire."""

_FIELD = re.compile(r"(?:(oneof|repeated|map) )?(\w+) (\w+) = (\d+)")


def messages(package: str = INFERENCE) -> dict[str, Any]:
    """Return the classes of a package's messages by name; the same ones at each call."""
    return _classes(package)


@functools.cache
def _classes(package: str) -> dict[str, Any]:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    for name, fields in _MESSAGES[package].items():
        message = file.message_type.add(name=name)
        for match in _FIELD.finditer(fields):
            kind, type_name, field_name, number = match.groups()
            _add_field(message, package, kind, type_name, field_name, int(number))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
        for name in _MESSAGES[package]
    }


def _add_field(message: Any, package: str, kind: str | None, type_name: str, name: str, number: int) -> None:
    field = message.field.add(name=name, number=number)
    field.label = field.LABEL_OPTIONAL if kind in (None, "oneof") else field.LABEL_REPEATED
    if kind == "oneof":
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    if kind == "map":
        entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
        entry.options.map_entry = True
        _add_field(entry, package, None, "string", "key", 1)
        _add_field(entry, package, None, type_name, "value", 2)
        field.type, field.type_name = field.TYPE_MESSAGE, f".{package}.{message.name}.{entry.name}"
    elif type_name[0].isupper():
        field.type, field.type_name = field.TYPE_MESSAGE, f".{package}.{type_name}"
    else:
        field.type = getattr(field, f"TYPE_{type_name.upper()}")
