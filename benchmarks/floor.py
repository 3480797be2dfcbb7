"""Models with the scan taken out, to measure what everything else costs.

The floor replaces the scan by x·ΣD + dt[:, :d_inner]: every projection, the low-rank time step's included, is still
computed, and the output has the scan's shape. What a model takes beyond its floor is what its scan costs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import onnx
import torch
from torch import Tensor

from quartermap_deploy.architectures import ss2d
from quartermap_deploy.lowering.operator import ATTRIBUTES_2D, INPUTS_2D, SELECTIVE_SCAN_2D
from quartermap_deploy.lowering.writer import Writer, ints, scan_function
from quartermap_deploy.scan.definition import selective_scan_2d_definition
from quartermap_deploy.scan.vectorized import selective_scan_2d_vectorized

DIRECTIONS = 4


def floor_onnx(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the body of its scans replaced by the floor."""
    write = Writer()
    channels = write("Shape", "x", start=1, end=2)
    shape = write("Concat", ints(0, -1), ints(1, 1), axis=0)
    weight = write("Reshape", "dt_weight", shape)
    dt = write("Conv", "dt", weight, group=DIRECTIONS)
    first = write("Slice", dt, ints(0), channels, ints(1))
    grouped = write("Reshape", "D", ints(DIRECTIONS, -1))
    skip = write("Unsqueeze", write("ReduceSum", grouped, ints(0), keepdims=0), ints(1, 2))
    write("Add", write("Mul", "x", skip), first)
    body = scan_function(
        write,
        SELECTIVE_SCAN_2D,
        INPUTS_2D,
        write.nodes[-1].output[0],
        ATTRIBUTES_2D,
        overload="",
    )
    floor = onnx.ModelProto()
    floor.CopyFrom(model)
    del floor.functions[:]
    floor.functions.append(body)
    return floor


def _floor_scan(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, *_: Any, **options: Any
) -> Tensor:
    d_inner, weight = x.shape[1], options["dt_weight"]
    wide = torch.nn.functional.conv2d(dt, weight[:, :, None, None], groups=DIRECTIONS)
    return x * D.view(DIRECTIONS, d_inner).sum(0)[:, None, None] + wide[:, :d_inner]


@contextlib.contextmanager
def pytorch_scan(scan: Callable[..., Tensor]) -> Iterator[None]:
    """Run PyTorch models with another scan."""
    original = ss2d.selective_scan_2d
    ss2d.selective_scan_2d = scan
    try:
        yield
    finally:
        ss2d.selective_scan_2d = original


def with_scan(model: torch.nn.Module, images: Tensor, scan: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """A call that runs the model on the images with a scan of choice."""

    def call() -> Tensor:
        with pytorch_scan(scan), torch.no_grad():
            return model(images)  # type: ignore[no-any-return]

    return call


FLOOR: Callable[..., Tensor] = _floor_scan
STEP_BY_STEP: Callable[..., Tensor] = selective_scan_2d_definition


def _vectorized(*tensors: Tensor, dt_weight: Tensor | None = None, directions: Any = None) -> Tensor:
    """PyTorch's own form of the scan, which shares no code with the native kernels."""
    return selective_scan_2d_vectorized(*tensors, dt_weight, tuple(directions), True)


VECTORIZED: Callable[..., Tensor] = _vectorized
