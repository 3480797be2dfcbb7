"""JSON, TOML, arrays and settings that somebody else wrote."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import call
from hostile_reader import Outcome, outcomes_of

from quartermap_deploy.arrays import ArrayError, array_of, opened_arrays
from quartermap_deploy.errors import RecipeError
from quartermap_deploy.reading import DEEPEST, ReadingError, read_json, read_toml
from quartermap_deploy.recipe import Recipe

ROOT = Path(__file__).parents[1]
MEMORY = 300
"""MiB that reading any of these files may take."""


def packed(*arrays: np.ndarray) -> bytes:  # type: ignore[type-arg]
    file = io.BytesIO()
    np.savez_compressed(file, *arrays)
    return file.getvalue()


def with_head(head: str, body: bytes = bytes(8)) -> bytes:
    """An .npz file of one array, whose head is this text."""
    text = head.encode().ljust(117) + b"\n"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body)
    return file.getvalue()


def head(kind: str, shape: str) -> str:
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}"


def many_entries() -> bytes:
    """Half a million names of nothing."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", b"")
    whole = file.getvalue()
    start = whole.index(b"PK\1\2")
    end = whole.index(b"PK\5\6")
    entries = whole[start:end] * 500_000
    tail = bytearray(whole[end:])
    tail[8:12] = b"\xff\xff\xff\xff"
    tail[12:16] = len(entries).to_bytes(4, "little")
    return whole[:start] + entries + bytes(tail)


