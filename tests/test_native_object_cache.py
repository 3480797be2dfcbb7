"""Compiled files of a plugin's build are kept, and taken again where nothing that makes them has changed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from quartermap_deploy.native import build, object_cache


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
