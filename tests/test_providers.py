"""Real execution providers of ONNX Runtime beside the CPU's: what they compute, what is said where they do not start.

Most of this needs another package of ONNX Runtime than the usual one, in an environment of its own: the tests are run
by its Python, and skip elsewhere. onnxruntime-openvino works on any x86-64 CPU; onnxruntime-gpu without a driver shows
what is said of a provider that is there and cannot start.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cpu_builds
import numpy as np
import onnxruntime
import pytest
import toy_bundles
from command_line import call

from quartermap_deploy.bundle import Bundle, load_bundle
from quartermap_deploy.errors import BundleError, MissingDependencyError
from quartermap_deploy.revalidate import validate_bundle
from quartermap_deploy.targets.execution import CPU, CUDA, OPENVINO, TENSORRT, Execution, Provider
from quartermap_deploy.targets.onnxruntime import probing
from quartermap_deploy.targets.onnxruntime.opening import started, tree_form
from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession
from quartermap_deploy.validation.golden import read_golden

AVAILABLE = onnxruntime.get_available_providers()
BELOW_TOLERANCE = 1e-5

needs_openvino = pytest.mark.skipif(OPENVINO not in AVAILABLE, reason="needs onnxruntime-openvino")
needs_cuda_package = pytest.mark.skipif(CUDA not in AVAILABLE, reason="needs onnxruntime-gpu")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(toy_bundles.classifier())


@pytest.fixture(scope="module")
def broken_cuda() -> probing.Probe:
    """What was found of CUDA where its package is installed and it does not start."""
    found = probing.probe(Provider(CUDA))
    if found.works:
        pytest.skip("CUDA works here")
    return found


@pytest.fixture(scope="module")
def working_cuda() -> Execution:
    if CUDA not in AVAILABLE:
        pytest.skip("needs onnxruntime-gpu")
    if not (found := probing.probe(Provider(CUDA))).works:
        pytest.skip(f"CUDA does not start here: {found.reason}")
    return Execution.of("cuda")


def golden(bundle: Bundle) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The first golden case: inputs and outputs."""
    cases, outputs = read_golden(bundle.path, bundle.manifest["golden"])
    return next(iter(cases.values())), outputs[0]


def worst(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    return max(
        float(np.abs(found[name] - value).max() / np.abs(value).max()) for name, value in expected.items()
    )


# Probes: the CPU provider is everywhere ------------------------------------------------------------------------------


def test_the_cpu_provider_works() -> None:
    found = probing.probe(Provider(CPU))
    assert found.starts and found.works and found.reason is None and 0 < found.seconds < probing.TIME_LIMIT


def test_a_provider_that_is_not_in_the_package_does_not_work() -> None:
    found = probing.probe(Provider("QNNExecutionProvider"))
    assert not found.starts and not found.works and found.reason


def test_a_provider_that_never_comes_back_is_ended() -> None:
    start = time.monotonic()
    found = probing.probe(Provider(CPU), 0.05)
    assert not found.works and found.reason == "it did not come back within 0.05 seconds"
    assert time.monotonic() - start < 20


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.kill(os.getpid(), 11)", "it ended the process by SIGSEGV"),
        ("import sys; print('hello'); sys.exit(3)", "it ended the process with exit code 3"),
    ],
)
def test_a_provider_that_ends_its_process(monkeypatch: pytest.MonkeyPatch, code: str, reason: str) -> None:
    monkeypatch.setattr(probing, "_CHILD", code)
    assert probing.probe.__wrapped__(Provider(CPU)).reason == reason


