"""Engines are run where they are built, on a stand-in for TensorRT and its GPU: compile, rebuild, validate, localise.

`tensorrt_stand_in.py` says what it is. What is tested is what this package makes of an engine that is right, one that
is wrong in 16 bits, and a machine that cannot run it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_stand_in as stand_in
from tensorrt_stand_in import Engines, node_types
from test_cli import call
from test_tensorrt_calls import ADA, VERSIONS, library  # noqa: F401  (fixture)

import quartermap_deploy as qm
from quartermap_deploy import compiler, compiling, gpu
from quartermap_deploy.errors import BundleError, EngineError, ParityError, UnknownNameError
from quartermap_deploy.progress import SILENT
from quartermap_deploy.rebuild import rebuild_bundle
from quartermap_deploy.revalidate import localise_bundle, validate_bundle
from quartermap_deploy.targets.tensorrt import plugin as tensorrt_plugin
from quartermap_deploy.targets.tensorrt import target as tensorrt
from quartermap_deploy.targets.tensorrt.options import EngineOptions, Profile
from quartermap_deploy.validation import localise

pytestmark = pytest.mark.usefixtures("small_models")

MODEL, RELEASE = "vmamba_digits", "10.7"
FAULTY = 7
"""The block that the planted fault is in."""


@pytest.fixture(scope="module")
def plugin(library: Callable[..., Path]) -> Path:  # noqa: F811
    """A library that says that it is our plugin."""
    return library()


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, plugin: Path) -> Iterator[Engines]:
    """A machine with a GPU, TensorRT and the plugin, as far as this package can tell."""
    monkeypatch.setattr(gpu, "find_gpu", lambda: ADA)
    monkeypatch.setenv(tensorrt_plugin.PLUGIN_VARIABLE, str(plugin))
    with stand_in.installed(VERSIONS[RELEASE], stand_in.public_api(RELEASE)) as found:
        yield found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, plugin: Path) -> Path:
    """A bundle in float16 with an engine that was run; tests must not change it."""
    path = tmp_path_factory.mktemp("proof") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "find_gpu", lambda: ADA)
        with stand_in.installed(VERSIONS[RELEASE], stand_in.public_api(RELEASE)):
            options = EngineOptions(plugin=plugin, profiles=(Profile((1, 1, 1)), Profile((2, 2, 8))))
            qm.compile(recipe(engine=options), path)
    return path


def recipe(**settings: Any) -> qm.Recipe:
    chosen: dict[str, Any] = {"precision": "float16", "targets": ("onnxruntime", "tensorrt"), **settings}
    return qm.Recipe(MODEL, quartermap=qm.QuarterMap(every=3), **chosen)


def half_block(model: onnx.ModelProto, block: int) -> bool:
    """Whether a block's scan is computed in 16 bits."""
    types = node_types(model)
    (scan,) = (node for node in model.graph.node if node.name == f"block_{block}/scan")
    return types[scan.output[0]] == onnx.TensorProto.FLOAT16


def wrong_in_16_bits(model: onnx.ModelProto) -> float:
    """A fault that goes away as soon as block `FAULTY` is back in float32."""
    return 1.1 if half_block(model, FAULTY) else 1.0


_exports: dict[tuple[Any, ...], Any] = {}
export_model = compiling.export.export_model


def exported_once(recipe: qm.Recipe, source: Any, progress: Any, traced: Any = None) -> Any:
    """`export_model`, which takes most of these tests' time, once for each recipe."""
    # A set, as the range scan and the bundle's report tell the same names in different orders.
    key = (recipe.precision, recipe.quartermap, recipe.blocks_float32, frozenset(recipe.keep_float32))
    if key not in _exports:
        _exports[key] = export_model(recipe, source, progress, traced)
    return _exports[key]


@pytest.fixture(autouse=True, scope="module")
def _fewer_exports() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Where `compile` has it, and where it is imported from when a bundle is localised.
        patch.setattr(compiler, "export_model", exported_once)
        patch.setattr(compiling.export, "export_model", exported_once)
        yield


