"""The kernels for CPUs at their edges: of memory, tasks, images that fit together, steps, and numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import cpu_builds
import pytest
import torch
from cpu_scans import addresses, kernels, scan_case_of, scan_map, scan_sequence, type_name, widest
from helpers import error, scan_case
from torch import Tensor

from quartermap_deploy.native.cpu_kernels import CpuKernels, Sizes, make_scan
from quartermap_deploy.scan.definition import selective_scan_definition

__all__ = ["kernels", "widest"]

TOLERANCE = 1e-6
"""Of the largest output."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


# Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.parametrize("d_state", [1, 6])
def test_what_a_scan_leaves_in_memory_changes_no_bit_of_the_next(
    kernels: CpuKernels, d_state: int, rank: int | None
) -> None:
    """Scratch memory comes back as it was left; here, full of what is not a number."""
    case = scan_case(2, 5, 27, 31, d_state=d_state, rank=rank, directions=("row", "column_reverse", "column"))
    for threads in (1, 64):
        before = scan_case_of(kernels, case, threads=threads)
        poisoned = [torch.full_like(tensor, torch.nan) for tensor in case.converted(torch.float32)]
        assert scan_map(kernels, poisoned, case.directions, threads=threads).isnan().all()
        assert torch.equal(scan_case_of(kernels, case, threads=threads), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=type_name)
