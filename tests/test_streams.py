"""Whatever the encoding of the streams and of names of files, a command says what it has to say."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toy_bundles
from command_line import call

from quartermap_deploy.cli.streams import prepare_streams, takes
from quartermap_deploy.plain_text import encoded

SETTINGS = {
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "quartermap_deploy", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, env={**os.environ, **environment}, timeout=100, check=False
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_encoding_takes_the_output(setting: str, tmp_path: Path) -> None:
    """The tables have lines and signs that most encodings lack."""
    for arguments in (["models"], ["bench", "--help"]):
        done = run(*arguments, **SETTINGS[setting])
        assert done.returncode == 0 and done.stderr == b"" and len(done.stdout) > 1000
        assert b"\\u" not in done.stdout, "what we write ourselves has plain letters in its place"
    done = run("inspect", tmp_path / "é…", **SETTINGS[setting])
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert done.stderr.startswith(b"quartermap: error: there is no bundle")


def test_signs_have_plain_letters_and_others_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    prepare_streams()
    print("3 × … ─ 字 \udcff é")
    sys.stdout.flush()
    assert raw.getvalue() == b"3 \xd7 ... - \\u5b57 \\udcff \xe9\n"
    assert takes(sys.stdout, "é") and not takes(sys.stdout, "…")


def test_json_stays_json_in_every_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    from quartermap_deploy.cli.results import print_json

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    prepare_streams()
    print_json({"名": "é …"})
    sys.stdout.flush()
    assert json.loads(raw.getvalue().decode("ascii")) == {"名": "é …"}


def test_a_closed_stream_takes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    prepare_streams()
    assert sys.stderr is not None
    print("é", file=sys.stderr)


def test_names_in_no_encoding_stay_what_they_are_in_json() -> None:
    text = json.dumps(["\udcff é"], ensure_ascii=False)
    assert json.loads(encoded(text).decode("utf-8")) == ["\udcff é"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in a folder whose name is not UTF-8."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path_factory.mktemp("odd")) + b"/b\xff\xe9"))
    try:
        shutil.copytree(toy_bundles.classifier(), folder)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    return folder


def test_a_folder_whose_name_is_not_utf_8_is_one_like_any_other(odd: Path) -> None:
    from PIL import Image

    image, place = odd.parent / "d\udcff.png", odd.parent
    Image.new("RGB", (40, 40), (9, 200, 30)).save(image)
    assert call("inspect", odd).code == 0 and call("inspect", odd, "--json").code == 0
    outcome = call("validate", odd, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["passed"] is True
    outcome = call("predict", odd, image, "-o", place / "o\udcff", "--json")
    assert outcome.code == 0, outcome.err
    (entry,) = json.loads((place / "o\udcff" / "predictions.json").read_text("utf-8"))["images"]
    assert entry["source"].endswith(r"d\udcff.png")
    for arguments in (
        ("deploy", "triton", odd, "-o", place / "r\udcff"),
        ("deploy", "kserve", odd, "-o", place / "k\udcff.yaml"),
        ("report", odd, "-o", place / "p\udcff.html"),
        ("bench", odd, "--repeats", 1),
    ):
        outcome = call(*arguments)
        assert outcome.code == 0, outcome.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["models"], ["models", "--json"]])
def test_output_that_a_full_disk_does_not_take_is_told(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "quartermap_deploy", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "quartermap: error: cannot write to standard output: No space left on device"
    )
    assert len(done.stderr.splitlines()) == 1
