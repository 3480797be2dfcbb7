"""Which CUDA and CPU library is taken: places that are tried in their order, and why one is not used."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quartermap_deploy.native import cpu_build, cpu_library, cuda_library
from quartermap_deploy.native.build import BuildOptions, plugin_sources
from quartermap_deploy.native.errors import PluginError


def test_the_cuda_library_is_looked_for_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QUARTERMAP_NATIVE_CUDA", raising=False)
    none = "no CUDA library was built here: quartermap native build --cuda"
    assert cuda_library.find_cuda_library() == cuda_library.CudaSearch(None, none)
    for word in cpu_library.ON:
        monkeypatch.setenv("QUARTERMAP_NATIVE_CUDA", word)
        assert cuda_library.find_cuda_library() == cuda_library.CudaSearch(None, none)
    monkeypatch.setenv("QUARTERMAP_NATIVE_CUDA", "lib.so")
    words = "QUARTERMAP_NATIVE_CUDA is 'lib.so'; expected 0, 1, or the path of a library from / on"
    assert cuda_library.find_cuda_library() == cuda_library.CudaSearch(None, words, named=True)
    monkeypatch.setenv("QUARTERMAP_NATIVE_CUDA", str(tmp_path / "none.so"))
    found = cuda_library.find_cuda_library()
    assert found.library is None and str(tmp_path / "none.so") in found.summary
    whole = cuda_library.CudaLibrary(tmp_path / "a.so", "13.0", "90")
    monkeypatch.setattr(cuda_library, "load_cuda_library", lambda path: whole)
    assert cuda_library.find_cuda_library() == cuda_library.CudaSearch(
        whole, str(tmp_path / "a.so"), named=True
    )


@pytest.mark.skipif(sys.platform == "win32", reason="folders are private by their mode")
def test_a_cuda_library_in_a_cache_that_others_may_write_to_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QUARTERMAP_NATIVE_CUDA", raising=False)
    loaded: list[Path] = []

    def load_cuda_library(path: Path) -> cuda_library.CudaLibrary:
        loaded.append(path)
        return cuda_library.CudaLibrary(path, "13.0", "90")

    monkeypatch.setattr(cuda_library, "load_cuda_library", load_cuda_library)
    kept = cuda_library._cached()
    kept.parent.mkdir(parents=True, mode=0o700)
    kept.touch()
    kept.parent.chmod(0o777)
    found = cuda_library.find_cuda_library()
    assert found.library is None and "others may write to" in found.summary and not loaded
    assert not found.named and found.warning is None
    kept.parent.chmod(0o700)
    found = cuda_library.find_cuda_library()
    assert found.library is not None and loaded == [kept] and found.warning is None
    assert found.to_dict() == {
        "library": {"path": str(kept), "cuda": "13.0", "architectures": "90"},
        "summary": str(kept),
    }
    # Where the environment names a library, its folder is for whoever named it to look after.
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("QUARTERMAP_NATIVE_CUDA", str(tmp_path / "open" / "own.so"))
    found = cuda_library.find_cuda_library()
    assert found.library is not None and found.named and loaded == [kept, tmp_path / "open" / "own.so"]


def test_who_names_a_cuda_library_is_told_why_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> cuda_library.CudaLibrary:
        raise PluginError(f"no\n  {path}")

    monkeypatch.setattr(cuda_library, "load_cuda_library", refused)
    monkeypatch.setenv("QUARTERMAP_NATIVE_CUDA", "/own.so")
    found = cuda_library.find_cuda_library()
    assert found == cuda_library.CudaSearch(None, "no /own.so", named=True)
    assert found.warning == "no /own.so; it runs without it"
    assert found.to_dict() == {"library": None, "summary": "no /own.so"}
    for word in (*cuda_library.OFF, "Off", "FALSE"):
        monkeypatch.setenv("QUARTERMAP_NATIVE_CUDA", word)
        found = cuda_library.find_cuda_library()
        assert found == cuda_library.CudaSearch(
            None, f"the CUDA library is turned off by QUARTERMAP_NATIVE_CUDA={word}"
        )
        assert found.warning is None


def test_a_cuda_library_is_taken_that_fits_this_release_and_was_made_for_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(build_: dict[str, Any] | None, *wrong: str, exported: str = "RegisterCustomOps") -> Any:
        contract: dict[str, Any] = {"kernels": 1} if build_ is None else {"kernels": 1, "build": build_}
        monkeypatch.setattr(cuda_library, "load", lambda path, kind: SimpleNamespace(**{exported: None}))
        monkeypatch.setattr(cuda_library, "describe", lambda library, path, kind: contract)
        monkeypatch.setattr(
            cuda_library, "differences", lambda found: list(wrong) if found == {"kernels": 1} else ["build"]
        )
        return cuda_library.load_cuda_library(Path("/a.so"))

    assert loaded({"cuda": "13.0", "architectures": "80,90"}) == cuda_library.CudaLibrary(
        Path("/a.so"), "13.0", "80,90"
    )
    with pytest.raises(
        PluginError, match=r"^/a\.so holds kernels or a TensorRT plugin, and no operator of ONNX"
    ):
        loaded({"cuda": "13.0"}, exported="getCreators")
    with pytest.raises(PluginError, match=r"(?s)/a\.so does not fit this release.*--cuda\n  one\n  two$"):
        loaded({"cuda": "13.0"}, "one", "two")
    for build_ in (None, {}, {"cuda": None}, {"architectures": "80"}):
        with pytest.raises(
            PluginError, match=r"/a\.so runs its kernels on the CPU, which is for tests alone"
        ):
            loaded(build_)


@pytest.mark.skipif(sys.platform == "win32", reason="folders are private by their mode")
def test_the_cuda_library_is_built_as_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
    given: list[Any] = []

    def built(output: Path, options: BuildOptions, **more: Any) -> Path:
        given.append((options, more))
        output.mkdir(exist_ok=True)
        (output / "made.so").write_bytes(b"library")
        return output / "made.so"

    monkeypatch.setattr(cuda_library, "build_plugin", built)
    more = {"progress": object(), "on_output": print}
    made = cuda_library.build_cuda_library(tmp_path / "out", ("80", "90"), **more)  # type: ignore[arg-type]
    assert made == tmp_path / "out" / "made.so"
    kept = cuda_library.build_cuda_library(None, ("120",), **more)  # type: ignore[arg-type]
    assert kept.read_bytes() == b"library" and kept == cuda_library._cached()
    assert kept.is_relative_to(tmp_path / "home") and stat.S_IMODE(kept.stat().st_mode) == 0o700
    for folder in (kept.parent, kept.parents[1], kept.parents[2]):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    options = [BuildOptions(onnxruntime=True, cuda_architectures=names) for names in (("80", "90"), ("120",))]
    assert given == [(each, more) for each in options]


def test_words_that_turn_native_code_off_and_on() -> None:
    assert set(cpu_library.OFF) == {"0", "off", "no", "false"}
    assert set(cpu_library.ON) == {"", "1", "on", "yes", "true"}


def test_the_library_reads_the_instruction_set_from_the_variable_that_is_shown() -> None:
    text = (plugin_sources() / "kernels/cpu/instruction_sets.cpp").read_text(encoding="utf-8")
    assert f'std::getenv("{cpu_library.INSTRUCTION_SET_VARIABLE}")' in text


def test_the_first_cpu_library_that_fits_is_taken_and_the_others_have_their_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which libraries fit is set here; how often they were asked for shows what is kept."""
    fitting: set[str] = set()
    asked: list[tuple[str, str]] = []

    def load_cpu_library(path: Path, origin: Any) -> cpu_library.CpuLibrary:
        asked.append((path.name, origin))
        if path.name == "set.so":
            raise cpu_library._InstructionSetError("no such instructions")
        if path.name not in fitting:
            raise PluginError(f"{path.name}\n  does not fit")
        return cpu_library.CpuLibrary(path, {"version": 1}, "wide", origin)

    places = [("QUARTERMAP_NATIVE", tmp_path / "own.so"), ("built here", tmp_path / "built.so")]
    monkeypatch.setattr(cpu_library, "load_cpu_library", load_cpu_library)
    monkeypatch.setattr(cpu_library, "_places", lambda refused: iter(places))
    monkeypatch.setenv("QUARTERMAP_NATIVE", str(tmp_path / "own.so"))
    monkeypatch.delenv("QUARTERMAP_INSTRUCTION_SET", raising=False)
    cpu_library._choose.cache_clear()
    reasons = {name: (str(tmp_path / name), f"{name}\n  does not fit") for name in ("own.so", "built.so")}
    found = cpu_library.find_cpu_library()
    assert found == cpu_library.CpuSearch(
        None, (reasons["own.so"], reasons["built.so"]), "none fits: own.so does not fit"
    )
    assert found.warning == "own.so does not fit; built.so does not fit; the portable form runs"
    assert cpu_library.named_and_passed_over(found)
    assert found.to_dict() == {
        "library": None,
        "refused": [{"place": place, "reason": reason} for place, reason in found.refused],
        "summary": found.summary,
    }
    assert asked == [("own.so", "QUARTERMAP_NATIVE"), ("built.so", "built here")]
    assert cpu_library.find_cpu_library() is found and len(asked) == 2
    # A library that changes, and another instruction set, are looked at anew.
    fitting.add("built.so")
    (tmp_path / "built.so").touch()
    found = cpu_library.find_cpu_library()
    assert found.library == cpu_library.CpuLibrary(
        tmp_path / "built.so", {"version": 1}, "wide", "built here"
    )
    assert found.refused == (reasons["own.so"],) and len(asked) == 4
    assert found.summary == f"{tmp_path / 'built.so'} (built here, wide)"
    assert found.warning == f"own.so does not fit; {tmp_path / 'built.so'} is used"
    assert found.library is not None and found.to_dict()["library"] == {
        "path": str(tmp_path / "built.so"),
        "contract": {"version": 1},
        "instruction_set": "wide",
        "origin": "built here",
    }
    monkeypatch.setenv("QUARTERMAP_INSTRUCTION_SET", "narrow")
    fitting.add("own.so")
    found = cpu_library.find_cpu_library()
    assert found.library is not None and found.library.origin == "QUARTERMAP_NATIVE" and len(asked) == 5
    assert found.refused == () and found.warning is None and not cpu_library.named_and_passed_over(found)
    # What holds for whichever library is taken is said once.
    places[:] = [("wheel", tmp_path / "set.so"), ("built here", tmp_path / "lower" / "set.so")]
    found = cpu_library.find_cpu_library()
    assert found.refused == (("QUARTERMAP_INSTRUCTION_SET", "no such instructions"),)
    assert not cpu_library.named_and_passed_over(found)
    places.clear()
    assert cpu_library.find_cpu_library() == cpu_library.CpuSearch(
        None, (), f"none was built: {cpu_library.BUILD}"
    )
    for word in (*cpu_library.OFF, "OFF"):
        monkeypatch.setenv("QUARTERMAP_NATIVE", word)
        found = cpu_library.find_cpu_library()
        assert found == cpu_library.CpuSearch(None, (), f"turned off by QUARTERMAP_NATIVE={word}")

    def broken(refused: Any) -> Iterator[Any]:
        yield "wheel", tmp_path / "own.so"
        raise PluginError("others may write")

    # Without the cache there are still the other places.
    monkeypatch.setenv("QUARTERMAP_NATIVE", "1")
    monkeypatch.setattr(cpu_library, "_places", broken)
    found = cpu_library.find_cpu_library()
    assert found.library is not None and found.library.origin == "wheel"
    assert found.refused == (("the cache of libraries built here", "others may write"),)
    cpu_library._choose.cache_clear()


