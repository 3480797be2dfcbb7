"""Engines: built for real with TensorRT for RTX, without a GPU; the same builder's decisions with stand-ins."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import CHANNEL_FIRST, CHANNELS, error, run, text_model, traced_digits
from onnx import helper, numpy_helper

from quartermap_deploy.errors import (
    BundleError,
    EngineError,
    InputError,
    MissingDependencyError,
    QuartermapError,
)
from quartermap_deploy.gpu import Gpu, find_gpu
from quartermap_deploy.passes.lower import lower
from quartermap_deploy.passes.shapes import infer_shapes
from quartermap_deploy.targets import load_target
from quartermap_deploy.targets.tensorrt import builder as tensorrt_builder
from quartermap_deploy.targets.tensorrt import rtx as tensorrt_rtx
from quartermap_deploy.targets.tensorrt import target as tensorrt
from quartermap_deploy.targets.tensorrt.builder import check_examples
from quartermap_deploy.targets.tensorrt.caches import TimingCache, cache_key
from quartermap_deploy.targets.tensorrt.checks import (
    INSPECTOR,
    PLAN,
    check_file,
    check_plugins,
    check_types,
    inspected,
    rtx_header,
)
from quartermap_deploy.targets.tensorrt.flavour import TENSORRT, TENSORRT_RTX, Flavour, version_numbers
from quartermap_deploy.targets.tensorrt.monitor import Phases, interruptible, make_logger
from quartermap_deploy.targets.tensorrt.objects import make_runtime
from quartermap_deploy.targets.tensorrt.options import EngineOptions, Profile
from quartermap_deploy.targets.tensorrt.products import check_products, plan_products
from quartermap_deploy.targets.tensorrt.session import profile_for, refusal

try:
    TENSORRT_RTX.load()
    WHY_NOT = ""
except MissingDependencyError as absent:
    WHY_NOT = str(absent)

needs_rtx = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
without_gpu = pytest.mark.skipif(find_gpu() is not None, reason="a GPU is there")

OPTIONS = EngineOptions(profiles=(Profile((1, 2, 4)),), compute_capabilities=("8.6", "8.9"))
SMALL = (1, 3, 64, 64)


class Recorder:
    """Progress that keeps the titles and units of its steps."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        self.open = 0

    @contextlib.contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        self.steps.setdefault(title, 0)
        self.open += 1

        def advance(units: int) -> None:
            self.steps[title] += units

        try:
            yield advance
        finally:
            self.open -= 1


