"""What the two sides of a comparison return, on graphs and references written by hand: nothing is exported."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import Array, run
from onnx import TensorProto, numpy_helper
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from quartermap_deploy.errors import BundleError, ParityError
from quartermap_deploy.progress import SILENT
from quartermap_deploy.targets.execution import ON_CPU, Execution
from quartermap_deploy.targets.onnxruntime import opening
from quartermap_deploy.targets.onnxruntime import session as sessions
from quartermap_deploy.targets.scan_form import ScanForm
from quartermap_deploy.tensor_info import TensorInfo
from quartermap_deploy.validation import engines, forms, runners
from quartermap_deploy.validation.comparison import compare_output
from quartermap_deploy.validation.golden import golden_runner
from quartermap_deploy.validation.parity import ParityReport, check_parity, quiet_polygraphy
from quartermap_deploy.validation.rounding import has_16_bits, rounded_in_float32
from quartermap_deploy.validation.runners import (
    NATIVE,
    TorchRunner,
    onnxruntime_runner,
    with_block_outputs,
)
from quartermap_deploy.validation.tolerances import tolerance_for

TOLERANCE = tolerance_for("float32")


def parsed(text: str, **weights: Array) -> onnx.ModelProto:
    """A graph in ONNX's own notation, with weights."""
    header = '<ir_version: 10, opset_import: ["": 20, "quartermap": 1]>\n'
    model = onnx.parser.parse_model(header + text)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


def shown(graph: onnx.GraphProto) -> list[tuple[str, list[str], list[str]]]:
    return [(node.op_type, list(node.input), list(node.output)) for node in graph.node]


# The reference ----------------------------------------------------------------------------------------------------


class Parts:
    """A reference that keeps how it was run."""

    inputs = (TensorInfo("x", ("batch", 2)), TensorInfo("ids", (3,), "int64"))

    def __init__(self, scans: object = None) -> None:
        self.scans = scans
        self.told: list[Any] = []

    def run(self, feeds: Any, *, double: bool = False) -> dict[str, Any]:
        self.told.append(("run", feeds, double))
        return {"logits": 1}

    def run_parts(self, feeds: Any, followed: Any = None, *, double: bool = False) -> dict[str, Any]:
        self.told.append(("parts", feeds, followed, double))
        return {"block_1/scan": 2, "block_1": 3, "block_2/scan": 4, "block_2": 5, "other": 6}


EVERYTHING = ["block_1/scan", "block_1", "block_2/scan", "block_2", "other", "logits"]


