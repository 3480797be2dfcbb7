"""Another name for a library that is loaded already."""

from __future__ import annotations

import os
import platform
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


@pytest.mark.skipif(sys.platform != "linux", reason="libraries have such names on Linux")
def test_the_file_is_a_whole_library_without_code() -> None:
    data = alias_file("libx.so", "libx.so.1")
    check_format(data)
    assert len(data) < 600
    flags = [int.from_bytes(data[64 + 56 * index + 4 :][:4], "little") for index in range(3)]
    assert not any(flag & 1 for flag in flags), "no segment may be executed, the stack neither"


def test_another_kind_of_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(PluginError, match="on a machine of kind riscv64"):
        alias_file("libx.so", "libx.so.1")
