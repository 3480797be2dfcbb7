"""Starting and stopping: who is served, who is not, and that no accepted request is lost on the way."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy_bundles import change_manifest, dynamic_bundle
from served import IMAGE_MODEL, MODEL, Served, ask, close, digits, file_of, prepared, serving

import quartermap_deploy as qm
from quartermap_deploy.serving import startup
from quartermap_deploy.serving.options import ServeOptions
from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession

grpc = pytest.importorskip("grpc", reason="the extra serve is not installed")
pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
from crowd import Crowd  # noqa: E402


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A bundle that may be spoilt."""
    return Path(shutil.copytree(dynamic_bundle(), tmp_path / "bundle"))


def refused(*arguments: object) -> str:
    """Start a server that must end with exit code 2; returns what it says."""
    server = Served(*arguments)  # type: ignore[arg-type]
    assert server.wait(120) == 2, (server.events, server.other)
    assert not server.said("ready")
    (line,) = server.other
    assert line.startswith("quartermap: error: ")
    return line


# Starting -------------------------------------------------------------------------------------------------------


def test_golden_outputs_that_do_not_match_are_never_served(copy: Path) -> None:
    """The hashes are right, the numbers are not: what a wrong runtime on this machine would look like."""
    path = copy / "golden_outputs.json"
    spoilt = json.loads(path.read_text())
    ((_, iterations),) = spoilt["lst"]
    first, _, third = (iteration["outputs"]["logits"] for iteration in iterations)
    # The outputs of the first and the third case, digits and zeros, have one shape.
    first["values"], third["values"] = third["values"], first["values"]
    path.write_text(json.dumps(spoilt))
    change_manifest(copy)
    server = Served(copy)
    listening = server.until("listening")
    found, deadline = set(), time.monotonic() + 120
    while server.process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            found.add(ask(server, "GET", "/v2/health/ready")[0])
            found.add(ask(server, "POST", f"/v2/models/{MODEL}/infer", b"{}")[0])
    assert server.wait() == 2 and found == {503} and listening
    (line,) = server.other
    assert "departs from the golden outputs on 'images'" in line and "quartermap validate" in line


def test_it_is_alive_but_not_ready_while_it_loads(copy: Path) -> None:
    server = Served(copy)
    try:
        server.until("listening")
        if not server.said("ready"):
            assert ask(server, "GET", "/v2/health/live")[0] == 200
            status, _, body = ask(server, "GET", "/v2/health/ready")
            assert (status, json.loads(body)["phase"]) in ((503, "starting"), (200, "ready"))
        server.until("ready")
        assert ask(server, "GET", "/v2/health/ready")[0] == 200
        (passed,) = server.said("golden_inputs_passed")
        assert passed["worst_relative_error"] < 1e-4
    finally:
        assert server.stop() == 0


def test_a_signal_while_it_loads_ends_it_well(copy: Path) -> None:
    server = Served(copy)
    server.until("listening")
    assert server.stop() == 0 and server.said("stopped")


@pytest.mark.parametrize("name", ["model.onnx", "golden_outputs.json"])
def test_damaged_files_are_refused(copy: Path, name: str) -> None:
    with (copy / name).open("r+b") as file:
        file.seek(100)
        file.write(b"damage")
    assert f"{name} in the bundle" in refused(copy)


