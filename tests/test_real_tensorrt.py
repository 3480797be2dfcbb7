"""The plugin and our calls with real TensorRT, without a GPU: its registries, its bindings, its headers where they are.

`real_tensorrt.py` says where the libraries come from. Each script runs in a process of its own.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import cpu_builds
import plugin_builds
import pytest
import real_tensorrt
from tensorrt_names import RELEASES, public_api

from quartermap_deploy import gpu
from quartermap_deploy.native.build import plugin_sources

INTERFACE = plugin_sources() / "tensorrt"
COMPARISON = cpu_builds.NATIVE_TESTS / "compare_tensorrt.cpp"


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plugin_builds.emulated_plugin(tmp_path_factory) / "libquartermap_plugin.so"


def registry_library(release: str) -> Path:
    """Return a library with a registry: lean's of a release, or TensorRT for RTX."""
    if release != "rtx":
        return real_tensorrt.lean_library(release)
    rtx = pytest.importorskip(
        "tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed", exc_type=ImportError
    )
    [found] = (Path(rtx.__file__).parents[1] / "tensorrt_rtx_libs").glob("libtensorrt_rtx.so.*")
    return found


# The registry ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", [*real_tensorrt.LEAN, "rtx"])
def test_host_drives_the_plugin_through_a_real_registry(plugin: Path, release: str) -> None:
    """One library of ours for all of them; the C++ host asks what TensorRT asks, of what the registry hands out."""
    command = [str(plugin.parent / "quartermap_test_host"), "--registry", str(registry_library(release))]
    done = subprocess.run([*command, str(plugin)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 77 and " 0 failed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    version = {"10.16": "1016", "11.4": "1104", "rtx": "107"}[release]
    assert re.search(rf"the registry of TensorRT {version}\d\d$", done.stdout, re.MULTILINE)
    assert int(re.findall(r"(\d+) checks", done.stdout)[0]) > 2900


REGISTER = """
import ctypes, sys
import numpy as np
import tensorrt as trt

registry = trt.get_plugin_registry()
ours = lambda: [(c.name, c.plugin_version) for c in registry.all_creators if c.plugin_namespace == "quartermap"]
assert ours() == []
ctypes.CDLL(sys.argv[1])
assert ours() == [("SelectiveScan2D", "1")], "a plain dlopen registers"
handle = registry.load_library(sys.argv[1])
assert handle is not None and len(ours()) == 1, "loading it by the registry afterwards is no conflict"
registry.deregister_library(handle)
assert ours() == []
assert registry.load_library(sys.argv[1]) is not None and len(ours()) == 1, "and once more"
creator = registry.get_creator("SelectiveScan2D", "1", "quartermap")
fields = [(field.name, field.type.name) for field in creator.field_names]
assert fields == [("directions", "CHAR"), ("softplus", "INT32")]
softplus = trt.PluginField("softplus", np.array([1], np.int32), trt.PluginFieldType.INT32)

def make(directions, *more, phase=trt.TensorRTPhase.BUILD):
    field = trt.PluginField("directions", directions, trt.PluginFieldType.CHAR)
    return creator.create_plugin("scan", trt.PluginFieldCollection([field, *(more or [softplus])]), phase)

made = make(b"row\\0column\\0")
core, build, runtime = map(made.get_capability_interface, trt.PluginCapabilityType.__members__.values())
assert (core.plugin_name, core.plugin_version, core.plugin_namespace) == ("SelectiveScan2D", "1", "quartermap")
kinds = [(each.interface_info.kind, each.interface_info.major) for each in (made, core, build, runtime)]
names = ("PLUGIN", "PLUGIN_V3ONE_CORE", "PLUGIN_V3ONE_BUILD", "PLUGIN_V3ONE_RUNTIME")
assert kinds == [(name, 1) for name in names], kinds
assert make(b"row,column_reverse", phase=trt.TensorRTPhase.RUNTIME) is not None
assert make(b"row,diagonal") is None
assert make(b"row", trt.PluginField("softplus", np.array([1], np.float32), trt.PluginFieldType.FLOAT32)) is None
print(trt.__version__)
"""


@pytest.mark.parametrize("release", real_tensorrt.LEAN)
def test_the_real_module_lists_makes_and_lets_go(plugin: Path, release: str) -> None:
    done = real_tensorrt.run(release, REGISTER, plugin)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(release)
    assert "unknown direction 'diagonal'" in done.stderr and "has to be one whole number" in done.stderr


OTHERS = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL(sys.argv[2])
"""


@pytest.mark.parametrize(("version", "registers"), [("80600", 0), ("120000", 0), ("10601", 0), ("110900", 1)])
def test_a_registry_of_another_version_is_left_alone(
    plugin: Path, tmp_path: Path, version: str, registers: int
) -> None:
    """A library that is no TensorRT, but says that it is one of a version whose registry we do not know, or know."""
    source = f"""
        #include <cstdio>
        #include <cstdlib>
        extern "C" int getInferLibVersion() {{ return {version}; }}
        extern "C" void* getPluginRegistry() {{ std::puts("asked"); std::fflush(stdout); std::_Exit(3); }}
    """
    library = tmp_path / "libother.so"
    command = [cpu_builds.compiler(), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    python = [sys.executable, "-c", OTHERS, str(library), str(plugin)]
    done = subprocess.run(python, capture_output=True, text=True, timeout=60)
    assert done.returncode == (3 if registers else 0), done.stderr
    assert done.stdout.count("asked") == registers


LOGGED = """
import sys
import numpy as np
import tensorrt_rtx as trt

class Kept(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.lines = []
    def log(self, severity, message): self.lines.append((severity, message))

logger = Kept()
runtime = trt.Runtime(logger)
registry = trt.get_plugin_registry()
registry.load_library(sys.argv[1])
creator = registry.get_creator("SelectiveScan2D", "1", "quartermap")
field = trt.PluginField("directions", b"row,diagonal", trt.PluginFieldType.CHAR)
assert creator.create_plugin("scan", trt.PluginFieldCollection([field]), trt.TensorRTPhase.BUILD) is None
[(severity, message)] = [line for line in logger.lines if "quartermap::SelectiveScan2D" in line[1]]
assert severity == trt.ILogger.ERROR, severity
print(message)
"""


def test_what_the_plugin_says_goes_to_the_logger(plugin: Path) -> None:
    """Of TensorRT for RTX, which makes a runtime, and with it takes a logger, without a GPU."""
    registry_library("rtx")
    done = subprocess.run(
        [sys.executable, "-c", LOGGED, str(plugin)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "unknown direction 'diagonal'" in done.stdout and "diagonal" not in done.stderr


CHECKED = """
import sys
from pathlib import Path
from quartermap_deploy.native.check import check_plugin
report = check_plugin(Path(sys.argv[1]))
print(report.registry, [(creator.name, creator.fields) for creator in report.creators])
"""


@pytest.mark.parametrize("release", real_tensorrt.LEAN)
def test_check_asks_the_real_module(plugin: Path, release: str) -> None:
    """Without a driver, where making a runtime first would end the process."""
    done = real_tensorrt.run(release, CHECKED, plugin)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"tensorrt {release}")
    assert "SelectiveScan2D" in done.stdout and "('softplus', 'INT32')" in done.stdout


LOADED = """
import sys
from pathlib import Path
import tensorrt as trt
from quartermap_deploy.targets.tensorrt import plugin
from quartermap_deploy.targets.tensorrt.monitor import make_logger
logger, path = make_logger(trt), Path(sys.argv[1])
library = plugin.load_plugin(trt, logger, path)
print(library.tensorrt, plugin.has_creator(trt.get_plugin_registry()))
assert plugin.load_plugin(trt, logger, path) == library, "it is there already"
"""


@pytest.mark.parametrize("release", real_tensorrt.LEAN)
def test_engines_load_the_library_into_the_real_registry(
    tmp_path_factory: pytest.TempPathFactory, release: str
) -> None:
    done = real_tensorrt.run(release, LOADED, plugin_builds.compiled_plugin(tmp_path_factory))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "10, 11, rtx True\n"


# The driver -----------------------------------------------------------------------------------------------------

STARTED = """
import dataclasses
import tensorrt as trt
from quartermap_deploy.errors import EngineError
from quartermap_deploy.targets.tensorrt.flavour import TENSORRT
from quartermap_deploy.targets.tensorrt.monitor import make_logger
from quartermap_deploy.targets.tensorrt.objects import make_builder, make_runtime
for make in (make_runtime, make_builder):
    try:
        made = make(trt, TENSORRT, make_logger(trt))
        print("made", type(made).__name__)
    except EngineError as error:
        print(error)
"""


@pytest.mark.parametrize("release", real_tensorrt.LEAN)
@pytest.mark.parametrize(
    ("driver", "says"), [(None, "no driver answers"), ("11080", "knows CUDA up to 11.8")]
)
def test_a_driver_that_is_missing_or_too_old_is_found_first(
    tmp_path: Path, release: str, driver: str | None, says: str
) -> None:
    """The real runtime of lean, asked without a driver, returns an object that is none, and the process dies of it."""
    environment = {}
    if driver is not None:
        source = f"""
            extern "C" int cuDriverGetVersion(int* version) {{ *version = {driver}; return 0; }}
            extern "C" int cuInit(unsigned) {{ return 100; }}
        """
        library = tmp_path / "libcuda.so.1"
        command = [cpu_builds.compiler(), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
        subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], input=source, text=True, check=True)
        environment["LD_LIBRARY_PATH"] = str(tmp_path)
    elif gpu.driver_cuda() is not None:
        pytest.skip("there is a driver")
    done = real_tensorrt.run(release, STARTED, environment=environment)
    assert done.returncode == 0, done.stderr
    runtime, builder = done.stdout.splitlines()
    cuda = "12" if release == real_tensorrt.TEN else "13"
    for line in (runtime, builder):
        assert "TensorRT cannot be started: it needs an NVIDIA driver" in line
        assert f"that knows CUDA {cuda}" in line and says in line and "nvidia-smi" in line


# The names of the module ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
def test_the_written_names_are_those_of_the_real_bindings(release: str) -> None:
    assert real_tensorrt.read_api(release) == public_api(release)


def test_what_did_not_change_is_in_the_releases_between() -> None:
    """What 10.7 and 11.4 have alike, 10.16 has, too."""
    oldest, newest = map(public_api, RELEASES)
    between, compared = real_tensorrt.read_api(real_tensorrt.TEN), 0
    for name, entry in oldest["classes"].items():
        for part, members in entry.items():
            for member, value in members.items():
                if newest["classes"].get(name, {}).get(part, {}).get(member) == value:
                    assert between["classes"][name][part][member] == value, (name, member)
                    compared += 1
    assert compared > 250


# The headers ----------------------------------------------------------------------------------------------------


def compare(folder: Path, include: Path, interface: Path = INTERFACE) -> subprocess.CompletedProcess[str]:
    """Compile and run the comparison with the headers in a folder."""
    program = folder / "compare"
    theirs = ["-isystem", str(include), "-isystem", str(plugin_builds.cuda_include())]
    command = [cpu_builds.compiler(), "-std=c++17", "-Wall", "-I", str(interface), *theirs]
    built = subprocess.run(
        [*command, str(COMPARISON), "-o", str(program)], capture_output=True, text=True, timeout=120
    )
    if built.returncode != 0:
        return built
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=20)


def test_every_layout_value_and_function_is_that_of_the_real_headers(tmp_path: Path) -> None:
    for include in plugin_builds.header_folders():
        done = compare(tmp_path, include)
        assert done.returncode == 0, f"{include}\n{done.stdout}{done.stderr}"
        assert " 0 differ" in done.stdout


CLONE = "    virtual IPluginV3* clone() noexcept = 0;\n"
FAULTS = {
    "a function too few": (
        "interface.h",
        "    virtual std::int32_t getNbOutputs() const noexcept = 0;\n",
        "",
    ),
    "a function too many": ("interface.h", CLONE, f"    virtual void more();\n{CLONE}"),
    "another argument": ("interface.h", "setTactic(std::int32_t", "setTactic(std::int64_t"),
    "another value": ("interface.h", "kBF16 = 7", "kBF16 = 8"),
    "another layout": ("interface.h", "std::int32_t nbDims;\n    std::int64_t d", "std::int64_t nbDims, d"),
    "another kind": ("interface.h", '"PLUGIN_V3ONE_CORE", 1', '"PLUGIN_V3ONE_CORE", 2'),
    "another name": ("interface.h", "v_1_0", "v_1_1"),
    "another place in the registry": ("registry.h", "    virtual void gap_5() noexcept = 0;\n", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_difference_would_be_found(tmp_path: Path, fault: str) -> None:
    include = plugin_builds.header_folders()[-1]
    name, before, after = FAULTS[fault]
    for header in ("interface.h", "registry.h"):
        text = (INTERFACE / header).read_text(encoding="utf-8")
        if header == name:
            assert before in text
            text = text.replace(before, after).replace(
                "v_1_0::", "v_1_1::" if "v_1_1" in after else "v_1_0::"
            )
        (tmp_path / header).write_text(text, encoding="utf-8")
    assert compare(tmp_path, include, tmp_path).returncode != 0


def test_everything_that_is_declared_is_compared() -> None:
    """Needs no header: every name of ours stands in the comparison."""
    compared = COMPARISON.read_text(encoding="utf-8")
    text = re.sub(r"//[^\n]*", "", (INTERFACE / "interface.h").read_text(encoding="utf-8"))
    functions = re.findall(r"virtual [^~(]*?(\w+)\(", text)
    values = re.findall(r"^    (k[A-Z0-9]+) = \d+", text, re.MULTILINE)
    assert len(functions) > 25 and len(values) > 30
    missing = [name for name in functions if f", {name})" not in compared]
    missing += [name for name in values if f"::{name})" not in compared]
    text = re.sub(r"//[^\n]*", "", (INTERFACE / "registry.h").read_text(encoding="utf-8"))
    called = [name for name in re.findall(r"virtual [^~(]*?(\w+)\(", text) if not name.startswith("gap_")]
    assert len(called) > 10
    missing += [name for name in called if f"::{name}" not in compared and f"({name})" not in compared]
    assert not missing
