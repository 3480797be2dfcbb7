"""`quartermap rebuild`: engines of a bundle made again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import pytest
from test_tensorrt_rtx import needs_rtx, small_model, two_in_two_out, without_gpu

from quartermap_deploy.bundle import FORMAT, describe_file, load_bundle, operators, write_json
from quartermap_deploy.cli import main as run_command
from quartermap_deploy.errors import BundleError, InputError, RecipeError, UnknownNameError
from quartermap_deploy.rebuild import rebuild_bundle
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.targets.tensorrt import rtx
from quartermap_deploy.targets.tensorrt.options import EngineOptions, Profile

OPTIONS = EngineOptions(profiles=(Profile((1, 2, 4)),), compute_capabilities=("8.9",))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(values: Iterable[onnx.ValueInfoProto]) -> list[dict[str, Any]]:
    """Inputs or outputs of a graph as a manifest lists them."""
    return [
        {
            "name": value.name,
            "shape": [side.dim_value or side.dim_param for side in value.type.tensor_type.shape.dim],
            "type": str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
        }
        for value in values
    ]


REPORT = {
    "passed": True,
    "reference": "pytorch",
    "target": "onnxruntime",
    "tolerance": {"element_type": "float32", "relative": 1e-4, "reason": "for these tests"},
    "first_departing_block": None,
    "cases": [{"name": "x", "outputs": [{"name": "y", "relative_error": 0.0, "passed": True, "detail": ""}]}],
}


def write_bundle(
    folder: Path, engine: bool = True, recipe: Recipe | None = None, model: onnx.ModelProto | None = None
) -> Path:
    """Write a small bundle by hand, with an engine or without, and without golden files."""
    folder.mkdir()
    model = model or small_model()
    onnx.save(model, folder / "model.onnx")
    write_json(folder / "report.json", REPORT)
    targets: dict[str, Any] = {"onnxruntime": {"file": "model.onnx"}}
    if engine:
        targets["tensorrt-rtx"] = rtx.build(folder / "model.onnx", folder, OPTIONS)
    files = {path.name: describe_file(path) for path in sorted(folder.iterdir())}
    manifest = {
        "format": FORMAT,
        "created": "2026-11-30T12:00:00+00:00",
        "versions": {},
        "recipe": (recipe or Recipe("small")).to_dict(),
        "model": {"name": "small", "title": "Small", "source": "card", "parameters": 1, "weights": "new"},
        "task": "other",
        **{name: [] for name in ("blocks", "passes", "labels", "size_rules", "golden")},
        "inputs": tensors(model.graph.input),
        "outputs": tensors(model.graph.output),
        "plan": None,
        "preprocessing": None,
        "totals": dict.fromkeys(("tokens", "tokens_unpruned", "flops", "flops_unpruned"), 1),
        "graph": {**operators(model), "before": operators(model)},
    }
    write_json(folder / "manifest.json", {**manifest, "files": files, "targets": targets})
    return folder


@needs_rtx
def test_a_damaged_engine_is_made_again(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    before = contents(folder)
    (engine,) = folder.glob("*.engine")
    engine.write_bytes(b"damaged")
    with pytest.raises(BundleError, match="does not match"):
        load_bundle(folder)
    bundle = rebuild_bundle(folder)
    assert bundle.path == folder
    entry = load_bundle(folder).manifest["targets"]["tensorrt-rtx"]
    assert EngineOptions.from_dict(entry["options"]) == OPTIONS
    assert engine.stat().st_size == entry["build"]["engine_bytes"]
    after = contents(folder)
    assert set(after) == set(before)
    assert {name for name in after if after[name] != before[name]} <= {engine.name, "manifest.json"}
    # A missing engine is no worse.
    engine.unlink()
    rebuild_bundle(folder, "tensorrt-rtx")
    load_bundle(folder)


@needs_rtx
def test_an_engine_is_added_and_its_options_changed(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", engine=False)
    with pytest.raises(BundleError, match=r"has no engine; name a target"):
        rebuild_bundle(folder)
    bundle = rebuild_bundle(folder, "tensorrt-rtx", options=OPTIONS)
    assert list(bundle.manifest["targets"]) == ["onnxruntime", "tensorrt-rtx"]
    wider = EngineOptions(profiles=(Profile((1, 8, 64)),), compute_capabilities=("8.9", "12.0"))
    bundle = rebuild_bundle(folder, options=wider)
    assert bundle.manifest["targets"]["tensorrt-rtx"]["compute_capabilities"] == ["8.9", "12.0"]


@needs_rtx
def test_an_engine_of_several_inputs_is_made_again(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", model=two_in_two_out())
    (folder / "model.tensorrt_rtx.engine").unlink()
    entry = rebuild_bundle(folder).manifest["targets"]["tensorrt-rtx"]
    assert list(entry["inputs"]) == ["features", "tokens", "scale"]
    assert entry["outputs"] == ["scanned", "chosen"]


@needs_rtx
def test_a_failed_rebuild_changes_nothing(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    before = contents(folder)
    with pytest.raises(InputError, match="compute capability"):
        rebuild_bundle(folder, options=EngineOptions(compute_capabilities=("9.9",)))
    with pytest.raises(UnknownNameError, match=r"runs model.onnx as it is"):
        rebuild_bundle(folder, "onnxruntime")
    with pytest.raises(UnknownNameError, match="tensorrt-rtx"):
        rebuild_bundle(folder, "tensorrt-rtxx")
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    (folder / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(
        BundleError,
        match=r"model\.onnx .* does not match its manifest: 7 bytes, expected .* compile it again",
    ):
        rebuild_bundle(folder)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is no bundle"):
        rebuild_bundle(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(BundleError, match="not the manifest"):
        rebuild_bundle(tmp_path)


@needs_rtx
@without_gpu
def test_without_a_gpu_the_manifest_says_that_nothing_ran(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    entry = rebuild_bundle(folder).manifest["targets"]["tensorrt-rtx"]
    assert entry["run"] is False and entry["parity"] is None
    assert "no NVIDIA GPU" in entry["not_run"]


@needs_rtx
def test_what_compiling_refuses_rebuilding_refuses(tmp_path: Path) -> None:
    """An engine whose input has 16 bits would be handed memory of 32."""
    recipe = Recipe("small", precision="float16", io="same")
    folder = write_bundle(tmp_path / "same", engine=False, recipe=recipe)
    before = contents(folder)
    with pytest.raises(RecipeError, match='takes io = "float32" only'):
        rebuild_bundle(folder, "tensorrt-rtx")
    assert contents(folder) == before
    folder = write_bundle(tmp_path / "option", engine=False)
    with pytest.raises(InputError, match="takes no plugin library"):
        rebuild_bundle(folder, "tensorrt-rtx", plugin=tmp_path / "plugin.so")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["recipe"]["model"]
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(BundleError, match="recipe has no model"):
        rebuild_bundle(folder, "tensorrt-rtx")


@needs_rtx
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from quartermap_deploy.cli import program, rebuild

    if rebuild not in program.COMMANDS:
        pytest.skip("the command is not registered")
    folder = write_bundle(tmp_path / "bundle")
    assert run_command(["rebuild", str(folder), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["targets"]["tensorrt-rtx"]["version"]
    assert run_command(["rebuild", str(folder)]) == 0
    assert "compute capability 8.9" in capsys.readouterr().out
    assert run_command(["rebuild", str(tmp_path)]) == 2
