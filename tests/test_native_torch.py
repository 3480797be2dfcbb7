"""The kernels for CPUs behind the torch operators: the same values, gradients and graphs as without them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cpu_builds
import pytest
import torch
from helpers import ScanCase, error, scan_case
from test_operators import MAP_CASES, ScanModule, converted, map_arguments, sequence_case
from torch import Tensor

from quartermap_deploy.native.cpu_kernels import CpuKernels
from quartermap_deploy.scan import cpu
from quartermap_deploy.scan.definition import selective_scan_definition
from quartermap_deploy.scan.operators import selective_scan, selective_scan_2d
from quartermap_deploy.scan.vectorized import (
    selective_scan_2d_gradients,
    selective_scan_2d_vectorized,
    selective_scan_vectorized,
)

TOLERANCE = 1e-6


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[CpuKernels]:
    """Let this process have the kernels, as one has where they are built."""
    monkeypatch.setenv("QUARTERMAP_NATIVE", str(cpu_builds.library("all")))
    cpu.kernels.cache_clear()
    found = cpu.kernels()
    assert found is not None
    yield found
    cpu.kernels.cache_clear()


def scan(case: ScanCase, tensors: tuple[Tensor, ...]) -> Tensor:
    weight = tensors[7] if case.low_rank else None
    return selective_scan_2d(
        *tensors[:7], dt_weight=weight, directions=case.directions, softplus=case.softplus
    )


def vectorised(case: ScanCase, tensors: tuple[Tensor, ...]) -> Tensor:
    weight = tensors[7] if case.low_rank else None
    return selective_scan_2d_vectorized(*tensors[:7], weight, case.directions, case.softplus)


def test_without_a_library_the_vectorised_form_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTERMAP_NATIVE", "0")
    cpu.kernels.cache_clear()
    case = scan_case()
    tensors = case.converted(torch.float32)
    assert cpu.kernels() is None
    assert torch.equal(scan(case, tensors), vectorised(case, tensors))


@pytest.mark.parametrize("rank", [3, None])
def test_maps_are_scanned_by_the_kernels(rank: int | None) -> None:
    case = scan_case(2, 9, 15, 13, d_state=4, rank=rank, directions=("row", "column_reverse", "row"))
    tensors = case.converted(torch.float32)
    y = scan(case, tensors)
    weight = tensors[7] if rank else None
    kernels = cpu.native_scan_2d(*tensors[:7], weight, case.directions, case.softplus)
    assert kernels is not None and torch.equal(y, kernels)
    assert error(y, case.expected(torch.float32)) <= TOLERANCE
    assert error(y, vectorised(case, tensors)) <= TOLERANCE


@pytest.mark.parametrize("options", [{}, {"skip": False, "bias": False}, {"softplus": False}])
def test_sequences_are_scanned_by_the_kernels(options: dict[str, Any]) -> None:
    arguments, softplus = sequence_case(300, groups=2, d_state=3, **options)
    single = converted(arguments, torch.float32)
    y = selective_scan(*single, softplus)  # type: ignore[arg-type]
    kernels = cpu.native_scan(*single, softplus)  # type: ignore[arg-type]
    assert kernels is not None and torch.equal(y, kernels)
    expected = selective_scan_definition(*converted(single, torch.float64), softplus)  # type: ignore[arg-type]
    assert error(y, expected) <= TOLERANCE
    assert error(y, selective_scan_vectorized(*single, softplus)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    case = scan_case(2, 9, 15, 13, d_state=4)
    tensors = case.converted(dtype)
    y = scan(case, tensors)
    assert y.dtype == dtype
    assert error(y.float(), case.expected(dtype)) <= torch.finfo(dtype).eps / 2 + TOLERANCE


def test_maps_of_several_types_are_not_rounded_on_the_way_in() -> None:
    case = scan_case(2, 9, 15, 13, d_state=4)
    x, *rest = case.converted(torch.float32)
    tensors = (x.half(), *rest)
    y = scan(case, tensors)
    assert y.dtype == torch.float16
    exact = scan(case, (x.half().float(), *rest))
    assert torch.equal(y, exact.half())


def test_float64_is_computed_in_float64() -> None:
    case = scan_case(2, 3, 14, 9, d_state=2, rank=None)
    tensors = case.converted(torch.float64)
    assert cpu.native_scan_2d(*tensors, None, case.directions, case.softplus) is None
    assert error(scan(case, tensors), case.expected()) <= 1e-13


def test_layout_in_memory_does_not_matter_and_inputs_stay_as_they_are() -> None:
    case = scan_case(2, 8, 5, 7)
    plain = case.converted(torch.float32)
    strided = tuple(
        tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for tensor in plain
    )
    before = [tensor.clone() for tensor in strided]
    y = scan(case, strided)
    assert y.is_contiguous() and torch.equal(y, scan(case, plain))
    assert all(torch.equal(now, then) for now, then in zip(strided, before, strict=True))


@pytest.mark.parametrize("place", [1, 2, 3, 5, 6, 7])  # fewer states in A alone are broadcast
def test_shapes_that_do_not_fit_are_no_business_of_the_kernels(place: int) -> None:
    """They would read past the end; PyTorch says what is wrong."""
    case = scan_case(2, 4, 5, 6, d_state=2, rank=3)
    tensors = list(case.converted(torch.float32))
    tensors[place] = tensors[place][..., :-1].contiguous()
    assert cpu.native_scan_2d(*tensors, case.directions, case.softplus) is None
    with pytest.raises(Exception, match=r"shape|size|unflatten|dimension"):
        scan(case, tuple(tensors))


def test_empty_maps() -> None:
    case = scan_case(2, 4, 5, 6)
    tensors = case.converted(torch.float32)
    empty = tuple(tensor[:0] if tensor.ndim == 4 else tensor for tensor in tensors)
    assert scan(case, empty).shape == (0, 4, 5, 6)


# Gradients and graphs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MAP_CASES))
def test_gradients_of_maps_are_those_of_the_vectorised_form(name: str) -> None:
    arguments = map_arguments(MAP_CASES[name], torch.float32, requires_grad=True)
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    y = torch.ops.quartermap.selective_scan_2d.default(*arguments)
    random = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(y, tensors, random)
    plain = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
    plain[8] = plain[8].split(",")
    expected = [g for g in selective_scan_2d_gradients(random, *plain) if g is not None]
    for one, other in zip(found, expected, strict=False):
        assert torch.equal(one, other)


def test_gradients_agree_with_differences_of_the_kernels_own_values() -> None:
    """Float32 alone, so along a direction, with a step that is large beside rounding."""
    case = scan_case(1, 3, 6, 5, d_state=2, rank=2)
    tensors = [tensor.requires_grad_() for tensor in map(torch.clone, case.converted(torch.float32))]
    weights = torch.randn(1, 3, 6, 5, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(scan(case, tuple(tensors)), tensors, weights)
    for place, gradient in enumerate(gradients):
        direction = gradient / gradient.norm()
        step = 1e-2

        def moved(by: float, place: int = place, direction: Tensor = direction) -> float:
            values = [t.detach() + (by * direction if i == place else 0) for i, t in enumerate(tensors)]
            return float((scan(case, tuple(values)).double() * weights).sum())

        slope = (moved(step) - moved(-step)) / (2 * step)
        assert slope == pytest.approx(float(gradient.norm()), rel=2e-2)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_operators_pass_opcheck(requires_grad: bool) -> None:
    arguments = map_arguments(MAP_CASES["low_rank"], torch.float32, requires_grad)
    torch.library.opcheck(torch.ops.quartermap.selective_scan_2d.default, arguments)
    given, softplus = sequence_case(6, groups=2, d_state=2)
    single = [
        tensor if tensor is None else tensor.clone().requires_grad_(requires_grad)
        for tensor in converted(given, torch.float32)
    ]
    torch.library.opcheck(torch.ops.quartermap.selective_scan.default, (*single, softplus))


def test_the_operator_stays_one_node_of_an_exported_program() -> None:
    case = scan_case(2, 3, 5, 4)
    arguments = case.converted(torch.float32)
    program = torch.export.export(ScanModule(), arguments)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == ["quartermap.selective_scan_2d.default"]
    assert torch.equal(program.module()(*arguments), scan(case, arguments))


def test_a_compiled_module_calls_the_kernels() -> None:
    case = scan_case(2, 3, 5, 4)
    arguments = case.converted(torch.float32)
    compiled = torch.compile(ScanModule(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), scan(case, arguments))


@pytest.fixture
def threads_of_torch() -> Iterator[None]:
    """Put the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_of_torch")
