"""Clients that do what they should not, while others go on as usual: all on the loopback, and bounded."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import json
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import hostile
import numpy as np
import pytest
from deploy_bundles import dynamic_bundle
from hostile import png, text_bomb
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from served import (
    IMAGE_MODEL,
    MODEL,
    START,
    Array,
    Served,
    ask,
    close,
    digits,
    file_of,
    files,
    form,
    prepared,
    serving,
    tensor,
)

import quartermap_deploy as qm

grpc = pytest.importorskip("grpc", reason="the extra serve is not installed")
tritonhttp = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
tritongrpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
from tritonclient.utils import InferenceServerException  # noqa: E402

INFER = f"/v2/models/{MODEL}/infer"


class Bystander:
    """A client that asks again and again, and knows the answer; what goes wrong with it is kept."""

    def __init__(self, server: Served) -> None:
        self.images = prepared(digits(1)[0])
        self.expected = qm.load_bundle(dynamic_bundle()).run(self.images)
        self.server, self.answers, self.problems = server, 0, []  # type: ignore[var-annotated]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def _ask(self) -> None:
        with tritonhttp.InferenceServerClient(self.server.http, network_timeout=60) as client:
            while not self._stop.is_set():
                try:
                    answer = client.infer(MODEL, [tensor(tritonhttp, "images", self.images)])
                    assert close(answer.as_numpy("logits"), self.expected)
                    self.answers += 1
                except Exception as problem:
                    self.problems.append(repr(problem))
                    return
                time.sleep(0.02)

    def __enter__(self) -> Bystander:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        before = self.answers
        deadline = time.monotonic() + 60
        while self.answers < before + 2 and not self.problems and time.monotonic() < deadline:
            time.sleep(0.01)
        self._stop.set()
        self._thread.join(60)
        assert not self.problems and self.answers >= before + 2, self.problems


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    arguments = ["--max-body-mb", 2, "--receive-timeout", 1.5, "--queue", 16, "--max-delay-ms", 0]
    with serving(dynamic_bundle(), *arguments) as running:
        yield running


@pytest.fixture
def bystander(server: Served) -> Iterator[Bystander]:
    with Bystander(server) as other:
        yield other


def message_of(body: bytes) -> str:
    """The error that an answer of the protocol tells."""
    found = json.loads(body)
    assert list(found) == ["error"]
    return str(found["error"])


def peak_memory(server: Served) -> int:
    """The most bytes that the server has had in memory, as Linux tells."""
    return hostile.peak_memory(server.process.pid)


def infer_body(images: Array) -> tuple[bytes, str]:
    """A right request, with the length of its JSON."""
    entry = {"name": "images", "shape": list(images.shape), "datatype": "FP32"}
    entry["parameters"] = {"binary_data_size": images.nbytes}  # type: ignore[assignment]
    head = json.dumps({"inputs": [entry]}).encode()
    return head + images.tobytes(), str(len(head))


# Paths and methods ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v2/models/nobody", 404, "unknown model 'nobody'"),
        ("GET", f"/v2/models/{MODEL}/versions/2", 404, "no version '2'"),
        ("POST", "/v2/models/nobody/infer", 404, "unknown model"),
        ("GET", INFER, 405, "does not take GET"),
        ("POST", "/metrics", 405, "does not take POST"),
        ("GET", "/nowhere", 404, "there is no /nowhere"),
        ("GET", "/../../../../etc/passwd", 404, ""),
        ("GET", "/v2/models/../../../etc/passwd", 404, ""),
        ("GET", "/v2/models/..%2f..%2f..%2fetc%2fpasswd", 404, ""),
        ("GET", "/v2/models/%2e%2e/%2e%2e/etc/passwd", 404, ""),
        ("GET", "/manifest.json", 404, ""),
        ("GET", "//etc/passwd", 404, ""),
        ("POST", "/v2/repository/models/x/load", 404, ""),
        ("GET", "/v2/models/%00%ff", 404, ""),
    ],
)
def test_paths_that_lead_nowhere(server: Served, method: str, path: str, status: int, message: str) -> None:
    found, headers, body = ask(server, method, path, b"" if method == "POST" else None)
    assert found == status and headers["content-type"] == "application/json"
    assert message in message_of(body) and b"root:" not in body


# Bodies ---------------------------------------------------------------------------------------------------------


def test_a_body_over_the_limit_is_refused_before_it_is_read(server: Served, bystander: Bystander) -> None:
    with server.connect() as connection:
        head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {10**12}\r\n\r\n"
        connection.sendall(head.encode())
        answer = connection.recv(65536)
    assert b" 413 " in answer and b"at most 2,097,152 bytes" in answer


def test_a_body_over_the_limit_in_chunks_is_refused(server: Served, bystander: Bystander) -> None:
    connection = http.client.HTTPConnection(server.http, timeout=30)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.request(
            "POST",
            INFER,
            iter([b"x" * 65536] * 40),
            encode_chunked=True,
            headers={"Transfer-Encoding": "chunked"},
        )
    answer = connection.getresponse()
    assert answer.status == 413 and "is larger" in message_of(answer.read())
    connection.close()


def test_a_small_body_that_unpacks_into_a_large_one_is_refused(server: Served, bystander: Bystander) -> None:
    packed = zlib.compress(bytes(200 << 20), 9)
    assert len(packed) < 1 << 20
    status, _, body = ask(server, "POST", INFER, packed, Content_Encoding="deflate")
    assert status == 413, body


def test_a_body_that_is_not_compressed_as_it_says_is_refused(server: Served) -> None:
    status, _, body = ask(server, "POST", INFER, b"this is no gzip", Content_Encoding="gzip")
    assert status == 400 and "cannot be unpacked as gzip" in message_of(body)
    for encoding, packed in (
        ("gzip", gzip.compress(b"{}")[:-1]),
        ("deflate", zlib.compress(b"{}") + b"more"),
    ):
        status, _, body = ask(server, "POST", INFER, packed, Content_Encoding=encoding)
        assert status == 400 and "body" in message_of(body)


def test_other_compressions_than_tritons_are_refused(server: Served) -> None:
    for encoding in ("br", "zstd", "foo", "gzip, gzip"):
        status, headers, body = ask(server, "POST", INFER, b"\0" * 99, Content_Encoding=encoding)
        assert status == 415 and headers["content-type"] == "application/json"
        assert "expected gzip or deflate" in message_of(body)
    status, _, body = ask(server, "POST", INFER, b"{}", Content_Encoding="identity")
    assert status == 400 and "inputs" in message_of(body)
    body, kind = form(("x.png", gzip.compress(b"x")))
    status, _, body = ask(server, "POST", "/classify", body, Content_Type=kind, Content_Encoding="gzip")
    assert status == 415 and "form is compressed" in message_of(body)


def test_a_bomb_is_not_unpacked_beyond_the_limit(server: Served) -> None:
    """4 GiB in 4 MB, on the connection of a client that sends on and on: everybody else is answered meanwhile."""
    bomb = gzip.compress(bytes(64 << 20)) * 64
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head.encode())

        def send() -> None:
            with contextlib.suppress(OSError):
                for start in range(0, len(bomb), 1000):
                    part = bomb[start : start + 1000]
                    connection.sendall(b"%x\r\n" % len(part) + part + b"\r\n")

        sender = threading.Thread(target=send)
        sender.start()
        worst = 0.0
        for _ in range(20):
            begin = time.monotonic()
            assert ask(server, "GET", "/v2/health/live")[0] == 200
            worst = max(worst, time.monotonic() - begin)
            time.sleep(0.05)
        answer = connection.recv(65536)
        sender.join(30)
    assert b" 413 " in answer and worst < 1, (answer, worst)
    if Path("/proc/self/status").exists():
        assert peak_memory(server) < 700 << 20


def test_broken_chunks_are_refused(server: Served) -> None:
    with server.connect() as connection:
        head = (
            f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nnot a length\r\n"
        )
        connection.sendall(head.encode())
        assert b" 400 " in connection.recv(65536)


def test_broken_chunks_do_not_fill_the_log(server: Served) -> None:
    """They were errors of the server in its log, one for each."""
    before, begin = len(server.events), time.monotonic()
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    for _ in range(60):
        with server.connect() as connection:
            connection.sendall(head + b"not a length\r\n")
            connection.recv(65536)
    seconds = time.monotonic() - begin
    time.sleep(1.2)
    with server.connect() as connection:
        connection.sendall(head + b"not a length\r\n")
        connection.recv(65536)
    time.sleep(0.3)
    lines = server.events[before:]
    assert not [line for line in lines if line["event"] == "library" or line["level"] == "error"], lines
    # Of those that the application sees, and of those that it does not.
    assert len(lines) <= 2 * (seconds + 2) and any(line.get("times", 1) > 1 for line in lines), lines


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /" + "a" * 9000 + " HTTP/1.1", 400),
        ("G@T / HTTP/1.1", 400),
        ("GET / HTTP/1.1\r\nX-Long: " + "a" * 9000, 400),
        ("GET / HTTP/1.1\r\nBad Name: x", 400),
        ("GET / HTTP/1.1\r\nContent-Length: -1", 400),
    ],
)
def test_what_the_library_below_refuses_is_json_too(server: Served, request_line: str, status: int) -> None:
    with server.connect() as connection:
        connection.sendall(f"{request_line}\r\nHost: localhost\r\n\r\n".encode())
        received = b""
        while part := connection.recv(65536):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    assert f" {status} ".encode() in head and b"application/json" in head
    assert "no HTTP request" in message_of(body)


def test_a_path_of_the_protocol_that_is_not_here_is_said_to_be_missing(server: Served) -> None:
    status, _, body = ask(server, "GET", "/v2/logging")
    assert status == 404 and "this server has no /v2/logging" in message_of(body)


def test_what_is_no_http_is_refused(server: Served, bystander: Bystander) -> None:
    for junk in (
        b"\0\1\2\3\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ):
        with server.connect() as connection:
            connection.sendall(junk)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(65536)
            assert answer == b"" or b" 400 " in answer, answer


def test_slow_senders_get_an_answer_in_time_and_hold_up_nobody(server: Served, bystander: Bystander) -> None:
    body, length = infer_body(bystander.images)
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(server.connect()) for _ in range(20)]
        head = (
            f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            f"Inference-Header-Content-Length: {length}\r\n\r\n"
        )
        start = time.monotonic()
        for connection in connections:
            connection.sendall(head.encode())
        for place in range(10):
            for connection in connections:
                connection.sendall(body[place : place + 1])
            time.sleep(0.05)
        for connection in connections:
            answer = connection.recv(65536)
            assert b" 408 " in answer and b"did not come within 1.5 s" in answer
            while answer:
                answer = connection.recv(65536)
        assert time.monotonic() - start < 20


def test_slow_senders_give_way_to_others() -> None:
    """More of them than there is room for, and with all the time of the world."""
    noise = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), np.uint8)
    large = file_of(noise)
    assert len(large) > 5 << 20
    with (
        serving(dynamic_bundle(), "--max-body-mb", 64, "--receive-timeout", 600) as server,
        Bystander(server) as bystander,
        contextlib.ExitStack() as stack,
    ):
        stop = threading.Event()
        stack.callback(stop.set)

        def nothing() -> Iterator[bytes]:
            stop.wait(600)
            yield b""

        channel = stack.enter_context(grpc.insecure_channel(server.grpc))
        call = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
        pending = [call.future(nothing()) for _ in range(90)]
        head = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
        senders = []
        for _ in range(3):
            sender = stack.enter_context(server.connect())
            sender.sendall(head % (60 << 20) + bytes(60 << 20)[:-1])
            senders.append(sender)
        client = stack.enter_context(tritongrpc.InferenceServerClient(server.grpc))
        begin = time.monotonic()
        for _ in range(5):
            answer = client.infer(MODEL, [tensor(tritongrpc, "images", bystander.images)], client_timeout=60)
            assert close(answer.as_numpy("logits"), bystander.expected)
        for _ in range(5):
            status, _, body = ask(server, "POST", "/classify", large, Content_Type="image/png")
            if status != 503:
                break
            time.sleep(1)
        assert status == 200 and json.loads(body)["images"]
        # Slow senders have ten minutes.
        assert time.monotonic() - begin < 60
        over = [found for found in pending if found.done()]
        assert over and {found.code() for found in over} == {grpc.StatusCode.UNAVAILABLE}
        assert all("still on its way" in found.details() for found in over)
        stop.set()
        for found in pending:
            found.cancel()


def test_idle_connections_give_way_when_there_are_no_files_left_for_more() -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160)); "
    server = Served(dynamic_bundle(), start=limit + START)
    try:
        server.until("ready")
        images = prepared(digits(1)[0])
        with contextlib.ExitStack() as stack:
            kept = stack.enter_context(tritonhttp.InferenceServerClient(server.http))
            for place in range(300):
                idle = stack.enter_context(server.connect())
                if place % 2:
                    idle.sendall(b"POST /classify HTTP/1.1\r\nHo")
                if place % 50 == 49:
                    assert ask(server, "GET", "/v2/health/ready")[0] == 200
            expected = qm.load_bundle(dynamic_bundle()).run(images)
            answer = kept.infer(MODEL, [tensor(tritonhttp, "images", images)])
            assert close(answer.as_numpy("logits"), expected)
        assert server.stop() == 0 and not server.other
    finally:
        if server.process.poll() is None:
            server.process.kill()


def test_half_sent_bodies_and_clients_that_go_away(server: Served, bystander: Bystander) -> None:
    body, length = infer_body(np.repeat(bystander.images, 8, axis=0))
    head = (
        f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        f"Inference-Header-Content-Length: {length}\r\n\r\n"
    ).encode()
    whole = head + body
    order = random.Random(0)
    for _ in range(40):
        connection = server.connect()
        if order.random() < 0.5:
            # Without this the system says goodbye politely; with it, the connection is simply gone.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        cut = order.choice([0, 10, len(head), len(head) + 1000, len(whole) - 1, len(whole)])
        connection.sendall(whole[:cut])
        time.sleep(order.choice([0, 0.01]))
        connection.close()


def test_messages_of_refused_calls_are_not_kept(server: Served) -> None:
    """gRPC keeps the error of a call for a while; with it went the message: 40 of 60 MiB were 2.6 GB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells how much memory a process has")
    wrong = tensor(tritongrpc, "images", np.zeros((400_000,), np.float32))

    def send() -> None:
        with tritongrpc.InferenceServerClient(server.grpc) as client:
            for _ in range(50):
                with pytest.raises(InferenceServerException, match="has shape"):
                    client.infer(MODEL, [wrong])

    before = peak_memory(server)
    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    # 480 MB were sent.
    assert peak_memory(server) - before < 150 << 20


