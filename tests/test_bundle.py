"""Compiling the trained digits model, and everything that its bundle promises."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import quartermap_deploy as qm
from quartermap_deploy import compiler, compiling
from quartermap_deploy.bundle import load_bundle
from quartermap_deploy.errors import (
    BundleError,
    CheckpointError,
    InputError,
    ParityError,
    PlanError,
    UnknownNameError,
)
from quartermap_deploy.revalidate import validate_bundle
from quartermap_deploy.validation.golden import read_golden
from quartermap_deploy.validation.inputs import real_images

PLAN = qm.QuarterMap(every=3)
RECIPE = qm.Recipe(model="vmamba_digits", quartermap=PLAN)


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> qm.Bundle:
    return qm.compile(RECIPE, tmp_path_factory.mktemp("bundles") / "digits")


@pytest.fixture
def copy_of_bundle(digits_bundle: qm.Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits_bundle.path, tmp_path / "copy"))


@pytest.fixture(scope="module")
def images() -> np.ndarray[Any, np.dtype[np.float32]]:
    return real_images(qm.load_card("vmamba_digits").preprocessing, count=5, digits=True)


def test_the_bundle_holds_what_it_lists_and_nothing_else(digits_bundle: qm.Bundle) -> None:
    listed = {*digits_bundle.manifest["files"], "manifest.json"}
    assert {path.name for path in digits_bundle.path.iterdir()} == listed
    assert listed == {"model.onnx", "inputs.json", "golden_outputs.json", "report.json", "manifest.json"}


def test_it_computes_what_pruned_pytorch_computes(digits_bundle: qm.Bundle, images: Any) -> None:
    pruned = qm.prune(qm.create_model("vmamba_digits"), PLAN)
    with torch.no_grad():
        expected = pruned(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(digits_bundle.run(images), expected, atol=1e-4 * np.abs(expected).max())
    unpruned = qm.create_model("vmamba_digits")(torch.from_numpy(images)).detach().numpy()
    assert np.abs(unpruned - expected).max() > 1e-2 * np.abs(expected).max()


def test_golden_outputs_are_computed_in_double(digits_bundle: qm.Bundle) -> None:
    """Nobody's rounding: not one bit is that of float32, which differs."""
    pruned = qm.prune(qm.create_model("vmamba_digits"), PLAN)
    cases, golden = read_golden(digits_bundle.path, digits_bundle.manifest["golden"])
    assert list(cases) == ["images", "single image", "zeros"]
    differing = 0
    for feeds, outputs in zip(cases.values(), golden, strict=True):
        images = torch.from_numpy(feeds["images"])
        with torch.no_grad():
            single = pruned.float()(images).numpy()
            double = pruned.double()(images.double()).numpy()
        assert outputs["logits"].dtype == np.float32
        np.testing.assert_allclose(outputs["logits"], double, rtol=2**-23, atol=1e-9 * np.abs(double).max())
        differing += int((single != double.astype(np.float32)).sum())
    assert differing > 0


def test_the_report_covers_every_block_and_case(digits_bundle: qm.Bundle) -> None:
    report = digits_bundle.report
    assert report["passed"] and report["first_departing_block"] is None
    assert report["worst_relative_error"] <= report["tolerance"]["relative"] == 1e-4
    assert [case["name"] for case in report["cases"]] == ["images", "single image", "zeros", "large values"]
    names = [*(f"block_{i}{part}" for i in range(1, 11) for part in ("/scan", "")), "logits"]
    for case in report["cases"]:
        assert [output["name"] for output in case["outputs"]] == names


def test_the_manifest_tells_the_block_map(digits_bundle: qm.Bundle) -> None:
    blocks = digits_bundle.manifest["blocks"]
    assert [block["index"] for block in blocks if block["pruned"]] == [3, 6, 9]
    third = blocks[2]
    assert third["stage"] == 2 and third["map_size"] == [8, 8] and third["scanned_size"] == [4, 4]
    assert third["tokens"] == 4 * 16 and third["tokens_unpruned"] == 4 * 64
    assert third["flops"] < third["flops_unpruned"]
    totals = digits_bundle.manifest["totals"]
    assert totals["tokens"] == sum(block["tokens"] for block in blocks) < totals["tokens_unpruned"]
    assert digits_bundle.manifest["recipe"]["quartermap"]["every"] == 3
    assert digits_bundle.manifest["versions"]["torch"].startswith("2.")
    model = digits_bundle.manifest["model"]
    assert (model["weights"], model["weights_sha256"], model["head"]) == ("included", None, "loaded")


