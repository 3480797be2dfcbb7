"""Engines of TensorRT for RTX with our plugin: built for real, without a GPU; refused; opened on a stand-in.

No GPU has run such an engine.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import plugin_builds
import pytest
from helpers import traced_digits
from tensorrt_stand_in import Engines
from test_tensorrt_calls import library, rtx  # noqa: F401  (fixtures)
from test_tensorrt_rtx import needs_rtx, save, two_in_two_out

import quartermap_deploy as qm
from quartermap_deploy.cli.compile import recipe_and_folder
from quartermap_deploy.cli.program import build_parser
from quartermap_deploy.errors import BundleError, EngineError, InputError, QuartermapError
from quartermap_deploy.exporting.export import export_onnx
from quartermap_deploy.files import file_hash
from quartermap_deploy.native.store import add_library
from quartermap_deploy.passes.cast_precision import cast_precision
from quartermap_deploy.passes.lower import lower
from quartermap_deploy.passes.shapes import infer_shapes
from quartermap_deploy.targets.tensorrt import rtx as tensorrt_rtx
from quartermap_deploy.targets.tensorrt import target as tensorrt
from quartermap_deploy.targets.tensorrt.checks import PLAN, check_plugins, plan_plugins, rtx_header
from quartermap_deploy.targets.tensorrt.options import EngineOptions, Profile
from quartermap_deploy.targets.tensorrt.plugin import PLUGIN_VARIABLE, runs_on

OPTIONS = EngineOptions(profiles=(Profile((1, 2, 4)),), compute_capabilities=("8.9",), scan="plugin")

BUILD = """
import json, sys
from pathlib import Path
from quartermap_deploy.targets.tensorrt import rtx
from quartermap_deploy.targets.tensorrt.options import EngineOptions
folder, options = Path(sys.argv[1]), EngineOptions.from_dict(json.loads(sys.argv[2]))
print(json.dumps(rtx.build(folder / "model.onnx", folder, options)))
"""


def build(folder: Path, plugin: Path, options: EngineOptions = OPTIONS) -> dict[str, Any]:
    """Build in a process of its own, as a registry cannot be emptied, and with no path to search libraries in."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder), json.dumps(options.to_dict())],
        env={**environment, PLUGIN_VARIABLE: str(plugin)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    entry: dict[str, Any] = json.loads(done.stdout)
    return entry


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin as nvcc makes it."""
    return plugin_builds.compiled_plugin(tmp_path_factory)


# Built for real -------------------------------------------------------------------------------------------------


@needs_rtx
def test_every_scan_of_the_digits_is_the_plugin(compiled: Path, tmp_path: Path) -> None:
    typed, _ = cast_precision(infer_shapes(traced_digits()), "float16")
    save(lower(typed), tmp_path)
    entry = build(tmp_path, compiled)
    data = (tmp_path / entry["file"]).read_bytes()
    assert rtx_header(data[:64]) == (len(data), entry["version"])
    assert entry["plugin"]["sha256"] == file_hash(compiled) and entry["plugin"]["architectures"] == ["80"]
    assert entry["options"]["scan"] == "plugin"
    made = entry["build"]
    scans = [f"block_{block}/scan" for block in range(1, 11)]
    assert sorted(plan_plugins(data)) == sorted(scans) and made["plugins"] == 10
    assert made["types_checked"] and made["products"]["in_engine"] == made["products"]["of_graph"] > 60
    # The tree body has thousands of layers. benchmarks/tensorrt_build.py measures how long either takes.
    assert made["network_layers"] < 800
    with pytest.raises(EngineError, match=r"1 scans did not become .* plugin: block_11/scan \(plan\)"):
        check_plugins([*scans, "block_11/scan"], plan_plugins(data), PLAN)
    with pytest.raises(EngineError, match="10 scans did not become"):
        check_plugins(scans, plan_plugins(data.replace(b"quartermap", b"otherplace")), PLAN)


@needs_rtx
def test_every_scan_of_vmamba_tiny_is_the_plugin(compiled: Path, tmp_path: Path) -> None:
    """In float16, with a third of the positions scanned: no tree anywhere, and 16 bits wherever the model has them."""
    card = qm.create_model("vmamba_tiny_s1l8")
    save(export_onnx(card, (1, 3, 224, 224), qm.QuarterMap(every=3), precision="float16"), tmp_path)
    # What compiling a bundle for this target does; the portable file has function bodies for the scans.
    entry = build(tmp_path, compiled)
    made = entry["build"]
    data = (tmp_path / entry["file"]).read_bytes()
    scans = [f"block_{block}/scan" for block in range(1, 15)]
    assert sorted(plan_plugins(data)) == sorted(scans) and made["plugins"] == 14
    # A scan is one layer, where its tree would be more than a hundred.
    assert made["network_layers"] < 1300
    assert made["types_checked"] and made["engine_types"]["float16"] > 400
    assert made["products"]["in_engine"] == made["products"]["of_graph"] == 89
    assert 40e6 < made["engine_bytes"] < 100e6


@needs_rtx
def test_scans_of_both_operators_in_float32(compiled: Path, tmp_path: Path) -> None:
    save(two_in_two_out(), tmp_path)
    entry = build(tmp_path, compiled, dataclasses.replace(OPTIONS, compute_capabilities=("8.6", "12.0")))
    # The scan of sequences has two groups, each a scan of maps with one row.
    assert entry["build"]["plugins"] == 4
    assert entry["outputs"] == ["scanned", "chosen"]


# Refused --------------------------------------------------------------------------------------------------------


def asked(**options: Any) -> SimpleNamespace:
    targets = options.pop("targets", ("tensorrt-rtx",))
    return SimpleNamespace(engine=dataclasses.replace(OPTIONS, **options), targets=targets)


@needs_rtx
def test_a_library_without_code_for_a_gpu_is_refused(library: Callable[..., Path]) -> None:  # noqa: F811
    tensorrt_rtx.check(asked(plugin=library()))
    message = (
        r"holds code for the architectures 80-real, 89-real, none for compute capability 12\.0; build it with "
        r"`quartermap plugin build --cuda-architectures 80-real,89-real,120`"
    )
    with pytest.raises(EngineError, match=message):
        tensorrt_rtx.check(asked(plugin=library(), compute_capabilities=("8.9", "12.0")))
    with pytest.raises(EngineError, match=r"serves TensorRT 10, 11, found tensorrt_rtx 1\."):
        tensorrt_rtx.check(asked(plugin=library(tensorrt=["10", "11"])))


@needs_rtx
def test_without_a_library_it_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PLUGIN_VARIABLE, raising=False)
    with pytest.raises(EngineError, match=r"scans need the SelectiveScan2D plugin; build it with"):
        tensorrt_rtx.check(asked())
    tensorrt_rtx.check(asked(scan="auto"))


@needs_rtx
def test_a_library_that_nothing_would_use_is_refused(library: Callable[..., Path]) -> None:  # noqa: F811
    for scan in ("auto", "tree"):
        with pytest.raises(InputError, match=rf"scan = '{scan}'.* takes no plugin library.*--scan plugin"):
            tensorrt_rtx.check(asked(scan=scan, plugin=library()))
    tensorrt_rtx.check(asked(scan="auto", plugin=library(), targets=("tensorrt", "tensorrt-rtx")))


def test_a_release_without_plugins_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = SimpleNamespace(
        __version__="1.6.1.120", ComputeCapability=SimpleNamespace(__members__={"SM89": 89})
    )
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", old)
    message = r"TensorRT for RTX 1\.6\.1\.120 takes no plugins, .* from 1\.7 on.*--scan tree"
    with pytest.raises(InputError, match=message):
        tensorrt_rtx.check(asked())
    with pytest.raises(InputError, match=message):
        tensorrt_rtx.build(save(two_in_two_out(), tmp_path), tmp_path, OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("architectures", "runs", "not_on"),
    [
        ("80", "8.0 8.6 8.9 9.0 12.0", "7.5"),
        ("80-real", "8.0 8.6 8.9", "9.0 12.0"),
        ("86-real,89-real", "8.6 8.9", "8.0 9.0"),
        ("87-real", "8.7", "8.9"),
        ("90-virtual", "9.0 10.0 12.0", "8.9"),
        ("90a", "9.0", "10.0"),
        ("100f", "10.0 10.3", "9.0 12.0"),
        ("120", "12.0 12.1", "11.0"),
        ("all", "", "8.9"),
    ],
)
def test_which_gpus_code_runs_on(architectures: str, runs: str, not_on: str) -> None:
    names = architectures.split(",")
    assert [gpu for gpu in f"{runs} {not_on}".split() if runs_on(names, gpu)] == runs.split()


# Asked for ------------------------------------------------------------------------------------------------------


def test_the_command_line_and_recipes_say_what_scans_become(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = build_parser()
    words = ["compile", "vmamba_digits", "--targets", "tensorrt-rtx"]
    assert recipe_and_folder(parser.parse_args(words))[0].engine.scan == "auto"
    recipe, _ = recipe_and_folder(parser.parse_args([*words, "--scan", "plugin"]))
    assert recipe.engine.scan == "plugin"
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.to_toml(tmp_path))
    assert 'scan = "plugin"' in file.read_text() and qm.Recipe.load(file).engine.scan == "plugin"
    for value, says in (("forest", "none of auto, plugin, tree"), ("a:f=b:g", "named with --scan-function")):
        with pytest.raises((SystemExit, QuartermapError)) as caught:
            parser.parse_args([*words, "--scan", value])
        assert says in capsys.readouterr().err + str(caught.value)
    with pytest.raises(InputError, match=r"scan = 'forest'; expected one of auto, plugin, tree"):
        EngineOptions(scan="forest")


def test_tensorrt_has_the_plugin_alone(rtx: Engines) -> None:  # noqa: F811
    """On a stand-in for the whole TensorRT, under whose name that of RTX is put here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt, "TENSORRT", dataclasses.replace(tensorrt_rtx.TENSORRT_RTX, portable=False))
        with pytest.raises(InputError, match=r'scan = "tree" is for the target tensorrt-rtx'):
            tensorrt.check(asked(scan="tree", targets=("tensorrt",)))