def test_a_wrong_result_is_not_working(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model is compared with NumPy: with other numbers there, the CPU provider is wrong, too."""
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
        f"import {probing.__name__} as probing\n"
        "right = probing._expected\nprobing._expected = lambda image: right(image) * 1.05\nprobing.main()"
    )
    monkeypatch.setattr(probing, "_CHILD", code)
    found = probing.probe.__wrapped__(Provider(CPU))
    assert found.starts and not found.works and "its result is wrong by 0.04" in str(found.reason)


def test_the_current_folder_is_not_imported_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime.py").write_text(
        "raise SystemExit('taken from the current folder')", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    assert probing.probe.__wrapped__(Provider(CPU)).works


def test_the_log_of_onnx_runtime_is_read() -> None:
    text = (
        "\x1b[1;31m2026-11-30 18:40:44.2 [E:onnxruntime:Default, provider_bridge_ort.cc:2458 operator()] "
        "/onnxruntime_src/onnxruntime/core/session/provider_bridge_ort.cc:2043 onnxruntime::Provider& "
        "onnxruntime::ProviderLibrary::Get() [ONNXRuntimeError] : 1 : FAIL : Failed to load library x.so with error: "
        "libcublasLt.so.13: cannot open shared object file\n\x1b[m\n"
        "\x1b[0;93m2026-11-30 18:40:44.3 [W:onnxruntime:Default, onnxruntime_pybind_state.cc:1295 Create] Failed to "
        "create CUDAExecutionProvider. Require cuDNN 9.*.\x1b[m\nnoise\n"
    )
    assert probing.log_text(text) == (
        "Failed to load library x.so with error: libcublasLt.so.13: cannot open shared object file; Failed to create "
        "CUDAExecutionProvider. Require cuDNN 9.*"
    )
    raised = RuntimeError(
        "/onnxruntime/onnxruntime/core/providers/openvino/openvino_provider_factory.cc:141 std::string "
        "onnxruntime::ParseDeviceType(std::shared_ptr<OVCore>, const Options&) [ERROR] [OpenVINO] Device GPU is gone"
    )
    assert probing.one_line(raised) == "[OpenVINO] Device GPU is gone"


# The form for devices, which any provider can run --------------------------------------------------------------------


def test_scans_without_a_loop_are_written_as_a_model_is_loaded(bundle: Bundle) -> None:
    inputs, outputs = golden(bundle)
    tree = tree_form(bundle.model_path)
    session = OnnxRuntimeSession(tree)
    assert session.scans.kind == "none"  # nothing of our domain is left in it
    assert worst(session.infer(inputs), outputs) <= BELOW_TOLERANCE


def test_that_needs_no_torch(bundle: Bundle) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from quartermap_deploy.targets.onnxruntime.opening import tree_form\n"
        f"assert tree_form(Path({str(bundle.model_path)!r}))\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


# OpenVINO ------------------------------------------------------------------------------------------------------------


@needs_openvino
@pytest.mark.parametrize("form", ["native", "portable"])
def test_openvino_computes_what_pytorch_does(
    bundle: Bundle, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "native":
        monkeypatch.setenv("QUARTERMAP_NATIVE", str(cpu_builds.library("all")))
    inputs, outputs = golden(bundle)
    execution = Execution.of(None, ["OpenVINO"])
    session = OnnxRuntimeSession(bundle.model_path, execution=execution)
    assert session.scans.kind == form
    assert worst(session.infer(inputs), outputs) <= BELOW_TOLERANCE
    placement = session.placement
    assert placement.providers == (OPENVINO, CPU) and placement.nodes is not None
    left = {"native": "SelectiveScan2D", "portable": "Scan"}[form]
    assert placement.on_cpu[left] > 0 and placement.nodes[OPENVINO] > 0
    assert placement.nodes[CPU] == sum(placement.on_cpu.values())
    (note,) = placement.notes()
    total = sum(placement.nodes.values())
    assert note.startswith(f"{placement.nodes[CPU]} of {total} nodes are not taken by OpenVINO")


@needs_openvino
def test_a_device_gets_scans_without_a_loop(bundle: Bundle) -> None:
    # OpenVINO's choice of a device may be a GPU; here there is the CPU alone.
    execution = Execution.of(None, ["OpenVINO:device_type=AUTO:CPU"])
    inputs, outputs = golden(bundle)
    session = OnnxRuntimeSession(bundle.model_path, execution=execution)
    assert session.scans.kind == "tree" and "memory of the CPU and of CUDA" in str(session.scans.reason)
    assert session.placement.nodes is not None and CPU not in session.placement.nodes
    assert session.placement.notes() == []
    assert worst(session.infer(inputs), outputs) <= BELOW_TOLERANCE
    portable = OnnxRuntimeSession(bundle.model_path, execution=execution, native=False)
    assert portable.scans.kind == "portable" and portable.placement.on_cpu["Scan"] > 0
    with pytest.raises(BundleError, match="the native operator cannot run"):
        OnnxRuntimeSession(bundle.model_path, execution=execution, native=True)


@needs_openvino
def test_openvino_that_cannot_start_says_why(bundle: Bundle) -> None:
    wanted = "OpenVINO:device_type=GPU.7"
    with pytest.raises(BundleError) as caught:
        bundle.session(execution=Execution.of(None, [wanted]))
    said = str(caught.value)
    assert "onnxruntime-openvino" in said and "cannot start" in said and "GPU.7" in said
    assert ".cc:" not in said and "--provider OpenVINO --provider CPU" in said
    session = bundle.session(execution=Execution.of(None, [wanted, "CPU"]))
    assert session.placement is not None and session.placement.providers == (CPU,)
    assert "GPU.7" in session.placement.left_out[OPENVINO]
    with pytest.raises(BundleError, match="frobnicate"):
        bundle.session(execution=Execution.of(None, ["OpenVINO:frobnicate=1"]))


@needs_openvino
def test_a_bundle_is_compiled_validated_and_run_by_openvino(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    done = call("compile", "vmamba_digits", "--every", 3, "--provider", "OpenVINO", "--out", out, "--quiet")
    assert done.code == 0 and any("not taken by OpenVINO" in line for line in done.messages), done.err
    bundle = load_bundle(out)
    entry, found = bundle.manifest["targets"]["onnxruntime"], bundle.report["execution"]
    assert entry["providers"] == found["providers"] == [OPENVINO, CPU]
    assert entry["nodes"] == found["nodes"] and found["nodes"][OPENVINO] > found["nodes"][CPU] > 0
    assert found["passed"] and 0 < found["worst_relative_error"] <= BELOW_TOLERANCE
    assert found["options"] == {OPENVINO: {"precision": "ACCURACY"}}
    assert bundle.recipe().execution.names == (OPENVINO,)
    # A bundle says where it was proved, and runs on the CPU unless somebody says otherwise.
    placement = bundle.session().placement
    assert placement is not None and placement.providers == (CPU,)
    for reference in ("golden", "torch"):
        report = validate_bundle(bundle, reference=reference, execution=Execution.of(None, ["openvino"]))
        assert report["passed"] and report["execution"]["providers"] == [OPENVINO, CPU]
    blocks = [output["name"] for case in report["cases"] for output in case["outputs"]]
    assert "block_1/scan" in blocks
    measured = call("eval", out, "--provider", "OpenVINO", "--limit", 20, "--json")
    assert measured.code == 0 and measured.json["execution"]["providers"] == [OPENVINO, CPU]
    shown = call("inspect", out)
    assert "OpenVINO" in shown.out


@needs_openvino
def test_a_server_says_which_providers_run_it(bundle: Bundle) -> None:
    from quartermap_deploy.serving.options import ServeOptions
    from quartermap_deploy.serving.startup import check_golden, make_plan, note_form, open_sessions

    plan = make_plan(bundle, ServeOptions(execution=Execution.of(None, ["OpenVINO"])))
    assert plan.workers == 1 and not plan.wide
    sessions = open_sessions(plan)
    (note,) = note_form(plan, sessions)
    assert "not taken by OpenVINO" in note
    assert (
        plan.model.properties["providers"] == f"{OPENVINO},{CPU}"
        and OPENVINO in plan.model.properties["nodes"]
    )
    assert check_golden(plan, sessions.different()) <= BELOW_TOLERANCE


@needs_openvino
def test_variants_are_compared_by_openvino(tmp_path: Path) -> None:
    outcome = call(
        "compare", "vmamba_digits", "--provider", "OpenVINO", "--every", 3, "--no-tome", "--no-portable",
        "--batch", 1, "--repeats", 2, "--limit", 8, "--json", "--quiet",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert outcome.json["device"] == "OpenVINO"
    assert any("not taken by OpenVINO" in note for note in outcome.json["notes"])
    entry = outcome.json["timings"][0]["variants"][1]
    assert entry["median_ms"] > 0 and entry["scan_ms"] is None


# CUDA that is installed and cannot start -----------------------------------------------------------------------------


@needs_cuda_package
def test_cuda_that_cannot_start_says_why(bundle: Bundle, broken_cuda: probing.Probe) -> None:
    assert not broken_cuda.starts and "CUDA" in str(broken_cuda.reason)
    with pytest.raises(BundleError) as caught:
        bundle.session(execution=Execution.of("cuda"))
    said = str(caught.value)
    assert "onnxruntime-gpu" in said and "cannot start" in said and str(broken_cuda.reason) in said
    assert "NVIDIA driver" in said and "--device auto" in said
    session = bundle.session(execution=Execution.of("auto"))
    assert session.placement is not None and session.placement.providers == (CPU,)
    assert session.placement.left_out == {CUDA: broken_cuda.reason}
    inputs, outputs = golden(bundle)
    assert worst(session.infer(inputs), outputs) <= BELOW_TOLERANCE


@needs_cuda_package
def test_a_wrong_library_is_named_by_cuda_itself(
    bundle: Bundle, broken_cuda: probing.Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of CUDA's libraries is found, and is none: what the loader says of it is inside our message."""
    missing = re.search(r"(lib\w+\.so\.\d+): cannot open shared object file", str(broken_cuda.reason))
    if missing is None:
        pytest.skip(f"CUDA lacks something else than a library: {broken_cuda.reason}")
    (tmp_path / missing[1]).write_text("of another release")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    probing.probe.cache_clear()
    try:
        with pytest.raises(BundleError) as caught:
            bundle.session(execution=Execution.of("cuda"))
    finally:
        probing.probe.cache_clear()
    said = str(caught.value)
    assert f"{tmp_path / missing[1]}: file too short" in said or f"{missing[1]}: invalid ELF header" in said
    assert "cannot start" in said and "cuDNN 9" in said


@needs_cuda_package
def test_tensorrt_that_cannot_start_says_why() -> None:
    if probing.probe(Provider(TENSORRT)).works:
        pytest.skip("TensorRT works here")
    with pytest.raises(BundleError, match="TensorRT's libraries"):
        started(Execution.of(None, ["TensorRT"]))
    found = started(Execution.of(None, ["TensorRT", "CUDA", "CPU"]))
    assert found.providers[-1].name == CPU and TENSORRT in found.left_out


@needs_cuda_package
def test_doctor_says_that_cuda_does_not_work(broken_cuda: probing.Probe) -> None:
    outcome = call("doctor", "--json")
    probes = {probe["provider"]: probe for probe in outcome.json["onnxruntime"]["probes"]}
    assert not probes[CUDA]["works"] and probes[CUDA]["reason"] and probes[CPU]["works"]


def test_what_no_package_here_has_is_refused() -> None:
    with pytest.raises(MissingDependencyError, match="onnxruntime-qnn"):
        started(Execution.of(None, ["QNN"]))
    found = started(Execution.of(None, ["QNN", "CPU"]))
    assert [provider.name for provider in found.providers] == [CPU] and len(found.left_out) == 1


# CUDA that works -----------------------------------------------------------------------------------------------------


def test_cuda_computes_what_pytorch_does(bundle: Bundle, working_cuda: Execution) -> None:
    inputs, outputs = golden(bundle)
    for native in (None, False):
        session = OnnxRuntimeSession(bundle.model_path, native=native, execution=working_cuda)
        assert session.placement.providers[0] == CUDA
        assert session.scans.kind == ("portable" if native is False else "tree")
        assert worst(session.infer(inputs), outputs) <= BELOW_TOLERANCE


def test_the_cuda_operator_computes_on_a_gpu(
    bundle: Bundle, working_cuda: Execution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quartermap_deploy.gpu import find_gpu
    from quartermap_deploy.native.build import find_nvcc
    from quartermap_deploy.native.cuda_library import build_cuda_library

    gpu = find_gpu()
    if gpu is None or find_nvcc() is None:
        pytest.skip("no GPU, or no nvcc")
    library = build_cuda_library(tmp_path, (f"{gpu.compute_capability.replace('.', '')}-real",))
    monkeypatch.setenv("QUARTERMAP_NATIVE_CUDA", str(library))
    inputs, outputs = golden(bundle)
    session = OnnxRuntimeSession(bundle.model_path, native=True, execution=working_cuda)
    assert str(session.scans) == "native (cuda)" and "SelectiveScan2D" not in session.placement.on_cpu
    for _ in range(3):  # by the plan that is kept, too
        assert worst(session.infer(inputs), outputs) <= BELOW_TOLERANCE
    one = session.infer({name: array[:1] for name, array in inputs.items()})
    assert worst(one, {name: array[:1] for name, array in outputs.items()}) <= BELOW_TOLERANCE
