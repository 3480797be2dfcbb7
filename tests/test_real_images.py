"""The real images that a model is validated on: whose they are, which, and how many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quartermap_deploy.data.digits import load_digits
from quartermap_deploy.data.images import prepare, sample_photographs
from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.errors import InputError
from quartermap_deploy.validation.inputs import real_images

PLAIN = Preprocessing(
    resize=(8, 8), fit="stretch", crop=(8, 8), interpolation="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3
)


def levels(images: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> list[int]:
    """Return the grey level of each image of one colour."""
    assert all(np.ptp(image) == 0 for image in images)
    return [round(float(image.mean()) * 255) for image in images]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, level in (("b.png", 20), ("a.png", 10), ("c.png", 30)):
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / name)
    return tmp_path


def test_images_of_a_folder_are_taken_in_the_order_of_their_names(folder: Path) -> None:
    assert levels(real_images(PLAIN, folder)) == [10, 20]
    assert levels(real_images(PLAIN, folder, digits=True)) == [10, 20]
    assert levels(real_images(PLAIN, folder, 1)) == [10]
    assert levels(real_images(PLAIN, Path(str(folder)), 3)) == [10, 20, 30]


def test_too_few_are_repeated_from_the_first(folder: Path) -> None:
    assert levels(real_images(PLAIN, folder, 5)) == [10, 20, 30, 10, 20]
    assert real_images(PLAIN, folder, 5).dtype == np.float32


def test_without_a_folder_they_are_photographs_or_digits() -> None:
    photographs = prepare(list(sample_photographs().values()), PLAIN)
    np.testing.assert_array_equal(real_images(PLAIN), photographs)
    np.testing.assert_array_equal(real_images(PLAIN, count=3), photographs[[0, 1, 0]])
    digits = prepare(list(load_digits().held_out.images[:3]), PLAIN)
    np.testing.assert_array_equal(real_images(PLAIN, digits=True), digits[:2])
    np.testing.assert_array_equal(real_images(PLAIN, count=3, digits=True), digits)


def test_a_folder_that_is_none_is_told_of(folder: Path) -> None:
    for path in (folder / "none", folder / "a.png"):
        with pytest.raises(InputError, match=f"there is no folder {path} with images to validate on"):
            real_images(PLAIN, path)
