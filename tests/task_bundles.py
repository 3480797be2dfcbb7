"""Bundles of small modules for every task; each compiled once in a test run, and not to be changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from made_once import made_once
from task_modules import Judge, Pooled, Restorer, Segmenter, Words
from torch import nn
from toy_bundles import PREPROCESSING

from quartermap_deploy.compiler import compile_module
from quartermap_deploy.data.preprocessing import Preprocessing

SEGMENTS = ("sky", "road", "tree", "house")
GREY = Preprocessing((32, 32), "stretch", (32, 32), "bilinear", (0.0,), (1.0,), "grey")
ALPHA = Preprocessing((32, 32), "cover", (32, 32), "bilinear", (0.5,) * 4, (0.5,) * 4, "rgba")


def words_bundle() -> Path:
    """int64 and bool in, float32 and int64 out."""
    return _made(
        "words", Words, {"tokens": torch.arange(24).reshape(2, 12) % 16, "keep": torch.ones(2, 12).bool()}
    )


def segmenter_bundle() -> Path:
    """An image in, logits of named classes at half its size out."""
    return _made(
        "segmenter",
        Segmenter,
        torch.randn(2, 3, 32, 32),
        task="segmentation",
        preprocessing=PREPROCESSING,
        labels=SEGMENTS,
    )


def marker_bundle() -> Path:
    """An image in, the probability of one class at every second pixel out."""
    return _made(
        "marker",
        lambda: Segmenter(1, sigmoid=True),
        torch.randn(2, 3, 32, 32),
        task="segmentation",
        preprocessing=PREPROCESSING,
    )


def restorer_bundle() -> Path:
    """A grey image in, an image out; sizes are open, and multiples of 4."""
    return _made("restorer", Restorer, torch.rand(2, 1, 32, 32), preprocessing=GREY, dynamic_size=True)


def judge_bundle() -> Path:
    """An image with alpha in, probabilities out."""
    return _made("judge", Judge, torch.randn(2, 4, 32, 32), preprocessing=ALPHA)


def pooled_bundle() -> Path:
    """An image in, its feature map and a number that belongs to no image out; without a preprocessing."""
    return _made("pooled", Pooled, torch.randn(2, 3, 32, 32))


def _made(name: str, module: Any, example: Any, **settings: Any) -> Path:
    def make(path: Path) -> None:
        torch.manual_seed(0)
        built: nn.Module = module()
        compile_module(built, example, path, name=name, **settings)

    return made_once(f"task_{name}", make)
