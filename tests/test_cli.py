"""The command line as a user meets it: every command, its help, its JSON, and every kind of bad input."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from command_line import Outcome, call
from onnx import numpy_helper
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from quartermap_deploy import bundle as bundles
from quartermap_deploy import compiler, compiling, demo
from quartermap_deploy.architectures import create_model, list_models, load_card
from quartermap_deploy.cli import program, progress_display, results
from quartermap_deploy.cli.compile import recipe_and_folder
from quartermap_deploy.data.digits import load_digits
from quartermap_deploy.data.images import prepare
from quartermap_deploy.data.shipped import models_directory
from quartermap_deploy.errors import ParityError
from quartermap_deploy.pruning import QuarterMap
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.tables.words import count_text

pytestmark = pytest.mark.usefixtures("small_models")

COMMANDS = ("models", "compile", "inspect", "validate", "bench", "eval", "tune")
MODEL = "vmamba_digits"

Run = Callable[..., Outcome]
Refuse = Callable[..., str]


def process(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "quartermap_deploy.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **settings,
    )


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return everything below a folder: files with their bytes, folders with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as wide as in a pipe; some test runners say that they have 80 columns."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refused(workplace: Path) -> Refuse:
    """Run a command that must be refused: exit code 2, one message, and nothing written."""

    def refuse(*arguments: object) -> str:
        before = contents(workplace)
        outcome = call(*arguments)
        messages = outcome.messages
        assert outcome.code == 2, outcome.err
        assert outcome.out == ""
        assert len(messages) == 1 and messages[0].startswith("quartermap: error: "), outcome.err
        assert "Traceback" not in outcome.err
        assert contents(workplace) == before
        return messages[0]

    return refuse


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A bundle, compiled by the command line, and what the command said; tests must not change it."""
    path = tmp_path_factory.mktemp("compiled") / "k3"
    outcome = call("compile", MODEL, "--every", 3, "--out", path, "--json")
    assert outcome.code == 0, outcome.err
    return path, outcome


@pytest.fixture
def bundle(compiled: tuple[Path, Outcome], workplace: Path) -> Path:
    """A copy of the bundle, to be spoilt."""
    return shutil.copytree(compiled[0], workplace / "k3")


@pytest.fixture(scope="module")
def from_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Outcome]:
    """A bundle for ten classes, the checkpoint for seven that it was compiled from, and what the command said.

    Parity was proved on one image of noise, beside them.
    """
    folder = tmp_path_factory.mktemp("from_checkpoint")
    torch.save(create_model(MODEL, num_classes=7).state_dict(), folder / "seven.pth")
    (folder / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "images" / "noise.png")
    given = ["--checkpoint", folder / "seven.pth", "--num-classes", 10, "--images", folder / "images"]
    outcome = call("compile", MODEL, *given, "--out", folder / "bundle")
    assert outcome.code == 0, outcome.err
    return folder / "bundle", folder / "seven.pth", outcome


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, compiled: tuple[Path, Outcome]) -> list[tuple[Recipe, Path, bool]]:
    """Compile nothing; return what the compiler was asked for."""
    calls: list[tuple[Recipe, Path, bool]] = []

    def compile(recipe: Recipe, out: Path, *, force: bool, progress: object) -> bundles.Bundle:
        calls.append((recipe, out, force))
        return bundles.load_bundle(compiled[0])

    monkeypatch.setattr(compiler, "compile", compile)
    return calls


def rewrite_manifest(bundle: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Change the manifest of a bundle, and bring its hashes up to date with the files."""
    path = bundle / bundles.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"] = {
        file.name: bundles.describe_file(file) for file in sorted(bundle.iterdir()) if file != path
    }
    change(manifest)
    path.write_text(json.dumps(manifest))


def damaged_block(model: onnx.ModelProto, block: int) -> onnx.ModelProto:
    """Return a model whose scan in one block has another D: a fault that the logits alone cannot place."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    scan = next(node for node in changed.graph.node if node.name == f"block_{block}/scan")
    weights = next(tensor for tensor in changed.graph.initializer if tensor.name == scan.input[5])
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights) + np.float32(1), weights.name))
    return changed


# Help and usage -------------------------------------------------------------------------------------------------


