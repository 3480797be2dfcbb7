"""Real TensorRT for tests without a GPU: NVIDIA's Python bindings over the library of the lean runtime.

`make` puts both into build/tensorrt, a folder for each release that has a file in `tests/tensorrt_releases`. Lean is on
PyPI as a wheel, and has TensorRT's registry of plugins and its runtime; the bindings are those of the whole TensorRT,
whose library is not to be had there. They ask for three libraries: `open_bindings` lets lean answer for the first, and
a compiled stub, whose functions return NULL, for what lean has not: the builder and the parser.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cpu_builds
import pytest
from made_once import made_once

FOLDER_VARIABLE = "QUARTERMAP_REAL_TENSORRT"
"""The folder with the releases, if it is another than build/tensorrt."""
FOLDER = Path(__file__).parents[1] / "build" / "tensorrt"
OLDEST, TEN, ELEVEN = "10.7", "10.16", "11.4"
LEAN = (TEN, ELEVEN)
"""Releases whose library is there, and not the bindings alone."""
_OF_BUILDER = (
    "createInferBuilder_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
)
_OF_RUNTIME = ("createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL", "getPluginRegistry")


def require(release: str) -> Path:
    """Return the folder of a release; skip where it was not fetched."""
    if sys.platform != "linux":
        pytest.skip("TensorRT's libraries are opened under other names, which is for Linux")
    folder = Path(os.environ.get(FOLDER_VARIABLE) or FOLDER) / release
    if not (folder / "tensorrt_bindings").is_dir():
        pytest.skip(
            f"no TensorRT {release} in {folder}: `make` fetches it, where there is one for this machine"
        )
    return folder


def lean_library(release: str) -> Path:
    """Return the library of the lean runtime."""
    [found] = require(release).glob("tensorrt_lean_libs/libnvinfer_lean.so.*")
    return found


def stub(release: str) -> Path:
    """Return a library in the parser's place, with what lean has not; with everything where there is no lean."""
    names = [*_OF_BUILDER, *(() if release in LEAN else _OF_RUNTIME)]
    major = release.partition(".")[0]
    source = "".join(f"void* {name}(void) {{ return 0; }}\n" for name in names)
    compiler = cpu_builds.compiler()

    def make(path: Path) -> None:
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(path.with_suffix(".new"))]
        subprocess.run(
            [*command, f"-Wl,-soname,libnvonnxparser.so.{major}"], input=source, text=True, check=True
        )
        path.with_suffix(".new").rename(path)

    return made_once(f"stub-{release}.so", make)


def run(
    release: str, script: str, *arguments: object, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, where `tensorrt` is the real module of a release.

    A registry cannot be emptied, and a crash is to fail one test.
    """
    folder = require(release)
    lines = ["import real_tensorrt", f"real_tensorrt.open_bindings({str(folder)!r}, {str(stub(release))!r})"]
    tests = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [tests, str(Path(tests).parent), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, script]), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
    )


def read_api(release: str) -> dict[str, Any]:
    """Return the names of the real module of a release."""
    script = (
        "import json, tensorrt, tensorrt_names; print(json.dumps(tensorrt_names.api_of_module(tensorrt)))"
    )
    done = run(release, script)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def open_bindings(folder: str, stub: str) -> ModuleType:
    """Make `tensorrt` the real module of a release, in this process."""
    from quartermap_deploy.native.alias import give_alias

    ctypes.CDLL(stub)
    [parser] = [name for name in _names_of(stub) if name.startswith("libnvonnxparser.so.")]
    major = parser.rpartition(".")[2]
    library = parser
    for lean in Path(folder).glob("tensorrt_lean_libs/libnvinfer_lean.so.*"):
        ctypes.CDLL(str(lean))
        library = lean.name
    for name in ("nvinfer", "nvinfer_plugin"):
        give_alias(f"lib{name}.so.{major}", library)
    sys.path.insert(0, folder)
    import tensorrt_bindings

    sys.modules["tensorrt"] = tensorrt_bindings
    tensorrt_bindings.__name__ = "tensorrt"
    return tensorrt_bindings  # type: ignore[no-any-return]


def _names_of(library: str) -> list[str]:
    """The names in a library's table of texts; its own is among them."""
    return [text.decode() for text in Path(library).read_bytes().split(b"\0") if text.isascii() and text]
