"""Reading requests: what is right is read rightly, and whatever is not is refused, never more."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quartermap_deploy.serving import grpc_codec, http_codec
from quartermap_deploy.serving.grpc_messages import INFERENCE, messages
from quartermap_deploy.serving.models import Description, file_input
from quartermap_deploy.serving.refusal import Refusal
from quartermap_deploy.serving.requests import InferRequest, RequestedOutput, classified
from quartermap_deploy.serving.tensors import TensorSpec, from_raw, to_raw

LABELS = ("a", "b")
TENSOR = Description(
    "m",
    "onnxruntime_onnx",
    (TensorSpec("images", "FP32", (-1, 1, 2, 2)),),
    (TensorSpec("logits", "FP32", (-1, 2)),),
    4,
    0.001,
    LABELS,
)
IMAGE = Description(
    "m_image",
    "ensemble",
    (file_input("image"),),
    (TensorSpec("probabilities", "FP32", (-1, 2)),),
    4,
    0.001,
    LABELS,
)
VALUES = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
SEVERAL = Description(
    "s",
    "onnxruntime_onnx",
    (TensorSpec("tokens", "INT64", (-1, 3)), TensorSpec("keep", "BOOL", (-1,))),
    (TensorSpec("scores", "FP32", (-1, 2)), TensorSpec("best", "INT64", (-1,))),
    4,
    0.001,
    (),
)
WHOLE = Description(
    "w",
    "onnxruntime_onnx",
    (
        TensorSpec("images", "FP32", (2, 3)),
        TensorSpec("scale", "FP32", ()),
        TensorSpec("bytes", "UINT8", (-1, 2)),
    ),
    (TensorSpec("total", "FP64", ()),),
    4,
    0.001,
    (),
    batch_axis=False,
)


def entry(**changes: Any) -> dict[str, Any]:
    """An input of a request, right but for the changes; those that are ... are left out."""
    whole = {"name": "images", "shape": [2, 1, 2, 2], "datatype": "FP32", "data": VALUES.reshape(-1).tolist()}
    return {key: value for key, value in {**whole, **changes}.items() if value is not ...}


def request(*inputs: Any, **changes: Any) -> bytes:
    """A body of JSON."""
    return json.dumps({"inputs": list(inputs) or [entry()], **changes}).encode()


def binary(data: bytes, size: object = ..., **changes: Any) -> tuple[bytes, str]:
    """A body with a binary tensor behind the JSON, and the header with the length of that."""
    parameters = {"binary_data_size": len(data) if size is ... else size}
    head = request(entry(data=..., parameters=parameters, **changes))
    return head + data, str(len(head))


def refusal(body: bytes, length: str | None = None, model: Description = TENSOR) -> str:
    """The message of the refusal of a body."""
    with pytest.raises(Refusal) as caught:
        http_codec.parse_request(body, length, model)
    assert caught.value.status == 400 and caught.value.grpc_code == "INVALID_ARGUMENT"
    return caught.value.message


# HTTP -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [VALUES.reshape(-1).tolist(), VALUES.tolist(), VALUES.astype(int).tolist()])
def test_values_in_json_are_read_flat_or_nested(data: list[Any]) -> None:
    parsed = http_codec.parse_request(request(entry(data=data)), None, TENSOR)
    np.testing.assert_array_equal(parsed.inputs["images"], VALUES)
    assert parsed.inputs["images"].dtype == np.float32
    assert parsed.outputs == [RequestedOutput("logits")]


@pytest.mark.parametrize(
    "data", [VALUES.reshape(4, 2).tolist(), [VALUES.tolist()], VALUES.reshape(2, 2, 2, 1).tolist()]
)
def test_values_that_are_nested_in_another_way_are_refused(data: list[Any]) -> None:
    assert "nested as" in refusal(request(entry(data=data)))


def test_files_are_read_flat_or_nested_as_their_shape() -> None:
    for shape, data, right in (
        ([2], ["YQ==", "Yg=="], True),
        ([2, 1], ["YQ==", "Yg=="], True),
        ([2, 1], [["YQ=="], ["Yg=="]], True),
        ([2, 1], [["YQ==", "Yg=="]], False),
        ([2], [["YQ=="], ["Yg=="]], False),
        ([2, 1], [[["YQ=="]], [["Yg=="]]], False),
        ([2, 1], [["YQ=="], "Yg=="], False),
    ):
        body = request({"name": "image", "shape": shape, "datatype": "BYTES", "data": data})
        if right:
            parsed = http_codec.parse_request(body, None, IMAGE)
            assert parsed.inputs["image"].reshape(-1).tolist() == [b"a", b"b"]
        else:
            refusal(body, None, IMAGE)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"inputs": [' + b"[]," * 2000 + b"{}]}", "lists and objects"),
        (b'{"inputs": [' + b"{}," * 2000 + b"{}]}", "lists and objects"),
        (b'{"inputs": [{"data": [' + b"0," * 2000 + b"0]}]}", "2,000 values"),
        (b"[" * 60_000, "lists and objects"),
        (b" " * 80_000, "80,000 bytes, and 'm' takes 66,304 at most"),
    ],
)
def test_json_that_is_more_than_the_model_takes_is_refused_before_it_is_parsed(
    body: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """63 MiB of it held everybody up for ten seconds, and became 1.8 GB."""
    monkeypatch.setattr(http_codec.json, "loads", lambda text: pytest.fail("it was parsed"))
    with pytest.raises(Refusal, match=message) as caught:
        http_codec.parse_request(body, None, TENSOR)
    assert (caught.value.status, caught.value.grpc_code) == (413, "RESOURCE_EXHAUSTED")


def test_the_largest_json_of_a_model_is_taken_however_it_is_written() -> None:
    values = np.full((4, 1, 2, 2), -1.2345678e-30, np.float32)
    for data in (values.tolist(), values.reshape(-1).tolist()):
        for settings in ({}, {"indent": 2}, {"indent": 8}):
            body = json.dumps({"inputs": [entry(shape=[4, 1, 2, 2], data=data)]}, **settings).encode()
            np.testing.assert_array_equal(
                http_codec.parse_request(body, None, TENSOR).inputs["images"], values
            )


def typed(name: str, datatype: str, values: Any, shape: list[int], **changes: Any) -> dict[str, Any]:
    return entry(name=name, datatype=datatype, data=values, shape=shape, **changes)


def test_several_inputs_of_several_types_are_read() -> None:
    tokens = typed("tokens", "INT64", [[1, 2, -3], [4, 5, 1 << 40]], [2, 3])
    keep = typed("keep", "BOOL", [True, False], [2])
    parsed = http_codec.parse_request(request(keep, tokens), None, SEVERAL)
    assert parsed.inputs["tokens"].tolist() == [[1, 2, -3], [4, 5, 1 << 40]]
    assert parsed.inputs["tokens"].dtype == np.int64 and parsed.inputs["keep"].tolist() == [True, False]
    assert parsed.outputs == [RequestedOutput("scores"), RequestedOutput("best")]
    body = request(keep, entry(**{**tokens, "data": ..., "parameters": {"binary_data_size": 48}}))
    data = np.arange(6, dtype="<i8").tobytes()
    found = http_codec.parse_request(body + data, str(len(body)), SEVERAL)
    assert found.inputs["tokens"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_inputs_without_a_batch_and_without_axes_are_read() -> None:
    inputs = [
        typed("images", "FP32", [1.5] * 6, [2, 3]),
        typed("scale", "FP32", [0.5], []),
        typed("bytes", "UINT8", [0, 255], [1, 2]),
    ]
    parsed = http_codec.parse_request(request(*inputs), None, WHOLE)
    assert parsed.inputs["scale"].shape == () and parsed.inputs["scale"] == 0.5
    assert parsed.inputs["bytes"].tolist() == [[0, 255]] and parsed.inputs["bytes"].dtype == np.uint8
    assert WHOLE.images(parsed.inputs) == 1 and not WHOLE.joins
    answer, _ = http_codec.build_response(WHOLE, parsed, {"total": np.array(2.5)})
    (output,) = json.loads(answer)["outputs"]
    assert output == {"name": "total", "datatype": "FP64", "shape": [], "data": [2.5]}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([typed("tokens", "INT64", [1] * 3, [1, 3])], "the inputs are 'tokens'; expected 'tokens', 'keep'"),
        (
            [typed("tokens", "INT64", [1] * 6, [2, 3]), typed("keep", "BOOL", [True] * 3, [3])],
            "'keep' is a batch of 3, and 'tokens' one of 2",
        ),
        (
            [typed("tokens", "INT64", [1.0] * 3, [1, 3]), typed("keep", "BOOL", [True], [1])],
            "other than whole numbers",
        ),
        (
            [typed("tokens", "INT64", [1 << 63] * 3, [1, 3]), typed("keep", "BOOL", [True], [1])],
            "INT64 holds -9223372036854775808 to",
        ),
        (
            [typed("tokens", "INT64", [1] * 3, [1, 3]), typed("keep", "BOOL", [1], [1])],
            "other than true and false",
        ),
        (
            [typed("tokens", "INT64", [True] * 3, [1, 3]), typed("keep", "BOOL", [True], [1])],
            "other than whole numbers",
        ),
        (
            [typed("tokens", "FP32", [1] * 3, [1, 3]), typed("keep", "BOOL", [True], [1])],
            "'FP32', the model takes INT64",
        ),
    ],
)
def test_inputs_that_do_not_go_together_are_refused(inputs: list[dict[str, Any]], message: str) -> None:
    assert message in refusal(request(*inputs), None, SEVERAL)


def test_bytes_that_are_no_truth_values_are_refused() -> None:
    keep = typed("keep", "BOOL", ..., [2], parameters={"binary_data_size": 2})
    tokens = typed("tokens", "INT64", [1] * 6, [2, 3])
    body = request(tokens, keep)
    assert "neither 0 nor 1" in refusal(body + b"\1\2", str(len(body)), SEVERAL)
    found = http_codec.parse_request(body + b"\1\0", str(len(body)), SEVERAL)
    assert found.inputs["keep"].tolist() == [True, False]


def test_only_outputs_with_classes_come_as_classes() -> None:
    inputs = [typed("tokens", "INT64", [1] * 3, [1, 3]), typed("keep", "BOOL", [True], [1])]

    def wanted(name: str) -> bytes:
        return request(*inputs, outputs=[{"name": name, "parameters": {"classification": 2}}])

    assert http_codec.parse_request(wanted("scores"), None, SEVERAL).outputs[0].classes == 2
    assert "only one of (batch, classes) comes as classes" in refusal(wanted("best"), None, SEVERAL)


def test_binary_values_are_read_behind_the_json() -> None:
    parsed = http_codec.parse_request(*binary(VALUES.tobytes()), TENSOR)
    np.testing.assert_array_equal(parsed.inputs["images"], VALUES)


def test_outputs_and_their_parameters() -> None:
    outputs = [{"name": "logits", "parameters": {"binary_data": True, "classification": 2}}]
    parsed = http_codec.parse_request(request(outputs=outputs, id="x"), None, TENSOR)
    assert (parsed.outputs, parsed.id) == ([RequestedOutput("logits", True, 2)], "x")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[]", "no JSON object"),
        (b"[" * 900, "no JSON"),
        (b"{}", "inputs of the request is no list"),
        (b'{"inputs": [1]}', "no list of objects"),
        (b'{"inputs": []}', "the inputs are none; expected 'images'"),
        (request(entry(name="image")), "unknown input 'image'; the model takes 'images'"),
        (request(entry(name=7)), "unknown input 7"),
        (request(entry(), entry()), "each once"),
        (request(entry(datatype="FP64")), "'FP64', the model takes FP32"),
        (request(entry(datatype=...)), "None, the model takes FP32"),
        (request(entry(shape="2")), "expected a list of whole numbers"),
        (request(entry(shape=[2, 1, 2, 2.0])), "expected a list of whole numbers"),
        (request(entry(shape=[2, 1, 2, True])), "expected a list of whole numbers"),
        (request(entry(shape=[-1, 1, 2, 2])), "expected a list of whole numbers"),
        (request(entry(shape=[2, 1, 2])), "the model takes [-1, 1, 2, 2]"),
        (request(entry(shape=[2, 1, 2, 3])), "the model takes [-1, 1, 2, 2]"),
        (request(entry(shape=[1 << 40, 1, 2, 2])), "expected a list of whole numbers"),
        (request(entry(shape=[0, 1, 2, 2], data=[])), "an empty batch"),
        (request(entry(shape=[5, 1, 2, 2])), "a batch of 5, at most 4"),
        (request(entry(data=...)), "neither data nor a parameter"),
        (request(entry(data="x")), "no list"),
        (request(entry(data=[1.0] * 7)), "7 values, its shape [2, 1, 2, 2] needs 8"),
        (request(entry(data=["1"] * 8)), "other than numbers"),
        (request(entry(data=[None] * 8)), "other than numbers"),
        (request(entry(data=[True] * 8)), "other than numbers"),
        (request(entry(data=[[1.0], [1.0, 2.0]])), "other than numbers"),
        (request(entry(data=[10**400] * 8)), "other than numbers"),
        (request(entry(data=[1e39] * 8)), "NaN or infinite"),
        (request(entry(data=[float("nan")] * 8)), "NaN or infinite"),
        (request(entry(data=[float("-inf")] * 8)), "NaN or infinite"),
        (request(entry(parameters=[])), "no object"),
        (request(entry(parameters={"binary_data_size": 32})), "both data and a parameter"),
        (request(entry(parameters={"shared_memory_region": "x"})), "no shared memory"),
        (request(outputs=[{"name": "classes"}]), "unknown output 'classes'; the model has 'logits'"),
        (request(outputs=[{}]), "the name of an output is None"),
        (request(outputs=[{"name": "logits"}] * 2), "asked for twice"),
        (request(outputs=[{"name": "logits", "parameters": {"classification": -1}}]), "a number of classes"),
        (request(outputs=[{"name": "logits", "parameters": {"binary_data": 1}}]), "expected true or false"),
        (request(parameters={"binary_data_output": "yes"}), "expected true or false"),
        (request(id=7), "no string"),
    ],
)
def test_wrong_json_is_refused(body: bytes, message: str) -> None:
    assert message in refusal(body)


@pytest.mark.parametrize(
    ("body", "length", "message"),
    [
        (*binary(VALUES.tobytes(), 31), "goes on"),
        (*binary(VALUES.tobytes()[:-1]), "has 31 bytes, its shape [2, 1, 2, 2] of FP32 needs 32"),
        (*binary(VALUES.tobytes(), -1), "binary_data_size"),
        (*binary(VALUES.tobytes(), 33), "32 bytes are left"),
        (*binary(VALUES.tobytes(), "32"), "binary_data_size"),
        (*binary(VALUES.tobytes(), True), "binary_data_size"),
        (*binary(np.full_like(VALUES, np.nan).tobytes()), "NaN or infinite"),
        (request(), "-1", "expected the length of the JSON"),
        (request(), "1e3", "expected the length of the JSON"),
        (request(), "٣", "expected the length of the JSON"),
        (request(), "99999999999999999999", "expected the length of the JSON"),
        (request(), str(len(request()) + 1), "expected the length of the JSON"),
        (request() + b"x", str(len(request())), "1 bytes follow"),
    ],
)
def test_wrong_binary_tensors_are_refused(body: bytes, length: str, message: str) -> None:
    found = refusal(body, length)
    assert message in found or (message == "goes on" and "needs 32" in found)


def strings(*items: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


def image_request(data: bytes, shape: list[int]) -> tuple[bytes, str]:
    return binary(data, name="image", shape=shape, datatype="BYTES")


@pytest.mark.parametrize("shape", [[2], [2, 1]])
def test_files_are_read_with_their_zeros(shape: list[int]) -> None:
    body, length = image_request(strings(b"a\0\0", b""), shape)
    found = http_codec.parse_request(body, length, IMAGE).inputs["image"]
    assert found.reshape(-1).tolist() == [b"a\0\0", b""]
    data = [base64.b64encode(b"a\0\0").decode(), ""]
    body = request(entry(name="image", shape=shape, datatype="BYTES", data=data))
    assert http_codec.parse_request(body, None, IMAGE).inputs["image"].reshape(-1).tolist() == [b"a\0\0", b""]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (strings(b"a"), "ends before its 2 strings do"),
        (strings(b"a", b"b")[:-1], "claims 1 bytes, and 0 are left"),
        (strings(b"a") + struct.pack("<I", 0xFFFFFFFF) + b"b", "claims 4294967295 bytes"),
        (strings(b"a", b"b", b"c"), "goes on for 5 bytes"),
        (strings(b"a") + b"\1\0", "ends before its 2 strings do"),
    ],
)
def test_strings_with_wrong_lengths_are_refused(data: bytes, message: str) -> None:
    body, length = image_request(data, [2])
    assert message in refusal(body, length, IMAGE)


@pytest.mark.parametrize(
    ("data", "message"), [(["%"], "no base64"), ([1], "not base64"), (["YQ==", "YQ=="], "2 strings")]
)
def test_strings_that_are_no_base64_are_refused(data: list[Any], message: str) -> None:
    body = request(entry(name="image", shape=[1], datatype="BYTES", data=data))
    assert message.replace("no ", "not ") in refusal(body, None, IMAGE)


def test_answers_are_what_was_asked_for() -> None:
    logits = np.array([[0.25, 2.0]], dtype=np.float32)
    asked = InferRequest({}, [RequestedOutput("logits")], "7")
    body, headers = http_codec.build_response(TENSOR, asked, {"logits": logits})
    assert headers == {"Content-Type": "application/json"}
    assert json.loads(body) == {
        "model_name": "m",
        "model_version": "1",
        "id": "7",
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [1, 2], "data": [0.25, 2.0]}],
    }
    asked = InferRequest({}, [RequestedOutput("logits", binary=True)])
    body, headers = http_codec.build_response(TENSOR, asked, {"logits": logits})
    length = int(headers["Inference-Header-Content-Length"])
    assert body[length:] == logits.tobytes() and "id" not in json.loads(body[:length])


def test_the_most_probable_classes() -> None:
    found = classified(np.array([[0.5, 0.25, 0.5]], dtype=np.float32), 2, ("x", "y", "z"))
    assert found.tolist() == [[b"0.500000:0:x", b"0.500000:2:z"]]
    assert classified(np.zeros((1, 2), np.float32), 9, LABELS).shape == (1, 2)
    assert classified(np.array([[1.0, 2.0]]), 1, ()).tolist() == [[b"2.000000:1"]]


def test_raw_strings_survive_a_round_trip() -> None:
    spec = TensorSpec("image", "BYTES", (-1,))
    values = from_raw(spec, (3,), memoryview(strings(b"", b"\0", b"abc")))
    assert to_raw(values) == strings(b"", b"\0", b"abc")


# gRPC -----------------------------------------------------------------------------------------------------------


def infer_request(**changes: Any) -> Any:
    """A message, right but for the changes."""
    given = {"name": "images", "datatype": "FP32", "shape": VALUES.shape}
    values = {"model_name": "m", "inputs": [given], "raw_input_contents": [VALUES.tobytes()]}
    return messages()["ModelInferRequest"](**{**values, **changes})


def grpc_refusal(message: Any) -> str:
    with pytest.raises(Refusal) as caught:
        grpc_codec.parse_request(message, TENSOR)
    return caught.value.message


def test_messages_are_read_with_raw_and_with_typed_contents() -> None:
    found = grpc_codec.parse_request(infer_request(), TENSOR)
    np.testing.assert_array_equal(found.inputs["images"], VALUES)
    typed = infer_request(raw_input_contents=[])
    typed.inputs[0].contents.fp32_contents.extend(VALUES.reshape(-1).tolist())
    found = grpc_codec.parse_request(typed, TENSOR)
    np.testing.assert_array_equal(found.inputs["images"], VALUES)
    answer = grpc_codec.build_response(TENSOR, found, {"logits": VALUES.reshape(4, 2)})
    assert not answer.raw_output_contents and list(answer.outputs[0].contents.fp32_contents) == list(range(8))


def test_messages_of_several_types_are_read_and_answered() -> None:
    inputs = [
        {"name": "tokens", "datatype": "INT64", "shape": [2, 3]},
        {"name": "keep", "datatype": "BOOL", "shape": [2]},
    ]
    typed = messages()["ModelInferRequest"](model_name="s", inputs=inputs)
    typed.inputs[0].contents.int64_contents.extend([1, 2, -3, 4, 5, 1 << 40])
    typed.inputs[1].contents.bool_contents.extend([True, False])
    raw = messages()["ModelInferRequest"](model_name="s", inputs=inputs)
    raw.raw_input_contents.extend([np.array([1, 2, -3, 4, 5, 1 << 40], "<i8").tobytes(), b"\1\0"])
    outputs = {"scores": np.ones((2, 2), np.float32), "best": np.array([3, -4])}
    for message in (typed, raw):
        found = grpc_codec.parse_request(message, SEVERAL)
        assert found.inputs["tokens"].tolist() == [[1, 2, -3], [4, 5, 1 << 40]]
        assert found.inputs["keep"].dtype == np.bool_ and found.inputs["keep"].tolist() == [True, False]
        answer = grpc_codec.build_response(SEVERAL, found, outputs)
        assert [(one.name, one.datatype, list(one.shape)) for one in answer.outputs] == [
            ("scores", "FP32", [2, 2]),
            ("best", "INT64", [2]),
        ]
        if found.raw:
            assert answer.raw_output_contents[1] == np.array([3, -4], "<i8").tobytes()
        else:
            assert list(answer.outputs[1].contents.int64_contents) == [3, -4]
    wrong = messages()["ModelInferRequest"](model_name="s", inputs=inputs)
    wrong.inputs[0].contents.int_contents.extend([1] * 6)
    wrong.inputs[1].contents.bool_contents.extend([True, False])
    with pytest.raises(Refusal, match="'tokens' has 0 values"):
        grpc_codec.parse_request(wrong, SEVERAL)


def test_small_whole_numbers_out_of_their_range_are_refused() -> None:
    model = Description("b", "", (TensorSpec("x", "UINT8", (-1,)),), TENSOR.outputs, 4, 0.0, ())
    message = messages()["ModelInferRequest"](inputs=[{"name": "x", "datatype": "UINT8", "shape": [2]}])
    message.inputs[0].contents.uint_contents.extend([255, 256])
    with pytest.raises(Refusal, match="from 255 to 256; UINT8 holds 0 to 255"):
        grpc_codec.parse_request(message, model)


def test_an_answer_with_16_bits_in_it_is_raw_as_a_whole() -> None:
    asked = InferRequest({}, [RequestedOutput("a"), RequestedOutput("b")], raw=False)
    outputs = {"a": np.ones((1, 2), np.float16), "b": np.zeros((1, 2), np.float32)}
    answer = grpc_codec.build_response(TENSOR, asked, outputs)
    assert len(answer.raw_output_contents) == 2 and not answer.outputs[1].contents.fp32_contents


def test_configurations_have_all_inputs_and_outputs() -> None:
    joint, whole = grpc_codec.configuration(SEVERAL), grpc_codec.configuration(WHOLE)
    assert joint["max_batch_size"] == 4 and "dynamic_batching" in joint
    assert [(one["name"], one["data_type"], one["dims"]) for one in joint["input"] + joint["output"]] == [
        ("tokens", 9, [3]),
        ("keep", 1, []),
        ("scores", 11, [2]),
        ("best", 9, []),
    ]
    # Requests of a model without a batch are never put together.
    assert whole["max_batch_size"] == 0 and "dynamic_batching" not in whole
    assert [one["dims"] for one in whole["input"] + whole["output"]] == [[2, 3], [], [-1, 2], []]
    assert grpc_codec.CONFIG_NAMES[9] == "TYPE_INT64" and grpc_codec.CONFIG_NAMES[13] == "TYPE_STRING"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": []}, "the inputs are none"),
        ({"raw_input_contents": [b"", b""]}, "2 raw_input_contents for 1 inputs"),
        ({"raw_input_contents": [b"x"]}, "has 1 bytes"),
        ({"raw_input_contents": []}, "has 0 values"),
        ({"raw_input_contents": [np.full(8, np.inf, np.float32).tobytes()]}, "NaN or infinite"),
        ({"inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, 1, 2, 2]}]}, "whole numbers"),
        ({"inputs": [{"name": "images", "datatype": "INT8", "shape": [2, 1, 2, 2]}]}, "'INT8'"),
        ({"inputs": [{"name": "other", "datatype": "FP32", "shape": [2, 1, 2, 2]}]}, "unknown input"),
        ({"outputs": [{"name": "other"}]}, "unknown output"),
        (
            {"outputs": [{"name": "logits", "parameters": {"classification": {"int64_param": -2}}}]},
            "a number of classes",
        ),
        (
            {"outputs": [{"name": "logits", "parameters": {"shared_memory_region": {"string_param": "x"}}}]},
            "no shared memory",
        ),
    ],
)
def test_wrong_messages_are_refused(changes: dict[str, Any], message: str) -> None:
    assert message in grpc_refusal(infer_request(**changes))


def test_contents_beside_raw_contents_are_refused() -> None:
    both = infer_request()
    both.inputs[0].contents.fp32_contents.append(1.0)
    assert "expected one" in grpc_refusal(both)


def test_the_messages_are_those_of_tritons_client() -> None:
    """Every field has the number, type and label that it has there, and more fields are there."""
    service_pb2 = pytest.importorskip(
        "tritonclient.grpc.service_pb2", reason="tritonclient[grpc] is not installed"
    )

    def compare(ours: Any, theirs: Any, seen: set[str]) -> None:
        if ours.full_name in seen:
            return
        seen.add(ours.full_name)
        for field in ours.fields:
            if (ours.name, field.name) == ("ModelMetadataResponse", "properties"):
                continue  # of the Open Inference Protocol, which Triton does not have
            other = theirs.fields_by_name[field.name]
            assert field.number == other.number and field.is_repeated == other.is_repeated, field.full_name
            kinds = {field.TYPE_ENUM: field.TYPE_INT32}
            assert field.type == kinds.get(other.type, other.type), field.full_name
            if field.containing_oneof:
                choices = [[member.name for member in one.containing_oneof.fields] for one in (field, other)]
                assert choices[0] == choices[1], field.full_name
            if field.message_type:
                compare(field.message_type, other.message_type, seen)

    seen: set[str] = set()
    for name, kind in messages(INFERENCE).items():
        theirs = getattr(service_pb2, name, None)
        if theirs is not None:
            compare(kind.DESCRIPTOR, theirs.DESCRIPTOR, seen)
    assert {f"inference.{name}" for name in messages(INFERENCE)} <= seen


# Anything -------------------------------------------------------------------------------------------------------

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
names = st.sampled_from(["images", "image", "tokens", "keep", "logits", "scores", "probabilities"]) | junk
shapes = (
    st.lists(st.integers(-1, 5), max_size=5) | st.sampled_from([[2, 1, 2, 2], [1], [2, 1], [1, 3]]) | junk
)
numbers = (
    st.lists(st.floats(width=32) | st.integers(), max_size=9)
    | st.lists(st.integers(), max_size=3)
    | st.lists(st.booleans(), max_size=1)
)
parameters = st.dictionaries(
    st.sampled_from(["binary_data_size", "binary_data", "classification", "shared_memory_region"]),
    junk,
    max_size=2,
)


def somewhat(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of these fields."""
    return st.fixed_dictionaries({}, optional=fields)