def test_the_model_is_plain_onnx(digits_bundle: qm.Bundle) -> None:
    model = onnx.load(digits_bundle.model_path)
    onnx.checker.check_model(model, full_check=True)
    assert {item.domain: item.version for item in model.opset_import} == {"": 20, "quartermap": 1}
    assert len(model.graph.node) < 600
    assert (
        b"/home/" not in model.SerializeToString()
        and str(Path.cwd()).encode() not in model.SerializeToString()
    )


def test_polygraphy_passes_on_the_golden_files(digits_bundle: qm.Bundle) -> None:
    arguments = ["run", "model.onnx", "--onnxrt", "--load-inputs", "inputs.json"]
    arguments += ["--load-outputs", "golden_outputs.json"]
    script = "import sys; from polygraphy.tools import main; sys.exit(main())"
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=digits_bundle.path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "PASSED" in done.stdout


def test_running_needs_no_torch(digits_bundle: qm.Bundle, images: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", images)
    script = (
        "import sys, numpy as np, quartermap_deploy as qm\n"
        f"logits = qm.load_bundle({str(digits_bundle.path)!r}).run(np.load({str(tmp_path / 'images.npy')!r}))\n"
        "assert logits.shape == (5, 10)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("reference", ["golden", "torch"])
def test_validate_passes(digits_bundle: qm.Bundle, reference: str) -> None:
    report = validate_bundle(digits_bundle, reference=reference)
    assert report["passed"] and report["worst_relative_error"] < 1e-4


def test_validate_names_the_first_block_that_departs(copy_of_bundle: Path) -> None:
    """A weight of block 4 is changed in the file, and the manifest is made to agree."""
    model = onnx.load(copy_of_bundle / "model.onnx")
    name = next(t.name for t in model.graph.initializer if t.name == "layers.1.blocks.1.op.conv2d.weight")
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), name))
    onnx.save(model, copy_of_bundle / "model.onnx")
    manifest = json.loads((copy_of_bundle / "manifest.json").read_text())
    from quartermap_deploy.bundle import describe_file

    manifest["files"]["model.onnx"] = describe_file(copy_of_bundle / "model.onnx")
    (copy_of_bundle / "manifest.json").write_text(json.dumps(manifest))
    bundle = qm.load_bundle(copy_of_bundle)
    report = validate_bundle(bundle, reference="torch")
    assert not report["passed"] and report["first_departing_block"] == 4
    assert not validate_bundle(bundle, reference="golden")["passed"]


