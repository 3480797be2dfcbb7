"""`bundle.predict`: what comes out of image files, by the task of the bundle."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_bundles
from deploy_bundles import change_manifest, dynamic_bundle, static_bundle
from PIL import Image
from task_bundles import (
    GREY,
    SEGMENTS,
    judge_bundle,
    marker_bundle,
    pooled_bundle,
    restorer_bundle,
    segmenter_bundle,
    words_bundle,
)

import quartermap_deploy as qm
from quartermap_deploy.classes import activation_of, probabilities
from quartermap_deploy.data.digits import load_digits
from quartermap_deploy.data.images import prepare, sample_photographs
from quartermap_deploy.errors import InputError, QuartermapError
from quartermap_deploy.pictures import mask_of, mask_png, palette
from quartermap_deploy.predicting import Arrays, Broken, Classes, Mask, Picture, Predictions

Array = np.ndarray[Any, Any]
PHOTOGRAPHS = list(sample_photographs().values())


@pytest.fixture(scope="module")
def digits() -> qm.Bundle:
    return qm.load_bundle(dynamic_bundle())


def files_of(folder: Path, images: Any) -> list[Path]:
    paths = [folder / f"{place:02d}.png" for place in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


def logits_of(bundle: qm.Bundle, images: Any) -> Array:
    assert bundle.preprocessing is not None
    found = bundle.run(prepare(images, bundle.preprocessing).astype(bundle.inputs[0].type))
    assert isinstance(found, np.ndarray)
    return found.astype(np.float64)


# Classes --------------------------------------------------------------------------------------------------------


def test_files_become_classes_with_probabilities(digits: qm.Bundle, tmp_path: Path) -> None:
    held_out = load_digits().held_out
    paths = files_of(tmp_path, held_out.images[:11])
    found = digits.predict(paths, top=3)
    assert isinstance(found, Predictions) and found.task == "classification" and not found.broken
    logits = logits_of(digits, held_out.images[:11])
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for path, one, row in zip(paths, found, expected, strict=True):
        assert isinstance(one, Classes) and one.source == str(path) and len(one.scores) == 3
        assert [score.index for score in one.scores] == np.argsort(-row)[:3].tolist()
        for score in one.scores:
            # Other batches than the one here, so other rounding.
            assert abs(score.probability - row[score.index]) <= 1e-5
            assert score.label == digits.labels[score.index] and isinstance(score.probability, float)
        assert one.best is one.scores[0]
    assert sum(one.best.index for one in found) == logits.argmax(axis=1).sum()
    with pytest.raises(dataclasses.FrozenInstanceError):
        found[0].best.label = "x"


def test_everything_that_is_an_image_is_taken(digits: qm.Bundle, tmp_path: Path) -> None:
    image = load_digits().held_out.images[0]
    (path,) = files_of(tmp_path, [image])
    (expected,) = digits.predict(path)
    for given in (str(path), [path], image, [image], Image.fromarray(image), tmp_path, image[None], (image,)):
        (found,) = digits.predict(given)
        assert found.scores == expected.scores
    assert digits.predict([image, path])[0].source == "image 1"
    assert len(digits.predict(path, top=99)[0].scores) == 10


def test_batches_change_nothing(digits: qm.Bundle) -> None:
    images = load_digits().held_out.images[:7]
    for batch in (1, 3, 7, 20):
        found = digits.predict(list(images), batch=batch)
        expected = digits.predict(list(images))
        for one, other in zip(found, expected, strict=True):
            assert [score.index for score in one.scores] == [score.index for score in other.scores]
            assert abs(one.best.probability - other.best.probability) <= 1e-5


def test_a_static_batch_is_filled_up() -> None:
    bundle = qm.load_bundle(static_bundle())
    images = load_digits().held_out.images[:3]
    found = bundle.predict(list(images))
    for one, image in zip(found, images, strict=True):
        logits = logits_of(bundle, [image])
        assert one.best.index == logits[0].argmax()
    with pytest.raises(InputError, match="takes 1 at most"):
        bundle.predict(list(images), batch=2)


def test_broken_images_are_named_and_the_others_predicted(digits: qm.Bundle, tmp_path: Path) -> None:
    image = load_digits().held_out.images[0]
    (good,) = files_of(tmp_path, [image])
    (tmp_path / "words.png").write_text("words")
    given = [tmp_path / "missing.png", good, tmp_path / "words.png", np.zeros((2, 2, 5), np.uint8), good]
    found = digits.predict(given, batch=2)
    assert [one.source for one in found] == [str(good)] * 2
    assert [one.source for one in found.broken] == [str(given[0]), str(given[2]), "image 4"]
    assert all(isinstance(one, Broken) for one in found.broken)
    assert "No such file" in found.broken[0].reason and found.broken[1].reason.startswith("cannot be read")
    assert "is no image" in found.broken[2].reason
    with pytest.raises(InputError, match=r"none of 2 images can be used: .*missing\.png .*; .*words\.png"):
        digits.predict([given[0], given[2]])
    with pytest.raises(InputError, match=r"words\.png cannot be read"):
        digits.predict(given[2])


def test_labels_and_preprocessing_are_the_bundles_unless_others_are_given(digits: qm.Bundle) -> None:
    image = load_digits().held_out.images[0]
    names = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
    found, plain = digits.predict(image, labels=names)[0].best, digits.predict(image)[0].best
    assert (found.label, found.index) == (names[plain.index], plain.index) and plain.label == str(plain.index)
    other = digits.predict(image, preprocessing={"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]})[0].best
    assert digits.preprocessing is not None
    settings = digits.preprocessing.replace({"mean": [0.0] * 3, "std": [1.0] * 3})
    logits = np.asarray(digits.run(prepare([image], settings)), dtype=np.float64)
    expected = np.exp(logits) / np.exp(logits).sum()
    assert abs(other.probability - expected.max()) <= 1e-5
    assert abs(other.probability - plain.probability) > 1e-3


def test_a_softmax_of_the_models_own_is_not_taken_again() -> None:
    bundle = qm.load_bundle(judge_bundle())
    assert activation_of(bundle) == "none" and bundle.labels == ()
    values = logits_of(bundle, PHOTOGRAPHS)
    for one, row in zip(bundle.predict(PHOTOGRAPHS), values, strict=True):
        assert sorted(score.index for score in one.scores) == [0, 1, 2]
        assert sum(score.probability for score in one.scores) == pytest.approx(1, abs=1e-5)
        for score in one.scores:
            assert abs(score.probability - row[score.index]) <= 1e-6 and score.label == str(score.index)


def test_probabilities_of_any_logits_are_finite() -> None:
    logits = np.array([[1e30, -1e30, 0.0], [-1000.0, -1000.0, -1001.0]], dtype=np.float32)
    found = probabilities(logits, "softmax")
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_allclose(found[1, 2] / found[1, 0], np.exp(-1))
    np.testing.assert_array_equal(probabilities(np.array([[-1e30, 0, 1e30]]), "sigmoid"), [[0, 0.5, 1]])
    np.testing.assert_array_equal(probabilities(logits, "none"), logits)


# Masks ----------------------------------------------------------------------------------------------------------


def test_masks_have_the_most_probable_class_at_the_size_of_the_input() -> None:
    bundle = qm.load_bundle(segmenter_bundle())
    found = bundle.predict(PHOTOGRAPHS)
    logits = torch.from_numpy(logits_of(bundle, PHOTOGRAPHS))
    expected = torch.nn.functional.interpolate(logits, size=(32, 32), mode="bilinear").argmax(1).numpy()
    for one, mask in zip(found, expected, strict=True):
        assert isinstance(one, Mask) and one.mask.shape == (32, 32) and one.mask.dtype == np.uint8
        # Where two classes are as probable as each other, rounding decides.
        assert (one.mask != mask).mean() < 0.01 and len(np.unique(one.mask)) > 1
        assert one.labels == {int(index): SEGMENTS[index] for index in np.unique(one.mask)}
        assert sum(one.shares.values()) == pytest.approx(1)
        assert next(iter(one.shares)) == np.bincount(one.mask.ravel()).argmax()
    names = ["a", "b", "c", "d"]
    assert set(bundle.predict(PHOTOGRAPHS[0], labels=names)[0].labels.values()) <= set(names)


def test_one_class_is_marked_where_it_is_more_probable_than_not() -> None:
    bundle = qm.load_bundle(marker_bundle())
    (found,) = bundle.predict(PHOTOGRAPHS[0])
    assert isinstance(found, Mask)
    values = torch.from_numpy(logits_of(bundle, PHOTOGRAPHS[:1]))
    wide = torch.nn.functional.interpolate(values, size=(32, 32), mode="bilinear")[0, 0].numpy()
    # The model ends in a sigmoid, so the threshold is 0.5 and not 0.
    assert wide.min() > 0 and 0 < (wide > 0.5).mean() < 1
    assert (found.mask != (wide > 0.5)).mean() < 0.01
    assert found.labels == {0: "background", 1: "1"}


def test_masks_of_many_classes_have_16_bits_and_masks_are_png_files() -> None:
    logits = np.zeros((300, 2, 3), dtype=np.float32)
    logits[299, 0, 0] = logits[257, 1, 2] = 1
    mask = mask_of(logits, (2, 3), "softmax")
    assert mask.dtype == np.uint16 and mask.tolist() == [[299, 0, 0], [0, 0, 257]]
    assert mask_of(np.array([[[-1.0, 1.0]]]), (1, 2), "softmax").tolist() == [[0, 1]]
    import io

    for made in (mask, np.arange(6, dtype=np.uint8).reshape(2, 3)):
        with Image.open(io.BytesIO(mask_png(made))) as picture:
            assert np.array_equal(np.asarray(picture), made)
            assert picture.mode == ("P" if made.dtype == np.uint8 else "I;16")
            if picture.mode == "P":
                assert picture.convert("RGB").getpixel((2, 1)) == tuple(palette()[5])


# Images, and everything else ------------------------------------------------------------------------------------


def test_images_come_back_with_their_pixels_where_the_scale_is_known() -> None:
    bundle = qm.load_bundle(restorer_bundle())
    (found,) = bundle.predict(PHOTOGRAPHS[0])
    assert isinstance(found, Picture) and found.values.shape == (1, 32, 32)
    values = logits_of(bundle, PHOTOGRAPHS[:1])[0]
    np.testing.assert_allclose(found.values, values, atol=1e-6)
    assert found.pixels is not None and found.pixels.shape == (32, 32) and found.pixels.dtype == np.uint8
    assert np.abs(found.pixels - np.clip(255 * values[0], 0, 255)).max() <= 0.5 + 1e-3
    # The size is open, so a crop may be asked for, as far as the module's own rules go.
    (wide,) = bundle.predict(PHOTOGRAPHS[0], preprocessing={"crop": [48, 64]})
    assert wide.values.shape == (1, 48, 64)
    with pytest.raises(InputError, match=r"x\[2\] % 4"):
        bundle.predict(PHOTOGRAPHS[0], preprocessing={"crop": [30, 64]})
    # Whether a model that is given normalised images returns normalised ones, nobody said.
    (unknown,) = bundle.predict(PHOTOGRAPHS[0], preprocessing={"mean": [0.5], "std": [0.5]})
    assert unknown.pixels is None


def test_other_outputs_are_arrays_by_name() -> None:
    bundle = qm.load_bundle(pooled_bundle())
    settings = {"mean": [0.5] * 3, "std": [0.25] * 3}
    found = bundle.predict(PHOTOGRAPHS, preprocessing=settings)
    for image, one in zip(PHOTOGRAPHS, found, strict=True):
        assert isinstance(one, Arrays)
        # The number belongs to all images of a run, so each image has a run of its own.
        alone = bundle.run(
            {"x": prepare([image], dataclasses.replace(toy_bundles.PREPROCESSING, fit="cover"))}
        )
        assert isinstance(alone, dict)
        np.testing.assert_allclose(one.arrays["features"], alone["features"][0], atol=1e-6)
        np.testing.assert_allclose(one.arrays["total"], alone["total"], rtol=1e-5)
    with pytest.raises(InputError, match="takes 1 at most"):
        bundle.predict(PHOTOGRAPHS, batch=2, preprocessing=settings)


# Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bundle", "settings", "message"),
    [
        (toy_bundles.change, {}, r"takes first \(batch, 3, 32, 48\) and second .*give arrays to bundle\.run"),
        (words_bundle, {}, "takes tokens"),
        (pooled_bundle, {}, r"does not say how an image becomes its input x .*--preprocessing mean="),
        (pooled_bundle, {"preprocessing": {"mean": [0.5] * 3}}, "has no std"),
        (dynamic_bundle, {"preprocessing": {"crop": [32, 32]}}, r"makes images of \(3, 32, 32\)"),
        (dynamic_bundle, {"preprocessing": {"color": "grey", "mean": [0.5], "std": [0.5]}}, r"\(1, 64, 64\)"),
        (dynamic_bundle, {"preprocessing": {"meen": [0.5]}}, "meen"),
        (dynamic_bundle, {"labels": ["a", "b"]}, "each of 10 classes|one for each of"),
        (restorer_bundle, {"labels": ["a"]}, "tells none apart"),
        (dynamic_bundle, {"top": 0}, "top = 0"),
        (dynamic_bundle, {"batch": 0}, "batch = 0"),
        (dynamic_bundle, {"target": "tensorrt"}, "no engine for tensorrt"),
    ],
)
def test_what_does_not_fit_is_refused(bundle: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(QuartermapError, match=message):
        qm.load_bundle(bundle()).predict(PHOTOGRAPHS[0], **settings)


def test_nothing_to_predict_from_is_refused(digits: qm.Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no image"):
        digits.predict([])
    with pytest.raises(InputError, match="holds no image"):
        digits.predict(tmp_path)


def test_a_task_that_the_output_does_not_fit_is_refused(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(segmenter_bundle(), tmp_path / "bundle"))
    change_manifest(bundle, task="classification")
    with pytest.raises(InputError, match=r"expected \(batch, classes\)"):
        qm.load_bundle(bundle).predict(PHOTOGRAPHS[0])


def test_an_output_that_is_no_number_breaks_its_image_alone() -> None:
    bundle = qm.load_bundle(restorer_bundle())
    from quartermap_deploy.predicting import make_predictor

    predictor = make_predictor(bundle)

    class Spoilt:
        input_type = predictor.session.input_type

        def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
            outputs = predictor.session.infer(feeds)
            outputs["image"][1, 0, 3, 3] = np.nan
            return outputs

    spoilt = dataclasses.replace(predictor, session=Spoilt())  # type: ignore[arg-type]
    grey = [Image.fromarray(image) for image in PHOTOGRAPHS]
    first, second = spoilt.each([("one", grey[0]), ("two", grey[1])])
    assert isinstance(first, Picture) and isinstance(second, Broken)
    assert second.source == "two" and "NaN or infinite" in second.reason
    assert GREY.channels == 1


def test_torch_is_not_needed() -> None:
    script = """
import sys
sys.modules["torch"] = None
import numpy, quartermap_deploy
found = quartermap_deploy.load_bundle(sys.argv[1]).predict(numpy.zeros((8, 8), "u1"))
print(len(found[0].scores))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(dynamic_bundle())], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr


def test_numbers_of_words_that_are_not_there_are_the_users_to_mend() -> None:
    feeds = {"tokens": np.full((1, 12), 99), "keep": np.ones((1, 12), bool)}
    with pytest.raises(InputError, match=r"cannot take these values.*idx=99"):
        qm.load_bundle(words_bundle()).run(feeds)