def reference(own: Parts, **how: bool) -> TorchRunner:
    return TorchRunner(own, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("double", [False, True])
def test_the_reference_returns_its_parts_and_then_its_outputs(double: bool) -> None:
    own, feeds = Parts(), {"x": 0}
    runner = reference(own, double=double)
    assert runner.name == "torch"
    assert list(runner.infer_impl(feeds)) == EVERYTHING
    assert own.told == [("parts", feeds, None, double), ("run", feeds, double)]
    assert 0 <= runner.inference_time < 60
    alone = Parts()
    assert list(reference(alone, blocks=False, double=double).infer_impl(feeds)) == ["logits"]
    assert alone.told == [("run", feeds, double)]
    assert [told[-1] for told in (own.told if double else [])] == [True] * (2 if double else 0)
    plain = Parts()
    reference(plain).infer_impl(feeds)
    assert plain.told == [("parts", feeds, None, False), ("run", feeds, False)]


def test_the_reference_has_its_inputs_types() -> None:
    found = reference(Parts()).get_input_metadata_impl()
    assert {name: (str(item.dtype), len(item.shape)) for name, item in found.items()} == {
        "x": ("float32", 2),
        "ids": ("int64", 1),
    }
    session: Any = SimpleNamespace(inputs=Parts.inputs)
    runner = runners.SessionRunner(session, "engine")
    assert runner.name == "engine"
    found = runner.get_input_metadata_impl()
    assert {name: len(item.shape) for name, item in found.items()} == {"x": 2, "ids": 1}


def test_a_target_is_followed_batch_by_batch() -> None:
    own = Parts()
    runner = reference(own)
    runner.follow([{"block_1": 7}, {"block_2": 8}])
    for batch in range(3):
        assert list(runner.infer_impl({"x": batch})) == EVERYTHING, (
            "a model of ours has every block as a value"
        )
    assert [told[2] for told in own.told if told[0] == "parts"] == [{"block_1": 7}, {"block_2": 8}, None]


def test_of_a_foreign_module_blocks_are_judged_where_the_target_has_them() -> None:
    """A recovered scan may have taken a block's output with it; a scan has to be there."""
    own = Parts(scans="some")
    runner = reference(own)
    assert list(runner.infer_impl({})) == EVERYTHING
    runner.follow([{"block_2": 8}])
    assert list(runner.infer_impl({})) == [name for name in EVERYTHING if name != "block_1"]


# The graph, with the outputs of scans and blocks ------------------------------------------------------------------

BLOCKS = """
g (float[1, 2, 3, 4] x) => (float[1, 2, 3, 4] y, float[1, 2, 3, 4] last) <float[1, 2, 3, 4] s1, float[2] a> {
    a = Abs (x)
    [block_1_scan] s1 = quartermap.SelectiveScan2D (a)
    block_1 = Relu (s1)
    [block_2_scan] s2 = quartermap.SelectiveScan (block_1)
    block_2 = Add (s2, s2)
    [block_9_scan] none = quartermap.Other (block_2)
    [block_8_scan] plain = Identity (none)
    y = Neg (plain)
    [block_3_scan] last = quartermap.SelectiveScan2D (y)
}
"""


def blocks() -> onnx.ModelProto:
    model = parsed(BLOCKS)
    for node in model.graph.node:
        node.name = node.name.replace("_scan", "/scan")
    return model


def test_scans_and_blocks_become_outputs_before_the_models_own() -> None:
    model = blocks()
    before = model.SerializeToString()
    marked = with_block_outputs(model)
    assert model.SerializeToString() == before
    assert shown(marked.graph) == [
        ("Abs", ["x"], ["a"]),
        ("SelectiveScan2D", ["a"], ["block_1/scan"]),
        ("Relu", ["block_1/scan"], ["block_1"]),
        ("SelectiveScan", ["block_1"], ["block_2/scan"]),
        ("Add", ["block_2/scan", "block_2/scan"], ["block_2"]),
        ("Other", ["block_2"], ["none"]),
        # The last node of a scan that is written out.
        ("Identity", ["none"], ["block_8/scan"]),
        ("Neg", ["block_8/scan"], ["y"]),
        ("SelectiveScan2D", ["y"], ["last"]),
        ("Identity", ["last"], ["block_3/scan"]),
    ]
    names = ["block_1/scan", "block_1", "block_2/scan", "block_2", "block_8/scan", "block_3/scan"]
    assert [item.name for item in marked.graph.output] == [*names, "y", "last"]
    assert {item.type.tensor_type.elem_type for item in marked.graph.output} == {TensorProto.FLOAT}
    assert [item.name for item in marked.graph.value_info] == ["a"], (
        "shapes under old names belong to no value"
    )


def test_an_output_that_has_a_blocks_name_already_is_one_output() -> None:
    model = parsed("g (float[2] x) => (float[2] block_1) { block_1 = quartermap.SelectiveScan (x) }")
    model.graph.node[0].name = "block_1"
    marked = with_block_outputs(model)
    assert [item.name for item in marked.graph.output] == ["block_1"] and len(marked.graph.node) == 1


def test_the_target_is_the_portable_form_or_the_native_one(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def open_session(data: bytes, **how: Any) -> Any:
        told.append((data, how))
        return SimpleNamespace(session="a session")

    monkeypatch.setattr(runners, "open_session", open_session)
    model = blocks()
    data = with_block_outputs(model).SerializeToString()
    gpu = Execution.of_device("cuda")
    for how, name, opened in (
        ({}, "onnxruntime", {"native": False, "execution": ON_CPU}),
        ({"native": False}, "onnxruntime", {"native": False, "execution": ON_CPU}),
        ({"native": True}, NATIVE, {"native": True, "execution": ON_CPU}),
        ({"native": None, "execution": gpu}, f"onnxruntime by {gpu}", {"native": None, "execution": gpu}),
    ):
        runner = onnxruntime_runner(model, **how)  # type: ignore[arg-type]
        with runner:
            assert (runner.name, runner.sess) == (name, "a session")
        assert told.pop() == (data, opened)
    assert not told


# The rounded form -------------------------------------------------------------------------------------------------

TYPED = """
g (float16[2] x, float[2] f) => (float16[2] y, float[2] z, float16[1] last) {
    a = Mul (x, w)
    moved = Identity (a)
    wide = Cast <to = 1> (moved)
    half = Cast <to = 10> (f)
    [inner] s = quartermap.SelectiveScan (half)
    other = quartermap.SelectiveScan (s)
    y = Add (s, other)
    z = Add (wide, f)
    k = Constant <value = float16[2] {0, 0}> ()
    first, second = Split <axis = 0, num_outputs = 2> (k)
    [outer] last = quartermap.SelectiveScan (first)
}
"""


def typed() -> onnx.ModelProto:
    model = parsed(TYPED, w=np.float16([0.1, 3]), unused=np.float32([1]))
    constant = next(node for node in model.graph.node if node.op_type == "Constant")
    constant.attribute[0].t.CopyFrom(numpy_helper.from_array(np.float16([0.2, 5]), "value"))
    return model


def test_every_16_bit_value_is_computed_in_float32_and_rounded() -> None:
    model = typed()
    before = model.SerializeToString()
    form = rounded_in_float32(model)
    assert model.SerializeToString() == before

    def rounded(name: str, unrounded: str = "") -> list[tuple[str, list[str], list[str]]]:
        half = f"rounded/{name}"
        return [("Cast", [unrounded or f"{name}/unrounded"], [half]), ("Cast", [half], [name])]

    assert shown(form.graph) == [
        *rounded("x/rounded", "x"),
        ("Mul", ["x/rounded", "w"], ["a/unrounded"]),
        *rounded("a"),
        ("Identity", ["a"], ["moved"]),
        ("Cast", ["moved"], ["wide"]),
        ("Cast", ["f"], ["half/unrounded"]),
        *rounded("half"),
        ("SelectiveScan", ["half"], ["s/unrounded"]),
        *rounded("inner", "s/unrounded"),
        ("SelectiveScan", ["inner"], ["other/unrounded"]),
        *rounded("other"),
        ("Add", ["inner", "other"], ["y/unrounded"]),
        *rounded("y"),
        ("Add", ["wide", "f"], ["z"]),
        ("Constant", [], ["k/unrounded"]),
        *rounded("k"),
        ("Split", ["k"], ["first", "second"]),
        ("SelectiveScan", ["first"], ["last/unrounded"]),
        *rounded("last"),
    ]
    # The rounded value has the scan's name; the scan itself gets another, as names of nodes are unique.
    assert [node.name for node in form.graph.node if node.op_type == "SelectiveScan"] == [
        "inner/unrounded",
        "",
        "outer",
    ]
    types = [item.type.tensor_type.elem_type for item in (*form.graph.input, *form.graph.output)]
    assert types == [TensorProto.FLOAT] * 5
    targets = [node.attribute[0].i for node in form.graph.node if node.op_type == "Cast"]
    pair = [TensorProto.FLOAT16, TensorProto.FLOAT]
    assert targets == [*pair * 2, TensorProto.FLOAT, TensorProto.FLOAT, *pair * 6]
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in form.graph.initializer}
    assert {array.dtype.name for array in weights.values()} == {"float32"}
    np.testing.assert_array_equal(weights["w"], np.float16([0.1, 3]))
    (constant,) = (node.attribute[0].t for node in form.graph.node if node.op_type == "Constant")
    assert numpy_helper.to_array(constant).dtype == np.float32
    np.testing.assert_array_equal(numpy_helper.to_array(constant), np.float16([0.2, 5]))


def test_one_16_bit_value_anywhere_is_enough() -> None:
    wide = "g (float[2] x) => (float[2] y) { y = Add (x, x) }"
    assert not has_16_bits(parsed(wide))
    assert has_16_bits(parsed(wide, unused=np.float16([1])))
    assert has_16_bits(parsed("g (float16[2] h, float[2] x) => (float[2] y) { y = Add (x, x) }"))
    model = parsed(wide)
    assert rounded_in_float32(model) is model


def test_16_bit_weights_that_are_inputs_too_are_rounded_once() -> None:
    model = parsed("g (float16[2] w, float[2] x) => (float[2] y) { v = Cast <to = 1> (w) y = Add (v, x) }")
    model.graph.initializer.append(numpy_helper.from_array(np.float16([0.1, 2]), "w"))
    form = rounded_in_float32(model)
    assert [node[0] for node in shown(form.graph)] == ["Cast", "Add"]
    found = run(form, {"x": np.zeros(2, np.float32)})["y"]
    np.testing.assert_array_equal(found, np.float16([0.1, 2]).astype(np.float32))


def test_attributes_that_only_look_like_types_stay() -> None:
    """`axis = 10` is no float16; neither is a cast to whole numbers, nor a table of them."""
    text = """
    g (float[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2] x, float16[2] h) => (int64[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2] y) {
        k = Constant <value = int64[2] {7, 9}> ()
        a = Softmax <axis = 10> (x)
        b = Cast <to = 7> (a)
        c = Cast <to = 7> (h)
        d = Add (b, c)
        y = Add (d, k)
    }"""
    form = rounded_in_float32(parsed(text))
    named = {node.output[0]: node.attribute[0] for node in form.graph.node if node.attribute}
    assert named["a"].i == 10
    assert named["b"].i == named["c"].i == TensorProto.INT64
    assert numpy_helper.to_array(named["k"].t).dtype == np.int64
    found = run(form, {"x": np.zeros([1] * 10 + [2], np.float32), "h": np.float32([3, 4])})["y"]
    assert found.ravel().tolist() == [10, 13]


# The comparison ---------------------------------------------------------------------------------------------------


class Times(BaseRunner):  # type: ignore[misc]
    """Returns its input times a factor, and keeps what it was fed."""

    def __init__(self, factor: float, name: str) -> None:
        super().__init__(name=name)
        self.factor, self.fed = factor, []  # type: ignore[var-annotated]

    def get_input_metadata_impl(self) -> Any:
        return TensorMetadata().add("x", np.dtype(np.float32), [None])

    def infer_impl(self, feed_dict: Mapping[str, Any]) -> dict[str, Any]:
        self.inference_time = 0.0
        self.fed.append(feed_dict["x"].tolist())
        return {"block_1": feed_dict["x"], "y": feed_dict["x"] * np.float32(self.factor)}


CASES = {"one": {"x": np.float32([1, 2])}, "two": {"x": np.float32([3, -4, 5])}}


def test_both_sides_get_the_cases_and_are_compared_in_order() -> None:
    right, wrong = Times(2, "right"), Times(3, "wrong")
    report = check_parity(right, wrong, CASES, TOLERANCE, {1: "layers.0"})
    assert right.fed == wrong.fed == [[1, 2], [3, -4, 5]]
    assert (report.reference, report.target, report.tolerance) == ("right", "wrong", TOLERANCE)
    assert report.paths == {1: "layers.0"} and not report.passed
    assert {name: [output.name for output in outputs] for name, outputs in report.cases.items()} == {
        "one": ["block_1", "y"],
        "two": ["block_1", "y"],
    }
    assert [outputs[1].relative_error for outputs in report.cases.values()] == [0.5, 0.5]
    assert [outputs[1].largest for outputs in report.cases.values()] == [4, 10]
    same = check_parity(Times(2, "right"), Times(2, "other"), CASES, TOLERANCE)
    assert same.passed and same.paths == {}


def test_a_reference_in_pytorch_follows_the_target() -> None:
    own = Parts()
    own.inputs = (TensorInfo("x", ("length",)),)  # type: ignore[assignment]
    own.run_parts = lambda feeds, followed=None, *, double=False: (  # type: ignore[method-assign]
        own.told.append(followed) or {"block_1": followed["block_1"]}
    )
    own.run = lambda feeds, *, double=False: {"y": feeds["x"] * np.float32(2)}  # type: ignore[method-assign]
    report = check_parity(reference(own), Times(2, "target"), CASES, TOLERANCE)
    assert report.passed
    assert [followed["block_1"].tolist() for followed in own.told] == [[1, 2], [3, -4, 5]]
    assert [sorted(followed) for followed in own.told] == [["block_1", "y"]] * 2


def test_polygraphy_says_nothing_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    with quiet_polygraphy(), pytest.raises(PolygraphyException):
        G_LOGGER.critical("it departs")
    said = capsys.readouterr()
    assert said.out == said.err == ""


# The native operator ----------------------------------------------------------------------------------------------


def report(error: float) -> ParityReport:
    outcome = compare_output("block_2", np.float32([1]), np.float32([1 + error]), 1e-3)
    return ParityReport("golden outputs", NATIVE, TOLERANCE, {"zeros": [outcome]})


def test_the_forms_that_can_be_judged_have_these_names() -> None:
    assert forms.FORMS == ("both", "native", "portable")


@pytest.mark.parametrize(("error", "passed"), [(0.0, True), (0.5, False), (math.inf, False)])
def test_what_a_report_says_of_the_native_operator(error: float, passed: bool) -> None:
    own = report(error)
    assert forms.native_entry(ScanForm("native", "avx2"), own) == {
        "run": True,
        "not_run": None,
        "instruction_set": "avx2",
        "passed": passed,
        "worst_relative_error": None if math.isinf(error) else error,
        "first_departing_block": None if passed else 2,
        "cases": own.to_dict()["cases"],
    }


def test_a_report_says_why_the_native_operator_did_not_run() -> None:
    found = forms.native_entry(ScanForm("portable", reason="there is no library"), None)
    assert found == {"run": False, "not_run": "there is no library", "instruction_set": None}
    assert forms.native_entry(ScanForm("none"), None) is None


def test_the_native_operator_alone_is_refused_where_it_cannot_run(tmp_path: Any) -> None:
    forms.require_native(ScanForm("native", "avx2"), tmp_path / "model.onnx")
    for form, words in (
        (ScanForm("portable", reason="there is no library"), "there is no library"),
        (ScanForm("none"), "the model has no scans"),
    ):
        with pytest.raises(BundleError, match=f"does not run {tmp_path}/model.onnx: {words}"):
            forms.require_native(form, tmp_path / "model.onnx")


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """What a bundle's model is opened as."""
    found = SimpleNamespace(scans=ScanForm("native", "avx2"), opened=[])
    monkeypatch.setattr(
        sessions, "OnnxRuntimeSession", lambda path, **how: found.opened.append((path, how)) or found
    )
    yield found


def test_a_bundle_is_proved_with_the_native_operator(
    session: SimpleNamespace, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(engines, "golden_parity", lambda *arguments: told.append(arguments) or report(0.0))
    settings = (tmp_path, "own.onnx", ["zeros"], "float16", SILENT)
    assert forms.prove_native(*settings) == forms.native_entry(session.scans, report(0.0))
    assert told == [(tmp_path, ["zeros"], session, NATIVE, "float16")]
    assert session.opened == [(tmp_path / "own.onnx", {})]
    monkeypatch.setattr(engines, "golden_parity", lambda *arguments: report(0.5))
    with pytest.raises(
        ParityError, match=r"native operator departs .*\. Nothing was written, though the por"
    ):
        forms.prove_native(*settings)
    session.scans = ScanForm("portable", reason="there is no library")
    assert forms.prove_native(*settings) == forms.native_entry(session.scans, None)


def test_the_form_of_a_model_is_that_of_its_session(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(opening, "open_session", lambda path: ("session", f"form of {path}"))
    assert forms.native_form(tmp_path) == f"form of {tmp_path}"  # type: ignore[comparison-overlap]


def test_recorded_outputs_have_no_time() -> None:
    runner = golden_runner([{"y": np.float32([1])}])
    with runner:
        runner.infer({})
        assert runner.last_inference_time() == 0.0