def small_model(operator: str = "Relu", height: int | str = 8, width: int | str = 8) -> onnx.ModelProto:
    """Return a model that is built in a second: a convolution, one more operator, and logits."""
    weight = numpy_helper.from_array(np.ones((2, 3, 1, 1), np.float32), "weight")
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["features"], name="block_1/conv"),
        helper.make_node(operator, ["features"], ["active"], name="block_1/odd"),
        helper.make_node("GlobalAveragePool", ["active"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["logits"], name="flatten"),
    ]
    images = helper.make_tensor_value_info("images", 1, ["batch", 3, height, width])
    logits = helper.make_tensor_value_info("logits", 1, ["batch", 2])
    graph = helper.make_graph(nodes, "small", [images], [logits], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def two_in_two_out() -> onnx.ModelProto:
    """Return a model of several inputs and outputs of several ranks and types, with scans of both operators.

        features (batch, 2, length 6), tokens (batch, 4) of whole numbers, scale ()
        scanned (batch, 2, 6), chosen (batch, 4) of whole numbers

    K = 1 and K = 2 directions, a scan of sequences of two groups, and a scalar beside them.
    """
    random = np.random.default_rng(0)
    weights = {
        "A": -np.exp(random.standard_normal((2, 3))),
        "A2": -np.exp(random.standard_normal((4, 1))),
        "A1": -np.exp(random.standard_normal((2, 1))),
        "D2": random.standard_normal(4),
        "D1": random.standard_normal(2),
        "zeros4": np.zeros(4),
        "zeros2": np.zeros(2),
        "table": random.standard_normal((5, 3)),
        "project": random.standard_normal((12, 2, 1)),
        "narrow": random.standard_normal((8, 2, 1, 1)),
    }
    text = """
    <ir_version: 10, opset_import: ["": 20, "quartermap": 1]>
    several (float[batch, 2, 6] features, int64[batch, 4] tokens, float scale)
        => (float[batch, 2, 6] scanned, int64[batch, 4] chosen) {
        projected = Conv (features, project)
        by_group = Reshape (projected, group_shape)
        B, C = Split <axis = 2, num_outputs = 2> (by_group)
        sequence = quartermap.SelectiveScan <delta_softplus = 1> (features, features, A, B, C)
        map = Reshape (sequence, map_shape)
        wide = Conv (map, narrow)
        dt, B2, C2 = Split <axis = 1> (wide, parts)
        two = quartermap.SelectiveScan2D <directions = ["row", "column_reverse"], softplus = 1>
            (map, dt, B2, C2, A2, D2, zeros4)
        dt1, B1, C1, rest = Split <axis = 1> (wide, one_parts)
        one = quartermap.SelectiveScan2D <directions = ["column"], softplus = 1>
            (two, dt1, B1, C1, A1, D1, zeros2)
        flat = Reshape (one, sequence_shape)
        embedded = Gather (table, tokens)
        total = ReduceSum <keepdims = 0> (embedded, last)
        mean = ReduceMean <keepdims = 1> (total, one_axis)
        factor = Unsqueeze (mean, last_axis)
        shifted = Mul (flat, factor)
        scanned = Mul (shifted, scale)
        chosen = Add (tokens, tokens)
    }
    """
    model = onnx.parser.parse_model(text)
    shapes = {
        "group_shape": [0, 2, 6, 6],
        "map_shape": [0, 2, 2, 3],
        "sequence_shape": [0, 2, 6],
        "parts": [4, 2, 2],
        "one_parts": [2, 1, 1, 4],
        "last": [2],
        "one_axis": [1],
        "last_axis": [2],
    }
    arrays = {name: np.asarray(array, np.float32) for name, array in weights.items()}
    arrays |= {name: np.array(values, np.int64) for name, values in shapes.items()}
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for index, node in enumerate(node for node in model.graph.node):
        scan = node.domain == "quartermap"
        node.name = (
            f"block_{1 + sum(n.domain == 'quartermap' for n in model.graph.node[:index])}/scan"
            if scan
            else (f"other/{node.output[0]}")
        )
    return lower(infer_shapes(model))


def save(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Recorder]:
    """The digits model's engine: its folder, its entry, and the progress of its build."""
    folder = tmp_path_factory.mktemp("digits")
    progress = Recorder()
    path = save(lower(infer_shapes(traced_digits())), folder)
    entry = tensorrt_rtx.build(
        path, folder, OPTIONS, examples=[{"images": (4, 3, 64, 64)}], progress=progress
    )
    return folder, entry, progress


# Building -------------------------------------------------------------------------------------------------------


@needs_rtx
def test_the_digits_engine_is_what_its_entry_says(built: tuple[Path, dict[str, Any], Recorder]) -> None:
    folder, entry, _ = built
    engine = folder / entry["file"]
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", entry["file"]]
    assert json.loads(json.dumps(entry)) == entry
    size = engine.stat().st_size
    assert entry["build"]["engine_bytes"] == size > 1_000_000
    assert entry["build"]["seconds"] > 0
    header = rtx_header(engine.read_bytes()[:64])
    assert header == (size, entry["version"])
    assert entry["compute_capabilities"] == ["8.6", "8.9"]
    assert EngineOptions.from_dict(entry["options"]) == OPTIONS
    assert entry["plugin"] is None and entry["gpu"] is None
    assert set(entry["build"]["network_types"]) == {"float32"}
    check_file(engine, entry)


@needs_rtx
def test_tensorrt_itself_finds_the_engine_well_formed(built: tuple[Path, dict[str, Any], Recorder]) -> None:
    """As far as it looks without a GPU, which is at the header."""
    folder, entry, _ = built
    trt = TENSORRT_RTX.load()
    runtime = make_runtime(trt, TENSORRT_RTX, make_logger(trt))
    if not hasattr(runtime, "get_engine_validity"):
        pytest.skip(f"TensorRT for RTX {trt.__version__} has no get_engine_validity")
    data = (folder / entry["file"]).read_bytes()
    malformed = int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    assert not int(runtime.get_engine_validity(data)[1]) & malformed
    assert int(runtime.get_engine_validity(b"x" * len(data))[1]) & malformed


@needs_rtx
def test_the_build_tells_its_progress(built: tuple[Path, dict[str, Any], Recorder]) -> None:
    *_, progress = built
    assert len(progress.steps) >= 2 and progress.open == 0
    assert max(progress.steps.values()) > 100


@needs_rtx
@without_gpu
def test_the_memory_and_the_plan_are_read(built: tuple[Path, dict[str, Any], Recorder]) -> None:
    _, entry, _ = built
    build = entry["build"]
    if build["memory_before_bytes"] is not None:
        assert build["peak_memory_bytes"] >= build["memory_before_bytes"]
    assert build["read_by"] == PLAN and build["types_checked"] == bool(build["engine_types"])
    assert build["processor_seconds"] > 0
    # Undocumented, so an engine of another version may not be readable. This one is.
    if entry["version"].startswith("1.7"):
        assert build["engine_types"]["float32"] > 10 and build["layers"] > 10


@needs_rtx
@without_gpu
def test_an_engine_without_a_gpu_is_a_clear_error(built: tuple[Path, dict[str, Any], Recorder]) -> None:
    folder, entry, _ = built
    with pytest.raises(BundleError, match=r"needs an NVIDIA GPU.*onnxruntime"):
        tensorrt_rtx.open(folder, entry)


@needs_rtx
def test_an_engine_cut_short_is_refused(built: tuple[Path, dict[str, Any], Recorder], tmp_path: Path) -> None:
    folder, entry, _ = built
    data = (folder / entry["file"]).read_bytes()
    short = tmp_path / entry["file"]
    short.write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError, match=r"bytes, it was built with .*quartermap rebuild"):
        tensorrt_rtx.open(tmp_path, entry)
    # Even where the manifest was changed to fit, the engine's own header does not.
    forged = json.loads(json.dumps(entry))
    forged["build"]["engine_bytes"] = short.stat().st_size
    with pytest.raises(EngineError, match="its own header says"):
        check_file(short, forged)
    short.unlink()
    with pytest.raises(BundleError, match=r"no engine .*quartermap rebuild"):
        tensorrt_rtx.open(tmp_path, entry)


