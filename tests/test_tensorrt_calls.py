"""The calls that are made to TensorRT, against a strict stand-in: `tensorrt` itself cannot be had without a GPU.

`tensorrt_stand_in.py` says what that proves and what it does not: names, arguments, types and the order of calls are
those of NVIDIA's own bindings of 10.7 and 11.4; nothing here has run in TensorRT.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_stand_in as stand_in
from helpers import error, run, traced_digits
from onnx import helper, numpy_helper
from tensorrt_stand_in import RELEASES, Engines
from test_tensorrt_rtx import WHY_NOT, needs_rtx, save, small_model, two_in_two_out

import quartermap_deploy as qm
from quartermap_deploy import gpu
from quartermap_deploy.errors import BundleError, EngineError, InputError, MissingDependencyError
from quartermap_deploy.gpu import Gpu
from quartermap_deploy.native.contract import CONTRACT
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.native.store import add_library
from quartermap_deploy.passes.lower import lower
from quartermap_deploy.passes.shapes import infer_shapes
from quartermap_deploy.targets.tensorrt import builder as tensorrt_builder
from quartermap_deploy.targets.tensorrt import cuda_runtime
from quartermap_deploy.targets.tensorrt import flavour as tensorrt_flavour
from quartermap_deploy.targets.tensorrt import plugin as tensorrt_plugin
from quartermap_deploy.targets.tensorrt import rtx as tensorrt_rtx
from quartermap_deploy.targets.tensorrt import session as tensorrt_session
from quartermap_deploy.targets.tensorrt import target as tensorrt
from quartermap_deploy.targets.tensorrt.caches import TimingCache
from quartermap_deploy.targets.tensorrt.flavour import TENSORRT, TENSORRT_RTX
from quartermap_deploy.targets.tensorrt.monitor import make_logger
from quartermap_deploy.targets.tensorrt.options import EngineOptions, Profile

ADA = Gpu("NVIDIA L4", "8.9")
VERSIONS = {"10.7": "10.7.0", "11.4": "11.4.0.106"}
SERVED = ["10", "11", "rtx"]
OPTIONS = EngineOptions(profiles=(Profile((1, 1, 1)), Profile((2, 2, 4))))


@pytest.fixture(params=RELEASES)
def engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    """A stand-in for each release, on a machine with a GPU."""
    monkeypatch.setattr(gpu, "find_gpu", lambda: ADA)
    monkeypatch.delenv(tensorrt_plugin.PLUGIN_VARIABLE, raising=False)
    with stand_in.installed(VERSIONS[request.param], stand_in.public_api(request.param)) as found:
        yield found


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    """A stand-in with the names of the real TensorRT for RTX, on a machine with a GPU."""
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    module = TENSORRT_RTX.load()
    api = stand_in.api_of_module(module)
    monkeypatch.setattr(gpu, "find_gpu", lambda: ADA)
    with stand_in.installed(module.__version__, api, "tensorrt_rtx") as found:
        yield found


def source_of(build: dict[str, Any], contract: dict[str, Any] | None = None) -> str:
    """Return C++ of a library that describes itself as a plugin, and is none."""
    text = json.dumps({**(CONTRACT.to_dict() if contract is None else contract), "build": build})
    return f'extern "C" char const* quartermap_plugin_contract() {{ return R"~({text})~"; }}'


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns a function that compiles a library which says that it is our plugin."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    made: dict[str, Path] = {}

    def compiled(
        tensorrt: list[str] | str | None = SERVED,
        cuda: str | None = "13.0",
        architectures: str = "80-real,89-real",
        **contract: Any,
    ) -> Path:
        build = {"tensorrt": tensorrt, "cuda": cuda, "architectures": architectures}
        source = source_of(build, {**CONTRACT.to_dict(), **contract})
        if source not in made:
            made[source] = tmp_path_factory.mktemp("library") / "libquartermap_plugin.so"
            subprocess.run(
                [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(made[source])],
                input=source,
                text=True,
                check=True,
            )
        return made[source]

    return compiled


def half_model(io: int = onnx.TensorProto.FLOAT) -> onnx.ModelProto:
    """Return the small model with its convolution in float16."""
    weight = numpy_helper.from_array(np.full((2, 3, 1, 1), 0.5, np.float16), "weight")
    nodes = [
        helper.make_node("Cast", ["images"], ["half"], name="cast", to=onnx.TensorProto.FLOAT16),
        helper.make_node("Conv", ["half", "weight"], ["features"], name="block_1/conv"),
        helper.make_node("Relu", ["features"], ["active"], name="block_1/relu"),
        helper.make_node("Cast", ["active"], ["wide"], name="back", to=onnx.TensorProto.FLOAT),
        helper.make_node("GlobalAveragePool", ["wide"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["logits"], name="flatten"),
    ]
    images = helper.make_tensor_value_info("images", io, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", 1, ["batch", 2])
    graph = helper.make_graph(nodes, "small", [images], [logits], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def images(batch: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((batch, 3, 8, 8)).astype(np.float32)


def expected(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What `small_model` computes: the sum over the channels, then the mean of what is above zero, twice."""
    mean = np.maximum(batch.sum(axis=1), 0).mean(axis=(1, 2))
    return np.stack([mean, mean], axis=1)


