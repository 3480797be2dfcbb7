"""The CUDA kernels, run on the CPU as they are, at their edges: of memory, and of the numbers of 16 bits."""

from __future__ import annotations

from collections.abc import Sequence

import plugin_builds
import pytest
import torch
from helpers import error, scan_case
from torch import Tensor

from quartermap_deploy.scan.cuda import GENERAL, Kernels, Plan, Tensors, make_scan
from quartermap_deploy.scan.definition import DIRECTIONS, selective_scan_2d_definition

TOLERANCES = {torch.float32: 2e-6, torch.float16: 2**-11 + 2e-6, torch.bfloat16: 2**-8 + 2e-6}
"""Of the largest value: what float32 arithmetic leaves, and half a step of the 16-bit types, as results are rounded."""

H100 = (132, 227 * 1024, 228 * 1024)
ONE_MULTIPROCESSOR = (1, 227 * 1024, 228 * 1024)
LITTLE_SHARED_MEMORY = (16, 24 * 1024, 48 * 1024)

BESIDE = 64
"""Elements before and behind each tensor."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(plugin_builds.emulated_kernels(tmp_path_factory))


def within(tensor: Tensor, value: float) -> tuple[Tensor, Tensor]:
    """Return memory that is full of a value but for a copy of a tensor in it, and that copy."""
    memory = torch.full((tensor.numel() + 2 * BESIDE,), value, dtype=tensor.dtype)
    place = memory[BESIDE:-BESIDE].view(tensor.shape)
    place.copy_(tensor)
    return memory, place


def launched(kernels: Kernels, plan: Plan, inputs: Sequence[Tensor | None]) -> Tensor:
    """Run a plan on tensors beside which nothing is a number, and see that nothing beside y is written."""
    placed = [None if tensor is None else within(tensor, torch.nan)[1] for tensor in inputs]
    x = placed[0]
    assert x is not None
    memory, y = within(torch.full_like(x, torch.nan), 7.0)
    room, workspace = within(torch.full((int(plan.workspace_bytes),), 9, dtype=torch.uint8), 7)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in (*placed, y, workspace)]
    kernels.prepare(plan)
    kernels.launch(plan, Tensors(*pointers, workspace.numel()), None)
    for each in (memory, room):
        assert (each[:BESIDE] == 7).all() and (each[-BESIDE:] == 7).all()
    return y


@pytest.mark.parametrize("device", [H100, ONE_MULTIPROCESSOR, LITTLE_SHARED_MEMORY], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 5, 9, 4, 1, 3),
        (2, 3, 7, 7, 3, 0),
        (1, 9, 28, 30, 1, 5),
        (3, 2, 5, 13, 6, 2),
        (2, 1, 40, 41, 2, 0),
        (1, 3, 30, 64, 1, 9),
    ],
    ids=str,
)
def test_nothing_beside_the_tensors_is_read_or_written(
    kernels: Kernels, sizes: Sequence[int], dtype: torch.dtype, device: tuple[int, int, int]
) -> None:
    """Tiles of channels that are not full, chunks that are not, and several of them with states to carry."""
    batch, d_inner, height, width, states, rank = sizes
    case = scan_case(batch, d_inner, height, width, states, rank or None)
    scan = make_scan(sizes, DIRECTIONS, True, str(dtype).removeprefix("torch."))
    plan = kernels.plan_for(scan, *device)
    assert plan.kernels == GENERAL
    inputs = [*case.converted(dtype), None][:8]
    inputs[4:7] = [tensor.float() for tensor in inputs[4:7] if tensor is not None]
    assert error(launched(kernels, plan, inputs).double(), case.expected(dtype)) <= TOLERANCES[dtype]


def passed_through(kernels: Kernels, x: Tensor, D: Tensor) -> Tensor:
    """Return D · x as the kernels compute it: a scan of maps (channels, H, W) whose states stay zero."""
    zeros = torch.zeros(1, 1, *x.shape[1:], dtype=x.dtype)
    dt = torch.zeros_like(x)[None]
    A, bias = -torch.ones(len(x), 1), torch.zeros(len(x))
    return kernels.scan_2d(x[None], dt, zeros, zeros, A, D, bias, None, ("row",), False)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_16_bits_passes_through(kernels: Kernels, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = torch.where(every.isfinite(), every, 0).view(64, 32, 32)
    assert torch.equal(passed_through(kernels, every, torch.ones(64)), every)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_are_rounded_to_the_nearest(kernels: Kernels, dtype: torch.dtype) -> None:
    """Ties, denormal results, results too large for the type, and what is no number, as PyTorch rounds them."""
    finite = torch.arange(0, 2**15, 101, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = finite[finite.isfinite() & (finite.float() >= torch.finfo(torch.float32).tiny)].float()
    steps = finite * torch.finfo(dtype).eps
    values = torch.cat([finite + share * steps for share in (0.25, 0.5, 0.75)])
    special = [65519.0, 65520.0, 65535.9, 1e30, 3.39e38, 2.0**-24, 2.0**-25, 1.0001 * 2.0**-25, 2.0**-26]
    values = torch.cat([values, torch.tensor([*special, torch.inf])])
    values = torch.cat([values, -values])
    y = passed_through(kernels, torch.ones(len(values), 1, 1, dtype=dtype), values)
    assert torch.equal(y.view(-1), values.to(dtype))
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert passed_through(kernels, torch.ones(4, 1, 1, dtype=dtype), nans).isnan().all()


@pytest.mark.parametrize("place", range(7))
def test_what_is_not_finite_stays_in_its_image(kernels: Kernels, place: int) -> None:
    """Maps of one image, or parameters of one channel, reach no other."""
    case = scan_case(2, 3, 9, 10, d_state=2, rank=None, directions=("row", "column_reverse"))
    inputs = [tensor.float() for tensor in case.tensors]
    inputs[place] = inputs[place].clone()
    parameter = place >= 4
    inputs[place][-1] = torch.nan  # the last image, or a channel of the last direction
    expected = selective_scan_2d_definition(*(t.double() for t in inputs), directions=case.directions)
    y = kernels.scan_2d(*inputs, None, case.directions, True)
    assert torch.equal(y.isfinite(), expected.isfinite())
    sound = (slice(None), slice(0, -1)) if parameter else (slice(0, -1),)
    assert error(y[sound], expected[sound]) <= TOLERANCES[torch.float32]
