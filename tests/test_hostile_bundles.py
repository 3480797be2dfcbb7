"""Bundles from strangers: whatever their manifests, reports and files say, they are data of known kinds.

Each attack here once worked, or is a neighbour of one that did.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy_bundles

import quartermap_deploy as qm
from quartermap_deploy import cli
from quartermap_deploy.bundle import describe_file, load_bundle, read_manifest
from quartermap_deploy.errors import BundleError, TrustError

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A bundle of a stranger's."""
    return Path(shutil.copytree(toy_bundles.classifier(), tmp_path / "stranger"))


def rewrite(folder: Path, change: Change, file: str = "manifest.json") -> None:
    """Change a manifest or a report as somebody does who also keeps the hashes right."""
    path = folder / file
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    if file != "manifest.json":
        entry = describe_file(path)
        rewrite(folder, lambda manifest: manifest["files"].update({file: entry}))


def at(*keys: str | int, value: Any) -> Change:
    """Set one value in a manifest or report."""

    def change(values: dict[str, Any]) -> None:
        place: Any = values
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


NAMES = [
    "/x/y",
    "../../y",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "C:evil",
    "a\nb",
    "a\x1b[2J",
    "-rf",
    ".hidden",
    "a\0b",
    "x" * 300,
    5,
    None,
    ["a"],
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_the_name_of_a_model_names_no_path(stranger: Path, name: Any, tmp_path: Path) -> None:
    rewrite(stranger, at("model", "name", value=name))
    with pytest.raises(BundleError, match=r"model\.name is|it has a NUL"):
        load_bundle(stranger)


@pytest.mark.parametrize("command", [["deploy", "triton", "--no-images"], ["deploy", "kserve"]])
def test_deploying_writes_nowhere_but_where_it_was_told(
    stranger: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(stranger, at("model", "name", value=f"{tmp_path}/elsewhere"))
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([*command, str(stranger), "-o", str(tmp_path / "out")]) == 2
    assert "model.name" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


FILES = [
    "../../.ssh/key",
    "/etc/passwd",
    "report.json",
    "inputs.json",
    "",
    ".",
    "model.onnx/",
    "./model.onnx",
    None,
    3,
]


@pytest.mark.parametrize("file", FILES, ids=repr)
def test_a_target_runs_the_bundles_own_model_alone(stranger: Path, file: Any) -> None:
    rewrite(stranger, at("targets", "onnxruntime", "file", value=file))
    with pytest.raises(BundleError, match=r"targets\.onnxruntime\.file is"):
        load_bundle(stranger)


def engine_entry(**changes: Any) -> dict[str, Any]:
    """What a manifest says about an engine, with changes."""
    return {
        "file": "model.tensorrt.engine",
        "version": "10.13.3.9",
        "compute_capabilities": ["8.9"],
        "inputs": {"images": ["batch", 3, 32, 32]},
        "outputs": ["logits"],
        "options": {},
        "key": "0" * 64,
        "build": {"engine_bytes": 4},
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"file": "../../.ssh/key"}, "file is"),
        ({"file": "not-listed.engine"}, "which files does not list"),
        ({"key": "../../../home/user/.bashrc"}, "key is"),
        ({"key": "0" * 31 + "/"}, "key is"),
        ({"key": "0" * 64 + "\n"}, "key is"),
        ({"version": "10\x1b[2J"}, "version is"),
        ({"compute_capabilities": ["8.9; rm -rf"]}, "compute_capabilities.0 is"),
        ({"inputs": {"images": 3}}, "inputs.images is"),
        ({"outputs": "logits"}, "outputs is"),
        ({"build": {}}, "build has no engine_bytes"),
        ({"build": {"engine_bytes": -1}}, "engine_bytes is"),
        ({"plugin": {"sha256": "x"}}, "plugin.sha256 is"),
        ({"plugin": "libevil.so"}, "plugin is"),
    ],
)
def test_the_entry_of_an_engine_holds_what_building_writes(
    stranger: Path, changes: dict[str, Any], words: str
) -> None:
    (stranger / "model.tensorrt.engine").write_bytes(b"none")
    entry = describe_file(stranger / "model.tensorrt.engine")
    rewrite(stranger, lambda manifest: manifest["files"].update({"model.tensorrt.engine": entry}))
    rewrite(stranger, at("targets", "tensorrt", value=engine_entry()))
    load_bundle(stranger)
    rewrite(stranger, at("targets", "tensorrt", value=engine_entry(**changes)))
    with pytest.raises(BundleError, match=words):
        load_bundle(stranger)