@needs_rtx
def test_float16_stays_float16(tmp_path: Path) -> None:
    precision = pytest.importorskip("quartermap_deploy.passes.cast_precision")
    typed, _ = precision.cast_precision(infer_shapes(traced_digits()), "float16")
    entry = tensorrt_rtx.build(save(lower(typed), tmp_path), tmp_path, OPTIONS)
    types, found = entry["build"]["network_types"], entry["build"]["engine_types"]
    assert types["float16"] > 100
    products = entry["build"]["products"]
    assert products["of_graph"] > 60
    if entry["build"]["types_checked"]:
        assert found["float16"] / sum(found.values()) > types["float16"] / sum(types.values())
        assert products["in_engine"] == products["of_graph"]


@needs_rtx
@without_gpu
def test_a_product_that_is_not_in_16_bits_is_named(
    built: tuple[Path, dict[str, Any], Recorder], tmp_path: Path
) -> None:
    folder, entry, _ = built
    in_float32 = plan_products((folder / entry["file"]).read_bytes())
    if not in_float32:
        pytest.skip(f"the plan of TensorRT for RTX {entry['version']} cannot be read")
    # The head is a Gemm, the first convolution is the stem's, and the time step's projection is in the scan.
    for name in ("classifier.head/node_linear", "patch_embed.0/node_conv2d", "block_3/scan/matmul_70"):
        assert in_float32[name] == {"float32"}
    graph = {"patch_embed.0/node_conv2d": "float16", "block_3/scan/matmul_70": "float32"}
    with pytest.raises(EngineError, match=r"1 of the graph's 1 .* in float16 .*: patch_embed\.0/node_conv2d"):
        check_products(graph, in_float32, PLAN)
    assert check_products({"block_3/scan/matmul_70": "float32"}, in_float32, PLAN) == {
        "of_graph": 0,
        "in_engine": 0,
    }
    # What the engine does not name was not checked, and the entry says so.
    assert check_products({"elsewhere": "float16"}, in_float32, PLAN) == {"of_graph": 1, "in_engine": 0}


@needs_rtx
def test_several_profiles_and_open_sizes(tmp_path: Path) -> None:
    profiles = (Profile((1, 1, 1), (8, 16, 32), (8, 16, 32)), Profile((2, 8, 16), (8, 16, 32), (8, 16, 32)))
    options = EngineOptions(profiles=profiles, compute_capabilities=("8.9",), optimization_level=2)
    path = save(small_model(height="height", width="width"), tmp_path)
    examples = [{"images": (1, 3, 8, 8)}, {"images": (16, 3, 32, 32)}]
    entry = tensorrt_rtx.build(path, tmp_path, options, examples=examples)
    assert len(entry["options"]["profiles"]) == 2
    with pytest.raises(InputError, match="leaves its height open"):
        tensorrt_rtx.build(path, tmp_path, EngineOptions())


