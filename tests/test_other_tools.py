"""Our files in the tools of others: each row of docs/other-tools.md, against the real tool.

Tools that are no part of the development set lie in build/compat, a folder for each file of tests/tool_releases; `make
test-compat` fetches them. A tool runs in a process of its own (tool_runs.py), and its numbers, or those of the file
that it wrote, are compared with PyTorch's.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import Array, onnx_outputs, operators, run, shortened, traced_with_open_sizes
from made_once import made_once

import quartermap_deploy as qm
from quartermap_deploy.passes import Selection, at_opset, infer_shapes, lower, run_passes
from quartermap_deploy.pruning.plan import Subsample

HERE = Path(__file__).parent
COMPAT = Path(os.environ.get("QUARTERMAP_COMPAT", HERE.parent / "build" / "compat"))
RELEASES = sorted(path.stem for path in (HERE / "tool_releases").glob("*.txt"))
NAMES = ("vmamba_s2_channel_first", "medmamba")
SIZE = (64, 96)
OWN = ("inliner", "onnxscript", "pre_process", "surgeon")
"""Tools of the development set."""
CALLS = {"onnxconverter-common": "float16"}
"""What `tool_runs` calls a tool, where that is not its package's name."""
TOLERANCE = {"float16": 5e-3}
"""Of the largest value; 1e-5 for tools that keep float32."""


def pruned(name: str) -> torch.nn.Module:
    return qm.prune(shortened(name), qm.QuarterMap(blocks=(1, 2)))


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def model(name: str, form: str) -> onnx.ModelProto:
    """A reference of two blocks, both pruned: of open sizes, of an open batch alone, or static; with functions."""
    traced = traced_with_open_sizes(name)
    sides = traced.graph.input[0].type.tensor_type.shape.dim
    fixed = {"open": {}, "batch": {2: SIZE[0], 3: SIZE[1]}, "static": {0: 2, 2: SIZE[0], 3: SIZE[1]}}[form]
    for axis, size in fixed.items():
        sides[axis].dim_value = size
    if form == "static":
        traced.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2
    del traced.graph.value_info[:]
    shaped, _ = run_passes(traced, Selection((1, 2), Subsample(2, 1, "nearest")))
    return lower(shaped)


@pytest.fixture(scope="module")
def models() -> Path:
    """Folders `functions` and `inlined` with models and their inputs."""

    def make(path: Path) -> None:
        draft = path.with_suffix(".draft")
        for name in NAMES:
            for form in ("open", "batch", "static"):
                usual = model(name, form)
                made = {"inlined": qm.inline(usual), **({"functions": usual} if form == "open" else {})}
                for folder, proto in made.items():
                    (draft / folder).mkdir(parents=True, exist_ok=True)
                    onnx.save(proto, draft / folder / f"{name}-{form}.onnx")
                    np.savez(draft / folder / f"{name}-{form}.npz", images=images(2).numpy())
        draft.rename(path)

    return made_once("tool_models", make)


def expected(name: str) -> Array:
    with torch.inference_mode():
        logits: Array = pruned(name)(images(2)).numpy()
    return logits


def place(release: str) -> str:
    """Where a tool lies, for Python's path; skips where it is not to be had."""
    folder = COMPAT / release
    if (folder / ".installed").exists():
        return str(folder)
    package = release.rpartition("-")[0].replace("-", "_")
    if package != "onnxruntime" and importlib.util.find_spec(package) is not None:
        from importlib.metadata import version

        if version(release.rpartition("-")[0]) == release.rpartition("-")[2]:
            return ""
    pytest.skip(
        f"{release} is not installed; `make test-compat` fetches it, where there is one for this Python"
    )


def outcome(tool: str, path: str, models: Path, out: Path) -> dict[str, str | Array]:
    """For each model, what the tool computes, or what the file computes that it wrote; its words where it refuses."""
    out.mkdir()
    command = [sys.executable, str(HERE / "tool_runs.py"), tool, str(models), str(out)]
    done = subprocess.run(
        command,
        # Some tools write files of their own where they run.
        cwd=out,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str | Array] = {}
    for given in sorted(models.glob("*.onnx")):
        result = out / given.stem
        if result.with_suffix(".txt").exists():
            found[given.stem] = result.with_suffix(".txt").read_text(encoding="utf-8")
        elif result.with_suffix(".npz").exists():
            found[given.stem] = np.load(result.with_suffix(".npz"))["arr_0"]
        else:
            changed = onnx.load(result.with_suffix(".onnx"))
            onnx.checker.check_model(changed, full_check=True)
            found[given.stem] = run(changed, {"images": images(2)})["logits"]
    return found


