"""Plugin libraries that several tests use, each built once for all processes of a test run."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quartermap_deploy.native.build import BuildOptions, build_plugin, find_nvcc, launcher, plugin_sources

OBJECTS = Path(__file__).parents[1] / "build" / "plugin-objects"
"""Compiled files: those of the kernels are the same in several libraries, and from one test run to the next."""
HEADERS_VARIABLE = "QUARTERMAP_TENSORRT_HEADERS"
"""Include folders of TensorRT releases to compare with, separated as in PATH."""


def header_folders() -> list[Path]:
    """Return the folders with TensorRT's headers that this machine names; skip where there is none."""
    named = os.environ.get(HEADERS_VARIABLE, "").split(os.pathsep)
    named += [os.environ.get("TENSORRT_INCLUDE_DIR", "")]
    if root := os.environ.get("TENSORRT_ROOT"):
        named.append(f"{root}/include")
    found = [Path(name) for name in named if name and (Path(name) / "NvInferRuntime.h").is_file()]
    if not found:
        pytest.skip(f"no TensorRT headers: set TENSORRT_ROOT, or {HEADERS_VARIABLE} to include folders")
    return list(dict.fromkeys(found))


def require_compiler() -> None:
    """Skip where nothing can be compiled."""
    if shutil.which("cmake") is None:
        pytest.skip("no CMake")
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")


def cuda_include() -> Path:
    """Return the folder with CUDA's headers, which TensorRT's include; skip where there is none."""
    for place in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if place and (Path(place) / "include" / "cuda_runtime_api.h").is_file():
            return Path(place) / "include"
    pytest.skip("no CUDA headers, which TensorRT's include: set CUDA_HOME")


def once(shared: Path, name: str, make: Callable[[Path], object]) -> Path:
    """Make a folder once for all processes of a test run."""
    folder, lock = shared / name, shared / f"{name}.lock"
    try:
        lock.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 300
        while not (folder / ".done").exists():
            if (folder / ".failed").exists() or time.monotonic() > deadline:
                pytest.fail(f"{name} was not built by the process that began it")
            time.sleep(0.2)
        return folder
    folder.mkdir()
    try:
        make(folder)
    except BaseException:
        (folder / ".failed").touch()
        raise
    (folder / ".done").touch()
    return folder


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the folder that all processes of a test run share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def emulated_kernels(factory: pytest.TempPathFactory) -> Path:
    """Return the kernels' C interface with the kernels on the CPU."""
    require_compiler()
    options = BuildOptions(kernels_only=True, emulation=True, optimisation="-O1")
    folder = once(
        shared_folder(factory), "emulated-kernels", lambda path: build_plugin(path, options, cache=OBJECTS)
    )
    return folder / options.library


def emulated_plugin(factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the plugin, its kernels on the CPU, and the test host beside it."""
    require_compiler()
    return once(shared_folder(factory), "emulated-plugin", _with_host)


def compiled_plugin(factory: pytest.TempPathFactory) -> Path:
    """Return the plugin as nvcc makes it: machine code for 8.0, and PTX for every later GPU."""
    require_compiler()
    if find_nvcc() is None:
        pytest.skip("no nvcc")
    options = BuildOptions(cuda_architectures=("80",), optimisation="-O1")
    folder = once(
        shared_folder(factory), "compiled-plugin", lambda path: build_plugin(path, options, cache=OBJECTS)
    )
    return folder / options.library


def _with_host(folder: Path) -> None:
    import subprocess

    build = folder / "build"
    definitions = ["-DQUARTERMAP_EMULATION=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
    definitions += launcher(OBJECTS, folder / "events.txt")
    for command in (
        ["cmake", "-S", str(plugin_sources()), "-B", str(build), *definitions],
        ["cmake", "--build", str(build), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "warning" not in done.stdout + done.stderr
    for name in ("libquartermap_plugin.so", "quartermap_test_host"):
        shutil.copy(build / name, folder / name)
