"""The examples that run a bundle, in Python, C++ and Node.js, against what PyTorch computed for its golden inputs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cpu_builds
import numpy as np
import pytest
from deploy_bundles import dynamic_bundle
from helpers import REPOSITORY, Array, error
from npm_packages import npm_package
from test_onnxruntime_interface import include_folder

import quartermap_deploy as qm
from quartermap_deploy.data.images import restored
from quartermap_deploy.validation.golden import read_golden

EXAMPLES = REPOSITORY / "examples"
TOLERANCE = 1e-5
"""Of the largest logit. Plain ONNX Runtime and the native operator err by 1e-6 at most."""


def golden() -> tuple[Array, Array]:
    """A prepared image, (1, 3, 64, 64), and its logits by PyTorch in float64, (1, 10)."""
    bundle = qm.load_bundle(dynamic_bundle())
    inputs, outputs = read_golden(bundle.path, bundle.manifest["golden"])
    case = list(inputs).index("images")
    return inputs["images"]["images"][:1], outputs[case]["logits"][:1]


@pytest.fixture
def input_file(tmp_path: Path) -> Path:
    golden()[0].astype("<f4").tofile(tmp_path / "input.f32")
    return tmp_path / "input.f32"


def ran(*words: Any, cwd: Path | None = None, **environment: str) -> str:
    """Run a program, which must not fail, and return what it printed."""
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def check_logits(printed: str) -> None:
    found = np.array([list(map(float, printed.split()))])
    assert error(found, golden()[1]) <= TOLERANCE


def test_python(tmp_path: Path) -> None:
    script = EXAMPLES / "python" / "classify.py"
    assert len(script.read_text().splitlines()) <= 15
    bundle = qm.load_bundle(dynamic_bundle())
    assert bundle.preprocessing is not None
    prepared, logits = golden()
    restored(prepared[0], bundle.preprocessing).save(tmp_path / "golden.png")
    printed = ran(sys.executable, script, bundle.path, tmp_path / "golden.png", PYTHONPATH=str(REPOSITORY))
    powers = np.exp(logits[0] - logits[0].max())
    expected = powers / powers.sum()
    shown = re.findall(r"([\d.]+)  (\d)", printed.split("\n", 1)[1])
    assert [int(label) for _, label in shown] == list(np.argsort(-expected)[:5])
    for probability, label in shown:
        assert abs(float(probability) - expected[int(label)]) <= 1e-5


# C++ ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, compiled with the headers that are here, and the library that a package of npm brings."""
    include = include_folder() / "onnxruntime"
    machine = {"x86_64": "x64", "aarch64": "arm64"}.get(os.uname().machine, "other")
    library = npm_package("onnxruntime-node") / "bin" / "napi-v6" / "linux" / machine / "libonnxruntime.so.1"
    if sys.platform != "linux" or not library.is_file():
        pytest.skip("the npm package onnxruntime-node has no library for this machine")
    path = tmp_path_factory.mktemp("cpp") / "run"
    source = EXAMPLES / "cpp" / "run.cpp"
    # The headers are somebody else's, whose warnings are no business of this test.
    warnings = ["-Wall", "-Wextra", "-Werror", "-isystem", include]
    run_path = f"-Wl,-rpath,{library.parent}"
    ran(cpu_builds.compiler(), "-std=c++17", "-O1", *warnings, source, library, run_path, "-o", path)
    return path


def test_cpp_with_the_operators_in_the_file(program: Path, input_file: Path) -> None:
    check_logits(ran(program, dynamic_bundle() / "model.onnx", input_file))


def test_cpp_with_the_native_operator(program: Path, input_file: Path, cpu_library: Path) -> None:
    check_logits(ran(program, dynamic_bundle() / "model.onnx", input_file, cpu_library))


def test_cpp_says_what_is_wrong(program: Path, input_file: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.f32"
    short.write_bytes(input_file.read_bytes()[:-4])
    model = dynamic_bundle() / "model.onnx"
    for words, expected in (
        ([], "usage"),
        ([model, short], "12287 numbers"),
        ([tmp_path / "absent.onnx", input_file], "absent.onnx"),
        ([model, input_file, tmp_path / "absent.so"], "absent.so"),
    ):
        done = subprocess.run([str(program), *map(str, words)], capture_output=True, text=True, timeout=60)
        assert done.returncode in (1, 2) and expected in done.stderr


# Node.js ------------------------------------------------------------------------------------------------------------


def node(tmp_path: Path, *words: Any) -> Mapping[str, Any]:
    """Run the example beside the packages that `make node` fetched; Node.js looks for them from its folder upwards."""
    if shutil.which("node") is None:
        pytest.skip("Node.js is not installed")
    packages = npm_package("onnxruntime-node").parent
    folder = tmp_path / "node"
    shutil.copytree(EXAMPLES / "node", folder)
    (folder / "node_modules").symlink_to(packages, target_is_directory=True)
    done = subprocess.run(
        ["node", "run.mjs", *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=120
    )
    return {"code": done.returncode, "out": done.stdout, "err": done.stderr}


def test_node(tmp_path: Path, input_file: Path) -> None:
    done = node(tmp_path, dynamic_bundle() / "model.onnx", input_file)
    assert done["code"] == 0, done
    check_logits(done["out"])


def test_node_says_how_it_is_called(tmp_path: Path) -> None:
    done = node(tmp_path)
    assert done["code"] == 2 and "usage" in done["err"]


# What stands in them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["python", "cpp", "node"])
def test_each_has_a_readme_that_names_its_files(name: str) -> None:
    folder = EXAMPLES / name
    text = (folder / "README.md").read_text()
    (program,) = [path for path in folder.iterdir() if path.suffix in (".py", ".cpp", ".mjs")]
    assert program.name in text and len(text.splitlines()) <= 30
