"""Preparing images as the cards say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from quartermap_deploy.architectures.cards import load_card
from quartermap_deploy.data.images import open_image, prepare, sample_photographs
from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.errors import InputError
from quartermap_deploy.evaluation.batches import batches

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


SHAPES = [
    (1, 1),
    (1, 500),
    (500, 1),
    (37, 1900),
    (480, 640),
    (641, 479),
    (256, 256),
    (255, 257),
    (3, 900),
    (1200, 90),
]


@pytest.mark.parametrize(("width", "height"), SHAPES)
@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vmamba_digits"])
def test_every_ordinary_shape_is_resized_and_then_cropped(name: str, width: int, height: int) -> None:
    """By torchvision's rule to the last bit: the shorter side first, and then the centre."""
    settings = load_card(name).preprocessing
    array = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if settings.fit == "stretch":
        size = settings.resize[::-1]
    else:
        shorter = settings.resize[0]
        size = (
            (shorter, shorter * height // width) if width <= height else (shorter * width // height, shorter)
        )
    whole = Image.fromarray(array).resize(size, Image.Resampling[settings.interpolation.upper()])
    top, left = round((size[1] - settings.crop[0]) / 2), round((size[0] - settings.crop[1]) / 2)
    centre = np.asarray(whole)[top : top + settings.crop[0], left : left + settings.crop[1]]
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    mean, std = (np.array(part, dtype=np.float32) for part in (settings.mean, settings.std))
    expected = (levels[centre] - mean) / std
    np.testing.assert_array_equal(prepare([array], settings)[0], expected.transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1)])
def test_a_strip_that_the_resize_would_make_too_large_is_refused(size: tuple[int, int]) -> None:
    """Of a file of 138 bytes the resize made 8.7 GB before the crop threw most of it away."""
    with pytest.raises(InputError, match=rf"{size[0]} x {size[1]} pixels.*7680000.*at most 50,000,000"):
        prepare([Image.new("1", size)], IMAGENET)
    # Stretched to a square it is no larger than any other image.
    assert prepare([Image.new("1", size)], load_card("vmamba_digits").preprocessing).shape == (1, 3, 64, 64)


def test_such_a_strip_is_a_broken_image_of_a_data_set() -> None:
    class Images:
        labels = np.array([0, 1])

        def __len__(self) -> int:
            return 2

        def image(self, index: int) -> Image.Image:
            return Image.new("L", [(8, 8), (1, 30_000)][index])

        def item_name(self, index: int) -> str:
            return f"image {index}"

    (batch,) = batches(Images(), IMAGENET, 2)  # type: ignore[arg-type]
    ((name, reason),) = batch.broken
    assert name == "image 1" and "1 x 30000" in reason and batch.indices.tolist() == [0]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_of_16_bits_the_upper_8_are_taken(mode: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Pillow's conversion would cut off all that is above 255, and make the image white."""
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    types = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}
    sixteen = Image.frombytes(
        mode, (16, 16), (eight.astype(types[mode]) * 256 + 255).astype(types[mode]).tobytes()
    )
    expected = np.asarray(Image.fromarray(eight).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(open_image(sixteen)), expected)
    if mode == "I;16":
        sixteen.save(tmp_path / "grey.png")
        np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "grey.png")), expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 70_000]], dtype=np.int32), "from 0 to 70000; expected 0 to 65535"),
        (np.array([[-1, 7]], dtype=np.int32), "from -1 to 7"),
        (np.array([[0, 300.5]], dtype=np.float32), "from 0 to 300.5, and does not say which is white"),
    ],
)
def test_values_that_say_no_brightness_are_refused(values: np.ndarray, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(InputError, match=message):
        open_image(Image.fromarray(values))


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(InputError, match="no image"):
        prepare([], IMAGENET)
