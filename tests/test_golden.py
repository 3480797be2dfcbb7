"""Golden files, and engines that are proved by them; the engines here are portable models, run by ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import Array
from test_source_modules import source

from quartermap_deploy.errors import BundleError, ParityError
from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession
from quartermap_deploy.targets.tensorrt.options import EngineOptions
from quartermap_deploy.validation.engines import NO_GOLDEN, engine_runner, golden_parity, prove_engine
from quartermap_deploy.validation.golden import (
    CASES,
    INPUTS_FILE,
    LARGEST,
    OUTPUTS_FILE,
    golden_cases,
    golden_runner,
    read_golden,
    write_golden,
)
from quartermap_deploy.validation.parity import check_parity
from quartermap_deploy.validation.runners import SessionRunner
from quartermap_deploy.validation.tolerances import tolerance_for

X = np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
FEEDS = {"images": {"first": X}, "large": {"first": 1e6 * X}, "single image": {"first": X[:1]}}
GOLDEN = ("images", "single image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle's golden files, of a module with one input and one output."""
    path = tmp_path_factory.mktemp("golden")
    write_golden(path, source().reference(None), FEEDS)
    return path


def wanted(feeds: Mapping[str, Array]) -> Array:
    return source().reference(None).run(feeds, double=True)["output"]


def model(factor: float = 1.0) -> onnx.ModelProto:
    """A model that looks its answer up: by the sum of its input, the golden output of it times a factor."""
    known = np.stack([wanted({"first": X[:1]})[0], wanted({"first": X[1:]})[0]]).astype(np.float32)
    sums = np.array([X[0].sum(), X[1].sum()], np.float32)
    text = """
<ir_version: 10, opset_import: ["": 20]>
answers (float[batch, 6, 4] first) => (float[batch, 3, 4] output) {
    sum = ReduceSum <keepdims = 0> (first, axes)
    column = Unsqueeze (sum, last)
    away = Sub (column, sums)
    far = Abs (away)
    place = ArgMin <axis = 1, keepdims = 0> (far)
    answer = Gather <axis = 0> (known, place)
    output = Mul (answer, factor)
}
"""
    found = onnx.parser.parse_model(text)
    for name, value in {
        "axes": np.array([1, 2]),
        "last": np.array([1]),
        "sums": sums,
        "known": known,
        "factor": np.array(factor, np.float32),
    }.items():
        found.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return found


class Portable:
    """A target whose engine is a portable model."""

    PRECISIONS = ("float32",)

    def __init__(self, factor: float = 1.0, reason: str | None = None) -> None:
        self.factor, self.reason = factor, reason
        self.opened: list[dict[str, Any]] = []

    def build(self, model_path: Path, directory: Path, options: EngineOptions, **more: Any) -> dict[str, Any]:
        return {"file": model_path.name, "built_in": directory, "options": options}

    def cannot_run(self, entry: Mapping[str, Any]) -> str | None:
        return self.reason

    def open(self, bundle_path: Path, entry: Mapping[str, Any], **how: Any) -> OnnxRuntimeSession:
        self.opened.append({"bundle": bundle_path, "entry": entry, **how})
        if "file" in entry:
            return OnnxRuntimeSession((bundle_path / entry["file"]).read_bytes())
        return OnnxRuntimeSession(model(self.factor).SerializeToString())


def entry(largest: int = 2) -> dict[str, Any]:
    """What the manifest says of an engine that takes batches of 1 to `largest`."""
    return {"options": {"profiles": [{"batch": [1, 1, largest]}]}, "inputs": {"first": ["batch", 6, 4]}}


def proved(target: Any, folder: Path, found: dict[str, Any], **more: Any) -> dict[str, Any]:
    return prove_engine(
        "engine", target, folder, found, "float32", GOLDEN, advice=lambda: "ask for help", **more
    )


def test_golden_cases_are_those_of_an_ordinary_scale() -> None:
    assert golden_cases(FEEDS) == {name: FEEDS[name] for name in GOLDEN}
    every = {name: {"first": X} for name in (*CASES, "large", "noise")}
    assert list(golden_cases(every)) == ["images", "single image", "example", "single example", "zeros"]


