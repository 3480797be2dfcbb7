"""What CMake and nvcc are told for the plugin, where they are looked for, and where the library goes."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quartermap_deploy.errors import MissingDependencyError
from quartermap_deploy.gpu import Gpu
from quartermap_deploy.native import build, check, cpu_build
from quartermap_deploy.native.build import BuildOptions, find_nvcc, important_lines, plugin_sources
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.native.seal import sealed


def test_what_cmake_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build, "_nvcc", lambda: "/cuda/nvcc")
    base = ["-DQUARTERMAP_TEST_HOST=OFF"]
    at_once = "-DCMAKE_CUDA_FLAGS=--threads=4"
    assert build._definitions(BuildOptions()) == [*base, "-DCMAKE_CUDA_COMPILER=/cuda/nvcc", at_once]
    assert at_once not in build._definitions(BuildOptions(cuda_architectures=("80",)))
    assert build._definitions(BuildOptions(kernels_only=True, emulation=True, optimisation="-O1")) == [
        *base,
        "-DQUARTERMAP_KERNELS_ONLY=ON",
        "-DQUARTERMAP_EMULATION=ON",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
        "-DCMAKE_CUDA_FLAGS_RELEASE=-O1",
    ]
    found = build._definitions(BuildOptions(cuda_architectures=("80", "90a", "120-real", "100f-virtual")))
    assert found[-1] == "-DCMAKE_CUDA_ARCHITECTURES=80;90a;120-real;100f-virtual"
    for name, words in (("79", "80 or newer, found 79"), ("8", "no CUDA architecture"), ("90b", "no CUDA")):
        with pytest.raises(PluginError, match=words):
            build._definitions(BuildOptions(cuda_architectures=(name,)))
    monkeypatch.setattr(build.shutil, "which", {"ninja": "/bin/ninja"}.get)
    assert build._definitions(BuildOptions())[1:3] == ["-G", "Ninja"]
    assert BuildOptions().library == "libquartermap_plugin.so"
    assert BuildOptions(kernels_only=True).library == "libquartermap_kernels.so"


def test_nvcc_is_looked_for_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {}
    for name in ("named", "path", "home/bin", "usual", "later"):
        (tmp_path / name).mkdir(parents=True)
        places[name] = tmp_path / name / "nvcc"
        places[name].touch()
    monkeypatch.setenv("CUDACXX", str(places["named"]))
    monkeypatch.setattr(build.shutil, "which", {"nvcc": str(places["path"])}.get)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(build, "NVCC_PLACES", (str(places["usual"]), str(places["later"])))
    for name in list(places):
        assert find_nvcc() == str(places[name])
        places[name].unlink()
    assert find_nvcc() is None
    places["home/bin"].touch()
    monkeypatch.delenv("CUDA_HOME")
    assert find_nvcc() is None
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "home"))
    assert find_nvcc() == str(places["home/bin"])


def test_a_plugin_is_configured_then_compiled_then_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is run, in its order, by commands that only take note; an error of either keeps the old library."""
    ran: list[list[str]] = []
    code = 0

    def run(command: list[str], say: Any) -> tuple[list[str], int]:
        ran.append(command)
        say("compiling")
        (Path(command[2]) / BuildOptions(kernels_only=True).library).write_bytes(b"new")
        return ["x.cpp:1: error: no"], code

    monkeypatch.setattr(build, "_cmake", lambda: "/bin/cmake")
    monkeypatch.setattr(build, "_nvcc", lambda: "/cuda/nvcc")
    monkeypatch.setattr(build, "plugin_sources", lambda: Path("/sources"))
    monkeypatch.setattr(build, "_configure", lambda command, say: ran.append(command))
    monkeypatch.setattr(build, "_run", run)
    said: list[str] = []
    options = BuildOptions(kernels_only=True, emulation=True)
    made = build.build_plugin(tmp_path / "out", options, on_output=said.append)
    assert (
        made == tmp_path / "out" / options.library
        and made.read_bytes() == sealed(b"new")
        and said == ["compiling"]
    )
    configured, compiled = ran
    assert configured[:3] == ["/bin/cmake", "-S", "/sources"] and configured[-2] == "-B"
    assert configured[3:-2] == ["-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *build._definitions(options)]
    folder, jobs = configured[-1], str(os.cpu_count() or 1)
    assert compiled == ["/bin/cmake", "--build", folder, "--target", "quartermap_plugin", "--parallel", jobs]
    assert not Path(folder).exists()
    code = 1
    made.write_bytes(b"old")
    with pytest.raises(PluginError, match=r"(?s)could not be compiled:\n.*x\.cpp:1: error: no"):
        build.build_plugin(tmp_path / "out", options)
    assert made.read_bytes() == b"old"
    # Without options it is the plugin for CUDA, which these commands did not make.
    code = 0
    with pytest.raises((PluginError, OSError)):
        build.build_plugin(tmp_path / "out")
    assert "-DCMAKE_CUDA_COMPILER=/cuda/nvcc" in ran[-2] and "-DQUARTERMAP_KERNELS_ONLY=ON" not in ran[-2]


def test_errors_of_a_registry_are_kept_but_for_that_of_the_driver() -> None:
    """Of TensorRT only the names of a logger are needed: a base class and its severities."""

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

    logger = check._recording_logger(SimpleNamespace(ILogger=ILogger))
    assert isinstance(logger, ILogger) and logger.errors == []
    for severity, message in enumerate(("internal", "error", "warning", "info")):
        logger.log(severity, message)
    logger.log(ILogger.ERROR, "the CUDA driver was not found")
    assert logger.errors == ["internal", "error"]


def test_cmake_is_looked_for_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", {"cmake": "/bin/cmake"}.get)
    assert build._cmake() == "/bin/cmake"
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"needs CMake 3\.24 or newer.*pip install cmake"):
        build._cmake()
    monkeypatch.setattr(build, "find_nvcc", lambda: "/cuda/nvcc")
    assert build._nvcc() == "/cuda/nvcc"
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(MissingDependencyError, match=r"needs nvcc .* set CUDA_HOME"):
        build._nvcc()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_sources_lie_in_the_package_or_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, beside = tmp_path / "real" / "quartermap_deploy", tmp_path / "real" / "plugins"
    (package / "native").mkdir(parents=True)
    (tmp_path / "linked").symlink_to(package, target_is_directory=True)
    monkeypatch.setattr(build, "__file__", str(tmp_path / "linked" / "native" / "build.py"))
    with pytest.raises(PluginError, match="brings no plugin sources; install it anew with pip"):
        plugin_sources()
    for folder in (beside, package / "_plugins"):
        folder.mkdir()
        with pytest.raises(PluginError) if folder == beside else contextlib.nullcontext():
            assert plugin_sources() == beside
        (folder / "CMakeLists.txt").touch()
        assert plugin_sources() == folder