@needs_rtx
def test_scans_of_maps_of_open_sizes(tmp_path: Path) -> None:
    path = save(lower(infer_shapes(text_model(CHANNEL_FIRST))), tmp_path)
    profiles = (Profile((1, 1, 1), (4, 4, 4), (5, 5, 5)), Profile((1, 2, 4), (4, 6, 8), (5, 6, 9)))
    options = EngineOptions(profiles=profiles, compute_capabilities=("8.9",), optimization_level=2)
    entry = tensorrt_rtx.build(path, tmp_path, options)
    assert entry["inputs"] == {"x": ["batch", CHANNELS, "height", "width"]}
    shapes = [(1, 4, 5), (1, 4, 5), (1, 4, 5), (4, 8, 9)]
    assert tensorrt_builder.extremes(options, entry["inputs"]) == [
        {"x": (batch, CHANNELS, height, width)} for batch, height, width in shapes
    ]


@needs_rtx
def test_several_inputs_and_outputs_of_any_rank_and_type(tmp_path: Path) -> None:
    path = save(two_in_two_out(), tmp_path)
    example = {"features": (2, 2, 6), "tokens": (2, 4), "scale": ()}
    entry = tensorrt_rtx.build(path, tmp_path, OPTIONS, examples=[example])
    assert entry["inputs"] == {"features": ["batch", 2, 6], "tokens": ["batch", 4], "scale": []}
    assert entry["outputs"] == ["scanned", "chosen"]
    assert entry["build"]["network_types"]["float32"] > 100
    with pytest.raises(InputError, match=r"features \(8, 2, 6\), tokens \(8, 4\), scale \(\): they take"):
        tensorrt_rtx.build(
            path, tmp_path, OPTIONS, examples=[{"features": (8, 2, 6), "tokens": (8, 4), "scale": ()}]
        )


def test_the_form_for_rtx_computes_the_same() -> None:
    model = two_in_two_out()
    prepared = tensorrt_rtx.prepare(model)
    onnx.checker.check_model(prepared, full_check=True)
    assert not prepared.functions and {node.domain for node in prepared.graph.node} == {""}
    random = np.random.default_rng(1)
    feeds = {
        "features": random.standard_normal((3, 2, 6)).astype(np.float32),
        "tokens": random.integers(0, 5, (3, 4)),
        "scale": np.array(0.5, np.float32),
    }
    found, expected = run(prepared, feeds), run(model, feeds)
    assert error(found["scanned"], expected["scanned"]) <= 1e-5
    np.testing.assert_array_equal(found["chosen"], 2 * feeds["tokens"])


@needs_rtx
def test_bad_requests_write_nothing(tmp_path: Path) -> None:
    path = save(small_model(), tmp_path)
    options = EngineOptions(profiles=(Profile((1, 2, 4)),))
    with pytest.raises(InputError, match=r"no profile takes an input of shape \(8, 3, 8, 8\).*widen"):
        tensorrt_rtx.build(path, tmp_path, options, examples=[{"images": (8, 3, 8, 8)}])
    with pytest.raises(InputError, match=r"no compute capability '9\.9'; expected some of 8\.0, .*8\.9"):
        tensorrt_rtx.build(path, tmp_path, EngineOptions(compute_capabilities=("9.9",)))
    with pytest.raises(InputError, match=r"no float32 matrix product for compute capability 7\.5"):
        tensorrt_rtx.build(path, tmp_path, EngineOptions(compute_capabilities=("7.5",)))
    with pytest.raises(InputError, match="the model has 8; leave it out"):
        tensorrt_rtx.build(path, tmp_path, EngineOptions(profiles=(Profile(height=(4, 8, 16)),)))
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]


@needs_rtx
def test_turing_is_refused_before_any_work() -> None:
    recipe = SimpleNamespace(
        engine=EngineOptions(compute_capabilities=("7.5", "8.9")), targets=("tensorrt-rtx",)
    )
    with pytest.raises(InputError, match=r"no float32 matrix product for compute capability 7\.5"):
        tensorrt_rtx.check(recipe)


@needs_rtx
def test_a_refused_operator_is_named_with_its_block(tmp_path: Path) -> None:
    model = small_model("Frobnicate")
    model.graph.node[1].domain = "elsewhere"
    model.opset_import.append(helper.make_opsetid("elsewhere", 1))
    with pytest.raises(BundleError, match=r"it has the operator 'Frobnicate' of the domain 'elsewhere'"):
        tensorrt_rtx.build(save(model, tmp_path), tmp_path, OPTIONS)
    # An operator of ONNX that TensorRT has not: the parser gives its own condition as the reason, "false".
    with pytest.raises(
        EngineError, match=r"Det at node block_1/odd, block 1: unsupported node, this TensorRT has"
    ):
        tensorrt_rtx.build(save(small_model("Det"), tmp_path), tmp_path, OPTIONS)
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]


