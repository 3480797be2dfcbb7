"""`recover_2d` on small modules: legal spellings become one SelectiveScan2D with the same numbers, the others stay."""

from __future__ import annotations

import functools

import onnx
import pytest
import torch
from helpers import error, main_graph, run_session, session
from scan_modules import (
    CHANNELS,
    SPELLINGS,
    STATE,
    FullRank,
    Together,
)
from torch import Tensor, nn
from tracing import INPUT, traced

from quartermap_deploy.lowering.operator import DIRECTIONS, SELECTIVE_SCAN, SELECTIVE_SCAN_2D
from quartermap_deploy.passes import lower
from quartermap_deploy.passes.recover_2d import Recovered, recover_2d

TOLERANCE = 2e-6
"""Of the largest output: both sides compute in float32."""


def scan_nodes(model: onnx.ModelProto) -> dict[str, str]:
    """Return the operator of each scan, by its name."""
    return {
        node.name: node.op_type
        for node in model.graph.node
        if node.op_type in (SELECTIVE_SCAN, SELECTIVE_SCAN_2D)
    }


def picture(*shape: int, seed: int = 0) -> Tensor:
    """Return a random input."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(model: onnx.ModelProto, module: nn.Module, *shapes: tuple[int, ...]) -> None:
    """Require that a model gives what the module gives, at each shape of its input."""
    ready = session(lower(model))
    for shape in shapes:
        x = picture(*shape)
        with torch.no_grad():
            expected = module(x)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for found, wanted in zip(run_session(ready, {INPUT: x.numpy()}).values(), expected, strict=True):
            assert error(found, wanted) <= TOLERANCE


@functools.cache
def spelt(sides: bool) -> tuple[nn.Module, onnx.ModelProto, Recovered]:
    """Return spellings side by side, their traced graph and what was recovered: all, or two where sizes are open."""
    names = ("assigned", "four_calls") if sides else tuple(SPELLINGS)
    module = Together([SPELLINGS[name](seed, bool(seed % 2)) for seed, name in enumerate(names)])
    model = traced(module, 2, CHANNELS, 4, 6, sides=sides)
    return module, model, recover_2d(model)


@pytest.mark.parametrize("sides", [False, True])
def test_every_spelling_becomes_one_scan_of_the_map(sides: bool) -> None:
    module, model, recovered = spelt(sides)
    count = len(recovered.report.scans)
    assert scan_nodes(recovered.model) == {
        f"block_{block}/scan": SELECTIVE_SCAN_2D for block in range(1, count + 1)
    }
    other = (
        [(1, CHANNELS, 7, 3), (3, CHANNELS, 2, 9)] if sides else [(1, CHANNELS, 4, 6), (3, CHANNELS, 4, 6)]
    )
    assert_same(recovered.model, module, (2, CHANNELS, 4, 6), *other)
    onnx.checker.check_model(lower(recovered.model), full_check=True)
    assert len(recovered.model.graph.node) < len(model.graph.node) // 2


def test_the_report_says_what_was_recovered() -> None:
    _, _, recovered = spelt(False)
    assert [scan.refused for scan in recovered.report.scans] == [None] * len(SPELLINGS)
    first, four = recovered.report.scans[0], recovered.report.scans[list(SPELLINGS).index("four_calls")]
    assert (first.d_inner, first.d_state, first.rank) == (CHANNELS, STATE, 1)
    assert first.orders["block_1/scan"].directions == DIRECTIONS
    assert four.scans == ("block_4/scan", "block_4/scan_2", "block_4/scan_3", "block_4/scan_4")
    assert four.nodes == ("block_4/scan",)
    assert [four.orders[name].directions for name in four.scans] == [(name,) for name in DIRECTIONS]
    assert len(recovered.report.changed) == len(SPELLINGS)
    assert (
        "row, column, row_reverse, column_reverse of 6×4×6, state 2, time step of rank 1" in first.describe()
    )
    assert set(recovered.orders) >= {"block_1/scan", "block_4/scan_4", "block_5/scan_2"}
    assert all(order.merged for order in recovered.orders.values())


def test_the_model_that_is_given_stays_as_it_is_and_a_second_run_changes_nothing() -> None:
    _, model, recovered = spelt(True)
    before = model.SerializeToString(deterministic=True)
    again = recover_2d(recovered.model)
    assert model.SerializeToString(deterministic=True) == before
    assert main_graph(again.model) == main_graph(recovered.model)
    assert again.report.changed == [] and again.report.scans == []


def test_a_time_step_without_low_rank_keeps_its_map_and_absent_parameters_are_zero() -> None:
    module = FullRank()
    recovered = recover_2d(traced(module, 2, CHANNELS, 3, 5))
    (scan,) = [node for node in recovered.model.graph.node if node.op_type == SELECTIVE_SCAN_2D]
    assert recovered.report.scans[0].rank is None
    assert len(scan.input) == 7
    assert_same(recovered.model, module, (2, CHANNELS, 3, 5))
