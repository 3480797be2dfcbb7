"""Bundles in 16 bits as a user meets them: compiled, run, validated, localised, and with an engine for RTX."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import error
from test_cli import Refuse, call, refused, workplace  # noqa: F401  (fixtures)
from test_tensorrt_rtx import needs_rtx

import quartermap_deploy as qm
from quartermap_deploy import compiler, compiling
from quartermap_deploy.data.digits import load_digits
from quartermap_deploy.data.images import prepare
from quartermap_deploy.errors import BundleError, RecipeError
from quartermap_deploy.gpu import find_gpu
from quartermap_deploy.revalidate import localise_bundle, validate_bundle
from quartermap_deploy.targets.tensorrt.options import EngineOptions, Profile

pytestmark = pytest.mark.usefixtures("small_models")

MODEL = "vmamba_digits"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 bundle, pruned; not to be changed."""
    path = tmp_path_factory.mktemp("half") / "bundle"
    arguments = ("compile", MODEL, "--every", 3, "--precision", "float16", "--out", path)
    outcome = call(*arguments)
    assert outcome.code == 0, outcome.err
    return path


def test_the_types_are_in_the_graph_and_the_report(half: Path) -> None:
    model = onnx.load(half / "model.onnx")
    types = {tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith("weight")}
    assert onnx.TensorProto.FLOAT16 in types
    bundle = qm.load_bundle(half)
    assert [item.type for item in (*bundle.inputs, *bundle.outputs)] == ["float32", "float32"]
    assert bundle.manifest["recipe"]["precision"] == "float16"
    precision = bundle.report["precision"]
    assert precision["operators"]["float16"] > precision["operators"]["float32"]
    assert precision["ranges"]["images"] == compiling.export.CALIBRATION_IMAGES
    # A file of half the weights' size.
    assert (half / "model.onnx").stat().st_size < 1.4e6