@needs_rtx
def test_a_refused_node_is_named_with_its_module(tmp_path: Path) -> None:
    model = lower(infer_shapes(traced_digits()))
    (node,) = (node for node in model.graph.node if node.name.startswith("block_4/mlp.act/"))
    node.op_type = "Bernoulli"
    with pytest.raises(EngineError, match=r"Bernoulli at node block_4/mlp\.act/node_gelu_\d+, block 4: "):
        tensorrt_rtx.build(save(model, tmp_path), tmp_path, OPTIONS)


INTERRUPTED = """
import os, signal, sys
from quartermap_deploy.cli import main
from quartermap_deploy.targets.tensorrt import monitor as tensorrt_monitor

start = tensorrt_monitor.Phases.start

def begin(self, name, parent, steps):
    if parent is not None and not begin.sent:
        begin.sent = True
        os.kill(os.getpid(), signal.SIGINT)
    start(self, name, parent, steps)

begin.sent = False
tensorrt_monitor.Phases.start = begin
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""


@needs_rtx
def test_ctrl_c_stops_a_build(built: tuple[Path, dict[str, Any], Recorder], tmp_path: Path) -> None:
    """Sent from the first phase that TensorRT tells of, while it builds."""
    bundle = tmp_path / "bundle"
    command = ("compile", "vmamba_digits", "--targets", "tensorrt-rtx", "--out", str(bundle))
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [True, False])
def test_a_call_of_tensorrt_ends_before_the_interrupt_goes_on(stop: bool) -> None:
    events: list[str] = []
    asked = threading.Event()

    def call() -> None:
        time.sleep(0.2)  # until the other thread waits
        signal.raise_signal(signal.SIGINT)
        assert asked.wait(30 if stop else 0.5) == stop
        events.append("ended")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interruptible(call, asked.set if stop else None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert events == ["ended"]
    assert interruptible(lambda: 3) == 3
    with pytest.raises(EngineError, match="no memory"):
        interruptible(raising(EngineError("no memory")))


def raising(error: Exception) -> Callable[[], None]:
    """Return a function that raises an error."""

    def call() -> None:
        raise error

    return call


@needs_rtx
def test_an_error_in_progress_stops_the_build(tmp_path: Path) -> None:
    class Broken:
        @contextlib.contextmanager
        def step(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
            def advance(units: int) -> None:
                raise RuntimeError("the display is gone")

            yield advance

    with pytest.raises(RuntimeError, match="the display is gone"):
        tensorrt_rtx.build(save(small_model(), tmp_path), tmp_path, OPTIONS, progress=Broken())
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]


# Caches ---------------------------------------------------------------------------------------------------------


def test_the_cache_key_depends_on_all_that_matters(tmp_path: Path) -> None:
    plugin, other = tmp_path / "a.so", tmp_path / "b.so"
    plugin.write_bytes(b"a")
    other.write_bytes(b"b")
    gpu = Gpu("NVIDIA A", "8.9")
    base: dict[str, Any] = {
        "flavour": TENSORRT,
        "data": b"graph",
        "options": EngineOptions(),
        "plugin": plugin,
        "version": "10.13.0",
        "gpu": gpu,
    }
    changes: list[dict[str, Any]] = [
        {},
        {"data": b"another graph"},
        {"options": EngineOptions(tf32=True)},
        {"options": EngineOptions(profiles=(Profile((1, 1, 1)),))},
        {"plugin": other},
        {"plugin": None},
        {"version": "10.13.1"},
        {"gpu": Gpu("NVIDIA B", "8.9")},
        {"gpu": Gpu("NVIDIA A", "9.0")},
        {"flavour": dataclasses.replace(TENSORRT, target="another")},
    ]
    keys = [cache_key(**{**base, **change}) for change in changes]
    assert len(set(keys)) == len(keys)
    # Neither where the cache lies nor what the plugin's file is called changes an engine.
    same = tmp_path / "c.so"
    same.write_bytes(b"a")
    options = EngineOptions(cache=tmp_path, plugin=same)
    assert cache_key(**{**base, "options": options, "plugin": same}) == keys[0]


def test_tensorrt_for_rtx_has_no_timing_cache(tmp_path: Path) -> None:
    TimingCache(None, TENSORRT_RTX, tmp_path / "none", "key" * 20).save()
    assert not (tmp_path / "none").exists()


# What speaks against an engine ----------------------------------------------------------------------------------

ENTRY: dict[str, Any] = {
    "version": "10.13.0.35",
    "options": EngineOptions().to_dict(),
    "compute_capabilities": ["8.9"],
    "gpu": "NVIDIA L4",
    "plugin": None,
}
ADA = Gpu("NVIDIA L4", "8.9")


def entry_with(**options: Any) -> dict[str, Any]:
    return {**ENTRY, "options": EngineOptions(**options).to_dict()}


def test_an_engine_for_this_machine_is_taken() -> None:
    assert refusal(TENSORRT, ENTRY, "10.13.0.35", ADA) is None
    assert refusal(TENSORRT, ENTRY, "10.13.0.35", None) is None


@pytest.mark.parametrize("version", ["10.12.0.1", "10.14.0.0", "11.0.0"])
def test_an_engine_of_another_version_is_refused(version: str) -> None:
    reason = refusal(TENSORRT, ENTRY, version, ADA)
    assert reason is not None and "10.13.0.35" in reason and version in reason


def test_a_version_compatible_engine_runs_on_later_versions_with_its_major_number() -> None:
    entry = entry_with(version_compatible=True)
    for taken in ("10.13.0.35", "10.13.3", "10.16.1"):
        assert refusal(TENSORRT, entry, taken, ADA) is None
    for version in ("10.12.0", "11.0.0"):
        reason = refusal(TENSORRT, entry, version, ADA)
        assert reason is not None and "later versions of TensorRT 10" in reason and version in reason


def test_an_engine_for_another_gpu_is_refused() -> None:
    reason = refusal(TENSORRT, ENTRY, "10.13.0", Gpu("NVIDIA H200", "9.0"))
    assert reason is not None and "8.9" in reason and "H200" in reason and "9.0" in reason
    entry = entry_with(hardware_compatibility="ampere_plus")
    assert refusal(TENSORRT, entry, "10.13.0", Gpu("NVIDIA H200", "9.0")) is None
    reason = refusal(TENSORRT, entry, "10.13.0", Gpu("Tesla T4", "7.5"))
    assert reason is not None and "8.0" in reason


def test_a_plain_engine_is_for_one_model_of_gpu() -> None:
    other = Gpu("NVIDIA GeForce RTX 4090", "8.9")
    reason = refusal(TENSORRT, ENTRY, "10.13.0", other)
    assert (
        reason is not None
        and "NVIDIA L4" in reason
        and "4090" in reason
        and "hardware_compatibility" in reason
    )
    for level in ("ampere_plus", "same_compute_capability"):
        assert refusal(TENSORRT, entry_with(hardware_compatibility=level), "10.13.0", other) is None
    # TensorRT for RTX compiles kernels for the GPU at hand when it runs.
    assert refusal(TENSORRT_RTX, {**ENTRY, "version": "1.7.1"}, "1.7.1", other) is None


def test_images_that_no_profile_takes_are_refused() -> None:
    options = EngineOptions(profiles=(Profile((1, 1, 1)), Profile((2, 4, 8))))
    inputs = {"images": ["batch", 3, 8, 8]}
    assert profile_for({"images": (1, 3, 8, 8)}, inputs, options) == 0
    assert profile_for({"images": (8, 3, 8, 8)}, inputs, options) == 1
    with pytest.raises(
        InputError,
        match=r"shape \(1, 3, 8, 8\) to \(1, 3, 8, 8\) or .*, found \(16, 3, 8, 8\).*wider profile",
    ):
        profile_for({"images": (16, 3, 8, 8)}, inputs, options)


def test_the_profile_that_takes_all_inputs_runs_them() -> None:
    inputs = {"left": ["batch", 3, "height", 8], "right": ["batch", 5]}
    profiles = (Profile((1, 1, 1), height=(4, 4, 4)), Profile((1, 4, 8), height=(4, 8, 16)))
    options = EngineOptions(profiles=profiles)
    assert profile_for({"left": (1, 3, 4, 8), "right": (1, 5)}, inputs, options) == 0
    assert profile_for({"left": (1, 3, 5, 8), "right": (1, 5)}, inputs, options) == 1
    with pytest.raises(
        InputError,
        match=r"left \(1, 3, 4, 8\) to \(8, 3, 16, 8\), right \(1, 5\) to \(8, 5\), found left .*, right \(9, 5\)",
    ):
        profile_for({"left": (1, 3, 5, 8), "right": (9, 5)}, inputs, options)


# What the inspector says ----------------------------------------------------------------------------------------


def layer(name: str, kind: str, datatype: str) -> dict[str, Any]:
    return {"Name": name, "LayerType": kind, "Outputs": [{"Name": "y", "Format/Datatype": datatype}]}


def test_the_inspector_is_read() -> None:
    layers = [
        layer("conv", "CaskConvolution", "Channel major FP16 format where channel % 8 == 0"),
        layer("norm", "kgen", "Row major linear FP32"),
        layer("block_1/scan", "PluginV3", "Row major linear FP16 format"),
        layer("mean", "Reduce", "BF16"),
        layer("new", "kgen", "Half"),
    ]
    types, plugins = inspected(json.dumps({"Layers": layers, "Bindings": []}))
    assert types == {"float16": 3, "float32": 1, "bfloat16": 1}
    check_plugins(["block_1/scan"], plugins, "engine inspector")
    with pytest.raises(EngineError, match=r"1 scans did not become .*: block_11/scan "):
        check_plugins(["block_1/scan", "block_11/scan"], plugins, "engine inspector")
    with pytest.raises(EngineError, match="detailed profiling verbosity"):
        inspected(json.dumps({"Layers": ["conv"]}))
    with pytest.raises(EngineError, match="cannot be read"):
        inspected("no JSON")


def test_a_silent_float32_engine_is_refused() -> None:
    graph = {"float16": 90, "float32": 10}
    check_types(graph, {"float16": 60, "float32": 30}, "engine inspector")
    # A plan that cannot be read says nothing; an inspector that names no types hides something.
    check_types(graph, {}, PLAN)
    check_types({"float32": 100}, {}, INSPECTOR)
    with pytest.raises(EngineError, match="names no type that is known"):
        check_types(graph, {}, INSPECTOR)
    check_types({"float32": 100}, {"float32": 50}, "engine inspector")
    with pytest.raises(
        EngineError, match=r"90% of the graph's layers are float16, but only 0% of the engine's"
    ):
        check_types(graph, {"float32": 50}, "engine inspector")
    with pytest.raises(EngineError, match="did not keep the types"):
        check_types({"bfloat16": 90, "float32": 10}, {"float16": 90, "float32": 10}, "engine inspector")


# Without TensorRT -----------------------------------------------------------------------------------------------


def test_an_absent_tensorrt_names_the_command() -> None:
    absent = dataclasses.replace(TENSORRT_RTX, module="tensorrt_that_is_not_there")
    with pytest.raises(
        MissingDependencyError, match=r"not installed.*pip install .*quartermap-deploy\[tensorrt-rtx\]"
    ):
        absent.load()


@pytest.mark.parametrize("version", ["10.6.0", "12.0.0", "9.3"])
def test_an_unsupported_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", SimpleNamespace(__version__=version))
    with pytest.raises(MissingDependencyError, match=rf"{version} is not supported; expected 10\.7 or later"):
        TENSORRT.load()


@pytest.mark.parametrize("version", ["10.7.0", "10.13.0.35", "11.0.0", "11.1.0.post1"])
def test_supported_versions_are_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(__version__=version)
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", stand_in)
    assert TENSORRT.load() is stand_in
    assert version_numbers(version)[:2] == tuple(int(part) for part in version.split(".")[:2])


@without_gpu
def test_tensorrt_without_a_gpu_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", SimpleNamespace(__version__="10.13.0"))
    with pytest.raises(EngineError, match=r"GPU at hand, and there is none.*tensorrt-rtx"):
        tensorrt.check()
    with pytest.raises(EngineError, match=r"GPU at hand, and there is none.*tensorrt-rtx"):
        tensorrt.build(save(small_model(), tmp_path), tmp_path)


def test_scans_become_plugin_nodes() -> None:
    model = lower(infer_shapes(traced_digits()))
    prepared = tensorrt.prepare(model)
    assert not prepared.functions and model.functions
    scans = [node for node in prepared.graph.node if node.op_type == "SelectiveScan2D"]
    assert len(scans) == len(tensorrt_builder.scan_names(prepared)) > 1
    attributes = {item.name: helper.get_attribute_value(item) for item in scans[0].attribute}
    assert attributes == {
        "directions": b"row,column,row_reverse,column_reverse",
        "softplus": 1,
        "plugin_namespace": b"quartermap",
        "plugin_version": b"1",
    }


def test_targets_are_known() -> None:
    for name, flavour in (("tensorrt", TENSORRT), ("tensorrt-rtx", TENSORRT_RTX)):
        target = load_target(name)
        assert all(callable(getattr(target, part)) for part in ("build", "open", "prepare"))
        assert "float16" in target.PRECISIONS
        assert isinstance(flavour, Flavour) and flavour.target == name
    assert load_target("tensorrt") is not load_target("tensorrt-rtx")


# Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"profiles": []}, "no profiles"),
        ({"profiles": [{"batch": [4, 2, 8]}]}, "smallest ≤ tuned for ≤ largest"),
        ({"profiles": [{"batch": [0, 1, 8]}]}, "smallest ≤ tuned for"),
        ({"profiles": [{"batches": [1, 1, 8]}]}, "batches"),
        ({"profile": []}, "Did you mean 'profiles'"),
        ({"compute_capabilities": []}, "no compute capabilities"),
        ({"compute_capabilities": 8.9}, "compute_capabilities = 8.9, a float; expected"),
        ({"optimization_level": 9}, "expected 0 to 5"),
        ({"hardware_compatibility": "all"}, "expected one of none, ampere_plus"),
    ],
)
def test_wrong_options_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(QuartermapError, match=message):
        EngineOptions.from_dict(values)


def test_a_profile_beyond_what_a_tensor_holds_is_refused() -> None:
    inputs = {"images": ("batch", 3, 64, 64)}
    Profile((1, 8, 174_762)).shapes(inputs)
    with pytest.raises(
        InputError, match=r"largest input images \(174763, 3, 64, 64\) has more than 2,147,483,647 elements"
    ):
        Profile((1, 8, 174_763)).shapes(inputs)


def test_ranges_are_those_of_the_open_axes_of_their_names() -> None:
    inputs = {
        "images": ("batch", 3, "height", "width"),
        "tokens": ("batch", 77),
        "positions": (2, "width", 4, "height", "batch"),
        "scale": (),
    }
    assert Profile((1, 2, 3), (4, 5, 6), (7, 8, 9)).shapes(inputs) == {
        "images": ((1, 3, 4, 7), (2, 3, 5, 8), (3, 3, 6, 9)),
        "tokens": ((1, 77), (2, 77), (3, 77)),
        "positions": ((2, 7, 4, 4, 1), (2, 8, 4, 5, 2), (2, 9, 4, 6, 3)),
        "scale": ((), (), ()),
    }


@pytest.mark.parametrize(
    ("profile", "inputs", "message"),
    [
        (Profile(), {"x": ("batch", 3, "length")}, r"x \(batch, 3, length\) leaves the axis length open"),
        (
            Profile(),
            {"x": ("batch", "any")},
            "leaves the axis any open, .* export the model with that size fixed",
        ),
        (Profile(), {"x": ("batch", 3, "height", 8)}, r"leaves its height open \(input x .*needs height ="),
        (Profile(width=(1, 2, 3)), {"x": ("batch", 3, 8, 8)}, r"width \(1, 2, 3\), the model has 8; leave"),
        (Profile(width=(1, 2, 3)), {"x": ("batch", 3)}, "the model has no such axis; leave it out"),
        (Profile(height=(8, 8, 8)), {"x": (1, 3, 8, 8), "y": (1, 3, 4, 8)}, "the model has 4 and 8; leave"),
        (Profile(), {"x": (64, 3), "y": (1, 3)}, r"the model has 64; .*batch = \(64, 64, 64\)"),
    ],
)
def test_profiles_that_do_not_fit_are_refused(
    profile: Profile, inputs: dict[str, tuple[int | str, ...]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        profile.shapes(inputs)


def test_sizes_that_a_profile_only_repeats_are_taken() -> None:
    assert Profile(height=(8, 8, 8)).shapes({"x": ("batch", 3, 8, 9)})["x"][2] == (32, 3, 8, 9)
    assert Profile((1, 8, 32)).shapes({"x": (4, 3), "y": (1, 3)}) == {"x": ((4, 3),) * 3, "y": ((1, 3),) * 3}
    assert Profile((2, 8, 32)).shapes({"x": (1, 3), "y": ("batch", 3)})["x"][0] == (1, 3)


def test_an_example_takes_all_inputs_at_once() -> None:
    options = EngineOptions(profiles=(Profile((1, 1, 1)), Profile((4, 4, 4))))
    inputs = {"left": ("batch", 3), "right": ("batch", 5)}
    check_examples(options, inputs, [{"left": (1, 3), "right": (1, 5)}, {"left": (4, 3), "right": (4, 5)}])
    with pytest.raises(
        InputError,
        match=r"no profile takes inputs of shapes left \(1, 3\), right \(4, 5\): they take left \(1, 3\) to",
    ):
        check_examples(options, inputs, [{"left": (1, 3), "right": (4, 5)}])
    with pytest.raises(InputError, match=r"no profile takes an input of shape \(1, 3\)"):
        check_examples(options, inputs, [{"left": (1, 3)}])


def test_options_survive_json() -> None:
    options = EngineOptions(profiles=(Profile(), Profile((1, 1, 1), (8, 8, 8), (4, 5, 6))), refit=True)
    assert EngineOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options


def test_phases_are_shown_and_closed() -> None:
    progress = Recorder()
    phases = Phases(progress)
    phases.start("Building engine", None, 2)
    phases.start("Parsing", "Building engine", 5)
    phases.start("Deep down", "Parsing", 5)
    assert phases.step("Parsing", 1) and phases.step("Parsing", 3) and phases.step("Deep down", 0)
    assert progress.steps == {"  parsing": 4} and progress.open == 1
    phases.close()
    assert progress.open == 0
