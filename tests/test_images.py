"""Preparing images as the cards say."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from quartermap_deploy.architectures.cards import load_card
from quartermap_deploy.data.images import FORMATS, open_image, prepare, restored, sample_photographs
from quartermap_deploy.data.preprocessing import INTERPOLATIONS, Preprocessing
from quartermap_deploy.errors import InputError
from quartermap_deploy.evaluation.batches import batches

IMAGENET = load_card("vmamba_tiny_s1l8").preprocessing


def test_photographs_are_prepared_as_imagenet_models_expect() -> None:
    photographs = sample_photographs()
    assert list(photographs) == ["china.jpg", "flower.jpg"]
    from sklearn.datasets import load_sample_images

    for found, own in zip(photographs.values(), load_sample_images().images, strict=True):
        np.testing.assert_array_equal(found, own)
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


def luminance(colours: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """ITU-R BT.601 in 16 fractional bits, rounded: (…, 3) of uint8 to (…)."""
    red, green, blue = (colours[..., channel].astype(np.int64) for channel in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 2**15) >> 16).astype(np.uint8)


def pixels_for(color: str, array: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """An array (H, W), (H, W, 3) or (H, W, 4) of uint8 in the channels of a model, (channels, H, W)."""
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    colours = array[..., :3]
    if color == "grey":
        return luminance(colours)[None]
    if color == "rgba":
        alpha = array[..., 3:] if array.shape[2] == 4 else np.full_like(array[..., :1], 255)
        return np.concatenate([colours, alpha], axis=2).transpose(2, 0, 1)
    return (colours[..., ::-1] if color == "bgr" else colours).transpose(2, 0, 1)


@pytest.mark.parametrize("scale", [1 / 255, 1.0, 1 / 127.5])
@pytest.mark.parametrize("channels", [0, 3, 4])
@pytest.mark.parametrize("color", ["rgb", "bgr", "grey", "rgba"])
def test_every_image_gets_the_channels_of_the_model(color: str, channels: int, scale: float) -> None:
    """To the last bit, against a few lines of NumPy; the image has the size of the input, so nothing is resized."""
    generator = np.random.default_rng(channels)
    array = generator.integers(0, 256, (37, 41, channels) if channels else (37, 41), dtype=np.uint8)
    count = {"grey": 1, "rgba": 4}.get(color, 3)
    mean, std = (tuple(generator.uniform(0.2, 0.8, count).tolist()) for _ in range(2))
    settings = Preprocessing((37, 41), "stretch", (37, 41), "bicubic", mean, std, color, scale)  # type: ignore[arg-type]

    # 1/255 means what torchvision does: a division by 255.
    values = pixels_for(color, array).astype(np.float32)
    scaled = values / np.float32(255) if scale == 1 / 255 else values * np.float32(scale)
    means, stds = (np.asarray(part, dtype=np.float32)[:, None, None] for part in (mean, std))
    batch = prepare([array], settings)
    assert batch.shape == (1, count, 37, 41) and batch.dtype == np.float32
    if scale == 1 / 127.5:  # 2/255 has no short form in float32, so the product is a rounding away
        np.testing.assert_allclose(batch[0], (scaled - means) / stds, rtol=0, atol=3e-6)
    else:
        np.testing.assert_array_equal(batch[0], (scaled - means) / stds)
    np.testing.assert_array_equal(
        np.asarray(restored(batch[0], settings)).reshape(37, 41, -1),
        pixels_for("rgb" if color == "bgr" else color, array).transpose(1, 2, 0),
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "F"])
@pytest.mark.parametrize("color", ["bgr", "grey", "rgba"])
def test_every_mode_of_pillow_becomes_every_colour(mode: str, color: str) -> None:
    array = np.random.default_rng(5).integers(0, 256, (16, 20, 4), dtype=np.uint8)
    image = Image.fromarray(array)
    if mode in ("I;16", "F"):
        image = Image.fromarray(array[..., 0].astype({"I;16": np.uint16, "F": np.float32}[mode]))
    else:
        image = image.convert(mode)
    count = {"grey": 1, "rgba": 4}.get(color, 3)
    settings = Preprocessing(
        (16, 20), "cover", (16, 20), "bilinear", (0.0,) * count, (1.0,) * count, color, 1.0
    )  # type: ignore[arg-type]
    found = prepare([image], settings)[0]
    eight = np.asarray(open_image(image)) if mode in ("I;16", "F") else np.asarray(image.convert("RGBA"))
    expected = pixels_for(color, eight)
    if mode == "YCbCr" and color == "grey":  # which has its luminance already
        expected = np.asarray(image)[..., 0][None]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("color", ["rgb", "bgr", "grey"])
@pytest.mark.parametrize("interpolation", ["nearest", "box"])
def test_filters_are_those_of_their_names(interpolation: str, color: str) -> None:
    """To a third of each side: nearest takes the centre of each 3x3 pixels, and box their mean, rounded."""
    array = np.random.default_rng(9).integers(0, 256, (30, 42, 3), dtype=np.uint8)
    count = 1 if color == "grey" else 3
    settings = Preprocessing(
        (10, 14), "stretch", (10, 14), interpolation, (0.0,) * count, (1.0,) * count, color, 1.0
    )  # type: ignore[arg-type]
    found = prepare([array], settings)[0]
    pixels = pixels_for(color, array).astype(np.float64)
    if interpolation == "nearest":
        np.testing.assert_array_equal(found, pixels[:, 1::3, 1::3])
    else:
        # Pillow rounds after each of the two directions.
        expected = pixels.reshape(count, 10, 3, 14, 3).mean(axis=(2, 4))
        np.testing.assert_allclose(found, expected, atol=1.0)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_filter_is_pillow_s(interpolation: str) -> None:
    photograph = Image.fromarray(sample_photographs()["china.jpg"])
    settings = IMAGENET.replace(
        {"interpolation": interpolation, "scale": 1.0, "mean": [0] * 3, "std": [1] * 3}
    )
    whole = photograph.resize((383, 256), Image.Resampling[interpolation.upper()])
    expected = np.asarray(whole)[16:240, 80:304].transpose(2, 0, 1)
    np.testing.assert_array_equal(prepare([photograph], settings)[0], expected)


def test_what_is_clear_does_not_shine_through_a_resize() -> None:
    """Pillow weights colours by alpha: a clear red beside an opaque blue leaves blue at the border."""
    array = np.zeros((8, 8, 4), dtype=np.uint8)
    array[:, :4] = (255, 0, 0, 0)
    array[:, 4:] = (0, 0, 255, 255)
    settings = Preprocessing((4, 3), "stretch", (4, 3), "box", (0.0,) * 4, (1.0,) * 4, "rgba", 1.0)
    found = prepare([array], settings)[0]
    assert found[:3, 0, 1].tolist() == [0, 0, 255] and 100 <= found[3, 0, 1] <= 156


def test_a_stretch_to_more_pixels_than_an_image_may_have_is_refused() -> None:
    huge = Preprocessing((8000, 8000), "stretch", (64, 64), "nearest", (0.0,), (1.0,), "grey")
    with pytest.raises(InputError, match="8000 x 8000 pixels, at most 50,000,000"):
        prepare([np.zeros((8, 8), dtype=np.uint8)], huge)


def test_data_sets_are_prepared_in_the_colours_of_the_model() -> None:
    class Images:
        labels = np.array([0])

        def __len__(self) -> int:
            return 1

        def image(self, index: int) -> Image.Image:
            return Image.fromarray(sample_photographs()["flower.jpg"])

    grey = load_card("vmamba_digits").preprocessing.with_channels(1)
    (batch,) = batches(Images(), grey, 2)  # type: ignore[arg-type]
    assert batch.images.shape == (1, 1, 64, 64)
    np.testing.assert_array_equal(batch.images, prepare([Images().image(0)], grey))


NOT_FINITE = "the image has NaN or infinite values"


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 8, 3), dtype=np.float32), r"shape \(8, 8, 3\) and type float32 is no image; expected"),
        (np.zeros((8, 8, 1), dtype=np.uint8), r"shape \(8, 8, 1\) and type uint8 is no image; expected"),
        (np.zeros((3, 8, 8), dtype=np.uint8), r"shape \(3, 8, 8\) and type uint8 is no image; expected"),
        (np.zeros((0, 8), dtype=np.uint8), r"shape \(0, 8\) and type uint8 is no image; expected"),
        (np.zeros((8, 8), dtype=np.float32), r"shape \(8, 8\) and type float32 is no image; expected"),
        (Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)), NOT_FINITE),
        (Image.fromarray(np.full((8, 8), np.inf, dtype=np.float32)), NOT_FINITE),
        ([[0, 255], [255, 0]], "a list is no image; expected a file, an array or a Pillow image"),
        ("no such file.png", r"the image no such file\.png cannot be read: .*No such file"),
        (__file__, r"test_images\.py cannot be read"),
    ],
)
def test_what_is_no_image_is_refused(image: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
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


def test_a_strip_that_is_large_between_two_resizes_is_refused() -> None:
    """Stretched, 1 x 40 million pixels became 64 x 40 million before they became 64 x 64."""
    with pytest.raises(InputError, match="64 x 40000000 on the way to 64 x 64, at most 50,000,000 are taken"):
        prepare([Image.new("1", (1, 40_000_000))], load_card("vmamba_digits").preprocessing)


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


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def test_an_eps_by_another_name_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would start Ghostscript on it; here a program of that name leaves a trace."""
    trace, folder = tmp_path / "trace", tmp_path / "bin"
    folder.mkdir()
    for name in ("gs", "gswin32c", "gswin64c"):
        (folder / name).write_text(f"#!/bin/sh\ntouch {trace}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (tmp_path / "a.png").write_bytes(POSTSCRIPT)
    with pytest.raises(InputError, match=r"a\.png cannot be read"):
        open_image(tmp_path / "a.png")
    assert not trace.exists()
    # The test can fail: this is what Pillow does by itself.
    with contextlib.suppress(OSError), Image.open(tmp_path / "a.png") as image:
        image.load()
    assert trace.exists()


@pytest.mark.parametrize("format", ["GIF", "PPM", "TGA", "ICO", "PCX", "SGI", "PDF", "JPEG2000"])
def test_formats_that_nobody_promised_are_refused(tmp_path: Path, format: str) -> None:
    picture = Image.new("RGB", (16, 16))
    try:
        picture.save(tmp_path / "a.png", format)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow does not write {format}")
    with pytest.raises(InputError, match=r"a\.png cannot be read"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("format", FORMATS)
def test_the_others_are_read_whatever_they_are_called(tmp_path: Path, format: str) -> None:
    picture = Image.new("RGB", (16, 12), (200, 40, 90))
    picture.save(tmp_path / "a.png", format)
    assert open_image(tmp_path / "a.png").size == (16, 12)


def tiled(side: int) -> bytes:
    """A TIFF of 16 x 16 pixels that says it lies in tiles of some more."""
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 300, 325: 64}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(1000)


def test_a_tiff_in_tiles_larger_than_itself_is_refused(tmp_path: Path) -> None:
    """A tile is unpacked whole: this one would take 900 MB."""
    (tmp_path / "a.tif").write_bytes(tiled(30_000))
    with pytest.raises(InputError, match=r"a\.tif has 16 x 16 pixels in tiles of 30000 x 30000"):
        open_image(tmp_path / "a.tif")


@pytest.mark.parametrize("chunk", [b"zTXt", b"iTXt", b"iCCP"])
def test_texts_of_a_png_that_unpack_to_gigabytes_are_not_unpacked(tmp_path: Path, chunk: bytes) -> None:
    packed = zlib.compress(bytes(200_000_000), 9)
    head = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[chunk]
    plain = io.BytesIO()
    Image.new("L", (4, 4)).save(plain, "PNG")
    data = plain.getvalue()
    body = chunk + head + packed
    whole = (
        data[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + data[33:]
    )
    (tmp_path / "a.png").write_bytes(whole)
    tracemalloc.start()
    with contextlib.suppress(InputError):
        open_image(tmp_path / "a.png")
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_more_pixels_than_a_file_may_have_are_not_decoded(tmp_path: Path) -> None:
    plain = io.BytesIO()
    Image.new("L", (4, 4)).save(plain, "PNG")
    data = bytearray(plain.getvalue())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    with warnings.catch_warnings(), pytest.raises(InputError, match=r"a\.png .*pixels"):
        warnings.simplefilter("ignore")
        open_image(tmp_path / "a.png")


def test_one_image_is_a_batch_of_one(tmp_path: Path) -> None:
    """A text is no list of letters, and the rows of an image are no images."""
    path = tmp_path / "image.png"
    Image.new("RGB", (20, 30), (9, 200, 30)).save(path)
    wanted = Preprocessing(
        resize=(8, 8), fit="stretch", crop=(8, 8), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    expected = prepare([path], wanted)
    assert expected.shape == (1, 3, 8, 8)
    with Image.open(path) as opened:
        for one in (str(path), path, opened, np.asarray(opened)):
            np.testing.assert_array_equal(prepare(one, wanted), expected)
