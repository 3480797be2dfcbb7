"""The CPU library: built once, found where it may be, refused with a reason where it does not fit."""

from __future__ import annotations

import json
import os
import platform
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import toy_bundles
from command_line import call
from cpu_builds import compiler, put_into_cache

from quartermap_deploy import __version__, doctor
from quartermap_deploy.errors import MissingDependencyError
from quartermap_deploy.files import write_whole
from quartermap_deploy.native import apart
from quartermap_deploy.native.build import plugin_sources
from quartermap_deploy.native.cpu_build import (
    CPU_LIBRARY,
    CpuBuildOptions,
    build_cpu_library,
    built_libraries,
    cpu_sources,
    find_compiler,
    sources_hash,
)
from quartermap_deploy.native.cpu_library import INTERFACE, find_cpu_library, load_cpu_library
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.native.library_format import FormatError, check_format
from quartermap_deploy.native.seal import sealed

SETS = ("avx512", "avx2", "baseline", "neon")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's own folders, empty."""
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


# Building -------------------------------------------------------------------------------------------------------


def test_what_is_built_describes_itself(cpu_library: Path) -> None:
    found = load_cpu_library(cpu_library)
    assert found.contract["release"] == __version__ and found.contract["sources"] == sources_hash()
    assert found.contract["operators"] == ["SelectiveScan2D", "SelectiveScan", "LayerNormalization2D"]
    assert found.instruction_set in SETS and found.instruction_set in found.contract["instruction_sets"]
    if platform.machine() == "x86_64":
        assert found.contract["instruction_sets"] == ["avx512", "avx2", "baseline"]


def test_every_source_is_part_of_the_hash() -> None:
    names = set(cpu_sources())
    assert {"kernels/cpu/avx512.cpp", "onnxruntime/registration.cpp", "kernels/cpu/simd.h"} <= names
    assert "kernels/include/quartermap/cpu_scan.h" in names and not any(".cu" in name for name in names)


