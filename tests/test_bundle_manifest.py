"""Bundles with manifests written by hand, which are whole or wrong in one place; nothing is compiled."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_bundle_parts import PAIR, X
from test_compiler_steps import keep  # noqa: F401  (fixture)
from toy_bundles import PREPROCESSING

import quartermap_deploy as qm
from quartermap_deploy import bundle as bundles
from quartermap_deploy import predicting
from quartermap_deploy.bundle import (
    FORMAT,
    MOST_VALUES,
    Bundle,
    check_destination,
    describe_file,
    load_bundle,
    new_bundle,
    operators,
    read_manifest,
)
from quartermap_deploy.errors import BundleError, InputError
from quartermap_deploy.progress import SILENT, Silent
from quartermap_deploy.sources.factories import UserModule
from quartermap_deploy.targets.execution import ON_CPU, Execution
from quartermap_deploy.targets.tensorrt.options import EngineOptions, Profile
from quartermap_deploy.tensor_info import TensorInfo
from quartermap_deploy.validation.tolerances import tolerance_for

RECIPE = qm.Recipe(
    "own",
    checkpoint=Path("weights.pth"),
    task="classification",
    labels=("cat", "dog"),
    module=UserModule("model.py:Net", {"x": (1, 2)}),
    preprocessing={"mean": [0.5]},
    dynamic_batch=False,
    quartermap=qm.QuarterMap(every=2, stride=3),
    precision="float16",
    keep_float32=("Conv_1",),
    blocks_float32=(2, 3),
    targets=("onnxruntime", "tensorrt"),
    engine=EngineOptions(profiles=(Profile((1, 2, 4)),), refit=True),
    images=Path("images"),
    reference=Path("saved.npz"),
    seed=3,
)
TOTALS = {"tokens": 1, "tokens_unpruned": 1, "flops": 1, "flops_unpruned": 1}
REPORT = {
    "passed": True,
    "reference": "torch",
    "target": "onnxruntime",
    "tolerance": tolerance_for("float32").to_dict(),
    "first_departing_block": None,
    "cases": [
        {
            "name": "zeros",
            "outputs": [{"name": "twice", "relative_error": 0.0, "passed": True, "detail": ""}],
        }
    ],
}


def manifest(folder: Path, **changes: Any) -> dict[str, Any]:
    """All that a manifest has to have, of the files in a folder."""
    counts = operators(onnx.load(folder / "model.onnx"))
    return {
        "format": FORMAT,
        "created": "today",
        "versions": {},
        "recipe": RECIPE.to_dict(),
        "model": {"name": "own", "title": "own", "source": "module", "parameters": 0, "weights": "its own"},
        "task": "other",
        "labels": ["cat", "dog"],
        "preprocessing": PREPROCESSING.to_dict(),
        "inputs": [TensorInfo("x", ("batch", 2)).to_dict()],
        "outputs": [TensorInfo(name, ("batch", 2)).to_dict() for name in ("twice", "sign")],
        "size_rules": ["x[0] <= 4"],
        "golden": [],
        "plan": None,
        "blocks": [],
        "totals": TOTALS,
        "graph": {**counts, "before": counts},
        "passes": [],
        "files": {
            path.name: describe_file(path) for path in folder.iterdir() if path.name != "manifest.json"
        },
        "targets": {"onnxruntime": {"file": "model.onnx"}},
        **changes,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle of a small graph."""
    path = tmp_path / "bundle"
    path.mkdir()
    onnx.save(onnx.parser.parse_model(PAIR), path / "model.onnx")
    (path / "report.json").write_text(json.dumps(REPORT))
    write(path)
    return path


def write(folder: Path, **changes: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest(folder, **changes)))


def test_a_bundle_says_what_its_manifest_says(folder: Path) -> None:
    bundle = load_bundle(str(folder))
    assert (bundle.path, bundle.manifest, bundle.report) == (folder, manifest(folder), REPORT)
    assert bundle.inputs == (TensorInfo("x", ("batch", 2)),)
    assert [item.name for item in bundle.outputs] == ["twice", "sign"]
    assert (bundle.task, bundle.labels, bundle.preprocessing) == ("other", ("cat", "dog"), PREPROCESSING)
    np.testing.assert_array_equal(bundle.run(X)["twice"], 2 * X)  # type: ignore[call-overload]
    with pytest.raises(InputError, match=r"x\[0\] <= 4"):
        bundle.run(np.zeros((5, 2), np.float32))