def subparsers() -> dict[str, argparse.ArgumentParser]:
    action = next(
        action for action in program.build_parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    return dict(action.choices)


def test_the_program_runs_as_a_module_and_explains_itself() -> None:
    done = process("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert all(command in done.stdout for command in COMMANDS)
    assert "exit codes" in done.stdout


def test_without_a_command_there_is_help() -> None:
    outcome = call()
    assert outcome.code == 0 and "usage: quartermap" in outcome.out


def test_help_and_the_list_of_models_need_no_torch() -> None:
    script = (
        "import sys; from quartermap_deploy.cli import main; main(['models', '--json']); "
        "loaded = {'torch', 'onnx', 'onnxruntime', 'polygraphy', 'sklearn'} & set(sys.modules); sys.exit(bool(loaded))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_version() -> None:
    lines = call("--version").out.splitlines()
    assert re.fullmatch(r"quartermap-deploy \d+\.\d+\.\d+", lines[0])
    assert {"python", "onnx", "onnxruntime", "torch"} <= {line.split()[0] for line in lines}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples_and_every_default(command: str) -> None:
    outcome = call(command, "--help")
    assert outcome.code == 0 and outcome.err == ""
    assert "examples:" in outcome.out and f"quartermap {command}" in outcome.out
    for action in subparsers()[command]._actions:
        # Another spelling, which recipes have, is not shown.
        if action.option_strings and action.dest != "help" and action.option_strings != ["--targets"]:
            assert action.help is not None and "default:" in action.help, action.option_strings


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_can_be_typed(command: str) -> None:
    epilog = subparsers()[command].epilog or ""
    examples = [
        line.split("|")[0].strip() for line in epilog.splitlines() if line.strip().startswith("quartermap")
    ]
    assert len(examples) >= 2
    for example in examples:
        options = program.build_parser().parse_args(shlex.split(example)[1:])
        assert options.command == command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["complie", MODEL], ["unknown command 'complie'", "did you mean compile?", "quartermap --help"]),
        (["models", "--yaml"], ["--yaml", "quartermap models --help"]),
        (["models", MODEL, "another"], ["another", "quartermap models --help"]),
        (["compile"], ["MODEL|MODULE:FACTORY|RECIPE.toml", "quartermap compile --help"]),
        (["bench"], ["BUNDLE"]),
        (["bench", "x", "--batch", "0"], ["--batch", "'0'", "from 1 to 65,536"]),
        (["validate", "x", "--reference", "torhc"], ["'torhc'", "did you mean torch?"]),
        (["compile", MODEL, "--every", "3", "--blocks", "3"], ["--blocks", "--every"]),
        (["compile", MODEL, "--upsample", "cubic"], ["'cubic'", "did you mean bicubic?"]),
        (["compile", MODEL, "--blocks", "3;6"], ["'3;6'", "such as 3,6,9"]),
        (["compile", MODEL, "--size", "64"], ["--size", "expected 2 arguments"]),
        (["compile", MODEL, "--size", "64", "x"], ["--size", "'x'"]),
        (["compile", MODEL, "--num-classes", "0"], ["--num-classes", "at least 1"]),
        (["compile", MODEL, "--targets", "onnxruntime,"], ["--targets", "such as"]),
        (["compile", MODEL, "--ever", "3"], ["--ever"]),
        (["compile", MODEL, "--out", ""], ["--out", "the path is empty"]),
        (["inspect", ""], ["BUNDLE", "the path is empty"]),
    ],
)
def test_wrong_usage_is_said_in_one_line(refused: Refuse, arguments: list[str], words: list[str]) -> None:
    text = refused(*arguments)
    assert all(word in text for word in words), text


# models ---------------------------------------------------------------------------------------------------------


def test_models_lists_every_card() -> None:
    outcome = call("models")
    assert outcome.code == 0 and outcome.err == ""
    lines = outcome.out.splitlines()
    for name in list_models():
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert load_card(name).family in line
    assert [line.split()[0] for line in lines if " * " in line and "weights" not in line] == [MODEL]
    assert "82.6" in next(line for line in lines if "vmamba_tiny_s1l8" in line)
    several = len(load_card("medmamba_t").accuracy)
    assert f"of {several} sets" in next(line for line in lines if "medmamba_t" in line)


def test_models_as_json() -> None:
    cards = call("models", "--json").json
    assert [card["name"] for card in cards] == list_models()
    digits = next(card for card in cards if card["name"] == MODEL)
    assert digits["weights_included"] is True and digits["blocks"] == 10
    assert digits["input_shape"] == [3, 64, 64] and digits["num_classes"] == 10


@pytest.mark.parametrize("name", list_models())
def test_models_shows_a_card(name: str) -> None:
    outcome, card = call("models", name), load_card(name)
    assert outcome.code == 0
    assert card.title in outcome.out and card.source.paper in outcome.out
    assert f"{card.sizes.parameters:,}" in outcome.out
    as_json = call("models", name, "--json").json
    assert as_json["title"] == card.title and tuple(as_json["labels"]) == card.labels
    shown = "tench, goldfish, great white shark, tiger shark and 996 more" if len(card.labels) == 1000 else ""
    assert shown in outcome.out.replace("\n", " ") and ("named by numbers" in outcome.out) == (
        not card.labels
    )


def test_blocks_of_a_card_are_numbered_over_the_whole_network() -> None:
    expected = "14 (stage 1: 1–2, stage 2: 3–4, stage 3: 5–12, stage 4: 13–14)"
    assert expected in call("models", "vmamba_tiny_s1l8").out


def test_an_unknown_model_suggests_near_ones(refused: Refuse) -> None:
    assert "vmamba_tiny_s1l8" in refused("models", "vmamba_tiny_s18")
    assert "vmamba_tiny_s1l8" in refused("compile", "vmamba_tiny_s18")
    assert all(name in refused("compile", "resnet50") for name in list_models())
    assert refused("models", "vmamba_digit").endswith("Did you mean vmamba_digits?")


# compile --------------------------------------------------------------------------------------------------------


def test_compile_makes_a_bundle_that_reads_digits(compiled: tuple[Path, Outcome]) -> None:
    path, outcome = compiled
    result = outcome.json
    assert result["path"] == str(path) and result["report"]["passed"] is True
    assert [block["index"] for block in result["manifest"]["blocks"] if block["pruned"]] == [3, 6, 9]
    assert sorted(file.name for file in path.parent.iterdir()) == ["k3"], "a temporary folder was left behind"
    assert {"model.onnx", "manifest.json", "report.json"} <= {file.name for file in path.iterdir()}
    assert "quartermap: warning" not in outcome.err
    assert re.search(r"^\[ *\d+\.\d s\] exporting", outcome.err, re.MULTILINE), "progress belongs on stderr"
    card, digits = load_card(MODEL), load_digits().held_out
    images = prepare(list(digits.images[:50]), card.preprocessing)
    predicted = bundles.load_bundle(path).run(images).argmax(axis=1)
    assert (predicted == digits.labels[:50]).mean() > 0.9


def test_a_recipe_and_its_options_do_the_same_and_force_replaces_the_bundle(
    compiled: tuple[Path, Outcome], bundle: Path, workplace: Path
) -> None:
    (workplace / "k3.toml").write_text(f'[model]\nname = "{MODEL}"\n[quartermap]\nevery = 3\n')
    (bundle / "old.txt").write_text("of the bundle that is replaced")
    outcome = call("compile", "k3.toml", "--out", bundle, "--force")
    assert outcome.code == 0, outcome.err
    assert (bundle / "model.onnx").read_bytes() == (compiled[0] / "model.onnx").read_bytes()
    assert not (bundle / "old.txt").exists()
    assert sorted(file.name for file in workplace.iterdir()) == ["k3", "k3.toml"]
    for words in (
        "passed",
        "worst error",
        "blocks 3, 6, 9 of 10",
        "every = 3",
        "tokens",
        "nodes",
        "MB",
        "k3",
    ):
        assert words in outcome.out, words


