"""Native code's Python side by itself: file formats by hand-made heads, what compilers are told, what is compared."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quartermap_deploy.errors import MissingDependencyError, TrustError
from quartermap_deploy.gpu import Gpu
from quartermap_deploy.native import (
    build,
    check,
    cpu_build,
    cpu_kernels,
    cpu_library,
    cuda_library,
    library_format,
    object_cache,
    store,
)
from quartermap_deploy.native.build import BuildOptions, find_nvcc, important_lines, plugin_sources
from quartermap_deploy.native.contract import CONTRACT, differences
from quartermap_deploy.native.cpu_build import Compiler, CpuBuildOptions, find_compiler
from quartermap_deploy.native.cpu_kernels import CpuKernels, Sizes, make_scan
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.native.library import CPU, PLUGIN, check_bytes, inspect, served_tensorrt
from quartermap_deploy.native.library_format import FormatError, check_format
from quartermap_deploy.native.seal import SealError, check_seal, sealed

# File formats -----------------------------------------------------------------------------------------------------

X86, ARM = 62, 183


def elf(
    segments: list[tuple[int, int]],
    *,
    machine: int = X86,
    kind: int = 3,
    sections: tuple[int, int] = (0, 0),
    header: int = 56,
    order: int = 1,
) -> bytes:
    """The head of an ELF file: its segments (offset, bytes); where its section headers begin, and how many they are."""
    identity = b"\x7fELF\x02" + bytes([order]) + bytes(10)
    where, count = sections
    head = struct.pack(
        "<HHIQQQIHHHHHH", kind, machine, 1, 0, 64, where, 0, 64, header, len(segments), 64, count, 0
    )
    tables = b"".join(
        struct.pack("<IIQQQQQQ", 1, 5, offset, 0, 0, length, 0, 0)[:header] for offset, length in segments
    )
    return identity + head + tables


@pytest.fixture
def on_linux_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_format, "_HERE", library_format.ELF)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


@pytest.mark.usefixtures("on_linux_x86")
def test_an_elf_library_ends_where_its_last_table_or_segment_does() -> None:
    two = elf([(0, 100), (100, 200)])
    assert len(two) == 176
    check_format(two.ljust(300, b"\0"))
    with pytest.raises(FormatError, match="it has 299 bytes of 300"):
        check_format(two.ljust(299, b"\0"))
    check_format(elf([(0, 10), (0, 5)]))
    with pytest.raises(FormatError, match="it has 176 bytes of 501"):
        check_format(elf([(500, 1), (0, 5)]))
    # The headers of sections may lie behind everything.
    check_format(elf([(0, 10)], sections=(200, 2)).ljust(328, b"\0"))
    with pytest.raises(FormatError, match="it has 327 bytes of 328"):
        check_format(elf([(0, 10)], sections=(200, 2)).ljust(327, b"\0"))
    # So may those of segments, where the file is cut off within them.
    with pytest.raises(FormatError, match="it has 100 bytes of 176"):
        check_format(two[:100])
    # Without segments their headers' size says nothing.
    check_format(elf([]))
    check_format(elf([], header=0))


@pytest.mark.usefixtures("on_linux_x86")
def test_elf_files_that_are_no_library_for_here() -> None:
    for data, words, elsewhere in (
        (elf([], machine=ARM), "another kind of machine than this x86_64", True),
        (elf([], kind=2), "is no shared library", False),
        (elf([], order=2), "another kind of machine", True),
        (elf([(0, 1)], header=32), "has program headers of 32 bytes, expected 56", False),
        (elf([])[:63], "is no 64-bit ELF library", False),
        (b"\x7fELF\x01" + bytes(100), "is no 64-bit ELF library", False),
        (b"MZ" + bytes(100), "is no 64-bit ELF library", False),
    ):
        with pytest.raises(FormatError, match=words) as caught:
            check_format(data)
        assert caught.value.elsewhere is elsewhere


def test_machines_go_by_several_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_format, "_HERE", library_format.ELF)
    for name, fits in (("x86_64", X86), ("AMD64", X86), ("aarch64", ARM), ("arm64", ARM)):
        monkeypatch.setattr("platform.machine", lambda name=name: name)
        check_format(elf([], machine=fits))
        with pytest.raises(FormatError, match=f"than this {name}"):
            check_format(elf([], machine=X86 + ARM - fits))
    # Of a machine that is not known nothing can be said.
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    check_format(elf([], machine=243))


def mach_o(*commands: bytes, kind: int = 6, machine: int = 0x0100_000C) -> bytes:
    size = sum(map(len, commands))
    return struct.pack("<8I", 0xFEED_FACF, machine, 0, kind, len(commands), size, 0, 0) + b"".join(commands)


def segment(offset: int, length: int) -> bytes:
    return struct.pack("<II16s4Q4I", 0x19, 72, b"__TEXT", 0, 0, offset, length, 0, 0, 0, 0)


def test_a_library_for_macos_ends_where_its_last_segment_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_format, "_HERE", library_format.MACH_O)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    other = struct.pack(
        "<IIQQQQQQ", 0x1B, 56, 0, 0, 0, 0, 9_000, 9_000
    )  # no segment, whatever it holds there
    whole = mach_o(other, segment(0, 100), segment(100, 300))
    check_format(whole.ljust(400, b"\0"))
    with pytest.raises(FormatError, match="it has 399 bytes of 400"):
        check_format(whole.ljust(399, b"\0"))
    check_format(mach_o(segment(0, 1), kind=8))
    for data, words in (
        (mach_o(segment(0, 1), kind=2), "no shared library"),
        (mach_o(segment(0, 1), machine=0x0100_0007), "than this arm64"),
        (mach_o(struct.pack("<II", 0x1B, 4).ljust(64, b"\0")), "a load command of 4 bytes, expected 8"),
        (mach_o(segment(0, 1), segment(0, 1))[:140], "is cut short"),
    ):
        with pytest.raises(FormatError, match=words):
            check_format(data)
    check_format(mach_o(struct.pack("<II", 0x1B, 8), segment(0, 1)))


def pe(*sections: tuple[int, int], flags: int = 0x2022, optional: int = 16) -> bytes:
    header = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 72).ljust(12, b"\0") + b"PE\0\0"
    header += struct.pack("<HHIIIHH", 0x8664, len(sections), 0, 0, 0, optional, flags) + bytes(optional)
    tables = (struct.pack("<8sIIII16x", b".text", 0, 0, length, offset) for length, offset in sections)
    return header + b"".join(tables)


def test_a_library_for_windows_ends_where_its_last_section_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_format, "_HERE", library_format.PE)
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    whole = pe((100, 300), (7, 200))
    assert len(whole) == 72 + 24 + 16 + 80
    check_format(whole.ljust(400, b"\0"))
    with pytest.raises(FormatError, match="it has 399 bytes of 400"):
        check_format(whole.ljust(399, b"\0"))
    with pytest.raises(FormatError, match="no shared library"):
        check_format(pe((1, 1), flags=0x0022))
    with pytest.raises(FormatError, match="is cut short"):
        check_format(pe((1, 1), (1, 1))[:170])
    with pytest.raises(FormatError, match="is no 64-bit PE library"):
        check_format(pe((1, 1)).replace(b"PE\0\0", b"NE\0\0"))


@pytest.mark.usefixtures("on_linux_x86")
def test_a_library_is_ours_by_the_name_of_its_function() -> None:
    name = CPU.contract.encode()
    for before in (b"\0", b"\0_"):
        check_bytes(sealed(elf([]) + before + name + b"\0"), "it", CPU)
    for text in (b"\0" + name + b"2\0", b"x" + name + b"\0", b"\0" + PLUGIN.contract.encode() + b"\0"):
        with pytest.raises(PluginError, match="it is a library, but no CPU library of quartermap-deploy"):
            check_bytes(elf([]) + text, "it", CPU)
    with pytest.raises(
        PluginError, match="but no plugin of quartermap-deploy: it has no function quartermap_plugin"
    ):
        check_bytes(elf([]), "it")
    with pytest.raises(
        PluginError, match=r"it is no shared library; it is damaged or no library; build it here"
    ):
        check_bytes(elf([], kind=2), "it")
    with pytest.raises(PluginError, match=r"than this x86_64; build it here: quartermap plugin build"):
        check_bytes(elf([], machine=ARM), "it")


def test_files_that_are_none_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="is a folder; name the library in it"):
        inspect(tmp_path)
    with pytest.raises(PluginError, match=r"there is no CPU library .*; `quartermap native build` makes one"):
        inspect(tmp_path / "none.so", CPU)


def test_a_seal_is_broken_by_any_change() -> None:
    data = sealed(b"a library")
    check_seal(data, required=True)
    assert data.startswith(b"a library") and sealed(data) == data != sealed(b"a librarz")
    for place in range(9):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(SealError, match="is damaged"):
            check_seal(bytes(changed), required=False)
    for none in (b"", b"a library", data[:-1], data + b"\0"):
        check_seal(none, required=False)
        with pytest.raises(SealError, match="no checksum"):
            check_seal(none, required=True)


def test_a_plugin_may_be_without_a_seal_and_not_with_a_broken_one() -> None:
    library = elf([]) + b"\0" + PLUGIN.contract.encode() + b"\0"
    check_bytes(library, "it")
    check_bytes(sealed(library), "it")
    with pytest.raises(PluginError, match=r"it is damaged.*nothing of it was run.*plugin build"):
        check_bytes(b"\x7f" + sealed(library)[1:60] + b"\1" + sealed(library)[61:], "it")


# The plugin's build -----------------------------------------------------------------------------------------------


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


def compile_once(
    cache: Path, folder: Path, *more: str, identity: str = "same:same", code: int = 0
) -> list[str]:
    """Ask for an object of `folder`/kernels/scan.cu by a compiler that is a script; return what was noted."""
    compiler, object_file, events = folder / "compiler", folder / "scan.o", folder / "events"
    compiler.write_text(f'#!/bin/sh\nfor last; do :; done\ncat "$last" > {object_file}\nexit {code}\n')
    compiler.chmod(0o755)
    object_file.unlink(missing_ok=True)
    source = folder / "kernels" / "scan.cu"
    # The compiler's name is the same wherever it lies, as it is in a build.
    command = ["compiler", "-O3", f"-I{folder}", *more, "-MD", "-MT", str(object_file), "-c"]
    command += ["-o", str(object_file), str(source)]
    events.unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        assert object_cache.run(cache, identity, events, command) == code
    assert object_file.read_bytes() == source.read_bytes()
    return events.read_text(encoding="utf-8").splitlines()


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is a script in this test")
def test_an_object_is_compiled_once(tmp_path: Path) -> None:
    made, kept = ["begin scan.cu", "end scan.cu"], ["kept scan.cu"]
    cache, here, there = (tmp_path / name for name in ("cache", "here", "there"))
    for folder in (cache, here / "kernels", there / "kernels"):
        folder.mkdir(parents=True)
        if folder != cache:
            (folder / "scan.cu").write_text("one")
    assert compile_once(cache, here, code=3) == made and list(cache.iterdir()) == [], "a failure is not kept"
    assert compile_once(cache, here) == made
    assert compile_once(cache, here) == kept
    assert compile_once(cache, there) == kept, "wherever it lies"
    assert compile_once(cache, here, "-DMORE") == made
    assert compile_once(cache, here, identity="another:same") == made
    assert compile_once(cache, here, identity="same:another") == kept, "a header that kernels do not include"
    (here / "kernels" / "scan.cu").write_text("two")
    assert compile_once(cache, here) == made
    assert compile_once(cache, there) == kept
    assert sorted(path.suffix for path in cache.iterdir()) == [".o"] * 4


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is a script in this test")
def test_what_was_not_used_for_long_goes_first(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "middle", "old")):
        path = tmp_path / f"{name}.o"
        path.write_bytes(b"x" * 10)
        os.utime(path, (1000 - age, 1000 - age))
    object_cache.prune(tmp_path, 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["middle.o", "new.o"]
    object_cache.prune(tmp_path, 25)
    assert len(list(tmp_path.iterdir())) == 2


def test_other_commands_are_run_as_they_are(tmp_path: Path) -> None:
    events = tmp_path / "events"
    command = [sys.executable, "-c", "raise SystemExit(5)"]
    assert object_cache.source_of(command) is None
    assert object_cache.run(tmp_path, "same", events, command) == 5
    assert not events.exists() and list(tmp_path.iterdir()) == []


def test_a_header_or_a_flag_of_the_environment_is_another_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "plugin_sources", lambda: tmp_path)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.delenv("NVCC_APPEND_FLAGS", raising=False)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "a.h").write_text("one")
    (tmp_path / "kernels" / "b.h").write_text("one")

    def identity() -> tuple[str, str]:
        cuda, cxx = build.launcher(tmp_path / "cache", tmp_path / "events")
        assert cuda.startswith("-DCMAKE_CUDA_COMPILER_LAUNCHER=") and cuda.split("=")[1] == cxx.split("=")[1]
        kernels, others = cuda.split(";")[-2].split(":")
        return kernels, others

    found = [identity()]
    assert identity() == found[0]
    (tmp_path / "a.h").write_text("two")
    found.append(identity())
    assert found[0][0] == found[1][0], "kernels do not include it"
    (tmp_path / "kernels" / "b.h").write_text("two")
    found.append(identity())
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    found.append(identity())
    assert len({others for _, others in found}) == 4 and len({kernels for kernels, _ in found}) == 3


@pytest.mark.parametrize(
    ("capability", "expected"), [(None, "80"), ("8.9", "89"), ("12.0", "120"), ("7.5", "80")]
)
def test_the_plugin_is_built_for_the_gpu_that_is_there(
    capability: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_gpu", lambda: Gpu("a GPU", capability) if capability else None)
    assert build.usual_architectures() == (expected,)


# Contracts --------------------------------------------------------------------------------------------------------


def test_a_contract_differs_by_what_this_package_knows() -> None:
    same = CONTRACT.to_dict()
    assert differences({**same, "more": 1}) == []
    assert differences({**same, "kernels": 1}) == ["kernels: the library has 1, this package 4"]
    del same["element_types"]
    assert differences(same) == [
        "element_types: the library has None, this package ['float32', 'float16', 'bfloat16']"
    ]
    assert same["fields"] == [{"name": "directions", "type": "CHAR"}, {"name": "softplus", "type": "INT32"}]
    assert {entry["name"]: (entry["type"], entry["optional"]) for entry in same["inputs"]} == {
        "x": ("T", False),
        "dt": ("T", False),
        "B": ("T", False),
        "C": ("T", False),
        "A": ("float32", False),
        "D": ("float32", False),
        "dt_bias": ("float32", False),
        "dt_weight": ("T", True),
    }


def test_a_registry_has_to_list_the_plugin_with_its_fields() -> None:
    fields = (("directions", "CHAR"), ("softplus", "INT32"))
    good = check.Creator("SelectiveScan2D", "1", "quartermap", fields)
    other = check.Creator("SelectiveScan2D", "1", "quartermap", fields[:1])
    check._compare((other, good), Path("p.so"))
    with pytest.raises(PluginError, match="registers nothing; expected Creator"):
        check._compare((), Path("p.so"))
    with pytest.raises(PluginError, match=r"registers \[Creator"):
        check._compare((other,), Path("p.so"))


def test_a_plugin_library_is_reported_by_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    contract: dict[str, Any] = {"kernels": 1}
    both = {"getCreators": None, "setLoggerFinder": None}
    asked: list[Any] = []

    def checked(build_: dict[str, Any] | None, exported: Any, module: Any = None) -> check.PluginReport:
        own = dict(contract) if build_ is None else {**contract, "build": build_}
        monkeypatch.setattr(check, "load", lambda path: SimpleNamespace(**dict.fromkeys(exported)))
        monkeypatch.setattr(check, "describe", lambda library, path: own)
        monkeypatch.setattr(check, "differences", lambda found: [] if found == contract else ["other"])
        monkeypatch.setattr(check, "_first_module", lambda: module)
        return check.check_plugin(Path("p.so"))

    def registered(*given: Any) -> tuple[check.Creator, ...]:
        asked.append(given)
        return (check.Creator("SelectiveScan2D", "1", "quartermap", ()),)

    monkeypatch.setattr(check, "_registered", registered)
    monkeypatch.setattr(check, "_compare", lambda *given: asked.append(given))
    found = checked(None, both)
    assert found.to_dict() == {
        "path": "p.so",
        "contract": contract,
        "build": {},
        "registry": None,
        "creators": (),
        "note": "kernels only: this library holds no TensorRT plugin",
    }
    served = {"tensorrt": ["10"]}
    for exported in ((), ("getCreators",), ("setLoggerFinder",)):
        with pytest.raises(PluginError, match=r"p\.so does not export getCreators and setLoggerFinder"):
            checked(served, exported)
    found = checked(served, both)
    assert (found.build, found.registry, found.creators, found.note) == (
        served,
        None,
        (),
        check.WITHOUT_REGISTRY,
    )
    assert asked == []
    module = SimpleNamespace(__name__="tensorrt", __version__="10.9")
    found = checked(served, both, module)
    assert (found.contract, found.build, found.note) == (contract, served, None)
    assert found.registry == "tensorrt 10.9" and [item.name for item in found.creators] == ["SelectiveScan2D"]
    assert asked == [(module, Path("p.so")), (found.creators, Path("p.so"))]
    contract["kernels"] = 2
    monkeypatch.setattr(check, "describe", lambda library, path: {"kernels": 3})
    with pytest.raises(
        PluginError, match=r"(?s)does not fit this release.*quartermap plugin build\n  other$"
    ):
        check.check_plugin(Path("p.so"))


def test_which_tensorrt_a_library_serves() -> None:
    path = Path("p.so")
    assert served_tensorrt({}, path) == () == served_tensorrt({"tensorrt": []}, path)
    assert served_tensorrt({"tensorrt": ["10", "rtx"]}, path) == ("10", "rtx")
    for found in ("10", 10, [10], ["10", 11], {"10": 1}):
        with pytest.raises(PluginError, match=r"p\.so"):
            served_tensorrt({"tensorrt": found}, path)


def test_the_cuda_library_is_looked_for_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QUARTERMAP_NATIVE_CUDA", raising=False)
    none = "no CUDA library was built here: quartermap native build --cuda"
    assert cuda_library.find_cuda_library() == cuda_library.CudaSearch(None, none)
    for word in cpu_library.ON:
        monkeypatch.setenv("QUARTERMAP_NATIVE_CUDA", word)
        assert cuda_library.find_cuda_library() == cuda_library.CudaSearch(None, none)
    monkeypatch.setenv("QUARTERMAP_NATIVE_CUDA", "lib.so")
    words = "QUARTERMAP_NATIVE_CUDA is 'lib.so'; expected 0, 1, or the path of a library from / on"
    assert cuda_library.find_cuda_library() == cuda_library.CudaSearch(None, words, named=True)
    monkeypatch.setenv("QUARTERMAP_NATIVE_CUDA", str(tmp_path / "none.so"))
    found = cuda_library.find_cuda_library()
    assert found.library is None and str(tmp_path / "none.so") in found.summary
    whole = cuda_library.CudaLibrary(tmp_path / "a.so", "13.0", "90")
    monkeypatch.setattr(cuda_library, "load_cuda_library", lambda path: whole)
    assert cuda_library.find_cuda_library() == cuda_library.CudaSearch(
        whole, str(tmp_path / "a.so"), named=True
    )


@pytest.mark.skipif(sys.platform == "win32", reason="folders are private by their mode")
def test_a_cuda_library_in_a_cache_that_others_may_write_to_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QUARTERMAP_NATIVE_CUDA", raising=False)
    loaded: list[Path] = []

    def load_cuda_library(path: Path) -> cuda_library.CudaLibrary:
        loaded.append(path)
        return cuda_library.CudaLibrary(path, "13.0", "90")

    monkeypatch.setattr(cuda_library, "load_cuda_library", load_cuda_library)
    kept = cuda_library._cached()
    kept.parent.mkdir(parents=True, mode=0o700)
    kept.touch()
    kept.parent.chmod(0o777)
    found = cuda_library.find_cuda_library()
    assert found.library is None and "others may write to" in found.summary and not loaded
    assert not found.named and found.warning is None
    kept.parent.chmod(0o700)
    found = cuda_library.find_cuda_library()
    assert found.library is not None and loaded == [kept] and found.warning is None
    assert found.to_dict() == {
        "library": {"path": str(kept), "cuda": "13.0", "architectures": "90"},
        "summary": str(kept),
    }
    # Where the environment names a library, its folder is for whoever named it to look after.
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("QUARTERMAP_NATIVE_CUDA", str(tmp_path / "open" / "own.so"))
    found = cuda_library.find_cuda_library()
    assert found.library is not None and found.named and loaded == [kept, tmp_path / "open" / "own.so"]


def test_who_names_a_cuda_library_is_told_why_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> cuda_library.CudaLibrary:
        raise PluginError(f"no\n  {path}")

    monkeypatch.setattr(cuda_library, "load_cuda_library", refused)
    monkeypatch.setenv("QUARTERMAP_NATIVE_CUDA", "/own.so")
    found = cuda_library.find_cuda_library()
    assert found == cuda_library.CudaSearch(None, "no /own.so", named=True)
    assert found.warning == "no /own.so; it runs without it"
    assert found.to_dict() == {"library": None, "summary": "no /own.so"}
    for word in (*cuda_library.OFF, "Off", "FALSE"):
        monkeypatch.setenv("QUARTERMAP_NATIVE_CUDA", word)
        found = cuda_library.find_cuda_library()
        assert found == cuda_library.CudaSearch(
            None, f"the CUDA library is turned off by QUARTERMAP_NATIVE_CUDA={word}"
        )
        assert found.warning is None


def test_a_cuda_library_is_taken_that_fits_this_release_and_was_made_for_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(build_: dict[str, Any] | None, *wrong: str, exported: str = "RegisterCustomOps") -> Any:
        contract: dict[str, Any] = {"kernels": 1} if build_ is None else {"kernels": 1, "build": build_}
        monkeypatch.setattr(cuda_library, "load", lambda path, kind: SimpleNamespace(**{exported: None}))
        monkeypatch.setattr(cuda_library, "describe", lambda library, path, kind: contract)
        monkeypatch.setattr(
            cuda_library, "differences", lambda found: list(wrong) if found == {"kernels": 1} else ["build"]
        )
        return cuda_library.load_cuda_library(Path("/a.so"))

    assert loaded({"cuda": "13.0", "architectures": "80,90"}) == cuda_library.CudaLibrary(
        Path("/a.so"), "13.0", "80,90"
    )
    with pytest.raises(
        PluginError, match=r"^/a\.so holds kernels or a TensorRT plugin, and no operator of ONNX"
    ):
        loaded({"cuda": "13.0"}, exported="getCreators")
    with pytest.raises(PluginError, match=r"(?s)/a\.so does not fit this release.*--cuda\n  one\n  two$"):
        loaded({"cuda": "13.0"}, "one", "two")
    for build_ in (None, {}, {"cuda": None}, {"architectures": "80"}):
        with pytest.raises(
            PluginError, match=r"/a\.so runs its kernels on the CPU, which is for tests alone"
        ):
            loaded(build_)


@pytest.mark.skipif(sys.platform == "win32", reason="folders are private by their mode")
def test_the_cuda_library_is_built_as_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
    given: list[Any] = []

    def built(output: Path, options: BuildOptions, **more: Any) -> Path:
        given.append((options, more))
        output.mkdir(exist_ok=True)
        (output / "made.so").write_bytes(b"library")
        return output / "made.so"

    monkeypatch.setattr(cuda_library, "build_plugin", built)
    more = {"progress": object(), "on_output": print}
    made = cuda_library.build_cuda_library(tmp_path / "out", ("80", "90"), **more)  # type: ignore[arg-type]
    assert made == tmp_path / "out" / "made.so"
    kept = cuda_library.build_cuda_library(None, ("120",), **more)  # type: ignore[arg-type]
    assert kept.read_bytes() == b"library" and kept == cuda_library._cached()
    assert kept.is_relative_to(tmp_path / "home") and stat.S_IMODE(kept.stat().st_mode) == 0o700
    for folder in (kept.parent, kept.parents[1], kept.parents[2]):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    options = [BuildOptions(onnxruntime=True, cuda_architectures=names) for names in (("80", "90"), ("120",))]
    assert given == [(each, more) for each in options]


def test_words_that_turn_native_code_off_and_on() -> None:
    assert set(cpu_library.OFF) == {"0", "off", "no", "false"}
    assert set(cpu_library.ON) == {"", "1", "on", "yes", "true"}


def test_the_library_reads_the_instruction_set_from_the_variable_that_is_shown() -> None:
    text = (plugin_sources() / "kernels/cpu/instruction_sets.cpp").read_text(encoding="utf-8")
    assert f'std::getenv("{cpu_library.INSTRUCTION_SET_VARIABLE}")' in text


def test_the_first_cpu_library_that_fits_is_taken_and_the_others_have_their_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which libraries fit is set here; how often they were asked for shows what is kept."""
    fitting: set[str] = set()
    asked: list[tuple[str, str]] = []

    def load_cpu_library(path: Path, origin: Any) -> cpu_library.CpuLibrary:
        asked.append((path.name, origin))
        if path.name == "set.so":
            raise cpu_library._InstructionSetError("no such instructions")
        if path.name not in fitting:
            raise PluginError(f"{path.name}\n  does not fit")
        return cpu_library.CpuLibrary(path, {"version": 1}, "wide", origin)

    places = [("QUARTERMAP_NATIVE", tmp_path / "own.so"), ("built here", tmp_path / "built.so")]
    monkeypatch.setattr(cpu_library, "load_cpu_library", load_cpu_library)
    monkeypatch.setattr(cpu_library, "_places", lambda refused: iter(places))
    monkeypatch.setenv("QUARTERMAP_NATIVE", str(tmp_path / "own.so"))
    monkeypatch.delenv("QUARTERMAP_INSTRUCTION_SET", raising=False)
    cpu_library._choose.cache_clear()
    reasons = {name: (str(tmp_path / name), f"{name}\n  does not fit") for name in ("own.so", "built.so")}
    found = cpu_library.find_cpu_library()
    assert found == cpu_library.CpuSearch(
        None, (reasons["own.so"], reasons["built.so"]), "none fits: own.so does not fit"
    )
    assert found.warning == "own.so does not fit; built.so does not fit; the portable form runs"
    assert cpu_library.named_and_passed_over(found)
    assert found.to_dict() == {
        "library": None,
        "refused": [{"place": place, "reason": reason} for place, reason in found.refused],
        "summary": found.summary,
    }
    assert asked == [("own.so", "QUARTERMAP_NATIVE"), ("built.so", "built here")]
    assert cpu_library.find_cpu_library() is found and len(asked) == 2
    # A library that changes, and another instruction set, are looked at anew.
    fitting.add("built.so")
    (tmp_path / "built.so").touch()
    found = cpu_library.find_cpu_library()
    assert found.library == cpu_library.CpuLibrary(
        tmp_path / "built.so", {"version": 1}, "wide", "built here"
    )
    assert found.refused == (reasons["own.so"],) and len(asked) == 4
    assert found.summary == f"{tmp_path / 'built.so'} (built here, wide)"
    assert found.warning == f"own.so does not fit; {tmp_path / 'built.so'} is used"
    assert found.library is not None and found.to_dict()["library"] == {
        "path": str(tmp_path / "built.so"),
        "contract": {"version": 1},
        "instruction_set": "wide",
        "origin": "built here",
    }
    monkeypatch.setenv("QUARTERMAP_INSTRUCTION_SET", "narrow")
    fitting.add("own.so")
    found = cpu_library.find_cpu_library()
    assert found.library is not None and found.library.origin == "QUARTERMAP_NATIVE" and len(asked) == 5
    assert found.refused == () and found.warning is None and not cpu_library.named_and_passed_over(found)
    # What holds for whichever library is taken is said once.
    places[:] = [("wheel", tmp_path / "set.so"), ("built here", tmp_path / "lower" / "set.so")]
    found = cpu_library.find_cpu_library()
    assert found.refused == (("QUARTERMAP_INSTRUCTION_SET", "no such instructions"),)
    assert not cpu_library.named_and_passed_over(found)
    places.clear()
    assert cpu_library.find_cpu_library() == cpu_library.CpuSearch(
        None, (), f"none was built: {cpu_library.BUILD}"
    )
    for word in (*cpu_library.OFF, "OFF"):
        monkeypatch.setenv("QUARTERMAP_NATIVE", word)
        found = cpu_library.find_cpu_library()
        assert found == cpu_library.CpuSearch(None, (), f"turned off by QUARTERMAP_NATIVE={word}")

    def broken(refused: Any) -> Iterator[Any]:
        yield "wheel", tmp_path / "own.so"
        raise PluginError("others may write")

    # Without the cache there are still the other places.
    monkeypatch.setenv("QUARTERMAP_NATIVE", "1")
    monkeypatch.setattr(cpu_library, "_places", broken)
    found = cpu_library.find_cpu_library()
    assert found.library is not None and found.library.origin == "wheel"
    assert found.refused == (("the cache of libraries built here", "others may write"),)
    cpu_library._choose.cache_clear()