def test_what_was_written_is_read(folder: Path) -> None:
    inputs, outputs = read_golden(folder, GOLDEN)
    assert list(inputs) == list(GOLDEN)
    for name, found in zip(GOLDEN, outputs, strict=True):
        np.testing.assert_array_equal(inputs[name]["first"], FEEDS[name]["first"])
        np.testing.assert_array_equal(found["output"], wanted(FEEDS[name]))
        assert list(found) == ["output"], "the model's own outputs, and none of its blocks"


def test_polygraphy_reads_what_was_written(folder: Path) -> None:
    from polygraphy.comparator import RunResults

    results = RunResults.load(str(folder / OUTPUTS_FILE))
    assert [name for name, _ in results.items()] == ["pytorch-float64"]
    assert [iteration["output"].shape for iteration in results["pytorch-float64"]] == [(2, 3, 4), (1, 3, 4)]


def swapped(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        (path / name).write_text(json.dumps(change(json.loads((path / name).read_text()))))

    return apply


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda path: (path / INPUTS_FILE).unlink(), GOLDEN),
        (lambda path: (path / OUTPUTS_FILE).write_text("{}"), GOLDEN),
        (swapped(INPUTS_FILE, lambda feeds: feeds[:1]), GOLDEN),
        (swapped(INPUTS_FILE, lambda feeds: feeds[:1]), GOLDEN[:1]),  # one input, two outputs
        (lambda path: None, (*GOLDEN, "zeros")),
        (lambda path: None, GOLDEN[:1]),
    ],
    ids=["absent", "empty", "a case less", "an output more", "too few", "too many"],
)
def test_golden_files_of_other_cases_are_refused(
    damage: Callable[[Path], None], names: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    for name in (INPUTS_FILE, OUTPUTS_FILE):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    damage(tmp_path)
    with pytest.raises(BundleError, match=r"the golden files in .* cannot be read"):
        read_golden(tmp_path, names)


def test_golden_files_have_a_bound(tmp_path: Path) -> None:
    """The file has no content, but for its size; it is refused before it is read."""
    assert LARGEST == 4 << 30
    with (tmp_path / INPUTS_FILE).open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(BundleError, match="has more than 4,294,967,296 bytes"):
        read_golden(tmp_path, GOLDEN)


def test_recorded_outputs_are_played_back_in_order_and_again() -> None:
    runner = golden_runner([{"y": X[:1]}, {"y": X[1:]}])
    for _ in range(2):
        with runner:
            for place in (0, 1):
                found = runner.infer({"first": X})
                np.testing.assert_array_equal(found["y"], X[place : place + 1])
                assert runner.last_inference_time() == 0.0
    assert runner.name == "golden outputs"


def test_a_session_is_compared_with_the_golden_outputs(folder: Path) -> None:
    tolerance = tolerance_for("float32").relative
    right = golden_parity(folder, GOLDEN, Portable().open(folder, {}), "engine", "float32")
    assert right.passed and list(right.cases) == list(GOLDEN) and right.target == "engine"
    assert right.tolerance == tolerance_for("float32")
    off = golden_parity(folder, GOLDEN, Portable(1 + 2 * tolerance).open(folder, {}), "engine", "float32")
    assert not off.passed and off.worst == pytest.approx(2 * tolerance, rel=0.05)
    half = golden_parity(folder, GOLDEN, Portable(1 + 2 * tolerance).open(folder, {}), "engine", "float16")
    assert half.passed and half.tolerance == tolerance_for("float16")


def test_a_runner_has_its_sessions_inputs_outputs_and_time(folder: Path) -> None:
    with SessionRunner(Portable().open(folder, {}), "engine") as runner:
        metadata = runner.get_input_metadata_impl()
        found = runner.infer({"first": X.astype(np.float64)}, check_inputs=False)
        assert 0 <= runner.last_inference_time() < 60
    ((name, item),) = metadata.items()
    assert (name, len(item.shape)) == ("first", 3) and str(item.dtype).lower() == "float32"
    assert list(found) == ["output"] and found["output"].dtype == np.float32


def test_outputs_of_16_bits_are_compared_in_float32(folder: Path) -> None:
    text = """
<ir_version: 10, opset_import: ["": 20]>
halves (float16[2] x) => (float16[2] y, int64[1] n) {
    y = Add (x, x)
    n = Shape (x)
}
"""
    halves = OnnxRuntimeSession(onnx.parser.parse_model(text).SerializeToString())
    with SessionRunner(halves, "halves") as runner:
        found = runner.infer({"x": np.array([1.0, 1.0001], np.float32)}, check_inputs=False)
    assert {name: value.dtype for name, value in found.items()} == {"y": np.float32, "n": np.int64}
    np.testing.assert_array_equal(found["y"], [2, 2])


def test_paths_of_blocks_reach_the_report(folder: Path) -> None:
    inputs, outputs = read_golden(folder, GOLDEN)
    runner = SessionRunner(Portable().open(folder, {}), "engine")
    tolerance = tolerance_for("float32")
    found = check_parity(golden_runner(outputs), runner, inputs, tolerance, {1: "encoder"})
    assert found.paths == {1: "encoder"} and found.reference == "golden outputs"
    assert check_parity(golden_runner(outputs), runner, inputs, tolerance).paths == {}


def test_an_engine_is_run_on_what_its_profile_takes(folder: Path) -> None:
    target = Portable()
    plugin = folder / "plugin.so"
    found = proved(target, folder, entry(), plugin=plugin)
    assert found["run"] is True and found["not_run"] is None
    assert found["parity"]["cases"] == list(GOLDEN)
    assert found["parity"]["worst_relative_error"] < 1e-6
    assert found["parity"]["tolerance"] == tolerance_for("float32").relative
    assert target.opened == [{"bundle": folder, "entry": entry(), "plugin": plugin, "built_here": True}]
    assert proved(Portable(), folder, entry(largest=1))["parity"]["cases"] == ["single image"]
    two = entry(largest=1)
    two["options"]["profiles"].append({"batch": [2, 2, 2]})
    assert proved(Portable(), folder, two)["parity"]["cases"] == list(GOLDEN)


def test_an_engine_that_departs_is_refused_with_advice(folder: Path) -> None:
    tolerance = tolerance_for("float32").relative
    assert proved(Portable(1 + 0.9 * tolerance), folder, entry())["run"]
    with pytest.raises(
        ParityError, match=r"output departs, on case 'images': .* Nothing was written; ask for help"
    ):
        proved(Portable(1 + 1.1 * tolerance), folder, entry())


def test_why_an_engine_did_not_run_is_told(folder: Path, tmp_path: Path) -> None:
    other = Portable(2.0, "it is for another GPU")
    assert proved(other, folder, entry()) == {
        "run": False,
        "not_run": "it is for another GPU",
        "parity": None,
    }
    larger = {**entry(), "options": {"profiles": [{"batch": [4, 4, 8]}]}}
    nothing = {"run": False, "not_run": NO_GOLDEN, "parity": None}
    assert proved(Portable(2.0), folder, larger) == nothing
    assert proved(Portable(2.0), tmp_path, entry()) == nothing
    assert other.opened == []


def test_a_localisation_builds_an_engine_for_each_model(tmp_path: Path) -> None:
    target, options = Portable(), EngineOptions(plugin=tmp_path / "plugin.so")
    make = engine_runner("engine", target, tmp_path, options)  # type: ignore[arg-type]
    for factor in (1.0, 3.0):
        with make(model(factor)) as runner:
            found = runner.infer({"first": X})
        np.testing.assert_allclose(found["output"], factor * wanted({"first": X}), rtol=1e-5)
        assert runner.name == "engine"
    how = target.opened[-1]
    assert (how["bundle"], how["plugin"], how["built_here"]) == (tmp_path, options.plugin, True)
    assert how["entry"] == {"file": "model.onnx", "built_in": tmp_path, "options": options}
