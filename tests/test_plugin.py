"""The TensorRT plugin: the test host, the registry of TensorRT for RTX, building, checking and the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import plugin_builds
import pytest

from quartermap_deploy.cli import main
from quartermap_deploy.errors import MissingDependencyError
from quartermap_deploy.gpu import find_gpu
from quartermap_deploy.native import build
from quartermap_deploy.native.build import BuildOptions, build_plugin, plugin_sources
from quartermap_deploy.native.check import check_plugin
from quartermap_deploy.native.contract import CONTRACT
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.native.library import load
from quartermap_deploy.scan.cuda import Kernels, enable_cuda_kernels

GOLDEN = plugin_sources() / "test_host" / "write_golden.py"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    subprocess.run([sys.executable, str(GOLDEN), str(folder)], check=True, timeout=120)
    return folder


def test_host_drives_the_plugin(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> None:
    """All host-side checks, and the kernels on the CPU."""
    folder = plugin_builds.emulated_plugin(tmp_path_factory)
    host = [str(folder / "quartermap_test_host"), str(folder / "libquartermap_plugin.so")]
    done = subprocess.run([*host, str(golden)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " 0 failed" in done.stdout
    skipped = subprocess.run(host, capture_output=True, text=True, timeout=100)
    assert skipped.returncode == 77 and "SKIPPED" in skipped.stdout


@pytest.mark.parametrize("preloaded", [True, False], ids=["LD_PRELOAD", "polygraphy"])
@pytest.mark.parametrize("with_tensorrt", [True, False])
def test_loaded_before_tensorrt(
    tmp_path_factory: pytest.TempPathFactory, with_tensorrt: bool, preloaded: bool
) -> None:
    """A plain dlopen registers with a TensorRT that is in the process by then, and with none that comes later."""
    rtx = pytest.importorskip(
        "tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed", exc_type=ImportError
    )
    library = plugin_builds.emulated_plugin(tmp_path_factory) / "libquartermap_plugin.so"
    [tensorrt] = (Path(rtx.__file__).parents[1] / "tensorrt_rtx_libs").glob("libtensorrt_rtx.so.*")
    # Preloaded libraries are initialised from the last to the first; polygraphy loads its --plugins in their order.
    order = [str(library), *([str(tensorrt)] if with_tensorrt else [])]
    environment = {**os.environ, "LD_PRELOAD": " ".join(order)} if preloaded else None
    arguments = [] if preloaded else order[::-1]
    done = subprocess.run(
        [sys.executable, "-c", LOADED_FIRST, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ("['SelectiveScan2D']" if with_tensorrt else "[]")


LOADED_FIRST = """
import sys
from polygraphy.backend.trt import LoadPlugins
LoadPlugins(sys.argv[1:])()
assert "tensorrt_rtx" not in sys.modules
import tensorrt_rtx as trt

class Quiet(trt.ILogger):
    def __init__(self): trt.ILogger.__init__(self)
    def log(self, severity, message): pass