def test_a_cpu_library_has_to_be_of_this_release_and_to_have_the_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contract = {"instruction_sets": ["avx512", "baseline"]}
    wrong: list[str] = []
    chosen = "baseline"
    monkeypatch.setattr(cpu_library, "load", lambda path, kind: (path, kind))
    monkeypatch.setattr(cpu_library, "describe", lambda library, path, kind: contract)
    monkeypatch.setattr(cpu_library, "_differences", lambda found: wrong)
    monkeypatch.setattr(cpu_library, "CpuKernels", lambda library: SimpleNamespace(instruction_set=chosen))
    path = Path("/a.so")
    found = cpu_library.load_cpu_library(path)
    assert found == cpu_library.CpuLibrary(path, contract, "baseline", "named")
    assert cpu_library.load_cpu_library(path, "wheel").origin == "wheel"
    wrong[:] = ["one", "two"]
    with pytest.raises(PluginError, match=r"(?s)^the CPU library /a\.so does not fit.*build\n  one\n  two$"):
        cpu_library.load_cpu_library(path)
    wrong.clear()
    chosen = ""
    for named, words in (
        ("avx512", "this processor lacks avx512, which QUARTERMAP_INSTRUCTION_SET asks for"),
        ("sse", "QUARTERMAP_INSTRUCTION_SET is 'sse'; expected one of avx512, baseline$"),
    ):
        monkeypatch.setenv("QUARTERMAP_INSTRUCTION_SET", named)
        with pytest.raises(cpu_library._InstructionSetError, match=words):
            cpu_library.load_cpu_library(path)


