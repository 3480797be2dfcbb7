"""Modules that are not ours with open height and width: right at every size that is taken, refused at all others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scan_modules import CHANNELS, Stacked
from torch import Tensor, nn
from torch.nn import functional

import quartermap_deploy as qm
from quartermap_deploy.errors import ExportError, InputError
from quartermap_deploy.sources.cases import batch_case, size_cases
from quartermap_deploy.sources.modules import ModuleSource, module_source
from quartermap_deploy.tensor_info import TensorInfo


class Padded(nn.Module):
    """Pads the image to multiples of 4, scans a map of half the resolution, and cuts the padding off again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, CHANNELS, 1)
        self.blocks = nn.Sequential(Stacked(), Stacked(seed=1))
        self.head = nn.Conv2d(CHANNELS, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        y = functional.pad(x, (0, (4 - width % 4) % 4, 0, (4 - height % 4) % 4))
        y = self.blocks(self.stem(functional.pixel_unshuffle(y, 2)))
        return functional.pixel_shuffle(self.head(y), 2)[..., :height, :width]


class Pooled(nn.Module):
    """Pools to 3×3, which is taken apart into as many additions as the size of the example asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = Stacked()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mixer(x)
        return y + functional.interpolate(functional.adaptive_avg_pool2d(y, 3), size=y.shape[2:])


class Table(nn.Module):
    """Adds a table of positions, resized only where it has another size than the map."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.table = Stacked(), nn.Parameter(torch.ones(1, CHANNELS, 8, 12))

    def forward(self, x: Tensor) -> Tensor:
        table: Tensor = self.table
        if table.shape[2:] != x.shape[2:]:
            table = functional.interpolate(table, size=x.shape[2:], mode="bilinear")
        y: Tensor = self.mixer(x + table)
        return y


def opened(module: nn.Module, *shape: int) -> ModuleSource:
    return module_source(module, torch.randn(*shape), dynamic_size=True)


def test_a_padding_module_is_right_at_every_size_and_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Padded().eval()
    example = torch.randn(1, 1, 12, 8)
    bundle = qm.compile_module(module, example, tmp_path / "out", dynamic_size=True)
    cases = {case["name"] for case in bundle.report["cases"]}
    assert {"three examples", "another size", "an odd size"} <= cases
    assert cases.difference(bundle.manifest["golden"]) == {"three examples", "another size", "an odd size"}
    for size in ((12, 8), (8, 12), (9, 7), (16, 20), (25, 4), (2, 3)):
        for batch in (1, 2, 5):
            x = torch.randn(batch, 1, *size)
            with torch.no_grad():
                expected = module(x).numpy()
            np.testing.assert_allclose(
                bundle.run(x.numpy()), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
            )
    # What torch takes for granted of sizes of 1 stands nowhere.
    for side in ((1, 8), (8, 1)):
        with pytest.raises(InputError, match=r"x\[[23]\] > 1"):
            bundle.run(np.zeros((1, 1, *side), np.float32))


def test_what_an_operator_decides_by_the_size_when_it_is_taken_apart_is_a_rule() -> None:
    source = opened(Pooled(), 2, CHANNELS, 12, 8)
    traced = source.trace()
    assert "(x[2] % 3) == 0" in traced.rules
    with pytest.raises(
        ExportError, match=r"no other size than the example's.*x\[2\] % 3.*dynamic_size=False"
    ):
        source.further_cases(traced)


def test_a_size_that_the_module_fixes_is_named() -> None:
    with pytest.raises(
        ExportError, match=r"fixes what was to be open: x\[2\] at 8, x\[3\] at 12\..*another size"
    ):
        opened(Table(), 2, CHANNELS, 8, 12).trace()
    source = opened(Table(), 2, CHANNELS, 10, 14)
    assert set(source.further_cases(source.trace())) == {"another size", "an odd size"}


def info(name: str, *shape: int | str) -> TensorInfo:
    return TensorInfo(name, shape, "float32")


def test_a_batch_of_one_becomes_three_different_entries() -> None:
    inputs = (info("x", "batch", 3), info("scale", "batch"), info("fixed", 2, 2))
    example = {
        "x": np.array([[1, 2, 3]], np.float32),
        "scale": np.array([7], np.float32),
        "fixed": np.eye(2, dtype=np.float32),
    }
    feeds = batch_case(inputs, example)
    assert feeds is not None
    np.testing.assert_array_equal(feeds["x"], [[1, 2, 3], [3, 2, 1], [3, 1, 2]])
    np.testing.assert_array_equal(feeds["scale"], [7, 7, 7])
    assert feeds["fixed"] is example["fixed"]
    assert batch_case(inputs[2:], example) is None
    assert batch_case(inputs, {**example, "x": np.zeros((2, 3), np.float32)}) is None


def test_inputs_of_two_sizes_are_resized_together() -> None:
    inputs = (
        info("image", 1, 1, "height", "width"),
        info("small", 1, 1, "small_height", "small_width"),
        info("vector", 1, 4),
    )
    example = {
        "image": np.arange(32, dtype=np.float32).reshape(1, 1, 4, 8),
        "small": np.zeros((1, 1, 2, 4), np.float32),
        "vector": np.ones((1, 4), np.float32),
    }
    found = size_cases(inputs, example, lambda feeds: True)
    assert found["another size"]["image"].shape == (1, 1, 8, 4)
    assert found["another size"]["small"].shape == (1, 1, 4, 2)
    assert found["an odd size"]["image"].shape == (1, 1, 5, 11)
    np.testing.assert_array_equal(found["an odd size"]["image"][0, 0, 4, 8:], [0, 1, 2])
    only = size_cases(inputs, example, lambda feeds: feeds["image"].shape[2:] == (4, 16))
    assert {name: feeds["small"].shape[2:] for name, feeds in only.items()} == {"another size": (2, 8)}
