"""The kernels for CPUs, compiled in the ways that tests need, each once for all processes of a test run."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
from made_once import made_once

from quartermap_deploy.native.build import plugin_sources
from quartermap_deploy.native.cpu_build import CPU_LIBRARY, CpuBuildOptions, build_cpu_library, cache_name
from quartermap_deploy.native.cpu_library import find_cpu_library
from quartermap_deploy.scan.cpu import kernels

KERNELS = plugin_sources() / "kernels"
SHARED = ("contract", "cpu_norm", "cpu_scan", "division", "instruction_sets", "scratch", "threads")
AVX = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl")
NATIVE_TESTS = Path(__file__).parent / "native"
BUILT_VARIABLE = "QUARTERMAP_TEST_CPU_LIBRARY"


def remember_library() -> None:
    """Keep where this user's own library lies, if `make` built one, before tests get folders of their own."""
    found = find_cpu_library().library
    os.environ[BUILT_VARIABLE] = "" if found is None else str(found.path)


def compiler(name: str = "") -> str:
    """Return a C++ compiler; skip where there is none."""
    for candidate in [name] if name else [os.environ.get("CXX", ""), "g++", "clang++", "c++"]:
        if candidate and shutil.which(candidate):
            return candidate
    pytest.skip(f"no {name or 'C++ compiler'}")


def on_x86() -> bool:
    """Whether this is a 64-bit x86 processor."""
    return platform.machine().lower() in ("x86_64", "amd64")


BUILT_SETS = ["avx512", "avx2", "baseline"] if on_x86() else ["neon"]
FORMS = [*BUILT_SETS, "portable", "sixteen"]
"""Instruction sets, and two builds that a processor of any kind runs."""


def library_of(form: str) -> Path:
    """Return the library that has a form; which instruction set it uses is then to be chosen."""
    return library("all" if form in BUILT_SETS else form)


def compile_objects(
    folder: Path, cxx: str, kernels: Sequence[tuple[Path, Sequence[str]]], flags: Sequence[str] = ()
) -> list[Path]:
    """Compile the kernels, and return the objects.

    Args:
        folder: where they go.
        cxx: the compiler.
        kernels: files of instruction sets, each with flags of its own.
        flags: for all files.
    """
    common = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
    common += ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]
    common += ["-I", str(KERNELS / "include"), "-I", str(KERNELS / "cpu"), *flags]
    folder.mkdir(parents=True, exist_ok=True)
    files = [*kernels, *((KERNELS / "cpu" / f"{name}.cpp", ()) for name in SHARED)]

    def compiled(source: Path, own: Sequence[str]) -> Path:
        target = folder / f"{source.stem}.o"
        run([cxx, *common, *own, "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, *zip(*files, strict=True)))


def run(command: Sequence[str], seconds: float = 300) -> str:
    """Run a compiler and return what it says; warnings fail the test."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, " ".join(command) + "\n" + done.stderr[-3000:]
    assert "warning" not in done.stderr, done.stderr[-3000:]
    return done.stdout


def instruction_sets() -> tuple[list[tuple[Path, Sequence[str]]], list[str]]:
    """Return the kernels of this kind of processor, and the flags that say which there are."""
    kernels: list[tuple[Path, Sequence[str]]] = [(KERNELS / "cpu" / "baseline.cpp", ())]
    if not on_x86():
        return kernels, []
    wide = {"avx2": AVX, "avx512": AVX512}
    kernels += [(KERNELS / "cpu" / f"{name}.cpp", flags) for name, flags in wide.items()]
    return kernels, ["-DQUARTERMAP_WITH_AVX"]


def library(name: str) -> Path:
    """Return a library of the kernels.

    Args:
        name: "all": as users build it, with the operators for ONNX Runtime; "portable": arrays instead of vectors;
            "sixteen": the kernels alone, with 16 lanes of the compiler's vectors.
    """
    if name == "all" and (known := os.environ.get(BUILT_VARIABLE)):
        return Path(known)
    cxx = compiler()

    def make(path: Path) -> None:
        folder = path.with_suffix(".made")
        if name == "sixteen":
            kernels = [(NATIVE_TESTS / "sixteen_lanes.cpp", AVX if on_x86() else ())]
            objects = compile_objects(folder, cxx, kernels, ["-O2"])
            built = folder / path.name
            run([cxx, "-shared", *map(str, objects), "-o", str(built), "-pthread"])
        else:
            options = CpuBuildOptions(portable_vectors=name == "portable")
            built = build_cpu_library(folder, options)
        built.rename(path)

    return made_once(f"cpu_library_{name}.so", make)


@contextlib.contextmanager
def native_where_it_can_be() -> Iterator[None]:
    """Let PyTorch and ONNX Runtime have the native operators, where there is a library or a compiler.

    For tests of what is done with outputs and times: scans by PyTorch's own means take longer than everything else.
    """
    try:
        named = str(library("all"))
    except pytest.skip.Exception:
        named = "0"
    with mock.patch.dict(os.environ, QUARTERMAP_NATIVE=named):
        # A process looks for them once.
        kernels.cache_clear()
        try:
            yield
        finally:
            kernels.cache_clear()


def put_into_cache(library: Path, home: Path) -> Path:
    """Let a new home have a library in its cache, as if it had been built there; returns where it lies."""
    folder = home / "cache" / "native" / cache_name()
    for place in (folder.parents[1], folder.parent, folder):
        place.mkdir(mode=0o700, parents=True)
    return Path(shutil.copy(library, folder / CPU_LIBRARY))
