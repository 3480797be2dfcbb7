"""Building the CPU library: compilers that are asked, what they are told, and what is kept."""

from __future__ import annotations

import os
import platform
import stat
import sys
from pathlib import Path

import pytest
from library_heads import ARM, elf

from quartermap_deploy.errors import MissingDependencyError
from quartermap_deploy.native import cpu_build, library_format
from quartermap_deploy.native.cpu_build import Compiler, CpuBuildOptions, find_compiler
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.native.seal import sealed


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