runtime = trt.Runtime(Quiet())
print([c.name for c in trt.get_plugin_registry().all_creators if c.plugin_namespace == "quartermap"])
"""


def test_checking_a_library_needs_no_torch() -> None:
    """A bundle with a TensorRT engine is run without torch, and its plugin is checked before it is loaded."""
    script = "import sys; from quartermap_deploy.native import check; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_check_accepts_the_plugin(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    library = plugin_builds.emulated_plugin(tmp_path_factory) / "libquartermap_plugin.so"
    report = check_plugin(library)
    assert report.build["tensorrt"] == ["10", "11", "rtx"]
    if report.registry is not None:
        assert [(c.name, c.version, c.namespace) for c in report.creators] == [
            ("SelectiveScan2D", "1", "quartermap")
        ]
    assert main(["plugin", "check", str(library), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["contract"] == CONTRACT.to_dict()
    assert main(["plugin", "check", str(library)]) == 0
    assert "quartermap::SelectiveScan2D version 1" in capsys.readouterr().out


def test_a_folder_called_tensorrt_is_none(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = plugin_builds.emulated_plugin(tmp_path_factory) / "libquartermap_plugin.so"
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    try:
        assert not str(check_plugin(library).registry).startswith("tensorrt ")
    finally:
        sys.modules.pop("tensorrt", None)


def test_check_refuses_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PluginError, match="no plugin library"):
        check_plugin(tmp_path / "missing.so")
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"\x7fELF and then nothing")
    with pytest.raises(PluginError, match="no 64-bit ELF library"):
        check_plugin(damaged)
    assert main(["plugin", "check", str(damaged)]) == 2
    assert "no 64-bit ELF library" in capsys.readouterr().err


FOREIGN = 'extern "C" int something() { return 1; }'
STALE = (
    'extern "C" const char* quartermap_plugin_contract() { return "{\\"name\\": \\"SelectiveScan2D\\"}"; }'
)
OLDER = 'extern "C" const char* quartermap_plugin_contract() { return R"~(' + (
    json.dumps({**CONTRACT.to_dict(), "build": {"tensorrt": "10.13.0", "cuda": "13.0"}}) + ')~"; }'
)
SILENT = 'extern "C" const char* quartermap_plugin_contract() { return nullptr; }'


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (FOREIGN, "no plugin of quartermap-deploy"),
        (STALE, "does not fit this release"),
        (SILENT, "describe itself"),
        (OLDER, r"by an earlier release, for TensorRT 10\.13\.0 alone; build it anew"),
    ],
    ids=["foreign", "stale", "silent", "older"],
)
def test_check_refuses_other_libraries(tmp_path: Path, source: str, words: str) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path / "library.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)],
        input=source,
        text=True,
        check=True,
    )
    with pytest.raises(PluginError, match=words):
        check_plugin(library)


def test_check_of_kernels_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    report = check_plugin(plugin_builds.emulated_kernels(tmp_path_factory))
    assert report.note is not None and "kernels only" in report.note
    assert report.creators == ()


def test_build_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install cmake"):
        build_plugin(output)
    monkeypatch.setattr(build.shutil, "which", lambda name: "/bin/cmake" if name == "cmake" else None)
    monkeypatch.setattr(build, "NVCC_PLACES", ())
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MissingDependencyError, match="CUDA toolkit"):
        build_plugin(output, BuildOptions(kernels_only=True))
    assert not output.exists()


@pytest.mark.skipif(
    not Path("/proc/self").is_dir(), reason="there is no /proc, where nobody may make a folder"
)
def test_build_asks_first_whether_it_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_cmake", lambda: pytest.fail("the output was not looked at before"))
    with pytest.raises(PluginError, match=r"cannot write into /proc/plugin/out: .*--out"):
        build_plugin(Path("/proc/plugin/out"))
    (tmp_path / "file").touch()
    with pytest.raises(PluginError, match="is no folder"):
        build_plugin(tmp_path / "file")
    with pytest.raises(PluginError, match="cannot write into"):
        build_plugin(tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_build_that_fails_leaves_the_old_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin_builds.require_compiler()
    sources = tmp_path / "plugins"
    shutil.copytree(plugin_sources(), sources)
    (sources / "contract" / "contract.cpp").write_text("#error planted\n")
    monkeypatch.setattr(build, "plugin_sources", lambda: sources)
    output = tmp_path / "out"
    output.mkdir()
    options = BuildOptions(kernels_only=True, emulation=True, optimisation="-O0")
    (output / options.library).write_text("old")
    with pytest.raises(PluginError, match="planted"):
        build_plugin(output, options)
    assert [path.name for path in output.iterdir()] == [options.library]
    assert (output / options.library).read_text() == "old"


@pytest.mark.parametrize("name", ["ninety", "9", "90;rm", "90-fast"])
def test_build_refuses_architectures(tmp_path: Path, name: str) -> None:
    plugin_builds.require_compiler()
    with pytest.raises(PluginError, match="CUDA architecture"):
        build_plugin(tmp_path, BuildOptions(kernels_only=True, emulation=True, cuda_architectures=(name,)))


def test_the_kernels_compile(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With nvcc, for one architecture; what the compiler makes of them runs on a GPU alone."""
    library = plugin_builds.compiled_plugin(tmp_path_factory)
    assert {path.name for path in library.parent.iterdir()} - {".done"} == {library.name}
    report = check_plugin(library)
    assert report.build["architectures"] == "80" and report.build["cuda"] is not None
    assert os.access(library, os.X_OK)
    if find_gpu() is None:
        with pytest.raises(PluginError, match=r"NVIDIA driver|no CUDA-capable device"):
            Kernels(library).plan((1, 2, 7, 7, 1, 0), ("row",), True, "float32")
        with pytest.raises(PluginError, match=r"PyTorch .* finds no GPU"):
            enable_cuda_kernels(library)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugin"]) == 0
    text = capsys.readouterr().out
    assert "build" in text and "check" in text


def test_a_library_that_is_cut_short_is_refused_and_not_mapped(tmp_path: Path) -> None:
    origin = np._core._multiarray_umath.__file__  # type: ignore[attr-defined]
    data = Path(origin).read_bytes()
    for size in (10, 5000, len(data) // 2, len(data) - 100):
        short = tmp_path / "short.so"
        short.write_bytes(data[:size])
        with pytest.raises(PluginError, match=r"cut short|no 64-bit ELF"):
            load(short)
    with pytest.raises(PluginError, match="is a folder"):
        load(tmp_path)