def test_its_recipe_is_the_one_that_was_written(folder: Path) -> None:
    found = load_bundle(folder).recipe()
    assert found == RECIPE
    assert found.module is not None and found.module.named_by == folder, "nobody agreed to run it"


def test_a_recipe_of_defaults_is_read_too(folder: Path) -> None:
    plain = qm.Recipe("vmamba_tiny_v0", input_size=(64, 96))
    write(folder, recipe=plain.to_dict(), labels=[])
    assert load_bundle(folder).recipe() == plain
    older = {
        key: value
        for key, value in plain.to_dict().items()
        if key in ("model", "quartermap", "targets", "precision", "input_size")
    }
    write(folder, recipe={**older, "input_size": None}, labels=[])
    assert load_bundle(folder).recipe() == dataclasses.replace(plain, input_size=None)


def with_recipe(**changes: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"recipe": {**RECIPE.to_dict(), **changes}}


def engine(options: dict[str, Any]) -> Callable[[Path], dict[str, Any]]:
    def changes(folder: Path) -> dict[str, Any]:
        (folder / "own.engine").write_bytes(b"engine")
        entry = {
            "file": "own.engine",
            "version": "10.7",
            "compute_capabilities": ["8.9"],
            "inputs": {},
            "outputs": [],
            "key": "0" * 64,
            "build": {"engine_bytes": 6},
            "options": options,
        }
        return {"targets": {"onnxruntime": {"file": "model.onnx"}, "tensorrt": entry}}

    return changes