def test_a_cpu_library_has_to_be_of_this_release_and_to_have_the_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contract = {"instruction_sets": ["avx512", "baseline"]}
    wrong: list[str] = []
    chosen = "baseline"
    monkeypatch.setattr(cpu_library, "load", lambda path, kind: (path, kind))
    monkeypatch.setattr(cpu_library, "describe", lambda library, path, kind: contract)
    monkeypatch.setattr(cpu_library, "_differences", lambda found: wrong)
    monkeypatch.setattr(cpu_library, "CpuKernels", lambda library: SimpleNamespace(instruction_set=chosen))
    path = Path("/a.so")
    found = cpu_library.load_cpu_library(path)
    assert found == cpu_library.CpuLibrary(path, contract, "baseline", "named")
    assert cpu_library.load_cpu_library(path, "wheel").origin == "wheel"
    wrong[:] = ["one", "two"]
    with pytest.raises(PluginError, match=r"(?s)^the CPU library /a\.so does not fit.*build\n  one\n  two$"):
        cpu_library.load_cpu_library(path)
    wrong.clear()
    chosen = ""
    for named, words in (
        ("avx512", "this processor lacks avx512, which QUARTERMAP_INSTRUCTION_SET asks for"),
        ("sse", "QUARTERMAP_INSTRUCTION_SET is 'sse'; expected one of avx512, baseline$"),
    ):
        monkeypatch.setenv("QUARTERMAP_INSTRUCTION_SET", named)
        with pytest.raises(cpu_library._InstructionSetError, match=words):
            cpu_library.load_cpu_library(path)


