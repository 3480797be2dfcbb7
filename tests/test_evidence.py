"""The evidence: its page says what its results say, and nothing that they do not."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY
from quick_results import quick_results

from quartermap_deploy.errors import ReportError

pytestmark = pytest.mark.usefixtures("natively")

SCRIPTS = REPOSITORY / "benchmarks"
COMMITTED = REPOSITORY / "docs" / "evidence"

if not (SCRIPTS / "evidence.py").is_file():
    pytest.skip("the scripts of the evidence are only in the repository", allow_module_level=True)

Page = Callable[[Any], str]


def load(name: str) -> types.ModuleType:
    """Import a script."""
    specification = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> types.ModuleType:
    """The script that measures."""
    return load("evidence")


@pytest.fixture(scope="module")
def text(script: types.ModuleType) -> types.ModuleType:
    """The script that writes the page."""
    return load("evidence_page")


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Results of short measurements."""
    found = {name: json.loads(path.read_text()) for name, path in quick_results().items()}
    names = {entry["name"]: entry for entry in found["compare"]["variants"]}
    found["accuracy"] = [
        evaluation(found["compare"], names[name]) for name in ("unpruned", "QuarterMap k = 3")
    ]
    found["run"] = {
        **{name: found["compare"][name] for name in ("created", "machine", "versions")},
        "commands": [{"command": "quartermap compare vmamba_digits", "seconds": 125.4}],
    }
    found["speed"] = []
    return found


def evaluation(values: Any, variant: Any) -> dict[str, Any]:
    """What `quartermap eval` prints of a variant; `compare` holds the same accuracy."""
    about = {
        "model": "vmamba_digits",
        "source": "digits",
        "target": "torch",
        "weights": "included",
        "batch": 32,
    }
    return {**about, "plan": variant["plan"], "data": values["data"], **variant["accuracy"]}


@pytest.fixture
def results(measured: dict[str, Any]) -> dict[str, Any]:
    """A copy of the results, to be changed."""
    return copy.deepcopy(measured)


def timed(values: Any, name: str, batch: int = 0) -> Any:
    """The times of a variant."""
    return next(entry for entry in values["timings"][batch]["variants"] if entry["name"] == name)


def flat(page: str) -> str:
    """The page on one line, so that no line break is in the way."""
    return " ".join(page.split())


# The page ---------------------------------------------------------------------------------------------------------