def test_ports_that_are_taken_are_refused(copy: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1:{port}: something listens there" in refused(copy, "--port", port)
        assert f"cannot listen at 127.0.0.1:{port}: something listens there" in refused(
            copy, "--grpc-port", port
        )


def test_bad_options_are_refused(copy: Path) -> None:
    for arguments, message in (
        (["--target", "tensorrt"], "has no engine for tensorrt"),
        (["--port", "70000"], "expected 0 to 65535"),
        (["--queue", "4"], "holds no batch of 8"),
        (["--max-delay-ms", "-1"], "no number of milliseconds"),
        (["--workers", "0"], "from 1 to 256"),
        (["--workers", "100000"], "from 1 to 256"),
        (["--queue", "99999999999999999999"], "below 2^31"),
        (["--max-body-mb", "2048"], "less than 2,048 MiB"),
        (["--host", "256.0.0.1"], "cannot listen"),
        (["--host", ""], "the address to listen at is empty"),
        (["--name", ""], "no name that clients could use"),
        (["--name", "stats"], "a word in the paths of the protocol"),
        (["--name", "versions"], "a word in the paths of the protocol"),
    ):
        assert message in refused(copy, *arguments), arguments
    assert "there is no bundle" in refused(copy / "nowhere")


def test_a_closed_standard_error_is_no_defect(copy: Path) -> None:
    script = (
        "import os, signal, sys, threading\n"
        "sys.stderr = None\n"
        "from quartermap_deploy.cli import main\n"
        "threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, "serve", str(copy), "--port", "0", "--grpc-port", "0"]
    assert subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0


def test_an_engine_without_a_gpu_is_refused(copy: Path, tmp_path: Path) -> None:
    from deploy_bundles import with_engine

    engine = with_engine(copy, tmp_path / "engine")
    server = Served(engine, "--target", "tensorrt")
    assert server.wait(120) == 2 and not server.said("ready") and "tensorrt" in server.other[0].lower()


def test_without_the_extra_the_error_says_how_to_get_it(copy: Path) -> None:
    script = (
        "import sys; sys.modules['aiohttp'] = None\n"
        "from quartermap_deploy.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, "serve", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "pip install 'quartermap-deploy[serve]'" in done.stderr


def test_serving_imports_no_torch_even_where_it_is_installed(copy: Path) -> None:
    script = (
        "import os, signal, sys, threading, urllib.request\n"
        "from quartermap_deploy.cli import main\n"
        "from quartermap_deploy.cli import serve as command\n"
        "import quartermap_deploy.serving.server as server\n"
        "def ready(values, quiet=[]):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "command.print_json = ready\n"
        "code = main(['serve', sys.argv[1], '--port', '0', '--grpc-port', '0', '--json'])\n"
        "heavy = sorted({'torch', 'onnx', 'polygraphy', 'sklearn'} & set(sys.modules))\n"
        "sys.exit(f'imported: {heavy}' if heavy else code)\n"
    )
    command = [sys.executable, "-c", script, str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_addresses_are_printed_once_it_is_ready(copy: Path) -> None:
    server = Served(copy, "--json", "--workers", 2)
    server.until("ready")
    assert server.stop(signal.SIGINT) == 0
    assert server.process.stdout is not None
    printed = json.loads(server.process.stdout.read())
    assert printed["http"] == f"http://{server.http}" and printed["models"] == [MODEL, IMAGE_MODEL]


def test_a_host_that_others_reach_is_warned_of(copy: Path) -> None:
    with serving(copy, "--host", "0.0.0.0") as server:
        assert server.said("open_to_others")
    with serving(copy, "--host", "localhost") as server:
        assert not server.said("open_to_others")


def test_log_lines_stay_whole_and_of_one_line(copy: Path) -> None:
    with serving(copy) as server:
        ask(server, "POST", "/v2/models/x%0A%7B%22event%22/infer", b"")
        status, _, _ = ask(
            server, "POST", f"/v2/models/{MODEL}/infer", b'{"inputs": [{"name": "\\u000a\\u001b[31m"}]}'
        )
        assert status == 400
        entry = server.until("refused")
        assert {"time", "level", "path", "status", "reason"} <= set(entry)


def test_more_workers_than_cores_are_warned_of(copy: Path) -> None:
    with serving(copy, "--workers", 3, threads=2) as server:
        (warned,) = server.said("more_workers_than_cores")
        assert (warned["workers"], warned["cores"]) == (3, 2)
    with serving(copy, "--workers", 2, threads=2) as server:
        assert not server.said("more_workers_than_cores")


def test_nobody_has_to_read_the_addresses(copy: Path) -> None:
    """As with `quartermap serve BUNDLE | true`, which ended the server without a word."""
    server = Served(copy)
    assert server.process.stdout is not None
    server.process.stdout.close()
    server.until("ready")
    assert ask(server, "GET", "/v2/health/ready")[0] == 200
    assert server.stop() == 0 and server.other == []


def test_a_signal_before_it_listens_ends_it_well(copy: Path) -> None:
    """While the bundle is read, before there is a loop that could take the signal."""
    script = (
        "import os, signal, sys\n"
        "import quartermap_deploy.bundle as bundle\n"
        "from quartermap_deploy.cli import main\n"
        "bundle.load_bundle = lambda path, signed_by: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, "serve", str(copy), "--log", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["event"] for line in done.stderr.splitlines()] == ["stopping", "stopped"]


class Timed:
    """A session that takes a time, by a clock of the test's own."""

    def __init__(self, session: OnnxRuntimeSession, seconds: float, clock: list[float]) -> None:
        self.inputs, self.seconds, self.clock = session.inputs, seconds, clock
        self.shapes: list[tuple[int, ...]] = []

    def infer(self, feeds: dict[str, Any]) -> None:
        (images,) = feeds.values()
        self.shapes.append(images.shape)
        self.clock[0] += self.seconds


@pytest.mark.parametrize(("wide", "stays", "runs"), [(0.7, True, 1), (0.81, False, 1), (0.05, False, 7)])
def test_a_session_of_all_cores_stays_where_it_is_faster(
    wide: float, stays: bool, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = startup.make_plan(qm.load_bundle(dynamic_bundle()), ServeOptions())
    clock, real = [0.0], OnnxRuntimeSession(plan.bundle.model_path, 1)
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(startup.time, name, lambda: clock[0])
    one = Timed(real, 1.0 if runs == 1 else 0.06, clock)
    sessions = startup.Sessions([one, one], Timed(real, wide, clock))  # type: ignore[list-item, arg-type]
    chosen = startup.without_waste(plan, sessions)
    assert chosen.workers == sessions.workers and chosen.wide is (sessions.wide if stays else None)
    # A lone image; as often as a second allows, but once in any case.
    assert one.shapes == [(1, 3, 64, 64)] * runs


def test_a_session_alone_is_not_compared() -> None:
    plan = startup.make_plan(qm.load_bundle(dynamic_bundle()), ServeOptions())
    sessions = startup.Sessions([], None)
    assert startup.without_waste(plan, sessions) is sessions


# Stopping -------------------------------------------------------------------------------------------------------


def count_of_answers(server: Served) -> dict[str, int]:
    """How many requests each model has answered, as its statistics tell."""
    stats = json.loads(ask(server, "GET", "/v2/models/stats")[2])["model_stats"]
    return {entry["name"]: entry["inference_stats"]["success"]["count"] for entry in stats}


def test_mixed_requests_each_get_their_own_answer() -> None:
    """A small run of what benchmarks/serving.py does with 10,000 requests from 32 clients."""
    with serving(dynamic_bundle(), "--queue", 512, threads=2) as server:
        loaded = server.until("loaded")
        assert (loaded["workers"], loaded["threads"], loaded["wide"]) == (2, 1, True)
        crowd = Crowd(server, qm.load_bundle(dynamic_bundle()), clients=8)
        crowd.run(240)
        assert crowd.wrong == [] and crowd.outcomes == {"answered": 240}
        counted = count_of_answers(server)
    assert counted[IMAGE_MODEL] == crowd.by_model[IMAGE_MODEL]
    # Those of the image model have come by the model itself, too.
    assert counted[MODEL] == crowd.by_model[MODEL] + crowd.by_model[IMAGE_MODEL]


def test_a_signal_under_load_loses_nothing_that_was_accepted() -> None:
    server = Served(dynamic_bundle(), "--queue", 512, "--shutdown-timeout", 60, threads=2)
    try:
        server.until("ready")
        crowd = Crowd(server, qm.load_bundle(dynamic_bundle()), clients=12, seed=1)
        thread = threading.Thread(target=crowd.run, args=(100_000,))
        thread.start()
        deadline = time.monotonic() + 60
        while crowd.outcomes["answered"] < 40 and time.monotonic() < deadline:
            time.sleep(0.01)
        start = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start < 60
    finally:
        crowd.stop.set()
        thread.join(60)
        if server.process.poll() is None:
            server.process.kill()
    (stopped,) = server.said("stopped")
    assert stopped["still_open"] == 0
    assert crowd.wrong == []
    assert not any(outcome.startswith("error") for outcome in crowd.outcomes), crowd.outcomes
    # Whatever it took on, it answered, and the answers have arrived: each client has one for every success.
    answered = crowd.outcomes["answered"]
    assert stopped["answered"] == answered, (stopped, crowd.outcomes)


def test_while_it_stops_it_is_alive_not_ready_and_refuses() -> None:
    """A client that sends its body slowly keeps the server from ending, and gets its answer all the same."""
    server = Served(dynamic_bundle(), "--shutdown-timeout", 60)
    try:
        server.until("ready")
        images = prepared(digits(1)[0])
        expected = qm.load_bundle(dynamic_bundle()).run(images)
        entry: dict[str, Any] = {"name": "images", "shape": list(images.shape), "datatype": "FP32"}
        entry["data"] = images.reshape(-1).tolist()
        body = json.dumps({"inputs": [entry]}).encode()
        with server.connect() as slow:
            head = f"POST /v2/models/{MODEL}/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            slow.sendall(head.encode() + body[:1000])
            with grpc.insecure_channel(server.grpc) as channel:
                check = channel.unary_unary("/grpc.health.v1.Health/Check")
                assert check(b"") == b"\x08\x01"
                deadline = time.monotonic() + 60
                while json.loads(ask(server, "GET", "/v2/health/ready")[2])["phase"] == "ready":
                    assert time.monotonic() < deadline
                    server.process.send_signal(signal.SIGTERM)
                    server.until("stopping")
                assert check(b"") == b"\x08\x02"
            assert ask(server, "GET", "/v2/health/live")[0] == 200
            status, headers, answer = ask(server, "POST", f"/v2/models/{MODEL}/infer", body)
            assert status == 503 and headers["retry-after"] and headers["connection"] == "close"
            assert "the server is stopping" in json.loads(answer)["error"]
            slow.sendall(body[1000:])
            received = b""
            while part := slow.recv(65536):
                received += part
        text, _, content = received.partition(b"\r\n\r\n")
        assert text.startswith(b"HTTP/1.1 200")
        logits = np.array(json.loads(content)["outputs"][0]["data"], np.float32).reshape(1, 10)
        assert close(logits, expected)
        assert server.wait() == 0
    finally:
        if server.process.poll() is None:
            server.process.kill()


def test_the_time_for_stopping_is_bounded_and_a_second_signal_does_not_wait() -> None:
    for arguments, second in ((["--shutdown-timeout", 1], False), (["--shutdown-timeout", 1000], True)):
        server = Served(dynamic_bundle(), *arguments)
        server.until("ready")
        with server.connect() as slow:
            slow.sendall(
                b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 99\r\n\r\n"
            )
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            server.until("stopping")
            if second:
                server.process.send_signal(signal.SIGTERM)
            assert server.wait(30) == 2
        (stopped,) = server.said("stopped")
        assert stopped["still_open"] == 1
        (line,) = server.other
        assert "1 requests were still open" in line


SLOW_START = """
import sys, threading, time
sys.modules["torch"] = None
from quartermap_deploy.cli import main
from quartermap_deploy.serving import images, startup
"""
SLOW_IMAGES = """
images.ImageFile.prepare = lambda self: time.sleep(1000)
"""
# A session that is in the middle of ONNX Runtime's own code, as a large model on a slow machine is.
SLOW_MODEL = """
import numpy as np
plain = startup.OnnxRuntimeSession.infer
class Slow(startup.OnnxRuntimeSession):
    proved = 0
    def infer(self, feeds):
        result = plain(self, feeds)
        while threading.current_thread().name.startswith("worker"):
            plain(self, {name: np.repeat(values, 64, axis=0) for name, values in feeds.items()})
        return result
startup.OnnxRuntimeSession = Slow
"""


def upload(client: socket.socket) -> None:
    """Send an image to be classified, and wait until the server is at it."""
    file = file_of(digits(1)[0][0])
    head = "POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    client.sendall(f"{head}Content-Length: {len(file)}\r\n\r\n".encode() + file)
    time.sleep(1)


@pytest.mark.parametrize("slow", [SLOW_IMAGES, SLOW_MODEL], ids=["decoding", "running"])
@pytest.mark.parametrize("second", [False, True], ids=["time is up", "second signal"])
def test_threads_that_are_busy_do_not_hold_up_the_end(slow: str, second: bool) -> None:
    """Python waited for a thread that decoded, and one that ran the model aborted the process: exit code -6."""
    start = SLOW_START + slow + "sys.exit(main(sys.argv[1:]))"
    server = Served(dynamic_bundle(), "--shutdown-timeout", 1000 if second else 1, start=start)
    try:
        server.until("ready")
        with server.connect() as client:
            upload(client)
            server.process.send_signal(signal.SIGTERM)
            server.until("stopping")
            begin = time.monotonic()
            if second:
                server.process.send_signal(signal.SIGTERM)
            code = server.wait(30)
            assert code == 2 and time.monotonic() - begin < (1.5 if second else 4)
        (stopped,) = server.said("stopped")
        assert stopped["still_open"] == 1
        (line,) = server.other
        assert "1 requests were still open" in line
    finally:
        if server.process.poll() is None:
            server.process.kill()


def test_an_image_of_a_client_that_has_gone_does_not_hold_up_the_end() -> None:
    server = Served(dynamic_bundle(), start=SLOW_START + SLOW_IMAGES + "sys.exit(main(sys.argv[1:]))")
    try:
        server.until("ready")
        with server.connect() as client:
            upload(client)
        time.sleep(0.5)
        assert server.stop(seconds=15) == 0
        (stopped,) = server.said("stopped")
        assert stopped["still_open"] == 0 and server.other == []
    finally:
        if server.process.poll() is None:
            server.process.kill()


def test_the_log_as_text_shows_nothing_that_a_terminal_obeys() -> None:
    """Nor a value that reads like others, nor a line that reads like two."""
    from quartermap_deploy.serving.logs import EventLog

    stream = io.StringIO()
    log = EventLog("text", stream)
    log.warning("refused", path="/\x1b[2J\r\nready\u202e\ud800", reason="a  status=200")
    log.close()
    (line,) = stream.getvalue().splitlines()
    assert line.isprintable() and line.endswith(r'path=/\x1b[2J\r\nready\u202e\ud800  reason="a  status=200"')


def test_warnings_of_libraries_are_lines_of_the_log() -> None:
    import warnings

    from quartermap_deploy.serving.logs import EventLog

    stream = io.StringIO()
    log = EventLog("json", stream)
    with log.libraries():
        warnings.warn("a palette\nwith transparency", stacklevel=1)
    log.close()
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["library"]
