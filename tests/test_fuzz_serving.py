"""Anything at all, sent to the server: an answer that the documentation knows, and never a defect.

The examples are the same at every run. `QUARTERMAP_FUZZ_EXAMPLES` says how many there are of each test, and with
`HYPOTHESIS_PROFILE=search` they are other ones each time.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from deploy_bundles import dynamic_bundle
from hostile import jpeg, peak_memory, png
from hypothesis import given, settings
from hypothesis import strategies as st
from served import IMAGE_MODEL, MODEL, Served, ask, digits, file_of, serving
from test_serving_codec import IMAGE, SEVERAL, TENSOR, WHOLE

from quartermap_deploy.serving import grpc_codec, http_codec
from quartermap_deploy.serving.forms import FormReader
from quartermap_deploy.serving.grpc_messages import messages
from quartermap_deploy.serving.models import Description
from quartermap_deploy.serving.refusal import Refusal
from quartermap_deploy.serving.wire import size_in_memory

grpc = pytest.importorskip("grpc", reason="the extra serve is not installed")

EXAMPLES = int(os.environ.get("QUARTERMAP_FUZZ_EXAMPLES", "100"))
MOST_MEMORY = 100_000_000
"""Bytes over idle, where no request has more than some thousands."""
STATUSES = {200, 400, 403, 404, 405, 408, 411, 413, 415, 431, 501, 503}
MODELS = st.sampled_from([TENSOR, IMAGE, SEVERAL, WHOLE])


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """A server that must have met no defect when it ends, and must not have taken much memory."""
    with serving(dynamic_bundle(), "--max-body-mb", 2, "--receive-timeout", 2) as running:
        image = file_of(digits(1)[0][0])
        for _ in range(10):
            ask(running, "POST", "/classify", image, Content_Type="image/png")
        linux = Path("/proc/self/status").exists()
        idle = peak_memory(running.process.pid) if linux else 0
        yield running
        assert not running.said("library"), running.said("library")
        if linux:
            assert peak_memory(running.process.pid) - idle < MOST_MEMORY


def check_answer(status: int, headers: dict[str, str], body: bytes) -> None:
    """An answer is one that the documentation knows, and its error plain text."""
    assert status in STATUSES, (status, body)
    if status >= 400 and body:
        assert headers["content-type"] == "application/json"
        error = json.loads(body)["error"]
        assert error.isprintable() and len(error) < 1100 and "Traceback" not in error


# JSON -----------------------------------------------------------------------------------------------------------

NUMBERS = st.sampled_from(
    [
        "0",
        "-1",
        "1e400",
        "-1e999999",
        "1e-999",
        "NaN",
        "Infinity",
        "-Infinity",
        "9" * 4000,
        "9" * 5000,
        "0.1",
        "2147483648",
    ]
)
TEXTS = st.sampled_from(
    [
        '""',
        '"images"',
        '"FP32"',
        '"BYTES"',
        r'"\ud800"',
        r'"\u001b[2J"',
        r'"\u202e"',
        '"' + "a" * 3000 + '"',
        r'"a\u0000"',
    ]
)
NESTED = st.tuples(
    st.sampled_from(["[", '{"a":', '[{"name":']), st.sampled_from([1, 5, 63, 100, 500, 960, 990, 5000])
).map(lambda pair: pair[0] * pair[1] + "1" + {"[": "]", '{"a":': "}", '[{"name":': "}]"}[pair[0]] * pair[1])
LEAVES = (
    NUMBERS
    | TEXTS
    | NESTED
    | st.sampled_from(["null", "true", "false", "[]", "{}", "[null]", "[1,2]", '[["AA=="]]'])
)
KEYS = st.sampled_from(
    [
        *("inputs", "outputs", "parameters", "id", "name", "shape", "datatype", "data", "binary_data_size"),
        *("binary_data", "binary_data_output", "classification", "shared_memory_region", "\\ud800", ""),
    ]
)


def json_object(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(st.tuples(KEYS, values), max_size=4).map(
        lambda entries: "{" + ",".join(f'"{key}":{value}' for key, value in entries) + "}"
    )


VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]") | json_object(inner),
    max_leaves=6,
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request for some model, with something wrong in some of its places."""

    def maybe(right: str) -> str:
        return draw(st.one_of(st.just(right), st.just(right), VALUES))

    tensor = (
        f'{{"name":{maybe(chr(34) + draw(st.sampled_from(["images", "image", "tokens"])) + chr(34))},"shape":'
        f'{maybe("[1,1,2,2]")},"datatype":{maybe(chr(34) + "FP32" + chr(34))},"data":{maybe("[1,2,3,4]")},'
        f'"parameters":{maybe("{}")}}}'
    )
    text = (
        f'{{"inputs":{maybe(f"[{tensor}]")},"outputs":{maybe("[]")},"id":{maybe(chr(34) * 2)},'
        f'"parameters":{maybe("{}")}}}'
    )
    return draw(st.one_of(st.just(text), st.just(text), VALUES)).encode("utf-8", "surrogatepass")


