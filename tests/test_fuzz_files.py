"""Small files of every kind that is read, damaged in thousands of ways: an error of ours, or none, and little memory.

The ways are the same at every run; QUARTERMAP_FUZZ_EXAMPLES says how many for each kind (`make fuzz` takes many), and
QUARTERMAP_FUZZ_SEED others.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_bundles
from evaluation_data import medmnist_file
from hostile_reader import Outcome, read_by_another_process
from PIL import Image
from safetensors.torch import save

from quartermap_deploy.architectures import create_model
from quartermap_deploy.bundle import MANIFEST, MODEL

ROOT = Path(__file__).parents[1]
EXAMPLES = int(os.environ.get("QUARTERMAP_FUZZ_EXAMPLES", "60"))
SEED = os.environ.get("QUARTERMAP_FUZZ_SEED", "0")
MEMORY, IMAGE_MEMORY = 300, 1600
"""MiB that reading one of the files may take, whatever became of it. Images may have 179 million pixels."""
SECONDS = 30
"""How long one may take; most take milliseconds."""

WORDS = (
    *(
        b"null",
        b"true",
        b"-1",
        b"0",
        b"1e999",
        b"NaN",
        b"9" * 30,
        b"9" * 5000,
        b"[]",
        b"{}",
        b'""',
        b'"\\u0000"',
    ),
    *(
        b'"\\ud800"',
        b"1979-05-27",
        b"0x" + b"f" * 40,
        b"[" * 500,
        b'{"a":' * 500,
        b'"../../x"',
        b'"/etc/passwd"',
    ),
    *(b'"\x1b[2J"', b"a." * 300, b"'''", b'"""', b"[[model]]", b"[model]", b"inf", b"nan", b"4294967296"),
)
NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