def test_cpu_libraries_are_tried_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "quartermap_deploy"
    (package / "_native").mkdir(parents=True)
    monkeypatch.setattr(cpu_library, "__file__", str(package / "native" / "cpu_library.py"))
    monkeypatch.setattr(cpu_library, "built_libraries", lambda: [tmp_path / "a", tmp_path / "b"])
    built = [("built here", tmp_path / "a"), ("built here", tmp_path / "b")]
    carried = package / "_native" / cpu_build.CPU_LIBRARY

    def places(named: str) -> tuple[list[Any], list[tuple[str, str]]]:
        refused: list[tuple[str, str]] = []
        monkeypatch.setenv("QUARTERMAP_NATIVE", named)
        return list(cpu_library._places(refused)), refused

    assert places("") == (built, []) == places("1")
    assert places("/own.so") == ([("QUARTERMAP_NATIVE", Path("/own.so")), *built], [])
    words = "QUARTERMAP_NATIVE is 'own.so'; expected 0, 1, or the path of a library from / on"
    assert places("own.so") == (built, [("QUARTERMAP_NATIVE", words)])
    carried.touch()
    assert places("/own.so")[0] == [("QUARTERMAP_NATIVE", Path("/own.so")), ("wheel", carried), *built]
    os.utime(carried, ns=(5, 7))
    assert cpu_library._changed(carried) == 7 and cpu_library._changed(tmp_path / "none") == 0