@settings(max_examples=EXAMPLES)
@given(requests(), MODELS)
def test_any_json_is_a_request_or_refused(body: bytes, model: Description) -> None:
    with contextlib.suppress(Refusal):
        parsed = http_codec.parse_request(body, None, model)
        assert {spec.name for spec in model.inputs} == set(parsed.inputs)


@settings(max_examples=EXAMPLES)
@given(
    requests(),
    st.binary(max_size=40),
    st.none() | st.text("0123456789 -+_.\u0664e", max_size=6),
    st.booleans(),
)
def test_any_body_of_inference_is_answered(
    server: Served, text: bytes, tail: bytes, length: str | None, image: bool
) -> None:
    headers = {
        "Inference_Header_Content_Length": str(len(text))
        if length is None
        else length.encode().decode("latin-1")
    }
    path = f"/v2/models/{IMAGE_MODEL if image else MODEL}/infer"
    check_answer(*ask(server, "POST", path, text + tail, **headers))


# Forms ----------------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *(
            b"--x",
            b"--x\r\n",
            b"--x--",
            b"\r\n",
            b"\r\n\r\n",
            b"\n",
            b"--",
            b"--y\r\n",
            b"\0",
            b"\xff\xfe",
            b" ",
        ),
        *(b"Content-Disposition: form-data; name=a", b"Content-Disposition: form-data; filename=a\r\n\r\n"),
        *(
            b'; filename="\x1b[2J"',
            b"; filename*=utf-8''%00%ff",
            b'; filename="\xff',
            b"Content-Type: multipart/mixed",
        ),
        *(b"Content-Length: -1\r\n", b"Content-Transfer-Encoding: base64\r\n", b"a" * 9000, b": ", b"\r"),
        png(8, 8),
        jpeg(8, 8),
    ]
)
TYPES = st.sampled_from(
    [
        *("multipart/form-data; boundary=x", "multipart/form-data", 'multipart/form-data; boundary="x"'),
        *(
            "multipart/form-data; boundary=" + "x" * 100,
            "multipart/mixed; boundary=x",
            "image/png",
            "text/plain",
            "",
        ),
        *(
            "multipart/form-data; boundary=x; boundary=x",
            "multipart/form-data; boundary*0=x",
            ";;;",
            "image/png; a",
        ),
    ]
)
FORMS = st.lists(PIECES | st.binary(max_size=20), max_size=12).map(b"".join)


@settings(max_examples=EXAMPLES)
@given(
    FORMS, TYPES, st.sampled_from(["", "?top=3", "?top=%1b", "?top=99999999999999999999", "?top=%EF%BC%91"])
)
def test_any_upload_is_answered(server: Served, body: bytes, kind: str, query: str) -> None:
    check_answer(*ask(server, "POST", f"/classify{query}", body, Content_Type=kind))