@pytest.mark.parametrize("threads", [1, 3])
def test_sixty_four_callers_at_once(threads: int) -> None:
    """Each with a team of OpenMP's threads of its own, where torch has several."""
    cases = [scan_case(1, 9 + i, 20, 13, d_state=4, rank=3) for i in range(4)]
    arguments = [case.converted(torch.float32) for case in cases]
    expected = [case.expected(torch.float32) for case in cases]
    start = threading.Barrier(64)

    def call(i: int) -> float:
        torch.set_num_threads(threads)
        start.wait()
        return max(error(scan(cases[i % 4], arguments[i % 4]), expected[i % 4]) for _ in range(2))

    with ThreadPoolExecutor(64) as pool:
        assert all(worst <= TOLERANCE for worst in pool.map(call, range(64)))


@pytest.mark.usefixtures("threads_of_torch")
@pytest.mark.parametrize("openmp", [True, False])
def test_openmp_and_threads_of_its_own_give_the_same(openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from quartermap_deploy.native import cpu_kernels

    if openmp and cpu_kernels.team_start() is None:
        pytest.skip("this PyTorch has no OpenMP runtime that can be called")
    case = scan_case(2, 70, 9, 12, d_state=16, rank=3)
    tensors = case.converted(torch.float32)
    alone = scan(case, tensors)
    if not openmp:
        monkeypatch.setattr(cpu_kernels, "team_start", lambda: None)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(scan(case, tensors), alone)


@pytest.mark.usefixtures("threads_of_torch")
def test_the_threads_of_torch_are_used() -> None:
    """More threads divide a long scan otherwise, which shows in its rounding alone."""
    case = scan_case(1, 8, 60, 61, d_state=4, rank=3, directions=("row",))
    tensors = case.converted(torch.float32)
    alone = scan(case, tensors)
    torch.set_num_threads(5)
    y = scan(case, tensors)
    assert error(y, case.expected(torch.float32)) <= TOLERANCE
    assert not torch.equal(y, alone)