def test_calls_whose_message_does_not_come(server: Served, bystander: Bystander) -> None:
    """They end in time, and nobody else waits for their health in the meantime."""
    stop = threading.Event()

    def nothing() -> Iterator[bytes]:
        stop.wait(30)
        yield b""

    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
        begin = time.monotonic()
        pending = [call.future(nothing()) for _ in range(20)]
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"", timeout=1) == b"\x08\x01"
        codes = {found.exception(timeout=30).code() for found in pending}
        stop.set()
        assert codes <= {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}, codes
        assert grpc.StatusCode.DEADLINE_EXCEEDED in codes and time.monotonic() - begin < 10
        with pytest.raises(grpc.RpcError) as caught:
            call(iter([]), timeout=10)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_values_in_a_message_that_are_too_many_are_refused(server: Served) -> None:
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    request = service_pb2.ModelInferRequest(model_name=MODEL)
    given = request.inputs.add(name="images", datatype="FP32", shape=(1, 3, 64, 64))
    given.contents.fp32_contents.extend([0.0] * 400_000)
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert "400000 values" in caught.value.details()


def test_grpc_clients_that_give_up(server: Served, bystander: Bystander) -> None:
    eight = np.repeat(bystander.images, 8, axis=0)
    outcomes = []
    with tritongrpc.InferenceServerClient(server.grpc) as client:
        for _ in range(20):
            try:
                client.infer(MODEL, [tensor(tritongrpc, "images", eight)], client_timeout=0.005)
                outcomes.append("answered")
            except InferenceServerException as error:
                outcomes.append(str(error.status()))
        assert set(outcomes) <= {"answered", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.UNAVAILABLE"}
        assert "StatusCode.DEADLINE_EXCEEDED" in outcomes
        assert close(
            client.infer(MODEL, [tensor(tritongrpc, "images", bystander.images)]).as_numpy("logits"),
            bystander.expected,
        )


def test_a_grpc_message_over_the_limit_is_refused(server: Served, bystander: Bystander) -> None:
    with tritongrpc.InferenceServerClient(server.grpc) as client:
        many = np.zeros((64, 3, 64, 64), np.float32)
        with pytest.raises(InferenceServerException, match=r"larger than max|RESOURCE_EXHAUSTED"):
            client.infer(MODEL, [tensor(tritongrpc, "images", many)])


def test_grpc_messages_that_are_none(server: Served, bystander: Bystander) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for junk in (b"\xff" * 40, b"\x0a\xff\xff\xff\x7f", b"\x08"):
            with pytest.raises(grpc.RpcError) as caught:
                call(junk)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/inference.GRPCInferenceService/NoSuchCall")(b"")
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


# Requests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_wrong_requests_get_clear_errors(server: Served, bystander: Bystander, protocol: str) -> None:
    module = {"http": tritonhttp, "grpc": tritongrpc}[protocol]
    address = {"http": server.http, "grpc": server.grpc}[protocol]
    one = bystander.images
    cases: list[tuple[str, str, Array, str]] = [
        (MODEL, "image", one, "unknown input 'image'; the model takes 'images'"),
        ("vmamba", "images", one, f"unknown model 'vmamba'; there are '{MODEL}'"),
        (MODEL, "images", one.astype(np.float64), "'FP64', the model takes FP32"),
        (MODEL, "images", one.astype(np.uint8), "'UINT8', the model takes FP32"),
        (MODEL, "images", one[0], "shape [3, 64, 64], the model takes [-1, 3, 64, 64]"),
        (MODEL, "images", one[:, :, :, :32], "shape [1, 3, 64, 32]"),
        (MODEL, "images", one[:0], "an empty batch"),
        (MODEL, "images", np.repeat(one, 9, axis=0), "a batch of 9, at most 8"),
        (MODEL, "images", np.full_like(one, np.nan), "NaN or infinite"),
        (MODEL, "images", np.full_like(one, np.inf), "NaN or infinite"),
        (IMAGE_MODEL, "image", files(b"no image"), "image 1 of 8 bytes cannot be read as JPEG or PNG"),
        (IMAGE_MODEL, "image", files(file_of(digits(1)[0][0]), b""), "image 2 is empty"),
        (IMAGE_MODEL, "image", files(*[b""] * 9), "a batch of 9, at most 8"),
    ]
    with module.InferenceServerClient(address) as client:
        for model, name, values, message in cases:
            with pytest.raises(InferenceServerException) as caught:
                client.infer(model, [tensor(module, name, np.ascontiguousarray(values))])
            assert message in str(caught.value.message()), (message, caught.value)
        with pytest.raises(InferenceServerException, match="unknown output"):
            output = module.InferRequestedOutput("classes")
            client.infer(MODEL, [tensor(module, "images", one)], outputs=[output])


def test_a_full_queue_is_said_with_the_time_to_come_back(server: Served) -> None:
    """Each of 40 clients sends 8 images at once; 16 may wait."""
    body, length = infer_body(np.repeat(prepared(digits(1)[0]), 8, axis=0))
    answers: list[tuple[int, dict[str, str], bytes]] = []

    def send() -> None:
        answers.append(ask(server, "POST", INFER, body, Inference_Header_Content_Length=length))

    for _ in range(5):
        threads = [threading.Thread(target=send) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        refused = [answer for answer in answers if answer[0] == 503]
        if refused:
            break
    assert {status for status, _, _ in answers} == {200, 503}
    assert all(headers["retry-after"] == "1" for _, headers, _ in refused)
    # Where others were quicker, some found no memory instead.
    assert any("at most 16 do" in message_of(body) for _, _, body in refused)


# Images ---------------------------------------------------------------------------------------------------------


def png_head(width: int, height: int) -> bytes:
    """A PNG that says it has these sides, and has the pixels of eight."""
    whole = png(8, 8, color=0)
    head = whole[12:29].replace(struct.pack(">II", 8, 8), struct.pack(">II", width, height))
    return whole[:12] + head + struct.pack(">I", zlib.crc32(head)) + whole[33:]


def other_format(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    return file.getvalue()


TRUNCATED = file_of(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8), "JPEG")[:4000]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png_head(30_000, 30_000), "30000 x 30000 pixels, at most 50,000,000"),
        (png_head(2**31 - 1, 2**31 - 1), "2147483647 x 2147483647 pixels, at most 50,000,000"),
        (png_head(100, 100), "cannot be read"),
        (TRUNCATED, "cannot be taken"),
        (b"GIF89a" + bytes(100), "cannot be read as JPEG or PNG"),
        (other_format("BMP"), "cannot be read as JPEG or PNG"),
        (other_format("TIFF"), "cannot be read as JPEG or PNG"),
        (b"<svg/>", "cannot be read as JPEG or PNG"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read as JPEG or PNG"),
        (b"", "is empty"),
    ],
)
def test_files_that_are_no_images_or_bombs(
    server: Served, bystander: Bystander, data: bytes, message: str
) -> None:
    for kind in ("image/png", None):
        body, content_type = (data, kind) if kind else form(("x.png", data))
        status, _, answer = ask(server, "POST", "/classify", body, Content_Type=str(content_type))
        assert status == 400
        assert message in message_of(answer) or "cannot be" in message_of(answer), answer