def built(engines: Engines, folder: Path, plugin: Path, **options: Any) -> dict[str, Any]:
    settings = dataclasses.replace(OPTIONS, plugin=plugin, cache=folder / "cache", **options)
    return tensorrt.build(save(small_model(), folder), folder, settings, examples=[{"images": (1, 3, 8, 8)}])


def plugin_for(engines: Engines, library: Callable[..., Path]) -> Path:
    return library()


# The stand-in ---------------------------------------------------------------------------------------------------


def test_the_stand_in_invents_nothing() -> None:
    apis = [stand_in.public_api(release) for release in RELEASES]
    if not WHY_NOT:
        apis.append(stand_in.api_of_module(TENSORRT_RTX.load()))
    for name, members in stand_in.implemented().items():
        known = [api["classes"][name] for api in apis if name in api["classes"]]
        if not known and name in ("IRuntimeCache", "IRuntimeConfig"):
            continue  # of TensorRT for RTX, which is not here
        for member in members - {"set_compute_capability"} if WHY_NOT else members:
            assert any(member in {**api["methods"], **api["properties"]} for api in known), (name, member)


def test_the_stand_in_is_strict(engines: Engines) -> None:
    trt = engines.module
    config = trt.Builder(make_logger(trt)).create_builder_config()  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        config.set_speed(1)
    with pytest.raises(AttributeError, match="no attribute 'speed'"):
        config.speed = 1
    with pytest.raises(TypeError):
        config.set_flag("TF32")
    with pytest.raises(TypeError):
        config.set_timing_cache(None, False)
    with pytest.raises(TypeError, match="takes"):
        config.create_timing_cache(blob=b"")
    with pytest.raises(NotImplementedError, match="the stand-in has no"):
        config.reset()
    # TensorRT 11 has no weak typing any more.
    assert hasattr(trt.BuilderFlag, "FP16") == trt.__version__.startswith("10.")


@needs_rtx
def test_the_written_names_are_those_of_the_real_module() -> None:
    """TensorRT for RTX has the interface of TensorRT 11; its own docstrings say what the binding sources say."""
    written = stand_in.public_api("11.4")
    real = stand_in.api_of_module(TENSORRT_RTX.load())
    compared = 0
    for name, entry in written["classes"].items():
        found = real["classes"][name]
        for member in set(entry["methods"]) & set(found["methods"]) - {
            "serialize_with_config",
            "add_squeeze",
        }:
            assert all(overload in entry["methods"][member] for overload in found["methods"][member]), member
            compared += 1
        shared = set(entry["properties"]) & set(found["properties"])
        assert {key: entry["properties"][key] for key in shared} == {
            key: found["properties"][key] for key in shared
        }
    assert compared > 200


# Building -------------------------------------------------------------------------------------------------------


def configured(engines: Engines, plugin: Path | None = None, **options: Any) -> Any:
    trt = engines.module
    builder = trt.Builder(make_logger(trt))  # type: ignore[attr-defined]
    return tensorrt_builder.configure(trt, builder, TENSORRT, EngineOptions(**options), plugin)


def flags(engines: Engines, config: Any) -> set[str]:
    return {name for name, flag in engines.module.BuilderFlag.__members__.items() if config.get_flag(flag)}  # type: ignore[attr-defined]


def test_the_options_become_flags(engines: Engines) -> None:
    trt: Any = engines.module
    plain = configured(engines)
    assert flags(engines, plain) == set(), "TF32 is set by default and has to be cleared"
    assert plain.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    for unset in ("builder_optimization_level", "hardware_compatibility_level", "plugins_to_serialize"):
        with pytest.raises(NotImplementedError):
            getattr(plain, unset)
    assert flags(engines, configured(engines, tf32=True, refit=True)) == {"TF32", "REFIT"}
    chosen = configured(engines, optimization_level=5, workspace=1 << 30)
    assert chosen.builder_optimization_level == 5
    assert chosen.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 30


def test_a_version_compatible_engine_carries_its_plugin(engines: Engines) -> None:
    config = configured(engines, Path("/somewhere/plugin.so"), version_compatible=True)
    assert flags(engines, config) == {"VERSION_COMPATIBLE"}
    assert config.plugins_to_serialize == ["/somewhere/plugin.so"]


def test_hardware_compatibility_is_set_where_it_exists(engines: Engines) -> None:
    levels: Any = engines.module.HardwareCompatibilityLevel  # type: ignore[attr-defined]
    config = configured(engines, hardware_compatibility="ampere_plus")
    assert config.hardware_compatibility_level == levels.AMPERE_PLUS
    if engines.module.__version__.startswith("10.7"):
        with pytest.raises(InputError, match=r"10\.7\.0 has no hardware compatibility .*TensorRT 10\.9"):
            configured(engines, hardware_compatibility="same_compute_capability")
        with pytest.raises(InputError, match=r"TensorRT 10\.9"):
            tensorrt.check(
                qm.Recipe("any", engine=EngineOptions(hardware_compatibility="same_compute_capability"))
            )
    else:
        config = configured(engines, hardware_compatibility="same_compute_capability")
        assert config.hardware_compatibility_level == levels.SAME_COMPUTE_CAPABILITY


