"""The operator for ONNX Runtime's CUDA provider.

Without a GPU its kernels run on the CPU, emulated, as an operator of the CPU provider: everything between ONNX Runtime
and the kernels' C interface then runs as on a device, but the stream. The library for devices is built with nvcc where
that is wanted (QUARTERMAP_TEST_NVCC=1: it takes minutes), and loaded by an ONNX Runtime that has no CUDA.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import plugin_builds
import pytest
import torch
from helpers import ONNX_TYPES, Array, ScanCase, error, scan_case, scan_feeds, scan_model
from onnx import helper

from quartermap_deploy.native import cuda_library
from quartermap_deploy.native.build import BuildOptions, build_plugin, find_nvcc, plugin_sources
from quartermap_deploy.native.cuda_library import find_cuda_library, load_cuda_library, sources_hash
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.targets.execution import CUDA
from quartermap_deploy.targets.onnxruntime.opening import _cuda_operator

TOLERANCE = 2e-6
HALF_STEP = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with the kernels on the CPU."""
    plugin_builds.require_compiler()
    options = BuildOptions(onnxruntime=True, emulation=True, optimisation="-O1")
    folder = plugin_builds.once(
        plugin_builds.shared_folder(tmp_path_factory),
        "emulated-onnxruntime",
        lambda path: build_plugin(path, options, cache=plugin_builds.OBJECTS),
    )
    return folder / options.library


def open_session(model: onnx.ModelProto, library: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def model_of(case: ScanCase, dtype: torch.dtype = torch.float32, *, body: bool = False) -> onnx.ModelProto:
    """A model of one scan, which says its order as compiled ones do; without its body nothing else can run it."""
    model = scan_model([case.variant], dtype)
    (node,) = [node for node in model.graph.node if node.op_type == "SelectiveScan2D"]
    node.attribute.append(helper.make_attribute("order", ",".join(case.directions)))
    if not body:
        del model.functions[:]
    return model


def run(session: Any, feeds: Mapping[str, Array]) -> Array:
    return np.asarray(session.run(None, dict(feeds))[0])


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 2, "d_inner": 5, "height": 7, "width": 9, "d_state": 1, "rank": 3},
        {"d_inner": 6, "height": 4, "width": 6, "d_state": 16, "rank": None},
        {"d_inner": 4, "rank": 2, "directions": ("column_reverse", "row")},
        {"d_inner": 3, "height": 1, "width": 1, "rank": 1, "softplus": False},
    ],
    ids=str,
)
def test_the_operator_equals_the_definition(emulated: Path, options: dict[str, Any]) -> None:
    case = scan_case(**options)
    y = run(open_session(model_of(case), emulated), scan_feeds(case))
    assert error(y, case.expected(torch.float32)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_element_types_of_16_bits(emulated: Path, dtype: torch.dtype) -> None:
    case = scan_case(2, 4, 5, 6, d_state=1, rank=2)
    model = model_of(case, dtype)
    # NumPy has no bfloat16, so the border of the model is float32.
    feeds = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        name = value.name
        feeds[name] = np.asarray(scan_feeds(case)[name], dtype=np.float32)
        if kind.elem_type == ONNX_TYPES[dtype]:
            kind.elem_type = onnx.TensorProto.FLOAT
            for node in model.graph.node:
                node.input[:] = [f"{name}_cast" if own == name else own for own in node.input]
            cast = helper.make_node("Cast", [name], [f"{name}_cast"], to=ONNX_TYPES[dtype])
            model.graph.node.insert(0, cast)
    output = model.graph.output[0]
    model.graph.node.append(helper.make_node("Cast", [output.name], ["wide"], to=onnx.TensorProto.FLOAT))
    output.name, output.type.tensor_type.elem_type = "wide", onnx.TensorProto.FLOAT
    y = run(open_session(model, emulated), feeds)
    assert error(y, case.expected(dtype)) <= HALF_STEP[dtype] + 2e-3


def test_sizes_change_between_runs_and_threads(emulated: Path) -> None:
    first = scan_case(d_inner=4, height=6, width=7)
    session = open_session(model_of(first), emulated)
    # With the same batch, and the same height or width, too.
    sizes = ((1, 6, 7), (3, 1, 20), (2, 9, 8), (1, 6, 7), (1, 6, 5), (1, 8, 5))
    cases = [scan_case(batch, 4, h, w) for batch, h, w in sizes]
    with ThreadPoolExecutor(3) as pool:
        for case, y in zip(cases, pool.map(lambda case: run(session, scan_feeds(case)), cases), strict=True):
            assert error(y, case.expected(torch.float32)) <= TOLERANCE
    empty = {name: a[:0] if a.ndim == 4 else a for name, a in scan_feeds(first).items()}
    assert run(session, empty).shape == (0, 4, 6, 7)


class Scan(ctypes.Structure):
    """QuartermapScan of `quartermap/selective_scan.h`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "d_inner", "height", "width", "d_state", "dt_rank")),
        ("direction_count", ctypes.c_int32),
        ("directions", ctypes.c_int32 * 8),
        ("softplus", ctypes.c_int32),
        ("element_type", ctypes.c_int32),
    )


def test_a_scan_that_needs_a_workspace_gets_one(emulated: Path) -> None:
    """In 16 bits, a map that is too large for a block's shared memory."""
    case = scan_case(1, 1, 192, 256, d_state=1, rank=1)
    scan = Scan(1, 1, 192, 256, 1, 1, len(case.directions), (ctypes.c_int32 * 8)(0, 1, 2, 3), 1, 1)
    workspace = ctypes.CDLL(str(emulated)).quartermap_selective_scan_workspace
    workspace.restype = ctypes.c_uint64
    assert workspace(ctypes.byref(scan)) > 0
    session = open_session(model_of(case, torch.float16), emulated)
    y = run(session, scan_feeds(case, torch.float16))
    assert error(y, case.expected(torch.float16)) <= 2e-3


def test_what_the_kernels_do_not_take_is_refused_with_the_node(emulated: Path) -> None:
    case = scan_case(1, 2, 3, 4, directions=("row",) * 9, rank=1)
    with pytest.raises(Exception, match=r"node '.*': 9 directions; the CUDA kernels take 8 at most"):
        run(open_session(model_of(case), emulated), scan_feeds(case))
    wrong = scan_case(1, 3, 4, 5, rank=2)
    feeds = dict(scan_feeds(wrong))
    name = next(name for name in feeds if name.endswith("/B"))
    feeds[name] = feeds[name][:, :-1]
    with pytest.raises(Exception, match=r"input B is \(.*\), expected"):
        run(open_session(model_of(wrong), emulated), feeds)


# Which library is taken ----------------------------------------------------------------------------------------------


def test_a_library_for_tests_is_not_taken(emulated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginError, match="for tests alone"):
        load_cuda_library(emulated)
    monkeypatch.setenv("QUARTERMAP_NATIVE_CUDA", str(emulated))
    assert find_cuda_library().library is None and "for tests alone" in find_cuda_library().summary
    assert "for tests alone" in str(_cuda_operator({"SelectiveScan2D"}))


def test_kernels_without_the_operator_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    kernels = plugin_builds.emulated_kernels(tmp_path_factory)
    with pytest.raises(PluginError, match="no operator of ONNX Runtime"):
        load_cuda_library(kernels)


def test_another_release_is_refused(emulated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cuda_library, "differences", lambda found: ["kernels: the library has 1, this package 2"]
    )
    with pytest.raises(PluginError, match="does not fit this release"):
        load_cuda_library(emulated)


def test_where_a_library_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path))
    monkeypatch.delenv("QUARTERMAP_NATIVE_CUDA", raising=False)
    assert "quartermap native build --cuda" in find_cuda_library().summary
    monkeypatch.setenv("QUARTERMAP_NATIVE_CUDA", "0")
    assert "turned off" in find_cuda_library().summary
    monkeypatch.setenv("QUARTERMAP_NATIVE_CUDA", "lib.so")
    assert "from / on" in find_cuda_library().summary
    monkeypatch.setenv("QUARTERMAP_NATIVE_CUDA", str(tmp_path / "none.so"))
    assert find_cuda_library().library is None and "none.so" in find_cuda_library().summary


