"""The kernels' structures, and a library that is called through them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quartermap_deploy.native import cpu_kernels
from quartermap_deploy.native.cpu_kernels import CpuKernels, Sizes, make_scan
from quartermap_deploy.native.errors import PluginError


def test_a_scan_is_told_to_the_kernels() -> None:
    scan = make_scan(
        Sizes(2, 3, 5, 7, 11, 13, 17), ("row", "column_reverse", "column"), False, "bfloat16", threads=4
    )
    names = ("batch", "groups", "channels", "height", "width", "d_state", "dt_rank")
    assert [getattr(scan, name) for name in names] == [2, 3, 5, 7, 11, 13, 17]
    assert [scan.directions[place] for place in range(scan.direction_count)] == [0, 3, 1]
    assert (scan.softplus, scan.element_type, scan.threads) == (0, 2, 4)
    assert make_scan(Sizes(1, 1, 1, 1, 1, 1), ("row",), True, "float32").softplus == 1
    for number, name in enumerate(("float32", "float16", "bfloat16", "float64")):
        assert make_scan(Sizes(1, 1, 1, 1, 1, 1), ("row",), True, name).element_type == number
    assert isinstance(scan, ctypes.Structure)


TINY = """
#include <stdint.h>
#include <stddef.h>
typedef struct { int64_t sizes[7]; int32_t const* directions; int32_t count, softplus, type, threads; } Scan;
static char const* chosen = "wide";
static int with_team;
char const* quartermap_cpu_message(int32_t status) { return status == 4 ? "too large" : with_team ? "team" : "other"; }
char const* quartermap_cpu_contract(void) { return "{}"; }
char const* quartermap_cpu_instruction_set(void) { return chosen; }
uint32_t quartermap_cpu_version(void) { return 4000000000u; }
int32_t quartermap_cpu_choose(char const* name)
{
    if (name && *name == 'n') return 7;
    chosen = name ? "named" : "best";
    return 0;
}
int32_t quartermap_cpu_by_team(void* pool, void* task, void* argument, size_t count) { return 0; }
int32_t quartermap_cpu_scan(Scan const* scan, void* const* tensors, void* parallel, void* pool)
{
    with_team = parallel != NULL && pool != NULL;
    if (scan == NULL) return 5;
    for (int place = 0; place < 9; ++place)
        if (tensors[place] != (void*)(intptr_t)(place == 5 ? 0 : 8 * (place + 1))) return 6;
    return (int32_t)scan->sizes[0];
}
"""
"""A library of the same interface that scans nothing: it returns the batch as the status, or 6 for other addresses."""


def test_a_library_is_called_with_addresses_and_its_words_are_an_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform == "win32":
        pytest.skip("there is no C compiler")
    (tmp_path / "tiny.c").write_text(TINY)
    command = [compiler, "-shared", "-fPIC", str(tmp_path / "tiny.c"), "-o", str(tmp_path / "tiny.so")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    monkeypatch.chdir(tmp_path)
    kernels = CpuKernels.load(Path("tiny.so"))
    assert kernels.version == 4_000_000_000 and kernels.message(4) == "too large"
    assert kernels.instruction_set == "wide" and kernels.choose("some") and kernels.instruction_set == "named"
    assert not kernels.choose("none") and kernels.instruction_set == "named"
    assert kernels.choose(None) and kernels.instruction_set == "best"
    places = ("x", "dt", "B", "C", "A", "D", "dt_bias", "dt_weight", "y")
    addresses = {name: 8 * (place + 1) for place, name in enumerate(places) if name != "D"}
    start = ctypes.cast(ctypes.CFUNCTYPE(None)(lambda: None), ctypes.c_void_p).value
    for threads, team in ((1, None), (4, None), (1, start), (4, start)):
        monkeypatch.setattr(cpu_kernels, "team_start", lambda team=team: team)

        def scan(batch: int, threads: int = threads) -> None:
            kernels.scan(
                make_scan(Sizes(batch, 1, 1, 1, 1, 1), ("row",), True, "float32", threads), addresses
            )

        scan(0)
        with pytest.raises(PluginError, match=r"^selective scan: too large$"):
            scan(4)
        words = "team" if threads > 1 and team is not None else "other"
        with pytest.raises(PluginError, match=f"^selective scan: {words}$"):
            scan(1)
    assert kernels.status(None, None) == 5