def test_an_engine_is_built(engines: Engines, library: Callable[..., Path], tmp_path: Path) -> None:
    plugin = plugin_for(engines, library)
    entry = built(engines, tmp_path, plugin)
    # Bit 1 is STRONGLY_TYPED in 10.x; bit 0 is, deprecated, in 11.x.
    assert engines.behaviour.calls[0] == ("load_library", str(plugin))
    assert engines.behaviour.calls[1] == ("create_network", 2 if entry["version"].startswith("10.") else 1)
    assert entry["gpu"] == ADA.name and entry["compute_capabilities"] == ["8.9"] and entry["cuda"] == "13.0"
    assert entry["plugin"]["file"] == "libquartermap_plugin.so" and entry["plugin"]["cuda"] == "13.0"
    build = entry["build"]
    assert build["read_by"] == "engine inspector" and build["types_checked"] is True
    assert build["network_types"] == build["engine_types"] == {"float32": 4}
    assert build["processor_seconds"] >= 0
    assert json.loads(json.dumps(entry)) == entry
    assert (tmp_path / entry["file"]).stat().st_size == build["engine_bytes"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"silent_float32": True}, r"of the graph's layers are float16, but only 0% of the engine's"),
        (
            {"lost_types": frozenset(["block_1/conv"])},
            r"1 of the graph's 1 convolutions and matrix products in float16 are not so in the engine: block_1/conv",
        ),
        ({"inspected_types": False}, r"the engine inspector names no type that is known"),
        ({"fails": "build"}, r"could not build an engine: no tactic for block_1/conv"),
    ],
)
def test_an_engine_that_departs_from_its_graph_is_refused(
    engines: Engines, library: Callable[..., Path], tmp_path: Path, fault: dict[str, Any], message: str
) -> None:
    options = dataclasses.replace(OPTIONS, plugin=plugin_for(engines, library), cache=tmp_path / "cache")
    path = save(half_model(), tmp_path)
    build = tensorrt.build(path, tmp_path, options)["build"]
    assert build["engine_types"]["float16"] == 3 and build["products"] == {"of_graph": 1, "in_engine": 1}
    (tmp_path / TENSORRT.engine_file).unlink()
    for name, value in fault.items():
        setattr(engines.behaviour, name, value)
    with pytest.raises(EngineError, match=message):
        tensorrt.build(path, tmp_path, options)
    assert not (tmp_path / TENSORRT.engine_file).exists()


def test_a_scan_that_did_not_become_the_plugin_is_named(
    engines: Engines, library: Callable[..., Path], tmp_path: Path
) -> None:
    path = save(lower(infer_shapes(traced_digits())), tmp_path)
    options = EngineOptions(plugin=plugin_for(engines, library), cache=tmp_path / "cache")
    entry = tensorrt.build(path, tmp_path, options)
    assert entry["build"]["network_types"]["float32"] > 100
    engines.behaviour.lost_scan = "block_3/scan"
    with pytest.raises(EngineError, match=r"1 scans did not become the SelectiveScan2D plugin: block_3/scan"):
        tensorrt.build(path, tmp_path, options)


def test_without_its_creator_the_parser_names_the_scan(engines: Engines) -> None:
    trt: Any = engines.module
    logger = make_logger(trt)
    data = tensorrt.prepare(lower(infer_shapes(traced_digits()))).SerializeToString()
    with pytest.raises(EngineError, match=r"SelectiveScan2D at node block_1/scan, block 1: Plugin not found"):
        tensorrt_builder.parse(trt, trt.Builder(logger), logger, data)


def test_a_driver_that_does_not_answer_is_told_of(
    engines: Engines, library: Callable[..., Path], tmp_path: Path
) -> None:
    plugin = plugin_for(engines, library)
    entry = built(engines, tmp_path, plugin)
    engines.behaviour.driver = False
    with pytest.raises(
        EngineError, match=r"TensorRT cannot be started: .*driver that knows CUDA 13\.0.*nvidia-smi"
    ):
        built(engines, tmp_path, plugin)
    with pytest.raises(EngineError, match="TensorRT cannot be started"):
        tensorrt.open(tmp_path, entry, plugin=plugin)


def test_a_driver_that_is_too_old_is_found_before_the_work(
    engines: Engines, library: Callable[..., Path], tmp_path: Path
) -> None:
    plugin = plugin_for(engines, library)
    entry = built(engines, tmp_path, plugin)
    engines.behaviour.calls.clear()
    engines.behaviour.driver_cuda = (12, 4)
    message = (
        r"TensorRT cannot be started: it needs an NVIDIA driver that knows CUDA 13\.0, and the one here knows CUDA up "
        r"to 12\.4; install a newer driver, or TensorRT for CUDA 12; `nvidia-smi`"
    )
    for attempt in (
        tensorrt.check,
        lambda: tensorrt.open(tmp_path, entry, plugin=plugin),
        lambda: built(engines, tmp_path, plugin),
    ):
        with pytest.raises(EngineError, match=message):
            attempt()
    assert "knows CUDA up to 12.4" in str(tensorrt.cannot_run(entry))
    assert engines.behaviour.calls == []
    # A driver that knows any CUDA 13 runs what another CUDA 13 made.
    engines.behaviour.driver_cuda = (13, 0)
    assert tensorrt.cannot_run(entry) is None


