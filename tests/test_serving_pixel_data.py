"""Image files without what is no pixel: the same pixels, and none of what a stranger can put beside them."""

from __future__ import annotations

import dataclasses
import io
import os
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hostile import comment_bomb, images, jpeg, peak_memory, png, scan_bomb, segment, split_pixels
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from png_files import chunk, png_of

import quartermap_deploy as qm
from quartermap_deploy.data.images import prepare
from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.serving.images import MOST_HELD, ImageFile
from quartermap_deploy.serving.pixel_data import DamagedError, pixel_data
from quartermap_deploy.serving.refusal import Refusal

DIGITS = qm.load_card("vmamba_digits").preprocessing
NOISE = np.random.default_rng(0).integers(0, 256, (37, 53, 4), np.uint8)


def with_color(color: str) -> Preprocessing:
    channels = {"rgba": 4, "grey": 1}.get(color, 3)
    return dataclasses.replace(DIGITS, color=color, mean=(0.5,) * channels, std=(0.5,) * channels)


def saved(image: Image.Image, kind: str, **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def refusal(data: bytes) -> str:
    with pytest.raises(Refusal) as caught:
        ImageFile(data, DIGITS, 1).prepare()
    assert caught.value.status == 400
    return caught.value.message


def interlaced() -> bytes:
    """A PNG of noise in the seven passes of Adam7, which Pillow only reads."""
    return png_of(NOISE[..., :1], 8, 0, interlaced=True)


def files() -> dict[str, bytes]:
    noise = Image.fromarray(NOISE)
    palette = noise.convert("RGB").quantize(16)
    seen = PngImagePlugin.PngInfo()
    seen.add_text("a", "b" * 1000, zip=True)
    seen.add_itxt("c", "d" * 1000, zip=True)
    seen.add_text("e", "f")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "upside down"
    everything = {"exif": exif, "icc_profile": b"profile" * 20_000, "dpi": (300, 300)}
    found = {
        f"PNG {mode}": saved(noise.convert(mode), "PNG") for mode in ("1", "L", "LA", "RGB", "RGBA", "P")
    }
    found |= {
        "PNG of 16 bits": saved(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257), "PNG"),
        "PNG with a palette and transparency": saved(palette, "PNG", transparency=bytes(range(16))),
        "PNG with a transparent colour": saved(noise.convert("RGB"), "PNG", transparency=(1, 2, 3)),
        "PNG with everything": saved(noise, "PNG", pnginfo=seen, **everything),
        "PNG of frames": saved(
            noise, "PNG", save_all=True, append_images=[noise.rotate(90), noise.rotate(180)]
        ),
        "PNG of frames behind a still image": saved(
            noise, "PNG", save_all=True, append_images=[noise.rotate(90)], default_image=True
        ),
        "PNG in passes": interlaced(),
        "PNG in pieces": saved(noise.resize((700, 700)), "PNG", compress_level=0),
    }
    for mode in ("L", "RGB", "CMYK"):
        found[f"JPEG {mode}"] = saved(noise.convert(mode), "JPEG")
        found[f"JPEG {mode}, progressive"] = saved(noise.convert(mode), "JPEG", progressive=True)
    found |= {
        "JPEG 4:4:4 with everything": saved(
            noise.convert("RGB"), "JPEG", subsampling=0, comment=b"\xff\xda" * 99, **everything
        ),
        "JPEG of RGB": saved(noise.convert("RGB"), "JPEG", keep_rgb=True),
        "JPEG with restarts": saved(noise.convert("RGB"), "JPEG", restart_marker_blocks=1),
        "JPEG that is one of several": saved(
            noise.convert("RGB"), "MPO", save_all=True, append_images=[noise.convert("RGB").rotate(9)]
        ),
        "JPEG with a film behind it": saved(noise.convert("RGB"), "JPEG") + b"\xff\xda\xff\xff" * 10_000,
    }
    return found