def test_a_session_prints_nothing(half: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images = prepare(list(load_digits().held_out.images[:2]), qm.load_bundle(half).preprocessing)
    # One of nobody's settings, as other programs open it, and ours.
    plain = onnxruntime.InferenceSession(half / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = plain.run(None, {"images": images})
    ours = qm.load_bundle(half).session(native=False).run(images)
    assert capfd.readouterr() == ("", "")
    assert error(ours, found) <= 1e-6


def test_it_says_of_digits_what_the_float32_model_says(half: Path) -> None:
    bundle, digits = qm.load_bundle(half), load_digits().held_out
    images = prepare(list(digits.images), bundle.preprocessing)
    model = qm.prune(qm.create_model(MODEL), qm.QuarterMap(every=3))
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).argmax(1).numpy()
    logits = bundle.run(images)
    assert isinstance(logits, np.ndarray)
    assert (logits.argmax(1) == expected).mean() >= 0.995


def test_validate_and_localise(half: Path) -> None:
    bundle = qm.load_bundle(half)
    report = validate_bundle(bundle)
    assert report["passed"] and report["tolerance"]["element_type"] == "float16"
    outcome = call("validate", half, "--localise")
    assert outcome.code == 0 and "nothing to localise" in " ".join(outcome.out.split())


def test_a_fault_of_precision_is_localised_when_compiling_fails(
    refused: Refuse,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load_source = compiling.source.load_source

    def with_large_values(recipe: qm.Recipe) -> Any:
        source = load_source(recipe)
        scale = 3e4
        # The weights fit float16, what the normalisation makes does not, and the projection behind it undoes it.
        mixer: Any = source.module.blocks()[3].mixer  # type: ignore[operator]
        with torch.no_grad():
            mixer.out_norm.weight.mul_(scale)
            mixer.out_norm.bias.mul_(scale)
            mixer.out_proj.weight.div_(scale)
        return source

    monkeypatch.setattr(compiler, "load_source", with_large_values)
    # Without the range scan, which would have kept these values in float32.
    monkeypatch.setattr(compiling.export, "CALIBRATION_IMAGES", 1)
    monkeypatch.setattr("quartermap_deploy.exporting.ranges.RangeReport.keep_float32", ())
    text = refused("compile", MODEL, "--precision", "float16", "--out", "new")
    assert "block_4 in float32 restores parity" in text and "--float32-blocks 4" in text


def test_a_bundle_in_float32_has_nothing_to_localise(tmp_path: Path) -> None:
    bundle = qm.compile(qm.Recipe(MODEL), tmp_path / "bundle")
    with pytest.raises(BundleError, match="float32 everywhere"):
        localise_bundle(bundle)


def test_input_and_output_of_the_same_type(tmp_path: Path) -> None:
    bundle = qm.compile(qm.Recipe(MODEL, precision="float16", io="same"), tmp_path / "bundle")
    assert [item.type for item in (*bundle.inputs, *bundle.outputs)] == ["float16", "float16"]
    images = prepare(list(load_digits().held_out.images[:2]), bundle.preprocessing)
    with pytest.raises(qm.errors.InputError, match='astype\\("float16"\\)'):
        bundle.run(images)
    logits = bundle.run(images.astype(np.float16))
    assert isinstance(logits, np.ndarray)
    assert logits.dtype == np.float16 and logits.shape == (2, 10)
    assert validate_bundle(bundle)["passed"]


def test_bfloat16_is_refused_where_it_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="onnxruntime does not take bfloat16"):
        qm.compile(qm.Recipe(MODEL, precision="bfloat16"), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@needs_rtx
def test_an_engine_in_bfloat16_with_its_own_bundle(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    outcome = call(
        *("compile", MODEL, "--every", 3, "--precision", "bfloat16", "--targets", "tensorrt-rtx"),
        *("--compute-capabilities", "8.9", "--batch", "1,2,8", "--out", out, "--json"),
    )
    assert outcome.code == 0, outcome.err
    entry = outcome.json["manifest"]["targets"]["tensorrt-rtx"]
    assert entry["compute_capabilities"] == ["8.9"]
    assert entry["options"]["profiles"] == [{"batch": [1, 2, 8]}]
    assert (out / entry["file"]).stat().st_size == entry["build"]["engine_bytes"]
    if find_gpu() is not None:
        return  # `compile` has run the engine, or said why not
    assert entry["run"] is False and entry["parity"] is None and "no NVIDIA GPU" in entry["not_run"]
    with pytest.raises(BundleError, match="GPU"):
        qm.load_bundle(out).run(np.zeros((1, 3, 64, 64), np.float32))
    outcome = call("validate", out, "--localise", "--target", "tensorrt-rtx")
    assert outcome.code == 2 and "there is no NVIDIA GPU" in outcome.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks_float32": (3,)}, "blocks_float32 would change nothing in float32"),
        ({"io": "same"}, "io would change nothing in float32"),
        ({"precision": "float16", "blocks_float32": (99,)}, r"block 99.*has 10 blocks"),
        ({"precision": "float16", "blocks_float32": 3}, "not a list of blocks"),
        ({"engine": EngineOptions(optimization_level=1)}, "no target that has one"),
        ({"targets": ()}, "not a list of targets"),
        ({"targets": "onnxruntime"}, "not a list of targets"),
        ({"input_size": 64}, "not \\[height, width\\]"),
        ({"quartermap": 3}, "no QuarterMap"),
    ],
)
def test_settings_without_effect_or_sense_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(compiler, "export_model", no_export)
    with pytest.raises(RecipeError, match=message):
        qm.compile(qm.Recipe(MODEL, **settings), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@needs_rtx
@pytest.mark.parametrize(
    ("settings", "engine", "message"),
    [
        ({}, {"compute_capabilities": ("5.0",)}, "no compute capability '5.0'"),
        ({}, {"plugin": Path("nothere.so")}, "takes no plugin library"),
        ({}, {"profiles": (Profile((1, 1, 1)),)}, "no profile takes"),
        ({"dynamic_size": True}, {}, "leaves its height open"),
        ({"precision": "float16", "io": "same"}, {}, 'io = "float32" only'),
    ],
)
def test_engines_that_cannot_be_are_refused_before_the_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    engine: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(compiler, "export_model", no_export)
    recipe = qm.Recipe(MODEL, targets=("tensorrt-rtx",), engine=EngineOptions(**engine), **settings)
    with pytest.raises(qm.errors.QuartermapError, match=message):
        qm.compile(recipe, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def no_export(*arguments: Any) -> Any:
    raise AssertionError("it was exported")


def test_a_damaged_engine_is_to_be_made_again(half: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(half, tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["model.tensorrt_rtx.engine"] = {"bytes": 10, "sha256": "0" * 64}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"missing.*quartermap rebuild"):
        qm.load_bundle(bundle)
