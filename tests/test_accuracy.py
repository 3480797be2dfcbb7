"""Counting what a model gets right: against a count by hand, stopped and gone on with, and with broken images."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_data import damaged, digit_folders
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from quartermap_deploy.architectures import create_model, load_card
from quartermap_deploy.bundle import Bundle, load_bundle
from quartermap_deploy.compiler import compile
from quartermap_deploy.data.digits import load_digits
from quartermap_deploy.data.images import prepare
from quartermap_deploy.errors import BundleError, CheckpointError, InputError, RecipeError, UnknownNameError
from quartermap_deploy.evaluation import accuracy as accuracy_module
from quartermap_deploy.evaluation import tally as tally_module
from quartermap_deploy.evaluation.accuracy import Accuracy, Run, evaluate, logits_of
from quartermap_deploy.evaluation.datasets import Dataset
from quartermap_deploy.evaluation.formats import open_dataset
from quartermap_deploy.evaluation.runs import session_run
from quartermap_deploy.evaluation.sessions import runner_for
from quartermap_deploy.evaluation.tally import Tally, ranks
from quartermap_deploy.pruning import QuarterMap, prune
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.targets import Session
from quartermap_deploy.tensor_info import TensorInfo

DIGITS = load_card("vmamba_digits").preprocessing
PLAN = QuarterMap(every=3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The digits model with every third block pruned."""
    return compile(Recipe("vmamba_digits", quartermap=PLAN), tmp_path_factory.mktemp("bundles") / "digits_k3")


def measured(accuracy: Accuracy) -> dict[str, Any]:
    """What of an accuracy does not depend on the clock."""
    times = ("seconds", "compute_seconds", "images_per_second")
    return {name: value for name, value in accuracy.to_dict().items() if name not in times}