def test_small_images_overtake_large_ones(server: Served) -> None:
    """Eight of 49 million pixels kept everybody else's images waiting for twelve seconds."""
    large, small = file_of(np.zeros((7000, 7000), np.uint8)), file_of(digits(1)[0][0])
    large_body, kind = form(*[("x.png", large)] * 8)
    answers: list[int] = []

    def send_large() -> None:
        answers.append(ask(server, "POST", "/classify", large_body, Content_Type=kind)[0])

    begin = time.monotonic()
    thread = threading.Thread(target=send_large)
    thread.start()
    waited = []
    while thread.is_alive():
        start = time.monotonic()
        assert ask(server, "POST", "/classify", small, Content_Type="image/png")[0] == 200
        waited.append(time.monotonic() - start)
        time.sleep(0.02)
    thread.join()
    assert answers == [200]
    # All of them in one queue, the first small image would have waited for nearly as long as the large ones took.
    assert max(waited) < max(1.0, (time.monotonic() - begin) / 3), waited


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_what_is_no_pixel_is_not_unpacked(server: Served, bystander: Bystander, kind: bytes) -> None:
    """300 MB in 300 kB; the image around them is one as any other."""
    before = peak_memory(server)
    status, _, answer = ask(server, "POST", "/classify", text_bomb(kind), Content_Type="image/png")
    assert status == 200 and json.loads(answer)["images"], answer
    assert peak_memory(server) - before < 20 << 20


