"""The kernels for CPUs against the definition in float64, with every instruction set that this processor has."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cpu_builds
import pytest
import torch
from cpu_builds import BUILT_SETS, FORMS
from cpu_scans import addresses, chosen_kernels, kernels, scan_case_of, scan_map, scan_sequence, widest
from helpers import ScanCase, error, scan_case
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from quartermap_deploy.native.cpu_kernels import CpuKernels, Scan, Sizes, make_scan
from quartermap_deploy.native.cpu_library import INTERFACE
from quartermap_deploy.scan.definition import (
    DIRECTIONS,
    selective_scan_2d_definition,
    selective_scan_definition,
)

__all__ = ["kernels", "widest"]

TOLERANCE = 1e-6
"""Of the largest output."""

KEPT_BYTES = 64 << 20
"""What the library keeps between scans, at most."""


def made_case(**options: Any) -> tuple[ScanCase, Tensor]:
    """Return a case and what its definition gives in float64 for arguments in float32; computed once."""
    return _made_case(tuple(sorted(options.items())))


@functools.cache
def _made_case(options: tuple[tuple[str, Any], ...]) -> tuple[ScanCase, Tensor]:
    case = scan_case(**dict(options))
    return case, case.expected(torch.float32)


# Accuracy ---------------------------------------------------------------------------------------------------------

STEPS = [
    (0.001, 0.00101),
    (0.01, 0.0101),
    (0.001, 0.01),
    (0.1, 1.0),
    (0.3, 0.301),
    (1.0, 20.0),
    (20.0, 20.1),
    (0.001, 20.0),
]
"""Ranges of dt·|A| per position: constant ones, and small steps next to large ones in one tile."""


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("steps", STEPS)
def test_steps_of_every_size(kernels: CpuKernels, steps: tuple[float, float], even: bool) -> None:
    for d_state, rank, decay in ((1, 3, 1.0), (5, None, 16.0)):
        case, expected = made_case(
            d_inner=11,
            height=28,
            width=28,
            d_state=d_state,
            rank=rank,
            steps=steps,
            decay=decay,
            skip=False,
            even=even,
        )
        for threads in (1, 64):
            assert error(scan_case_of(kernels, case, threads=threads), expected) <= TOLERANCE


@pytest.mark.parametrize("states", [1, 4, 6])
@pytest.mark.parametrize("decay", [2.0, 5.0, 20.0, 100.0])
@pytest.mark.parametrize("outlier", [1e3, 1e5, 1e7])
def test_a_large_state_that_is_forgotten_leaves_nothing(
    kernels: CpuKernels, states: int, decay: float, outlier: float
) -> None:
    generator = torch.Generator().manual_seed(states)
    u, B, C = (torch.randn(*shape, generator=generator) for shape in [(1, 9, 64), *[(1, 1, states, 64)] * 2])
    u[..., 15] *= outlier
    C[..., 15 : 15 + 1 + int(24 / decay)] = 0  # seen by nobody until it has decayed
    tensors = (u, torch.ones(1, 9, 64), torch.full((9, states), -decay), B, C)
    y = scan_sequence(kernels, (*tensors, None, None))
    assert error(y, selective_scan_definition(*(tensor.double() for tensor in tensors))) <= TOLERANCE


def test_a_step_of_nothing_leaves_the_state_whatever_A_is(kernels: CpuKernels) -> None:
    ones = torch.ones(1, 1, 2, 24)
    A = torch.tensor([[-3.4e38, -1.0]]).repeat(5, 1)
    tensors = (torch.ones(1, 5, 24), torch.zeros(1, 5, 24), A, ones, ones, None, None)
    y = scan_sequence(kernels, tensors)
    assert torch.equal(y, torch.zeros(1, 5, 24))


@functools.cache
def long_case(steps: tuple[float, float], even: bool) -> tuple[ScanCase, Tensor]:
    case = scan_case(1, 3, 128, 128, 2, None, ("row", "column_reverse"), steps=steps, skip=False, even=even)
    return case, case.expected(torch.float32)


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("steps", [(0.001, 0.00101), (0.001, 20.0)])
def test_sixteen_thousand_positions(kernels: CpuKernels, steps: tuple[float, float], even: bool) -> None:
    case, expected = long_case(steps, even)
    for threads in (1, 3, 64):
        assert error(scan_case_of(kernels, case, threads=threads), expected) <= TOLERANCE


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_large_positive_steps_forget(kernels: CpuKernels, scale: float) -> None:
    """Time steps far beyond the ones that a model has: what was before is forgotten, and nothing overflows."""
    case, _ = made_case(d_inner=9, height=6, width=7, d_state=3, rank=None)
    x, dt, *rest = case.converted(torch.float32)
    tensors = (x, dt.abs() * scale, *rest)
    expected = selective_scan_2d_definition(*(tensor.double() for tensor in tensors))
    assert error(scan_map(kernels, tensors), expected) <= TOLERANCE


# Shapes, attributes and what is left out --------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 17), (17, 1), (7, 7), (2, 31), (16, 16), (13, 5)])
@pytest.mark.parametrize("d_inner", [1, 4, 7, 16, 17, 33])
def test_sizes(kernels: CpuKernels, d_inner: int, height: int, width: int) -> None:
    for batch, d_state, rank in ((3, 1, 1), (1, 16, None)):
        case, expected = made_case(
            batch=batch, d_inner=d_inner, height=height, width=width, d_state=d_state, rank=rank
        )
        assert error(scan_case_of(kernels, case), expected) <= TOLERANCE


@pytest.mark.parametrize("rank", [None, 1, 3, 48])
@pytest.mark.parametrize("d_state", [1, 2, 5, 16, 17, 64])
def test_states_and_ranks(kernels: CpuKernels, d_state: int, rank: int | None) -> None:
    for softplus in (True, False):
        case, expected = made_case(
            d_inner=5, height=9, width=10, d_state=d_state, rank=rank, softplus=softplus, decay=4.0
        )
        for threads in (1, 64):
            assert error(scan_case_of(kernels, case, threads=threads), expected) <= TOLERANCE


@pytest.mark.parametrize(
    "directions",
    [
        *((name,) for name in DIRECTIONS),
        ("row", "row"),
        ("column_reverse", "row", "column_reverse"),
        (*DIRECTIONS, *DIRECTIONS, *DIRECTIONS),
    ],
    ids=lambda names: f"{len(names)}-{names[0]}",
)
def test_directions(kernels: CpuKernels, directions: tuple[str, ...]) -> None:
    for rank in (2, None):
        case, expected = made_case(d_inner=6, height=6, width=9, d_state=2, rank=rank, directions=directions)
        for threads in (1, 64):
            assert error(scan_case_of(kernels, case, threads=threads), expected) <= TOLERANCE


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 1500])
def test_sequences(kernels: CpuKernels, length: int, groups: int) -> None:
    for skip, bias, softplus, batch in (
        (True, True, True, 2),
        (False, False, False, 1),
        (False, True, True, 1),
    ):
        tensors = sequence(length, groups, batch, skip, bias, softplus)
        doubles = [None if tensor is None else tensor.double() for tensor in tensors]
        for threads in (1, 64):
            y = scan_sequence(kernels, tensors, softplus, threads)
            if length == 0:
                assert y.shape == (batch, groups * 11, 0)
            else:
                assert error(y, selective_scan_definition(*doubles, softplus)) <= TOLERANCE  # type: ignore[arg-type]


def sequence(
    length: int, groups: int, batch: int, skip: bool, bias: bool, softplus: bool
) -> list[Tensor | None]:
    """Return random u, delta, A, B, C, D and delta_bias of 11 channels a group and 3 states, in float32."""
    generator = torch.Generator().manual_seed(length + groups)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    wide = groups * 11
    delta = normal(batch, wide, length)
    return [
        normal(batch, wide, length),
        delta if softplus else delta.abs(),
        -torch.rand(wide, 3, generator=generator) - 0.01,
        normal(batch, groups, 3, length),
        normal(batch, groups, 3, length),
        normal(wide) if skip else None,
        normal(wide) if bias else None,
    ]


@pytest.mark.parametrize("missing", [(5,), (6,), (5, 6)], ids=str)
@pytest.mark.parametrize("rank", [2, None])
def test_maps_without_skip_or_bias(kernels: CpuKernels, missing: Sequence[int], rank: int | None) -> None:
    case, _ = made_case(d_inner=9, height=11, width=12, rank=rank)
    tensors = list(case.converted(torch.float32))
    zeros = [torch.zeros_like(t) if i in missing else t for i, t in enumerate(tensors)]
    expected = selective_scan_2d_definition(*(tensor.double() for tensor in zeros))
    given = [None if i in missing else t for i, t in enumerate(tensors)]
    for threads in (1, 64):
        assert error(scan_map(kernels, given, threads=threads), expected) <= TOLERANCE


def test_without_skip_nothing_of_x_is_added(kernels: CpuKernels) -> None:
    """0 · infinity is not 0: with B = 0 an infinite x must not reach y by way of D."""
    case, _ = made_case(d_inner=3, height=3, width=3, rank=None)
    x, dt, B, C, A, _, bias = case.converted(torch.float32)
    x[0, 0, 0, 0] = 3e38
    y = scan_map(kernels, (x, dt, torch.zeros_like(B), C, A, None, bias))
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("form", FORMS)
@given(
    batch=st.integers(0, 3),
    d_inner=st.integers(1, 40),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    d_state=st.integers(1, 20),
    rank=st.one_of(st.none(), st.integers(1, 50)),
    directions=st.lists(st.sampled_from(DIRECTIONS), min_size=1, max_size=9),
    softplus=st.booleans(),
    threads=st.integers(0, 70),
    steps=st.sampled_from(STEPS),
    seed=st.integers(0, 1000),
)
@example(
    batch=0, d_inner=3, height=4, width=5, d_state=1, rank=2, directions=["row"], softplus=True, threads=1,
    steps=STEPS[0], seed=0,
)  # fmt: skip
def test_any_scan(form: str, batch: int, threads: int, **options: Any) -> None:
    kernels = chosen_kernels(form)
    case = scan_case(batch, **options)
    y = scan_case_of(kernels, case, threads=threads)
    if batch == 0:
        assert y.shape == case.tensors[0].shape
    else:
        assert error(y, case.expected(torch.float32)) <= TOLERANCE


# Element types ----------------------------------------------------------------------------------------------------

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 0.0}
"""Half a step of the type, as a share of the value."""


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_element_types(kernels: CpuKernels, dtype: torch.dtype) -> None:
    for d_inner, rank in ((37, 5), (6, None)):
        case, _ = made_case(batch=2, d_inner=d_inner, height=14, width=9, d_state=3, rank=rank)
        for threads in (1, 64):
            y = scan_case_of(kernels, case, dtype, threads)
            assert y.dtype == dtype
            # The definition gets the same rounded inputs, so that only the rounding of y is left.
            assert error(y.double(), case.expected(dtype)) <= ROUNDING[dtype] + TOLERANCE


def passed_through(kernels: CpuKernels, x: Tensor, D: Tensor) -> Tensor:
    """Return D · x as the kernels compute it, rounded to x's type: a scan whose states stay zero."""
    channels = x.numel()
    zeros = torch.zeros(1, 1, 1, 1, dtype=x.dtype)
    dt = torch.zeros(1, channels, 1, 1, dtype=x.dtype)
    A = -torch.ones(channels, 1)
    y = scan_map(kernels, (x.view(1, -1, 1, 1), dt, zeros, zeros, A, D, None), ("row",))
    return y.view(-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_16_bits_passes_through(kernels: CpuKernels, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = torch.where(every.isfinite(), every, 0)
    # bfloat16 has the denormals of float32, which count as zero.
    denormal = (every.float().abs() < torch.finfo(torch.float32).tiny) & (dtype == torch.bfloat16)
    expected = torch.where(denormal, 0, every)
    assert torch.equal(passed_through(kernels, every, torch.ones(2**16)), expected)
    # The same along positions, which are converted a vector at a time.
    rows = every.reshape(1, 4, 128, 128)
    zeros = torch.zeros(1, 1, 128, 128, dtype=dtype)
    rest = (torch.zeros_like(rows), zeros, zeros, -torch.ones(4, 1), torch.ones(4), None)
    assert torch.equal(scan_map(kernels, (rows, *rest), ("row",)).view(-1), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_are_rounded_to_the_nearest(kernels: CpuKernels, dtype: torch.dtype) -> None:
    """Ties, denormal results, and results too large for the type, as PyTorch rounds them."""
    finite = torch.arange(0, 2**15, 7, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = finite[finite.isfinite() & (finite.float() >= torch.finfo(torch.float32).tiny)].float()
    steps = finite * torch.finfo(dtype).eps
    values = torch.cat([finite + share * steps for share in (0.2, 0.25, 0.5, 0.75)])
    special = [65519.0, 65520.0, 65535.9, 1e30, 3.39e38, 2.0**-24, 2.0**-25, 1.0001 * 2.0**-25, 2.0**-26]
    values = torch.cat([values, torch.tensor(special)])
    values = torch.cat([values, -values, torch.tensor([torch.inf, -torch.inf])])
    y = passed_through(kernels, torch.ones(len(values), dtype=dtype), values)
    assert torch.equal(y, values.to(dtype))
    assert passed_through(kernels, torch.ones(1, dtype=dtype), torch.tensor([torch.nan])).isnan().all()


def test_denormals_count_as_zero_and_the_setting_is_put_back(kernels: CpuKernels) -> None:
    tiny = torch.tensor([1e-40, -1e-45, 1.0])
    y = passed_through(kernels, tiny, torch.ones(3))
    assert (y[:2].abs() <= tiny[:2].abs()).all() and y[2] == 1.0
    assert float(torch.tensor(1e-40) * torch.tensor(0.5)) > 0, "this thread still has denormals"


def test_float64_is_computed_in_float32(kernels: CpuKernels) -> None:
    values = torch.tensor([1e300, -1e300, 1e-300, 1.0 + 1e-12], dtype=torch.float64)
    y = passed_through(kernels, values, torch.ones(4))
    assert not y[:2].isfinite().any() and y[2:].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", range(8))
def test_what_is_not_finite_spreads_as_in_the_definition(
    kernels: CpuKernels, place: int, value: float, softplus: bool
) -> None:
    if place == 4 and value == torch.inf:
        pytest.skip("A is negative")
    case = scan_case(2, 6, 9, 10, d_state=5, rank=2, softplus=softplus, directions=("row", "column_reverse"))
    tensors = [tensor.clone() for tensor in case.converted(torch.float32)]
    tensors[place].view(-1)[tensors[place].numel() // 3] = value
    expected = selective_scan_2d_definition(
        *(tensor.double() for tensor in tensors), directions=case.directions, softplus=softplus
    )
    for threads in (1, 64):
        y = scan_map(kernels, tensors, case.directions, softplus, threads)
        finite = expected.isfinite()
        # A state that was infinite once is not a number afterwards; neither comes back.
        assert torch.equal(y.isfinite(), finite)
        if finite.any():
            assert error(y[finite], expected[finite]) <= TOLERANCE


# Threads ----------------------------------------------------------------------------------------------------------

COUNTS = (2, 3, 7, 64)


@pytest.mark.parametrize("rank", [3, None])
def test_directions_apart_change_no_bit(kernels: CpuKernels, rank: int | None) -> None:
    case, expected = made_case(batch=2, d_inner=70, height=9, width=12, d_state=16, rank=rank)
    alone = scan_case_of(kernels, case)
    assert error(alone, expected) <= TOLERANCE
    for threads in COUNTS:
        assert torch.equal(scan_case_of(kernels, case, threads=threads), alone)


@pytest.mark.parametrize("rank", [3, None])
def test_segments_change_rounding_alone(kernels: CpuKernels, rank: int | None) -> None:
    case, expected = made_case(d_inner=5, height=45, width=41, d_state=4, rank=rank, steps=(0.001, 1.0))
    for threads in COUNTS:
        assert error(scan_case_of(kernels, case, threads=threads), expected) <= TOLERANCE
    # The same number of threads divides the same way.
    assert torch.equal(scan_case_of(kernels, case, threads=64), scan_case_of(kernels, case, threads=64))


def backwards(task: Callable[[int], None], count: int) -> int:
    """A pool of one thread, the last task first."""
    for i in reversed(range(count)):
        task(i)
    return 0


def shuffled_threads(task: Callable[[int], None], count: int) -> int:
    """A pool of threads with tasks in any order."""
    order = list(range(count))
    random.Random(count).shuffle(order)
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(task, order))
    return 0


@pytest.mark.parametrize("pool", [backwards, shuffled_threads])
def test_the_pool_of_the_caller_runs_the_tasks(kernels: CpuKernels, pool: Any) -> None:
    case, expected = made_case(d_inner=5, height=45, width=41, d_state=4, rank=3, steps=(0.001, 1.0))
    used: list[int] = []

    def counted(task: Callable[[int], None], count: int) -> int:
        used.append(count)
        return int(pool(task, count))

    y = scan_map(kernels, case.converted(torch.float32), threads=7, pool=counted)
    assert error(y, expected) <= TOLERANCE
    assert used and all(count > 1 for count in used)
    assert torch.equal(y, scan_case_of(kernels, case, threads=7))


def test_a_pool_that_cannot_run_is_told(widest: CpuKernels) -> None:
    case, _ = made_case(d_inner=5, height=45, width=41, d_state=4, rank=3, steps=(0.001, 1.0))
    with pytest.raises(AssertionError, match="the caller's threads could not run the scan"):
        scan_map(widest, case.converted(torch.float32), threads=7, pool=lambda task, count: 1)


def test_sixty_four_callers_at_once(kernels: CpuKernels) -> None:
    cases = [made_case(d_inner=9 + i, height=20, width=13, d_state=4, rank=3) for i in range(4)]
    alone = [scan_case_of(kernels, case) for case, _ in cases]
    apart = [scan_case_of(kernels, case, threads=3) for case, _ in cases]
    start = threading.Barrier(64)

    def call(i: int) -> bool:
        start.wait()
        case, _ = cases[i % 4]
        return all(
            torch.equal(scan_case_of(kernels, case, threads=threads), wanted[i % 4])
            for threads, wanted in ((1, alone), (3, apart))
        )

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(call, range(64)))


# Refusals ---------------------------------------------------------------------------------------------------------

SIZES = {"batch": 1, "groups": 1, "channels": 3, "height": 4, "width": 5, "d_state": 2, "dt_rank": 1}
HUGE = 2**62


@pytest.mark.parametrize(
    ("change", "status"),
    [
        *(({name: -1}, 1) for name in SIZES),
        ({"groups": 0}, 1),
        ({"d_state": 0}, 1),
        ({"direction_count": 0}, 1),
        ({"direction_count": -1}, 1),
        ({"threads": -1}, 1),
        ({"directions": (ctypes.c_int32 * 1)(4)}, 2),
        ({"directions": (ctypes.c_int32 * 1)(-1)}, 2),
        ({"element_type": 4}, 3),
        ({"element_type": -1}, 3),
        *(({name: HUGE}, 4) for name in SIZES),
        ({"height": 2**16, "width": 2**16}, 4),
        ({"height": 2**31}, 4),
        ({"height": 2**32, "width": 2**32}, 4),
        ({"channels": 2**21, "d_state": 2**21}, 4),
        ({"directions": ctypes.POINTER(ctypes.c_int32)()}, 5),
        ({"dt_rank": 0}, 5),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else ",".join(value),
)
def test_what_no_scan_can_be_is_refused(widest: CpuKernels, change: dict[str, Any], status: int) -> None:
    scan = make_scan(Sizes(**SIZES), ("row",), True, "float32", 1)
    for name, value in change.items():
        setattr(scan, name, value)
    assert_refused(widest, scan, status)


@pytest.mark.parametrize("missing", ["x", "dt", "B", "C", "A", "dt_weight", "y"])
def test_tensors_that_are_missing_are_refused(widest: CpuKernels, missing: str) -> None:
    assert_refused(widest, make_scan(Sizes(**SIZES), ("row",), True, "float32", 1), 5, missing)


def test_null_structures_are_refused(widest: CpuKernels) -> None:
    scan = make_scan(Sizes(**SIZES), ("row",), True, "float32", 1)
    assert widest.status(None, None) == widest.status(scan, None) == 5


def assert_refused(kernels: CpuKernels, scan: Scan, status: int, missing: str = "") -> None:
    """The status is this one, it has words, and no output is written."""
    tensors = {
        name: torch.zeros(64)
        for name in ("x", "dt", "B", "C", "A", "D", "dt_bias", "dt_weight", "y")
        if name != missing
    }
    if "y" in tensors:
        tensors["y"].fill_(7.0)
    assert kernels.status(scan, addresses(**tensors)) == status
    assert missing == "y" or (tensors["y"] == 7.0).all()
    assert "unknown" not in kernels.message(status) or status in (2, 3, 7)


def test_nothing_is_done_for_nothing(widest: CpuKernels) -> None:
    """An empty scan succeeds, whatever the pointers are."""
    for name in ("batch", "channels", "height", "width"):
        scan = make_scan(Sizes(**{**SIZES, name: 0}), ("row",), True, "float32", 1)
        assert widest.status(scan, addresses()) == 0


def test_more_memory_than_there_is(widest: CpuKernels) -> None:
    """Maps that could be addressed, and for which no scratch memory can be had: refused before anything is read."""
    scan = make_scan(Sizes(1, 1, 1, 2**15, 2**15, 1000, 0), ("row",), True, "float32", 1)
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))\n"
        + LOAD
        + "print(kernels.status("
        "make_scan(Sizes(1, 1, 1, 2**15, 2**15, 1000, 0), ('row',), True, 'float32', 1),"
        "Tensors(x=64, dt=64, B=64, C=64, A=64, y=64)))"
    )
    assert scan.height == 2**15
    if sys.platform == "win32":
        pytest.skip("no limits of memory")
    assert in_process(code) == "6"


# The library ------------------------------------------------------------------------------------------------------

LOAD = """
import ctypes, sys
from pathlib import Path
from quartermap_deploy.native.cpu_kernels import CpuKernels, Sizes, Tensors, make_scan
kernels = CpuKernels.load(Path(sys.argv[1]))
"""


def in_process(code: str, **environment: str) -> str:
    """Run Python without torch in a process of its own, with the kernels loaded, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(cpu_builds.library("all"))],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_library_describes_itself(widest: CpuKernels) -> None:
    assert widest.version == INTERFACE
    contract = json.loads(widest._library.quartermap_cpu_contract())
    assert contract["version"] == INTERFACE and contract["instruction_sets"] == BUILT_SETS
    assert widest.instruction_set in BUILT_SETS
    assert widest.message(12345) == "unknown status"


def test_an_unknown_instruction_set_is_not_chosen(widest: CpuKernels) -> None:
    before = widest.instruction_set
    assert not widest.choose("mmx") and not widest.choose("")
    assert widest.instruction_set == before


def test_the_environment_chooses_the_instruction_set() -> None:
    code = LOAD + "print(kernels.instruction_set)"
    assert in_process(code, QUARTERMAP_INSTRUCTION_SET=BUILT_SETS[-1]) == BUILT_SETS[-1]
    assert (
        in_process(code, QUARTERMAP_INSTRUCTION_SET="")
        == CpuKernels.load(cpu_builds.library("all")).instruction_set
    )


def test_an_unknown_instruction_set_in_the_environment_is_refused() -> None:
    code = LOAD + (
        "scan = make_scan(Sizes(1, 1, 1, 1, 1, 1, 0), ('row',), True, 'float32', 1)\n"
        "print(kernels.instruction_set, kernels.message(kernels.status(scan, Tensors())))"
    )
    said = in_process(code, QUARTERMAP_INSTRUCTION_SET="avx1024")
    assert said == "none the instruction set that was asked for is unknown, or this processor lacks it"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_given_back() -> None:
    """A scan that needs 130 MB of scratch memory leaves no more than the bound behind."""
    code = LOAD + (
        "def resident():\n"
        "    return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "sizes = {'x': 2**14, 'dt': 2**16, 'B': 2**24, 'C': 2**24, 'A': 2**10, 'y': 2**14}\n"
        "memory = {name: (ctypes.c_float * count)() for name, count in sizes.items()}\n"
        "for array in memory.values(): ctypes.memset(array, 0, ctypes.sizeof(array))\n"
        "tensors = Tensors(**{name: ctypes.addressof(array) for name, array in memory.items()})\n"
        "names = ('row', 'column', 'row_reverse', 'column_reverse')\n"
        "scan = make_scan(Sizes(1, 1, 1, 128, 128, 256, 0), names, True, 'float32', 1)\n"
        "before = resident()\n"
        "for _ in range(3):\n"
        "    assert kernels.status(scan, tensors) == 0\n"
        "peak = int([l for l in open('/proc/self/status') if 'VmHWM' in l][0].split()[1]) * 1024\n"
        "print(resident() - before, peak - before)"
    )
    kept, needed = map(int, in_process(code).split())
    assert needed > 2 * KEPT_BYTES
    assert kept <= KEPT_BYTES + (8 << 20)