def by_mean(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """A model of ten classes whose answers follow from the images, and are often wrong."""
    values = images.mean(axis=(2, 3))[:, :1] * np.float32(40)
    return -np.abs(values + np.arange(10, dtype=np.float32))


# Counting -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 1000))
def test_ranks_are_places_in_the_order_of_logits(images: int, classes: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    # Few different values, so that many are equal.
    logits = random.integers(0, 3, (images, classes)).astype(np.float32)
    labels = random.integers(0, classes, images)
    order = np.argsort(-logits, axis=1, kind="stable")
    expected = [int(np.flatnonzero(row == label)[0]) for row, label in zip(order, labels, strict=True)]
    assert ranks(logits, labels).tolist() == expected
    np.testing.assert_array_equal(ranks(logits, labels) == 0, logits.argmax(axis=1) == labels)


def test_accuracy_is_what_a_count_by_hand_gives() -> None:
    dataset = open_dataset(None, "digits")
    found = evaluate(by_mean, dataset, DIGITS, batch=32)
    logits = by_mean(prepare(list(load_digits().held_out.images), DIGITS))
    named = logits.argmax(axis=1)
    five = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    assert found.images == 450 and found.broken == () and found.not_finite == 0
    assert found.top1 == (named == dataset.labels).mean()
    assert found.top5 == (five == dataset.labels[:, None]).any(axis=1).mean()
    assert 0 < found.top1 < found.top5 < 1
    for digit in range(10):
        of_class = dataset.labels == digit
        assert found.per_class[str(digit)] == (int((named[of_class] == digit).sum()), 45)
    assert 0 < found.compute_seconds <= found.seconds
    assert found.images_per_second == pytest.approx(450 / found.seconds)


def test_the_batch_size_changes_nothing() -> None:
    dataset = open_dataset(None, "digits").sample(70)
    expected = measured(evaluate(by_mean, dataset, DIGITS, batch=70))
    assert measured(evaluate(by_mean, dataset, DIGITS, batch=32, workers=3)) == expected


def test_with_five_classes_there_is_no_top_5(tmp_path: Path) -> None:
    dataset = open_dataset(
        digit_folders(tmp_path, {digit: str(digit) * 2 + "x" for digit in range(5)}), "imagefolder"
    )
    found = evaluate(lambda images: by_mean(images)[:, :5], dataset, DIGITS)
    assert found.top5 is None and found.to_dict()["top5"] is None


def test_logits_that_are_no_numbers_are_wrong() -> None:
    dataset = open_dataset(None, "digits").sample(20)

    def failing(images: NDArray[np.float32]) -> NDArray[np.float32]:
        logits = np.zeros((len(images), 10), np.float32)
        # Right, but for the NaN beside it.
        logits[np.arange(len(images)), dataset.labels] = np.inf
        logits[::2, 3] = np.nan
        logits[1::2] = np.nan_to_num(logits[1::2], posinf=9.0)
        return logits

    found = evaluate(failing, dataset, DIGITS, batch=20)
    assert found.not_finite == 10 and found.top1 == 0.5 == found.top5


def test_models_and_data_that_do_not_fit() -> None:
    dataset = open_dataset(None, "digits").sample(5)
    with pytest.raises(InputError, match="has images of class 9, but the model has classes 0 to 3"):
        evaluate(lambda images: np.zeros((len(images), 4), np.float32), dataset, DIGITS)
    with pytest.raises(InputError, match="a row of logits for each image"):
        evaluate(lambda images: np.zeros((1, 10), np.float32), dataset, DIGITS)
    with pytest.raises(InputError, match="no image"):
        evaluate(by_mean, dataset.subset([]), DIGITS)


def test_folders_named_by_index_take_models_with_more_classes(tmp_path: Path) -> None:
    dataset = open_dataset(digit_folders(tmp_path, {3: "3", 8: "8"}), "imagefolder")
    found = evaluate(by_mean, dataset, DIGITS)
    logits = by_mean(prepare([dataset.image(index) for index in range(4)], DIGITS))
    assert found.top1 == (logits.argmax(axis=1) == [3, 3, 8, 8]).mean()
    assert set(found.per_class) == {"3", "8"}


def test_images_without_labels_have_no_accuracy(tmp_path: Path) -> None:
    dataset = open_dataset(digit_folders(tmp_path, {1: "a"}), "images")
    with pytest.raises(InputError, match="no labels"):
        evaluate(by_mean, dataset, DIGITS)
    assert logits_of(by_mean, dataset, DIGITS).shape == (2, 10)


# Broken images --------------------------------------------------------------------------------------------------


@pytest.fixture
def with_broken(tmp_path: Path) -> Dataset:
    folder = digit_folders(tmp_path / "data", [f"class {digit}" for digit in range(10)])
    for number, (name, data) in enumerate(damaged(tmp_path).items()):
        (folder / f"class {number}" / name).write_bytes(data)
    return open_dataset(folder, "imagefolder")


def test_broken_images_are_counted_and_named(with_broken: Dataset) -> None:
    whole = with_broken.subset([i for i in range(len(with_broken)) if "_" in with_broken.item_name(i)])
    assert len(with_broken) == 24 and len(whole) == 20
    for batch in (1, 5, 100):
        found = measured(evaluate(by_mean, with_broken, DIGITS, batch=batch))
        broken = found.pop("broken")
        assert {**measured(evaluate(by_mean, whole, DIGITS)), "broken": ...} == {**found, "broken": ...}
        assert [entry["image"].split("/")[1] for entry in broken] == [
            "empty.png",
            "cut.png",
            "text.jpg",
            "garbled.png",
        ]
        assert all("cannot be read" in entry["reason"] for entry in broken)


def test_a_set_of_broken_images_alone_is_refused(with_broken: Dataset) -> None:
    broken = with_broken.subset([i for i in range(len(with_broken)) if "_" not in with_broken.item_name(i)])
    for run in (evaluate, logits_of):
        with pytest.raises(InputError, match=r"can be read"):
            run(by_mean, broken, DIGITS)  # type: ignore[operator]


def test_the_logits_of_broken_images_are_not_numbers(with_broken: Dataset) -> None:
    logits = logits_of(by_mean, with_broken, DIGITS, batch=7)
    names = [with_broken.item_name(index) for index in range(len(with_broken))]
    broken = np.array(["_" not in name for name in names])
    assert np.isnan(logits[broken]).all() and np.isfinite(logits[~broken]).all()


# Stopped, and gone on with --------------------------------------------------------------------------------------


class Stop(Exception):
    """In the place of a power cut."""


def stopping(run: Run, after: int, error: BaseException) -> tuple[Run, list[int]]:
    """A model that fails after some calls, and the sizes of the batches that it was given."""
    sizes: list[int] = []

    def counted(images: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(sizes) == after:
            raise error
        sizes.append(len(images))
        return run(images)

    return counted, sizes


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_evaluation_goes_on_where_it_was(
    tmp_path: Path, with_broken: Dataset, after: int, error: BaseException
) -> None:
    state = tmp_path / "state.json"
    expected = measured(evaluate(by_mean, with_broken, DIGITS, batch=4))
    run, sizes = stopping(by_mean, after, error)
    with pytest.raises(type(error)):
        evaluate(run, with_broken, DIGITS, batch=4, checkpoint=state, identity="a")
    before = json.loads(state.read_text())
    assert before["position"] == 4 * after
    run, more = stopping(by_mean, 100, error)
    found = evaluate(run, with_broken, DIGITS, batch=4, checkpoint=state, identity="a")
    assert measured(found) == expected
    assert sum(sizes) + sum(more) == 20 and found.seconds > before["seconds"]
    # A finished one answers without running anything, the times included.
    run, more = stopping(by_mean, 0, Stop())
    assert evaluate(run, with_broken, DIGITS, batch=4, checkpoint=state, identity="a") == found
    assert list(tmp_path.glob(".state*")) == []


def test_the_state_is_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed leaves no chance to write anything."""
    monkeypatch.setattr(accuracy_module, "SAVE_AFTER", 0.0)
    state, seen = tmp_path / "state.json", []

    def looking(images: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(json.loads(state.read_text())["position"])
        return by_mean(images)

    evaluate(looking, open_dataset(None, "digits").sample(30), DIGITS, batch=10, checkpoint=state)
    assert seen == [0, 10, 20]


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "b"},
        {"batch": 8},
        {"dataset": open_dataset(None, "digits").sample(20, seed=1)},
        {"preprocessing": load_card("vmamba_digits").preprocessing.with_size(48, 48)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_state_of_another_evaluation_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    settings = {"dataset": open_dataset(None, "digits").sample(20), "preprocessing": DIGITS}
    state = tmp_path / "state.json"
    evaluate(by_mean, **settings, checkpoint=state, identity="a")  # type: ignore[arg-type]
    before = state.read_bytes()
    with pytest.raises(InputError, match="belongs to another evaluation"):
        evaluate(by_mean, **{**settings, "identity": "a", **change}, checkpoint=state)
    assert state.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 2, "key": "a"}', "\xff"])
def test_a_damaged_state_is_refused(tmp_path: Path, text: str) -> None:
    state = tmp_path / "state.json"
    state.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="delete it"):
        evaluate(by_mean, open_dataset(None, "digits").sample(3), DIGITS, checkpoint=state)


def test_a_state_that_cannot_be_written_is_found_out_at_once(tmp_path: Path) -> None:
    run, _ = stopping(by_mean, 0, Stop())
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written to .*file is no folder that you may write to"):
        evaluate(run, open_dataset(None, "digits"), DIGITS, checkpoint=tmp_path / "file" / "a" / "state.json")
    with pytest.raises(InputError, match=r"is a folder; name a file in it, such as .*state\.json$"):
        evaluate(run, open_dataset(None, "digits"), DIGITS, checkpoint=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_folders_of_a_state_are_made_and_go_where_it_does_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, state = open_dataset(None, "digits").sample(4), tmp_path / "a" / "b" / "state.json"
    with monkeypatch.context() as planted:
        planted.setattr(tally_module, "write_whole", full_disk)
        with pytest.raises(InputError, match="No space left"):
            evaluate(by_mean, dataset, DIGITS, checkpoint=state)
    assert not list(tmp_path.iterdir())
    evaluate(by_mean, dataset, DIGITS, checkpoint=state)
    assert json.loads(state.read_text())["position"] == 4


def full_disk(path: Path, data: bytes) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_disk_that_fills_up_loses_no_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy_module, "SAVE_AFTER", 0.0)
    state, write, writes = tmp_path / "state.json", Tally.save, []

    def full(tally: Tally, path: Path, key: str) -> None:
        writes.append(tally.position)
        if len(writes) > 2:
            raise OSError(28, "No space left on device", str(path))
        write(tally, path, key)

    monkeypatch.setattr(Tally, "save", full)
    dataset = open_dataset(None, "digits").sample(30)
    found = evaluate(by_mean, dataset, DIGITS, batch=10, checkpoint=state)
    monkeypatch.undo()
    assert measured(found) == measured(evaluate(by_mean, dataset, DIGITS, batch=10))
    # What was written last still leads to the same end.
    assert json.loads(state.read_text())["position"] == 10
    assert measured(evaluate(by_mean, dataset, DIGITS, batch=10, checkpoint=state)) == measured(found)


# Models on targets ----------------------------------------------------------------------------------------------


def torch_logits(images: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        return prune(create_model("vmamba_digits"), PLAN)(torch.from_numpy(images)).numpy()


def test_every_way_to_a_model_gives_the_same_answers(bundle: Bundle, tmp_path: Path) -> None:
    dataset = open_dataset(None, "digits").sample(12)
    recipe = tmp_path / "k3.toml"
    recipe.write_text(Recipe("vmamba_digits", quartermap=PLAN).to_toml(tmp_path))
    runners = [
        runner_for(bundle.path),
        runner_for(str(bundle.path), "onnxruntime"),
        runner_for(bundle, "torch"),
        runner_for(recipe),
        runner_for(recipe, "torch"),
    ]
    expected = torch_logits(prepare([dataset.image(index) for index in range(12)], DIGITS))
    for runner in runners:
        assert runner.preprocessing == DIGITS and runner.plan == PLAN and runner.num_classes == 10
        assert runner.trained and runner.weights == "included" and runner.model == "vmamba_digits"
        assert runner.labels == tuple("0123456789") and runner.overridden == ()
        found = logits_of(runner.run, dataset, runner.preprocessing, batch=5)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    names = [runner.name for runner in runners]
    assert names == ["digits_k3", "digits_k3", "digits_k3", "k3", "k3"]
    # The same model on the same target is the same; a target, a plan or other weights are not.
    assert runners[0].identity == runners[1].identity and runners[2].identity == runners[4].identity
    others = [
        runner_for("vmamba_digits", "torch"),
        runner_for(Recipe("vmamba_tiny_s1l8", num_classes=10), "torch"),
    ]
    assert len({runner.identity for runner in (runners[0], runners[2], runners[3], *others)}) == 5
    assert not others[1].trained


def test_a_model_of_one_image_at_a_time_takes_batches() -> None:
    runner = runner_for(Recipe("vmamba_digits", quartermap=PLAN, dynamic_batch=False))
    images = prepare(list(load_digits().held_out.images[:3]), DIGITS)
    expected = torch_logits(images)
    np.testing.assert_allclose(runner.run(images), expected, atol=1e-4 * np.abs(expected).max())


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=3), st.integers(1, 40))
def test_batches_are_cut_and_filled_up_to_what_a_session_takes(
    ranges: list[tuple[int, int]], count: int
) -> None:
    sizes = [(low, low + more) for low, more in ranges]

    class Strict(Session):
        inputs = (TensorInfo("images", ("batch", 1, 1, 1)),)
        outputs = (TensorInfo("logits", ("batch", 1)), TensorInfo("more", ("batch", 1)))

        def infer(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            images = feeds["images"]
            assert any(low <= len(images) <= high for low, high in sizes)
            return {"logits": images[:, 0, 0] * 2, "more": images[:, 0, 0]}

    images = np.arange(count, dtype=np.float32)[:, None, None, None]
    np.testing.assert_array_equal(session_run(Strict(), sizes)(images)[:, 0], 2 * np.arange(count))


def test_sixteen_bits_in_and_out_are_hidden() -> None:
    recipe = Recipe("vmamba_digits", precision="float16", io="same")
    images = prepare(list(load_digits().held_out.images[:4]), DIGITS)
    logits = runner_for(recipe).run(images)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits.argmax(axis=1), load_digits().held_out.labels[:4])


def test_images_have_the_size_of_the_recipe() -> None:
    runner = runner_for(Recipe("vmamba_digits", input_size=(48, 96)), "torch")
    assert runner.preprocessing.crop == (48, 96)
    assert runner.run(np.zeros((2, 3, 48, 96), np.float32)).shape == (2, 10)


def test_what_cannot_be_run_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    refusals: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (UnknownNameError, "Did you mean onnxruntime", lambda: runner_for("vmamba_digits", "onnxruntim")),
        (UnknownNameError, "Did you mean vmamba_digits", lambda: runner_for("vmamba_digit")),
        (UnknownNameError, "has no engine for tensorrt", lambda: runner_for(bundle, "tensorrt")),
        (BundleError, "there is no bundle", lambda: runner_for(tmp_path / "absent")),
        (RecipeError, "there is no recipe", lambda: runner_for("absent.toml")),
        (
            BundleError,
            "has its weights in it",
            lambda: runner_for(bundle, checkpoint=tmp_path / "weights.pth"),
        ),
        (
            BundleError,
            "not compiled from a checkpoint",
            lambda: runner_for(bundle, "torch", checkpoint=tmp_path / "weights.pth"),
        ),
        (
            CheckpointError,
            "weights.pth",
            lambda: runner_for("vmamba_digits", "torch", checkpoint=tmp_path / "weights.pth"),
        ),
    ]
    for kind, text, call in refusals:
        with pytest.raises(kind, match=text):
            call()


def test_a_damaged_bundle_is_refused(bundle: Bundle) -> None:
    data = bundle.model_path.read_bytes()
    bundle.model_path.write_bytes(data[:-1])
    with contextlib.ExitStack() as stack:
        stack.callback(bundle.model_path.write_bytes, data)
        with pytest.raises(BundleError, match="does not match its manifest"):
            runner_for(bundle.path)
    assert load_bundle(bundle.path)
