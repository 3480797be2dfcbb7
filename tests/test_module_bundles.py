"""What measures and shows bundles, on bundles of modules that are not ours: several inputs, no images, no card."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_bundles
from measuring import Outcome, call, refused
from toy_modules import Classifier

from quartermap_deploy.bundle import load_bundle
from quartermap_deploy.cli.bench import golden_batch
from quartermap_deploy.data.digits import load_digits
from quartermap_deploy.data.images import prepare
from quartermap_deploy.errors import BundleError, CheckpointError, InputError, RecipeError
from quartermap_deploy.evaluation.ablate import ablate
from quartermap_deploy.evaluation.compare import compare
from quartermap_deploy.evaluation.formats import open_dataset
from quartermap_deploy.evaluation.search import Goal
from quartermap_deploy.evaluation.sessions import runner_for
from quartermap_deploy.evaluation.tune import divide, tune
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.report import write_report
from quartermap_deploy.report.blockmap import block_map
from quartermap_deploy.sources.factories import UserModule
from quartermap_deploy.tables.words import reference_text, weights_text

TOYS = Path(__file__).with_name("toy_modules.py")
FACTORY = f"{TOYS}:Classifier"
QUICK = ("--threads", 1, "--repeats", 1)


@pytest.fixture(scope="module")
def classifier() -> Path:
    return toy_bundles.classifier()


@pytest.fixture(scope="module")
def change() -> Path:
    return toy_bundles.change()


@pytest.fixture(scope="module")
def sequences() -> Path:
    return toy_bundles.sequences()


def copied(bundle: Path, folder: Path, alter: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a bundle whose manifest says something else."""
    copy = Path(shutil.copytree(bundle, folder / "altered"))
    manifest = json.loads((copy / "manifest.json").read_text())
    alter(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def done(*arguments: object) -> Outcome:
    outcome = call(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome


# eval -----------------------------------------------------------------------------------------------------------


def test_a_bundle_says_itself_what_eval_needs(classifier: Path) -> None:
    runner = runner_for(classifier)
    assert runner.preprocessing == toy_bundles.PREPROCESSING and runner.labels == toy_bundles.NAMES
    assert (runner.model, runner.num_classes, runner.weights, runner.trained) == (
        "Classifier",
        10,
        "given",
        True,
    )
    values = done("eval", classifier, "--limit", 20, "--json").json
    assert values["model"] == "Classifier" and values["overridden"] == []
    assert values["preprocessing"] == toy_bundles.PREPROCESSING.to_dict()
    # Digits are known by their index, so they get the names of the model's classes.
    assert set(values["per_class"]) <= set(toy_bundles.NAMES)
    images = prepare(list(load_digits().held_out.images[:4]), toy_bundles.PREPROCESSING)
    np.testing.assert_array_equal(runner.run(images), load_bundle(classifier).run(images))


def test_the_pytorch_model_is_made_by_a_named_factory_alone(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(None, "digits").sample(6)
    images = prepare([dataset.image(index) for index in range(6)], toy_bundles.PREPROCESSING)
    runner = runner_for(classifier, "torch", factory=FACTORY)
    expected = runner_for(classifier).run(images)
    np.testing.assert_allclose(runner.run(images), expected, atol=1e-4 * np.abs(expected).max())
    assert runner.plan is not None and runner.plan.blocks == (2,)
    # The plan counts: the unpruned module computes something else.
    with torch.no_grad():
        whole = Classifier().eval()(torch.from_numpy(images)).numpy()
    assert np.abs(whole - expected).max() > 1e-3 * np.abs(expected).max()
    with pytest.raises(BundleError, match="run only if you name it: --factory"):
        runner_for(classifier, "torch")
    with pytest.raises(BundleError, match="--factory is for the target torch alone"):
        runner_for(classifier, factory=FACTORY)
    # A factory that makes other weights is found out.
    monkeypatch.setattr(Classifier.__init__, "__defaults__", (10, 3, 2, 1))
    with pytest.raises(
        CheckpointError, match=r"does not compute the outputs that the bundle keeps .*a factory"
    ):
        runner_for(classifier, "torch", factory="toy_modules:Classifier")


def test_a_recipe_of_a_module_is_evaluated(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        f'[module]\nfactory = "{TOYS}:Classifier"\nexample = [2, 3, 32, 32]\n'
        "[preprocessing]\nmean = [0.5, 0.5, 0.5]\nstd = [0.25, 0.25, 0.25]\ncrop = [32, 32]\nfit = 'stretch'\n"
    )
    text = refused("eval", recipe, "--target", "torch", "--limit", 12)
    assert f"names code that would be run: {TOYS}:Classifier" in text and "--run-module" in text
    values = done("eval", recipe, "--target", "torch", "--limit", 12, "--json", "--run-module").json
    assert values["model"] == "Classifier" and values["images"] == 12 and values["weights"] == "new"
    assert values["overridden"] == []
    values = done(
        *("eval", recipe, "--target", "torch", "--limit", 2, "--json", "--run-module"),
        *("--preprocessing", "std=0.5,0.5,0.5", "--labels", "digits"),
    ).json
    assert values["overridden"] == ["labels", "std"] and values["preprocessing"]["std"] == [0.5] * 3
    for source in (FACTORY, "my_package.models:Net"):
        assert "write a recipe with it in [module]" in refused("eval", source)
    assert "a recipe names its factory itself" in refused("eval", recipe, "--factory", FACTORY, "--limit", 2)


def test_an_override_is_used_and_told_of(classifier: Path, tmp_path: Path) -> None:
    labels = tmp_path / "classes.txt"
    labels.write_text("".join(f"class {number}\n" for number in range(10)))
    command = (
        "eval",
        classifier,
        "--limit",
        30,
        "--labels",
        labels,
        "--preprocessing",
        "color=bgr",
        "mean=0,0,0.5",
    )
    values = done(*command, "--json").json
    assert values["overridden"] == ["labels", "mean", "color"]
    assert values["preprocessing"]["color"] == "bgr" and values["preprocessing"]["mean"] == [0, 0, 0.5]
    assert set(values["per_class"]) <= {f"class {number}" for number in range(10)}
    assert re.search(r"set otherwise +labels, mean, color", done(*command).out)
    digits = list(load_digits().held_out.images[:3])
    own, other = runner_for(classifier), runner_for(classifier, preprocessing={"mean": [0, 0, 0.5]})
    assert not np.array_equal(prepare(digits, own.preprocessing), prepare(digits, other.preprocessing))
    with pytest.raises(InputError, match=r"makes images of \(3, 16, 16\)"):
        runner_for(classifier, preprocessing={"crop": [16, 16]})
    with pytest.raises(InputError, match=r"makes images of \(1, 32, 32\)"):
        runner_for(classifier, preprocessing={"color": "grey", "mean": [0.5], "std": [0.5]})
    with pytest.raises(InputError, match="expected one for each of 10 classes"):
        runner_for(classifier, labels=["a", "b"])
    assert "expected NAME=VALUE" in refused("eval", classifier, "--preprocessing", "bgr")
    assert "Did you mean mean?" in refused("eval", classifier, "--preprocessing", "meen=1")


def test_a_bundle_without_a_preprocessing_gets_one_on_the_command_line(
    classifier: Path, tmp_path: Path
) -> None:
    bundle = copied(classifier, tmp_path, lambda manifest: manifest.update(preprocessing=None))
    text = refused("eval", bundle, "--limit", 4)
    assert "altered does not say how an image becomes its input images (batch, 3, 32, 32)" in text
    assert "--preprocessing mean=" in text
    with pytest.raises(InputError, match="has no std; give std"):
        runner_for(bundle, preprocessing={"mean": [0.5] * 3})
    given = {"mean": [0.5] * 3, "std": [0.25] * 3, "fit": "stretch"}
    runner = runner_for(bundle, preprocessing=given)
    assert runner.preprocessing == toy_bundles.PREPROCESSING and runner.overridden == ("fit", "mean", "std")


def test_what_is_no_classifier_of_images_is_refused(change: Path, sequences: Path) -> None:
    text = refused("eval", change)
    assert "of the task 'other', and accuracy is of classifiers" in text and "`quartermap bench`" in text
    text = refused("eval", sequences)
    assert "takes tokens (2, 20, 6), and accuracy is of models that take one batch of images" in text


def test_a_tampered_manifest_is_no_traceback(classifier: Path, tmp_path: Path) -> None:
    def alter(manifest: dict[str, Any]) -> None:
        manifest["preprocessing"]["scale"] = "large"

    bundle = copied(classifier, tmp_path, alter)
    for command in ("eval", "inspect"):
        assert "scale = 'large' is no positive number" in refused(command, bundle)


# compare, ablate and tune: models of cards alone ------------------------------------------------------------------


@pytest.mark.parametrize("command", [("compare",), ("ablate",), ("tune", "--budget", "1%", "-o", "x.toml")])
def test_modules_are_no_subject_of_comparisons(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Path("mine.toml")
    recipe.write_text(f'[module]\nfactory = "{TOYS}:Classifier"\nexample = [1, 3, 32, 32]\n')
    name, *options = command
    for source in (classifier, recipe, FACTORY, "my_package.models:Net"):
        text = refused(name, source, *options)
        assert "of models of cards (`quartermap models`)" in text
        assert "`quartermap bench` and `quartermap eval`" in text
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_libraries_refuse_them_too(tmp_path: Path) -> None:
    recipe = Recipe("mine", module=UserModule(FACTORY, {"images": (1, 3, 32, 32)}))
    data = divide(open_dataset(None, "digits"), 4, 4)
    calls: list[Callable[[], object]] = [
        lambda: compare(recipe),
        lambda: ablate(recipe),
        lambda: tune(recipe, Goal(budget=0.1), *data, tmp_path / "a.toml"),
    ]
    for measure in calls:
        with pytest.raises(RecipeError, match=r"mine is a module of yours \(.*toy_modules\.py:Classifier\)"):
            measure()
    assert not list(tmp_path.iterdir())


def test_backbones_are_no_subject_of_comparisons() -> None:
    with pytest.raises(RecipeError, match="leave features_only out"):
        compare(Recipe("vmamba_digits", features_only=True))


# bench ------------------------------------------------------------------------------------------------------------


def test_several_inputs_are_repeated_to_the_batch(change: Path) -> None:
    bundle = load_bundle(change)
    feeds = golden_batch(bundle, 5)
    assert {name: array.shape for name, array in feeds.items()} == {
        "first": (5, 3, 32, 48),
        "second": (5, 3, 32, 48),
    }
    np.testing.assert_array_equal(feeds["first"][0], feeds["first"][2])
    assert not np.array_equal(feeds["first"][0], feeds["second"][0])
    values = done("bench", change, "--batch", 3, *QUICK, "--json").json
    assert values["unit"] == "entries" and values["batch"] == 3
    (entry,) = values["bundles"]
    assert entry["images_per_second"] == pytest.approx(3e3 / entry["median_ms"])


def test_a_batch_that_is_fixed_is_told_of(sequences: Path) -> None:
    text = refused("bench", sequences, *QUICK)
    assert "takes 2 at a time" in text and "say --batch 2" in text
    assert "entries/s" in done("bench", sequences, "--batch", 2, *QUICK).out


def test_images_are_counted_where_all_bundles_take_them(classifier: Path, change: Path) -> None:
    assert "images/s" in done("bench", classifier, *QUICK).out
    assert "entries/s" in done("bench", classifier, change, *QUICK).out


# inspect, report and validate ---------------------------------------------------------------------------------------


def test_inspect_shows_everything_of_a_module(classifier: Path, change: Path, sequences: Path) -> None:
    out = done("inspect", classifier).out
    assert "classification, 10 classes: digit 0, digit 1, digit 2, digit 3 and 6 more" in out
    assert "rgb, resized to 32x32 (stretch, bilinear), times 1/255, mean 0.5, 0.5, 0.5, std 0.25" in out
    assert "that reading is proved against nothing else" in " ".join(out.split())
    assert re.search(r"2 +1 +8x8 +4x4 +yes .* mixers\.1\n", out)
    assert "row, column, row_reverse, column_reverse of 6×8×8" in out
    out = done("inspect", change).out
    assert "first (batch, 3, 32, 48), second (batch, 3, 32, 48)" in out
    assert "change (batch, 1, 8, 12), score (batch, 1)" in out
    assert "not said: it takes arrays alone" in out and "other" in out and "encoder" in out
    out = " ".join(done("inspect", sequences).out.split())
    assert "1x20" in out and "classification, 5 classes: without names" in out
    assert "given: the unpruned graph gives what was saved elsewhere, 1 output, worst error" in out
    assert "recover_2d block 1: left as it was, " in out


def test_size_rules_and_notes_are_shown(classifier: Path, tmp_path: Path) -> None:
    def alter(manifest: dict[str, Any]) -> None:
        manifest["size_rules"] = ["images[2] % 8 == 0"]
        manifest["model"].update(
            weights="checkpoint", weights_file="best.pth", notes=["'module.' was taken off"]
        )
        manifest["recipe"]["module"] = {"factory": "mine.nets:Net", "example": {"images": [1, 3, 32, 32]}}

    out = done("inspect", copied(classifier, tmp_path, alter)).out
    assert re.search(r"sizes +only with images\[2\] % 8 == 0\n", out)
    assert "from the checkpoint best.pth; 'module.' was taken off" in out
    assert "a module of the user's, made by mine.nets:Net" in out


def test_names_in_a_manifest_are_no_commands_of_a_terminal(classifier: Path, tmp_path: Path) -> None:
    def alter(manifest: dict[str, Any]) -> None:
        manifest["model"]["title"] = "\x1b[2Jcleared"
        manifest["labels"][0] = "\x1b]0;title\x07"

    out = done("inspect", copied(classifier, tmp_path, alter)).out
    assert "\x1b" not in out and "\\x1b[2Jcleared" in out and "\\x1b]0;title\\x07" in out


class Text(HTMLParser):
    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_data(self, data: str) -> None:
        self.found.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.found).split())


def test_a_report_of_modules(classifier: Path, change: Path, sequences: Path, tmp_path: Path) -> None:
    page = write_report([classifier, change, sequences], tmp_path / "report.html")
    words = Text(page).words
    for said in (
        "task classification, 10 classes: digit 0, digit 1, digit 2, digit 3 and 6 more",
        "input first (batch, 3, 32, 48)",
        "input second (batch, 3, 32, 48)",
        "output score (batch, 1)",
        "images not said: it takes arrays alone",
        "weights those that the module had",
        "1 block, sequences of 20",
        "2 blocks, maps of 8x8",
        "that reading is proved against nothing else",
        "given: the unpruned graph gives what was saved elsewhere",
        "recover_2d",
        "block_1/call_2/scan",
    ):
        assert said in words, said
    # Once in each of the two sections of pictures, whatever the number of bundles.
    assert words.count("these pictures are made inside the blocks of models of cards") == 2


def test_validate_makes_the_module_again(classifier: Path) -> None:
    assert done("validate", classifier, "--json").json["passed"]
    values = done("validate", classifier, "--reference", "torch", "--factory", FACTORY, "--json").json
    assert values["passed"]
    names = [output["name"] for output in values["cases"][0]["outputs"]]
    assert names == ["block_1/scan", "block_1", "block_2/scan", "block_2", "logits"]
    assert "--factory package.module:name" in refused("validate", classifier, "--reference", "torch")
    assert "need no factory" in refused("validate", classifier, "--factory", FACTORY)
    assert "--factory" in done("validate", "--help").out


def test_validate_names_the_module_that_departs(classifier: Path) -> None:
    other = f"{TOYS}:classifier_with_another_scan"
    outcome = call("validate", classifier, "--reference", "torch", "--factory", other)
    assert outcome.code == 2 and "FAILED" in outcome.out
    assert "departs from the torch reference: block 2 (mixers.1) is the first that departs" in outcome.err


# Pieces -----------------------------------------------------------------------------------------------------------


def test_sequences_and_maps_are_drawn_in_one_measure() -> None:
    def block(index: int, size: tuple[int, int], scanned: tuple[int, int] | None = None) -> dict[str, Any]:
        pruned = scanned is not None
        return {
            "index": index,
            "stage": index,
            "path": f"layers.{index}",
            "pruned": pruned,
            "map_size": size,
            "scanned_size": scanned or size,
            "tokens": 4,
            "tokens_unpruned": 16,
        }

    drawn = str(block_map([block(1, (14, 14), (7, 7)), block(2, (1, 196)), block(3, (1, 49))]))
    widths = re.findall(r'class="whole" x="[\d.]+" y="[\d.]+" width="([\d.]+)" height="([\d.]+)"', drawn)
    # A sequence of 196 positions is as long as a map of 14x14 is wide, and a strip.
    assert widths == [("60", "60"), ("60", "8"), ("42.43", "8")]
    assert "14x14 → 7x7" in drawn and "sequences of 196" in drawn and 'title="layers.2"' in drawn


def test_words_of_weights_and_references() -> None:
    model = {"weights": "given", "head": "loaded", "num_classes": None, "notes": [], "source": "module"}
    assert weights_text(model) == "those that the module had"
    card = {**model, "source": "card"}
    assert reference_text({"model": card}, {"given_reference": None}) is None
    text = reference_text({"model": model}, {"given_reference": None})
    assert text is not None and text.startswith("none was given: parity is with PyTorch on this machine")