@pytest.mark.parametrize("kind", ["symbolic", "symbolic inside", "folder", "pipe"])
def test_files_of_a_bundle_are_files_of_its_own(stranger: Path, tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "secret"
    shutil.copyfile(stranger / "inputs.json", outside)
    (stranger / "inputs.json").unlink()
    if kind == "symbolic":
        (stranger / "inputs.json").symlink_to(outside)
    elif kind == "symbolic inside":
        (stranger / "inputs.json").symlink_to("report.json")
    elif kind == "folder":
        (stranger / "inputs.json").mkdir()
    else:
        os.mkfifo(stranger / "inputs.json")
    with pytest.raises(BundleError, match=r"inputs\.json in the bundle .* is a link or no file"):
        load_bundle(stranger)


@pytest.mark.parametrize("path", ["/etc/shadow", "../weights.pth", "a/b", "..", "a\\b"])
@pytest.mark.parametrize("entry", ["checkpoint", "images", "reference"])
def test_the_recipe_in_a_manifest_names_files_without_folders(stranger: Path, entry: str, path: str) -> None:
    rewrite(stranger, at("recipe", entry, value=path))
    with pytest.raises(BundleError, match=rf"recipe\.{entry} is"):
        load_bundle(stranger)


WRONG: list[tuple[str, Change, str]] = [
    ("manifest.json", at("model", "num_classes", value="ten"), "num_classes is"),
    ("manifest.json", at("model", "parameters", value=2**60), "parameters is"),
    ("manifest.json", at("blocks", 0, "tokens", value=-1), "tokens is"),
    ("manifest.json", at("blocks", 0, "map_size", value=[1]), "map_size is"),
    ("manifest.json", at("blocks", 0, "index", value=7), "do not ascend"),
    ("manifest.json", at("totals", "tokens_unpruned", value=0), "tokens_unpruned is"),
    ("manifest.json", at("files", "model.onnx", "bytes", value=True), "bytes is"),
    (
        "manifest.json",
        at("files", "../outside", value={"sha256": "0" * 64, "bytes": 1}),
        "a name in files is",
    ),
    ("manifest.json", at("targets", value={}), "targets is"),
    ("manifest.json", at("targets", "/lib/evil", value={"file": "model.onnx"}), "a name in targets is"),
    ("manifest.json", at("inputs", 0, "shape", value=[[]]), "shape.0 is"),
    ("manifest.json", at("inputs", 0, "type", value="object"), "type"),
    ("manifest.json", at("recipe", "quartermap", value={"every": "x"}), "every"),
    ("manifest.json", at("recipe", "targets", value=[{}]), "targets.0 is"),
    ("manifest.json", at("recipe", "unheard", value=1), "unheard"),
    ("manifest.json", at("passes", 0, value=[]), "passes.0 is"),
    ("manifest.json", at("size_rules", value=["__import__('os')"]), "cannot be read"),
    ("report.json", at("cases", value=[]), "cases is"),
    ("report.json", at("cases", 0, "outputs", 0, "relative_error", value="0"), "relative_error is"),
    ("report.json", at("tolerance", value=None), "tolerance is"),
    ("report.json", at("passed", value="yes"), "passed is"),
]


@pytest.mark.parametrize(("file", "change", "words"), WRONG, ids=[words for _, _, words in WRONG])
def test_wrong_values_are_told_with_their_place(
    stranger: Path, file: str, change: Change, words: str
) -> None:
    rewrite(stranger, change, file)
    with pytest.raises(BundleError, match=words):
        load_bundle(stranger)


def places(values: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The places of all values in a tree of JSON."""
    found = [path] if path else []
    entries = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    )
    return [*found, *(place for key, entry in entries for place in places(entry, (*path, key)))]


ODD = [None, True, -1, 0, 1e308, 2**70, "", "../x", "\x1b[2J", "x" * 5000, [], {}, [None], {"a": None}]


@pytest.mark.parametrize("file", ["manifest.json", "report.json"])
def test_any_value_in_the_place_of_any_other_is_refused_or_does_no_harm(
    stranger: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is loaded can be inspected; whatever cannot be is refused, with one message and no escapes."""
    chance = random.Random(0)
    original = json.loads((stranger / file).read_text())
    everywhere = places(original)
    count = int(os.environ.get("QUARTERMAP_FUZZ_EXAMPLES", "150"))
    accepted = 0
    for _ in range(count):
        values = copy.deepcopy(original)
        at(*chance.choice(everywhere), value=chance.choice(ODD))(values)
        (stranger / file).write_text(json.dumps(values))
        if file == "report.json":
            entry = describe_file(stranger / file)
            rewrite(stranger, lambda manifest, entry=entry: manifest["files"].update({file: entry}))  # type: ignore[misc]
        code = cli.main(["inspect", str(stranger)])
        out, err = capsys.readouterr()
        assert code in (0, 2), values
        assert "\x1b" not in out + err and "Traceback" not in err
        assert (code == 2) == err.startswith("quartermap: error: ")
        accepted += code == 0
    assert 0 < accepted < count


def test_what_a_stranger_wrote_reaches_the_terminal_escaped(
    stranger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2J\x1b[Hparity passed\r\u202e\x9b31m"
    rewrite(stranger, at("model", "title", value=evil))
    rewrite(stranger, at("blocks", 0, "path", value=evil))
    rewrite(stranger, at("versions", "torch", value=evil))
    rewrite(stranger, at("cases", 0, "name", value=evil), "report.json")
    for arguments in (["inspect", str(stranger)], ["inspect", "--json", str(stranger)]):
        assert cli.main(arguments) == 0
        out, err = capsys.readouterr()
        assert not set("\x1b\r\u202e\x9b") & set(out + err)
        assert "parity passed" in out


def test_lines_to_copy_are_what_they_look_like(
    stranger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = stranger.rename(tmp_path / "b;touch PWN")
    assert cli.main(["serve", str(named), "--target", "tensorrt"]) == 2
    assert f"`quartermap rebuild '{named}' --target tensorrt`" in capsys.readouterr().err


def test_messages_of_several_lines_cannot_be_taken_for_several_messages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(tmp_path / "x\nquartermap: passed")]) == 2
    assert "\nquartermap: passed" not in capsys.readouterr().err


MODULE_RECIPE = """\
[module]
factory = "evil.py:Net"
example = [1, 3, 8, 8]
scans = { "os:getcwd" = "evil.py:adapter" }
"""


@pytest.mark.parametrize(
    "arguments", [["compile", "--out", "out"], ["eval", "--target", "torch", "--limit", "1"]]
)
def test_a_strangers_recipe_runs_no_module(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('ran', 'w')\n")
    (tmp_path / "theirs.toml").write_text(MODULE_RECIPE)
    command, *options = arguments
    assert cli.main([command, "theirs.toml", *options]) == 2
    assert "names code that would be run: evil.py:Net, evil.py:adapter" in capsys.readouterr().err
    with pytest.raises(TrustError, match="run_module=True"):
        qm.compile("theirs.toml", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.py", "theirs.toml"]
    # Whoever agrees runs it: it defines no Net, but it was looked for.
    assert cli.main([command, "theirs.toml", *options, "--run-module"]) == 2
    assert "has no 'Net'" in capsys.readouterr().err and (tmp_path / "ran").exists()


def test_a_manifest_is_read_before_anything_else_of_the_bundle(stranger: Path) -> None:
    (stranger / "model.onnx").write_bytes(b"not looked at")
    assert read_manifest(stranger)["task"] == "classification"
    with pytest.raises(BundleError, match="does not match its manifest"):
        qm.load_bundle(stranger)


def test_a_manifest_of_a_million_blocks_is_refused_at_once(stranger: Path) -> None:
    """Comparing them with the schema took minutes."""
    rewrite(stranger, lambda manifest: manifest.update(blocks=[{"index": 1}] * 1_000_000))
    began = time.monotonic()
    with pytest.raises(BundleError, match="more than 200,000 values"):
        qm.load_bundle(stranger)
    assert time.monotonic() - began < 10