@settings(max_examples=EXAMPLES)
@given(FORMS, st.integers(1, 50))
def test_forms_mean_the_same_however_they_are_cut(body: bytes, piece: int) -> None:
    def read(size: int) -> object:
        try:
            reader = FormReader("multipart/form-data; boundary=x", 8)
            for start in range(0, len(body), size):
                reader.feed(body[start : start + size])
            return reader.end()
        except Refusal as refusal:
            return refusal.message

    assert read(piece) == read(max(1, len(body)))


# HTTP -----------------------------------------------------------------------------------------------------------

LINES = st.sampled_from(
    [
        *(
            "Host: localhost",
            "Host: evil",
            "Host:",
            "Content-Length: 5",
            "Content-Length: -5",
            "Content-Length: 99999",
        ),
        *(
            "Transfer-Encoding: chunked",
            "Transfer-Encoding: gzip, chunked",
            "Content-Encoding: gzip",
            "Expect: 100-continue",
        ),
        *(
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Origin: null",
            "X: \x1b[2J",
            " folded",
            "no colon",
            "A" * 9000,
        ),
        *("Content-Type: image/png", "Content-Type: \xff", "Accept-Encoding: gzip;q=x", "Range: bytes=0-1"),
    ]
)
STARTS = st.sampled_from(
    [
        *(
            "GET / HTTP/1.1",
            "POST /classify HTTP/1.1",
            f"POST /v2/models/{MODEL}/infer HTTP/1.1",
            "GET * HTTP/1.1",
        ),
        *(
            "GET http://evil/ HTTP/1.1",
            "CONNECT a:1 HTTP/1.1",
            "GET /\x1b HTTP/1.1",
            "GET / HTTP/9.9",
            "POST /classify",
        ),
        *(
            "GET /v2/models/%ff%00%1b[2J HTTP/1.1",
            "GET //%2e%2e/ HTTP/1.0",
            "\x16\x03\x01",
            "",
            "GET /" + "a" * 9000,
        ),
    ]
)


@settings(max_examples=EXAMPLES)
@given(
    STARTS,
    st.lists(LINES, max_size=4),
    st.sampled_from([b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\n", b"\0" * 99]),
)
def test_any_head_is_answered_or_the_connection_closed(
    server: Served, start: str, lines: list[str], body: bytes
) -> None:
    head = "\r\n".join([start, *lines]) + "\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head.encode("latin-1") + body)
        connection.shutdown(socket.SHUT_WR)
        received = connection.recv(65536)
    if received:
        assert received.startswith(b"HTTP/"), received[:50]
        assert int(received[9:12]) in {100, *STATUSES}, received


# gRPC -----------------------------------------------------------------------------------------------------------


def infer_request(model: str) -> bytes:
    """A message that is right for the digits model, or for the one that takes images."""
    request = messages()["ModelInferRequest"](model_name=model, id="1")
    if model == MODEL:
        request.inputs.add(name="images", datatype="FP32", shape=(1, 3, 64, 64))
        request.raw_input_contents.append(np.zeros((1, 3, 64, 64), np.float32).tobytes())
    else:
        file = png(8, 8)
        request.inputs.add(name="image", datatype="BYTES", shape=(1, 1))
        request.raw_input_contents.append(struct.pack("<I", len(file)) + file)
    request.inputs[0].parameters["a"].string_param = "b"
    request.outputs.add(name="logits" if model == MODEL else "probabilities").parameters[
        "classification"
    ].int64_param = 3
    return bytes(request.SerializeToString())


@st.composite
def changed(draw: st.DrawFn, message: bytes) -> bytes:
    """A message with some bytes of its beginning and end replaced, added or left out."""
    data = bytearray(message)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, min(len(data), 120)) | st.integers(max(0, len(data) - 40), len(data)))
        end = place + draw(st.integers(0, 3))
        data[place:end] = draw(
            st.binary(max_size=4) | st.sampled_from([b"\x2a\x00", b"\xff" * 9 + b"\x01", b"\x42\x00"])
        )
    return bytes(data) * draw(st.sampled_from([1, 1, 1, 2]))


MESSAGES = st.sampled_from([infer_request(MODEL), infer_request(IMAGE_MODEL)]).flatmap(changed) | st.binary(
    max_size=99
)


