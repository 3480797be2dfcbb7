"""What we declare of ONNX Runtime's C interface, compared with its real header where that is installed."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import cpu_builds
import pytest

INCLUDE_VARIABLE = "QUARTERMAP_ONNXRUNTIME_INCLUDE"
"""A folder with onnxruntime/onnxruntime_c_api.h in it."""

HEADER = Path("onnxruntime") / "onnxruntime_c_api.h"
INTERFACE = cpu_builds.KERNELS.parent / "onnxruntime" / "interface.h"
COMPARISON = cpu_builds.NATIVE_TESTS / "compare_interface.cpp"


def include_folder() -> Path:
    """Return the folder to include from; skip where there is none."""
    named = os.environ.get(INCLUDE_VARIABLE)
    if named and not (Path(named) / HEADER).is_file():
        pytest.fail(f"{INCLUDE_VARIABLE} is {named}, and there is no {HEADER} in it")
    for folder in (named, "/usr/include", "/usr/local/include", "/opt/homebrew/include"):
        if folder and (Path(folder) / HEADER).is_file():
            return Path(folder)
    pytest.skip(f"no header of ONNX Runtime: install libonnxruntime-dev, or set {INCLUDE_VARIABLE}")


def compile_comparison(*flags: str) -> subprocess.CompletedProcess[str]:
    # Theirs is a system header: what a compiler warns of in it is no business of this test.
    folders = ["-I", str(INTERFACE.parent), "-isystem", str(include_folder())]
    command = [
        cpu_builds.compiler(),
        "-std=c++17",
        "-fsyntax-only",
        "-Wall",
        *folders,
        *flags,
        str(COMPARISON),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_every_offset_and_value_is_that_of_the_real_header() -> None:
    done = compile_comparison()
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_a_difference_would_be_found() -> None:
    done = compile_comparison("-DQUARTERMAP_PLANTED_FAULT")
    assert done.returncode != 0 and "a planted fault" in done.stderr


def test_everything_that_is_declared_is_compared() -> None:
    """Needs no header: every name of ours stands in the comparison."""
    text = re.sub(r"//[^\n]*", "", INTERFACE.read_text(encoding="utf-8"))
    compared = COMPARISON.read_text(encoding="utf-8")
    members = re.findall(r"QUARTERMAP_ORT_CALL\* (\w+)\)", text)
    constants = re.findall(r"^    ([A-Z][A-Z0-9_]+) = \d+", text, re.MULTILINE)
    assert len(members) > 40 and len(constants) > 10
    missing = [name for name in members if f"({name})" not in compared and f", {name})" not in compared]
    missing += [name for name in constants if f"SAME_VALUE(ours::{name}," not in compared]
    assert not missing
