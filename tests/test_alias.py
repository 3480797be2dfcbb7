"""Another name for a library that is loaded already."""

from __future__ import annotations

import os
import platform
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from quartermap_deploy.native.alias import alias_file
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.native.library_format import check_format

ALIAS = """
import ctypes
from quartermap_deploy.native.alias import give_alias
from quartermap_deploy.native.errors import PluginError
import tempfile
try:
    ctypes.CDLL("libquartermap_no_such_name.so")
except OSError:
    print("not there")
for _ in range(2):
    give_alias("libquartermap_no_such_name.so", "libm.so.6")
cosine = ctypes.CDLL("libquartermap_no_such_name.so").cos
cosine.restype, cosine.argtypes = ctypes.c_double, [ctypes.c_double]
print(cosine(0.0))
try:
    give_alias("libquartermap_other.so", "libquartermap_that_is_not_loaded.so.1")
except PluginError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="libraries have such names on Linux")
def test_a_library_answers_to_another_name(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", ALIAS], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    before, cosine, refused = done.stdout.splitlines()
    assert (before, cosine) == ("not there", "1.0")
    assert "cannot be given the name libquartermap_other.so" in refused and "LD_LIBRARY_PATH" in refused
    assert not list(tmp_path.iterdir()), "nothing is left on the disk"


@pytest.mark.parametrize(("kind", "number"), [("x86_64", 62), ("aarch64", 183)])
def test_the_file_is_a_library_without_code(monkeypatch: pytest.MonkeyPatch, kind: str, number: int) -> None:
    monkeypatch.setattr(platform, "machine", lambda: kind)
    data = alias_file("libx.so", "libx.so.1")
    assert len(data) < 600 and struct.unpack_from("<HHI", data, 16) == (3, number, 1)
    entry, programs, sections = struct.unpack_from("<3Q", data, 24)
    assert (entry, programs, sections) == (0, 64, 0)
    assert struct.unpack_from("<I6H", data, 48) == (0, 64, 56, 3, 64, 0, 0)
    found = [struct.unpack_from("<IIQQQQQQ", data, programs + 56 * index) for index in range(3)]
    assert [program[0] for program in found] == [1, 2, 0x6474E551]
    assert not any(program[1] & 1 for program in found), "no segment may be executed, the stack neither"
    for _, _, offset, address, _, size, memory, alignment in found:
        assert alignment & (alignment - 1) == 0 and offset % alignment == address % alignment
        assert size == memory and offset + size <= len(data)
    if kind == platform.uname().machine and sys.platform == "linux":
        check_format(data)


def test_another_kind_of_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(PluginError, match="on a machine of kind riscv64"):
        alias_file("libx.so", "libx.so.1")