def test_what_is_missing_is_found_before_the_work(
    engines: Engines, library: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match="quartermap plugin build"):
        tensorrt.check()
    monkeypatch.setenv(tensorrt_plugin.PLUGIN_VARIABLE, str(plugin_for(engines, library)))
    tensorrt.check()
    assert engines.behaviour.calls == []
    monkeypatch.setenv(tensorrt_plugin.PLUGIN_VARIABLE, str(library(tensorrt=None)))
    with pytest.raises(EngineError, match="holds the kernels alone"):
        tensorrt.check()
    monkeypatch.setattr(cuda_runtime, "_runtime", lambda: None)
    with pytest.raises(MissingDependencyError, match=r"needs the CUDA runtime library.*pip install"):
        tensorrt.check()
    monkeypatch.setattr(gpu, "find_gpu", lambda: None)
    with pytest.raises(EngineError, match=r"GPU at hand, and there is none.*tensorrt-rtx"):
        tensorrt.check()


# The timing cache -----------------------------------------------------------------------------------------------


def timing_cache(engines: Engines, folder: Path) -> TimingCache:
    return TimingCache(configured(engines), TENSORRT, folder, "key" * 20)


def test_timings_are_kept_and_read_again(engines: Engines, tmp_path: Path) -> None:
    for runs in (1, 2):
        cache = timing_cache(engines, tmp_path / "cache")
        cache.save()
        assert cache.path.read_bytes() == b"timings;" * runs


@pytest.mark.parametrize("damage", ["none", "refused"])
def test_timings_that_cannot_be_read_are_replaced(engines: Engines, tmp_path: Path, damage: str) -> None:
    engines.behaviour.damaged_timing_cache = damage
    cache = timing_cache(engines, tmp_path)
    cache.path.write_bytes(b"of another TensorRT")
    timing_cache(engines, tmp_path).save()
    assert cache.path.read_bytes() == b"timings;"


def test_the_cache_of_a_build_lies_where_the_options_say(
    engines: Engines, library: Callable[..., Path], tmp_path: Path
) -> None:
    plugin = plugin_for(engines, library)
    entry = built(engines, tmp_path, plugin)
    (path,) = (tmp_path / "cache").iterdir()
    assert path.name == f"{entry['key'][:32]}.timing"
    built(engines, tmp_path, plugin)
    assert path.read_bytes() == b"timings;" * 2


# Running --------------------------------------------------------------------------------------------------------


def test_an_engine_runs_by_its_profiles(
    engines: Engines, library: Callable[..., Path], tmp_path: Path
) -> None:
    plugin = plugin_for(engines, library)
    session = tensorrt.open(tmp_path, built(engines, tmp_path, plugin), plugin=plugin)
    engines.behaviour.calls.clear()
    single, several = images(1), images(3, seed=1)
    first = session.run(single)
    kept = first.copy()
    assert first.dtype == np.float32
    np.testing.assert_allclose(first, expected(single), rtol=1e-5)
    np.testing.assert_allclose(session.run(several), expected(several), rtol=1e-5)
    np.testing.assert_allclose(session.run(images(1, seed=2)), expected(images(1, seed=2)), rtol=1e-5)
    np.testing.assert_array_equal(first, kept, "the runner writes its next outputs over its buffers")
    assert engines.behaviour.calls == [
        ("shape", (1, 3, 8, 8)),
        ("run", 0),
        ("profile", 1),
        ("shape", (3, 3, 8, 8)),
        ("run", 1),
        ("profile", 0),
        ("shape", (1, 3, 8, 8)),
        ("run", 0),
    ]
    with pytest.raises(InputError, match=r"found \(5, 3, 8, 8\)"):
        session.run(images(5))
    # Only parts of a larger array: rows are not one after the other in memory.
    wide = np.zeros((2, 3, 8, 16), np.float32)
    wide[..., ::2] = images(2)
    np.testing.assert_allclose(session.run(wide[..., ::2]), expected(images(2)), rtol=1e-5)


