"""The kernels for CPUs in a program of their own: with sanitizers, and for another processor under an emulator."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import cpu_builds
import pytest

TOLERANCE = 1e-6


def driver(
    folder: Path,
    cxx: str,
    kernels: Sequence[tuple[Path, Sequence[str]]],
    flags: Sequence[str],
    link: Sequence[str] = (),
) -> Path:
    """Compile the driver with the kernels, and return the program."""
    # The definition in float64 is not what is looked at; the memory that it makes is watched all the same.
    files = [*kernels, (cpu_builds.NATIVE_TESTS / "scan_driver.cpp", ("-O2", "-fno-sanitize=all"))]
    objects = cpu_builds.compile_objects(folder, cxx, files, flags)
    program = folder / "scan_driver"
    cpu_builds.run([cxx, *flags, *link, *map(str, objects), "-o", str(program), "-pthread"])
    return program


def errors(command: Sequence[str], **environment: str) -> dict[str, float]:
    """Run the driver and return its largest error for each instruction set."""
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["good"] is True
    assert all(error <= TOLERANCE for error in found["errors"].values())
    return {name: float(error) for name, error in found["errors"].items()}


@pytest.mark.parametrize(
    ("sanitizers", "wide"),
    [
        ("address,undefined", True),
        # Who works on what is decided outside of the kernels, whose instruction sets differ in nothing else.
        ("thread", False),
        pytest.param("thread", True, marks=pytest.mark.exhaustive),
    ],
)
def test_sanitizers_find_nothing(sanitizers: str, wide: bool, tmp_path: Path) -> None:
    cxx = cpu_builds.compiler()
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-O1"]
    require_sanitizers(cxx, flags, tmp_path)
    kernels, definitions = cpu_builds.instruction_sets()
    if not wide:
        kernels, definitions = kernels[:1], []
    # GCC 12 warns of its own _mm512_undefined_ps() when it checks.
    avx512 = ["-Wno-uninitialized"] if has_avx512() else ["-O0", "-fno-sanitize=all"]
    kernels = [(path, [*own, *avx512] if path.stem == "avx512" else own) for path, own in kernels]
    program = driver(tmp_path, cxx, kernels, [*flags, *definitions])
    assert "baseline" in errors([str(program)]) or not cpu_builds.on_x86()


def test_sanitizers_find_nothing_in_portable_vectors(tmp_path: Path) -> None:
    cxx = cpu_builds.compiler()
    # Optimised, these loops take compilers minutes with sanitizers.
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0"]
    require_sanitizers(cxx, flags, tmp_path)
    kernels, _ = cpu_builds.instruction_sets()
    program = driver(tmp_path, cxx, kernels[:1], [*flags, "-DQUARTERMAP_PORTABLE_VECTORS"])
    assert list(errors([str(program)])) == ["baseline"]


def has_avx512() -> bool:
    """Whether this processor would run the kernels for AVX-512; others only link them, so that they need no time."""
    try:
        return " avx512vl" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True


def require_sanitizers(cxx: str, flags: Sequence[str], folder: Path) -> None:
    """Skip where the compiler's sanitizers are missing, or do not run here."""
    source, program = folder / "nothing.cpp", folder / "nothing"
    source.write_text("int main() { return 0; }\n", encoding="utf-8")
    command = [cxx, *flags, str(source), "-o", str(program), "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode == 0:
        done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        pytest.skip(f"{cxx} has no sanitizers that run here: {done.stderr.strip()[-200:]}")


@pytest.mark.parametrize("portable", [False, True])
def test_64_bit_arm_under_an_emulator(portable: bool, tmp_path: Path) -> None:
    cxx = cpu_builds.compiler("aarch64-linux-gnu-g++")
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("no qemu-aarch64")
    kernels = [(cpu_builds.KERNELS / "cpu" / "baseline.cpp", ())]
    flags = ["-O2", *(["-DQUARTERMAP_PORTABLE_VECTORS"] if portable else [])]
    program = driver(tmp_path, cxx, kernels, flags, ["-static"])
    assert list(errors(["qemu-aarch64", str(program)])) == ["baseline" if portable else "neon"]