@pytest.mark.parametrize(
    ("arguments", "expected", "folder"),
    [
        ([], Recipe(MODEL), MODEL),
        (["--every", "2"], Recipe(MODEL, quartermap=QuarterMap(every=2)), f"{MODEL}_k2"),
        (
            ["--blocks", "3,6", "--stride", "3", "--keep", "2", "--upsample", "bilinear"],
            Recipe(MODEL, quartermap=QuarterMap(blocks=(3, 6), stride=3, keep=2, upsample="bilinear")),
            f"{MODEL}_blocks",
        ),
        (
            ["--every", "1", "--exclude-stages", "none"],
            Recipe(MODEL, quartermap=QuarterMap(every=1, exclude_stages=())),
            f"{MODEL}_k1",
        ),
        (
            ["--every", "1", "--exclude-stages", "1,2"],
            Recipe(MODEL, quartermap=QuarterMap(every=1, exclude_stages=(1, 2))),
            f"{MODEL}_k1",
        ),
        (
            ["--size", "48", "80", "--dynamic-size", "--static-batch", "--no-optimize", "--seed", "7"],
            Recipe(
                MODEL, input_size=(48, 80), dynamic_size=True, dynamic_batch=False, optimize=False, seed=7
            ),
            MODEL,
        ),
        (
            [
                "--checkpoint",
                "w.pth",
                "--num-classes",
                "4",
                "--images",
                "photographs",
                "--targets",
                "onnxruntime",
            ],
            Recipe(MODEL, checkpoint=Path("w.pth"), num_classes=4, images=Path("photographs")),
            MODEL,
        ),
        (["--precision", "float32"], Recipe(MODEL), MODEL),
    ],
)
def test_options_become_a_recipe(
    asked: list[tuple[Recipe, Path, bool]], arguments: list[str], expected: Recipe, folder: str
) -> None:
    assert call("compile", MODEL, *arguments).code == 0
    assert asked == [(expected, Path("bundles") / folder, False)]


def test_a_recipe_takes_where_to_and_what_to_check_from_the_command_line(
    asked: list[tuple[Recipe, Path, bool]], workplace: Path
) -> None:
    (workplace / "small.toml").write_text(f'[model]\nname = "{MODEL}"\nseed = 3\n[input]\nsize = [32, 32]\n')
    assert call("compile", "small.toml").code == 0
    assert call("compile", "small.toml", "--out", "x", "--force", "--images", "photographs").code == 0
    recipe = Recipe(MODEL, seed=3, input_size=(32, 32))
    assert asked[0] == (recipe, Path("bundles/small"), False)
    assert asked[1] == (
        Recipe(MODEL, seed=3, input_size=(32, 32), images=Path("photographs")),
        Path("x"),
        True,
    )