def test_failed_parity_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is exported with another plan than PyTorch is pruned with."""
    export_model = compiling.export.export_model

    def wrong(recipe: qm.Recipe, *rest: Any) -> Any:
        return export_model(dataclasses.replace(recipe, quartermap=qm.QuarterMap(blocks=(4, 6, 9))), *rest)

    monkeypatch.setattr(compiler, "export_model", wrong)
    with pytest.raises(ParityError, match=r"block 3 \(layers\.1\.blocks\.0\) is the first that departs"):
        qm.compile(RECIPE, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        (qm.Recipe("vmamba_digit"), UnknownNameError, "Did you mean vmamba_digits"),
        (qm.Recipe("vmamba_digits", targets=("onnxruntme",)), UnknownNameError, "Did you mean onnxruntime"),
        (qm.Recipe("vmamba_digits", checkpoint=Path("none.pth")), CheckpointError, "none.pth"),
        (qm.Recipe("vmamba_digits", quartermap=qm.QuarterMap(blocks=(11,))), PlanError, "blocks 1 to 10"),
        (qm.Recipe("vmamba_digits", quartermap=qm.QuarterMap(every=50)), PlanError, "prunes nothing"),
        (qm.Recipe("vmamba_tiny_v0", input_size=(3, 224)), InputError, "too small"),
        (qm.Recipe("vmamba_digits", input_size=(100_000, 100_000)), InputError, "too large"),
        (qm.Recipe("vmamba_digits", preprocessing={"crop": [20, 20]}), InputError, "images of 20x20"),
        (qm.Recipe("vmamba_digits", images=Path("no-such-folder")), InputError, "no-such-folder"),
    ],
)
def test_bad_recipes_write_nothing(
    recipe: qm.Recipe, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        qm.compile(recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_and_replaced_by_force(
    copy_of_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (copy_of_bundle / "manifest.json").read_text()
    with pytest.raises(BundleError, match="--force"):
        qm.compile(RECIPE, copy_of_bundle)
    assert (copy_of_bundle / "manifest.json").read_text() == before
    loaded: list[Path] = []
    monkeypatch.setattr(compiler, "load_bundle", lambda path: loaded.append(path) or load_bundle(path))
    replaced = qm.compile(qm.Recipe("vmamba_digits"), copy_of_bundle, force=True)
    assert replaced.manifest["plan"] is None
    # Its files are read and hashed once, in the draft.
    assert len(loaded) == 1 and loaded[0] != copy_of_bundle
    assert replaced == load_bundle(copy_of_bundle)
    assert [path.name for path in copy_of_bundle.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("place", ["/proc/bundles/out", "/dev/null/out", "/sys/out"])
def test_a_place_that_holds_no_files_is_refused_before_the_work(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "export_model", lambda *arguments: pytest.fail("the work began"))
    with pytest.raises(BundleError, match="cannot write to"):
        qm.compile(RECIPE, Path(place))


def test_force_never_removes_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(BundleError, match="no bundle"):
        qm.compile(RECIPE, tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def _flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(bytes(content))


def _set(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


DAMAGE = {
    "altered": (_flip_a_byte, "does not match its manifest"),
    "truncated": (lambda f: (f / "model.onnx").write_bytes(b"abc"), "does not match its manifest"),
    "missing": (lambda f: (f / "inputs.json").unlink(), "is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
    "broken manifest": (lambda f: (f / "manifest.json").write_text("{"), "cannot be read"),
    "other manifest": (lambda f: (f / "manifest.json").write_text("[]"), "not the manifest"),
    "manifest without blocks": (
        lambda f: _set(f / "manifest.json", blocks=None),
        "blocks is null, expected array",
    ),
    "unlisted file": (lambda f: (f / "extra.txt").write_text("x"), "does not list"),
    "newer format": (
        lambda f: (f / "manifest.json").write_text('{"format": 99, "files": {}}'),
        "has format 99",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_bundles_are_refused(copy_of_bundle: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(copy_of_bundle)
    with pytest.raises(BundleError, match=message):
        qm.load_bundle(copy_of_bundle)


@pytest.mark.parametrize(
    ("images", "remedy"),
    [
        (np.zeros((1, 3, 32, 32), np.float32), "model's preprocessing"),
        (np.zeros((1, 3, 64, 64), np.float64), r'\.astype\("float32"\)'),
        (np.zeros((1, 3, 64, 64), np.uint8), "model's preprocessing"),
        (np.zeros((0, 3, 64, 64), np.float32), "its axis 0 is empty"),
        (np.zeros((3, 64, 64), np.float32), "model's preprocessing"),
        ([[0.0]], r'a list; np\.asarray\(…, dtype="float32"\)'),
        (torch.zeros(1, 3, 64, 64), r"a Tensor; np\.asarray"),
    ],
    ids=["size", "type", "pixels", "empty", "axes", "list", "tensor"],
)
def test_wrong_images_are_refused(digits_bundle: qm.Bundle, images: Any, remedy: str) -> None:
    with pytest.raises(InputError, match=f"the model takes images of shape .*, found .*{remedy}"):
        digits_bundle.run(images)


def test_an_unknown_target_is_refused(digits_bundle: qm.Bundle, images: Any) -> None:
    with pytest.raises(UnknownNameError, match="onnxruntime"):
        digits_bundle.run(images, target="tensorrt")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inputs": []}, "inputs is "),
        ({"inputs": [{"name": "images"}]}, "inputs.0 has no shape, type"),
        ({"outputs": [{"name": "x", "shape": [1], "type": "object"}]}, "is no input or output"),
        ({"outputs": [{"name": "x", "shape": [True], "type": "int8"}]}, "shape.0 is true"),
        ({"labels": [1]}, "labels.0 is 1, expected string"),
        ({"preprocessing": {"crop": [64, 64]}}, "no mean"),
        ({"preprocessing": {"crop": [64, 64], "mean": ["a"], "std": [1]}}, "mean"),
        ({"size_rules": ["__import__('os')"]}, "no rule of sizes"),
        ({"task": None}, "task is null, expected one of classification, "),
    ],
)
def test_a_manifest_that_means_nothing_is_refused(
    copy_of_bundle: Path, values: dict[str, Any], message: str
) -> None:
    _set(copy_of_bundle / "manifest.json", **values)
    with pytest.raises(BundleError, match=message):
        qm.load_bundle(copy_of_bundle)