def test_cpu_libraries_are_tried_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "quartermap_deploy"
    (package / "_native").mkdir(parents=True)
    monkeypatch.setattr(cpu_library, "__file__", str(package / "native" / "cpu_library.py"))
    monkeypatch.setattr(cpu_library, "built_libraries", lambda: [tmp_path / "a", tmp_path / "b"])
    built = [("built here", tmp_path / "a"), ("built here", tmp_path / "b")]
    carried = package / "_native" / cpu_build.CPU_LIBRARY

    def places(named: str) -> tuple[list[Any], list[tuple[str, str]]]:
        refused: list[tuple[str, str]] = []
        monkeypatch.setenv("QUARTERMAP_NATIVE", named)
        return list(cpu_library._places(refused)), refused

    assert places("") == (built, []) == places("1")
    assert places("/own.so") == ([("QUARTERMAP_NATIVE", Path("/own.so")), *built], [])
    words = "QUARTERMAP_NATIVE is 'own.so'; expected 0, 1, or the path of a library from / on"
    assert places("own.so") == (built, [("QUARTERMAP_NATIVE", words)])
    carried.touch()
    assert places("/own.so")[0] == [("QUARTERMAP_NATIVE", Path("/own.so")), ("wheel", carried), *built]
    os.utime(carried, ns=(5, 7))
    assert cpu_library._changed(carried) == 7 and cpu_library._changed(tmp_path / "none") == 0


