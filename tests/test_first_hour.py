"""What a new user tries first: models by pattern, images to look at, completions, one spelling of options."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import call, refused, workplace

import quartermap_deploy as qm
from quartermap_deploy.cli.completion import SHELLS
from quartermap_deploy.cli.program import build_parser
from quartermap_deploy.errors import CheckpointError, InputError
from quartermap_deploy.evaluation.datasets import Dataset
from quartermap_deploy.evaluation.formats import open_dataset
from quartermap_deploy.evaluation.image_folder_writer import FOLDER, write_images

__all__ = ["refused", "workplace"]


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that does something, with its words."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield parser.prog, parser
    for action in inner:
        for command in action.choices.values():
            yield from commands(command)


PARSERS = dict(commands(build_parser()))


@pytest.mark.parametrize("name", PARSERS)
def test_options_are_spelled_the_same_everywhere(name: str) -> None:
    spelled = {
        option: set(action.option_strings)
        for action in PARSERS[name]._actions
        for option in action.option_strings
    }
    for short, long in (("-o", "--out"), ("-v", "--verbose"), ("-q", "--quiet")):
        for option in (short, long):
            assert spelled.get(option, {short, long}) == {short, long}
    assert not {"--output", "--batch-size", "--num-threads", "--repeat"} & set(spelled)
    if name != "quartermap completion":
        assert {"--json", "--verbose", "--help"} <= set(spelled)


def test_models_by_pattern() -> None:
    assert qm.list_models("vmamba_tiny*") == [
        name for name in qm.list_models() if name.startswith("vmamba_tiny")
    ]
    listed = [entry["name"] for entry in json.loads(call("models", "medmamba_?", "--json").out)]
    assert listed == ["medmamba_b", "medmamba_s", "medmamba_t"]
    outcome = call("models", "vmamba_huge*")
    assert (
        outcome.code == 2 and "no model fits vmamba_huge*" in outcome.err and "vmamba_digits" in outcome.err
    )


def test_no_range_stands_for_an_accuracy() -> None:
    lines = {line.split()[0]: line for line in call("models").out.splitlines() if line.strip()}
    assert lines["medmamba_t"].rstrip().endswith("of 6 sets")
    assert lines["vmamba_tiny_s1l8"].rstrip().endswith("82.6")


def test_pretrained_weights_are_insisted_on_or_refused() -> None:
    included = qm.create_model("vmamba_digits", pretrained=True).state_dict()
    new = qm.create_model("vmamba_digits", pretrained=False).state_dict()
    name = next(name for name, value in included.items() if value.ndim == 4)
    assert included[name].equal(qm.create_model("vmamba_digits").state_dict()[name])
    assert not included[name].equal(new[name])
    with pytest.raises(
        CheckpointError, match=r"no weights of medmamba_t come with this package; get .* from http"
    ):
        qm.create_model("medmamba_t", pretrained=True)
    with pytest.raises(InputError, match="contradict each other"):
        qm.create_model("vmamba_digits", pretrained=True, checkpoint="x.pth")


def test_images_are_written_and_read_again(workplace: Path) -> None:
    outcome = call("images", "-o", "images", "--limit", 40, "--json")
    assert outcome.code == 0
    written = json.loads(outcome.out)["images"]
    assert len(written) == 40 and all(Path("images", name).is_file() for name in written)
    before, after = open_dataset(None, "digits").sample(40), open_dataset(Path("images"), "imagefolder")
    by_class = np.argsort(before.labels, kind="stable")
    assert list(after.labels) == list(before.labels[by_class])
    for index, old in enumerate(by_class):
        with Image.open(after.image(index)) as image:
            assert np.array_equal(np.asarray(image.convert("L")), before.image(old))
    again = call("images", "-o", "images", "--limit", 1)
    assert again.code == 2 and "--force" in again.err
    assert call("images", "-o", "images", "--limit", 1, "--force", "-q").code == 0
    assert len(list(Path("images").rglob("*.png"))) == 1


def test_classes_whose_names_are_no_names_of_files_stay_apart(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 8), np.uint8)
    dataset = Dataset("x", ("a/b", "a:b", "..", "A_B"), np.arange(4), pixels, None, "0")
    files = write_images(dataset, tmp_path / "out").files
    assert len({name.split("/")[0].casefold() for name in files}) == 4
    assert all((tmp_path / "out" / name).is_file() for name in files)


def test_broken_images_are_named_and_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    dataset = Dataset("x", ("a",), np.zeros(1, np.int64), [tmp_path / "bad.png"], ["bad.png"], "0")
    with pytest.raises(InputError, match="none of the 1 images of x can be read"):
        write_images(dataset, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.png"]
    mixed = Dataset("x", (), np.full(2, -1), [tmp_path / "bad.png", np.zeros((8, 8), np.uint8)], None, "0")
    written = write_images(mixed, tmp_path / "out")
    assert written.files == ("images/1.png",) and written.broken[0][0] == "image 0"
    FOLDER.check_destination(tmp_path / "out", force=True)


@pytest.mark.parametrize("shell", SHELLS)
def test_completions_know_commands_and_options(shell: str, tmp_path: Path) -> None:
    script = call("completion", shell).out
    for word in ("compile", "validate", "native", "every", "require-signature"):
        assert word in script
    if shutil.which(shell) is None:
        assert shell != "bash"
        pytest.skip(f"no {shell} here: its completions were looked through, not run")
    path = tmp_path / "completion"
    path.write_text(script, encoding="utf-8")
    result = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    if shell == "bash":
        asked = f'source {path}; COMP_WORDS=(quartermap va); COMP_CWORD=1; _shtab_quartermap; echo "${{COMPREPLY[@]}}"'
        answer = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=60)
        assert answer.stdout.split() == ["validate"]


def test_verbose_shows_where_an_error_came_from(refused: object) -> None:
    short, long = call("models", "vmamba_huge"), call("models", "vmamba_huge", "-v")
    assert short.code == long.code == 2
    assert "Traceback" not in short.err and "Traceback" in long.err
    assert long.err.endswith(short.err)