def test_the_cpu_librarys_sources_are_all_of_its_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "plugins"
    for folder in ("kernels/include/quartermap", "kernels/cpu/deeper", "onnxruntime", "tensorrt"):
        (root / folder).mkdir(parents=True)
    monkeypatch.setattr(cpu_build, "plugin_sources", lambda: root)
    with pytest.raises(PluginError, match="brings no sources of the CPU library"):
        cpu_build.cpu_sources()
    head = root / "kernels/include/quartermap/cpu_scan.h"
    head.touch()
    with pytest.raises(PluginError, match="brings no sources of the CPU library"):
        cpu_build.cpu_sources()
    own = ["kernels/cpu/a.cpp", "kernels/cpu/b.h", "onnxruntime/c.cpp"]
    others = [
        "kernels/cpu/notes.md",
        "kernels/include/quartermap/other.h",
        "tensorrt/d.cpp",
        "onnxruntime/e.txt",
    ]
    for name in (*own, *others):
        (root / name).touch()
    names = [*own[:2], "kernels/include/quartermap/cpu_scan.h", own[2]]
    assert cpu_build.cpu_sources() == {name: root / name for name in names}
    assert list(cpu_build.cpu_sources()) == names
    head.unlink()
    with pytest.raises(PluginError, match="brings no sources of the CPU library"):
        cpu_build.cpu_sources()


def test_the_lines_around_the_first_error_are_shown_or_the_last_ones() -> None:
    lines = [str(number) for number in range(100)]
    lines[50], lines[60] = "a.cpp:3: error: no", "b.cpp: Error"
    shown = important_lines(lines).splitlines()
    assert shown[:3] == ["  48", "  49", "  a.cpp:3: error: no"] and len(shown) == 20
    assert important_lines(["CMake Error at x", "y"]) == "  CMake Error at x\n  y"
    assert important_lines([str(number) for number in range(30)], most=3) == "  27\n  28\n  29"
    assert important_lines(["no errors were found, terrors neither"]).strip().startswith("no errors")
    assert important_lines([]) == ""


def test_a_folder_that_can_be_written_stays_as_it_was(tmp_path: Path) -> None:
    build.require_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    build.require_writable(tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and not list((tmp_path / "kept").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(PluginError, match="is no folder"):
        build.require_writable(tmp_path / "file")
    with pytest.raises(PluginError, match="cannot write into"):
        build.require_writable(tmp_path / "file" / "below")


def test_a_library_is_put_whole_into_a_folder_that_is_made(tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(b"new")
    for _ in range(2):
        placed = build.place_library(tmp_path / "lib.so", tmp_path / "a" / "b")
        assert placed == tmp_path / "a" / "b" / "lib.so" and placed.read_bytes() == sealed(b"new")
        assert stat.S_IMODE(placed.stat().st_mode) == 0o755
        assert list(placed.parent.iterdir()) == [placed]
        placed.write_bytes(b"old")


@pytest.mark.skipif(sys.platform == "win32", reason="CMake is a script in this test")
def test_the_files_that_are_compiled_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "cmake"
    script.write_text(
        "#!/bin/sh\nfor last; do :; done\n"
        'if [ "$1" != --build ]; then echo "[{}, {}, {}]" > "$last/compile_commands.json"; exit; fi\n'
        'echo "[ 33%] Building CUDA object a.cu.o"; echo "[2/3] Building CXX object b.cpp.o"; echo "note: Building"\n'
        'echo "[3/4] Building CXX object c.cpp.o"; echo library > "$2/libquartermap_kernels.so"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    steps: list[tuple[int | None, list[int]]] = []

    class Recorder:
        @contextlib.contextmanager
        def step(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
            steps.append((total, []))
            yield steps[-1][1].append

    options = BuildOptions(kernels_only=True, emulation=True)
    made = build.build_plugin(tmp_path / "out", options, progress=Recorder())
    assert made.read_bytes() == sealed(b"library\n")
    assert steps == [(None, []), (3, [1, 1, 1])]


@pytest.mark.parametrize(
    ("capability", "expected"), [(None, "80"), ("8.9", "89"), ("12.0", "120"), ("7.5", "80")]
)
def test_the_plugin_is_built_for_the_gpu_that_is_there(
    capability: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_gpu", lambda: Gpu("a GPU", capability) if capability else None)
    assert build.usual_architectures() == (expected,)
