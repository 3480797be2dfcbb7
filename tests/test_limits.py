"""Numbers that a user gives have bounds, from one place, in every command and in the environment."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
from command_line import call

from quartermap_deploy.bundle import Bundle
from quartermap_deploy.cli.program import build_parser
from quartermap_deploy.errors import InputError
from quartermap_deploy.limits import LARGEST_BATCH, MOST_ROUNDS, MOST_THREADS, MOST_WORKERS
from quartermap_deploy.targets.onnxruntime.threads import default_threads, threads_wanted
from quartermap_deploy.targets.session import check_feeds
from quartermap_deploy.tensor_info import TensorInfo

BOUNDS = {
    "--threads": MOST_THREADS,
    "--batch": LARGEST_BATCH,
    "--eval-batch": LARGEST_BATCH,
    "--max-batch": LARGEST_BATCH,
    "--repeats": MOST_ROUNDS,
    "--workers": MOST_WORKERS,
    "--image-workers": MOST_WORKERS,
    "--instances": MOST_WORKERS,
}


def number_options() -> list[tuple[str, argparse.Action]]:
    """(command, option) of every command whose numbers have a bound."""
    found, parsers = [], [("", build_parser())]
    while parsers:
        name, parser = parsers.pop()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += [(f"{name} {key}".strip(), value) for key, value in action.choices.items()]
            elif BOUNDS.keys() & set(action.option_strings) and name != "compile":
                # There, --batch is smallest, usual and largest of an engine.
                found.append((name, action))
    return found


def test_numbers_have_the_same_bounds_in_every_command() -> None:
    options = number_options()
    assert len(options) >= 15
    for command, action in options:
        (name,) = BOUNDS.keys() & set(action.option_strings)
        read = action.type
        assert callable(read)
        assert read(str(BOUNDS[name])) == BOUNDS[name], command
        for text in (str(BOUNDS[name] + 1), "-1", "2.5", "x", "", "9" * 5000):
            with pytest.raises(argparse.ArgumentTypeError, match="is no whole number from"):
                read(text)


def test_too_many_threads_are_refused_in_one_line() -> None:
    """They took 8 GB, and no signal ended the command for minutes."""
    outcome = call("bench", "nowhere", "--threads", 100_000)
    assert outcome.code == 2
    assert "argument --threads: '100000' is no whole number from 1 to 1,024" in outcome.err


@pytest.mark.parametrize("option", ["--every", "--stride", "--keep", "--seed"])
def test_fractions_are_refused_in_our_words(option: str) -> None:
    outcome = call("compile", "vmamba_digits", option, "2.5")
    assert outcome.code == 2 and "invalid int value" not in outcome.err
    assert f"argument {option}: '2.5' is no whole number" in outcome.err


@pytest.mark.parametrize("text", ["0", "", "-1", "2.5", "x", "1025", "9" * 5000])
def test_threads_of_the_environment_have_the_same_bounds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTERMAP_THREADS", text)
    for asked in (threads_wanted, default_threads):
        with pytest.raises(InputError, match="expected a number of threads from 1 to 1024"):
            asked()
    monkeypatch.setenv("QUARTERMAP_THREADS", "3")
    assert (threads_wanted(), default_threads()) == (3, 3)


# Arrays that do not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (
            (2, 3, 32, 32),
            "the batch of this model is fixed at 1: run it 1 at a time, or compile it with dynamic_batch",
        ),
        ((1, 3, 0, 32), "its axis 2 is empty"),
        ((0, 3, 32, 32), "its axis 0 is empty"),
        (
            (1, 3, 32, 30),
            "resize images as the model's preprocessing says, or compile it with dynamic_size = true",
        ),
    ],
)
def test_arrays_of_another_shape_are_told_what_helps(shape: tuple[int, ...], said: str) -> None:
    info = TensorInfo("images", (1, 3, 32, 32), "float32")
    with pytest.raises(InputError) as found:
        check_feeds((info,), {"images": np.zeros(shape, dtype=np.float32)})
    assert said in str(found.value) and str(shape) in str(found.value)


def test_an_empty_side_of_an_open_size_is_told() -> None:
    info = TensorInfo("images", ("batch", 3, "height", "width"), "float32")
    with pytest.raises(InputError, match="its axis 2 is empty"):
        check_feeds((info,), {"images": np.zeros((1, 3, 0, 32), dtype=np.float32)})


def test_a_bundle_is_shown_without_its_manifest(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("b")
    assert repr(Bundle(folder, {"a": 1}, {"b": 2})) == f"Bundle(path={folder!r})"