def test_the_cpu_librarys_contract_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    header = (plugin_sources() / "kernels/include/quartermap/cpu_scan.h").read_text(encoding="utf-8")
    (version,) = re.findall(r"#define QUARTERMAP_CPU_SCAN_VERSION (\d+)", header)
    monkeypatch.setattr(cpu_library, "sources_hash", lambda: "0123456789" * 6)
    same: dict[str, Any] = {
        "library": "quartermap_cpu",
        "version": int(version),
        "release": cpu_library.__version__,
        "sources": "0123456789" * 6,
        "instruction_sets": ["baseline"],
    }
    assert cpu_library._differences(same) == []
    assert cpu_library._differences({**same, "version": 99}) == [
        f"version: the library has 99, this package {cpu_library.INTERFACE}"
    ]
    assert cpu_library._differences({**same, "sources": "f" * 64}) == [
        "sources: the library has 'fffffffffffffff…', this package '012345678901234…'"
    ]
    assert cpu_library._differences({**same, "instruction_sets": "avx2"}) == [
        "instruction_sets: the library has none"
    ]

    def none() -> str:
        raise PluginError("no sources")

    # Where the sources were taken out of the installation, they cannot be compared.
    monkeypatch.setattr(cpu_library, "sources_hash", none)
    assert cpu_library._differences({**same, "sources": "f" * 64}) == []
    assert cpu_library._short("x" * 37) == repr("x" * 37) and "…" in cpu_library._short("x" * 38)


