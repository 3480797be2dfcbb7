"""The torch operators against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import ScanCase, error, scan_case
from hypothesis import example, given
from hypothesis import strategies as st
from test_definition import CASES, public_case
from torch import Tensor, nn
from torch.export import Dim

from quartermap_deploy.scan.definition import DIRECTIONS, selective_scan_definition
from quartermap_deploy.scan.operators import selective_scan, selective_scan_2d

TOLERANCE = 1e-6
STEPS = [(0.01, 20.0), (0.01, 0.0101), (1.0, 1.01), (4.0, 4.01), (20.0, 20.1)]
"""Ranges of dt·|A| per position."""


def scan(case: ScanCase, dtype: torch.dtype = torch.float32) -> Tensor:
    """Run the map operator on a case in an element type."""
    tensors = case.converted(dtype)
    return selective_scan_2d(
        *tensors[:7],
        dt_weight=tensors[7] if case.low_rank else None,
        directions=case.directions,
        softplus=case.softplus,
    )


@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    d_state=st.sampled_from([1, 2, 4, 16]),
    rank=st.sampled_from([None, 1, 2, 3]),
    directions=st.lists(st.sampled_from(DIRECTIONS), min_size=1, max_size=4),
    softplus=st.booleans(),
    steps=st.sampled_from(STEPS),
    seed=st.integers(0, 1000),
)
@example(1, 1, 1, 1, 1, list(DIRECTIONS), True, STEPS[0], 0)
@example(2, 1, 17, 2, None, list(DIRECTIONS), True, STEPS[0], 0)
@example(2, 17, 1, 1, 2, list(DIRECTIONS), False, STEPS[0], 0)
def test_a_map_scan_equals_the_definition(
    batch: int,
    height: int,
    width: int,
    d_state: int,
    rank: int | None,
    directions: list[str],
    softplus: bool,
    steps: tuple[float, float],
    seed: int,
) -> None:
    case = scan_case(
        batch,
        3,
        height,
        width,
        d_state=d_state,
        rank=rank,
        directions=directions,
        softplus=softplus,
        steps=steps,
        seed=seed,
    )
    y = scan(case)
    assert y.dtype == torch.float32 and y.is_contiguous()
    assert error(y, case.expected(torch.float32)) <= TOLERANCE


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("decay", [1.0, 16.0])
@pytest.mark.parametrize("steps", STEPS)
def test_steps_of_every_size_are_exact_over_a_long_map(
    steps: tuple[float, float], decay: float, skip: bool
) -> None:
    # Low rank at one state and full rank at two, because these are different code in the function body too.
    for d_state, rank in ((1, 2), (2, None)):
        case = scan_case(1, 2, 56, 56, d_state=d_state, rank=rank, steps=steps, decay=decay, skip=skip)
        assert error(scan(case), case.expected(torch.float32)) <= TOLERANCE


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("step", [1e-4, 1e-3, 1e-2])
def test_small_steps_do_not_gather_rounding_errors(step: float, even: bool) -> None:
    # On an even map every decay is rounded the same way, and nothing averages out.
    for d_state, rank in ((1, 2), (2, None)):
        steps = (step, 1.01 * step)
        case = scan_case(1, 2, 56, 56, d_state=d_state, rank=rank, steps=steps, skip=False, even=even)
        assert error(scan(case), case.expected(torch.float32)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("d_state", "rank"), [(1, 2), (4, None)])
def test_half_precision_rounds_only_inputs_and_output(dtype: torch.dtype, d_state: int, rank: int) -> None:
    case = scan_case(2, 3, 14, 9, d_state=d_state, rank=rank)
    y = scan(case, dtype)
    assert y.dtype == dtype
    # The expected value has the same rounded inputs, so only the rounding of y itself is left.
    assert error(y.float(), case.expected(dtype)) <= torch.finfo(dtype).eps / 2 + TOLERANCE


def test_float64_stays_float64() -> None:
    case = scan_case(2, 3, 14, 9, d_state=2, rank=None)
    y = scan(case, torch.float64)
    assert y.dtype == torch.float64
    assert error(y, case.expected()) <= 1e-13


def test_layout_in_memory_does_not_matter_and_inputs_stay_as_they_are() -> None:
    case = scan_case(2, 8, 5, 7)
    plain = case.converted(torch.float32)
    strided = [t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in plain]
    before = [tensor.clone() for tensor in plain]
    assert not strided[0].is_contiguous()
    assert torch.equal(
        selective_scan_2d(*strided[:7], dt_weight=strided[7]),
        selective_scan_2d(*plain[:7], dt_weight=plain[7]),
    )
    assert all(torch.equal(now, then) for now, then in zip(plain, before, strict=True))


def test_an_unknown_direction_is_refused() -> None:
    tensors = scan_case().converted(torch.float32)
    with pytest.raises(ValueError, match=r"\['rows'\].*row_reverse"):
        selective_scan_2d(*tensors[:7], dt_weight=tensors[7], directions=("row", "column", "rows", "row"))


# The scan over a sequence -----------------------------------------------------------------------------------------


def sequence_case(
    length: int, groups: int, d_state: int, skip: bool = True, bias: bool = True, softplus: bool = True
) -> tuple[list[Tensor | None], bool]:
    """Return random arguments of selective_scan in float64."""
    case = scan_case(
        2, 3, 1, length, d_state=d_state, rank=None, directions=["row"] * groups, softplus=softplus
    )
    x, dt, B, C, A, D, dt_bias = case.tensors
    arguments = [
        x[:, :, 0].repeat(1, groups, 1),
        dt[:, :, 0] if bias else dt[:, :, 0] + dt_bias[:, None],
        A,
        *(m[:, :, 0].unflatten(1, (groups, d_state)) for m in (B, C)),
        D if skip else None,
        dt_bias if bias else None,
    ]
    return arguments, softplus


def converted(arguments: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Return the arguments in an element type."""
    return [None if tensor is None else tensor.to(dtype) for tensor in arguments]