def test_the_committed_page_is_made_of_the_committed_results(text: types.ModuleType) -> None:
    if not COMMITTED.is_dir():
        pytest.skip("nothing was measured yet: docs/evidence is not there")
    page = (REPOSITORY / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert page == text.page(text.read_results(COMMITTED))


def test_every_table_is_whole_and_lines_are_short(text: types.ModuleType, results: Any) -> None:
    page = text.page(results)
    tables = [block.splitlines() for block in re.split(r"\n{2,}", page) if block.startswith("|")]
    assert len(tables) >= 9
    for lines in tables:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(columns) == 1, lines
        assert re.fullmatch(r"(\| -+:? )+\|", lines[1])
    assert all(len(line) <= 120 for line in page.splitlines() if not line.startswith("|"))
    assert "\n\n\n" not in page and page.endswith("|\n")


def test_numbers_are_those_of_the_results(text: types.ModuleType, results: Any) -> None:
    timed(results["compare"], "QuarterMap k = 3")["speed"] = 1.2345
    results["accuracy"][1]["top1"] = 0.9123
    results["tune"]["chosen"]["speed"] = 1.777
    results["run"]["commands"][0]["seconds"] = 600.0
    page = flat(text.page(results))
    for found in (
        "1.23 × [",
        "91.23%",
        "1.777 times as fast",
        "in 10 minutes",
        results["run"]["machine"]["processor"],
    ):
        assert found in page


def test_published_numbers_stand_beside_ours(text: types.ModuleType, results: Any) -> None:
    page = flat(text.page(results))
    assert "| VMamba-B, paper | 128 | 590 | 654 | 1.11 × | – | 83.88 % | 83.02 % | 0.86 |" in page
    assert "ToMe falls to 0.72 of the unpruned model's speed in the paper" in page
    ours = results["compare"]
    rate = timed(ours, "unpruned", batch=-1)["images_per_second"]
    assert f"| {ours['model']['title']}, here | {ours['timings'][-1]['batch']} | {rate:,.1f} |" in page


def test_targets_that_disagree_are_told_of(text: types.ModuleType, results: Any) -> None:
    assert "Every plan has one accuracy, whatever it runs on." in flat(text.page(results))
    other = copy.deepcopy(results["accuracy"][1])
    other["top1"] -= 2 / other["images"]
    results["accuracy"].append(other)
    assert f"differ by 2 digits of {other['images']} at most (k = 3)" in flat(text.page(results))


@pytest.mark.parametrize(
    ("speed", "said"),
    [
        (0.5, "it falls further than in the paper"),
        (0.72, "it falls as in the paper, at least in part"),
        (0.9, "it falls less than in the paper"),
        (1.2, "it does not fall below the unpruned model, as it does in the paper"),
    ],
)
def test_what_is_said_of_tome_follows_its_speed(
    text: types.ModuleType, results: Any, speed: float, said: str
) -> None:
    for batch in (0, 1):
        timed(results["compare"], "ToMe k = 3", batch)["speed"] = speed
    assert said in flat(text.page(results))


def test_speeds_of_large_models_come_from_their_files(text: types.ModuleType, results: Any) -> None:
    assert "Not measured yet" in text.page(results)
    large = copy.deepcopy(results["compare"])
    large["model"].update(title="VMamba-B", weights="new")
    for batch in (0, 1):
        timed(large, "QuarterMap k = 3", batch).update(speed=1.3, speed_to_tome=1.5)
        for entry in large["timings"][batch]["variants"]:
            entry["scan_share"] = 0.25
    results["speed"] = [large]
    page = flat(text.page(results))
    assert "QuarterMap with k = 3 is faster than the unpruned model and than ToMe in every line." in page
    assert "The weights are newly initialised" in page and "the scans take 25% to 25%" in page
    timed(large, "QuarterMap k = 3", 1)["speed_to_tome"] = 0.99
    page = flat(text.page(results))
    assert "is not faster than both the unpruned model and ToMe for VMamba-B at batch 2." in page


def test_a_search_that_loses_is_told_of(text: types.ModuleType, results: Any) -> None:
    assert "For every k from 1 to 6 the search found a plan" in flat(text.page(results))
    entry = results["tune"]["fixed"][1]
    entry["tuned"]["verification"]["accuracy"] = entry["fixed"]["verification"]["accuracy"] - 0.01
    results["tune"]["fixed"][3]["tuned"]["speed"] = results["tune"]["fixed"][3]["fixed"]["speed"] - 0.01
    page = flat(text.page(results))
    assert "For every k" not in page
    assert "the accuracy of what was found is lower for k = 2." in page
    assert "what was found is slower by what its blocks save for k = 4." in page


def test_the_most_sensitive_stage_is_that_of_the_results(text: types.ModuleType, results: Any) -> None:
    group = next(group for group in results["ablate"]["groups"] if group["name"] == "stage")
    unpruned, *stages = group["variants"]
    unpruned["accuracy"]["top1"] = 0.9
    for entry, top1, speed in zip(stages, (0.5, 0.85, 0.8, 0.7), (1.4, 1.3, 1.2, 1.1), strict=True):
        entry["accuracy"]["top1"], entry["speed"] = top1, speed
    page = flat(text.page(results))
    assert "stage 2 alone costs the least (5.00 points), stage 1 alone the most (40.00)" in page
    assert "it is not the most sensitive one" not in page
    stages[0]["accuracy"]["top1"] = 0.89
    page = flat(text.page(results))
    assert "stage 1 alone costs the least (1.00 points), stage 4 alone the most (20.00)" in page
    assert "So its rule leaves out what would help most" in page


# Results ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(results: dict[str, Any], text: types.ModuleType, tmp_path: Path) -> Path:
    for name in text.RESULTS:
        (tmp_path / f"{name}.json").write_text(json.dumps(results[name]))
    return tmp_path


def test_results_are_read_and_checked(text: types.ModuleType, folder: Path) -> None:
    assert text.read_results(folder)["speed"] == []
    shutil.copy(folder / "compare.json", folder / "speed_tiny.json")
    assert len(text.read_results(folder)["speed"]) == 1
    values = json.loads((folder / "speed_tiny.json").read_text())
    (folder / "speed_tiny.json").write_text(json.dumps({**values, "complete": False}))
    with pytest.raises(ReportError, match=r"speed_tiny\.json are not complete"):
        text.read_results(folder)
    shutil.copy(folder / "tune.json", folder / "speed_tiny.json")
    with pytest.raises(ReportError, match="holds a result of tune; expected one of compare"):
        text.read_results(folder)
    (folder / "tune.json").unlink()
    with pytest.raises(ReportError, match="make evidence"):
        text.read_results(folder)


# Measuring --------------------------------------------------------------------------------------------------------


def test_every_command_is_one_that_the_command_line_takes(script: types.ModuleType) -> None:
    from quartermap_deploy.cli.program import build_parser

    for step in script.steps(3):
        options, unknown = build_parser().parse_known_args(step.arguments)
        assert unknown == [] and options.command == step.arguments[0]
    commands = [step.command for step in script.steps(3)]
    assert len(set(commands)) == len(commands) and len({step.result for step in script.steps(3)}) == len(
        commands
    )


def test_a_run_goes_on_where_it_was_interrupted(script: types.ModuleType, tmp_path: Path) -> None:
    steps = [
        script.Step("models.json", ("models", "--json"), printed=True),
        script.Step("absent.json", ("eval", "no_such_model", "--json", "--quiet"), printed=True),
    ]
    script.run(steps[0], tmp_path)
    assert script.complete(tmp_path / "models.json") and not script.complete(tmp_path / "absent.json")
    with pytest.raises(ReportError, match=r"`quartermap eval no_such_model .*` ended with exit code 2"):
        script.run(steps[1], tmp_path)
    assert not (tmp_path / "absent.json").exists()
    (tmp_path / "half.json").write_text('{"complete": false}')
    assert not script.complete(tmp_path / "half.json")


def test_results_are_collected_and_the_page_written(
    script: types.ModuleType, measured: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, folder = tmp_path / "work", tmp_path / "evidence"
    work.mkdir()
    steps = script.steps(2)
    (work / "seconds.json").write_text(json.dumps({step.command: 1.5 for step in steps}))
    for step in steps:
        if step.printed:
            (work / step.result).write_text(json.dumps(measured["accuracy"][0]))
    for name, source in (("compare", "compare"), ("ablate", "ablate"), ("tuned", "tune")):
        (work / f"{name}.json").write_text(json.dumps(measured[source]))
    script.collect(work, folder, 2)
    assert script.main(["--write", "--page", str(tmp_path / "evidence.md")]) == 0
    page = (tmp_path / "evidence.md").read_text(encoding="utf-8")
    assert page.count("| digits | torch | no pruning |") == 9
    assert f"| `{steps[-1].command}` | 2 |" in page
    (folder / "compare.json").unlink()
    assert script.main(["--write", "--page", str(tmp_path / "evidence.md")]) == 2
    assert "there are no results" in capsys.readouterr().err
    assert (tmp_path / "evidence.md").read_text(encoding="utf-8") == page
