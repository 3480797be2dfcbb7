"""Preparing images as the cards say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from quartermap_deploy.architectures.cards import Preprocessing, load_card
from quartermap_deploy.data.images import open_image, prepare, sample_photographs
from quartermap_deploy.errors import InputError

IMAGENET = load_card("vmamba_tiny_s1l8").preprocessing


def test_photographs_are_prepared_as_imagenet_models_expect() -> None:
    photographs = sample_photographs()
    assert set(photographs) == {"china.jpg", "flower.jpg"}
    batch = prepare(photographs.values(), IMAGENET)
    assert batch.shape == (2, 3, 224, 224) and batch.dtype == np.float32 and batch.flags.c_contiguous

    # 427x640: the shorter side becomes 256, the longer 640 * 256 / 427 = 383, and the centre is cut out.
    image = Image.fromarray(photographs["china.jpg"]).resize((383, 256), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)[16:240, 80:304].astype(np.float64) / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(batch[0], expected.transpose(2, 0, 1), atol=1e-5)


def test_greyscale_images_are_stretched_for_the_digits_model() -> None:
    card = load_card("vmamba_digits")
    digit = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    batch = prepare([digit, digit], card.preprocessing)
    assert batch.shape == (2, *card.input_shape)
    np.testing.assert_array_equal(batch[:, 0], batch[:, 2])
    assert batch.min() >= -1 and batch.max() <= 1


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(8, 40),
    st.integers(8, 40),
    st.sampled_from(["cover", "stretch"]),
)
def test_every_image_ends_at_the_input_size(
    height: int, width: int, out_height: int, out_width: int, fit: str
) -> None:
    preprocessing = Preprocessing(
        resize=(256, 256), fit=fit, crop=(224, 224), interpolation="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3
    ).with_size(out_height, out_width)  # type: ignore[arg-type]
    white = np.full((height, width, 3), 255, dtype=np.uint8)
    batch = prepare([white], preprocessing)
    assert batch.shape == (1, 3, out_height, out_width)
    # A crop that left the image would be black at the border.
    assert batch.min() == 1.0


def test_with_size_keeps_the_margin() -> None:
    larger = IMAGENET.with_size(384, 384)
    assert larger.resize == (439, 439) and larger.crop == (384, 384)
    assert IMAGENET.with_size(224, 224) == IMAGENET


def test_files_arrays_and_images_are_the_same_image(tmp_path) -> None:  # type: ignore[no-untyped-def]
    array = sample_photographs()["flower.jpg"]
    path = tmp_path / "flower.png"
    Image.fromarray(array).save(path)
    batch = prepare([array, path, str(path), Image.fromarray(array)], IMAGENET)
    for other in batch[1:]:
        np.testing.assert_array_equal(batch[0], other)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8, 3), dtype=np.float32),
        np.zeros((3, 8, 8), dtype=np.uint8),
        np.zeros((0, 8), dtype=np.uint8),
        np.full((8, 8), np.nan, dtype=np.float32),
        Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)),
        Image.fromarray(np.full((8, 8), np.inf, dtype=np.float32)),
        [[0, 255], [255, 0]],
        "no such file.png",
        __file__,
    ],
)
def test_what_is_no_image_is_refused(image: object) -> None:
    with pytest.raises(InputError):
        open_image(image)  # type: ignore[arg-type]


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(InputError, match="no image"):
        prepare([], IMAGENET)