@pytest.fixture
def two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Localising tries two blocks instead of ten: each takes an engine."""
    block_parts = localise.block_parts

    def fewer(graph: onnx.GraphProto) -> dict[int, Any]:
        parts = block_parts(graph)
        return {part: parts[part] if part else [] for part in (0, FAULTY - 1, FAULTY)}

    monkeypatch.setattr(localise, "block_parts", fewer)


@pytest.fixture
def copied(compiled: Path, tmp_path: Path) -> Path:
    """A bundle that a test may change."""
    return Path(shutil.copytree(compiled, tmp_path / "bundle"))


# Compiling ------------------------------------------------------------------------------------------------------


def test_the_manifest_says_that_the_engine_ran(compiled: Path) -> None:
    entry = qm.load_bundle(compiled).manifest["targets"]["tensorrt"]
    assert entry["run"] is True and entry["not_run"] is None
    assert entry["parity"]["cases"] == ["images", "single image", "zeros"]
    # The stand-in rounds less than a float16 runtime would, and more than nothing.
    assert 1e-7 < entry["parity"]["worst_relative_error"] <= entry["parity"]["tolerance"] == 5e-3
    assert entry["build"]["types_checked"] is True
    assert entry["build"]["engine_types"]["float16"] > 100


def test_the_block_at_fault_is_named_when_compiling_fails(
    engines: Engines, two_blocks: None, tmp_path: Path
) -> None:
    engines.behaviour.wrong = wrong_in_16_bits
    with pytest.raises(ParityError, match=rf"Nothing was written; block_{FAULTY} in float32 restores parity"):
        qm.compile(recipe(), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_a_fault_in_float32_is_none_of_precision(engines: Engines, compiled: Path) -> None:
    engines.behaviour.wrong = lambda model: 1.1
    entry = qm.load_bundle(compiled).manifest["targets"]["tensorrt"]
    golden = qm.load_bundle(compiled).manifest["golden"]
    settings = (recipe(precision="float32"), None, "tensorrt", tensorrt, compiled, entry, golden, SILENT)
    with pytest.raises(
        ParityError, match=r"departs from golden outputs .*\. Nothing was written; please report"
    ):
        compiling.engines.prove(*settings)  # type: ignore[arg-type]


def test_what_is_missing_stops_before_the_export(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_export(*arguments: Any) -> Any:
        raise AssertionError("it was exported")

    monkeypatch.setattr(compiler, "export_model", no_export)
    monkeypatch.setattr(gpu, "find_gpu", lambda: None)
    with pytest.raises(EngineError, match="GPU at hand, and there is none"):
        qm.compile(recipe(), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


# Validating and rebuilding --------------------------------------------------------------------------------------


def test_a_bundle_is_validated_in_its_engine(engines: Engines, compiled: Path, plugin: Path) -> None:
    bundle = qm.load_bundle(compiled)
    report = validate_bundle(bundle, "tensorrt")
    assert report["passed"] and report["target"].startswith("tensorrt")
    engines.behaviour.wrong = lambda model: 1.1
    outcome = call("validate", compiled, "--target", "tensorrt", "--plugin", plugin)
    assert outcome.code == 2 and "departs" in outcome.err


def test_the_plugin_can_be_named(
    engines: Engines, compiled: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(tensorrt_plugin.PLUGIN_VARIABLE)
    monkeypatch.chdir(tmp_path)
    outcome = call("validate", compiled, "--target", "tensorrt")
    assert outcome.code == 2 and "for this engine libquartermap_plugin.so" in outcome.err
    outcome = call("validate", compiled, "--target", "tensorrt", "--plugin", plugin, "--json")
    assert outcome.code == 0 and outcome.json["passed"]
    bundle = qm.load_bundle(compiled)
    logits = bundle.session("tensorrt", plugin=plugin).run(np.zeros((3, 3, 64, 64), np.float32))
    assert logits.shape == (3, 10)


def test_a_rebuilt_engine_is_run(engines: Engines, copied: Path) -> None:
    bundle = rebuild_bundle(copied, "tensorrt")
    assert bundle.manifest["targets"]["tensorrt"]["run"] is True
    outcome = call("rebuild", copied)
    assert outcome.code == 0 and "ran here passed, worst error" in " ".join(outcome.out.split())
    narrow = EngineOptions(profiles=(Profile((1, 1, 1)),))
    entry = rebuild_bundle(copied, options=narrow).manifest["targets"]["tensorrt"]
    assert entry["parity"]["cases"] == ["single image"]
    entry = rebuild_bundle(copied, options=EngineOptions(profiles=(Profile((16, 16, 16)),)))
    assert entry.manifest["targets"]["tensorrt"]["run"] is False
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    engines.behaviour.wrong = lambda model: 1.1
    with pytest.raises(
        ParityError, match=rf"quartermap validate {copied} --localise --target tensorrt` names"
    ):
        rebuild_bundle(copied, options=narrow)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_an_engine_whose_types_nobody_read_is_told_of(engines: Engines, copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    entry = manifest["targets"]["tensorrt"]
    from quartermap_deploy.cli.rebuild import engine_warnings

    assert engine_warnings("tensorrt", entry) == []
    entry["build"]["types_checked"] = False
    (warning,) = engine_warnings("tensorrt", entry)
    assert "could not be read back" in warning and "float16" in warning


# Localising -----------------------------------------------------------------------------------------------------


def test_the_faulty_block_of_an_engine_is_named(
    engines: Engines, two_blocks: None, compiled: Path, plugin: Path
) -> None:
    engines.behaviour.wrong = wrong_in_16_bits
    outcome = call("validate", compiled, "--localise", "--target", "tensorrt", "--plugin", plugin, "--json")
    assert outcome.code == 2
    assert outcome.json["restoring"] == [f"block_{FAULTY}"]
    assert f"--float32-blocks {FAULTY}" in outcome.err
    built = sum(name == "create_network" for name, _ in engines.behaviour.calls)
    assert built == outcome.json["models_compared"] == 3


def test_a_bundles_own_engine_that_departs_is_no_fault_of_precision(engines: Engines, compiled: Path) -> None:
    # The engine of the bundle was built before; those that are built now are another graph's.
    engines.behaviour.wrong = lambda model: 1.0 if len(engines.behaviour.calls) < 12 else 1.1
    with pytest.raises(
        BundleError, match=r"departs, though one that is built anew is right.*quartermap rebuild"
    ):
        localise_bundle(qm.load_bundle(compiled), "tensorrt")


def test_localising_in_a_target_without_its_engine(engines: Engines, copied: Path) -> None:
    """The bundle need not have an engine: compiling may have failed for it."""
    manifest = json.loads((copied / "manifest.json").read_text())
    entry = manifest["targets"].pop("tensorrt")
    manifest["files"].pop(entry["file"])
    (copied / entry["file"]).unlink()
    (copied / "manifest.json").write_text(json.dumps(manifest))
    report = localise_bundle(qm.load_bundle(copied), "tensorrt")
    assert report.passed and report.runs == 1 and "nothing to localise" in report.describe()


def test_localising_without_a_gpu_says_so_before_the_work(
    engines: Engines, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "find_gpu", lambda: None)
    monkeypatch.setattr(compiling.source, "load_source", lambda recipe: pytest.fail("the model was loaded"))
    bundle = qm.load_bundle(compiled)
    with pytest.raises(BundleError, match=r"localising in tensorrt builds engines .* no NVIDIA GPU"):
        localise_bundle(bundle, "tensorrt")
    with pytest.raises(UnknownNameError, match="tensort"):
        localise_bundle(bundle, "tensort")