def check(tool: str, found: dict[str, str | Array], but: str = "") -> None:
    """Every model is right, but those of a form that are refused."""
    assert len(found) >= len(NAMES)
    for stem, value in found.items():
        if but and stem.endswith(but):
            assert isinstance(value, str), f"{tool} takes {stem} now: say so in docs/other-tools.md"
            continue
        assert not isinstance(value, str), f"{tool} refuses {stem}: {value[-500:]}"
        right = expected(stem.rpartition("-")[0])
        error = np.abs(value - right).max() / np.abs(right).max()
        assert not error > TOLERANCE.get(tool, 1e-5), f"{tool} is wrong by {error} in {stem}"


@pytest.mark.parametrize("release", RELEASES)
def test_tools_take_files_without_functions(release: str, models: Path, tmp_path: Path) -> None:
    tool = release.rpartition("-")[0]
    tool = CALLS.get(tool, tool)
    check(tool, outcome(tool, place(release), models / "inlined", tmp_path / "out"))


@pytest.mark.parametrize("tool", OWN)
def test_tools_of_the_development_set_do_too(tool: str, models: Path, tmp_path: Path) -> None:
    if tool == "surgeon" and "QUARTERMAP_COMPAT" not in os.environ:
        pytest.skip("constant folding of written-out scans takes half a minute: make test-compat")
    # Symbolic shape inference gives up where height and width are open.
    but = "-open" if tool == "pre_process" else ""
    check(tool, outcome(tool, "", models / "inlined", tmp_path / "out"), but)


@pytest.mark.parametrize("release", [*RELEASES, *OWN])
def test_who_takes_files_with_functions(release: str, models: Path, tmp_path: Path) -> None:
    tool = release if release in OWN else release.rpartition("-")[0]
    tool = CALLS.get(tool, tool)
    path = "" if release in OWN else place(release)
    if release == "onnxsim-0.4.36":
        pytest.skip(
            "onnxsim 0.4.36 drops the functions and says that it succeeded, so its file does not load"
        )
    refused = "-open" if tool in ("openvino", "pre_process") else ""
    check(tool, outcome(tool, path, models / "functions", tmp_path / "out"), refused)


OPSETS = {"1.17.3": 20, "1.18.1": 21, "1.19.2": 21, "1.20.1": 21, "1.21.1": 22, "1.22.1": 22, "1.23.2": 23}


@pytest.mark.parametrize("version", OPSETS)
def test_the_highest_opset_of_each_onnxruntime(version: str, models: Path, tmp_path: Path) -> None:
    path = place(f"onnxruntime-{version}")
    folder = tmp_path / "models"
    folder.mkdir()
    for name in NAMES:
        for opset in {17, OPSETS[version]}:
            given = at_opset(onnx.load(models / "functions" / f"{name}-open.onnx"), opset)
            onnx.save(given, folder / f"{name}-{opset}.onnx")
            np.savez(folder / f"{name}-{opset}.npz", images=images(2).numpy())
    check("onnxruntime", outcome("onnxruntime", path, folder, tmp_path / "out"))


@pytest.mark.parametrize("name", NAMES)
def test_no_size_is_computed_where_all_are_fixed(name: str) -> None:
    """graphsurgeon 0.6 folds a Shape of two of the four sides to all of them."""
    assert not {"Shape", "Flatten"}.intersection(operators(qm.inline(model(name, "static"))))


@pytest.mark.parametrize("name", NAMES)
def test_the_maps_of_a_block_are_taken_out_by_their_names(name: str, models: Path, tmp_path: Path) -> None:
    source = models / "functions" / f"{name}-open.onnx"
    target = tmp_path / "part.onnx"
    onnx.utils.extract_model(str(source), str(target), ["images"], ["block_1"])
    part = onnx.load(target)
    found = run(part, {"images": images(2)})
    usual = onnx_outputs(infer_shapes(onnx.load(source)), images(2))
    np.testing.assert_array_equal(found["block_1"], usual["block_1"])
    assert len(part.graph.node) < len(onnx.load(source).graph.node)
