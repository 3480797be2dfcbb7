"""The definition of the scan against the public code's numbers, and against one written here step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import Array, ScanCase, error, scan_case
from hypothesis import given
from hypothesis import strategies as st
from reference_models import DATA

from quartermap_deploy.scan.definition import (
    DIRECTIONS,
    cross_merge,
    cross_scan,
    selective_scan_definition,
)

CASES = (0, 1, 2, 3, 4)


def public_case(number: int) -> dict[str, Array]:
    """Return the arrays of one case of the public selective scan."""
    with np.load(DATA / "selective_scan.npz") as file:
        prefix = f"case{number}/"
        return {key.removeprefix(prefix): file[key] for key in file.files if key.startswith(prefix)}


@pytest.mark.parametrize("number", CASES)
def test_equals_the_public_scan(number: int) -> None:
    case = public_case(number)
    softplus = bool(case.pop("delta_softplus"))
    expected = case.pop("y")
    tensors = {name: torch.from_numpy(array).double() for name, array in case.items()}
    y = selective_scan_definition(**tensors, delta_softplus=softplus)
    assert y.dtype == torch.float64
    # Case 4 is stored in float32: its result is as exact as that.
    assert error(y, expected) <= (1e-6 if expected.dtype == np.float32 else 1e-12)


def test_the_public_cases_cover_every_option() -> None:
    cases = [public_case(number) for number in CASES]
    assert {case["u"].shape[-1] for case in cases} == {49, 196, 63, 1, 3136}
    assert {case["A"].shape[1] for case in cases} == {1, 2, 4, 16}
    assert {case["B"].shape[1] for case in cases} == {1, 2, 4}
    for option in ("D", "delta_bias"):
        assert {option in case for case in cases} == {True, False}
    assert {bool(case["delta_softplus"]) for case in cases} == {True, False}


def walk(direction: str, height: int, width: int) -> list[tuple[int, int]]:
    """Return the positions of a map in the order of one direction."""
    if direction.startswith("row"):
        order = [(i, j) for i in range(height) for j in range(width)]
    else:
        order = [(i, j) for j in range(width) for i in range(height)]
    return order[::-1] if direction.endswith("_reverse") else order


def naive(case: ScanCase) -> Array:
    """Scan a map by walking its positions one by one, in NumPy and float64."""
    x, dt, B, C, A, D, bias = (tensor.numpy() for tensor in case.tensors[:7])
    batch, d_inner, height, width = x.shape
    d_state, count = A.shape[1], len(case.directions)
    y = np.zeros_like(x)
    for image in range(batch):
        for k, direction in enumerate(case.directions):
            channels, states = slice(k * d_inner, (k + 1) * d_inner), slice(k * d_state, (k + 1) * d_state)
            state = np.zeros((d_inner, d_state))
            for i, j in walk(direction, height, width):
                if case.low_rank:
                    rank = dt.shape[1] // count
                    step = case.tensors[7].numpy()[channels] @ dt[image, k * rank : (k + 1) * rank, i, j]
                else:
                    step = dt[image, channels, i, j]
                step = step + bias[channels]
                if case.softplus:
                    step = np.logaddexp(0.0, step)
                drive = np.outer(step * x[image, :, i, j], B[image, states, i, j])
                state = np.exp(step[:, None] * A[channels]) * state + drive
                y[image, :, i, j] += state @ C[image, states, i, j] + D[channels] * x[image, :, i, j]
    return y


@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    d_state=st.integers(1, 3),
    rank=st.sampled_from([None, 1, 2]),
    directions=st.lists(st.sampled_from(DIRECTIONS), min_size=1, max_size=4),
    softplus=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_map_form_equals_a_walk_over_the_positions(
    batch: int,
    height: int,
    width: int,
    d_state: int,
    rank: int | None,
    directions: list[str],
    softplus: bool,
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
        steps=(0.01, 3.0),
        seed=seed,
    )
    assert error(case.expected(), naive(case)) <= 1e-12


@pytest.mark.parametrize(("height", "width"), [(3, 5), (1, 4), (4, 1), (4, 4)])
def test_merging_is_the_adjoint_of_scanning(height: int, width: int) -> None:
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    y = torch.randn(2, len(DIRECTIONS), 3, height * width, dtype=torch.float64)
    scanned, merged = cross_scan(x), cross_merge(y, height, width)
    assert scanned.shape == y.shape and merged.shape == x.shape
    torch.testing.assert_close((scanned * y).sum(), (x * merged).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_direction_visits_the_positions_in_its_order(direction: str) -> None:
    height, width = 3, 4
    numbered = torch.arange(height * width).view(1, 1, height, width)
    visited = cross_scan(numbered, (direction,)).flatten().tolist()
    assert visited == [i * width + j for i, j in walk(direction, height, width)]