@pytest.mark.parametrize("name", files())
@pytest.mark.parametrize("color", ["rgb", "rgba", "grey", "bgr"])
def test_pixels_are_those_that_pillow_finds_in_the_whole_file(name: str, color: str) -> None:
    data = files()[name]
    settings = with_color(color)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            expected = prepare([image], settings)[0]
        for given in (data, bytearray(data)):
            assert np.array_equal(ImageFile(given, settings, 1).prepare(), expected)
    found = pixel_data(data)
    beside = b"".join(bytes(part) for part in found.parts)
    for text in (b"upside", b"profile", b"acTL", b"fdAT", b"zTXt", b"iTXt", b"MPF"):
        assert text not in beside


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_greys_become_what_their_colours_would(interpolation: str) -> None:
    """They are resized in one channel instead of three that are the same."""
    order = random.Random(0)
    for _ in range(20):
        size = order.randint(1, 150), order.randint(1, 150)
        settings = dataclasses.replace(
            with_color(order.choice(["rgb", "bgr"])),
            interpolation=interpolation,
            fit=order.choice(["cover", "stretch"]),
            resize=(order.randint(20, 60), order.randint(20, 60)),
            crop=(20, 20),
        )
        grey = Image.fromarray(NOISE).resize(size).convert(order.choice(["1", "L"]))
        expected = prepare([grey.convert("RGB")], settings)[0]
        assert np.array_equal(ImageFile(saved(grey, "PNG"), settings, 1).prepare(), expected)


@pytest.mark.parametrize(
    ("make", "color", "held"),
    [
        (lambda: png(7000, 7000), "rgb", 196),
        (lambda: png(5000, 5000, color=6), "rgb", 200),
        (lambda: png(5000, 5000, color=6), "rgba", 200),
        (lambda: png(5000, 5000), "rgba", 200),
        (lambda: png(5000, 5000), "grey", 125),
        (lambda: png(7000, 7000, color=0), "rgb", 49),
        (lambda: png(5000, 5000, color=0), "rgba", 200),
        (lambda: png(7000, 7000, color=0), "grey", 49),
        (lambda: png(4000, 4000, color=0, depth=16), "rgb", 144),
        (lambda: png(6000, 6000, color=3), "rgb", 180),
        (lambda: jpeg(7000, 7000), "rgb", 196),
        (lambda: jpeg(2000, 2000, "L"), "grey", 4),
        (lambda: jpeg(2000, 2000, "CMYK"), "rgb", 32),
        (lambda: jpeg(5000, 5000, progressive=True), "rgb", 175),
        (lambda: jpeg(4000, 4000, progressive=True, subsampling=0), "rgb", 160),
    ],
)
def test_what_decoding_takes_is_known_before(make: Callable[[], bytes], color: str, held: int) -> None:
    """And it is at least what is there at the most, but for some megabytes."""
    data, settings = make(), with_color(color)
    known = ImageFile(data, settings, 1).held
    assert held * 1e6 <= known < (held + 10) * 1e6
    try:
        # The peak begins anew.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("only Linux tells how much memory a process has")
    before = peak_memory(os.getpid())
    ImageFile(data, settings, 1).prepare()
    assert peak_memory(os.getpid()) - before < known + 15e6