WRONG: dict[str, tuple[Any, str]] = {
    "input": ({"inputs": [{"name": "x", "shape": [1], "type": "object"}]}, "is no input or output"),
    "output": ({"outputs": [{"name": "x", "shape": [1], "type": "object"}]}, "is no input or output"),
    "preprocessing": ({"preprocessing": {"crop": [4, 4]}}, "no mean"),
    "rule": ({"size_rules": ["exit()"]}, "no rule of sizes"),
    "plan": (with_recipe(quartermap={"evry": 3}), "evry"),
    "recipe": (with_recipe(surprise=1), "surprise"),
    "missing": (lambda folder: {"recipe": {"model": "own"}}, "recipe has no quartermap"),
    "options": (with_recipe(engine={"refitt": True}), "refitt"),
    "engine": (engine({"refitt": True}), "refitt"),
    "half": ({"created": "\ud800"}, "half a character"),
    "schema": ({"golden": None}, "golden is null, expected array"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_whatever_is_wrong_in_a_manifest_is_found_when_it_is_read(kind: str, folder: Path) -> None:
    changes, words = WRONG[kind]
    write(folder, **(changes(folder) if callable(changes) else changes))
    for read in (read_manifest, load_bundle):
        with pytest.raises(BundleError, match=f"manifest.json cannot be read: .*{words}"):
            read(folder)


def test_what_may_be_open_in_a_manifest_is(folder: Path) -> None:
    write(folder, preprocessing=None)
    assert load_bundle(folder).preprocessing is None
    write(folder, **engine({"refit": True})(folder))
    assert load_bundle(folder).target("tensorrt") == "tensorrt"


@pytest.mark.parametrize("form", [FORMAT - 1, FORMAT + 1, None])
def test_manifests_of_other_formats_are_told_from_damaged_ones(form: Any, folder: Path) -> None:
    write(folder, format=form)
    with pytest.raises(BundleError, match=f"has format {form}, this version of .* reads format 2; compile"):
        read_manifest(folder)


def test_manifests_have_a_bound(folder: Path) -> None:
    write(folder, golden=["a"] * (MOST_VALUES + 1))
    with pytest.raises(BundleError, match=f"more than {MOST_VALUES:,} "):
        read_manifest(folder)


def test_a_report_that_is_none_is_told_of(folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps({**REPORT, "cases": []}))
    write(folder)
    with pytest.raises(
        BundleError, match=r"report.json is not the report of a bundle: cases is .*compile it"
    ):
        load_bundle(folder)
    (folder / "report.json").write_text("{")
    write(folder)
    with pytest.raises(BundleError, match=r"report.json cannot be read"):
        load_bundle(folder)


def test_files_that_differ_or_are_not_listed_are_told_of(folder: Path) -> None:
    (folder / "manifest.sig").write_text("signatures are not listed")
    load_bundle(folder)
    for name in ("b.txt", "a.txt", "c.txt"):
        (folder / name).write_text("")
    with pytest.raises(BundleError, match=r"holds a.txt, which its manifest does not list"):
        load_bundle(folder)
    write(folder)
    load_bundle(folder)
    (folder / "c.txt").write_text("other")
    with pytest.raises(BundleError, match=r"c.txt in the bundle .* does not match"):
        load_bundle(folder)
    read_manifest(folder)


def test_signatures_are_asked_for_before_anything_is_believed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(bundles, "check_signatures", lambda *arguments: asked.append(arguments))
    load_bundle(folder)
    read_manifest(folder)
    assert asked == []
    data = (folder / "manifest.json").read_bytes()
    load_bundle(folder, signed_by=["key.pem"])
    read_manifest(folder, signed_by=("a.pem", "b.pem"))
    assert asked == [(folder, data, ["key.pem"]), (folder, data, ("a.pem", "b.pem"))]
    (folder / "manifest.json").write_text("{")
    with pytest.raises(BundleError):
        load_bundle(folder, signed_by=["key.pem"])
    assert asked[2:] == [(folder, b"{", ["key.pem"])]


# What is handed on ------------------------------------------------------------------------------------------------


def test_predicting_is_told_what_was_said(tmp_path: Path, keep: Any) -> None:  # noqa: F811
    told = keep(predicting, "predict", "predictions")
    own, progress = Bundle(tmp_path, {}, {}), Silent()
    assert own.predict("a.png") == "predictions"  # type: ignore[comparison-overlap]
    usual = {"top": 5, "batch": None, "target": None, "preprocessing": None, "labels": None}
    assert told == {"bundle": own, "files": "a.png", **usual, "progress": SILENT, "execution": ON_CPU}
    said = {
        "top": 2,
        "batch": 3,
        "target": "tensorrt",
        "preprocessing": {"mean": [0.5]},
        "labels": ["a"],
        "execution": Execution.of_device("cuda"),
    }
    own.predict(["b.png"], **said, progress=progress)  # type: ignore[arg-type]
    assert told == {"bundle": own, "files": ["b.png"], **said, "progress": progress}


def test_sessions_are_opened_as_they_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(name: str, path: Path, entry: Any, **how: Any) -> Any:
        return name, path, entry, how

    monkeypatch.setattr(bundles, "open_session", opened)
    targets = {"tensorrt": {"file": "an engine"}, "onnxruntime": {"file": "model.onnx"}}
    own = Bundle(tmp_path, {"targets": targets, "size_rules": ["rule"], "files": {"a": str(tmp_path)}}, {})
    for name, how in (
        ("tensorrt", {"plugin": tmp_path, "native": None}),
        ("tensorrt", {"plugin": None, "native": None}),
        ("onnxruntime", {"plugin": None, "native": True}),
        ("onnxruntime", {"plugin": None, "native": False}),
        ("onnxruntime", {"plugin": None, "native": None, "execution": Execution.of_device("cuda")}),
        (None, {"plugin": None, "native": None}),
    ):
        found = own.session(name, **how)  # type: ignore[arg-type]
        target, used = name or "onnxruntime", {"execution": ON_CPU, **how}
        assert found == (target, tmp_path, {**targets[target], "size_rules": ["rule"]}, used)  # type: ignore[comparison-overlap]
        assert own.session(name, **how) is found  # type: ignore[arg-type]
    for native in (True, False):
        with pytest.raises(InputError, match="an engine of tensorrt has no native operator for CPUs"):
            own.session("tensorrt", native=native)


def test_only_bundles_are_replaced(folder: Path) -> None:
    with pytest.raises(BundleError, match="exists already"):
        check_destination(folder, False)
    check_destination(folder, True)
    with pytest.raises(BundleError, match="exists already"), new_bundle(folder):
        pass
    with new_bundle(folder, True) as draft:
        (draft / "manifest.json").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    (folder / "manifest.json").rename(folder / "letter.txt")
    with pytest.raises(BundleError, match="exists and is no bundle, so --force"):
        check_destination(folder, True)


def test_what_lies_beside_a_model_is_not_read_with_it(folder: Path) -> None:
    """A graph whose weights are said to be in another file is refused, whatever that file is."""
    model = onnx.parser.parse_model(PAIR.replace("(x, x)", "(x, w)"))
    weights = onnx.numpy_helper.from_array(np.ones(2, np.float32), "w")
    model.graph.initializer.append(weights)
    onnx.external_data_helper.convert_model_to_external_data(model, location="w.bin", size_threshold=0)
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(BundleError):
        Bundle(folder, {"graph": operators(model)}, {}).check_graph()