def test_the_cpu_librarys_contract_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    header = (plugin_sources() / "kernels/include/quartermap/cpu_scan.h").read_text(encoding="utf-8")
    (version,) = re.findall(r"#define QUARTERMAP_CPU_SCAN_VERSION (\d+)", header)
    monkeypatch.setattr(cpu_library, "sources_hash", lambda: "0123456789" * 6)
    same: dict[str, Any] = {
        "library": "quartermap_cpu",
        "version": int(version),
        "release": cpu_library.__version__,
        "sources": "0123456789" * 6,
        "instruction_sets": ["baseline"],
    }
    assert cpu_library._differences(same) == []
    assert cpu_library._differences({**same, "version": 99}) == [
        f"version: the library has 99, this package {cpu_library.INTERFACE}"
    ]
    assert cpu_library._differences({**same, "sources": "f" * 64}) == [
        "sources: the library has 'fffffffffffffff…', this package '012345678901234…'"
    ]
    assert cpu_library._differences({**same, "instruction_sets": "avx2"}) == [
        "instruction_sets: the library has none"
    ]

    def none() -> str:
        raise PluginError("no sources")

    # Where the sources were taken out of the installation, they cannot be compared.
    monkeypatch.setattr(cpu_library, "sources_hash", none)
    assert cpu_library._differences({**same, "sources": "f" * 64}) == []
    assert cpu_library._short("x" * 37) == repr("x" * 37) and "…" in cpu_library._short("x" * 38)
