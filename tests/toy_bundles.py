"""Bundles of the toy modules, each compiled once in a test run; tests must not change them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import toy_modules
from made_once import made_once

from quartermap_deploy.compiler import compile_module
from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.pruning import QuarterMap

NAMES = tuple(f"digit {digit}" for digit in range(10))
PREPROCESSING = Preprocessing(
    resize=(32, 32), fit="stretch", crop=(32, 32), interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3
)
FACTORY = "toy_modules:Classifier"
"""What makes the classifier anew, where the folder of the tests is one to import from."""


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classifier() -> Path:
    """A classifier of 32x32 images in ten named classes, whose second of two blocks is pruned."""
    return _bundle(
        "toy_classifier",
        toy_modules.Classifier,
        _random(2, 3, 32, 32),
        quartermap=QuarterMap(blocks=(2,)),
        preprocessing=PREPROCESSING,
        labels=NAMES,
    )


def change() -> Path:
    """Two images in, a map and a number out; one block, which is called twice."""
    return _bundle("toy_change", toy_modules.Change, (_random(2, 3, 32, 48), _random(2, 3, 32, 48, seed=1)))


def sequences() -> Path:
    """A classifier of sequences, of a batch of 2 alone, with a reference from elsewhere: here, the module itself."""
    tokens = _random(2, 20, toy_modules.WIDTH)
    with torch.no_grad():
        logits = toy_modules.Sequences().eval()(tokens)
    return _bundle(
        "toy_sequences",
        toy_modules.Sequences,
        tokens,
        dynamic_batch=False,
        reference=(tokens, logits),
    )


def _bundle(name: str, make: Callable[[], torch.nn.Module], example: Any, **settings: Any) -> Path:
    return made_once(name, lambda path: compile_module(make(), example, path, **settings))
