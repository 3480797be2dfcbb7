"""Scans of torch tensors with the kernels for CPUs, through their C interface as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import cpu_builds
import pytest
import torch
from cpu_builds import BUILT_SETS, FORMS
from helpers import ScanCase
from torch import Tensor

from quartermap_deploy.native.cpu_kernels import CpuKernels, Parallel, Sizes, Task, Tensors, make_scan
from quartermap_deploy.scan.definition import DIRECTIONS

Pool = Callable[[Callable[[int], None], int], int]
"""Runs a function for every number below a count, and returns 0 if it could."""


@functools.cache
def kernels_of(form: str) -> CpuKernels:
    """Return the kernels with one instruction set; skip where the processor lacks it."""
    kernels = CpuKernels.load(cpu_builds.library_of(form))
    if form in BUILT_SETS and not kernels.choose(form):
        pytest.skip(f"this processor has no {form}")
    return kernels


def chosen_kernels(form: str) -> CpuKernels:
    """Return the kernels, which use this instruction set from now on: one library holds all of them."""
    found = kernels_of(form)
    if form in BUILT_SETS:
        assert found.choose(form)
        assert found.instruction_set == form
    return found


@pytest.fixture(params=FORMS)
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    """The kernels in each form."""
    return chosen_kernels(request.param)


@pytest.fixture
def widest() -> CpuKernels:
    """The kernels by the widest vectors that this processor has."""
    found = CpuKernels.load(cpu_builds.library("all"))
    assert found.choose(None)
    return found


def type_name(dtype: torch.dtype) -> str:
    """Return the kernels' name of an element type."""
    return str(dtype).removeprefix("torch.")


def addresses(**tensors: Tensor | None) -> Tensors:
    """Return the C structure of contiguous tensors."""
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors.values())
    return Tensors(**{name: None if t is None else t.data_ptr() for name, t in tensors.items()})


def parallel_of(pool: Pool) -> Parallel:
    """Return a pool of Python's as the kernels take it."""
    return Parallel(lambda _, task, argument, count: pool(lambda i: Task(task)(argument, i), count))


def scan_map(
    kernels: CpuKernels,
    tensors: Sequence[Tensor | None],
    directions: Sequence[str] = DIRECTIONS,
    softplus: bool = True,
    threads: int = 1,
    pool: Pool | None = None,
) -> Tensor:
    """Scan a map: x, dt, B, C, A, D or None, dt_bias or None and, at low rank, dt_weight."""
    x, dt, B, C, A, D, bias, weight = [*tensors, None][:8]
    assert x is not None and A is not None
    sizes = Sizes(x.shape[0], 1, *x.shape[1:], A.shape[1], 0 if weight is None else weight.shape[1])
    y = torch.full_like(x, torch.nan)
    scan = make_scan(sizes, directions, softplus, type_name(x.dtype), threads)
    where = addresses(x=x, dt=dt, B=B, C=C, A=A, D=D, dt_bias=bias, dt_weight=weight, y=y)
    status = kernels.status(scan, where, None if pool is None else parallel_of(pool))
    assert status == 0, kernels.message(status)
    return y


def scan_sequence(
    kernels: CpuKernels, tensors: Sequence[Tensor | None], softplus: bool = False, threads: int = 1
) -> Tensor:
    """Scan a sequence: u, delta, A, B, C, D or None and delta_bias or None."""
    u, delta, A, B, C, D, bias = tensors
    assert u is not None and A is not None and B is not None
    sizes = Sizes(u.shape[0], B.shape[1], u.shape[1] // B.shape[1], 1, u.shape[2], A.shape[1])
    y = torch.full_like(u, torch.nan)
    scan = make_scan(sizes, ("row",), softplus, type_name(u.dtype), threads)
    status = kernels.status(scan, addresses(x=u, dt=delta, B=B, C=C, A=A, D=D, dt_bias=bias, y=y))
    assert status == 0, kernels.message(status)
    return y


def scan_case_of(
    kernels: CpuKernels, case: ScanCase, dtype: torch.dtype = torch.float32, threads: int = 1
) -> Tensor:
    """Scan a case in an element type; its A, D and dt_bias are float32, as the kernels take them."""
    tensors = [
        tensor.float() if index in (4, 5, 6) else tensor for index, tensor in enumerate(case.converted(dtype))
    ]
    return scan_map(kernels, tensors, case.directions, case.softplus, threads)
