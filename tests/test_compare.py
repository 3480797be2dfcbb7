"""`quartermap compare`: variants, correctness before speed, results that are kept, and bad input."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_data import digit_folders
from helpers import digits, traced_digits
from measuring import MODEL, Outcome, call, digits_source, full_disk, refused

from quartermap_deploy.architectures import load_card
from quartermap_deploy.complexity import measure
from quartermap_deploy.errors import InputError, ParityError, RecipeError, UnknownNameError
from quartermap_deploy.evaluation import workbench
from quartermap_deploy.evaluation.compare import CompareOptions, _merged_otherwise, compare, variants_of
from quartermap_deploy.evaluation.formats import open_dataset
from quartermap_deploy.evaluation.runs import torch_run
from quartermap_deploy.evaluation.tome import merge_tokens
from quartermap_deploy.evaluation.variants import UNPRUNED, Builder, Variant
from quartermap_deploy.evaluation.workbench import Workbench
from quartermap_deploy.progress import SILENT
from quartermap_deploy.pruning import QuarterMap, prune
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.sources.source_model import Traced

pytestmark = pytest.mark.usefixtures("natively")

NAMES = ["unpruned", "QuarterMap k = 3", "QuarterMap k = 3, canonical", "ToMe k = 3"]
IMAGES = 40
QUICK = ("--batch", 2, "--every", 3, "--repeats", 2, "--threads", 1, "--limit", IMAGES)
TORCH = ("compare", MODEL, "--target", "torch", *QUICK[:6], "--limit", 10)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """Results of the command line in ONNX Runtime, and what it printed; tests must not change them."""
    path = tmp_path_factory.mktemp("compared") / "results.json"
    outcome = call("compare", MODEL, *QUICK, "--canonical", "--json", "-o", path)
    assert outcome.code == 0, outcome.err
    return path, outcome


class TestResults:
    def test_printed_and_written_are_the_same(self, compared: tuple[Path, Outcome]) -> None:
        path, outcome = compared
        values = outcome.json
        assert values == json.loads(path.read_text())
        assert values["command"] == "compare" and values["complete"]
        assert values["target"] == "onnxruntime" and values["device"] == "cpu" and values["threads"] == 1
        assert values["model"]["trained"] and not values["notes"] and not values["skipped"]
        assert values["data"]["images"] == IMAGES

    def test_every_variant_computes_what_pytorch_computes(self, compared: tuple[Path, Outcome]) -> None:
        variants = compared[1].json["variants"]
        assert [entry["name"] for entry in variants] == NAMES
        for entry in variants:
            assert 0 < entry["parity"]["relative_error"] < 1e-5
        assert [entry["method"] for entry in variants] == ["unpruned", "quartermap", "quartermap", "tome"]
        assert [entry["blocks"] for entry in variants] == [[], [3, 6, 9], [3, 6, 9], [3, 6, 9]]
        forms = [entry["form"] for entry in variants]
        assert forms == [None, "hoisted and sunk", "canonical", None]

    def test_tokens_and_flops(self, compared: tuple[Path, Outcome]) -> None:
        unpruned, pruned, canonical, merged = compared[1].json["variants"]
        assert unpruned["tokens"] > pruned["tokens"] == canonical["tokens"] == merged["tokens"]
        assert pruned["flops"] < merged["flops"] < unpruned["flops"]
        assert pruned["flops"] == measure(prune(digits()[0], QuarterMap()), (64, 64)).flops

    def test_accuracy_is_that_of_pytorch(self, compared: tuple[Path, Outcome]) -> None:
        dataset = open_dataset(None, "digits").sample(IMAGES)
        from quartermap_deploy.data.images import prepare

        images = prepare([dataset.image(i) for i in range(IMAGES)], load_card(MODEL).preprocessing)
        model = digits()[0]
        for entry, own in zip(
            compared[1].json["variants"],
            (model, *[prune(model, QuarterMap())] * 2, merge_tokens(model, QuarterMap())),
            strict=True,
        ):
            right = torch_run(own)(images).argmax(1) == dataset.labels
            assert entry["accuracy"]["top1"] == right.mean()
            assert entry["accuracy"]["images"] == IMAGES

    def test_times_and_their_parts(self, compared: tuple[Path, Outcome]) -> None:
        (timing,) = compared[1].json["timings"]
        assert timing["batch"] == 2
        assert [entry["name"] for entry in timing["variants"]] == NAMES
        by_name = {entry["name"]: entry for entry in timing["variants"]}
        for entry in timing["variants"]:
            assert entry["images_per_second"] == pytest.approx(2e3 / entry["median_ms"])
            low, high = entry["speed_quartiles"]
            assert low <= entry["speed"] <= high
            assert 0 < entry["scan_ms"] < entry["profiled_ms"] and 0 < entry["scan_share"] < 1
        assert by_name["unpruned"]["speed"] == 1
        assert by_name["unpruned"]["added_ms"] == 0
        assert by_name["QuarterMap k = 3, canonical"]["added_ms"] > 0
        # Matching and merging are dozens of operators, a Slice and a Resize two.
        assert by_name["ToMe k = 3"]["added_ms"] > by_name["QuarterMap k = 3, canonical"]["added_ms"]
        assert [entry["speed_to_tome"] is None for entry in timing["variants"]] == [True, False, False, True]

    def test_table_beside_the_results(self, compared: tuple[Path, Outcome]) -> None:
        rows = list(csv.DictReader(compared[0].with_suffix(".csv").open()))
        assert [row["variant"] for row in rows] == NAMES
        assert rows[1]["blocks"] == "3 6 9" and rows[0]["speed_to_tome"] == ""
        assert float(rows[0]["speed"]) == 1

    def test_the_same_command_answers_at_once(
        self, compared: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Workbench, "prepare", lambda self: pytest.fail("nothing is left to measure"))
        outcome = call("compare", MODEL, *QUICK, "--canonical", "-o", compared[0])
        assert outcome.code == 0, outcome.err
        assert "ToMe k = 3" in outcome.out and "held_out" in outcome.out
        assert "parity" in outcome.out

    def test_other_settings_do_not_replace_results(self, compared: tuple[Path, Outcome]) -> None:
        before = compared[0].read_bytes()
        text = refused("compare", MODEL, *QUICK, "--no-tome", "-o", compared[0])
        assert "other settings, model or data" in text and "--force" in text
        assert compared[0].read_bytes() == before


class TestTorch:
    def test_all_variants_and_their_parts(self) -> None:
        outcome = call(*TORCH, "--json", "--quiet")
        assert outcome.code == 0 and not outcome.messages, outcome.err
        values = outcome.json
        assert [entry["name"] for entry in values["variants"]] == [NAMES[0], NAMES[1], NAMES[3]]
        assert all(entry["form"] is entry["nodes"] is None for entry in values["variants"])
        for entry in values["timings"][0]["variants"]:
            assert 0 < entry["scan_ms"] < entry["profiled_ms"] and 0 < entry["scan_share"] < 1
            assert (entry["added_ms"] > 0) == (entry["name"] != "unpruned")

    def test_interrupted_it_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "results.json"
        accuracy = Workbench.accuracy

        def interrupted(self: Workbench, name: str, *rest: Any) -> Any:
            if name != "unpruned":
                raise KeyboardInterrupt
            return accuracy(self, name, *rest)

        with monkeypatch.context() as planted:
            planted.setattr(Workbench, "accuracy", interrupted)
            outcome = call(*TORCH, "-o", path)
        assert outcome.code == 130
        assert "kept in" in outcome.err
        partial = json.loads(path.read_text())
        assert not partial["complete"]
        assert [entry["accuracy"] is None for entry in partial["variants"]] == [False, True, True]

        monkeypatch.setattr(Workbench, "time", lambda *_: pytest.fail("the times are there"))
        outcome = call(*TORCH, "-o", path)
        assert outcome.code == 0, outcome.err
        values = json.loads(path.read_text())
        assert values["complete"] and all(entry["accuracy"] for entry in values["variants"])
        assert values["created"] == partial["created"]
        speeds = [[v["median_ms"] for v in entry["timings"][0]["variants"]] for entry in (partial, values)]
        assert speeds[0] == speeds[1]

    def test_batches_are_added(self, tmp_path: Path) -> None:
        path = tmp_path / "results.json"
        command = ("compare", MODEL, "--target", "torch", *QUICK[2:6], "--limit", 4, "-o", path)
        assert call(*command, "--batch", 3).code == 0
        (first,) = json.loads(path.read_text())["timings"]
        outcome = call(*command, "--batch", 1)
        assert outcome.code == 0, outcome.err
        timings = json.loads(path.read_text())["timings"]
        assert [entry["batch"] for entry in timings] == [1, 3]
        assert timings[1] == first
        assert "batch 1" in outcome.out and "batch 3" in outcome.out

    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "results.json"
        # The first results and, after the check and after the times, two more.
        full_disk(monkeypatch, after=6)
        outcome = call(*TORCH, "--json", "-o", path)
        assert outcome.code == 2
        (message,) = outcome.messages
        assert "No space left on device" in message and "goes on from it" in message
        assert all(entry["accuracy"] for entry in outcome.json["variants"])
        kept = json.loads(path.read_text())
        assert kept["timings"] and not kept["complete"]
        assert sorted(file.name for file in tmp_path.iterdir()) == ["results.csv", "results.json"]
        monkeypatch.undo()
        assert call(*TORCH, "-o", path).code == 0
        assert (
            json.loads(path.read_text())["timings"][0]["variants"][0]["median_ms"]
            == (kept["timings"][0]["variants"][0]["median_ms"])
        )

    def test_new_weights_and_no_data_are_said(self, tmp_path: Path) -> None:
        recipe = tmp_path / "small.toml"
        recipe.write_text(
            '[model]\nname = "medmamba_t"\n[quartermap]\nblocks = [3]\n[input]\nsize = [32, 32]\n'
        )
        outcome = call(
            "compare",
            recipe,
            "--target",
            "torch",
            "--every",
            3,
            "--batch",
            1,
            "--repeats",
            1,
            "--no-tome",
            "--json",
        )
        assert outcome.code == 0, outcome.err
        assert any("newly initialised weights" in text for text in outcome.messages)
        assert any("no accuracy was measured" in text for text in outcome.messages)
        values = outcome.json
        assert values["model"]["weights"] == "new" and values["data"] is None
        assert [entry["name"] for entry in values["variants"]] == [
            "unpruned",
            "QuarterMap k = 3",
            "QuarterMap, the recipe's blocks",
        ]
        assert values["variants"][2]["blocks"] == [3]
        assert all(entry["accuracy"] is None for entry in values["variants"])

    def test_broken_images_are_named(self, tmp_path: Path) -> None:
        folder = digit_folders(tmp_path / "data", [str(digit) for digit in range(10)], per_class=1)
        (folder / "4" / "4_0.png").write_bytes(b"no image")
        outcome = call(
            "compare", MODEL, "--target", "torch", *QUICK[:6], "--no-tome", "--data", folder, "--json"
        )
        assert outcome.code == 0, outcome.err
        assert "1 of 10 images" in outcome.err and "4_0.png" in outcome.err
        assert outcome.json["variants"][0]["accuracy"]["images"] == 9


class TestCorrectnessFirst:
    def test_a_variant_that_departs_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A planted fault: what should be pruned is the unpruned graph."""
        builder = Builder(Recipe(MODEL), digits_source())
        builder._traced = Traced(traced_digits(), ())
        graph = Builder.graph
        monkeypatch.setattr(Builder, "graph", lambda self, variant, progress: graph(self, UNPRUNED, progress))
        monkeypatch.setattr(workbench, "interleave", lambda *_, **__: pytest.fail("timed"))
        pruned = Variant("QuarterMap k = 3", "quartermap", QuarterMap())
        with Workbench(builder, [UNPRUNED, pruned], "onnxruntime", 1, SILENT) as bench:
            folder = Path(bench._folder.name)
            with pytest.raises(
                ParityError, match="QuarterMap k = 3 on onnxruntime departs from its PyTorch model"
            ):
                bench.prepare()
            assert bench.checked[0]["parity"]["relative_error"] < 1e-5
        assert not folder.exists()

    def test_tome_that_decides_otherwise_on_single_images_is_told_of(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Equal similarities are decided by rounding: planted for one image, then for half of them."""
        builder = Builder(Recipe(MODEL), digits_source())
        merged = Variant("ToMe k = 3", "tome", QuarterMap())
        with Workbench(builder, [merged], "onnxruntime", 1, SILENT) as bench:
            bench.prepare()
            parity = bench.checked[0]["parity"]
            assert (parity["images"], parity["otherwise"]) == (8, 0)
            run = bench._runs[merged.name]

            def other(count: int, value: float) -> None:
                def changed(images: Any) -> Any:
                    found = run(images)
                    found[:count] += value
                    return found

                bench._runs[merged.name] = changed

            other(1, 0.1)
            parity = bench._parity(merged, bench._runs[merged.name])
            assert parity is not None and parity["otherwise"] == 1 and parity["relative_error"] < 1e-5
            (note,) = _merged_otherwise({"name": merged.name, "parity": parity})
            assert "ToMe k = 3 merges other tokens than in PyTorch on 1 of 8 images" in note
            for count, value in ((4, 0.1), (8, 0.1), (1, np.nan)):
                other(count, value)
                with pytest.raises(ParityError, match="ToMe k = 3 on onnxruntime departs"):
                    bench._parity(merged, bench._runs[merged.name])

    def test_a_run_that_goes_on_says_it_once(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        parity = {"relative_error": 1e-7, "tolerance": 1e-4, "images": 8, "otherwise": 1}
        monkeypatch.setattr(Workbench, "_parity", lambda bench, variant, run: parity)
        for batches in ((1,), (1, 2)):
            options = CompareOptions(
                batches=batches, target="torch", tome=False, every=(3,), repeats=1, profile_repeats=0
            )
            results = compare(Recipe(MODEL), options, out=tmp_path / "results.json")
            said = [note for note in results.values["notes"] if "merges other tokens" in note]
            assert len(said) == len(results.values["variants"]) == 2


class TestVariants:
    def test_plans_that_prune_nothing_are_left_out_by_name(self) -> None:
        outcome = call(
            "compare",
            MODEL,
            "--target",
            "torch",
            "--every",
            99,
            3,
            "--batch",
            1,
            "--repeats",
            1,
            "--limit",
            2,
            "--json",
        )
        assert outcome.code == 0, outcome.err
        names = [entry["name"] for entry in outcome.json["skipped"]]
        assert names == ["QuarterMap k = 99", "ToMe k = 99"]
        assert all("prunes nothing" in entry["reason"] for entry in outcome.json["skipped"])
        assert sum("is left out" in text for text in outcome.messages) == 2

    def test_the_recipe_gives_what_is_not_varied(self) -> None:
        plan = QuarterMap(every=5, stride=3, keep=2, exclude_stages=(2,))
        found, skipped = variants_of(plan, (2, 2, 4, 2), CompareOptions(every=(2,)))
        assert not skipped
        assert [variant.plan for variant in found[1:]] == [dataclasses.replace(plan, every=2)] * 2

    def test_builder_refuses_what_is_not_compared(self) -> None:
        for recipe in (Recipe(MODEL, precision="float16"), Recipe(MODEL, dynamic_size=True)):
            with pytest.raises(RecipeError, match="compared in float32, at one size and in the usual form"):
                Builder(recipe, digits_source())

    def test_forms_of_the_graph(self) -> None:
        builder = Builder(Recipe(MODEL), digits_source())
        builder._traced = Traced(traced_digits(), ())
        operators = {}
        for form in ("canonical", "hoisted", "sunk", "hoisted and sunk"):
            graph = builder.graph(Variant(form, "quartermap", QuarterMap(), form)).graph
            operators[form] = [node.op_type for node in graph.node].count("Slice")
        assert operators == {"canonical": 3, "hoisted": 0, "sunk": 3, "hoisted and sunk": 0}


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["vmamba_digit"], "Did you mean vmamba_digits"),
            (["absent.toml"], "there is no recipe absent.toml"),
            ([MODEL, "--every", "0"], "no whole number of at least 1"),
            ([MODEL, "--every", "3", "3"], "expected different numbers"),
            ([MODEL, "--batch", "1", "1"], "expected different numbers"),
            ([MODEL, "--target", "tensorrt"], "unknown --target 'tensorrt'"),
            ([MODEL, "--target", "torch", "--canonical"], "canonical form is one of the graph"),
            ([MODEL, "--data", "absent"], "absent"),
            ([MODEL, "-o", "results.txt"], "ending in .json"),
            ([MODEL, "-o", "."], "ending in .json"),
            ([MODEL, "-o", "/dev/null/new/results.json"], "/dev/null is no folder that you may write to"),
            ([MODEL, "--data", ""], "the path is empty"),
            (["medmamba_t", "--limit", "5"], "add --data"),
        ],
    )
    def test_is_said_in_one_message(
        self, arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert expected in refused("compare", *arguments)
        assert not list(tmp_path.iterdir())

    def test_other_classes_than_the_model(self, tmp_path: Path) -> None:
        folder = digit_folders(tmp_path / "data", ["cat", "dog", "owl"])
        assert "3 classes, but the model has 10" in refused("compare", MODEL, "--data", folder)

    def test_a_part_that_the_file_lacks(self, tmp_path: Path) -> None:
        path = tmp_path / "set.npz"
        np.savez(path, train_images=np.zeros((2, 28, 28), np.uint8), train_labels=np.zeros((2, 1), np.uint8))
        assert "test" in refused("compare", MODEL, "--data", path, "--format", "medmnist")

    def test_what_is_in_the_way(self, tmp_path: Path) -> None:
        path = tmp_path / "notes.json"
        path.write_text("my notes")
        assert "something else than results" in refused(*TORCH, "-o", path)
        assert path.read_text() == "my notes"
        assert call(*TORCH, "--no-tome", "-o", path, "--force").code == 0
        assert json.loads(path.read_text())["complete"]

    def test_a_folder_that_is_not_there_is_made(self, tmp_path: Path) -> None:
        out = tmp_path / "absent" / "results.json"
        assert call(*TORCH, "-o", out, "--quiet").code == 0
        assert json.loads(out.read_text())["complete"]
        assert "cannot be written" in refused(*TORCH, "-o", out / "below" / "results.json")

    def test_options_are_checked(self) -> None:
        with pytest.raises(UnknownNameError, match="Did you mean torch"):
            CompareOptions(target="toch")
        for wrong in ({"every": ()}, {"repeats": 0}, {"profile_repeats": -1}, {"batches": (0,)}):
            with pytest.raises(InputError):
                CompareOptions(**wrong)  # type: ignore[arg-type]

    def test_help(self) -> None:
        outcome = call("compare", "--help")
        assert outcome.code == 0
        for option in ("--every", "--batch", "--no-tome", "--canonical", "--data", "--json", "-o"):
            assert option in outcome.out


def test_as_a_library() -> None:
    options = CompareOptions(
        every=(3,), batches=(1,), target="torch", tome=False, repeats=1, profile_repeats=0
    )
    results = compare(Recipe(MODEL), options)
    assert results.path is None
    (timing,) = results.values["timings"]
    assert [entry["scan_ms"] for entry in timing["variants"]] == [None, None]
