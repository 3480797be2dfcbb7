"""The scripts of a site by themselves, in a real browser: resizing, preparing, files and masks, against Python's."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from png_files import chunk, png_of
from web_server import serving_folder

import quartermap_deploy
from quartermap_deploy.data import pixels
from quartermap_deploy.data.images import prepare
from quartermap_deploy.data.preprocessing import INTERPOLATIONS, Preprocessing
from quartermap_deploy.pictures import mask_of

pytest.importorskip("aiohttp", reason="the extra serve is not installed")
from browser import find as find_browser
from live_browser import Page, open_page

Array = np.ndarray[Any, Any]
SOURCES = Path(quartermap_deploy.__file__).parent / "deploy" / "web_site"
PILLOW = int(Image.__version__.split(".")[0])
HELPERS = """
globalThis.bytesOf = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
globalThis.textOf = view => {
  let found = "";
  for (const byte of new Uint8Array(view.buffer, view.byteOffset, view.byteLength)) found += String.fromCharCode(byte);
  return btoa(found);
};
"""

pytestmark = pytest.mark.skipif(find_browser() is None, reason="there is no Chromium to run scripts in")


def with_scripts(work: Callable[[Page], Awaitable[None]]) -> None:
    """Open an empty page beside the scripts, in which `bytesOf` and `textOf` read and write base64."""

    async def inside(address: str) -> None:
        browser = find_browser()
        assert browser is not None
        async with open_page(browser, f"{address}page.css") as page:
            await page.evaluate(HELPERS)
            await work(page)

    with serving_folder(SOURCES) as address:
        asyncio.run(inside(address))


def packed(array: Array | bytes) -> str:
    return base64.b64encode(
        array if isinstance(array, bytes) else np.ascontiguousarray(array).tobytes()
    ).decode()


def unpacked(text: str, kind: Any) -> Array:
    return np.frombuffer(base64.b64decode(text), dtype=kind)


# Resizing ---------------------------------------------------------------------------------------------------------


def resize_cases(count: int) -> list[tuple[Array, tuple[int, int], str]]:
    """Random images of 1, 3 and 4 channels and planes of float32, of random sizes to random sizes."""
    random = np.random.default_rng(17)
    cases = []
    for number in range(count):
        size, target = random.integers(1, 70, 2), random.integers(1, 70, 2)
        # One side alone, and the same size.
        target[0] = size[0] if number % 7 == 0 else target[0]
        target[1] = size[1] if number % 5 == 0 else target[1]
        channels, interpolation = (1, 3, 4, 0)[number // 6 % 4], INTERPOLATIONS[number % 6]
        values: Array = random.integers(0, 256, (*size, max(1, channels))).astype(np.uint8)
        if number % 3 == 0:
            # Black and white, where filters that overshoot go beyond what 8 bits hold.
            values = np.where(values > 127, 255, 0).astype(np.uint8)
        if channels == 0:
            values, interpolation = random.normal(size=size).astype(np.float32), "bilinear"
        cases.append((values, (int(target[0]), int(target[1])), interpolation))
    return cases


def by_pillow(values: Array, target: tuple[int, int], interpolation: str) -> Array:
    image = Image.fromarray(values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values)
    return np.asarray(image.resize(target[::-1], Image.Resampling[interpolation.upper()]))


def test_resizing_is_pillows_to_the_last_bit() -> None:
    cases = resize_cases(240)
    described = [
        {
            "values": packed(values),
            "channels": values.shape[2] if values.ndim == 3 else 0,
            "size": values.shape[:2],
        }
        | {"target": target, "interpolation": interpolation}
        for values, target, interpolation in cases
    ]

    async def work(page: Page) -> None:
        found = await page.evaluate(
            f"""(async () => {{
                const {{ resizePixels, resizeFloats }} = await import("./resize.js");
                return {json.dumps(described)}.map(({{ values, channels, size, target, interpolation }}) => {{
                    const bytes = bytesOf(values);
                    const [given, floats] = [new Uint8ClampedArray(bytes), () => new Float32Array(bytes.buffer)];
                    if (channels === 0) return textOf(resizeFloats(floats(), size, target, {PILLOW}));
                    return textOf(resizePixels(given, channels, size, target, interpolation, {PILLOW}));
                }});
            }})()"""
        )
        for (values, target, interpolation), text in zip(cases, found, strict=True):
            expected = by_pillow(values, target, interpolation)
            made = unpacked(text, expected.dtype).reshape(expected.shape)
            np.testing.assert_array_equal(made, expected, f"{values.shape} to {target}, {interpolation}")

    with_scripts(work)


def test_until_pillow_12_the_width_came_first() -> None:
    values = np.random.default_rng(0).integers(0, 256, (60, 20, 3)).astype(np.uint8)
    expected = by_pillow(by_pillow(values, (60, 18), "bicubic"), (9, 18), "bicubic")

    async def work(page: Page) -> None:
        found = await page.evaluate(
            f"""(async () => {{
                const {{ resizePixels }} = await import("./resize.js");
                const values = new Uint8ClampedArray(bytesOf("{packed(values)}"));
                return [12, 13].map(pillow => textOf(resizePixels(values, 3, [60, 20], [9, 18], "bicubic", pillow)));
            }})()"""
        )
        older, newer = (unpacked(text, np.uint8).reshape(9, 18, 3) for text in found)
        np.testing.assert_array_equal(older, expected)
        assert not np.array_equal(newer, expected)

    with_scripts(work)


# Preparing ----------------------------------------------------------------------------------------------------------

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PREPARATIONS = (
    Preprocessing((40, 40), "cover", (36, 36), "bicubic", **IMAGENET),
    Preprocessing((33, 30), "cover", (30, 27), "bilinear", **IMAGENET, color="bgr"),
    Preprocessing((32, 24), "stretch", (32, 24), "lanczos", (0.5,), (0.25,), "grey"),
    Preprocessing((20, 31), "stretch", (17, 30), "hamming", (0.5,) * 4, (0.5,) * 4, "rgba"),
    Preprocessing((24, 24), "cover", (21, 23), "nearest", (104.0, 117.0, 123.0), (1.0,) * 3, "bgr", 1.0),
)


def test_preparing_gives_the_numbers_of_predict() -> None:
    random = np.random.default_rng(5)
    cases = [
        (random.integers(0, 256, (height, width, 4)).astype(np.uint8), settings)
        for settings in PREPARATIONS
        for height, width in ((50, 70), (71, 48), (12, 9))
    ]
    described = [
        {
            "rgba": packed(values),
            "size": values.shape[:2],
            "settings": settings.to_dict() | {"pillow": PILLOW},
        }
        for values, settings in cases
    ]

    async def work(page: Page) -> None:
        found = await page.evaluate(
            f"""(async () => {{
                const {{ prepare }} = await import("./prepare.js");
                return {json.dumps(described)}.map(({{ rgba, size, settings }}) => {{
                    const image = {{ height: size[0], width: size[1], rgba: new Uint8ClampedArray(bytesOf(rgba)) }};
                    const {{ input, shape }} = prepare(image, settings);
                    return [shape, textOf(input)];
                }});
            }})()"""
        )
        for (values, settings), (shape, text) in zip(cases, found, strict=True):
            expected = prepare([values], settings)
            assert tuple(shape) == expected.shape
            np.testing.assert_array_equal(unpacked(text, np.float32).reshape(shape), expected, str(settings))

    with_scripts(work)


# PNG files ----------------------------------------------------------------------------------------------------------


def saved(values: Array, mode: str | None = None, **settings: Any) -> bytes:
    file, image = io.BytesIO(), Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(file, "PNG", **settings)
    return file.getvalue()


def png_files() -> dict[str, bytes]:
    random = np.random.default_rng(3)
    smooth = (np.add.outer(np.arange(37), np.arange(29))[..., None] * [2, 3, 1, 5] % 256).astype(np.uint8)

    def samples(depth: int, channels: int) -> Array:
        return random.integers(0, 1 << depth, (21, 13, channels))

    palette = chunk(b"PLTE", random.integers(0, 256, 48).astype(np.uint8).tobytes())
    files = {
        "RGB": saved(smooth[..., :3]),
        "RGBA": saved(smooth),
        "L": saved(smooth[..., 0]),
        "LA": saved(smooth, "LA"),
        "1": saved(smooth[..., 0], "1"),
        "P": saved(smooth[..., :3], "P"),
        "P, transparent": saved(smooth[..., :3], "P", transparency=bytes(range(0, 250, 5))),
        "RGB, a transparent colour": saved(smooth[..., :3], transparency=tuple(map(int, smooth[4, 7, :3]))),
        "I;16": saved(random.integers(0, 65536, (9, 11)).astype(np.uint16)),
    }
    for color, channels, depths in ((0, 1, (1, 2, 4, 8)), (2, 3, (8, 16)), (4, 2, (8, 16)), (6, 4, (8, 16))):
        for depth in depths:
            for interlaced in (False, True):
                name = f"colour {color}, {depth} bits{', interlaced' if interlaced else ''}"
                files[name] = png_of(samples(depth, channels), depth, color, interlaced=interlaced)
    for depth in (1, 2, 4):
        files[f"palette, {depth} bits"] = png_of(samples(depth, 1), depth, 3, more=palette)
    return files


def test_png_files_are_decoded_as_pillow_does() -> None:
    files = png_files()

    async def work(page: Page) -> None:
        found = await page.evaluate(
            f"""(async () => {{
                const {{ decodePng }} = await import("./png.js");
                const found = [];
                for (const text of {json.dumps([packed(data) for data in files.values()])}) {{
                    const {{ height, width, rgba }} = await decodePng(bytesOf(text));
                    found.push([height, width, textOf(rgba)]);
                }}
                return found;
            }})()"""
        )
        for (name, data), (height, width, text) in zip(files.items(), found, strict=True):
            made = unpacked(text, np.uint8).reshape(height, width, 4)
            opened = Image.open(io.BytesIO(data))
            np.testing.assert_array_equal(made, np.asarray(pixels.with_mode(opened, "RGBA")), name)

    with_scripts(work)


def damaged_files() -> dict[str, tuple[bytes, str]]:
    whole = saved(np.zeros((40, 40, 3), np.uint8))
    huge = png_of(np.zeros((1, 1, 3)), 8, 2).replace(
        struct.pack(">II", 1, 1), struct.pack(">II", 60_000, 60_000)
    )
    data = whole.index(b"IDAT") + 4
    return {
        "cut": (whole[: data + 5], "ends too early"),
        "pixels": (whole[:data] + b"\xff" * 20 + whole[data + 20 :], "damaged"),
        "kind": (whole.replace(b"\x08\x02\0\0\0", b"\x07\x02\0\0\0", 1), "a kind that PNG does not have"),
        "huge": (huge, "60000 × 60000 pixels"),
        "short": (
            png_of(np.zeros((2, 2, 3)), 8, 2).replace(struct.pack(">II", 2, 2), struct.pack(">II", 9, 9)),
            "too early",
        ),
        "text": (b"GIF89a, or nearly", "no PNG, JPEG, WebP or BMP"),
        "JPEG in name": (b"\xff\xd8\xff\xe0 and no more", "damaged"),
        "empty": (b"", "no PNG, JPEG, WebP or BMP"),
    }


def test_damaged_files_say_what_is_wrong() -> None:
    files = damaged_files()

    async def work(page: Page) -> None:
        found = await page.evaluate(
            f"""(async () => {{
                const {{ decode }} = await import("./decode.js");
                const found = [];
                for (const text of {json.dumps([packed(data) for data, _ in files.values()])}) {{
                    found.push(await decode(bytesOf(text), false).then(() => "read", error => error.message));
                }}
                return found;
            }})()"""
        )
        for (name, (_, expected)), message in zip(files.items(), found, strict=True):
            assert expected in message, (name, message)

    with_scripts(work)


# Other files, and what is told of them ------------------------------------------------------------------------------


def told_files() -> dict[str, tuple[bytes, list[str]]]:
    """Files, and a part of each note about them, for a model without transparency."""
    colours = np.zeros((16, 24, 4), np.uint8)
    colours[:, :12], colours[..., 3] = (200, 40, 20, 0), 255
    turned = Image.Exif()
    turned[0x0112] = 6
    clear = colours.copy()
    clear[:4, :, 3] = 90

    def of(values: Array, kind: str, **settings: Any) -> bytes:
        file, image = io.BytesIO(), Image.fromarray(values)
        image = image.convert("CMYK") if settings.pop("inks", False) else image
        image.save(file, kind, **settings)
        return file.getvalue()

    rgb = np.ascontiguousarray(colours[..., :3])
    return {
        "PNG": (of(rgb, "PNG"), []),
        "PNG, alpha": (of(clear, "PNG"), ["takes no transparency"]),
        "PNG, 16 bits": (png_of(np.full((2, 2, 1), 40_000), 16, 0), ["upper 8"]),
        "PNG, turned": (of(rgb, "PNG", exif=turned), ["as it is stored"]),
        "JPEG": (of(rgb, "JPEG"), []),
        "JPEG, turned": (of(rgb, "JPEG", exif=turned), ["Turned upright"]),
        "JPEG, inks": (of(rgb, "JPEG", inks=True), ["CMYK"]),
        "BMP": (of(rgb, "BMP"), []),
        "WebP": (of(rgb, "WEBP", lossless=True), []),
        "WebP, alpha": (of(clear, "WEBP", lossless=True), ["takes no transparency", "rounds the colours"]),
    }


def test_what_a_file_has_beside_pixels_is_used_or_told() -> None:
    files = told_files()

    texts = json.dumps({name: packed(data) for name, (data, _) in files.items()})

    async def work(page: Page) -> None:
        found = await page.evaluate(
            f"""(async () => {{
                const {{ decode }} = await import("./decode.js");
                const found = {{}};
                for (const [name, text] of Object.entries({texts})) {{
                    const {{ height, width, rgba, notes }} = await decode(bytesOf(text), false);
                    found[name] = {{ height, width, rgba: textOf(rgba), notes }};
                }}
                return found;
            }})()"""
        )
        for name, (data, notes) in files.items():
            made = found[name]
            assert len(made["notes"]) == len(notes), (name, made["notes"])
            assert all(part in note for part, note in zip(notes, made["notes"], strict=True)), made["notes"]
            values = unpacked(made["rgba"], np.uint8).reshape(made["height"], made["width"], 4)
            expected = np.asarray(pixels.with_mode(Image.open(io.BytesIO(data)), "RGBA"))
            if name in ("PNG", "PNG, alpha", "PNG, 16 bits", "PNG, turned", "BMP", "WebP"):
                np.testing.assert_array_equal(values, expected, name)
            elif name == "JPEG":
                assert np.abs(values.astype(int) - expected).max() <= 2
            elif name == "JPEG, turned":
                # A quarter turn to the right.
                assert np.abs(values.astype(int) - np.rot90(expected, -1)).max() <= 2

    with_scripts(work)


# Masks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["softmax", "none"])
def test_masks_are_those_of_predict(activation: Any) -> None:
    random = np.random.default_rng(9)
    cases = [
        random.normal(size=(classes, *size)).astype(np.float32)
        for classes in (1, 4)
        for size in ((8, 6), (16, 12))
    ]
    described = [{"data": packed(values), "dims": [1, *values.shape]} for values in cases]

    async def work(page: Page) -> None:
        found = await page.evaluate(
            f"""(async () => {{
                const {{ maskOf }} = await import("./answer.js");
                return {json.dumps(described)}.map(({{ data, dims }}) => textOf(
                    maskOf({{ data: new Float32Array(bytesOf(data).buffer), dims }}, [16, 12], "{activation}", {PILLOW})
                ));
            }})()"""
        )
        for values, text in zip(cases, found, strict=True):
            expected = mask_of(values, (16, 12), activation)
            np.testing.assert_array_equal(unpacked(text, np.uint16).reshape(16, 12), expected)

    with_scripts(work)
