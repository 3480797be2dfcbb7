"""`quartermap eval` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_data import damaged, digit_folders, medmnist_file
from test_cli import Outcome, Refuse, call, refused, workplace

from quartermap_deploy.evaluation.tally import Tally
from quartermap_deploy.recipe import Recipe

pytestmark = pytest.mark.usefixtures("natively")

__all__ = ["refused", "workplace"]

MODEL = ("eval", "vmamba_digits", "--target", "torch")
"""The PyTorch model, which is ready at once."""


def names(outcome: Outcome) -> dict[str, str]:
    """The facts of the first table, by name."""
    lines = outcome.out.split("\n\n")[0].splitlines()[1:]
    return {line.split("  ")[0].strip(): line.split("  ", 1)[1].strip() for line in lines}


def test_the_held_out_digits_are_the_default(workplace: Path) -> None:
    outcome = call(*MODEL, "--limit", 100)
    assert outcome.code == 0 and outcome.out.startswith("vmamba_digits on digits, held_out, 100 of 450\n")
    found = names(outcome)
    assert found["target"] == "torch" and found["images"] == "100" and float(found["top-1"][:-1]) >= 97
    assert "at batch 32" in found["images/s"]
    assert len(outcome.out.split("by class\n")[1].splitlines()) == 12
    # With --json the same, and with --quiet nothing.
    values = call(*MODEL, "--limit", 100, "--json").json
    assert f"{values['top1']:.2%}" == found["top-1"] and values["images"] == 100
    assert values["plan"] is None and values["data"]["name"] == "digits, held_out, 100 of 450"
    assert sum(entry["correct"] for entry in values["per_class"].values()) == round(values["top1"] * 100)
    assert call(*MODEL, "--limit", 2, "--quiet").out == ""


def test_a_recipe_is_pruned_as_it_says(workplace: Path) -> None:
    text = Recipe("vmamba_digits").to_toml(workplace)
    (workplace / "k1.toml").write_text(f"{text}\n[quartermap]\nevery = 1\n")
    values = call("eval", "k1.toml", "--target", "torch", "--limit", 150, "--json").json
    assert values["plan"]["every"] == 1 and values["source"] == "k1" and values["top1"] < 0.85


def test_folders_and_files_are_known_by_their_looks(workplace: Path) -> None:
    digit_folders(workplace / "images" / "val", [str(digit) for digit in range(10)], per_class=3)
    values = call(*MODEL, "--data", "images", "--json").json
    assert values["data"]["name"] == "images, val" and values["images"] == 30 and values["top1"] > 0.9
    path = medmnist_file(workplace / "digitmnist.npz")
    values = call(*MODEL, "--data", path, "--split", "train", "--json").json
    assert values["data"]["name"] == "digitmnist, train" and values["images"] == 20


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_folders_with_the_names_of_the_models_classes_are_those(workplace: Path) -> None:
    digit_folders(workplace / "data", WORDS, per_class=3)
    (workplace / "words.txt").write_text("\n".join(WORDS))
    outcome = call(*MODEL, "--data", "data", "--labels", "words.txt", "--json")
    assert outcome.code == 0 and "numbered by name" not in outcome.err
    values = outcome.json
    assert values["top1"] > 0.9 and list(values["per_class"]) == list(WORDS)
    assert values["overridden"] == ["labels"]
    # The model's own names are 0 to 9: in the order of their names, eight would be the first class.
    outcome = call(*MODEL, "--data", "data", "--json")
    assert "numbered by name: eight = 0, five = 1" in outcome.err and outcome.json["top1"] < 0.5


def test_images_are_prepared_as_the_command_line_says(workplace: Path) -> None:
    found = names(call(*MODEL, "--limit", 60, "--preprocessing", "mean=3,3,3", "scale=1/100"))
    assert found["set otherwise"] == "mean, scale" and float(found["top-1"][:-1]) < 90
    (workplace / "dark.toml").write_text(
        Recipe("vmamba_digits", preprocessing={"mean": [3.0, 3.0, 3.0]}).to_toml(workplace)
    )
    values = call("eval", "dark.toml", "--target", "torch", "--limit", 4, "--json").json
    assert values["overridden"] == ["mean"] and values["preprocessing"]["mean"] == [3.0] * 3


def test_the_worst_classes_are_shown_where_there_are_many(workplace: Path) -> None:
    (workplace / "many").mkdir()
    digit_folders(workplace / "many", {digit: str(3 * digit) for digit in range(10)}, per_class=1)
    for number in range(30):
        (workplace / "many" / str(number)).mkdir(exist_ok=True)
    recipe = Recipe("vmamba_digits", num_classes=30).to_toml(workplace)
    (workplace / "wide.toml").write_text(recipe)
    outcome = call("eval", "wide.toml", "--target", "torch", "--data", "many")
    assert outcome.code == 0 and "by class" in outcome.out
    assert "warning: vmamba_digits has newly initialised weights" in outcome.err
    array = np.zeros((25, 8, 8), np.uint8)
    np.savez(workplace / "a.npz", test_images=array, test_labels=np.arange(25, dtype=np.uint8)[:, None])
    (workplace / "wider.toml").write_text(Recipe("vmamba_digits", num_classes=25).to_toml(workplace))
    outcome = call("eval", "wider.toml", "--target", "torch", "--data", "a.npz")
    assert "the 20 worst of 25 classes" in outcome.out


def test_few_classes_have_no_top_5(workplace: Path) -> None:
    digit_folders(workplace / "data", {digit: "abcde"[digit] for digit in range(5)})
    (workplace / "five.toml").write_text(Recipe("vmamba_digits", num_classes=5).to_toml(workplace))
    outcome = call("eval", "five.toml", "--target", "torch", "--data", "data")
    assert names(outcome)["top-5"].startswith("not measured: with at most five classes")


def test_broken_images_are_a_warning(workplace: Path) -> None:
    folder = digit_folders(workplace / "data", [str(digit) for digit in range(10)])
    for name, data in damaged(workplace).items():
        (folder / "4" / name).write_bytes(data)
    outcome = call(*MODEL, "--data", "data", "--quiet")
    assert outcome.code == 0 and outcome.out == ""
    assert "warning: 4 of 24 images of data cannot be read and were left out: 4/cut.png: " in outcome.err
    assert "; and 1 more" in outcome.err
    assert names(call(*MODEL, "--data", "data"))["images"] == "20, 4 broken"
    values = call(*MODEL, "--data", "data", "--json").json
    assert len(values["broken"]) == 4 and values["images"] == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "absent"), "cannot read absent: there is no such folder"),
        (("--data", "empty"), "empty holds no image"),
        (("--data", "absent.npz"), "absent.npz: there is no such file"),
        (("--data", "set.npz", "--split", "val"), "set.npz has no part 'val'; it has train, test"),
        (("--data", "three"), "three has 3 classes, but the model has 10; found a, b, c"),
        (("--data", "indices"), "indices has images of class 12, but the model has classes 0 to 9"),
        (("--data", "wide.npz"), "wide, test has images of class 11, but the model has classes 0 to 9"),
        (("--data", "set.npz", "--format", "imagefolder"), "it is a file; expected a folder"),
        (("--format", "imagefolder"), "needs a path"),
        (("--format", "folders"), "unknown --format 'folders'; did you mean imagefolder?"),
        (("--split", "hold_out"), "Did you mean held_out?"),
        (("--data", "three", "--format", "digits"), "leave the path out"),
        (("--batch", "0"), "'0' is no whole number from 1 to 65,536"),
        (("--resume", "set.npz/state.json"), "the state cannot be written to set.npz/state.json"),
        (("--resume", "empty"), "the state empty is a folder; name a file in it, such as empty/state.json"),
        (("--resume", "state.json"), "belongs to another evaluation"),
        (("--target", "cuda"), "unknown target 'cuda'"),
        (("--checkpoint", "absent.pth"), "absent.pth"),
        (("--factory", "mine:Net"), "is no bundle, and a recipe names its factory itself"),
        (("--labels", "absent.txt"), "absent.txt cannot be read"),
        (("--labels", "imagenet"), "'imagenet' have 1000 names"),
        (("--preprocessing", "mean=1"), "has 1 number; expected 3"),
        (("--preprocessing", "crop=48"), "makes images of 48x48, but the model is compiled for 64x64"),
    ],
)
def test_what_is_wrong_is_said(
    workplace: Path, refused: Refuse, arguments: tuple[str, ...], message: str
) -> None:
    (workplace / "empty").mkdir()
    medmnist_file(workplace / "set.npz", parts=("train", "test"))
    np.savez(
        workplace / "wide.npz", test_images=np.zeros((12, 8, 8), np.uint8), test_labels=np.arange(12)[:, None]
    )
    digit_folders(workplace / "three", {0: "a", 1: "b", 2: "c"})
    digit_folders(workplace / "indices", {0: "0", 1: "12"})
    (workplace / "state.json").write_text(
        json.dumps({"format": 1, "key": "", "position": 0, "correct": [], "total": [], "broken": []})
    )
    options = () if "--target" in arguments else ("--target", "torch")
    assert message in refused("eval", "vmamba_digits", *options, *arguments)


def test_what_folders_leave_open_is_a_warning(workplace: Path) -> None:
    digit_folders(workplace / "data", [f"{'abcdefghij'[digit]}" for digit in range(10)])
    (workplace / "data" / "a" / "two\nlines.gif").touch()
    (workplace / "data" / "a" / "two\nlines.png").touch()
    outcome = call(*MODEL, "--data", "data", "--quiet", "--resume", "kept/here/state.json")
    assert outcome.code == 0, outcome.err
    assert [line.split(": ")[1] for line in outcome.err.splitlines()] == ["warning"] * 3
    assert "are numbered by name: a = 0, b = 1, c = 2, …; put a classes.txt beside them" in outcome.err
    assert "left out of data: a/two\\nlines.gif; 1 in all" in outcome.err
    assert "1 of 21 images of data cannot be read and were left out: a/two\\nlines.png: " in outcome.err
    assert json.loads((workplace / "kept" / "here" / "state.json").read_text())["position"] == 21


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130)])
@pytest.mark.parametrize("after", [0, 3])
def test_a_stop_says_what_is_kept(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException, code: int
) -> None:
    """Long before the state would be written by the clock; the next one goes on from the middle."""
    command = (*MODEL, "--limit", "80", "--batch", "8", "--json", "--resume", "state.json")
    plus, done = Tally.plus, []

    def stopping(*arguments: Any) -> Tally:
        if len(done) == after:
            raise error
        done.append(1)
        return plus(*arguments)

    with monkeypatch.context() as planted:
        planted.setattr(Tally, "plus", stopping)
        outcome = call(*command)
    assert outcome.code == code and outcome.out == ""
    assert json.loads((workplace / "state.json").read_text())["position"] == 8 * after
    said = [line for line in outcome.err.splitlines() if "warning" in line]
    expected = "what was measured so far is kept in state.json; the same command goes on from there"
    if not after:
        expected = "nothing was measured yet that could be kept in state.json; the same command begins anew"
    assert said == [f"quartermap: warning: {expected}"]
    counted: list[int] = []
    with monkeypatch.context() as planted:
        planted.setattr(Tally, "plus", lambda *rest: counted.append(len(rest[2])) or plus(*rest))
        found = call(*command).json
    assert sum(counted) == 80 - 8 * after and found["images"] == 80
    assert found["per_class"] == call(*command[:-2]).json["per_class"]


# Enough images to be still at it for seconds when the state is written for the first time, after SAVE_AFTER seconds.
MANY = ("--split", "training", "--limit", "160", "--batch", "1", "--json")
SAVE_AFTER = 0.3
IMPATIENT = f"""
import sys
from quartermap_deploy import cli
from quartermap_deploy.evaluation import accuracy
accuracy.SAVE_AFTER = {SAVE_AFTER}
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What an evaluation that nobody stops says."""
    return dict(call(*MODEL, *MANY).json)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_was_stopped_goes_on(
    workplace: Path, alone: dict[str, Any], sent: signal.Signals, code: int
) -> None:
    """A process of its own is stopped in the middle; the next one gives what one alone would have given."""
    command = [*MODEL, *MANY, "--resume", "state.json"]
    process = subprocess.Popen(
        [sys.executable, "-c", IMPATIENT, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=workplace,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell without a terminal lets what it runs in the background ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    state, deadline = workplace / "state.json", time.monotonic() + 100
    while not (state.exists() and json.loads(state.read_text())["position"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and out == "" and "Traceback" not in err, err
    assert "kept in state.json; the same command goes on" in err
    assert 0 < json.loads(state.read_text())["position"] < 160
    found = call(*command).json
    times = {"seconds", "compute_seconds", "images_per_second"}
    assert {**found, **dict.fromkeys(times)} == {**alone, **dict.fromkeys(times)}
    assert found["images"] == 160 and all(found[name] > 0 for name in times)