bodies = somewhat(
    inputs=st.lists(
        somewhat(
            name=names,
            shape=shapes,
            datatype=st.sampled_from(["FP32", "BYTES", "INT64", "BOOL"]) | junk,
            data=numbers
            | st.lists(st.integers(), max_size=3)
            | st.lists(st.booleans(), max_size=1)
            | st.lists(st.sampled_from(["YQ==", "x"]), max_size=3)
            | junk,
            parameters=parameters | junk,
        ),
        max_size=3,
    )
    | junk,
    outputs=st.lists(somewhat(name=names, parameters=parameters | junk), max_size=2) | junk,
    parameters=junk,
    id=junk,
)


def read_or_refused(body: bytes, length: str | None, model: Description) -> None:
    """Read a body; whatever is wrong with it must be a refusal, and what is read must fit the model."""
    try:
        parsed = http_codec.parse_request(body, length, model)
    except Refusal as refused:
        assert refused.status == 400 and refused.message
        json.dumps(refused.message).encode("ascii")
        return
    assert list(parsed.inputs) and parsed.outputs
    for spec in model.inputs:
        values = parsed.inputs[spec.name]
        assert 1 <= len(values) <= model.max_batch
        if values.dtype != object:
            assert values.shape[1:] == spec.shape[1:] and np.isfinite(values).all()