def test_what_takes_too_much_memory_is_refused_before_it_is_decoded() -> None:
    assert "at most 50,000,000" in refusal(png(8000, 7000))
    most = f"at most {MOST_HELD // 10**6}"
    large = jpeg(6000, 6000, progressive=True, subsampling=0)
    # Larger on the way than anything that is taken, and larger than the memory for it.
    assert "64 x 50000000 on the way to 64 x 64" in refusal(png(1, 50_000_000, color=0))
    for data in (png(50_000_000, 1), png(6000, 6000, color=6), large):
        message = refusal(data)
        assert "to decode and resize" in message and most in message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"", "is empty"),
        (lambda: b"\x89PNG\r\n\x1a\n", "has no pixels"),
        (lambda: png(8, 8)[:40], "has no pixels"),
        (lambda: png(8, 8).replace(b"IDAT", b"IDAX"), "has no pixels"),
        (lambda: png(0, 8), "has no pixels"),
        (lambda: png(8, 8, chunk(b"PLTE", bytes(900))), "damaged PLTE"),
        (lambda: png(8, 8, chunk(b"PLTE", bytes(9)), chunk(b"PLTE", bytes(9))), "damaged PLTE"),
        (lambda: png(8, 8, chunk(b"tRNS", bytes(257))), "damaged tRNS"),
        (lambda: png(8, 8)[:20], "has no pixels"),
        (lambda: png(8, 8, chunk(b"tEXt", b"") * 5000), "too many parts"),
        (lambda: split_pixels(5000), "too many parts"),
        (lambda: comment_bomb(20_000), "too many parts"),
        (lambda: jpeg(8, 8)[:2] + b"\0" * 100_000 + jpeg(8, 8)[2:], "too many parts"),
        (lambda: b"\xff\xd8", "has no pixels"),
        (lambda: b"\xff\xd8\xff\xd9", "has no pixels"),
        (lambda: jpeg(8, 8)[:300], "has no pixels"),
        (lambda: b"\xff\xd8" + segment(0xC0, bytes(15)) + jpeg(8, 8)[2:], "has no pixels"),
        (lambda: jpeg(8, 8)[:2] + jpeg(8, 8)[2:].replace(b"\xff\xc0", b"\xff\xc3"), "has no pixels"),
        (lambda: scan_bomb(200, 600), "more than 500 scans"),
        (lambda: scan_bomb(4000, 80), "more than 62 scans"),
        (lambda: jpeg(64, 64)[:-2] + b"\xff" * 100 + b"\xff\xd9", "filling"),
        (lambda: jpeg(64, 64, progressive=True)[:-2] + b"\xff" * 100 + b"\xff\xd9", "filling"),
        (lambda: b"RIFF....WEBPVP8 ", "neither JPEG nor PNG"),
        (lambda: b"P6 9999 9999 255 ", "neither JPEG nor PNG"),
        (lambda: images()["EPS named .png"](), "neither JPEG nor PNG"),
        (lambda: images()["TIFF with 60,000 odd tags"](), "neither JPEG nor PNG"),
    ],
)
def test_files_that_are_no_images(make: Callable[[], bytes], message: str) -> None:
    assert message in refusal(make())


def test_a_second_frame_is_not_taken_for_the_first() -> None:
    """Its size would be another one than that which was looked at."""
    whole = jpeg(8, 8)
    start = whole.index(b"\xff\xc0")
    frame = whole[start : start + 19]
    large = frame[:5] + struct.pack(">HH", 60_000, 60_000) + frame[9:]
    assert "more than one frame" in refusal(whole[:start] + frame + large + whole[start + 19 :])
    behind = whole[:-2] + large + whole[start + 19 :]
    with pytest.raises(Refusal):
        ImageFile(behind, DIGITS, 1).prepare()


@given(st.data())
def test_damaged_files_are_refused_or_decoded_and_nothing_else(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(files())))
    given = bytearray(files()[name][:20_000])
    for _ in range(data.draw(st.integers(0, 6))):
        place = data.draw(st.integers(0, len(given) - 1))
        given[place] = data.draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
    del given[data.draw(st.just(len(given)) | st.integers(0, len(given))) :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert np.isfinite(ImageFile(given, DIGITS, 1).prepare()).all()
        except Refusal as refused:
            assert refused.status == 400


def test_headers_are_read_in_no_time() -> None:
    """What is no pixel is stepped over: 60 MB of profile and of text cost no more than none."""
    import time

    profile = b"".join(segment(0xE2, b"ICC_PROFILE\0" + bytes(65_000)) for _ in range(900))
    for data in (jpeg(8, 8)[:2] + profile + jpeg(8, 8)[2:], png(8, 8, chunk(b"iCCP", bytes(60 << 20)))):
        start = time.process_time()
        assert pixel_data(data).image == 256
        assert time.process_time() - start < 0.1


def test_the_parts_are_read_as_a_file() -> None:
    found = pixel_data(files()["PNG with everything"])
    whole = b"".join(bytes(part) for part in found.parts)
    file = found.open()
    assert file.read(0) == b"" and file.read(5) == whole[:5] and file.tell() == 5
    assert file.seek(-3, io.SEEK_END) == len(whole) - 3 and file.read() == whole[-3:] and file.read(1) == b""
    file.seek(10)
    assert b"".join(iter(lambda: file.read(7), b"")) == whole[10:]
    with pytest.raises(DamagedError):
        pixel_data(b"GIF89a")