def test_what_libraries_print_does_not_get_into_the_result(
    asked: list[tuple[Recipe, Path, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile = compiler.compile

    def talkative(*arguments: Any, **options: Any) -> bundles.Bundle:
        print("some advice")
        return compile(*arguments, **options)

    monkeypatch.setattr(compiler, "compile", talkative)
    outcome = call("compile", MODEL, "--json")
    assert outcome.json["report"]["passed"] is True and "some advice" in outcome.err


def test_quiet_prints_nothing_and_json_alone_prints_json(asked: list[tuple[Recipe, Path, bool]]) -> None:
    quiet = call("compile", MODEL, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    assert call("compile", MODEL, "--quiet", "--json").json["report"]["passed"] is True


@pytest.mark.parametrize(
    ("weights", "head", "warned"),
    [
        ("new", "new", "newly initialised weights (seed 0)"),
        ("included", "new", "last layer is newly initialised (seed 0)"),
        ("included", "loaded", None),
        ("checkpoint", "loaded", None),
    ],
)
def test_weights_that_were_never_trained_are_warned_of(
    monkeypatch: pytest.MonkeyPatch,
    compiled: tuple[Path, Outcome],
    weights: str,
    head: str,
    warned: str | None,
) -> None:
    made = bundles.load_bundle(compiled[0])
    made.manifest["model"].update(weights=weights, head=head)
    monkeypatch.setattr(compiler, "compile", lambda *arguments, **options: made)
    outcome = call("compile", MODEL, "--quiet")
    assert outcome.code == 0
    if warned is None:
        assert outcome.err == ""
    else:
        assert outcome.err.startswith("quartermap: warning: ") and warned in outcome.err


def test_a_checkpoint_for_another_number_of_classes_is_told_of(
    from_checkpoint: tuple[Path, Path, Outcome],
) -> None:
    bundle, checkpoint, compiled = from_checkpoint
    assert re.search(
        r"^quartermap: warning: .* another number of classes than 10", compiled.err, re.MULTILINE
    )
    model = json.loads((bundle / "manifest.json").read_text())["model"]
    assert (model["weights"], model["head"], model["num_classes"]) == ("checkpoint", "new", 10)
    assert model["weights_sha256"] == bundles.describe_file(checkpoint)["sha256"]
    for outcome in (compiled, call("inspect", bundle)):
        # On one line or on two: the bundle was compiled before this test could say how wide the terminal is.
        text = " ".join(outcome.out.split())
        assert f"from the checkpoint {checkpoint.name}; the last layer, for 10 classes, newly" in text


def test_recipes_of_the_repository_are_complete() -> None:
    recipes = sorted((models_directory().parent / "export").glob("*.toml"))
    assert recipes
    for path in recipes:
        options = program.build_parser().parse_args(["compile", str(path)])
        recipe, out = recipe_and_folder(options)
        assert recipe.model in list_models() and out == Path("bundles") / path.stem


# compile: bad input ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """The weights of the digits model."""
    return create_model(MODEL).state_dict()


def test_a_missing_checkpoint(refused: Refuse) -> None:
    assert "there is no checkpoint file gone.pth" in refused("compile", MODEL, "--checkpoint", "gone.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_truncated_checkpoint(
    refused: Refuse, workplace: Path, state: dict[str, torch.Tensor], name: str
) -> None:
    path = workplace / name
    if name.endswith(".pth"):
        torch.save(state, path)
    else:
        save_file(state, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    text = refused("compile", MODEL, "--checkpoint", path)
    assert name in text and "damaged" in text
    path.write_bytes(b"")
    assert "is empty" in refused("compile", MODEL, "--checkpoint", path)


def test_a_checkpoint_of_another_model_names_keys_and_shapes(
    refused: Refuse, workplace: Path, state: dict[str, torch.Tensor]
) -> None:
    other = dict(state)
    other["layers.9.blocks.0.op.Ds"] = other.pop("layers.0.blocks.0.op.Ds")
    other["layers.0.blocks.1.op.Ds"] = torch.zeros(3)
    torch.save({"model": other}, workplace / "w.pth")
    text = refused("compile", MODEL, "--checkpoint", "w.pth")
    assert "missing: layers.0.blocks.0.op.Ds" in text
    assert "unexpected: layers.9.blocks.0.op.Ds" in text
    assert re.search(r"layers\.0\.blocks\.1\.op\.Ds \(3,\) instead of \(\d+", text)


class Attack:
    """What runs code when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.mkdir, (str(self.target),))


def test_a_checkpoint_with_code_is_not_run(
    refused: Refuse, workplace: Path, state: dict[str, torch.Tensor]
) -> None:
    torch.save({"model": state, "hook": Attack(workplace / "attacked")}, workplace / "w.pth")
    text = refused("compile", MODEL, "--checkpoint", "w.pth")
    assert "could run code" in text and "mkdir" in text
    assert not (workplace / "attacked").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(
    refused: Refuse, workplace: Path, state: dict[str, torch.Tensor], value: float
) -> None:
    spoilt = {**state, "layers.1.blocks.0.op.A_logs": state["layers.1.blocks.0.op.A_logs"].clone()}
    spoilt["layers.1.blocks.0.op.A_logs"][0] = value
    save_file(spoilt, workplace / "w.safetensors")
    text = refused("compile", MODEL, "--checkpoint", "w.safetensors")
    assert "NaN or infinite" in text and "layers.1.blocks.0.op.A_logs" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--blocks", "3,99"], ["block 99", "1 to 10"]),
        (["--blocks", "0"], ["numbered from 1"]),
        (["--every", "11"], ["prunes nothing"]),
        (["--every", "1", "--exclude-stages", "1,2,3,4"], ["prunes nothing"]),
        (["--every", "3", "--exclude-stages", "7"], ["stage 7", "1 to 4"]),
        (["--every", "0"], ["every = 0"]),
        (["--every", "3", "--stride", "1"], ["stride = 1"]),
        (["--every", "3", "--keep", "2"], ["keep = 2"]),
        (["--stride", "3", "--keep", "2"], ["--stride, --keep", "--every K or --blocks"]),
        (["--blocks", "3", "--exclude-stages", "1"], ["--exclude-stages belongs to --every"]),
    ],
)
def test_a_plan_that_does_not_fit(refused: Refuse, arguments: list[str], words: list[str]) -> None:
    text = refused("compile", MODEL, *arguments)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(("name", "size"), [("medmamba_t", (31, 64)), ("vmamba_tiny_v0", (64, 3))])
def test_a_size_that_the_model_cannot_take(refused: Refuse, name: str, size: tuple[int, int]) -> None:
    text = refused("compile", name, "--size", *size)
    assert f"{size[0]}x{size[1]}" in text and "at least" in text


def test_an_unknown_target(refused: Refuse) -> None:
    text = refused("compile", MODEL, "--targets", "onnxruntme")
    assert "unknown target 'onnxruntme'" in text and "onnxruntime" in text


def test_images_that_are_not_there(refused: Refuse, workplace: Path) -> None:
    assert "gone" in refused("compile", MODEL, "--images", "gone")
    (workplace / "empty").mkdir()
    assert "holds no image" in refused("compile", MODEL, "--images", "empty")
    (workplace / "empty" / "broken.png").write_bytes(b"no image")
    assert "broken.png" in refused("compile", MODEL, "--images", "empty")


def test_a_folder_that_is_taken(refused: Refuse, bundle: Path, workplace: Path) -> None:
    assert "--force" in refused("compile", MODEL, "--out", bundle)
    (workplace / "notes").mkdir()
    (workplace / "notes" / "mine.txt").write_text("not a bundle")
    text = refused("compile", MODEL, "--out", "notes", "--force")
    assert "is no bundle" in text
    (workplace / "file").write_text("not a folder")
    assert "file" in refused("compile", MODEL, "--out", "file", "--force")


def test_a_folder_below_a_file(
    refused: Refuse, workplace: Path, monkeypatch: pytest.MonkeyPatch, compiled: tuple[Path, Outcome]
) -> None:
    exported_before(monkeypatch, compiled[0])
    (workplace / "file").write_text("not a folder")
    assert "file" in refused("compile", MODEL, "--out", "file/bundle")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["there is no recipe bad.toml"]),
        ("[model", ["no valid TOML"]),
        ("[quartermap]\nevery = 3\n", ["names no model"]),
        ('[model]\nname = "vmamba_digts"\n', ["vmamba_digits"]),
        ('[model]\nname = "vmamba_digits"\nclases = 3\n', ["clases"]),
        ('[model]\nname = "vmamba_digits"\n[pruning]\nevery = 3\n', ["pruning", "quartermap"]),
        ('[model]\nname = "vmamba_digits"\n[quartermap]\nevery = "3"\n', ["every", "whole number"]),
        ('[model]\nname = "vmamba_digits"\n[input]\nsize = [64]\n', ["size", "[height, width]"]),
        ('[model]\nname = "vmamba_digits"\ncheckpoint = "gone.pth"\n', ["gone.pth"]),
    ],
)
def test_a_recipe_that_is_wrong(refused: Refuse, workplace: Path, text: str | None, words: list[str]) -> None:
    if text is not None:
        (workplace / "bad.toml").write_text(text)
    message = refused("compile", "bad.toml")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "arguments",
    [
        ["--every", "3"],
        ["--size", "64", "64"],
        ["--no-optimize"],
        ["--static-batch"],
        ["--precision", "float32"],
    ],
)
def test_what_a_recipe_decides_is_not_set_beside_it(
    refused: Refuse, workplace: Path, arguments: list[str]
) -> None:
    (workplace / "r.toml").write_text(f'[model]\nname = "{MODEL}"\n')
    text = refused("compile", "r.toml", *arguments)
    assert f"the recipe r.toml decides what {arguments[0]} would set" in text


def exported_before(
    monkeypatch: pytest.MonkeyPatch,
    bundle: Path,
    change: Callable[[onnx.ModelProto], onnx.ModelProto] = lambda model: model,
) -> None:
    """Spare the export: take the model of a bundle, unpruned or not, and change it."""
    from quartermap_deploy.exporting.export import Export
    from quartermap_deploy.sources.graph_facts import output_infos
    from quartermap_deploy.sources.source_model import Traced

    model = change(onnx.load(bundle / "model.onnx"))
    traced = Traced(model, output_infos(model))
    monkeypatch.setattr(compiler, "export_model", lambda *arguments: Export(model, traced, model, (), ()))


def test_a_model_that_departs_is_not_written_and_its_block_is_named(
    refused: Refuse, bundle: Path, monkeypatch: pytest.MonkeyPatch, compiled: tuple[Path, Outcome]
) -> None:
    exported_before(monkeypatch, compiled[0], lambda model: damaged_block(model, 5))
    text = refused("compile", MODEL, "--every", 3, "--out", "new")
    assert "block 5 (layers.2.blocks.0) is the first that departs" in text
    # The bundle that was to be replaced is still there, as it was.
    assert "block 5" in refused("compile", MODEL, "--every", 3, "--out", bundle, "--force")


# inspect --------------------------------------------------------------------------------------------------------


def test_inspect_shows_the_block_map_operators_passes_and_files(compiled: tuple[Path, Outcome]) -> None:
    path, first = compiled
    outcome = call("inspect", path)
    assert outcome.code == 0 and outcome.err == ""
    manifest = first.json["manifest"]
    lines = [line.split() for line in outcome.out.splitlines()]
    for block in manifest["blocks"]:
        size, scanned = ("x".join(map(str, block[key])) for key in ("map_size", "scanned_size"))
        expected = [str(block["index"]), str(block["stage"]), size, scanned]
        (line,) = (line for line in lines if line[:4] == expected)
        assert ("yes" in line) == block["pruned"]
        assert f"{block['tokens']:,}" in line
    totals = next(line for line in lines if line[:1] == ["model"] and len(line) > 5 and line[1] != "a")
    assert f"{manifest['totals']['tokens']:,}" in totals
    graph = manifest["graph"]
    assert ["all", str(graph["before"]["nodes"]), str(graph["nodes"])] in [line[:3] for line in lines]
    for operator, count in graph["operators"].items():
        assert any(line[0] == operator and line[2] == str(count) for line in lines if len(line) >= 3)
    for name in (*(entry["name"] for entry in manifest["passes"]), *manifest["files"], "onnxruntime"):
        assert name in outcome.out


def test_inspect_as_json(compiled: tuple[Path, Outcome]) -> None:
    path, first = compiled
    assert call("inspect", path, "--json").json == first.json


@pytest.mark.parametrize("command", ["models", "inspect", "validate", "bench", "demo"])
def test_tables_fit_80_columns(
    compiled: tuple[Path, Outcome],
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def lines() -> list[str]:
        if command == "demo":
            results = [
                demo_result(),
                demo_result(name="k2", pruned_blocks=(4, 6, 8, 10), speed=1.34),
                demo_result(name="k1", pruned_blocks=(3, 4, 5, 6, 7, 8, 9, 10), images_per_second=12345.6),
            ]
            demo.show_results(results)
            return capsys.readouterr().out.splitlines()
        options = {"models": [], "bench": [compiled[0], "--repeats", 1, "--threads", 1]}
        return call(command, *options.get(command, [compiled[0]])).out.splitlines()

    def tables(lines: list[str]) -> list[str]:
        # Numbers of two runs differ, the lines they stand in do not; plain sentences are not wrapped by us.
        return [re.sub(r"[\d.]+", "0", line.rstrip()) for line in lines if "   " in line or "──" in line]

    wide = tables(lines())
    monkeypatch.setenv("COLUMNS", "80")
    narrow = tables(lines())
    assert all(len(line) <= 80 for line in narrow)
    if command in ("models", "demo"):
        assert narrow == wide, "no cell is wrapped"


def test_inspect_in_a_narrow_terminal_cuts_nothing_off(
    compiled: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    out = call("inspect", compiled[0]).out
    assert "…" not in out.split("files")[0]
    assert "SelectiveScan2D" in out


# validate -------------------------------------------------------------------------------------------------------


def test_validate_against_the_golden_outputs(compiled: tuple[Path, Outcome]) -> None:
    outcome = call("validate", compiled[0])
    assert outcome.code == 0, outcome.err
    assert "logits" in outcome.out and "passed" in outcome.out and "FAILED" not in outcome.out
    assert call("validate", compiled[0], "--json").json["passed"] is True


def test_validate_against_pytorch_compares_every_block(compiled: tuple[Path, Outcome]) -> None:
    outcome = call("validate", compiled[0], "--reference", "torch", "--target", "onnxruntime")
    assert outcome.code == 0, outcome.err
    for name in (*(f"block_{index}" for index in range(1, 11)), "logits", "zeros"):
        assert name in outcome.out


def test_a_bundle_that_departs_fails_and_its_block_is_named(bundle: Path) -> None:
    onnx.save(damaged_block(onnx.load(bundle / "model.onnx"), 7), bundle / "model.onnx")
    rewrite_manifest(bundle)
    before = contents(bundle)
    golden = call("validate", bundle, "--json")
    assert golden.code == 2 and golden.json["passed"] is False
    assert "logits departs" in golden.err and "--reference torch" in golden.err
    blocks = call("validate", bundle, "--reference", "torch", "--quiet")
    assert blocks.code == 2 and blocks.out == ""
    assert re.fullmatch(
        r"quartermap: error: .*block 7 \(layers\.2\.blocks\.2\) is the first that departs, on .*\n",
        blocks.err,
    )
    table = call("validate", bundle, "--reference", "torch").out
    assert "FAILED" in next(line for line in table.splitlines() if line.split()[:1] == ["block_7"])
    assert "FAILED" not in next(line for line in table.splitlines() if line.split()[:1] == ["block_6"])
    assert contents(bundle) == before


def test_a_target_that_the_bundle_was_not_built_for(refused: Refuse, bundle: Path) -> None:
    assert "onnxruntime" in refused("validate", bundle, "--target", "tensorrt", "--quiet")


def test_a_bundle_from_a_checkpoint_is_compared_with_the_model_of_that_file(
    from_checkpoint: tuple[Path, Path, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, checkpoint, _ = from_checkpoint
    seen = []
    compare = compiling.parity.parity_of
    monkeypatch.setattr(
        compiling.parity,
        "parity_of",
        lambda *arguments, **options: seen.append(arguments[2]) or compare(*arguments, **options),
    )
    outcome = call("validate", bundle, "--reference", "torch", "--checkpoint", checkpoint, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["passed"] is True
    # On the images that it was compiled with, wherever they are by now.
    own = prepare([checkpoint.parent / "images" / "noise.png"] * 2, load_card(MODEL).preprocessing)
    np.testing.assert_array_equal(seen[0]["images"]["images"], own)


def test_no_other_file_than_the_checkpoint_of_a_bundle_will_do(
    refused: Refuse, from_checkpoint: tuple[Path, Path, Outcome], bundle: Path, workplace: Path
) -> None:
    ours, checkpoint, _ = from_checkpoint
    (workplace / "other.pth").write_bytes(checkpoint.read_bytes() + b"\0")
    torch_reference = ["validate", ours, "--reference", "torch"]
    assert "give the file with --checkpoint" in refused(*torch_reference)
    assert "no checkpoint file gone.pth" in refused(*torch_reference, "--checkpoint", "gone.pth")
    text = refused(*torch_reference, "--checkpoint", "other.pth")
    assert "other.pth is not the file that the bundle was compiled from, seven.pth (sha256" in text
    assert "need no checkpoint" in refused("validate", ours, "--checkpoint", checkpoint)
    text = refused("validate", bundle, "--reference", "torch", "--checkpoint", checkpoint)
    assert "was not compiled from a checkpoint" in text


# Bundles that are damaged ---------------------------------------------------------------------------------------


def spoil_model(bundle: Path) -> None:
    path = bundle / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def lose_model(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()


def lose_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


def truncate_manifest(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_text(path.read_text()[:100])


def other_json(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("[1, 2]")


def newer_format(bundle: Path) -> None:
    rewrite_manifest(bundle, lambda manifest: manifest.update(format=99))


def reach_outside(bundle: Path) -> None:
    rewrite_manifest(
        bundle, lambda manifest: manifest["files"].update({"../secret": {"sha256": "", "bytes": 0}})
    )


@pytest.mark.parametrize("command", ["inspect", "validate", "bench"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_model, ["model.onnx", "does not match its manifest"]),
        (lose_model, ["model.onnx", "missing"]),
        (lose_manifest, ["manifest.json"]),
        (truncate_manifest, ["manifest.json"]),
        (other_json, ["manifest"]),
        (newer_format, ["99"]),
        (reach_outside, ["../secret"]),
    ],
)
def test_a_bundle_that_does_not_match_its_manifest(
    refused: Refuse, bundle: Path, command: str, spoil: Callable[[Path], None], words: list[str]
) -> None:
    spoil(bundle)
    text = refused(command, bundle)
    assert all(word in text for word in words), text


@pytest.mark.parametrize("command", ["inspect", "validate", "bench", "rebuild"])
def test_a_file_is_no_bundle(refused: Refuse, bundle: Path, command: str) -> None:
    assert "model.onnx is a file; expected the folder of a bundle" in refused(command, bundle / "model.onnx")


@pytest.mark.parametrize("command", ["inspect", "validate", "bench"])
def test_a_bundle_that_is_not_there(refused: Refuse, command: str) -> None:
    assert "there is no bundle gone" in refused(command, "gone")


@pytest.mark.parametrize(
    "command", [["inspect"], ["validate"], ["validate", "--reference", "torch"], ["bench"]]
)
def test_an_onnx_file_that_is_corrupted_although_its_hash_fits(
    refused: Refuse, bundle: Path, command: list[str]
) -> None:
    (bundle / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes()[:5000])
    rewrite_manifest(bundle)
    assert "model" in refused(*command, bundle)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_inspect_notices_another_graph_although_its_hash_fits(
    refused: Refuse, bundle: Path, options: list[str]
) -> None:
    model = onnx.load(bundle / "model.onnx")
    model.graph.node.append(onnx.helper.make_node("Sinh", ["logits"], ["more"], name="more"))
    onnx.save(model, bundle / "model.onnx")
    rewrite_manifest(bundle)
    text = refused("inspect", bundle, *options)
    assert "its manifest lists" in text and "1 Sinh instead of 0" in text
    model.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(model, bundle / "model.onnx")
    rewrite_manifest(bundle)
    assert "no valid ONNX model" in refused("inspect", bundle, *options)


def test_golden_files_that_are_corrupted_although_their_hash_fits(refused: Refuse, bundle: Path) -> None:
    (bundle / "golden_outputs.json").write_text("{}")
    rewrite_manifest(bundle)
    assert "golden" in refused("validate", bundle)


# bench ----------------------------------------------------------------------------------------------------------


def test_bench_compares_bundles(bundle: Path, workplace: Path) -> None:
    other = shutil.copytree(bundle, workplace / "other")
    arguments = ["bench", bundle, other, bundle, "--batch", 3, "--threads", 1, "--repeats", 2]
    result = call(*arguments, "--json").json
    assert (result["batch"], result["threads"], result["repeats"]) == (3, 1, 2)
    assert [entry["name"] for entry in result["bundles"]] == ["k3", "other", "k3 (2)"]
    first = result["bundles"][0]
    assert first["speed"] == 1 and first["speed_quartiles"] == [1, 1]
    for entry in result["bundles"]:
        assert 0 < entry["minimum_ms"] <= entry["median_ms"] <= entry["maximum_ms"]
        assert entry["images_per_second"] == pytest.approx(3 / entry["median_ms"] * 1e3)
        low, high = entry["speed_quartiles"]
        assert low <= entry["speed"] <= high
    out = call("bench", bundle, "--threads", 1, "--repeats", 1).out
    assert "images/s" in out and "1.00 × [1.00 – 1.00]" in out


def test_bench_runs_the_targets_that_are_named(refused: Refuse, bundle: Path) -> None:
    arguments = ["bench", bundle, "--threads", 1, "--repeats", 1, "--target", "onnxruntime"]
    assert [entry["target"] for entry in call(*arguments, "--json").json["bundles"]] == ["onnxruntime"]
    text = refused(*arguments, "tensorrt")
    assert "has no engine for tensorrt, it has onnxruntime" in text
    assert f"quartermap rebuild {bundle} --target tensorrt" in text


def test_bench_runs_on_real_images(bundle: Path) -> None:
    from quartermap_deploy.cli.bench import golden_batch

    (batch,) = golden_batch(bundles.load_bundle(bundle), 5).values()
    assert batch.shape == (5, 3, 64, 64) and batch.dtype == np.float32
    assert all(image.std() > 0.1 for image in batch)
    np.testing.assert_array_equal(batch[0], batch[2])


def test_bench_says_on_how_many_threads_it_ran(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTERMAP_THREADS", "3")
    assert call("bench", bundle, "--repeats", 1, "--json").json["threads"] == 3
    monkeypatch.delenv("QUARTERMAP_THREADS")
    out = call("bench", bundle, "--repeats", 1).out
    assert re.search(r"batch 1, [1-9]\d* threads, 1 rounds", out)


def test_the_threads_of_bench_are_its_own(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quartermap_deploy.targets.onnxruntime import target

    seen: list[str | None] = []
    original = target.open

    def open(path: Path, entry: dict[str, Any], **options: Any) -> Any:
        seen.append(os.environ.get("QUARTERMAP_THREADS"))
        return original(path, entry, **options)

    monkeypatch.setattr(target, "open", open)
    monkeypatch.delenv("QUARTERMAP_THREADS", raising=False)
    assert call("bench", bundle, "--threads", 1, "--repeats", 1, "--quiet").code == 0
    assert seen == ["1"] and "QUARTERMAP_THREADS" not in os.environ


# Ways to end ----------------------------------------------------------------------------------------------------


def ending(monkeypatch: pytest.MonkeyPatch, end: Callable[[], None]) -> None:
    """Make compiling end in the middle of writing a bundle."""

    def compile(recipe: Recipe, out: Path, *, force: bool, progress: object) -> None:
        with bundles.new_bundle(out, force) as folder:
            (folder / "model.onnx").write_bytes(b"half")
            end()
            raise AssertionError("nothing ended it")

    monkeypatch.setattr(compiler, "compile", compile)


def raising(error: BaseException) -> Callable[[], None]:
    def end() -> None:
        raise error

    return end


def test_interrupting_leaves_nothing_behind(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    before = contents(workplace)
    ending(monkeypatch, raising(KeyboardInterrupt()))
    outcome = call("compile", MODEL, "--out", bundle, "--force", "--quiet")
    assert (outcome.code, outcome.err) == (130, "quartermap: error: interrupted\n")
    assert contents(workplace) == before


@pytest.mark.parametrize(
    "start",
    [
        "from quartermap_deploy.cli import main; sys.exit(main())",
        "runpy.run_module('quartermap_deploy', run_name='__main__')",
        "runpy.run_module('quartermap_deploy.cli', run_name='__main__')",
    ],
    ids=["quartermap", "-m quartermap_deploy", "-m quartermap_deploy.cli"],
)
def test_an_interruption_at_the_start_leaves_no_traceback(start: str) -> None:
    script = """
import runpy, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "quartermap_deploy.cli.bench":
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting())
"""
    done = subprocess.run([sys.executable, "-c", script + start], capture_output=True, text=True, timeout=60)
    # The signal waits until the import is over; the help may be printed before it is asked for again.
    assert (done.returncode, done.stderr) == (130, "quartermap: error: interrupted\n")
    assert not done.stdout or done.stdout.startswith("usage: quartermap")


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_terminating_leaves_nothing_behind(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    before, handler = contents(workplace), signal.getsignal(signal.SIGTERM)
    ending(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert call("compile", MODEL, "--out", bundle, "--force", "--quiet").code == 143
    assert contents(workplace) == before
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    ending(monkeypatch, raising(ZeroDivisionError("a defect")))
    outcome = call("compile", MODEL, "--quiet")
    assert outcome.code == 1 and outcome.out == ""
    assert "Traceback" in outcome.err and "ZeroDivisionError: a defect" in outcome.err
    assert "please report" in outcome.err.splitlines()[-1]


def test_a_full_disk_is_no_defect(monkeypatch: pytest.MonkeyPatch, refused: Refuse, workplace: Path) -> None:
    (workplace / "bundles").mkdir()
    # As copying a file says it, which names the source.
    ending(monkeypatch, raising(OSError(28, "No space left on device", "/somewhere/model.onnx")))
    said = refused("compile", MODEL)
    assert "cannot write bundles/vmamba_digits: No space left on device; make room" in said
    assert "/somewhere" not in said


@pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
@pytest.mark.parametrize("arguments", [["models"], ["models", "--json"]])
def test_a_reader_that_has_gone_is_no_defect(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "quartermap_deploy.cli", *arguments],
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


# Progress and formats -------------------------------------------------------------------------------------------


def test_progress_in_a_terminal_leaves_one_line_for_each_step() -> None:
    stream = io.StringIO()
    progress = progress_display.TerminalProgress(
        Console(file=stream, force_terminal=True, width=100, color_system=None)
    )
    with progress.step("exporting [to] ONNX"):
        pass
    with progress.step("timing", total=3) as advance:
        for _ in range(3):
            advance(1)
        with progress.step("within"):
            pass
    with contextlib.suppress(ParityError), progress.step("failing"):
        raise ParityError("departs")
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", stream.getvalue()).splitlines()]
    finished = [line for line in lines if re.search(r"  \d+\.\d s$", line)]
    assert [line.rsplit("  ", 1)[0] for line in finished] == ["exporting [to] ONNX", "within", "timing"]


def test_progress_in_a_log_is_one_line_for_each_step() -> None:
    stream = io.StringIO()
    progress = progress_display.LineProgress(stream)
    with progress.step("one"), progress.step("two", total=2) as advance:
        advance(2)
    assert [line.split("] ")[1] for line in stream.getvalue().splitlines()] == ["one", "two"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (12, "12"),
        (999, "999"),
        (1000, "1 k"),
        (607_786, "608 k"),
        (4.9e9, "4.9 G"),
        (999.9e6, "1000 M"),
    ],
)
def test_counts_have_three_digits(count: float, text: str) -> None:
    assert count_text(count) == text


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    results.print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": Path("x"), "d": ()})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": "x", "d": []}


# The demo -------------------------------------------------------------------------------------------------------


def demo_result(**changes: Any) -> demo.Result:
    values: dict[str, Any] = {
        "name": "unpruned",
        "pruned_blocks": (),
        "accuracy": 0.99,
        "torch_accuracy": 0.99,
        "agreement": 1.0,
        "images_per_second": 1234.5,
        "speed": 1.0,
        "speed_quartiles": (0.9, 1.1),
        "tokens": 2848,
        "nodes": 246,
        "parity_error": 5e-7,
    }
    return demo.Result(**{**values, **changes})


@pytest.fixture
def one_plan(monkeypatch: pytest.MonkeyPatch, compiled: tuple[Path, Outcome]) -> Iterator[None]:
    """The demo with a single plan, whose bundle exists already."""
    monkeypatch.setattr(demo, "PLANS", {"k3": QuarterMap(every=3)})
    monkeypatch.setattr(compiler, "compile", lambda *arguments, **options: bundles.load_bundle(compiled[0]))
    yield


def test_the_demo_evaluates_times_and_shows(
    one_plan: None, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "demo").mkdir()
    assert demo.main(["--repeats", "1"]) == 0
    written = json.loads((workplace / "demo" / "results.json").read_text())
    (result,) = written["results"]
    assert result["accuracy"] >= 0.97 and result["agreement"] == 1 and result["pruned_blocks"] == [3, 6, 9]
    assert result["parity_error"] < 1e-4 and result["images_per_second"] > 0
    out = capsys.readouterr().out
    assert "k = 3" in out and "3, 6, 9" in out and f"{result['accuracy']:.2%}" in out and "100.00%" in out


def test_the_demo_fails_when_its_claims_do_not_hold(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    demo.check([demo_result(), demo_result(name="k1", accuracy=0.5)])
    with pytest.raises(ParityError, match=r"98\.00%"):
        demo.check([demo_result(), demo_result(name="k1", agreement=0.98)])
    with pytest.raises(ParityError, match="at least 97%"):
        demo.check([demo_result(accuracy=0.969)])
    (workplace / "demo").mkdir()
    monkeypatch.setattr(demo, "run", lambda *arguments: [demo_result(accuracy=0.5)])
    assert demo.main([]) == 2


def test_the_demo_table_has_a_line_for_every_plan(capsys: pytest.CaptureFixture[str]) -> None:
    demo.show_results([demo_result(), demo_result(name="k1", pruned_blocks=(3, 4), tokens=1424)])
    lines = capsys.readouterr().out.splitlines()
    (first,) = (line.split() for line in lines if line.startswith("no pruning"))
    assert first == ["no", "pruning", "–", "99.00%", "1,234", "1.00", "×", "2,848", "246", "5.0e-07"]
    (second,) = (line.split() for line in lines if line.startswith("k = 1"))
    assert second[3:5] == ["3,", "4"] and "1,424" in second


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((), ""), ((3,), "3"), ((3, 4), "3, 4"), ((3, 4, 5), "3–5"), ((1, 4, 5, 6, 8, 10), "1, 4–6, 8, 10")],
)
def test_runs_of_blocks_are_shortened(numbers: tuple[int, ...], text: str) -> None:
    assert demo.ranges(numbers) == text


def test_a_long_step_is_heard_of_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_display.LineProgress, "QUIET", 0.05)
    stream = io.StringIO()
    progress = progress_display.LineProgress(stream)
    with progress.step("running the model", total=256) as advance:
        advance(32)
        deadline = time.monotonic() + 20
        while stream.getvalue().count("\n") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = [line.split("] ")[1] for line in stream.getvalue().splitlines()]
    assert lines[:3] == ["running the model", *["still running the model, 32 of 256"] * 2]
    with progress.step("short"):
        pass
    assert stream.getvalue().splitlines()[-1].endswith("] short")