@pytest.mark.parametrize(
    ("body", "kind", "status", "message"),
    [
        (b"x", "text/plain", 415, "send a form with files"),
        (b"x", "", 400, "cannot be read as JPEG or PNG"),
        (b"", "multipart/form-data", 400, "boundary"),
        (b"", "multipart/form-data; boundary=x", 400, ""),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 400, "no file"),
        (b"junk", "multipart/form-data; boundary=x", 400, ""),
        (
            b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\nb\r\n--x--\r\n",
            "multipart/form-data; boundary=x",
            400,
            "no file",
        ),
        (
            b"--x\r\nContent-Type: multipart/mixed; boundary=y\r\n\r\n--y--\r\n--x--\r\n",
            "multipart/form-data; boundary=x",
            400,
            "a form in it",
        ),
        (form(*[("a", b"")] * 9)[0], "multipart/form-data; boundary=x", 400, "a batch of 9"),
    ],
)
def test_uploads_that_are_none(server: Served, body: bytes, kind: str, status: int, message: str) -> None:
    found, _, answer = ask(server, "POST", "/classify", body, **({"Content_Type": kind} if kind else {}))
    assert found == status and message in message_of(answer), answer


def test_top_has_to_be_a_number_of_classes(server: Served) -> None:
    file = file_of(digits(1)[0][0])
    for top in ("0", "-1", "x", "1e3", "9999999999999"):
        status, _, answer = ask(server, "POST", f"/classify?top={top}", file, Content_Type="image/png")
        assert status == 400 and "number of classes" in message_of(answer)
    status, _, answer = ask(server, "POST", "/classify?top=99", file, Content_Type="image/png")
    assert status == 200 and len(json.loads(answer)["images"][0]["classes"]) == 10


