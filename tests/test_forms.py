"""Both forms of a bundle's scans: which one runs, and that validation judges both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cpu_builds
import numpy as np
import onnx
import pytest
import toy_bundles
from numpy.typing import NDArray

from quartermap_deploy.bundle import REPORT, Bundle, load_bundle
from quartermap_deploy.errors import BundleError, ParityError
from quartermap_deploy.reading import read_json
from quartermap_deploy.revalidate import validate_bundle
from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession
from quartermap_deploy.validation.forms import prove_native
from quartermap_deploy.validation.golden import read_golden


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process have the library."""
    monkeypatch.setenv("QUARTERMAP_NATIVE", str(cpu_builds.library("all")))


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process have none."""
    monkeypatch.setenv("QUARTERMAP_NATIVE", "0")


@pytest.fixture
def departing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the native operator, and it alone, be wrong by more than the tolerance."""
    right = OnnxRuntimeSession.infer

    def wrong(self: OnnxRuntimeSession, feeds: Any) -> dict[str, NDArray[Any]]:
        found = right(self, feeds)
        return {k: v * 1.001 for k, v in found.items()} if self.scans.kind == "native" else found

    monkeypatch.setattr(OnnxRuntimeSession, "infer", wrong)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(toy_bundles.classifier())


def feeds(bundle: Bundle) -> dict[str, NDArray[Any]]:
    cases, _ = read_golden(bundle.path, bundle.manifest["golden"])
    return next(iter(cases.values()))


@pytest.mark.usefixtures("native")
def test_sessions_take_the_native_operator_and_can_be_told_not_to(bundle: Bundle) -> None:
    given = feeds(bundle)
    sessions = {
        wanted: OnnxRuntimeSession(bundle.model_path, native=wanted) for wanted in (None, True, False)
    }
    assert [str(s.scans).split()[0] for s in sessions.values()] == ["native", "native", "portable"]
    assert sessions[None].scans.instruction_set and sessions[None].scans.reason is None
    assert sessions[False].scans.reason == "it was not wanted"
    results = {wanted: session.infer(given) for wanted, session in sessions.items()}
    for name, value in results[False].items():
        np.testing.assert_array_equal(results[None][name], results[True][name])
        assert not np.array_equal(results[None][name], value)  # another form did run
        assert np.abs(results[None][name] - value).max() <= 1e-5 * np.abs(value).max()


@pytest.mark.usefixtures("without")
def test_without_a_library_the_portable_form_runs_and_says_why(bundle: Bundle) -> None:
    session = OnnxRuntimeSession(bundle.model_path)
    assert session.scans.kind == "portable" and "QUARTERMAP_NATIVE=0" in str(session.scans.reason)
    with pytest.raises(BundleError, match="QUARTERMAP_NATIVE=0"):
        OnnxRuntimeSession(bundle.model_path, native=True)


@pytest.mark.usefixtures("native")
def test_a_model_that_the_operator_refuses_runs_in_the_portable_form(bundle: Bundle) -> None:
    model = onnx.load(bundle.model_path)
    scans = [node for node in model.graph.node if node.op_type == "SelectiveScan2D"]
    for attribute in scans[0].attribute:
        if attribute.name == "order":
            attribute.s = b"row,row,row,row"
    session = OnnxRuntimeSession(model.SerializeToString())
    assert session.scans.kind == "portable" and "order" in str(session.scans.reason)
    expected = OnnxRuntimeSession(bundle.model_path, native=False).infer(feeds(bundle))
    for name, value in session.infer(feeds(bundle)).items():
        np.testing.assert_array_equal(value, expected[name])


@pytest.mark.usefixtures("native")
def test_a_model_without_scans_says_so() -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Abs", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "none", [value], [result])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    assert str(OnnxRuntimeSession(model.SerializeToString()).scans) == "no scans"


@pytest.mark.usefixtures("native")
def test_validation_judges_both_forms_or_the_one_that_is_asked_for(bundle: Bundle) -> None:
    both = validate_bundle(bundle)
    assert both["passed"] and both["target"] == "onnxruntime"
    assert both["native"]["run"] and both["native"]["passed"] and both["native"]["instruction_set"]
    assert [case["name"] for case in both["native"]["cases"]] == [case["name"] for case in both["cases"]]
    assert both["native"]["worst_relative_error"] != both["worst_relative_error"]
    portable = validate_bundle(bundle, scans="portable")
    assert portable["native"] is None and portable["cases"] == both["cases"]
    native = validate_bundle(bundle, scans="native")
    assert native["target"] == "onnxruntime with the native operator" and "native" not in native
    assert native["cases"] == both["native"]["cases"]
    with pytest.raises(BundleError, match=r"'fast'; expected one of both, native, portable"):
        validate_bundle(bundle, scans="fast")


@pytest.mark.usefixtures("without")
def test_validation_says_why_the_native_operator_did_not_run(bundle: Bundle) -> None:
    report = validate_bundle(bundle)
    assert report["passed"] and not report["native"]["run"]
    assert "QUARTERMAP_NATIVE=0" in report["native"]["not_run"]
    with pytest.raises(BundleError, match="QUARTERMAP_NATIVE=0"):
        validate_bundle(bundle, scans="native")


@pytest.mark.usefixtures("native", "departing")
def test_a_native_operator_that_departs_fails_the_bundle(bundle: Bundle) -> None:
    report = validate_bundle(bundle)
    assert not report["passed"] and not report["native"]["passed"]
    assert all(output["passed"] for case in report["cases"] for output in case["outputs"])
    assert validate_bundle(bundle, scans="portable")["passed"]
    with pytest.raises(ParityError, match=r"native operator departs .*QUARTERMAP_NATIVE=0"):
        prove_native(bundle.path, "model.onnx", bundle.manifest["golden"], "float32")


def test_the_report_of_a_bundle_tells_of_the_native_operator(bundle: Bundle) -> None:
    entry = read_json(Path(bundle.path) / REPORT)["native"]
    assert entry["run"] == (entry["not_run"] is None) == (entry["instruction_set"] is not None)
    if entry["run"]:
        assert entry["passed"] and 0 <= entry["worst_relative_error"] <= 1e-4