# Opened ---------------------------------------------------------------------------------------------------------


def test_the_library_comes_from_the_store_by_its_hash(
    rtx: Engines,  # noqa: F811
    library: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(PLUGIN_VARIABLE, raising=False)
    wanted, other = library(), library(cuda="13.1")
    options = dataclasses.replace(OPTIONS, plugin=wanted, cache=tmp_path / "cache")
    entry = tensorrt_rtx.build(save(two_in_two_out(), tmp_path), tmp_path, options)
    assert entry["plugin"]["sha256"] == file_hash(wanted) and entry["build"]["plugins"] == 4
    rtx.creators.clear()
    monkeypatch.setattr("quartermap_deploy.targets.tensorrt.plugin._loaded", {})
    with pytest.raises(
        EngineError, match=r"scans need the .* plugin, for this engine .*plugin install BUNDLE"
    ):
        tensorrt_rtx.open(tmp_path, entry)
    with pytest.raises(BundleError, match=r"found another library .*--plugin, or make it again with"):
        tensorrt_rtx.open(tmp_path, entry, plugin=other)
    kept = add_library(wanted.read_bytes(), wanted.name, "installed from a bundle", "a test")
    rtx.behaviour.calls.clear()
    session = tensorrt_rtx.open(tmp_path, entry)
    # Loaded before the engine was read, which the stand-in refuses without a creator.
    assert rtx.behaviour.calls[0] == ("load_library", str(kept.path))
    feeds = {
        "features": np.ones((2, 2, 6), np.float32),
        "tokens": np.ones((2, 4), np.int64),
        "scale": np.array(1.0, np.float32),
    }
    assert session.infer(feeds)["scanned"].shape == (2, 2, 6)