# The CPU library's build ------------------------------------------------------------------------------------------


def test_what_compilers_are_told() -> None:
    here = Compiler(("g++",), "g++ 13", "x86_64-linux-gnu")
    arm = Compiler(("g++",), "g++ 13", "aarch64-linux-gnu")
    amd = Compiler(("clang++",), "clang 17", "amd64-unknown-freebsd")
    assert here.for_x86 and amd.for_x86 and not arm.for_x86
    assert "-DQUARTERMAP_WITH_AVX" in cpu_build._flags(here, CpuBuildOptions())
    assert "-DQUARTERMAP_WITH_AVX" not in cpu_build._flags(arm, CpuBuildOptions())
    portable = cpu_build._flags(here, CpuBuildOptions(portable_vectors=True, flags=("-g",)))
    assert "-DQUARTERMAP_PORTABLE_VECTORS" in portable and "-DQUARTERMAP_WITH_AVX" not in portable
    assert portable[-1] == "-g" and "-O3" in portable and "-std=c++17" in portable
    assert f'-DQUARTERMAP_SOURCES="{cpu_build.sources_hash()}"' in portable
    assert CpuBuildOptions(compiler="clang++").usual
    assert not CpuBuildOptions(portable_vectors=True).usual and not CpuBuildOptions(flags=("-g",)).usual