@settings(max_examples=EXAMPLES)
@given(MESSAGES, MODELS)
def test_any_message_is_a_request_or_refused(data: bytes, model: Description) -> None:
    from google.protobuf.message import DecodeError

    kind = messages()["ModelInferRequest"]
    with contextlib.suppress(Refusal, DecodeError):
        assert size_in_memory(data, kind) <= 8 * len(data)
        grpc_codec.parse_request(kind.FromString(data), model)


@settings(max_examples=EXAMPLES)
@given(
    MESSAGES,
    st.sampled_from(
        ["ModelInfer", "ModelMetadata", "ModelConfig", "ModelStatistics", "ModelReady", "ServerLive"]
    ),
)
def test_any_call_is_answered(server: Served, data: bytes, call: str) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        try:
            channel.unary_unary(f"/inference.GRPCInferenceService/{call}")(data, timeout=30)
        except grpc.RpcError as error:
            known = (
                "INVALID_ARGUMENT",
                "NOT_FOUND",
                "RESOURCE_EXHAUSTED",
                "UNAVAILABLE",
                "DEADLINE_EXCEEDED",
            )
            assert error.code().name in known, error
            assert error.details().isprintable() and len(error.details()) < 1100


def test_messages_that_would_be_large_are_refused_before_they_are() -> None:
    kind = messages()["ModelInferRequest"]
    for field in (b"\x2a\x00", b"\x32\x00", b"\x22\x00", b"\x3a\x00", b"\x18\x00", b"\x2a\x02\x22\x00"):
        with pytest.raises(Refusal, match="more than 1,024 fields"):
            size_in_memory(field * 100_000, kind)
    request = kind()
    request.inputs.add(shape=[1] * 10_000).contents.int64_contents.extend([1] * 10_000)
    assert 160_000 <= size_in_memory(request.SerializeToString(), kind) < 170_000
    request.inputs[0].contents.fp32_contents.extend([1.0] * 10_000)
    assert 200_000 <= size_in_memory(request.SerializeToString(), kind) < 210_000
    for broken in (b"\x0b", b"\x2a\x05a", b"\xff" * 11, b"\x2a", b"\x0a\xff\xff\xff\xff\x0f"):
        with pytest.raises(Refusal, match="cannot be read"):
            size_in_memory(broken, kind)


def test_a_message_of_empty_messages_costs_the_server_nothing(server: Served) -> None:
    """Two bytes each: a MiB of them took 60 MB, and 64 MiB gigabytes."""
    with grpc.insecure_channel(server.grpc) as channel:
        for call in ("ModelInfer", "ModelMetadata"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(f"/inference.GRPCInferenceService/{call}")(
                    b"\x2a\x00" * (1 << 19), timeout=30
                )
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_small_numbers_by_the_million_are_refused(server: Served) -> None:
    """A byte each on the wire, eight in the message, and a hundred as objects: a shape of 20 million took 2.6 s."""
    shape = messages()["ModelInferRequest"](model_name=MODEL)
    shape.inputs.add(name="images", datatype="FP32", shape=[1] * 200_000)
    numbers = messages()["ModelInferRequest"](model_name=MODEL)
    numbers.inputs.add(name="images", datatype="FP32", shape=[1]).contents.int64_contents.extend(
        [1] * 1_000_000
    )
    with grpc.insecure_channel(server.grpc) as channel:
        for request, code in (
            (shape, grpc.StatusCode.INVALID_ARGUMENT),
            (numbers, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                data = request.SerializeToString()
                channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(data, timeout=30)
            assert caught.value.code() == code


def test_lines_of_the_log_are_lines(server: Served) -> None:
    """Whatever was asked for, a terminal that shows the log finds nothing in it to obey."""
    ask(server, "POST", "/classify?top=%1b%5b2J%0a%e2%80%ae", b"x", Content_Type="image/png")
    for event in server.events:
        assert json.dumps(event).isprintable()
    assert not server.other
