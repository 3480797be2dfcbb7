"""A real Triton for tests, without a GPU: the core and the Python backend that the wheel nvidia-pytriton brings.

`make triton` puts it into build/triton. The wheel has no ONNX Runtime backend: triton_server/onnxruntime_backend.py
stands in for it. The Python backend runs the Python of the tests by its shared library, in an environment of links, as
NumPy has to be an older one there.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import onnxruntime
import PIL
import pytest
from helpers import REPOSITORY

INSTALLED = REPOSITORY / "build" / "triton"
BACKEND = REPOSITORY / "tests" / "triton_server" / "onnxruntime_backend.py"
STUB = "triton_python_backend_stub"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def require() -> tuple[Path, str]:
    """Return the folder of Triton, and that of Python's library; skip where one is not there."""
    if not (INSTALLED / ".installed").is_file():
        pytest.skip(
            f"no Triton in {INSTALLED}: `make triton` fetches it, for Linux on x86-64 and Python 3.10 to 3.12"
        )
    folder = python_library()
    if folder is None:
        pytest.skip(
            f"no libpython{VERSION}.so.1.0, which Triton's Python backend loads: install libpython{VERSION}"
        )
    return INSTALLED / "pytriton" / "tritonserver", folder


def python_library() -> str | None:
    """The folder with the shared library of this Python; empty if the system finds it, None if there is none."""
    name, folder = f"libpython{VERSION}.so.1.0", sysconfig.get_config_var("LIBDIR") or ""
    if (Path(folder) / name).is_file():
        return str(folder)
    return "" if ctypes.util.find_library(f"python{VERSION}") == name else None


def environment(folder: Path, pillow: bool) -> Path:
    """Make an environment that Triton's Python backend takes for its own, as it finds it first in PATH."""
    packages = folder / "lib" / f"python{VERSION}" / "site-packages"
    packages.mkdir(parents=True)
    (folder / "bin").mkdir()
    base = Path(sys.base_prefix) / "bin" / f"python{VERSION}"
    (folder / "bin" / "python3").symlink_to(base)
    (folder / "pyvenv.cfg").write_text(f"home = {base.parent}\ninclude-system-site-packages = false\n")
    linked = [*INSTALLED.glob("numpy*"), *_package(onnxruntime), *(_package(PIL) if pillow else ())]
    for path in linked:
        (packages / path.name).symlink_to(path)
    return folder


def _package(module: ModuleType) -> Iterable[Path]:
    """The folder of a package, and that of its libraries where it is there."""
    folder = Path(str(module.__file__)).parent
    yield folder
    yield from folder.parent.glob("pillow.libs" if module is PIL else f"{folder.name}.libs")


class Triton:
    """A Triton that runs.

    Attributes:
        process: its process.
        http: host and port.
        grpc: likewise.
    """

    def __init__(
        self, repositories: Iterable[Path], work: Path, *arguments: str, pillow: bool = True
    ) -> None:
        """Start it.

        Args:
            repositories: served together.
            work: an empty folder, for its log and its backends.
            arguments: more of `tritonserver`.
            pillow: whether its Python has Pillow.
        """
        server, library = require()
        backends = work / "backends"
        # Copies: Triton loads no library through a link that leaves its backend's folder.
        shutil.copytree(server / "backends" / "python", backends / "python")
        shutil.copy(server / "python_backend_stubs" / VERSION / STUB, backends / "python")
        (backends / "onnxruntime").mkdir()
        shutil.copy(BACKEND, backends / "onnxruntime" / "model.py")
        ports = _free_ports(2)
        self.http, self.grpc = (f"127.0.0.1:{port}" for port in ports)
        self._log = work / "log"
        command = [
            str(server / "bin" / "tritonserver"),
            *(f"--model-repository={path}" for path in repositories),
            f"--backend-directory={backends}",
            *("--http-address=127.0.0.1", f"--http-port={ports[0]}"),
            *("--grpc-address=127.0.0.1", f"--grpc-port={ports[1]}"),
            *("--allow-metrics=false", "--exit-timeout-secs=10", *arguments),
        ]
        made = environment(work / "environment", pillow)
        variables = {**os.environ, "PATH": f"{made / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        variables.pop("PYTHONDONTWRITEBYTECODE", None)
        variables["LD_LIBRARY_PATH"] = f"{INSTALLED / 'nvidia_pytriton.libs'}:{library}"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=variables
            )

    @property
    def log(self) -> str:
        """What it has said so far."""
        return self._log.read_text(errors="replace")

    def until(self, true: Callable[[], bool], what: str, seconds: float = 240) -> None:
        """Wait until something is true, while it runs."""
        deadline = time.monotonic() + seconds
        while not true():
            assert self.process.poll() is None, (
                f"Triton ended with {self.process.returncode}: {self.log[-3000:]}"
            )
            assert time.monotonic() < deadline, f"not {what} in {seconds:g} s: {self.log[-3000:]}"
            time.sleep(0.1)

    def ready(self) -> bool:
        """Whether it says that it is ready."""
        with contextlib.suppress(OSError):
            return bool(
                urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=10).status == 200
            )
        return False

    def stop(self) -> int:
        """Send SIGTERM, and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def running(
    repositories: Iterable[Path], work: Path, *arguments: str, pillow: bool = True
) -> Iterator[Triton]:
    """Run Triton while open, from when it is ready; it must end well."""
    triton = Triton(repositories, work, *arguments, pillow=pillow)
    try:
        triton.until(triton.ready, "ready")
        yield triton
        assert triton.stop() == 0, triton.log[-3000:]
    finally:
        if triton.process.poll() is None:
            triton.process.kill()
            triton.process.wait(30)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens at; Triton does not tell which it took."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(one.getsockname()[1]) for one in sockets]