def test_nothing_is_written_beside_y(kernels: CpuKernels, dtype: torch.dtype) -> None:
    for d_inner, height, width in ((1, 1, 1), (3, 2, 4), (5, 3, 7), (9, 4, 4), (17, 3, 11)):
        case = scan_case(2, d_inner, height, width, rank=None, directions=("row", "row_reverse"))
        maps = [tensor.to(dtype) if i < 4 else tensor.float() for i, tensor in enumerate(case.tensors)]
        names = ("x", "dt", "B", "C", "A", "D", "dt_bias")
        for threads in (1, 64):
            memory = torch.full((64 + maps[0].numel() + 64,), 7.0, dtype=dtype)
            tensors = addresses(**dict(zip(names, maps, strict=True)), y=memory)
            tensors.y += 64 * memory.element_size()
            scan = make_scan(
                Sizes(2, 1, d_inner, height, width, 1), case.directions, True, type_name(dtype), threads
            )
            assert kernels.status(scan, tensors) == 0
            assert (memory[:64] == 7).all() and (memory[-64:] == 7).all()
            assert torch.equal(
                memory[64:-64].view(maps[0].shape), scan_case_of(kernels, case, dtype, threads)
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=type_name)
@pytest.mark.parametrize(("side", "rank"), [(32, None), (31, 2)])
def test_images_that_do_not_fit_together_are_taken_in_turns(
    widest: CpuKernels, side: int, rank: int | None, dtype: torch.dtype
) -> None:
    """B and C of 256 states are packed for one or two of these images at a time; each gives what it gives alone."""
    case = scan_case(3, 3, side, side, d_state=256, rank=rank)
    *maps, A, D, bias = [tensor.to(dtype) for tensor in case.tensors[:4]] + [
        t.float() for t in case.tensors[4:7]
    ]
    weight = None if rank is None else case.tensors[7].to(dtype)
    together = scan_map(widest, (*maps, A, D, bias, weight))
    for i in range(3):
        one = [tensor[i : i + 1].contiguous() for tensor in maps]
        assert torch.equal(scan_map(widest, (*one, A, D, bias, weight)), together[i : i + 1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_task_without_memory_is_told(threads: int) -> None:
    """Orders and packed maps of 80 MB are there, the tile of 128 MB or more is not."""
    code = (
        "import ctypes, resource, sys\n"
        "from pathlib import Path\n"
        "from quartermap_deploy.native.cpu_kernels import CpuKernels, Sizes, Tensors, make_scan\n"
        "kernels = CpuKernels.load(Path(sys.argv[1]))\n"
        "memory = (ctypes.c_float * 2**22)()\n"
        "where = ctypes.addressof(memory)\n"
        "tensors = Tensors(**dict.fromkeys(('x', 'dt', 'B', 'C', 'A', 'y'), where))\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "most = pages * 4096 + (112 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        f"scan = make_scan(Sizes(1, 1, 1, 2**11, 2**11, 1, 0), ('row',), True, 'float32', {threads})\n"
        "print(kernels.status(scan, tensors))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(cpu_builds.library("all"))],
        env={**os.environ, "QUARTERMAP_INSTRUCTION_SET": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "6", done.stderr


# Tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1016, 1023, 1024, 1025, 2047, 2048, 2049])
def test_lengths_about_those_of_tasks(kernels: CpuKernels, length: int) -> None:
    """Maps are packed and merged 1024 positions at a time, and divided into segments of whole blocks of 8."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    u, delta = normal(1, 17, length), normal(1, 17, length) - 5
    B, C = normal(1, 1, 2, length), normal(1, 1, 2, length)
    A = -torch.rand(17, 2, generator=generator) - 0.1
    tensors = (u, delta, A, B, C, normal(17), normal(17))
    expected = selective_scan_definition(*(tensor.double() for tensor in tensors), True)
    for threads in (1, 2, 3, 5, 64):
        assert error(scan_sequence(kernels, tensors, True, threads), expected) <= TOLERANCE


# Steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1.03, 1.1, 1.4, 1.8, 2.5])
def test_steps_about_the_largest_of_the_small_ones(kernels: CpuKernels, step: float) -> None:
    """Up to dt |A| = 1.04 in a whole block, the factor less 1 is one polynomial."""
    for d_state, rank in ((1, 3), (5, None)):
        case = scan_case(1, 5, 9, 10, d_state=d_state, rank=rank, steps=(step, step * 1.001), skip=False)
        assert error(scan_case_of(kernels, case), case.expected(torch.float32)) <= TOLERANCE


@pytest.mark.parametrize(("d_state", "step"), [(1, 3e-3), (4, 3e-3)])
def test_long_scans_keep_what_each_step_rounds_away(kernels: CpuKernels, d_state: int, step: float) -> None:
    """Of one state and of four together: near its limit, all that is left of a step is less than the sum can hold."""
    case = scan_case(
        1, 3, 64, 64, d_state, None, ("row", "row_reverse"), steps=(step, step * 1.001), skip=False, even=True
    )
    expected = case.expected(torch.float32)
    for threads in (1, 3):
        assert error(scan_case_of(kernels, case, threads=threads), expected) <= TOLERANCE


@pytest.mark.parametrize("d_state", [1, 5])
@pytest.mark.parametrize(("largest", "softplus"), [(-1.0, False), (0.9, True), (0.05, True)])
def test_states_that_grow(kernels: CpuKernels, d_state: int, largest: float, softplus: bool) -> None:
    """Without softplus a time step may be negative; with it a state grows where A is positive, of one state alone."""
    generator = torch.Generator().manual_seed(d_state)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    u, B, C = random(1, 9, 5) - 0.5, random(1, 1, d_state, 5) - 0.5, random(1, 1, d_state, 5) - 0.5
    delta = random(1, 9, 5) if softplus else -2 * random(1, 9, 5)
    A = -torch.ones(9, d_state)
    A[:, -1] = largest
    tensors = (u, delta, A, B, C)
    y = scan_sequence(kernels, (*tensors, None, None), softplus)
    expected = selective_scan_definition(*(tensor.double() for tensor in tensors), None, None, softplus)
    assert error(y, expected) <= TOLERANCE


def test_an_infinite_x_without_a_skip_is_infinite(kernels: CpuKernels) -> None:
    """0 times infinity is not 0: without a D, y is C h alone."""
    u, ones = torch.ones(1, 9, 3000), torch.ones(1, 1, 1, 3000)
    u[..., 700] = torch.inf
    for threads in (1, 64):
        tensors = (u, torch.full_like(u, 0.5), -torch.ones(9, 1), ones, ones, None, None)
        y = scan_sequence(kernels, tensors, threads=threads)
        assert y[..., :700].isfinite().all() and (y[..., 700] == torch.inf).all()


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("d_state", [1, 4])
def test_a_state_that_outgrows_floats_does_not_come_back(
    kernels: CpuKernels, d_state: int, softplus: bool
) -> None:
    ones = torch.ones(1, 1, d_state, 24)
    tensors = (
        torch.ones(1, 5, 24),
        torch.ones(1, 5, 24),
        torch.full((5, d_state), 100.0),
        ones,
        ones,
        None,
        None,
    )
    y = scan_sequence(kernels, tensors, softplus)
    assert y[..., 0].isfinite().all() and (y[..., 0] > 0).all()
    assert not y[..., 4:].isfinite().any()


# Numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=type_name)
def test_whatever_is_no_number_stays_none(kernels: CpuKernels, dtype: torch.dtype) -> None:
    """Rounding adds to the bits of a number, and must not carry those of a NaN over."""
    patterns = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000, -0x400000], dtype=torch.int32)
    nans = patterns.view(torch.float32)
    assert nans.isnan().all()
    channels = len(nans)
    x = torch.ones(1, channels, 1, 20, dtype=dtype)
    zeros = torch.zeros(1, 1, 1, 20, dtype=dtype)
    y = scan_map(
        kernels, (x, torch.zeros_like(x), zeros, zeros, -torch.ones(channels, 1), nans, None), ("row",)
    )
    assert y.isnan().all()


def has_denormals() -> bool:
    """Whether this thread computes with numbers below the smallest normal one; not folded by the interpreter."""
    return float("1e-310") * float("0.5") > 0.0


@pytest.mark.parametrize("threads", [1, 3])
def test_the_threads_of_a_pool_keep_their_denormals(kernels: CpuKernels, threads: int) -> None:
    """A caller's thread that ran tasks, and one that asked for a scan, compute with denormals afterwards."""
    case = scan_case(1, 20, 40, 41, d_state=4, rank=2)
    kept: list[bool] = []

    def pool(task: Any, count: int) -> int:
        for i in range(count):
            task(i)
            kept.append(has_denormals())
        return 0

    scan_map(kernels, case.converted(torch.float32), threads=threads, pool=pool)
    kept.append(has_denormals())
    assert all(kept) and (len(kept) > 1) == (threads > 1)


def test_sequences_of_groups_and_images_keep_their_places(kernels: CpuKernels) -> None:
    """Each image and group gives what it gives alone, with more tiles than one in each."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    batch, groups, channels, states, length = 2, 3, 19, 2, 37
    wide = groups * channels
    u, delta = normal(batch, wide, length), normal(batch, wide, length)
    B, C = normal(batch, groups, states, length), normal(batch, groups, states, length)
    A, D, bias = -torch.rand(wide, states, generator=generator) - 0.1, normal(wide), normal(wide)
    whole = scan_sequence(kernels, (u, delta, A, B, C, D, bias), True)
    for i in range(batch):
        for g in range(groups):
            own = slice(g * channels, (g + 1) * channels)
            parts = (u[i : i + 1, own], delta[i : i + 1, own], A[own], B[i : i + 1, g : g + 1])
            parts += (C[i : i + 1, g : g + 1], D[own], bias[own])
            alone = scan_sequence(kernels, [part.contiguous() for part in parts], True)
            assert torch.equal(whole[i : i + 1, own], alone)