def damaged(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """The same file with one to six things changed."""
    for _ in range(chance.randint(1, 6)):
        place, length = chance.randrange(len(data) + 1), chance.choice((1, 2, 4, 8, 64, 1000))
        before, after = data[:place], data[place:]
        kind = chance.randrange(9)
        if kind == 0:
            data = before + bytes(chance.getrandbits(8) for _ in range(length)) + after[length:]
        elif kind == 1:
            data = before
        elif kind == 2:
            data = before + after[length:]
        elif kind == 3:
            data = before + after[:length] * chance.choice((2, 3, 50)) + after[length:]
        elif kind == 4:
            width = chance.choice((1, 2, 4, 8))
            number = chance.choice(NUMBERS) & ((1 << 8 * width) - 1)
            data = before + number.to_bytes(width, chance.choice(("little", "big"))) + after[width:]
        elif kind == 5:
            data = before + chance.choice(WORDS) + after
        elif kind == 6:
            other = chance.choice(others)
            start = chance.randrange(len(other) + 1)
            data = before + other[start : start + length] + after[length:]
        elif kind == 7 and place < len(data):
            data = before + bytes([after[0] ^ (1 << chance.randrange(8))]) + after[1:]
        else:
            data = other_value(data, chance)
    return data


def other_value(data: bytes, chance: random.Random) -> bytes:
    """A file of JSON or TOML with another value in the place of one."""
    values = list(re.finditer(rb'(?<=[:=\[,])\s*("[^"\n]*"|[-+.\w]+|\[[^\[\]]*\]|\{[^{}]*\})', data))
    if not values:
        return data
    found = chance.choice(values)
    return data[: found.start()] + b" " + chance.choice(WORDS) + data[found.end() :]


def checkpoints(suffix: str) -> list[bytes]:
    state = create_model("vmamba_digits").state_dict()
    small = {key: tensor for key, tensor in state.items() if tensor.numel() < 3000}
    if suffix == ".safetensors":
        return [save(small), save({"a": torch.zeros(2, 3)})]
    made = []
    for content in (
        small,
        {"model": small, "epoch": 3, "args": {"lr": 0.1}},
        {"a": torch.nn.Parameter(torch.ones(2))},
    ):
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            made.append(file.getvalue())
    return made


def images(*formats: str) -> list[bytes]:
    made = []
    values = np.random.default_rng(0).integers(0, 255, (24, 20, 4)).astype(np.uint8)
    for format in formats:
        for mode in ("L", "RGB", "RGBA", "P", "I;16"):
            picture = Image.fromarray(values).convert("RGB" if mode == "P" else mode.replace("I;16", "L"))
            picture = picture.convert(mode) if mode in ("P", "I;16") else picture
            file = io.BytesIO()
            try:
                picture.save(file, format)
            except (OSError, KeyError):
                continue
            made.append(file.getvalue())
    return made


def tiffs() -> list[bytes]:
    made = images("TIFF")
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        file = io.BytesIO()
        Image.new("RGB", (40, 30), (9, 8, 7)).save(file, "TIFF", compression=compression)
        made.append(file.getvalue())
    return made


def arrays() -> list[bytes]:
    made = []
    for write in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        write(file, a=np.arange(12.0).reshape(3, 4), b=np.array([True]), c=np.zeros((0, 2), np.uint8))
        made.append(file.getvalue())
    return made


def recipes() -> list[bytes]:
    module = """
[module]
factory = "a:b"
example = { x = [1, 3, 8, 8] }
arguments = { a = [1, 2.5], b.c = "d" }
stages = [2, 2]

[preprocessing]
mean = [0.5]
std = [0.5]
color = "grey"

[engine]
profiles = [{ batch = [1, 8, 32] }]

[quartermap]
blocks = [1, 2]
stride = 2

[export]
precision = "float16"
keep_float32 = ["a.b"]
"""
    return [path.read_bytes() for path in sorted((ROOT / "export").glob("*.toml"))[:4]] + [module.encode()]


def results() -> list[bytes]:
    entry = {"name": "a", "top1": 0.5, "classes": [1, 2], "rounds": [[0.1, 0.2]], "model": {"name": "a"}}
    return [json.dumps(value).encode() for value in (entry, [entry, entry], {"command": "eval", **entry})]


def bundle_file(name: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [(toy_bundles.classifier() / name).read_bytes()]


SEEDS: dict[str, Callable[[Path], list[bytes]]] = {
    ".pth": lambda folder: checkpoints(".pth"),
    ".safetensors": lambda folder: checkpoints(".safetensors"),
    ".png": lambda folder: images("PNG", "WEBP", "BMP"),
    ".jpg": lambda folder: images("JPEG"),
    ".tif": lambda folder: tiffs(),
    ".npz": lambda folder: arrays(),
    ".medmnist": lambda folder: [medmnist_file(folder / "seed.npz").read_bytes()],
    ".toml": lambda folder: recipes(),
    ".results": lambda folder: results(),
    ".manifest": bundle_file(MANIFEST),
    ".onnx": bundle_file(MODEL),
}


def written(folder: Path, suffix: str) -> list[Path]:
    """Write the damaged files of a kind, and return what is read."""
    chance = random.Random(f"{SEED} {suffix}")
    seeds = SEEDS[suffix](folder)
    paths = []
    for number in range(EXAMPLES):
        path = folder / f"{number}{suffix}"
        data = damaged(chance.choice(seeds), chance, seeds)
        if suffix == ".manifest":
            path.mkdir()
            (path / MANIFEST).write_bytes(data)
        else:
            path.write_bytes(data)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Path, Outcome]]]:
    """What came of each file, all read by one process, which takes a while to start."""
    folder = tmp_path_factory.mktemp("fuzz")
    files: dict[str, list[Path]] = {}
    for suffix in SEEDS:
        (folder / suffix[1:]).mkdir()
        files[suffix] = written(folder / suffix[1:], suffix)
    before = contents(folder)
    found = iter(
        read_by_another_process([path for paths in files.values() for path in paths], timeout=36_000)
    )
    assert contents(folder) == before
    read = {suffix: [(path, next(found)) for path in paths] for suffix, paths in files.items()}
    failed = [path for pairs in read.values() for path, outcome in pairs if failure(path, outcome)]
    if not failed:
        shutil.rmtree(folder)
    return read


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def failure(path: Path, outcome: Outcome) -> str | None:
    """What should not have come of a file; None if all is well."""
    if outcome.defect is not None:
        return outcome.defect
    if outcome.peak > (IMAGE_MEMORY if path.suffix in (".png", ".jpg", ".tif") else MEMORY):
        return f"{outcome.peak:.0f} MiB"
    return f"{outcome.seconds:.1f} s" if outcome.seconds > SECONDS else None


@pytest.mark.parametrize("suffix", SEEDS)
def test_damaged_files_end_in_an_error_of_ours(
    outcomes: dict[str, list[tuple[Path, Outcome]]], suffix: str
) -> None:
    failures = {str(path): found for path, outcome in outcomes[suffix] if (found := failure(path, outcome))}
    assert not failures, json.dumps(failures, indent=1)[:3000]


def test_some_are_refused_and_the_seeds_are_not(tmp_path: Path) -> None:
    """What is damaged must still be near what is read, or nothing is tried but the first check."""
    suffixes = (".png", ".npz", ".toml", ".onnx", ".medmnist")
    paths = []
    for suffix in suffixes:
        path = tmp_path / f"seed{suffix}"
        path.write_bytes(SEEDS[suffix](tmp_path)[0])
        paths.append(path)
    assert [outcome.message for outcome in read_by_another_process(paths)] == [None] * len(paths)


def test_zip_files_stay_near_their_kind() -> None:
    """Of the damaged archives a fair part can still be opened, so that what is in them is reached."""
    chance, seeds = random.Random(1), arrays()
    opened = 0
    for _ in range(100):
        try:
            zipfile.ZipFile(io.BytesIO(damaged(seeds[0], chance, seeds)))
            opened += 1
        except Exception:
            continue
    assert opened > 10