ATTACKS: dict[str, Callable[[], bytes]] = {
    "nested.results": lambda: b"[" * 200_000,
    "tables.results": lambda: b'{"a":' * 200_000,
    "deep.results": lambda: b"[" * 900 + b"]" * 900,
    "digits.results": lambda: b'{"speed": ' + b"1" * 5000 + b"}",
    "lists.results": lambda: b"[" + b"[]," * 20_000_000 + b"1]",
    "latin.results": lambda: b'"\xff"',
    "nested.toml": lambda: b"a = " + b"[" * 100_000,
    "tables.toml": lambda: b"a = " + b"{a=" * 5000 + b"1" + b"}" * 5000,
    # Python's reader takes memory by the square of the parts of a key: gigabytes for 200 kB.
    "dots.toml": lambda: b"a." * 100_000 + b"a = 1",
    "quoted_dots.toml": lambda: b"""x = { a = '''..''', """ + b'"=" . ' * 20_000 + b"a = 1 }",
    "digits.toml": lambda: b'[model]\nname = "a"\nseed = ' + b"1" * 5000,
    "hex.toml": lambda: b'[model]\nname = "a"\nseed = 0x' + b"f" * 5000,
    "date.toml": lambda: b'[module]\nfactory = "a:b"\nexample = [1]\narguments = { when = 1979-05-27 }',
    "types.toml": lambda: b'[model]\nname = ["a"]\nlabels = [1, 2]\n[input]\nsize = { a = 1 }',
    "nul.toml": lambda: b'[model]\nname = "a"\ncheckpoint = "a\\u0000b"',
    "large.toml": lambda: b"#" * (2 << 20),
    # 3,000 times its size, unpacked.
    "zeros.npz": lambda: packed(np.zeros((400, 1000, 1000), np.uint8)),
    "zeros.medmnist": lambda: packed(np.zeros((400, 1000, 1000), np.uint8)),
    "objects.npz": lambda: packed(np.array([{"a": 1}], dtype=object)),
    "records.npz": lambda: packed(np.zeros(2, dtype=[("x", "i4")])),
    "liar.npz": lambda: with_head(head("<f8", "(1000000000000,)")),
    "negative.npz": lambda: with_head(head("<f8", "(-1,)")),
    "nothing.npz": lambda: with_head(head("<f8", f"(0, {10**30})"), b""),
    "brackets.npz": lambda: with_head("(" * 110),
    "entries.npz": many_entries,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return outcomes_of(ATTACKS, tmp_path_factory.mktemp("attacks"))


@pytest.mark.parametrize("name", ATTACKS)
def test_it_is_refused_in_little_memory(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    assert outcome.defect is None and outcome.message is not None
    assert name in outcome.message and len(outcome.message) < 1000
    assert outcome.peak < MEMORY


@pytest.mark.parametrize("kind", ["json", "toml"])
def test_what_our_files_have_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "json":
        values = {"a": [1, -2.5, None, True, "é", -(2**63) + 1], "b": {}}
        path.write_text(json.dumps(values))
        assert read_json(path) == values
        path.write_text("[" * DEEPEST + "]" * DEEPEST)
        read_json(path)
        return
    names = ", ".join(f'"/layers.{place}/op.x/Mul"' for place in range(500))
    path.write_text(
        f"# it's a.b.c\nx.y.z = [{names}]\nfloats = [{'0.5, ' * 2000}]\n'a.b' = '''\n.....\n'''\n"
    )
    assert len(read_toml(path)["x"]["y"]["z"]) == 500
    for recipe in sorted((ROOT / "export").glob("*.toml")):
        Recipe.load(recipe)


@pytest.mark.parametrize("place", ["folder", "pipe", "/dev/zero", "name"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, place: str) -> None:
    path = {"name": Path("a\0b"), "/dev/zero": Path("/dev/zero")}.get(place, tmp_path / place)
    if place == "folder":
        path.mkdir()
    elif place == "pipe":
        os.mkfifo(path)
    for read in (read_json, read_toml):
        with pytest.raises(ReadingError):
            read(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(path)


@pytest.mark.parametrize("name", ["nested.toml", "digits.toml", "dots.toml", "date.toml", "nul.toml"])
def test_the_command_line_says_so_in_one_message(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(ATTACKS[name]())
    outcome = call("compile", tmp_path / name, "--out", tmp_path / "bundle")
    assert outcome.code == 2 and outcome.err.count("error: ") == 1 and "Traceback" not in outcome.err
    assert not (tmp_path / "bundle").exists()


def test_half_a_character_is_no_text_of_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"labels": ["\\ud800"]}')
    assert read_json(tmp_path / "a.json")
    with pytest.raises(ReadingError, match="half a character"):
        read_json(tmp_path / "a.json", unicode=True)


def test_honest_arrays_are_read(tmp_path: Path) -> None:
    arrays = {
        "plain": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        "scalar": np.float32(3),
        "empty": np.zeros((0, 3)),
        "flags": np.array([True, False]),
        "turned": np.arange(4, dtype=">i4"),
        "blank": np.zeros((100, 500, 500), np.uint8),
    }
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    with opened_arrays(tmp_path / "a.npz") as file:
        assert file.names == list(arrays)
        for name, array in arrays.items():
            found = file.read(name)
            assert found.dtype == np.asarray(array).dtype
            np.testing.assert_array_equal(found, array)


def test_an_array_of_a_golden_file_says_the_truth() -> None:
    file = io.BytesIO()
    np.save(file, np.zeros(4))
    data = file.getvalue()
    assert array_of(data).shape == (4,)
    with pytest.raises(ArrayError, match="bytes of numbers, and says that its shape"):
        array_of(data.replace(b"(4,), }", b"(4000000000,), }"))
    with pytest.raises(ArrayError):
        array_of(base64.b64decode("AAAA"))


SETTINGS = "lines.linewidth: 77\nfont.size: 99\nbackend: module://evil\ntext.usetex: True\n\x1b[2J: 1\n"


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_settings_of_the_current_folder_are_not_read(tmp_path: Path, kind: str) -> None:
    """A pipe would wait for ever for somebody who writes into it."""
    if kind == "file":
        (tmp_path / "matplotlibrc").write_text(SETTINGS)
    else:
        os.mkfifo(tmp_path / "matplotlibrc")
    program = (
        "from quartermap_deploy.evaluation.ablation_plots import require_matplotlib\n"
        "import os\nbefore = os.getcwd()\nrequire_matplotlib()\nassert os.getcwd() == before\n"
        "import matplotlib\nprint(matplotlib.rcParams['lines.linewidth'], matplotlib.rcParams['text.usetex'])"
    )
    process = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert process.stdout == "1.5 False\n" and "\x1b" not in process.stderr
