"""The kernel of several states on tensor cores, run on the CPU as it is: every plan, against the float64 definition.

As tests/test_plugin_tensor_cores.py does it for one state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from tensor_core_scans import (
    ADA,
    FEW_MULTIPROCESSORS,
    H100,
    ONE_MULTIPROCESSOR,
    REGIMES,
    TOLERANCES,
    Device,
    Regime,
    Sizes,
    barriers,
    check,
    kernels,
    large_drive,
    large_state,
    library,
    make_inputs,
    make_plan,
    relative,
)
from torch import Tensor

from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.scan.cuda import GENERAL, SPLIT, STREAMED, Kernels, make_scan
from quartermap_deploy.scan.definition import DIRECTIONS

__all__ = ["kernels", "library"]


PLANS: list[tuple[Sizes, int, Device, int, int]] = [
    # (batch, d_inner, H, W, R), states, device, kernels, blocks
    # Chunks of a direction apart, with look-back; whole directions apart; all directions in one block.
    ((1, 16, 56, 56, 3), 16, H100, SPLIT, 28),
    ((1, 16, 56, 56, 3), 2, ONE_MULTIPROCESSOR, SPLIT, 4),
    ((1, 16, 56, 56, 3), 3, ADA, STREAMED, 1),
    ((1, 32, 28, 28, 12), 16, H100, SPLIT, 16),
    ((2, 16, 14, 14, 24), 16, H100, SPLIT, 8),
    ((2, 16, 14, 14, 24), 16, ADA, STREAMED, 2),
    ((1, 32, 7, 7, 48), 16, H100, SPLIT, 8),
    # Segments of 8.
    ((1, 16, 64, 64, 6), 4, H100, SPLIT, 32),
    ((1, 16, 16, 24, 40), 16, ADA, STREAMED, 1),
    ((2, 16, 8, 2, 3), 5, H100, SPLIT, 8),
    # Blocks of rows that do not divide a warp's four slots; odd widths, ranks and numbers of states; a single column.
    ((1, 16, 21, 30, 7), 5, ONE_MULTIPROCESSOR, SPLIT, 4),
    ((2, 32, 21, 30, 64), 3, ADA, STREAMED, 4),
    ((1, 32, 21, 35, 33), 7, H100, SPLIT, 24),
    ((2, 32, 14, 1, 1), 64, ONE_MULTIPROCESSOR, SPLIT, 16),
]


@pytest.mark.parametrize("element_type", TOLERANCES)
@pytest.mark.parametrize(("sizes", "states", "device", "which", "blocks"), PLANS, ids=str)
def test_plans(
    kernels: Kernels, sizes: Sizes, states: int, device: Device, which: int, blocks: int, element_type: str
) -> None:
    assert check(kernels, sizes, element_type, device, which, states=states).blocks == blocks


@pytest.mark.parametrize("regime", REGIMES[1:], ids=str)
@pytest.mark.parametrize("which", [SPLIT, STREAMED])
def test_regimes(kernels: Kernels, which: int, regime: Regime) -> None:
    check(kernels, (1, 16, 28, 28, 12), "float16", H100, which, regime=regime, states=16)


@pytest.mark.parametrize(
    "directions",
    [("column_reverse",), ("column", "row_reverse", "row"), (*DIRECTIONS, "column")],
    ids=",".join,
)
def test_other_lists_of_directions(kernels: Kernels, directions: Sequence[str]) -> None:
    for which in (SPLIT, STREAMED):
        check(kernels, (1, 16, 14, 20, 5), "float16", ADA, which, directions=directions, states=4)


@pytest.mark.parametrize(("batch", "which"), [(1, SPLIT), (128, STREAMED)])
def test_what_is_chosen_for_models_of_16_states(kernels: Kernels, batch: int, which: int) -> None:
    """MedMamba's and VM-UNet's maps; float32 stays general, and so do maps of odd width in large batches."""
    for d_inner, side, rank in ((192, 56, 6), (384, 28, 12), (768, 14, 24)):
        for device in (H100, ADA):
            scan = make_scan((batch, d_inner, side, side, 16, rank), DIRECTIONS, True, "float16")
            assert kernels.plan_for(scan, *device).kernels == which
    scan = make_scan((batch, 192, 56, 56, 16, 6), DIRECTIONS, True, "float32")
    assert kernels.plan_for(scan, *H100).kernels == GENERAL
    scan = make_scan((128, 192, 63, 63, 16, 6), DIRECTIONS, True, "float16")
    assert kernels.plan_for(scan, *H100).kernels == GENERAL


def test_the_workspace_suffices_for_smaller_scans(kernels: Kernels) -> None:
    for states in (2, 16, 64):
        largest = make_scan((128, 96, 64, 64, states, 6), DIRECTIONS, True, "float16")
        asked = kernels._library.quartermap_selective_scan_workspace(largest)
        needed = 0
        for batch in (1, 4, 13, 32):
            for height, width in ((64, 64), (56, 56), (64, 7), (35, 64), (40, 64), (63, 35)):
                scan = make_scan((batch, 96, height, width, states, 6), DIRECTIONS, True, "float16")
                needed = max(needed, kernels.plan_for(scan, *H100).workspace_bytes)
        assert 0 < needed <= asked < 250e6


LARGE: list[tuple[Sizes, int]] = [
    ((1, 16, 14, 14, 12), SPLIT),
    ((2, 16, 7, 9, 5), SPLIT),
    ((1, 16, 14, 10, 12), STREAMED),
]


@pytest.mark.parametrize("change", [large_drive, large_state])
@pytest.mark.parametrize(("sizes", "which"), LARGE, ids=str)
def test_what_leaves_float16_is_computed_in_float32(
    kernels: Kernels, sizes: Sizes, which: int, change: Callable[[list[Tensor]], None]
) -> None:
    inputs = make_inputs(sizes, "float16", states=5)
    change(inputs)
    plan = make_plan(kernels, sizes, "float16", H100, which=which, states=5)
    before = kernels._library.quartermap_emulation_yes_votes()
    y = kernels.scan_2d(*inputs, DIRECTIONS, True, plan)
    assert plan.kernels == which and relative(y, inputs) <= TOLERANCES["float16"]
    assert kernels._library.quartermap_emulation_yes_votes() > before


ORDERED: list[tuple[Sizes, Device, int]] = [
    ((1, 16, 28, 28, 12), H100, SPLIT),
    ((2, 16, 28, 28, 16), FEW_MULTIPROCESSORS, SPLIT),
    ((1, 16, 21, 35, 9), H100, SPLIT),
    ((1, 16, 14, 20, 12), ADA, STREAMED),
]


@pytest.mark.parametrize(("sizes", "device", "which"), ORDERED, ids=str)
def test_the_order_of_threads_changes_nothing(
    kernels: Kernels, sizes: Sizes, device: Device, which: int
) -> None:
    plan = make_plan(kernels, sizes, "float16", device, which=which, states=5)
    inputs = make_inputs(sizes, "float16", states=5)
    y = kernels.scan_2d(*inputs, DIRECTIONS, True, plan)
    for order in (1, 2):
        kernels._library.quartermap_emulation_order(order)
        kernels._library.quartermap_emulation_blocks(8)
        assert torch.equal(kernels.scan_2d(*inputs, DIRECTIONS, True, plan), y), order


GUARDS: list[tuple[str, Sizes, Device, int]] = [
    ("TaskStaged", (1, 16, 28, 28, 12), H100, SPLIT),
    ("SegmentsWritten", (1, 16, 28, 28, 12), H100, SPLIT),
    ("SegmentsWritten", (1, 16, 7, 8, 12), ADA, STREAMED),
    ("StatesWritten", (1, 16, 28, 28, 12), H100, SPLIT),
    ("StatesWritten", (1, 16, 7, 8, 12), ADA, STREAMED),
    ("TaskDone", (2, 16, 56, 56, 6), FEW_MULTIPROCESSORS, SPLIT),
    ("DirectionAdded", (1, 16, 14, 10, 12), ADA, STREAMED),
    ("AllFinite", (1, 16, 14, 10, 12), ADA, STREAMED),
    ("SumsKept", (1, 16, 14, 10, 12), ADA, STREAMED),
    ("Predecessors", (1, 16, 28, 28, 12), H100, SPLIT),
]


@pytest.mark.parametrize(("name", "sizes", "device", "which"), GUARDS, ids=str)
def test_no_barrier_can_be_left_out(
    kernels: Kernels, name: str, sizes: Sizes, device: Device, which: int
) -> None:
    plan = make_plan(kernels, sizes, "float16", device, which=which, states=3)
    inputs = make_inputs(sizes, "float16", states=3)
    if name in ("AllFinite", "SumsKept"):
        large_drive(inputs)  # else nothing is computed in float32
    kernels._library.quartermap_emulation_leave_out(barriers().index(name))
    kernels._library.quartermap_emulation_blocks(8)
    kernels._library.quartermap_emulation_order(1)
    if name == "Predecessors":
        # Between blocks, in global memory, which is not watched: the result shows it.
        y = kernels.scan_2d(*inputs, DIRECTIONS, True, plan)
        assert not relative(y, inputs) <= 10 * TOLERANCES["float16"]
        return
    with pytest.raises(PluginError, match="failed"):
        kernels.scan_2d(*inputs, DIRECTIONS, True, plan)
