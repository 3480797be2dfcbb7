"""`quartermap ablate`: its groups, results that are kept, plots, and bad input."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from evaluation_data import digit_folders
from measuring import MODEL, Outcome, call, full_disk, refused
from PIL import Image

from quartermap_deploy.errors import InputError, UnknownNameError
from quartermap_deploy.evaluation import ablate as ablating
from quartermap_deploy.evaluation.ablate import GROUPS, AblateOptions, ablate, ablations
from quartermap_deploy.evaluation.ablation_plots import write_plots
from quartermap_deploy.evaluation.workbench import Workbench
from quartermap_deploy.pruning import QuarterMap
from quartermap_deploy.recipe import Recipe

pytestmark = pytest.mark.usefixtures("natively")

DEPTHS = (2, 2, 4, 2)
QUICK = ("--repeats", 1, "--threads", 1, "--limit", 20)
TORCH = ("ablate", MODEL, "--target", "torch", *QUICK)


@pytest.fixture(scope="module")
def ablated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """All groups in ONNX Runtime, and what the command printed; tests must not change the files."""
    path = tmp_path_factory.mktemp("ablated") / "digits.json"
    outcome = call("ablate", MODEL, *QUICK, "--json", "-o", path)
    assert outcome.code == 0, outcome.err
    return path, outcome


class TestGroups:
    def test_every(self) -> None:
        found = ablations("every", QuarterMap(), DEPTHS)
        assert [entry.setting for entry in found] == ["1", "2", "3", "4", "5", "6"]
        assert [entry.variant.plan.every for entry in found if entry.variant.plan] == [1, 2, 3, 4, 5, 6]

    def test_each_stage_alone(self) -> None:
        blocks = [entry.variant.blocks(DEPTHS) for entry in ablations("stage", QuarterMap(), DEPTHS)]
        assert blocks == [(1, 2), (3, 4), (5, 6, 7, 8), (9, 10)]

    def test_stride_and_keep(self) -> None:
        plans = [entry.variant.plan for entry in ablations("stride", QuarterMap(every=2), DEPTHS)]
        assert [(plan.stride, plan.keep) for plan in plans if plan] == list(ablating.STRIDES)
        assert {plan.every for plan in plans if plan} == {2}

    def test_upsampling_and_forms(self) -> None:
        assert [entry.setting for entry in ablations("upsample", QuarterMap(), DEPTHS)] == [
            "nearest",
            "bilinear",
            "bicubic",
        ]
        forms = [entry.variant.form for entry in ablations("form", QuarterMap(), DEPTHS)]
        assert forms == ["canonical", "hoisted", "sunk", "hoisted and sunk"]

    def test_the_base_gives_what_is_not_varied(self) -> None:
        base = QuarterMap(blocks=(5,), stride=3, upsample="bilinear")
        for name in ("stride", "upsample", "form"):
            assert {entry.variant.blocks(DEPTHS) for entry in ablations(name, base, DEPTHS)} == {(5,)}
        assert {
            entry.variant.plan.stride for entry in ablations("every", base, DEPTHS) if entry.variant.plan
        } == {3}


class TestResults:
    def test_all_groups(self, ablated: tuple[Path, Outcome]) -> None:
        values = ablated[1].json
        assert values == json.loads(ablated[0].read_text())
        assert values["command"] == "ablate" and values["complete"] and not values["skipped"]
        assert [group["name"] for group in values["groups"]] == list(GROUPS)
        assert [len(group["variants"]) for group in values["groups"]] == [7, 5, 7, 4, 5]
        for group in values["groups"]:
            first, *others = group["variants"]
            assert first["name"] == "unpruned" and first["speed"] == first["time_ratio"] == 1
            for entry in others:
                assert entry["parity"]["relative_error"] < 1e-5
                assert entry["tokens"] < first["tokens"] and entry["flops"] < first["flops"]
                assert entry["time_ratio"] == pytest.approx(1 / entry["speed"])
                assert 0 <= entry["accuracy"]["top1"] <= 1

    def test_fewer_blocks_mean_more_tokens(self, ablated: tuple[Path, Outcome]) -> None:
        tokens = [entry["tokens"] for entry in ablated[1].json["groups"][0]["variants"]]
        assert tokens[1] == min(tokens) and tokens[0] == max(tokens)

    def test_one_plan_has_one_accuracy(self, ablated: tuple[Path, Outcome]) -> None:
        groups = {group["name"]: group["variants"] for group in ablated[1].json["groups"]}
        three = next(entry for entry in groups["every"] if entry["name"] == "k = 3")["accuracy"]
        for name, setting in (("stride", "2, keep 1"), ("upsample", "nearest"), ("form", "canonical")):
            assert next(entry for entry in groups[name] if entry["setting"] == setting)["accuracy"] == three

    def test_table_and_plots(self, ablated: tuple[Path, Outcome]) -> None:
        path = ablated[0]
        rows = list(csv.DictReader(path.with_suffix(".csv").open()))
        assert len(rows) == 7 + 5 + 7 + 4 + 5
        assert {row["group"] for row in rows} == set(GROUPS)
        expected = {f"digits_{name}.{end}" for name in (*GROUPS, "together") for end in ("png", "svg")}
        assert {file.name for file in path.parent.iterdir()} == {"digits.json", "digits.csv", *expected}
        for name in sorted(expected):
            if name.endswith("png"):
                with Image.open(path.with_name(name)) as picture:
                    assert min(picture.size) > 200
                    assert len(picture.convert("L").getcolors() or ()) > 10
            else:
                text = " ".join(ElementTree.parse(path.with_name(name)).getroot().itertext())
                assert "speed, relative to unpruned" in text

    def test_plots_are_the_same_every_time(self, ablated: tuple[Path, Outcome], tmp_path: Path) -> None:
        written = write_plots(ablated[1].json, tmp_path / "digits.json")
        assert len(written) == 12
        for path in written:
            assert path.read_bytes() == ablated[0].with_name(path.name).read_bytes()

    def test_the_same_command_answers_at_once(
        self, ablated: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Workbench, "prepare", lambda self: pytest.fail("nothing is left to measure"))
        outcome = call("ablate", MODEL, *QUICK, "-o", ablated[0], "--no-plots")
        assert outcome.code == 0, outcome.err
        for text in ("every k-th block", "bicubic", "hoisted and sunk", "stage 4", "20 of 450"):
            assert text in outcome.out


class TestGoingOn:
    def test_interrupted_between_groups(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "results.json"
        time = Workbench.time

        def interrupted(self: Workbench, *rest: Any) -> Any:
            if any(variant.name == "stage 1" for variant in self.variants):
                raise KeyboardInterrupt
            return time(self, *rest)

        command = (*TORCH, "--groups", "upsample,stage", "--no-plots", "-o", path)
        with monkeypatch.context() as planted:
            planted.setattr(Workbench, "time", interrupted)
            outcome = call(*TORCH, "--groups", "every,stage", "--no-plots", "-o", path)
        assert outcome.code == 130 and "kept in" in outcome.err
        partial = json.loads(path.read_text())
        assert [group["name"] for group in partial["groups"]] == ["every"] and not partial["complete"]
        assert len(list(csv.DictReader(path.with_suffix(".csv").open()))) == 7

        outcome = call(*command)
        assert outcome.code == 0, outcome.err
        values = json.loads(path.read_text())
        assert [group["name"] for group in values["groups"]] == ["every", "stage", "upsample"]
        assert values["groups"][0] == partial["groups"][0]

    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "new" / "results.json"
        full_disk(monkeypatch, after=4)
        outcome = call(*TORCH, "--groups", "upsample,stage", "--no-plots", "--json", "-o", path)
        assert outcome.code == 2
        assert any("No space left on device" in text for text in outcome.messages)
        assert [group["name"] for group in outcome.json["groups"]] == ["stage", "upsample"]
        kept = json.loads(path.read_text())
        assert [group["name"] for group in kept["groups"]] == ["stage"] and not kept["complete"]
        assert sorted(file.name for file in path.parent.iterdir()) == ["results.csv", "results.json"]

    def test_folders_go_again_where_nothing_could_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full_disk(monkeypatch, after=0)
        text = refused(*TORCH, "--no-plots", "--quiet", "-o", tmp_path / "new" / "er" / "results.json")
        assert "No space left on device" in text and not list(tmp_path.iterdir())

    def test_a_folder_is_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "results.json").mkdir()
        text = refused(*TORCH, "--force", "-o", tmp_path / "results.json")
        assert "results.json is a folder; name a file" in text


class TestLeftOut:
    def test_forms_in_pytorch_and_plans_that_prune_nothing(self, tmp_path: Path) -> None:
        recipe = tmp_path / "late.toml"
        # Blocks 9 and 10 alone may be pruned, so that k = 4 and k = 6 prune nothing.
        recipe.write_text(f'[model]\nname = "{MODEL}"\n[quartermap]\nexclude_stages = [1, 2, 3]\n')
        outcome = call(
            "ablate", recipe, "--target", "torch", *QUICK, "--limit", 4, "--groups", "every,form", "--json"
        )
        assert outcome.code == 0, outcome.err
        values = outcome.json
        assert [group["name"] for group in values["groups"]] == ["every"]
        names = [entry["name"] for entry in values["groups"][0]["variants"]]
        assert names == ["unpruned", "k = 1", "k = 2", "k = 3", "k = 5"]
        skipped = {(entry["group"], entry["name"]): entry["reason"] for entry in values["skipped"]}
        assert "prunes nothing" in skipped["every", "k = 4"] and "prunes nothing" in skipped["every", "k = 6"]
        assert "form of the graph" in skipped["form", "sunk"]
        assert sum("is left out" in text for text in outcome.messages) == len(skipped) == 6


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["vmamba_digit"], "Did you mean vmamba_digits"),
            ([MODEL, "--groups", "evry"], "Did you mean every"),
            ([MODEL, "--groups", ""], "no list of names"),
            ([MODEL, "--every", "none"], "no whole number"),
            ([MODEL, "--batch", "0"], "no whole number"),
            ([MODEL, "--format", "imagefolder"], "needs a path"),
            ([MODEL, "--split", "val"], "unknown part of the digits"),
            ([MODEL, "-o", "results"], "ending in .json"),
            ([MODEL, "-o", "."], "ending in .json"),
            ([MODEL, "-o", "/dev/null/new/results.json"], "/dev/null is no folder that you may write to"),
        ],
    )
    def test_is_said_in_one_message(
        self, arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert expected in refused("ablate", *arguments)
        assert not list(tmp_path.iterdir())

    def test_no_images(self, tmp_path: Path) -> None:
        (tmp_path / "data" / "cat").mkdir(parents=True)
        assert "data" in refused("ablate", MODEL, "--data", tmp_path / "data")

    def test_other_classes_than_the_model(self, tmp_path: Path) -> None:
        folder = digit_folders(tmp_path / "data", ["cat", "dog", "owl"])
        assert "3 classes, but the model has 10" in refused("ablate", MODEL, "--data", folder)

    def test_without_matplotlib(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        text = refused(*TORCH, "-o", tmp_path / "results.json")
        assert "pip install 'quartermap-deploy[report]'" in text and "--no-plots" in text
        assert not list(tmp_path.iterdir())

    def test_options_are_checked(self) -> None:
        with pytest.raises(UnknownNameError):
            AblateOptions(groups=("depth",))
        with pytest.raises(InputError):
            AblateOptions(batch=0)

    def test_help(self) -> None:
        outcome = call("ablate", "--help")
        assert outcome.code == 0
        for option in ("--groups", "--every", "--no-plots", "--data", "--json", "-o"):
            assert option in outcome.out


def test_as_a_library() -> None:
    results = ablate(Recipe(MODEL), AblateOptions(groups=("upsample",), target="torch", repeats=1))
    (group,) = results.values["groups"]
    assert [entry["accuracy"] for entry in group["variants"]] == [None] * 4
    assert results.values["every"] == 3