def test_what_is_built_in_an_unusual_way_has_a_name_that_is_not_looked_for() -> None:
    compiler = Compiler(("g++",), "g++ 13", "x86_64-linux-gnu")
    usual = cpu_build._cache_name(compiler, CpuBuildOptions())
    prefix = f"{sys.platform}-{platform.machine().lower()}-{cpu_build.sources_hash()[:16]}"
    assert usual.startswith(f"{prefix}-") and len(usual) == len(prefix) + 17
    assert cpu_build._cache_name(compiler, CpuBuildOptions(flags=("-g",))).startswith(f"test-{prefix}-")
    others = (
        Compiler(("g++",), "g++ 14", "x86_64-linux-gnu"),
        Compiler(("g++-13",), "g++ 13", "x86_64-linux-gnu"),
        Compiler(("g++",), "g++ 13", "x86_64-linux-musl"),
    )
    assert len({usual, *(cpu_build._cache_name(other, CpuBuildOptions()) for other in others)}) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="folders are private by their mode")
def test_a_cpu_library_is_built_as_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that only takes note: where the library goes, when it is built anew, and what is not kept."""
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
    made = elf([])
    given: list[tuple[Compiler, CpuBuildOptions]] = []

    def find(named: str | None) -> Compiler:
        return Compiler((named or "c++",), "c++ 1.0", "x86_64-linux-gnu")

    def compile_(compiler: Compiler, options: CpuBuildOptions, folder: Path) -> list[Path]:
        given.append((compiler, options))
        return [folder / "a.o"]

    def link(compiler: Compiler, objects: list[Path], result: Path) -> bytes:
        assert objects == [result.parent / "a.o"] and result.name == cpu_build.CPU_LIBRARY
        return made

    monkeypatch.setattr(library_format, "_HERE", library_format.ELF)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(cpu_build, "find_compiler", find)
    monkeypatch.setattr(cpu_build, "_compile", compile_)
    monkeypatch.setattr(cpu_build, "_link", link)
    kept = cpu_build.build_cpu_library()
    name = cpu_build._cache_name(find(None), CpuBuildOptions())
    assert kept == tmp_path / "home" / "cache" / "native" / name / cpu_build.CPU_LIBRARY
    assert cpu_build.cache_name() == name and kept.read_bytes() == sealed(made)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700 and cpu_build.built_libraries() == [kept]
    assert given == [(find(None), CpuBuildOptions())]
    assert cpu_build.build_cpu_library() == kept and len(given) == 1
    # One that was damaged is built again.
    kept.write_bytes(sealed(made)[:-1])
    assert not cpu_build.is_whole(kept) and not cpu_build.is_whole(tmp_path / "none")
    assert cpu_build.build_cpu_library() == kept and len(given) == 2 and cpu_build.is_whole(kept)
    # Other options, by name or in a folder, are those that are compiled with.
    options = CpuBuildOptions(compiler="mine", flags=("-g",))
    other = cpu_build.build_cpu_library(options=options)
    assert other.parent.name == cpu_build.cache_name(options) != name
    out = tmp_path / "out" / "deeper"
    assert cpu_build.build_cpu_library(out, options) == out / cpu_build.CPU_LIBRARY
    assert given[2:] == [(find("mine"), options)] * 2
    assert stat.S_IMODE((out / cpu_build.CPU_LIBRARY).stat().st_mode) == 0o755
    assert cpu_build.build_cpu_library(out, options).read_bytes() == sealed(made) and len(given) == 5
    # For another machine it is not kept where libraries are looked for, and may go elsewhere.
    made = elf([], machine=ARM)
    kept.unlink()
    with pytest.raises(
        PluginError, match=r"what c\+\+ 1\.0 made .*, so it is not kept; name another compiler"
    ):
        cpu_build.build_cpu_library()
    assert not kept.exists()
    assert cpu_build.build_cpu_library(out).read_bytes() == sealed(made)
    (tmp_path / "file").touch()
    count = len(given)
    with pytest.raises(PluginError, match="is no folder"):
        cpu_build.build_cpu_library(tmp_path / "file")
    assert len(given) == count


def fake_compiler(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="compilers here are shell scripts")
def test_compilers_are_asked_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = 'case "$*" in *-dumpmachine) echo x86_64-linux-gnu;; *) echo "$0 1.0"; echo more;; esac'
    for name in ("c++", "g++", "mine"):
        fake_compiler(tmp_path / name, answer)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)

    def found(named: str | None = None) -> str:
        compiler = find_compiler(named)
        assert compiler.version.endswith(" 1.0") and compiler.target == "x86_64-linux-gnu"
        return " ".join(compiler.command).replace(f"{tmp_path}/", "")

    assert found() == "c++"
    monkeypatch.setenv("CXX", "mine -m64")
    assert found() == "mine -m64" and found("g++ -v") == "g++ -v"
    monkeypatch.setenv("CXX", "  ")
    assert found() == "c++"
    (tmp_path / "c++").unlink()
    assert found() == "g++"
    with pytest.raises(MissingDependencyError, match="there is no compiler none, which the environment"):
        find_compiler("none")
    with pytest.raises(MissingDependencyError, match="is no command"):
        find_compiler("'g++")
    fake_compiler(tmp_path / "mine", "echo sorry >&2; exit 3")
    with pytest.raises(MissingDependencyError, match=r"asked for --version, it says 'sorry'"):
        find_compiler("mine")
    fake_compiler(tmp_path / "mine", "exit 0")
    with pytest.raises(MissingDependencyError, match=r"it says 'nothing'"):
        find_compiler("mine")


@pytest.mark.skipif(sys.platform == "win32", reason="commands here are shell scripts")
def test_a_compiler_that_fails_says_why(tmp_path: Path) -> None:
    assert cpu_build._run(["true"]) is None
    shown = cpu_build._run([str(fake_compiler(tmp_path / "a", "echo first; echo 'x: error: y' >&2; exit 1"))])
    assert shown == "  first\n  x: error: y"
    assert cpu_build._run([str(fake_compiler(tmp_path / "b", "exit 7"))]) == "  it ended with code 7"
    assert "No such file" in (cpu_build._run([str(tmp_path / "none")]) or "")


def test_libraries_in_the_cache_are_listed_the_newest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
    assert cpu_build.every_built() == [] == cpu_build.built_libraries()
    folder = cpu_build.built_folder()
    folder.mkdir(parents=True, mode=0o700)
    prefix = cpu_build._prefix()
    names = {f"{prefix}-a": 100, f"{prefix}-b": 300, "linux-x86_64-other-c": 200, f"test-{prefix}-d": 400}
    for name, changed in names.items():
        (folder / name).mkdir(mode=0o700)
        library = folder / name / cpu_build.CPU_LIBRARY
        library.touch()
        os.utime(library, (changed, changed))
    listed = [(library.path.parent.name, library.fits) for library in cpu_build.every_built()]
    assert listed == [
        (f"test-{prefix}-d", False),
        (f"{prefix}-b", True),
        ("linux-x86_64-other-c", False),
        (f"{prefix}-a", True),
    ]
    assert [path.parent.name for path in cpu_build.built_libraries()] == [f"{prefix}-b", f"{prefix}-a"]
    assert cpu_build.every_built()[1].to_dict() == {
        "path": str(folder / f"{prefix}-b" / cpu_build.CPU_LIBRARY),
        "fits": True,
        "whole": False,
        "built": "1970-01-01T00:05:00+00:00",
    }


# The store of plugins ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="folders are private by their mode")
def test_libraries_in_the_store_are_found_by_hash_and_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
    assert (
        store.stored_libraries() == []
        and store.newest_built() is None
        and store.find_stored("0" * 64) is None
    )

    def added(data: bytes, how: Any, year: int) -> store.StoredLibrary:
        made = store.add_library(data, "lib.so", how, "somewhere")
        assert made.path.read_bytes() == data and made.path.stat().st_mode & 0o777 == 0o700
        assert made.sha256 == hashlib.sha256(data).hexdigest() == made.path.parent.name
        written = json.loads((made.path.parent / store.ORIGIN_FILE).read_text())
        assert written == {"how": how, "origin": "somewhere", "added": made.added}
        (made.path.parent / store.ORIGIN_FILE).write_text(json.dumps({**written, "added": f"{year}-01-01"}))
        return replace(made, added=f"{year}-01-01")

    middle = added(b"middle", store.BUILT, 2020)
    oldest = added(b"oldest", store.BUILT, 2010)
    newest = added(b"newest", store.INSTALLED, 2030)
    kernels = added(b"kernels", store.KERNELS, 2025)
    same = added(b"same", store.INSTALLED, 2030)
    assert store.stored_libraries() == [
        *(oldest, middle, kernels),
        *sorted((newest, same), key=lambda library: library.sha256),
    ]
    # Only one with the plugin that was built here serves whoever asks for none by name.
    assert store.newest_built() == middle.path
    assert store.find_stored(kernels.sha256) == kernels.path and store.find_stored("0" * 64) is None
    assert kernels.to_dict()["path"] == str(kernels.path)
    # What was changed, or is no library, is passed over.
    newest.path.write_bytes(b"other")
    (same.path.parent / store.ORIGIN_FILE).write_text('{"how": "built"}')
    (tmp_path / "home" / "plugins" / "notes").mkdir()
    assert store.stored_libraries() == [oldest, middle, kernels] and store.find_stored(newest.sha256) is None
    for sha256 in (
        "",
        "g" * 64,
        middle.sha256 + "0",
        middle.sha256[: store.SHORTEST_HASH - 1],
        middle.sha256.upper(),
    ):
        with pytest.raises(PluginError, match=f"is no hash of a library; give {store.SHORTEST_HASH} letters"):
            store.remove_library(sha256)
    for sha256 in ("0" * 64, newest.sha256):
        with pytest.raises(
            PluginError, match=f"no libraries in the store have a hash that begins with {sha256}"
        ):
            store.remove_library(sha256)
    assert store.remove_library(middle.sha256[: store.SHORTEST_HASH]) == middle
    assert not middle.path.parent.exists() and store.newest_built() == oldest.path
    assert store.remove_library(oldest.sha256) == oldest and store.stored_libraries() == [kernels]
    assert store.newest_built() is None
    # One that is there already is described anew, and no draft is left.
    again = store.add_library(b"kernels", "lib.so", store.BUILT, "elsewhere")
    assert store.stored_libraries() == [again] and again.origin == "elsewhere"
    assert not [path for path in (tmp_path / "home" / "plugins").iterdir() if path.name.startswith(".")]


def test_who_has_no_home_has_no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (store, cpu_build, cpu_library, cuda_library):
        monkeypatch.setattr(module, "own_folder", lambda kind: None)
    assert store.stored_libraries() == [] and store.newest_built() is None
    for ask in (store.store_folder, store.open_store, cpu_build.built_folder, cuda_library._cached):
        with pytest.raises(TrustError, match="this user has no home"):
            ask()
    monkeypatch.delenv("QUARTERMAP_NATIVE", raising=False)
    assert not [origin for origin, _ in cpu_library._places([]) if origin == "built here"]


@pytest.mark.skipif(sys.platform == "win32", reason="folders are private by their mode")
def test_a_store_that_others_may_write_to_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
    store.add_library(b"one", "lib.so", store.BUILT, "here")
    folder = tmp_path / "home" / "plugins"
    folder.chmod(0o777)
    for ask in (store.stored_libraries, store.newest_built, store.open_store):
        with pytest.raises(TrustError, match="others may write to"):
            ask()
    folder.chmod(0o700)
    assert len(store.stored_libraries()) == 1
    # Neither links nor folders with two libraries are libraries of the store.
    (path,) = (library.path for library in store.stored_libraries())
    (path.parent / "second.so").touch()
    assert store.stored_libraries() == []
    (path.parent / "second.so").unlink()
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    assert store.stored_libraries() == []


# The kernels' structures ------------------------------------------------------------------------------------------


def test_a_scan_is_told_to_the_kernels() -> None:
    scan = make_scan(
        Sizes(2, 3, 5, 7, 11, 13, 17), ("row", "column_reverse", "column"), False, "bfloat16", threads=4
    )
    names = ("batch", "groups", "channels", "height", "width", "d_state", "dt_rank")
    assert [getattr(scan, name) for name in names] == [2, 3, 5, 7, 11, 13, 17]
    assert [scan.directions[place] for place in range(scan.direction_count)] == [0, 3, 1]
    assert (scan.softplus, scan.element_type, scan.threads) == (0, 2, 4)
    assert make_scan(Sizes(1, 1, 1, 1, 1, 1), ("row",), True, "float32").softplus == 1
    for number, name in enumerate(("float32", "float16", "bfloat16", "float64")):
        assert make_scan(Sizes(1, 1, 1, 1, 1, 1), ("row",), True, name).element_type == number
    assert isinstance(scan, ctypes.Structure)


TINY = """
#include <stdint.h>
#include <stddef.h>
typedef struct { int64_t sizes[7]; int32_t const* directions; int32_t count, softplus, type, threads; } Scan;
static char const* chosen = "wide";
static int with_team;
char const* quartermap_cpu_message(int32_t status) { return status == 4 ? "too large" : with_team ? "team" : "other"; }
char const* quartermap_cpu_contract(void) { return "{}"; }
char const* quartermap_cpu_instruction_set(void) { return chosen; }
uint32_t quartermap_cpu_version(void) { return 4000000000u; }
int32_t quartermap_cpu_choose(char const* name)
{
    if (name && *name == 'n') return 7;
    chosen = name ? "named" : "best";
    return 0;
}
int32_t quartermap_cpu_by_team(void* pool, void* task, void* argument, size_t count) { return 0; }
int32_t quartermap_cpu_scan(Scan const* scan, void* const* tensors, void* parallel, void* pool)
{
    with_team = parallel != NULL && pool != NULL;
    if (scan == NULL) return 5;
    for (int place = 0; place < 9; ++place)
        if (tensors[place] != (void*)(intptr_t)(place == 5 ? 0 : 8 * (place + 1))) return 6;
    return (int32_t)scan->sizes[0];
}
"""
"""A library of the same interface that scans nothing: it returns the batch as the status, or 6 for other addresses."""


def test_a_library_is_called_with_addresses_and_its_words_are_an_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform == "win32":
        pytest.skip("there is no C compiler")
    (tmp_path / "tiny.c").write_text(TINY)
    command = [compiler, "-shared", "-fPIC", str(tmp_path / "tiny.c"), "-o", str(tmp_path / "tiny.so")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    monkeypatch.chdir(tmp_path)
    kernels = CpuKernels.load(Path("tiny.so"))
    assert kernels.version == 4_000_000_000 and kernels.message(4) == "too large"
    assert kernels.instruction_set == "wide" and kernels.choose("some") and kernels.instruction_set == "named"
    assert not kernels.choose("none") and kernels.instruction_set == "named"
    assert kernels.choose(None) and kernels.instruction_set == "best"
    places = ("x", "dt", "B", "C", "A", "D", "dt_bias", "dt_weight", "y")
    addresses = {name: 8 * (place + 1) for place, name in enumerate(places) if name != "D"}
    start = ctypes.cast(ctypes.CFUNCTYPE(None)(lambda: None), ctypes.c_void_p).value
    for threads, team in ((1, None), (4, None), (1, start), (4, start)):
        monkeypatch.setattr(cpu_kernels, "team_start", lambda team=team: team)

        def scan(batch: int, threads: int = threads) -> None:
            kernels.scan(
                make_scan(Sizes(batch, 1, 1, 1, 1, 1), ("row",), True, "float32", threads), addresses
            )

        scan(0)
        with pytest.raises(PluginError, match=r"^selective scan: too large$"):
            scan(4)
        words = "team" if threads > 1 and team is not None else "other"
        with pytest.raises(PluginError, match=f"^selective scan: {words}$"):
            scan(1)
    assert kernels.status(None, None) == 5
