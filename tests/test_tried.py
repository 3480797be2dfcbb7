"""What a search keeps: the file of what was tried, the counts of an evaluation, and how far answers stay apart."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quartermap_deploy.architectures import create_model, load_card
from quartermap_deploy.errors import InputError, RecipeError
from quartermap_deploy.evaluation.datasets import Dataset
from quartermap_deploy.evaluation.fidelity import Fidelity, _Counts, fidelity
from quartermap_deploy.evaluation.savings import Savings
from quartermap_deploy.evaluation.search import Candidate
from quartermap_deploy.evaluation.tally import Tally, check_place, ranks
from quartermap_deploy.evaluation.trial import Trial
from quartermap_deploy.evaluation.tried import Tried

SAVINGS = Savings("time", {(1, 2): 0.1, (2, 2): 0.2}, {(1, 2): 0.01}, "for this test", noisy=True)
FOUND = {
    Candidate((1, 3), 2): Fidelity(0.75, 0.125, None),
    Candidate((2,), 3): Fidelity(0.0, math.inf, 0.5),
}


def kept(path: Path) -> Tried:
    """A file with two candidates and savings."""
    tried = Tried(path, "a key", force=False)
    assert (tried.found, tried.savings, tried.savings_key) == ({}, None, {})
    tried.found, tried.savings, tried.savings_key = dict(FOUND), SAVINGS, {"target": "torch"}
    tried.write()
    return tried


def test_what_was_tried_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    kept(path)
    values = json.loads(path.read_text())
    assert (values["format"], values["key"], values["complete"]) == (1, "a key", False)
    assert values["tried"] == [
        {"blocks": [1, 3], "stride": 2, "agreement": 0.75, "divergence": 0.125, "accuracy": None},
        {"blocks": [2], "stride": 3, "agreement": 0.0, "divergence": "inf", "accuracy": 0.5},
    ]
    again = Tried(path, "a key", force=False)
    assert (again.found, again.savings, again.savings_key) == (FOUND, SAVINGS, {"target": "torch"})


def test_more_can_be_written_beside_it_and_what_json_has_no_number_for(tmp_path: Path) -> None:
    tried = kept(tmp_path / "a.json")
    written = tried.write({"complete": True, "more": {"a": [math.nan, -math.inf, 1.5]}})
    assert json.loads(tried.path.read_text()) == written
    assert written["complete"] is True and written["more"] == {"a": ["nan", "-inf", 1.5]}
    tried.savings = None
    assert tried.write()["savings"] is None
    assert Tried(tried.path, "a key", force=False).savings is None


@pytest.mark.parametrize(
    "change",
    [
        {"key": "another"},
        {"format": 2},
        {"tried": 5},
        {"tried": [{"blocks": [1]}]},
        {"savings": {"measure": "time"}},
        {"savings_key": None, "tried": None},
    ],
)
def test_a_file_of_something_else_is_kept_unless_it_is_to_be_replaced(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    path = kept(tmp_path / "a.json").path
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RecipeError, match="is not what was tried for this model"):
        Tried(path, "a key", force=False)
    begun = Tried(path, "a key", force=True)
    assert begun.found == {} and begun.savings is None


def test_a_damaged_file_is_kept_too(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("", "[]", "{", "null"):
        path.write_text(text)
        with pytest.raises(RecipeError):
            Tried(path, "a key", force=False)
        assert Tried(path, "a key", force=True).found == {}
    # What belongs to this search goes on, with force as well.
    path.unlink()
    kept(path)
    assert Tried(path, "a key", force=True).found == FOUND


# Counting ---------------------------------------------------------------------------------------------------------

LOGITS = np.array(
    [
        [9, 8, 7, 6, 5, 4, 3],
        [9, 8, 7, 6, 5, 4, 3],
        [9, 8, 7, 6, 5, 4, 3],
        [1, 1, 1, 1, 1, 1, 1],
        [np.nan, 8, 7, 6, 5, 4, 3],
        [np.inf, 8, 7, 6, 5, 4, 3],
    ],
    np.float32,
)
LABELS = np.array([0, 4, 5, 0, 1, 0])


def test_counts_of_batches_add_up() -> None:
    assert ranks(LOGITS[:4], LABELS[:4]).tolist() == [0, 4, 5, 0]
    assert ranks(LOGITS[3:4], np.array([2])).tolist() == [2]  # of equals, those before it come first
    one = Tally.empty(7).plus(LOGITS, LABELS, (("a.png", "broken"),), seconds=2.0, compute_seconds=1.5)
    assert one.position == 7
    assert one.correct.tolist() == [2, 0, 0, 0, 0, 0, 0] and one.total.tolist() == [3, 1, 0, 0, 1, 1, 0]
    assert (one.top5, one.not_finite, one.seconds, one.compute_seconds) == (3, 2, 2.0, 1.5)
    two = one.plus(LOGITS[:1], LABELS[:1], (("b.png", "too"),), seconds=0.5, compute_seconds=0.25)
    assert two.position == 9 and two.correct[0] == 3 and two.total[0] == 4 and two.top5 == 4
    assert two.broken == (("a.png", "broken"), ("b.png", "too"))
    assert (two.not_finite, two.seconds, two.compute_seconds) == (2, 2.5, 1.75)
    assert one.position == 7


def test_counts_are_kept_for_their_evaluation_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.json"
    assert Tally.load(path, "k", 7).position == 0
    tally = Tally.empty(7).plus(LOGITS, LABELS, (("a.png", "broken"),), 2.0, 1.5)
    check_place(path)
    tally.save(path, "k")
    found = Tally.load(path, "k", 7)
    assert found.correct.dtype == np.int64
    for name in ("position", "top5", "not_finite", "broken", "seconds", "compute_seconds"):
        assert getattr(found, name) == getattr(tally, name)
    assert np.array_equal(found.correct, tally.correct) and np.array_equal(found.total, tally.total)
    with pytest.raises(InputError, match="belongs to another evaluation"):
        Tally.load(path, "other", 7)
    with pytest.raises(InputError, match="is no state of an evaluation"):
        Tally.load(path, "k", 8)
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match="is no state of an evaluation"):
        Tally.load(path, "k", 7)
    with pytest.raises(InputError, match=r"is a folder; name a file in it, such as .*state\.json"):
        check_place(path.parent)


def test_a_place_that_cannot_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="the state cannot be written to"):
        check_place(tmp_path / "file" / "state.json")


# Trials ---------------------------------------------------------------------------------------------------------

PICTURES: list[Any] = [np.full((8, 8, 3), value, np.uint8) for value in (0, 128, 255)]
DIGITS = load_card("vmamba_digits").preprocessing


def test_a_trial_runs_the_model_on_the_images_that_can_be_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("vmamba_digits")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    names = tuple(map(str, range(10)))
    given = Dataset(
        "made up", names, np.array([1, 5, 2, 3]), [*PICTURES[:1], broken, *PICTURES[1:]], None, "f" * 8
    )
    blind, seeing = (Trial(model, given, DIGITS, labels=labels) for labels in (False, True))
    assert len(seeing.images) == 3 and [name for name, _ in seeing.broken] == [given.item_name(1)]
    named = model(torch.from_numpy(seeing.images)).argmax(dim=1).numpy()
    right = float((named == np.array([1, 2, 3])).mean())
    assert blind.unpruned == Fidelity(1.0, 0.0, None) and seeing.unpruned == Fidelity(1.0, 0.0, right)
    candidates = [Candidate((2, 5), 2), Candidate((1,), 3)]
    found = seeing.run(candidates)
    assert list(found) == candidates
    forms = [candidate.form(10) for candidate in candidates]
    assert list(found.values()) == fidelity(model, seeing.images, forms, np.array([1, 2, 3]))
    assert all(entry.accuracy is None for entry in blind.run(candidates[:1]).values())
    assert seeing.to_dict() == {
        "name": "made up",
        "fingerprint": "f" * 8,
        "images": 3,
        "broken": [{"image": given.item_name(1), "reason": seeing.broken[0][1]}],
        "unpruned_accuracy": right,
    }


def test_a_trial_without_images_or_numbers_is_refused(tmp_path: Path) -> None:
    model = create_model("vmamba_digits")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    none = Dataset("made up", (), np.array([-1, -1]), [broken, tmp_path / "missing.png"], None, "f")
    first = re.escape(none.item_name(0))
    with pytest.raises(InputError, match=f"none of the images of made up can be read; the first, {first}: "):
        Trial(model, none, DIGITS, labels=False)
    with torch.no_grad():
        model.get_parameter("classifier.head.bias")[3] = float("nan")
    one = Dataset("made up", (), np.array([-1]), PICTURES[:1], None, "f")
    with pytest.raises(InputError, match="the logits of the unpruned model on made up have NaN"):
        Trial(model, one, DIGITS, labels=False)


# Fidelity ---------------------------------------------------------------------------------------------------------


def test_divergence_is_that_of_kullback_and_leibler_from_the_unpruned_model() -> None:
    p, q = (
        torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]),
        torch.tensor([[0.25, 0.5, 0.25], [0.9, 0.05, 0.05]]),
    )
    found = _Counts.of(q.log() + 3, p.log(), torch.tensor([1, 1]))
    assert found.divergence == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), abs=1e-6)
    assert (found.agreeing, found.right) == (1, 1)
    assert _Counts.of(q.log(), p.log(), None).right == 0
    found.add(_Counts(agreeing=2, right=3, divergence=1.0))
    assert (found.agreeing, found.right) == (3, 4)
    assert found.result(4, True) == Fidelity(0.75, pytest.approx((1 + 0.25 * math.log(2)) / 4), 1.0)
    assert _Counts(3, 3, -1e-17).result(4, False) == Fidelity(0.75, 0.0, None)


def test_one_image_without_numbers_makes_a_form_diverge_without_limit() -> None:
    logits = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [math.inf, 0.0]])
    found = _Counts.of(logits, torch.tensor([[1.0, 0.0]] * 3), torch.tensor([0, 0, 0]))
    assert (found.agreeing, found.right, found.divergence) == (1, 1, math.inf)