def test_scans_of_sequences_are_left_to_the_portable_form() -> None:
    assert "SelectiveScan" in str(_cuda_operator({"SelectiveScan", "SelectiveScan2D"}))


def test_the_hash_is_of_the_sources_of_this_library_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(plugin_sources(), tmp_path / "plugins")
    monkeypatch.setattr(cuda_library, "plugin_sources", lambda: copy)
    first = sources_hash.__wrapped__()
    assert first == sources_hash()
    (copy / "kernels" / "cpu" / "simd.h").write_text("// another", encoding="utf-8")
    (copy / "tensorrt" / "log.h").write_text("// another", encoding="utf-8")
    assert sources_hash.__wrapped__() == first
    (copy / "onnxruntime_cuda" / "stream.h").write_text("// another", encoding="utf-8")
    assert sources_hash.__wrapped__() != first


@pytest.mark.skipif(
    os.environ.get("QUARTERMAP_TEST_NVCC") != "1", reason="QUARTERMAP_TEST_NVCC=1 builds with nvcc"
)
def test_the_library_for_devices_is_built_and_does_no_harm_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_nvcc() is None:
        pytest.skip("no nvcc")
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path))
    path = cuda_library.build_cuda_library(architectures=("90-real",))
    found = find_cuda_library().library
    assert found is not None and found.path == path and found.architectures == "90-real"
    assert _cuda_operator({"SelectiveScan2D"}) == path
    if CUDA in onnxruntime.get_available_providers():
        return
    # Its operator is for a provider that this ONNX Runtime has not: said, and nothing else happens.
    case = scan_case()
    with pytest.raises(Exception, match="Could not find an implementation for SelectiveScan2D"):
        open_session(model_of(case, body=True), path)
    options = onnxruntime.SessionOptions()
    plain = onnxruntime.InferenceSession(model_of(case, body=True).SerializeToString(), options)
    assert error(run(plain, scan_feeds(case)), case.expected(torch.float32)) <= TOLERANCE