@given(bodies, st.sampled_from([TENSOR, IMAGE, SEVERAL]))
def test_any_json_is_read_or_refused(body: dict[str, Any], model: Description) -> None:
    read_or_refused(json.dumps(body).encode(), None, model)


@given(st.binary(max_size=200), st.none() | st.text(max_size=6) | st.integers(0, 210).map(str))
def test_any_bytes_are_read_or_refused(body: bytes, length: str | None) -> None:
    read_or_refused(body, length, TENSOR)


@given(
    st.binary(max_size=64), st.integers(-2, 70), st.integers(-3, 3), st.sampled_from([TENSOR, IMAGE]), shapes
)
def test_any_binary_tail_is_read_or_refused(
    data: bytes, size: int, shift: int, model: Description, shape: Any
) -> None:
    spec = model.inputs[0]
    body, length = binary(data, size, name=spec.name, datatype=spec.datatype, shape=shape)
    read_or_refused(body, str(int(length) + shift), model)


@given(st.data())
def test_a_right_request_is_still_read_after_one_byte_is_changed_or_refused(data: st.DataObject) -> None:
    body, length = binary(VALUES.tobytes())
    place = data.draw(st.integers(0, len(body) - 1))
    changed = body[:place] + bytes([data.draw(st.integers(0, 255))]) + body[place + 1 :]
    read_or_refused(changed, length, TENSOR)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["images", "x"]),
            st.sampled_from(["FP32", "FP16", ""]),
            st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5),
        ),
        max_size=2,
    ),
    st.lists(st.binary(max_size=40), max_size=3),
    st.lists(st.floats(width=32), max_size=9),
)
def test_any_message_is_read_or_refused(
    inputs: list[tuple[str, str, list[int]]], raw: list[bytes], values: list[float]
) -> None:
    message = messages()["ModelInferRequest"](model_name="m", raw_input_contents=raw)
    for name, datatype, shape in inputs:
        given = message.inputs.add(name=name, datatype=datatype, shape=shape)
        given.contents.fp32_contents.extend(values)
    try:
        parsed = grpc_codec.parse_request(message, TENSOR)
    except Refusal as refused:
        assert refused.status == 400
        return
    assert parsed.inputs["images"].shape[1:] == (1, 2, 2)
