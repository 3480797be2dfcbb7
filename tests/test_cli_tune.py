"""`quartermap tune` as a user meets it, up to the bundle that is compiled from its recipe."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_data import digit_folders, medmnist_file
from test_cli import Refuse, call, refused, workplace

from quartermap_deploy import load_bundle
from quartermap_deploy.cli.program import build_parser
from quartermap_deploy.cli.tune import factor, image_sets, share
from quartermap_deploy.evaluation.datasets import Dataset
from quartermap_deploy.evaluation.trial import Trial

pytestmark = pytest.mark.usefixtures("natively")

__all__ = ["refused", "workplace"]

QUICK = ("--measure", "flops", "--stride", "2", "--exclude-stages", "1", "--evaluations", "24")
FEW = ("--calibration", "40", "--verification", "40")


def test_from_a_budget_to_a_bundle(workplace: Path) -> None:
    outcome = call("tune", "vmamba_digits", "--budget", "10%", *QUICK, *FEW, "-o", "recipes/tuned.toml")
    assert outcome.code == 0, outcome.err
    assert "40 images to calibrate on are few" in outcome.err
    facts, sensitivity, fixed, front = outcome.out.split("\n\n")
    assert (
        facts.startswith("a plan for vmamba_digits\n")
        and "× by flops" in facts
        and "a guided search" in facts
    )
    assert "40 images of digits, held_out, 40 of 450" in facts and "digits, training, 40 of 1347" in facts
    assert len(sensitivity.splitlines()) == 3 + 8 and len(fixed.splitlines()) == 3 + 6
    assert len(front.splitlines()) > 5
    values = json.loads((workplace / "recipes" / "tuned.json").read_text())
    outcome = call("compile", "recipes/tuned.toml", "--out", "bundle", "--quiet")
    assert outcome.code == 0, outcome.err
    blocks = load_bundle(workplace / "bundle").manifest["blocks"]
    assert [block["index"] for block in blocks if block["pruned"]] == values["chosen"]["blocks"]
    # Its accuracy is the one that was stated, in ONNX Runtime too.
    held_out = call("eval", "bundle", "--limit", "40", "--json").json
    assert held_out["top1"] == pytest.approx(values["chosen"]["verification"]["accuracy"])
    # Again, with another goal, from what was tried: the recipe is replaced only where that is asked for.
    again = ("tune", "vmamba_digits", "--speedup", "1.02", *QUICK, *FEW, "-o", "recipes/tuned.toml")
    assert "exists already" in call(*again).err
    outcome = call(*again, "--force", "--json")
    assert outcome.json["chosen"]["speed"] >= 1.02 and outcome.json["recipe"] == "recipes/tuned.toml"


def test_images_without_labels_and_a_recipe(workplace: Path) -> None:
    digit_folders(workplace / "data", ["digits"] * 10, per_class=4)
    (workplace / "k3.toml").write_text(
        '[model]\nname = "vmamba_digits"\n[quartermap]\nevery = 3\nstride = 3\n'
    )
    outcome = call(
        *(
            "tune",
            "k3.toml",
            "--data",
            "data",
            "--format",
            "images",
            "--budget",
            "0.3",
            "--exclude-stages",
            "1,2,3",
        ),
        *("--measure", "tokens", "--stride", "2", "-o", "tuned.toml"),
    )
    assert outcome.code == 0, outcome.err
    assert "accuracy" not in outcome.out.split("\n\n")[0] and "all sets" in outcome.out
    assert "every" not in (workplace / "tuned.toml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "1", "-o", "a.toml"), "'1' is not between 0 and 1; for 1 in a hundred write 1%"),
        (("--budget", "much", "-o", "a.toml"), "no share such as 0.01 or 1%"),
        (("--budget", "-1%", "-o", "a.toml"), "'-1%' is not between 0 and 1"),
        (("--budget", "-0.5%", "-o", "a.toml"), "'-0.5%' is not between 0 and 1"),
        (("--budget", "1%", "-o", "."), "expected one that ends in .toml"),
        (("--budget", "1%", "-o", "there.toml/a/b.toml"), "there.toml is no folder that you may write to"),
        (
            ("--budget", "1%", "-o", "new/a.toml", "--stride", "2,17"),
            "a stride of 17 is more than the 16 positions",
        ),
        (
            ("--budget", "1%", "-o", "a.toml", "--stride", "5", "--exclude-stages", "1,2"),
            "more than the 4 positions",
        ),
        (("--speedup", "0.9", "-o", "a.toml"), "no speed above 1"),
        (("--budget", "1%", "--speedup", "2", "-o", "a.toml"), "not allowed with argument"),
        (("-o", "a.toml"), "one of the arguments --budget --speedup is required"),
        (("--budget", "1%"), "the following arguments are required: -o/--out"),
        (("--budget", "1%", "-o", "a.json"), "expected one that ends in .toml"),
        (("--budget", "1%", "-o", "there.toml"), "there.toml exists already"),
        (("--budget", "1%", "-o", "a.toml", "--stride", "1"), "numbers of at least 2"),
        (("--budget", "1%", "-o", "a.toml", "--target", "torc"), "Did you mean torch?"),
        (("--budget", "1%", "-o", "a.toml", "--data", "absent"), "there is no such folder"),
        (("--budget", "1%", "-o", "a.toml", "--data", "set.npz"), "has no part 'val'; it has train, test"),
        (
            ("--budget", "1%", "-o", "a.toml", "--data", "three"),
            "three, 3 of 6 has 3 classes, but the model has 10",
        ),
        (
            ("--budget", "1%", "-o", "a.toml", "--data", "three", "--format", "images", "--labels"),
            "has no labels; leave --labels out",
        ),
        (("--budget", "1%", "-o", "a.toml", "--checkpoint", "absent.pth"), "absent.pth"),
    ],
)
def test_what_is_wrong_is_said(
    workplace: Path, refused: Refuse, arguments: tuple[str, ...], message: str
) -> None:
    (workplace / "there.toml").touch()
    medmnist_file(workplace / "set.npz", parts=("train", "test"))
    digit_folders(workplace / "three", {0: "a", 1: "b", 2: "c"})
    assert message in refused("tune", "vmamba_digits", *arguments)
    assert not (workplace / "new").exists()


def test_a_goal_that_cannot_be_met_ends_with_2_and_keeps_what_was_tried(workplace: Path) -> None:
    outcome = call("tune", "vmamba_digits", "--speedup", "3", *QUICK, *FEW, "-o", "tuned.toml", "--quiet")
    assert outcome.code == 2 and outcome.out == ""
    (message,) = outcome.err.splitlines()
    assert message.startswith("quartermap: error: a speed of 3 times cannot be reached: the fastest plan")
    assert message.endswith("All that was tried is in tuned.json")
    assert json.loads((workplace / "tuned.json").read_text())["front"]
    assert [path.name for path in workplace.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize("where", ["the images", "the plans"])
def test_an_interruption_says_whether_something_is_kept(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    command = ("tune", "vmamba_digits", "--budget", "10%", *QUICK, *FEW, "-o", "new/tuned.toml")
    run, runs = Trial.run, []

    def interrupted(self: Trial, candidates: Any) -> Any:
        runs.append(1)
        if len(runs) > 1:
            raise KeyboardInterrupt
        return run(self, candidates)

    def at_once(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    if where == "the images":
        monkeypatch.setattr(Trial, "__init__", at_once)
    else:
        monkeypatch.setattr(Trial, "run", interrupted)
    outcome = call(*command)
    (said,) = [line for line in outcome.err.splitlines() if "tuned.json" in line]
    assert outcome.code == 130 and not (workplace / "new" / "tuned.toml").exists()
    if where == "the images":
        assert "nothing was measured yet that could be kept in new/tuned.json" in said
        assert not (workplace / "new").exists()
    else:
        assert "what was measured so far is kept in new/tuned.json" in said
        assert json.loads((workplace / "new" / "tuned.json").read_text())["tried"]


@pytest.mark.parametrize("command", ["tune", "compare", "ablate"])
def test_a_bundle_is_named_with_its_model(workplace: Path, refused: Refuse, command: str) -> None:
    assert call("compile", "vmamba_digits", "--out", "bundles/digits", "--quiet").code == 0
    goal = ("--budget", "1%", "-o", "a.toml") if command == "tune" else ()
    message = refused(command, "bundles/digits", *goal)
    assert "bundles/digits is a bundle" in message and message.endswith(
        "give its model or recipe: vmamba_digits"
    )


def test_help_says_which_parts_are_taken() -> None:
    text = " ".join(call("tune", "--help").out.split())
    assert (
        "part of the data to calibrate on:" in text and "training of the digits (default: training)" in text
    )
    assert "test of MedMNIST (default: val)" in text and "images is a folder of images without labels" in text
    text = " ".join(call("eval", "--help").out.split())
    assert "training of the digits (default: held_out)" in text and "images is a folder" not in text


def options(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(["tune", "vmamba_digits", "--budget", "1%", "-o", "a.toml", *arguments])


def parts(*arguments: str) -> tuple[Dataset, Dataset]:
    return image_sets(options(*arguments))


def test_parts_to_calibrate_and_to_verify_on(tmp_path: Path) -> None:
    one, other = parts()
    assert (one.name, len(one), other.name, len(other)) == (
        "digits, training, 256 of 1347",
        256,
        "digits, held_out",
        450,
    )
    one, other = parts("--split", "held_out", "--calibration", "100", "--verification", "50")
    assert (len(one), len(other)) == (100, 50) and one.name.startswith(other.name.split(",")[0])
    names = [{part.item_name(index) for index in range(len(part))} for part in (one, other)]
    assert not names[0] & names[1]
    path = medmnist_file(tmp_path / "a.npz")
    one, other = parts("--data", str(path))
    assert (one.name, other.name) == ("a, val", "a, test")
    one, other = parts("--data", str(path), "--split", "train")
    assert (one.name, other.name) == ("a, train, 10 of 20",) * 2
    one, other = parts("--data", str(path), "--split", "train", "--verify-split", "test")
    assert (one.name, other.name) == ("a, train", "a, test")
    assert parts("--seed", "1")[0].fingerprint != parts("--seed", "2")[0].fingerprint


def test_shares_and_speeds() -> None:
    assert share("1%") == 0.01 == share("0.01") and share("0") == 0 and factor("1.25") == 1.25
    for text in ("100%", "-1%", "nan", "%", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError):
            share(text)
    for text in ("1", "inf", "nan", "x"):
        with pytest.raises(argparse.ArgumentTypeError):
            factor(text)