# Anything -------------------------------------------------------------------------------------------------------

PATHS = st.sampled_from(
    ["/", "/metrics", "/classify", "/v2", INFER, f"/v2/models/{IMAGE_MODEL}/infer", "/status"]
)


@settings(max_examples=30)
@given(
    st.sampled_from(["GET", "POST", "PUT", "OPTIONS", "HEAD"]),
    PATHS
    | st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30).map(lambda text: "/" + text),
    st.dictionaries(
        st.sampled_from(
            ["Content-Type", "Inference-Header-Content-Length", "Content-Encoding", "Accept-Encoding"]
        ),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30),
        max_size=3,
    ),
    st.binary(max_size=300),
)
def test_any_request_gets_an_answer(
    server: Served, method: str, path: str, headers: dict[str, str], body: bytes
) -> None:
    connection = http.client.HTTPConnection(server.http, timeout=30)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    assert answer.status != 500, (text, server.said("defect"))
    if answer.status >= 400 and method != "HEAD" and answer.getheader("Content-Type") == "application/json":
        assert message_of(text)


def test_after_all_that_the_server_holds_no_more_than_before(server: Served) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("only Linux tells how many files a process has open")
    open_files = Path(f"/proc/{server.process.pid}/fd")
    images = prepared(digits(1)[0])
    with tritonhttp.InferenceServerClient(server.http) as client:
        client.infer(MODEL, [tensor(tritonhttp, "images", images)])
    deadline = time.monotonic() + 30
    while len(list(open_files.iterdir())) > 60 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(list(open_files.iterdir())) <= 60
    status = json.loads(ask(server, "GET", "/status")[2])
    assert status["phase"] == "ready" and not server.said("defect")
