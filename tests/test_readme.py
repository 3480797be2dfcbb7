"""The README's quick start, from a wheel, in an empty folder, in the order in which it stands there."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import quartermap_deploy as qm
from quartermap_deploy.cli.program import build_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECONDS = 800
QUICKER = {"tune": ["--calibration", "64", "--verification", "100", "--repeats", "3"]}
"""Added to commands that take minutes: fewer images, fewer rounds."""
WEIGHTS_OF_ONES_OWN = ("vmamba_base_s2l15", "my_models:Net")
"""Models whose weights or code the reader has, and this folder has not: these lines are parsed and not run."""


def commands() -> list[list[str]]:
    """What the quick start types, line by line."""
    start = README.split("## Quick start\n")[1].split("\n## ")[0]
    lines = re.findall(r"^    (quartermap .*)$", start, flags=re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines]


RUN = [words for words in commands() if not set(WEIGHTS_OF_ONES_OWN) & set(words)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as a wheel brings it, and nothing else of this repository."""
    pytest.importorskip("hatchling", reason="no wheel can be built without hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    # Without the CPU library, which would be compiled anew; the one that `make native` built is found by its hash.
    environment = {**os.environ, "QUARTERMAP_BUILD_NATIVE": "0"}
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run(build, check=True, env=environment, timeout=SECONDS)
    (wheel,) = folder.glob("*.whl")
    target = folder / "installed"
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, timeout=SECONDS
    )
    return target


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty")


def environment(installed: Path) -> dict[str, str]:
    """The user's own folders, so that the CPU library which `make native` built is found and not built again."""
    own = {name: value for name, value in os.environ.items() if name != "QUARTERMAP_HOME"}
    return {**own, "PYTHONPATH": str(installed)}


def program(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "quartermap_deploy", *words]


def test_the_package_is_that_of_the_wheel(installed: Path, empty: Path) -> None:
    asked = [sys.executable, "-c", "import quartermap_deploy; print(quartermap_deploy.__file__)"]
    found = subprocess.run(
        asked,
        capture_output=True,
        text=True,
        cwd=empty,
        env=environment(installed),
        timeout=SECONDS,
        check=True,
    )
    assert Path(found.stdout.strip()).is_relative_to(installed)


@pytest.mark.parametrize("words", RUN, ids=" ".join)
def test_quick_start(words: list[str], installed: Path, empty: Path) -> None:
    if words[0] == "serve":
        serve(words, installed, empty)
        return
    # A shell finds the files.
    found = [
        name
        for word in words
        for name in (sorted(map(str, empty.glob(word))) if "/" in word and "*" in word else [word])
    ]
    result = subprocess.run(
        program([*found, *QUICKER.get(words[0], [])]),
        capture_output=True,
        text=True,
        cwd=empty,
        env=environment(installed),
        timeout=SECONDS,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and "error:" not in result.stderr
    if "-o" in words:
        assert (empty / words[words.index("-o") + 1]).exists()


def serve(words: list[str], installed: Path, empty: Path) -> None:
    command = program([*words, "--port", "0", "--grpc-port", "0", "--json"])
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=empty,
        env=environment(installed),
    ) as process:
        try:
            assert process.stdout is not None
            address = json.loads("".join(until_whole(iter(process.stdout.readline, ""))))["http"]
            with urllib.request.urlopen(f"{address}/v2/health/ready", timeout=60) as answer:
                assert answer.status == 200
            with urllib.request.urlopen(address, timeout=60) as answer:
                assert b"</html>" in answer.read()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


def until_whole(lines: Iterator[str]) -> Iterator[str]:
    """The lines of a JSON text, up to its end."""
    text = ""
    for line in lines:
        text += line
        yield line
        try:
            json.loads(text)
        except ValueError:
            continue
        return


def test_other_lines_can_be_typed() -> None:
    for words in commands():
        assert build_parser().parse_args(words).command == words[0]


def test_the_quick_start_is_whole() -> None:
    assert {"compile", "predict", "validate", "eval", "bench", "tune", "report", "serve"} <= {
        words[0] for words in RUN
    }
    assert len(commands()) - len(RUN) == len(WEIGHTS_OF_ONES_OWN)


def test_python_names_what_there_is() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    named = {
        node.attr
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qm"
    }
    assert len(named) >= 5 and all(hasattr(qm, name) for name in named)
