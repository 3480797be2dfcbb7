"""Engines of modules that are not ours: compiled for TensorRT for RTX, rebuilt, and run and proved on the stand-in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_stand_in as stand_in
import torch
import toy_bundles
import toy_modules
from helpers import error
from tensorrt_stand_in import Engines
from test_tensorrt_calls import ADA, VERSIONS, library  # noqa: F401  (fixture)
from test_tensorrt_rtx import needs_rtx, without_gpu

import quartermap_deploy as qm
from quartermap_deploy import gpu
from quartermap_deploy.bundle import load_bundle
from quartermap_deploy.errors import InputError, ParityError
from quartermap_deploy.rebuild import rebuild_bundle
from quartermap_deploy.revalidate import validate_bundle
from quartermap_deploy.targets.tensorrt import plugin as tensorrt_plugin
from quartermap_deploy.targets.tensorrt.options import EngineOptions, Profile

OPTIONS = EngineOptions(profiles=(Profile((1, 2, 4)),), compute_capabilities=("8.9",))


@pytest.fixture
def engines(
    monkeypatch: pytest.MonkeyPatch,
    library: Callable[..., Path],  # noqa: F811
) -> Iterator[Engines]:
    """A machine with a GPU, TensorRT and the plugin, as far as this package can tell."""
    monkeypatch.setattr(gpu, "find_gpu", lambda: ADA)
    monkeypatch.setenv(tensorrt_plugin.PLUGIN_VARIABLE, str(library()))
    with stand_in.installed(VERSIONS["10.7"], stand_in.public_api("10.7")) as found:
        yield found


@pytest.fixture
def change(tmp_path: Path) -> Path:
    """A bundle of two inputs and two outputs that a test may change."""
    return Path(shutil.copytree(toy_bundles.change(), tmp_path / "bundle"))


# TensorRT for RTX, built for real -------------------------------------------------------------------------------


@needs_rtx
@without_gpu
def test_two_inputs_and_two_outputs_are_compiled_for_rtx(tmp_path: Path) -> None:
    example = torch.randn(2, 3, 16, 24), torch.randn(2, 3, 16, 24)
    bundle = qm.compile_module(
        toy_modules.Change(),
        example,
        tmp_path / "bundle",
        targets=("onnxruntime", "tensorrt-rtx"),
        engine=OPTIONS,
    )
    entry = bundle.manifest["targets"]["tensorrt-rtx"]
    assert entry["inputs"] == {item.name: list(item.shape) for item in bundle.inputs}
    assert list(entry["inputs"]) == ["first", "second"]
    assert entry["outputs"] == [item.name for item in bundle.outputs] == ["change", "score"]
    assert entry["run"] is False and "no NVIDIA GPU" in entry["not_run"]
    with pytest.raises(InputError, match=r"no profile takes inputs of shapes first \(2, 3, 16, 24\), second"):
        qm.compile_module(
            toy_modules.Change(),
            example,
            tmp_path / "narrow",
            targets=("tensorrt-rtx",),
            engine=EngineOptions(profiles=(Profile((1, 1, 1)),)),
        )
    assert not (tmp_path / "narrow").exists()


@needs_rtx
def test_a_module_of_sequences_is_rebuilt_for_rtx(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_bundles.sequences(), tmp_path / "bundle"))
    bundle = rebuild_bundle(folder, "tensorrt-rtx", options=OPTIONS)
    entry = bundle.manifest["targets"]["tensorrt-rtx"]
    assert entry["inputs"] == {"tokens": [2, 20, toy_modules.WIDTH]} and entry["outputs"] == ["logits"]
    assert entry["build"]["network_layers"] > 50
    with pytest.raises(InputError, match=r"the model has 2; .*batch = \(2, 2, 2\)"):
        rebuild_bundle(folder, options=EngineOptions(profiles=(Profile((4, 4, 4)),)))


# TensorRT, on the stand-in --------------------------------------------------------------------------------------


def test_an_engine_of_two_inputs_is_run_and_proved(engines: Engines, change: Path) -> None:
    entry = rebuild_bundle(change, "tensorrt").manifest["targets"]["tensorrt"]
    golden = json.loads((change / "manifest.json").read_text())["golden"]
    assert entry["run"] is True and entry["parity"]["cases"] == golden
    assert 0 < entry["parity"]["worst_relative_error"] <= entry["parity"]["tolerance"]
    narrow = EngineOptions(profiles=(Profile((1, 1, 1)),))
    entry = rebuild_bundle(change, options=narrow).manifest["targets"]["tensorrt"]
    assert entry["parity"]["cases"] == ["single image"]
    rebuild_bundle(change, options=EngineOptions(profiles=(Profile((1, 2, 8)),)))
    assert validate_bundle(load_bundle(change), "tensorrt")["passed"]
    engines.behaviour.wrong = lambda model: 1.1
    report = validate_bundle(load_bundle(change), "tensorrt")
    departing = {out["name"] for case in report["cases"] for out in case["outputs"] if not out["passed"]}
    assert departing == {"change", "score"}
    with pytest.raises(ParityError, match="Nothing was written"):
        rebuild_bundle(change, "tensorrt")


def test_its_session_is_that_of_the_bundle(engines: Engines, change: Path) -> None:
    bundle = rebuild_bundle(change, "tensorrt")
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal((3, 3, 32, 48)).astype(np.float32) for name in ("first", "second")}
    found, expected = bundle.run(feeds, "tensorrt"), bundle.run(feeds, "onnxruntime")
    assert isinstance(found, dict) and isinstance(expected, dict)
    assert list(found) == list(expected) == ["change", "score"]
    for name in expected:
        assert error(found[name], expected[name]) <= 1e-5
    session = bundle.session("tensorrt")
    assert [(item.name, item.type) for item in session.inputs] == [
        (item.name, item.type) for item in bundle.inputs
    ]
    assert session.input_type == np.float32


def test_the_rules_of_sizes_hold_for_engines_too(engines: Engines, change: Path) -> None:
    rebuild_bundle(change, "tensorrt")
    manifest: dict[str, Any] = json.loads((change / "manifest.json").read_text())
    (change / "manifest.json").write_text(json.dumps({**manifest, "size_rules": ["first[0] % 2 == 0"]}))
    bundle = load_bundle(change)
    feeds = {name: np.zeros((3, 3, 32, 48), np.float32) for name in ("first", "second")}
    for target in ("onnxruntime", "tensorrt"):
        with pytest.raises(InputError, match=r"exported for sizes with first\[0\] % 2 == 0"):
            bundle.run(feeds, target)
    bundle.run({name: array[:2] for name, array in feeds.items()}, "tensorrt")


def test_a_module_of_sequences_runs_by_the_plugin(engines: Engines, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_bundles.sequences(), tmp_path / "bundle"))
    entry = rebuild_bundle(folder, "tensorrt").manifest["targets"]["tensorrt"]
    assert entry["run"] is True and entry["parity"]["worst_relative_error"] <= 1e-5