@pytest.mark.parametrize("number", CASES)
def test_the_sequence_scan_equals_the_public_one(number: int) -> None:
    case = public_case(number)
    softplus = bool(case.pop("delta_softplus"))
    expected = case.pop("y")
    tensors = {name: torch.from_numpy(array) for name, array in case.items()}
    y = selective_scan(**{n: t.float() for n, t in tensors.items()}, delta_softplus=softplus)
    assert error(y, expected) <= TOLERANCE
    if expected.dtype == "float64":
        assert error(selective_scan(**tensors, delta_softplus=softplus), expected) <= 1e-12


# One position, the borders of the chunks, and lengths that are several levels deep.
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 513, 1024])
@pytest.mark.parametrize("options", [{}, {"skip": False}, {"bias": False, "softplus": False}])
def test_the_sequence_scan_equals_the_definition(length: int, options: dict[str, Any]) -> None:
    arguments, softplus = sequence_case(length, groups=2, d_state=3, **options)
    single = converted(arguments, torch.float32)
    expected = selective_scan_definition(*converted(single, torch.float64), softplus)  # type: ignore[arg-type]
    assert error(selective_scan(*single, softplus), expected) <= TOLERANCE  # type: ignore[arg-type]


# What torch asks of an operator -------------------------------------------------------------------------------------

MAP_CASES = {
    "low_rank": scan_case(2, 2, 2, 3, d_state=2, rank=1),
    "full_rank": scan_case(1, 2, 3, 2, d_state=1, rank=None),
    "two_directions": scan_case(1, 2, 3, 3, rank=1, directions=("column_reverse", "row"), softplus=False),
}


def map_arguments(case: ScanCase, dtype: torch.dtype, requires_grad: bool) -> tuple[Any, ...]:
    """Return the arguments of the registered map operator."""
    tensors = [tensor.requires_grad_(requires_grad) for tensor in map(torch.clone, case.converted(dtype))]
    weight = tensors[7] if case.low_rank else None
    return (*tensors[:7], weight, ",".join(case.directions), case.softplus)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", sorted(MAP_CASES))
def test_the_map_operator_passes_opcheck(name: str, requires_grad: bool) -> None:
    arguments = map_arguments(MAP_CASES[name], torch.float32, requires_grad)
    torch.library.opcheck(torch.ops.quartermap.selective_scan_2d.default, arguments)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("options", [{}, {"skip": False, "bias": False}])
def test_the_sequence_operator_passes_opcheck(options: dict[str, Any], requires_grad: bool) -> None:
    arguments, softplus = sequence_case(6, groups=2, d_state=2, **options)
    single = [
        tensor if tensor is None else tensor.clone().requires_grad_(requires_grad)
        for tensor in converted(arguments, torch.float32)
    ]
    torch.library.opcheck(torch.ops.quartermap.selective_scan.default, (*single, softplus))


@pytest.mark.parametrize("name", sorted(MAP_CASES))
def test_gradients_of_the_map_operator(name: str) -> None:
    arguments = map_arguments(MAP_CASES[name], torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(torch.ops.quartermap.selective_scan_2d.default, arguments)


@pytest.mark.parametrize("options", [{}, {"skip": False, "bias": False}, {"softplus": False}])
def test_gradients_of_the_sequence_operator(options: dict[str, Any]) -> None:
    # Longer than two chunks, so that the levels of the recurrence take part.
    arguments, softplus = sequence_case(19, groups=2, d_state=2, **options)
    doubles = [None if tensor is None else tensor.clone().requires_grad_() for tensor in arguments]
    scan_operator = torch.ops.quartermap.selective_scan.default
    assert torch.autograd.gradcheck(scan_operator, (*doubles, softplus), fast_mode=True)


def test_gradients_come_in_the_types_of_their_tensors() -> None:
    tensors = [tensor.requires_grad_() for tensor in map(torch.clone, scan_case().converted(torch.float16))]
    selective_scan_2d(*tensors[:7], dt_weight=tensors[7]).sum().backward()
    for tensor in tensors:
        assert tensor.grad is not None
        assert tensor.grad.dtype == tensor.dtype and tensor.grad.shape == tensor.shape
        assert torch.isfinite(tensor.grad).all()


class ScanModule(nn.Module):
    """A module that does nothing but scan."""

    def forward(self, *tensors: Tensor) -> Tensor:
        """Scan a map at low rank."""
        return selective_scan_2d(*tensors[:7], dt_weight=tensors[7])


def test_the_operator_stays_one_node_of_an_exported_program() -> None:
    maps = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    shapes = tuple([maps] * 4 + [None] * 4)
    arguments = scan_case(2, 3, 5, 4).converted(torch.float32)
    program = torch.export.export(ScanModule(), arguments, dynamic_shapes=(shapes,))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == ["quartermap.selective_scan_2d.default"]
    for batch, height, width in ((3, 7, 9), (2, 4, 5)):
        other = scan_case(batch, 3, height, width, seed=1)
        y = program.module()(*other.converted(torch.float32))
        assert error(y, other.expected(torch.float32)) <= TOLERANCE