def several(batch: int, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs of `two_in_two_out`."""
    random = np.random.default_rng(seed)
    return {
        "features": random.standard_normal((batch, 2, 6)).astype(np.float32),
        "tokens": random.integers(0, 5, (batch, 4)),
        "scale": np.array(0.5, np.float32),
    }


def check_several(session: Any, profiles: list[tuple[str, Any]]) -> None:
    """Run several inputs and outputs in a session, and compare with ONNX Runtime and the portable model."""
    model = two_in_two_out()
    assert [(item.name, item.shape, item.type) for item in session.inputs] == [
        ("features", ("batch", 2, 6), "float32"),
        ("tokens", ("batch", 4), "int64"),
        ("scale", (), "float32"),
    ]
    assert [(item.name, item.shape, item.type) for item in session.outputs] == [
        ("scanned", ("any", 2, 6), "float32"),
        ("chosen", ("any", 4), "int64"),
    ]
    kept = []
    for batch in (1, 3):
        feeds = several(batch, batch)
        found, expected = session.infer(feeds), run(model, feeds)
        assert list(found) == ["scanned", "chosen"]
        assert error(found["scanned"], expected["scanned"]) <= 1e-5
        assert found["chosen"].dtype == np.int64
        np.testing.assert_array_equal(found["chosen"], expected["chosen"])
        kept.append((found["chosen"], expected["chosen"]))
    for before, expected_before in kept:
        np.testing.assert_array_equal(before, expected_before)
    # Rows that are not one after the other in memory.
    wide = np.zeros((1, 2, 12), np.float32)
    wide[..., ::2] = several(1, 1)["features"]
    found = session.infer({**several(1, 1), "features": wide[..., ::2]})
    assert error(found["scanned"], run(model, several(1, 1))["scanned"]) <= 1e-5
    assert [call for call in profiles if call[0] in ("profile", "run")] == [
        ("run", 0),
        ("profile", 1),
        ("run", 1),
        ("profile", 0),
        ("run", 0),
    ]


def refused_several(session: Any, changes: dict[str, Any], without: str = "") -> str:
    """What a session says of inputs that are not right."""
    feeds = {name: value for name, value in {**several(2), **changes}.items() if name != without}
    with pytest.raises(InputError) as caught:
        session.infer(feeds)
    return str(caught.value)


def test_several_inputs_and_outputs_run(
    engines: Engines, library: Callable[..., Path], tmp_path: Path
) -> None:
    plugin = plugin_for(engines, library)
    options = dataclasses.replace(OPTIONS, plugin=plugin, cache=tmp_path / "cache")
    example = {"features": (4, 2, 6), "tokens": (4, 4), "scale": ()}
    entry = tensorrt.build(save(two_in_two_out(), tmp_path), tmp_path, options, examples=[example])
    assert list(entry["inputs"]) == ["features", "tokens", "scale"]
    assert entry["outputs"] == ["scanned", "chosen"]
    entry = json.loads(json.dumps(entry))
    session = tensorrt.open(
        tmp_path, {**entry, "size_rules": ["tokens[0] != 4", "features[0] == tokens[0]"]}, plugin=plugin
    )
    engines.behaviour.calls.clear()
    check_several(session, engines.behaviour.calls)
    assert "no array for the input 'tokens'" in refused_several(session, {}, "tokens")
    assert "has no input 'images'" in refused_several(session, {"images": np.zeros(2)})
    text = refused_several(session, {"tokens": np.zeros((2, 4), np.float32)})
    assert "'tokens' of shape (batch, 4) and int64, found (2, 4) of float32" in text
    text = refused_several(session, {"scale": np.zeros(1, np.float32)})
    assert "'scale' of shape () and float32, found (1,)" in text
    assert "a batch of 3, but 'features' one of 2" in refused_several(
        session, {"tokens": several(3)["tokens"]}
    )
    assert "exported for sizes with tokens[0] != 4" in refused_several(session, several(4))
    assert "found features (5, 2, 6), tokens (5, 4), scale ()" in refused_several(session, several(5))
    with pytest.raises(InputError, match="by name"):
        session.run(several(1)["features"])


def test_scans_of_sequences_become_the_plugin_too(
    engines: Engines, library: Callable[..., Path], tmp_path: Path
) -> None:
    prepared = tensorrt.prepare(two_in_two_out())
    names = ["block_1/scan/group_1", "block_1/scan/group_2", "block_2/scan", "block_3/scan"]
    assert tensorrt_builder.scan_names(prepared) == names
    assert {node.op_type for node in prepared.graph.node if node.domain} == {"SelectiveScan2D"}
    options = EngineOptions(plugin=plugin_for(engines, library), cache=tmp_path / "cache")
    engines.behaviour.lost_scan = names[1]
    with pytest.raises(EngineError, match=f"1 scans did not become .* plugin: {names[1]} "):
        tensorrt.build(save(two_in_two_out(), tmp_path), tmp_path, options)


def test_memory_is_given_back(engines: Engines, library: Callable[..., Path], tmp_path: Path) -> None:
    plugin = plugin_for(engines, library)
    entry = built(engines, tmp_path, plugin)
    session = tensorrt.open(tmp_path, entry, plugin=plugin)
    session.run(images(1))
    assert engines.cuda.memory and engines.cuda.streams
    session.close()
    session.close()
    assert not engines.cuda.streams and not engines.cuda.memory
    # A session that is forgotten gives back what it has as well.
    session = tensorrt.open(tmp_path, entry, plugin=plugin)
    session.run(images(1))
    assert engines.cuda.memory
    del session
    gc.collect()
    assert not engines.cuda.streams and not engines.cuda.memory


@pytest.mark.parametrize(
    ("fault", "message"), [("run", "could not run the engine"), ("context", "could not prepare")]
)
def test_a_failure_of_tensorrt_is_an_error_of_ours(
    engines: Engines, library: Callable[..., Path], tmp_path: Path, fault: str, message: str
) -> None:
    plugin = plugin_for(engines, library)
    entry = built(engines, tmp_path, plugin)
    engines.behaviour.fails = fault
    with pytest.raises(EngineError, match=message):
        tensorrt.open(tmp_path, entry, plugin=plugin).run(images(1))


def test_an_engine_with_another_input_is_refused(
    engines: Engines, library: Callable[..., Path], tmp_path: Path
) -> None:
    plugin = plugin_for(engines, library)
    options = dataclasses.replace(OPTIONS, plugin=plugin, cache=tmp_path / "cache")
    entry = tensorrt.build(save(half_model(onnx.TensorProto.FLOAT16), tmp_path), tmp_path, options)
    with pytest.raises(
        BundleError,
        match=r'images of the engine .* is half, expected float32 or whole numbers; .*io = "float32"',
    ):
        tensorrt.open(tmp_path, entry, plugin=plugin)
    entry = built(engines, tmp_path, plugin)
    with pytest.raises(BundleError, match=r"has the inputs images; expected pictures"):
        tensorrt.open(tmp_path, {**entry, "inputs": {"pictures": entry["inputs"]["images"]}}, plugin=plugin)
    with pytest.raises(BundleError, match=r"has the outputs logits; expected logits, features"):
        tensorrt.open(tmp_path, {**entry, "outputs": ["logits", "features"]}, plugin=plugin)
    older = {key: value for key, value in entry.items() if key != "outputs"}
    with pytest.raises(BundleError, match=r"says too little .*\(outputs\); make it again"):
        tensorrt.open(tmp_path, older, plugin=plugin)
    for wrong in ({"inputs": ["images"]}, {"inputs": {"images": None}}, {"inputs": {"images": [1.5]}}):
        with pytest.raises(BundleError, match=r"says too little .*\(inputs\); make it again"):
            tensorrt.open(tmp_path, {**entry, **wrong}, plugin=plugin)
    with pytest.raises(BundleError, match=r"says too little .*\(outputs\); make it again"):
        tensorrt.open(tmp_path, {**entry, "outputs": "logits"}, plugin=plugin)


def test_an_engine_that_tensorrt_cannot_read_is_refused(
    engines: Engines, library: Callable[..., Path], tmp_path: Path
) -> None:
    plugin = plugin_for(engines, library)
    entry = built(engines, tmp_path, plugin)
    path = tmp_path / entry["file"]
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(BundleError, match=r"refuses the engine .*magicTag.*quartermap rebuild"):
        tensorrt.open(tmp_path, entry, plugin=plugin)


def test_a_version_compatible_engine_needs_trust_and_no_plugin(
    engines: Engines, library: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = built(engines, tmp_path, plugin_for(engines, library), version_compatible=True)
    monkeypatch.delenv(tensorrt_session.TRUST_VARIABLE, raising=False)
    with pytest.raises(
        BundleError, match=r"carries a TensorRT runtime and the plugin.*QUARTERMAP_TRUST_ENGINE_CODE=1"
    ):
        tensorrt.open(tmp_path, entry)
    np.testing.assert_allclose(
        tensorrt.open(tmp_path, entry, built_here=True).run(images(1)), expected(images(1)), rtol=1e-5
    )
    monkeypatch.setenv(tensorrt_session.TRUST_VARIABLE, "1")
    tensorrt.open(tmp_path, entry)


def test_other_engines_may_run_no_code_of_their_own(
    engines: Engines, library: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = plugin_for(engines, library)
    entry = built(engines, tmp_path, plugin, version_compatible=True)
    forged = {**entry, "options": {**entry["options"], "version_compatible": False}}
    monkeypatch.setenv(tensorrt_session.TRUST_VARIABLE, "1")
    with pytest.raises(BundleError, match="host code"):
        tensorrt.open(tmp_path, forged, plugin=plugin)


# The plugin library ---------------------------------------------------------------------------------------------


def test_libraries_that_are_no_plugin_for_this_machine_are_refused(
    engines: Engines, library: Callable[..., Path], tmp_path: Path
) -> None:
    trt: Any = engines.module
    major = trt.__version__.partition(".")[0]
    found = tensorrt_plugin.check_library(trt, library(tensorrt=[major]))
    assert found.to_dict()["tensorrt"] == major
    with pytest.raises(EngineError, match="kernels alone"):
        tensorrt_plugin.check_library(trt, library(tensorrt=None))
    with pytest.raises(EngineError, match="emulates the kernels"):
        tensorrt_plugin.check_library(trt, library(cuda=None))
    with pytest.raises(
        EngineError, match=rf"serves TensorRT 9, rtx, found tensorrt {trt.__version__}; build"
    ):
        tensorrt_plugin.check_library(trt, library(tensorrt=["9", "rtx"]))
    with pytest.raises(PluginError, match=r"earlier release, for TensorRT 10\.13\.0 alone; build it anew"):
        tensorrt_plugin.check_library(trt, library(tensorrt="10.13.0"))
    with pytest.raises(PluginError, match="does not fit this release"):
        tensorrt_plugin.check_library(trt, library(version="0"))
    short = tmp_path / "short.so"
    short.write_bytes(library().read_bytes()[:9000])
    with pytest.raises(PluginError, match="cut short"):
        tensorrt_plugin.load_plugin(trt, make_logger(trt), short)
    assert engines.behaviour.calls == [], "none of them may reach TensorRT"


def test_a_library_is_loaded_once_and_another_refused(engines: Engines, library: Callable[..., Path]) -> None:
    trt: Any = engines.module
    logger, ours, other = make_logger(trt), library(), library(cuda="13.1")
    first = tensorrt_plugin.load_plugin(trt, logger, ours)
    assert tensorrt_plugin.load_plugin(trt, logger, ours) == first
    assert [name for name, _ in engines.behaviour.calls] == ["load_library"]
    with pytest.raises(EngineError, match=r"has loaded a plugin library already, .*in a process of its own"):
        tensorrt_plugin.load_plugin(trt, logger, other)


def test_a_library_that_somebody_else_loaded(
    engines: Engines, library: Callable[..., Path], tmp_path: Path
) -> None:
    trt: Any = engines.module
    logger = make_logger(trt)
    path = tmp_path / "new.so"
    shutil.copy(plugin_for(engines, library), path)
    trt.get_plugin_registry().load_library("of somebody else")
    with pytest.raises(EngineError, match="loaded a plugin library already, another one"):
        tensorrt_plugin.load_plugin(trt, logger, path)
    # Now this file is in the process. Where it is its own creator that the registry knows, loading it is no conflict.
    engines.creators.clear()
    tensorrt_plugin.load_plugin(trt, logger, path)


def test_a_registry_that_refuses(engines: Engines, library: Callable[..., Path]) -> None:
    engines.behaviour.fails = "load_library"
    trt: Any = engines.module
    with pytest.raises(EngineError, match=r"brought no creator of SelectiveScan2D .*quartermap plugin check"):
        tensorrt_plugin.load_plugin(trt, make_logger(trt), plugin_for(engines, library))


REAL_REGISTRY = """
import sys
from pathlib import Path
from quartermap_deploy.errors import EngineError
from quartermap_deploy.targets.tensorrt import plugin as tensorrt_plugin
from quartermap_deploy.targets.tensorrt.flavour import TENSORRT_RTX
from quartermap_deploy.targets.tensorrt.monitor import make_logger

trt = TENSORRT_RTX.load()
logger = make_logger(trt)
runtime = trt.Runtime(logger)
try:
    tensorrt_plugin.load_plugin(trt, logger, Path(sys.argv[1]))
except EngineError as error:
    print(error)
assert not tensorrt_plugin.has_creator(trt.get_plugin_registry())
"""


@needs_rtx
def test_a_real_registry_that_refuses(library: Callable[..., Path]) -> None:
    """The registry of TensorRT for RTX; the library has no plugin in it.

    In a process of its own: the registry tells its reasons to the first logger of the process.
    """
    command = [sys.executable, "-c", REAL_REGISTRY, str(library())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert re.search(r"brought no creator of SelectiveScan2D \(.*getCreators", done.stdout), done.stdout


def test_the_manifest_helps_to_find_the_library(
    engines: Engines, library: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, other = library(), library(cuda="13.1")
    entry = built(engines, tmp_path, wanted)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match=r"for this engine .*, sha256 \w+…, for TensorRT 10, 11, rtx"):
        tensorrt.open(tmp_path, entry)
    monkeypatch.setenv(tensorrt_plugin.PLUGIN_VARIABLE, str(other))
    with pytest.raises(BundleError, match=r"for TensorRT 10, 11, rtx, found another library .*--plugin"):
        tensorrt.open(tmp_path, entry)
    # The user's store has the right one, so that is taken, whatever the environment says.
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
    add_library(wanted.read_bytes(), wanted.name, "installed from a bundle", "a test")
    tensorrt.open(tmp_path, entry).run(images(1))
    # What is named is meant.
    with pytest.raises(BundleError, match="found another library"):
        tensorrt.open(tmp_path, entry, plugin=other)


# TensorRT for RTX, on a GPU -------------------------------------------------------------------------------------


def rtx_entry(folder: Path) -> dict[str, Any]:
    options = dataclasses.replace(OPTIONS, compute_capabilities=("8.9",), optimization_level=2)
    return tensorrt_rtx.build(save(small_model(), folder), folder, options)


def test_an_rtx_engine_runs_by_its_profiles(
    rtx: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
    folder = tmp_path / "bundle"
    folder.mkdir()
    entry = rtx_entry(folder)
    assert entry["build"]["read_by"] == "engine inspector"
    session = tensorrt_rtx.open(folder, entry)
    rtx.behaviour.calls.clear()
    assert session.config is not None and session.cache is session.config._cache  # type: ignore[attr-defined]
    first = session.run(images(1))
    kept = first.copy()
    np.testing.assert_allclose(first, expected(images(1)), rtol=1e-5)
    np.testing.assert_allclose(session.run(images(4, 1)), expected(images(4, 1)), rtol=1e-5)
    np.testing.assert_allclose(session.run(images(2, 2)), expected(images(2, 2)), rtol=1e-5)
    np.testing.assert_array_equal(first, kept)
    assert [call for call in rtx.behaviour.calls if call[0] in ("profile", "run")] == [
        ("run", 0),
        ("profile", 1),
        ("run", 1),
        ("run", 1),
    ]
    (cache,) = (tmp_path / "home" / "cache").glob("*.runtime")
    assert cache.read_bytes() == b"kernels"
    session.close()
    assert not rtx.cuda.memory and not rtx.cuda.streams
    tensorrt_rtx.open(folder, entry)
    assert rtx.behaviour.calls[-1] == ("runtime cache", b"kernels")
    rtx.behaviour.fails = "run"
    with pytest.raises(EngineError, match="could not run the engine"):
        tensorrt_rtx.open(folder, entry).run(images(1))
    rtx.behaviour.fails = "context"
    with pytest.raises(EngineError, match="could not prepare the engine"):
        tensorrt_rtx.open(folder, entry)


def test_an_rtx_engine_with_several_inputs_and_outputs(rtx: Engines, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, compute_capabilities=("8.9",))
    entry = tensorrt_rtx.build(save(two_in_two_out(), tmp_path), tmp_path, options)
    session = tensorrt_rtx.open(tmp_path, entry)
    rtx.behaviour.calls.clear()
    check_several(session, rtx.behaviour.calls)
    session.close()
    assert not rtx.cuda.memory and not rtx.cuda.streams


def test_an_output_whose_size_depends_on_values_is_refused(rtx: Engines, tmp_path: Path) -> None:
    model = small_model()
    model.graph.node.append(helper.make_node("NonZero", ["logits"], ["found"], name="nonzero"))
    model.graph.output.append(helper.make_tensor_value_info("found", onnx.TensorProto.INT64, [2, None]))
    options = dataclasses.replace(OPTIONS, compute_capabilities=("8.9",))
    session = tensorrt_rtx.open(tmp_path, tensorrt_rtx.build(save(model, tmp_path), tmp_path, options))
    with pytest.raises(EngineError, match="shape of the output found depends on the values"):
        session.infer({"images": images(1)})


def test_an_rtx_engine_for_other_gpus_is_built_all_the_same(
    rtx: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = rtx_entry(tmp_path)
    assert tensorrt_rtx.cannot_run(entry) is None
    monkeypatch.setattr(gpu, "find_gpu", lambda: Gpu("NVIDIA RTX 2080", "7.5"))
    assert "found a NVIDIA RTX 2080 of 7.5" in str(tensorrt_rtx.cannot_run(entry))
    monkeypatch.setattr(gpu, "find_gpu", lambda: None)
    assert "no NVIDIA driver answers" in str(tensorrt_rtx.cannot_run(entry))


def test_an_rtx_engine_is_built_where_the_driver_is_too_old(rtx: Engines, tmp_path: Path) -> None:
    """Building needs no driver; the engine is then read as where there is none, and is not run."""
    rtx.behaviour.driver_cuda = (11, 8)
    entry = rtx_entry(tmp_path)
    assert entry["build"]["read_by"] == "plan"
    assert "knows CUDA up to 11.8" in str(tensorrt_rtx.cannot_run(entry))
    with pytest.raises(EngineError, match=r"TensorRT for RTX cannot be started: .* up to 11\.8"):
        tensorrt_rtx.open(tmp_path, entry)


# CUDA -----------------------------------------------------------------------------------------------------------


def test_the_version_of_cuda_is_that_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def cuda(package: str | None, library: str | None) -> str | None:
        monkeypatch.setattr(tensorrt_flavour.Flavour, "_cuda_of_package", lambda self: package)
        monkeypatch.setattr(tensorrt_flavour, "runtime_version", lambda: library)
        return TENSORRT.cuda()

    assert cuda(None, None) is None
    assert cuda(None, "12.6") == "12.6", "JetPack's TensorRT has no package that Python knows"
    assert cuda("13", None) == "13"
    assert cuda("13", "13.1") == "13.1"
    assert cuda("12", "13.1") == "12", "a library of another CUDA is not the one that TensorRT takes"


def test_the_runtime_of_nvidias_packages_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polygraphy import cuda

    for name in ("cu12", "cu13"):
        (tmp_path / "nvidia" / name / "lib").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    folders = cuda_runtime.wheel_folders()
    assert folders[0] == str(tmp_path / "nvidia" / "cu13" / "lib")
    searched: list[str] = []

    def wrapper() -> Any:
        import os

        searched.append(os.environ.get("LD_LIBRARY_PATH", ""))
        raise OSError("no libcudart.so")

    monkeypatch.setenv("LD_LIBRARY_PATH", "/before")
    monkeypatch.setattr(cuda, "wrapper", wrapper)
    with pytest.raises(
        MissingDependencyError, match=r"running it needs the CUDA runtime library.*nvidia-cuda-runtime"
    ):
        cuda_runtime.require_runtime("running it")
    assert searched[0] == "/before" and searched[1].startswith(folders[0]) and searched[1].endswith("/before")


def test_the_version_of_this_machines_runtime() -> None:
    cuda_runtime.runtime_version.cache_clear()
    found = cuda_runtime.runtime_version()
    if found is None:
        pytest.skip("no CUDA runtime library")
    major, minor = found.split(".")
    assert int(major) >= 11 and 0 <= int(minor) < 20
