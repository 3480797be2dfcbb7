"""A server in a process of its own, as users start it, and what its tests share."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import quartermap_deploy as qm
from quartermap_deploy.data.digits import load_digits
from quartermap_deploy.data.images import prepare

MODEL = "vmamba_digits"
IMAGE_MODEL = f"{MODEL}_image"
Array = NDArray[Any]

# The interpreter of the server may be another Python than that of the tests: `make test-server`.
SERVER_PYTHON = os.environ.get("QUARTERMAP_SERVER_PYTHON", sys.executable)
# Whatever imports torch in the server fails.
START = "import sys; sys.modules['torch'] = None; from quartermap_deploy.cli import main; sys.exit(main(sys.argv[1:]))"


class Served:
    """A server that runs.

    Attributes:
        process: its process.
        events: the lines of its log so far.
        other: lines of standard error that are none of the log.
    """

    def __init__(self, bundle: Path, *arguments: object, threads: int = 1, start: str = START) -> None:
        """Start it; `start` is the program, for servers in which something is slow or spoilt."""
        command = [SERVER_PYTHON, "-c", start, "serve", bundle, "--port", 0, "--grpc-port", 0, *arguments]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **({"QUARTERMAP_THREADS": str(threads)} if threads else {}),
                "OMP_NUM_THREADS": "1",
            },
        )
        self.events: list[dict[str, Any]] = []
        self.other: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.events.append(json.loads(line))
            except json.JSONDecodeError:
                self.other.append(line)

    def until(self, event: str, seconds: float = 120) -> dict[str, Any]:
        """Wait for an event of the log."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for entry in list(self.events):
                if entry["event"] == event:
                    return entry
            if self.process.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.02)
        raise AssertionError(f"no event {event!r}: {self.events} {self.other}")

    def said(self, event: str) -> list[dict[str, Any]]:
        """The events of a kind so far."""
        return [entry for entry in list(self.events) if entry["event"] == event]

    @property
    def http(self) -> str:
        """Host and port of HTTP."""
        return str(self.until("listening")["http"]).removeprefix("http://")

    @property
    def port(self) -> int:
        """Port of HTTP."""
        return int(self.http.rsplit(":", 1)[1])

    @property
    def grpc(self) -> str:
        """Host and port of gRPC."""
        return str(self.until("listening")["grpc"])

    def connect(self) -> socket.socket:
        """A connection to HTTP, for what no client would send."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Send a signal, wait for the end, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds: float = 60) -> int:
        """Wait for the end, and return the exit code."""
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code


@contextmanager
def serving(bundle: Path, *arguments: object, threads: int = 1) -> Iterator[Served]:
    """Run a server while open, from when it is ready; it must end well, and must not have met a defect."""
    server = Served(bundle, *arguments, threads=threads)
    try:
        server.until("ready")
        yield server
        assert server.stop() == 0, (server.events, server.other)
        assert not server.said("defect") and not server.other, (server.said("defect"), server.other)
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait(30)


def digits(count: int = 16) -> tuple[Array, Array]:
    """Held-out digits: (n, 8, 8) of uint8, and what they are."""
    held_out = load_digits().held_out
    # Every 45th is another digit.
    order = np.arange(450).reshape(10, 45).T.reshape(-1)[:count]
    return held_out.images[order], held_out.labels[order]


def prepared(images: Array) -> NDArray[np.float32]:
    """The same as the model takes them, (n, 3, 64, 64)."""
    return prepare(list(images), qm.load_card(MODEL).preprocessing)


def file_of(image: Array, kind: str = "PNG") -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def tensor(module: Any, name: str, values: Array, **settings: Any) -> Any:
    """An input of a request; `module` is Triton's client for a protocol."""
    from tritonclient.utils import np_to_triton_dtype

    made = module.InferInput(name, list(values.shape), np_to_triton_dtype(values.dtype))
    made.set_data_from_numpy(values, **settings)
    return made


def files(*contents: bytes) -> Array:
    """The input of the image model."""
    values = np.empty((len(contents), 1), dtype=np.object_)
    values[:, 0] = contents
    return values


def ask(
    server: Served, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Send a request over HTTP; returns status, headers and body."""
    connection = http.client.HTTPConnection(server.http, timeout=60)
    try:
        connection.request(
            method, path, body, {name.replace("_", "-"): value for name, value in headers.items()}
        )
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def close(found: Array, expected: Array) -> bool:
    """Whether two outputs are the same but for the batches that they were computed in."""
    return found.shape == expected.shape and bool(
        np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    )


def form(*parts: tuple[str, bytes]) -> tuple[bytes, str]:
    """A form with files, as browsers send it."""
    head = 'Content-Disposition: form-data; name="file"; filename="{}"\r\nContent-Type: image/png\r\n\r\n'
    body = b"".join(b"--x\r\n" + head.format(name).encode() + data + b"\r\n" for name, data in parts)
    return body + b"--x--\r\n", "multipart/form-data; boundary=x"
