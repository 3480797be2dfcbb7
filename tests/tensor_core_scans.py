"""Scans for the kernels on tensor cores: inputs, plans for devices, and how far a result lies from the definition."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import plugin_builds
import pytest
import torch
from torch import Tensor

from quartermap_deploy.native.build import plugin_sources
from quartermap_deploy.scan.cuda import GENERAL, RESIDENT, SPLIT, STREAMED, Kernels, Plan, make_scan
from quartermap_deploy.scan.definition import DIRECTIONS, selective_scan_2d_definition

TOLERANCES = {"float16": 2e-3, "bfloat16": 1.2e-2}
"""Of the largest value. y is summed up in the element type, and so are steps in float16."""

Sizes = tuple[int, int, int, int, int]  # batch, d_inner, H, W, R
Device = tuple[int, int, int]

H100 = (132, 227 * 1024, 228 * 1024)
A100 = (108, 163 * 1024, 164 * 1024)
ADA = (128, 99 * 1024, 100 * 1024)
ONE_MULTIPROCESSOR = (1, 227 * 1024, 228 * 1024)
FEW_MULTIPROCESSORS = (4, 99 * 1024, 100 * 1024)


@dataclass(frozen=True)
class Regime:
    """How large time steps and decays are.

    Attributes:
        dt: scale of the low-rank time steps.
        decay: scale of A.
        bias: mean of the bias.
    """

    dt: float
    decay: float
    bias: float


TRAINED = Regime(0.7, 1.0, -4.0)
REGIMES = [TRAINED, Regime(0.3, 1.0, -6.0), Regime(2.0, 4.0, 0.0), Regime(1.0, 0.05, -3.0)]
"""Products dt |A| from 1e-6 to beyond 100."""


KINDS = {GENERAL: "general", RESIDENT: "resident", SPLIT: "split", STREAMED: "streamed"}
"""Values of the environment variable `QUARTERMAP_KERNELS`."""


@contextmanager
def in_the_usual_way(library: Kernels) -> Iterator[Kernels]:
    """Give the library, which is emulated in the usual way again afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("QUARTERMAP_KERNELS", raising=False)
        yield library
    library._library.quartermap_emulation_order(0)
    library._library.quartermap_emulation_blocks(1)
    library._library.quartermap_emulation_leave_out(-1)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The kernels, run on the CPU as they are."""
    return Kernels(plugin_builds.emulated_kernels(tmp_path_factory))


@pytest.fixture
def kernels(library: Kernels) -> Iterator[Kernels]:
    """The same, emulated in the usual way at the beginning of each test."""
    with in_the_usual_way(library):
        yield library


def make_inputs(
    sizes: Sizes, element_type: str, count: int = 4, regime: Regime = TRAINED, states: int = 1
) -> list[Tensor]:
    """Return x, dt, B, C, A, D, bias and weight. Of several states each forgets faster than the one before."""
    batch, d_inner, height, width, rank = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    dtype = getattr(torch, element_type)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def maps(channels: int, scale: float = 1.0) -> Tensor:
        return (scale * normal(batch, channels, height, width)).to(dtype)

    wide = count * d_inner
    A = -regime.decay * (0.5 * normal(wide, states)).exp() * torch.arange(1, states + 1)
    D = 1 + 0.1 * normal(wide)
    return [
        maps(d_inner),
        maps(count * rank, regime.dt),
        maps(count * states),
        maps(count * states),
        A,
        D,
        normal(wide) + regime.bias,
        (normal(wide, rank) * rank**-0.5).to(dtype),
    ]


def make_plan(
    kernels: Kernels,
    sizes: Sizes,
    element_type: str,
    device: Device,
    directions: Sequence[str] = DIRECTIONS,
    which: int | None = None,
    states: int = 1,
) -> Plan:
    """Return the plan for a device, by the kernels that are named."""
    batch, d_inner, height, width, rank = sizes
    scan = make_scan((batch, d_inner, height, width, states, rank), directions, True, element_type)
    with pytest.MonkeyPatch.context() as patch:
        if which is not None:
            patch.setenv("QUARTERMAP_KERNELS", KINDS[which])
        plan = kernels.plan_for(scan, *device)
    assert plan.shared_bytes <= device[1]
    kernels.prepare(plan)
    return plan


def relative(y: Tensor, inputs: Sequence[Tensor], directions: Sequence[str] = DIRECTIONS) -> float:
    """Return how far y lies from the definition, as a share of the largest value."""
    expected = selective_scan_2d_definition(*(tensor.double() for tensor in inputs), directions, True)
    assert y.dtype == inputs[0].dtype and y.shape == expected.shape
    return float((y.double() - expected).abs().max() / expected.abs().max())


def check(
    kernels: Kernels,
    sizes: Sizes,
    element_type: str,
    device: Device,
    which: int,
    *,
    directions: Sequence[str] = DIRECTIONS,
    regime: Regime = TRAINED,
    states: int = 1,
) -> Plan:
    """Run a scan by the plan for a device and of these kernels against the definition."""
    plan = make_plan(kernels, sizes, element_type, device, directions, which, states)
    assert plan.kernels == which
    inputs = make_inputs(sizes, element_type, len(directions), regime, states)
    repaired = kernels._library.quartermap_emulation_yes_votes
    before = repaired()
    y = kernels.scan_2d(*inputs, directions, True, plan)
    assert repaired() == before, "it was computed in float32, which would hide what went wrong"
    error = relative(y, inputs, directions)
    assert error <= TOLERANCES[element_type], error
    return plan


def large_drive(inputs: list[Tensor]) -> None:
    """One step times x of 4e5, far above 65504, and B so small that y stays within it; elsewhere x is zero."""
    x, _, B, _, _, D, bias, _ = inputs
    x.zero_()
    x[0, 3, 3, 1] = 6e4
    bias.add_(8)
    B.mul_(1e-4)
    D.mul_(1e-3)


def large_state(inputs: list[Tensor]) -> None:
    """Small decays and much drive: states of millions; C is small."""
    x, _, B, C, A, D, bias, _ = inputs
    x.abs_().mul_(3e4).clamp_(max=6e4)
    B.abs_()
    C.mul_(1e-5)
    A.mul_(0.1)
    D.mul_(1e-3)
    bias.zero_()


def barriers() -> list[str]:
    """Return the names in the order of their numbers, as they stand in the header."""
    header = (plugin_sources() / "kernels" / "tensor_core" / "machine.h").read_text(encoding="utf-8")
    listed = header.split("enum class Barrier", 1)[1].split("}", 1)[0]
    return re.findall(r"^    k(\w+?),?(?: |$)", listed, re.MULTILINE)