@pytest.mark.skipif(sys.platform != "linux", reason="symbols are listed by readelf")
def test_only_our_functions_are_exported(cpu_library: Path) -> None:
    """What the C++ library brings into ours would otherwise take the place of what others in the process use."""
    done = subprocess.run(
        ["readelf", "--wide", "--dyn-syms", str(cpu_library)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    exported = {row[7] for row in rows if len(row) > 7 and row[4] in ("GLOBAL", "WEAK") and row[6].isdigit()}
    assert "RegisterCustomOps" in exported
    assert [name for name in exported if name != "RegisterCustomOps" and "quartermap_cpu_" not in name] == []


def test_what_lies_in_the_cache_is_not_built_again(cpu_library: Path, home: Path) -> None:
    compiler()
    kept = put_into_cache(cpu_library, home)
    before = kept.stat().st_mtime_ns
    assert build_cpu_library() == kept and kept.stat().st_mtime_ns == before
    assert built_libraries() == [kept]
    found = find_cpu_library()
    assert found.library is not None and found.library.path == kept and found.refused == ()
    assert found.library.origin == "built here" and found.library.instruction_set in found.summary


def test_sources_that_do_not_compile(home: Path, tmp_path: Path) -> None:
    """The first errors are shown, and nothing is left behind."""
    compiler()
    options = CpuBuildOptions(flags=("-include", "no-such-header.h"))
    with pytest.raises(PluginError, match=r"(?s)could not be compiled by .*error") as caught:
        build_cpu_library(tmp_path / "out", options)
    assert len(str(caught.value).splitlines()) < 30
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_without_a_compiler(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_compiler(monkeypatch, tmp_path)
    with pytest.raises(MissingDependencyError, match=r"needs a C\+\+17 compiler.*(apt install|xcode|winget)"):
        build_cpu_library()
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(MissingDependencyError, match="no compiler no-such-compiler -O2"):
        find_compiler()
    outcome = call("native", "build")
    assert outcome.code == 2 and len(outcome.messages) == 1 and not outcome.out
    assert not home.exists()


def test_no_compiler_at_all(tmp_path: Path) -> None:
    """A program of that name that does something else."""
    with pytest.raises(MissingDependencyError, match="no compiler that can be used"):
        find_compiler(f"{sys.executable} -c 'raise(SystemExit(3))'")


def test_a_command_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "'g++")
    with pytest.raises(MissingDependencyError, match="is no command: No closing quotation"):
        find_compiler()


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler in this test is a script")
@pytest.mark.parametrize(
    ("makes", "said"),
    [("exit 0", "and wrote none"), ('echo junk > "$last"', "is no .* library, so it is not kept")],
)
def test_a_compiler_that_makes_nothing_of_use(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, makes: str, said: str
) -> None:
    script = tmp_path / "c++"
    script.write_text(
        f"#!/bin/sh\ncase $1 in --version|-dumpmachine) exec {compiler()} $1;; esac\n"
        f'last=; for word; do [ "$before" = -o ] && last=$word; before=$word; done\n{makes}\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(PluginError, match=said):
        build_cpu_library()
    assert built_libraries() == []


def test_a_library_that_was_damaged_in_the_cache_is_built_again(cpu_library: Path, home: Path) -> None:
    compiler()
    kept = put_into_cache(cpu_library, home)
    kept.write_bytes(cpu_library.read_bytes()[:100_000])
    assert call("native", "list", "--json").json["libraries"][0]["whole"] is False
    assert "damaged" in call("native", "list").out
    assert build_cpu_library() == kept
    found = find_cpu_library()
    assert found.library is not None and found.refused == ()


# Finding --------------------------------------------------------------------------------------------------------


def test_nothing_was_built(home: Path) -> None:
    found = find_cpu_library()
    assert found.library is None and found.refused == () and "quartermap native build" in found.summary
    assert not home.exists(), "looking for one makes nothing"


@pytest.mark.parametrize("word", ["0", "off", "No", "false"])
def test_turned_off(cpu_library: Path, home: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    put_into_cache(cpu_library, home)
    monkeypatch.setenv("QUARTERMAP_NATIVE", word)
    found = find_cpu_library()
    said = f"turned off by QUARTERMAP_NATIVE={word}"
    assert found.library is None and found.summary == said and found.warning is None
    outcome = call("native", "check", "--json")
    assert outcome.code == 2 and outcome.json["summary"] == said and said in outcome.err


def test_the_environment_names_one(cpu_library: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_into_cache(cpu_library, home)
    monkeypatch.setenv("QUARTERMAP_NATIVE", str(cpu_library))
    found = find_cpu_library()
    assert found.library is not None
    assert (found.library.path, found.library.origin) == (cpu_library, "QUARTERMAP_NATIVE")


def test_the_search_goes_on_behind_what_does_not_fit(
    cpu_library: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = put_into_cache(cpu_library, home)
    for named, reason in (
        ("lib/relative.so", "expected 0, 1, or the path"),
        ("2", "expected 0, 1, or the path"),
        (str(home / "none.so"), "there is no CPU"),
    ):
        monkeypatch.setenv("QUARTERMAP_NATIVE", named)
        found = find_cpu_library()
        assert found.library is not None and found.library.path == kept
        [(place, why)] = found.refused
        assert reason in why and place in (named, "QUARTERMAP_NATIVE")
        assert found.warning == f"{' '.join(why.split())}; {kept} is used"
        checked = call("native", "check")
        assert (
            checked.code == 2
            and "passed over" not in checked.out
            and checked.messages[-1].endswith("is used")
        )


def test_the_environment_may_say_that_a_library_is_wanted(
    cpu_library: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = put_into_cache(cpu_library, home)
    monkeypatch.setenv("QUARTERMAP_NATIVE", "1")
    found = find_cpu_library()
    assert found.library is not None and found.library.path == kept and not found.refused


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
@pytest.mark.parametrize("which", ["native", "the library's"])
def test_a_cache_that_others_may_write_to(cpu_library: Path, home: Path, which: str) -> None:
    kept = put_into_cache(cpu_library, home)
    folder = kept.parent if which == "the library's" else kept.parents[1]
    folder.chmod(0o777)
    found = find_cpu_library()
    assert found.library is None
    [(_, why)] = found.refused
    assert "others may write to" in why and "chmod 700" in why
    assert str(found.warning).endswith("the portable form runs")
    assert call("native", "check").err.count("others may write to") == 1
    outcome = call("native", "build")
    assert outcome.code == 2 and "others may write to" in outcome.err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other links")
def test_a_link_in_the_cache_is_passed_over(cpu_library: Path, home: Path) -> None:
    kept = put_into_cache(cpu_library, home)
    kept.unlink()
    kept.symlink_to(cpu_library)
    assert find_cpu_library().library is None


def test_looking_needs_no_other_package(cpu_library: Path) -> None:
    """Also in the build of a wheel, where there is none: as it were with -S, without site-packages."""
    script = "from quartermap_deploy.native import cpu_library; print(cpu_library.find_cpu_library().summary)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={
            **os.environ,
            "QUARTERMAP_NATIVE": str(cpu_library),
            "PYTHONPATH": str(plugin_sources().parent),
        },
    )
    assert done.returncode == 0 and "(QUARTERMAP_NATIVE, " in done.stdout, done.stderr


def test_an_instruction_set_that_is_none_is_said_once(
    cpu_library: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two libraries neither can be used, for one reason. The library has read the variable when it was loaded."""
    from quartermap_deploy.native.cpu_kernels import CpuKernels

    put_into_cache(cpu_library, home)
    monkeypatch.setenv("QUARTERMAP_NATIVE", str(cpu_library))
    monkeypatch.setenv("QUARTERMAP_INSTRUCTION_SET", "rubbish")
    monkeypatch.setattr(CpuKernels, "instruction_set", property(lambda self: "none"))
    [(place, why)] = find_cpu_library().refused
    assert place == "QUARTERMAP_INSTRUCTION_SET" and "is 'rubbish'; expected one of" in why


@pytest.mark.parametrize("named", ["/nope.so", "2"])
def test_who_runs_a_model_is_told_that_another_form_runs(
    home: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    bundle = toy_bundles.classifier()
    monkeypatch.setenv("QUARTERMAP_NATIVE", named)
    both = call("bench", bundle, "--scans", "auto", "portable", "--repeats", 1, "--quiet")
    [warning] = [line for line in both.messages if "warning" in line and "the portable form runs" in line]
    assert both.code == 0 and named in warning
    portable = call("bench", bundle, "--scans", "portable", "--repeats", 1, "--quiet")
    assert portable.code == 0 and named not in portable.err
    validated = call("validate", bundle, "--quiet")
    assert validated.code == 0 and validated.messages == [warning]


@pytest.mark.parametrize("name", ["avx1024", "baseline"])
def test_the_instruction_set_that_is_asked_for(cpu_library: Path, name: str) -> None:
    """In a process of its own: the library reads the variable as it is loaded."""
    done = subprocess.run(
        [sys.executable, "-m", "quartermap_deploy", "native", "check", str(cpu_library), "--json"],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "QUARTERMAP_INSTRUCTION_SET": name},
    )
    if name == "baseline" and platform.machine() == "x86_64":
        assert json.loads(done.stdout)["library"]["instruction_set"] == "baseline"
    elif name != "baseline":
        assert done.returncode == 2 and "is 'avx1024'; expected one of" in done.stderr


# Refusing -------------------------------------------------------------------------------------------------------


def changed(library: Path, path: Path, before: bytes, after: bytes) -> Path:
    """A copy with some bytes replaced by as many others, sealed as if it had been built so."""
    data = library.read_bytes()
    assert len(before) == len(after) and before in data and before != after
    write_whole(path, sealed(data.replace(before, after)))
    return path


def refusal(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Why a library that the environment names is not used."""
    monkeypatch.setenv("QUARTERMAP_NATIVE", str(path))
    found = find_cpu_library()
    assert found.library is None and found.summary.startswith("none fits: ")
    [(place, why)] = found.refused
    assert place == str(path)
    outcome = call("native", "check", path)
    assert outcome.code == 2 and not outcome.out
    return why


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (
            f'"release": "{__version__}"',
            f'"release": "{"9" * len(__version__)}"',
            "release: the library has '9",
        ),
        (f'"version": {INTERFACE}', '"version": 9', f"version: the library has 9, this package {INTERFACE}"),
        (sources_hash(), "0" * 64, "sources: the library has '000"),
        ('{"library": ', '["library", ', "does not describe itself"),
    ],
    ids=["release", "version", "sources", "contract"],
)
def test_a_library_of_another_version(
    cpu_library: Path,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: str,
    after: str,
    reason: str,
) -> None:
    path = changed(cpu_library, tmp_path / CPU_LIBRARY, before.encode(), after.encode())
    assert reason in refusal(path, monkeypatch)


@pytest.mark.skipif(sys.platform != "linux", reason="these are ELF files")
def test_damaged_and_foreign_files(
    cpu_library: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = cpu_library.read_bytes()
    other = 183 if data[18] == 62 else 62
    for name, content, reason in (
        ("empty", b"", "no 64-bit ELF library"),
        ("text", b"#!/bin/sh\n" * 50, "no 64-bit ELF library"),
        ("half", data[: len(data) // 2], "cut short"),
        ("a byte less", data[:-1], "cut short"),
        ("machine", data[:18] + struct.pack("<H", other) + data[20:], "another kind of machine"),
        ("program", data[:16] + b"\2\0" + data[18:], "no shared library"),
        ("another", data.replace(b"quartermap_cpu_contract", b"quartermap_gpu_contract"), "no CPU library"),
    ):
        path = tmp_path / f"{name}.so"
        path.write_bytes(content)
        assert reason in refusal(path, monkeypatch), name
    assert "is a folder" in refusal(tmp_path, monkeypatch)


@pytest.mark.parametrize("step", [997, 100_003])
def test_what_would_end_the_process_is_refused_before_it_is_loaded(
    cpu_library: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Bits that were turned round behind the tables, of which the file says nothing."""
    data = bytearray(cpu_library.read_bytes())
    for place in range(40_000, len(data) - 40_000, step):
        data[place] ^= 4
    path = tmp_path / CPU_LIBRARY
    path.write_bytes(data)
    assert "is damaged: its checksum" in refusal(path, monkeypatch)


def mach_o(machine: int, end: int) -> bytes:
    """The head of a library for macOS, with one segment."""
    header = struct.pack("<8I", 0xFEED_FACF, machine, 0, 6, 1, 72, 0, 0)
    return header + struct.pack("<II16s4Q4I", 0x19, 72, b"__TEXT", 0, 0, 0, end, 0, 0, 0, 0)


def pe(machine: int, end: int) -> bytes:
    """The head of a library for Windows, with one section."""
    header = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 64) + b"PE\0\0"
    header += struct.pack("<HHIIIHH", machine, 1, 0, 0, 0, 0, 0x2000)
    return header + struct.pack("<8sIIII16x", b".text", 0, 0, end - 64, 64)


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_formats_of_other_systems(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of files alone: nothing of them is loaded. Each is read as on its own system, and refused on this one."""
    from quartermap_deploy.native import library_format

    make, name = {"darwin": (mach_o, library_format.MACH_O), "win32": (pe, library_format.PE)}[system]
    arm, x86 = (0x0100_000C, 0x0100_0007) if system == "darwin" else (0xAA64, 0x8664)
    if sys.platform != system:
        with pytest.raises(FormatError, match=r"was built for (macOS|Windows), and this is"):
            check_format(make(x86, 100))
    monkeypatch.setattr(library_format, "_HERE", name)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    check_format(make(arm, 100))
    for data, reason in (
        (make(x86, 100), "another kind of machine than this arm64"),
        (make(arm, 100_000), "cut short: it has .* bytes of 100,000"),
        (make(arm, 100)[:90], "cut short"),
        (b"\x7fELF\2" + bytes(100), "was built for Linux"),
    ):
        with pytest.raises(FormatError, match=reason):
            check_format(data)


# The command line -----------------------------------------------------------------------------------------------


def test_check_and_list(cpu_library: Path, home: Path) -> None:
    assert call("native", "list", "--json").json == {
        "folder": str(home / "cache" / "native"),
        "libraries": [],
    }
    kept = put_into_cache(cpu_library, home)
    found = call("native", "check", "--json").json
    assert found["library"]["path"] == str(kept) and found["library"]["origin"] == "built here"
    named = call("native", "check", cpu_library, "--json").json
    assert named["library"]["path"] == str(cpu_library) and named.keys() == found.keys()
    assert named["library"]["origin"] == "named"
    [listed] = call("native", "list", "--json").json["libraries"]
    assert listed["path"] == str(kept) and listed["fits"] is listed["whole"] is True
    shown = call("native", "check")
    assert shown.code == 0 and found["library"]["instruction_set"] in shown.out
    assert call("native", "list").code == 0 and call("native", "check", cpu_library, "--quiet").out == ""


def test_doctor(cpu_library: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    half = tmp_path / "half.so"
    half.write_bytes(cpu_library.read_bytes()[:-100])
    kept = put_into_cache(cpu_library, home)
    monkeypatch.setenv("QUARTERMAP_NATIVE", str(half))
    monkeypatch.setenv("QUARTERMAP_PASSPHRASE", "nobody's business")
    outcome = call("doctor", "--json")
    assert outcome.code == 0 and "nobody" not in outcome.out
    found = outcome.json
    assert found["quartermap_deploy"]["version"] == __version__
    runtime = found["onnxruntime"]
    assert runtime["version"] == onnxruntime.__version__ and runtime["problem"] is None
    assert runtime["providers"] == onnxruntime.get_available_providers()
    [cpu] = [probe for probe in runtime["probes"] if probe["provider"] == "CPUExecutionProvider"]
    assert cpu["starts"] and cpu["works"] and cpu["reason"] is None and cpu["seconds"] > 0
    assert (
        any(name.startswith("onnxruntime") for name in runtime["packages"]) and "torch" in found["packages"]
    )
    assert found["machine"]["cores"]["usable"] >= 1
    cpu = found["native"]["cpu"]
    assert cpu["library"]["path"] == str(kept)
    [refused] = cpu["refused"]
    assert refused["place"] == str(half) and (sys.platform != "linux" or "cut short" in refused["reason"])
    assert found["environment"]["QUARTERMAP_NATIVE"] == str(half)
    assert found["folders"]["CPU libraries"] == {
        "path": str(kept.parents[1]),
        "exists": True,
        "problem": None,
    }
    table = call("doctor")
    # Long paths are broken to fit the table.
    assert re.search(r"CPUExecutionProvider +works", table.out)
    assert table.code == 0 and str(half) in "".join(table.out.split()) and "passed over" in table.out


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_doctor_survives_a_library_that_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTERMAP_NATIVE", "/lib.so")
    monkeypatch.setattr(apart, "_CHILD", "import os; os.kill(os.getpid(), 4)")
    found = apart.examine("cpu")
    assert (
        found.keys() == {"error"} and "by SIGILL); it may be the one of QUARTERMAP_NATIVE" in found["error"]
    )
    monkeypatch.setattr(apart, "_CHILD", "print('no JSON')")
    assert "exit code 0" in apart.examine("cpu")["error"]


def test_doctor_says_of_every_library_that_is_named_why_it_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rubbish = tmp_path / "rubbish.so"
    rubbish.write_bytes(b"rubbish" * 100)
    for kind, variable in (("cuda", "QUARTERMAP_NATIVE_CUDA"), ("plugin", "QUARTERMAP_PLUGIN")):
        for value, reason in ((str(rubbish), "it is damaged or no library"), ("x.so", "from / on")):
            monkeypatch.setenv(variable, value)
            found = apart.examine(kind)
            assert found["library"] is None and reason in found["summary"], found
        monkeypatch.delenv(variable)
        assert apart.examine(kind)["library"] is None


def test_doctor_where_much_is_missing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_compiler(monkeypatch, tmp_path)
    monkeypatch.setenv("QUARTERMAP_HOME", "relative")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = doctor.examine()
    assert "error" in found["onnxruntime"] and found["compilers"]["c++"] is None
    assert "expected a path from / on" in found["folders"]["cache"]["problem"]
    outcome = call("doctor")
    assert outcome.code == 0 and "ModuleNotFoundError" in outcome.out


def test_doctor_without_any_package(home: Path) -> None:
    """With -S there are no site-packages, so the command line would not start."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "quartermap_deploy.doctor"],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(plugin_sources().parent)},
    )
    assert done.returncode == 0, done.stderr
    assert "ModuleNotFoundError" in json.loads(done.stdout)["onnxruntime"]["error"]
