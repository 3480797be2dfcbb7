"""The kernels on tensor cores, run on the CPU as they are: every plan, every barrier, against the float64 definition.

A product of matrices is an exchange between the 32 fibres of a warp; every access of shared memory is watched for
races; see plugins/emulation/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from tensor_core_scans import (
    A100,
    ADA,
    FEW_MULTIPROCESSORS,
    H100,
    KINDS,
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
from quartermap_deploy.scan.cuda import GENERAL, RESIDENT, SPLIT, STREAMED, Kernels, Plan, Tensors, make_scan
from quartermap_deploy.scan.definition import DIRECTIONS

__all__ = ["kernels", "library"]

# As many channels as one block has.
STAGES = [
    (16, 56, 6),
    (16, 56, 8),
    (16, 28, 12),
    (16, 28, 16),
    (64, 14, 24),
    (64, 14, 32),
    (128, 7, 48),
    (128, 7, 64),
]


# Plans ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d_inner", "side", "rank"), STAGES)
def test_large_batches(kernels: Kernels, d_inner: int, side: int, rank: int) -> None:
    for element_type in TOLERANCES:
        plan = check(kernels, (1, d_inner, side, side, rank), element_type, ONE_MULTIPROCESSOR, RESIDENT)
        assert plan.blocks == 1 and plan.resident == 1


@pytest.mark.parametrize("regime", REGIMES[1:], ids=str)
@pytest.mark.parametrize(("d_inner", "side", "rank"), STAGES[::2])
def test_regimes_of_large_batches(
    kernels: Kernels, d_inner: int, side: int, rank: int, regime: Regime
) -> None:
    sizes = (1, d_inner, side, side, rank)
    check(kernels, sizes, "float16", ONE_MULTIPROCESSOR, RESIDENT, regime=regime)


def test_images_and_tiles_of_channels(kernels: Kernels) -> None:
    plan = check(kernels, (2, 256, 7, 7, 48), "float16", ONE_MULTIPROCESSOR, RESIDENT)
    assert plan.blocks == 4
    plan = check(kernels, (3, 32, 28, 28, 12), "float16", ONE_MULTIPROCESSOR, RESIDENT)
    assert plan.blocks == 6


SPLITS: list[tuple[Sizes, Device, int]] = [
    # (batch, d_inner, H, W, R), device, blocks
    ((1, 16, 56, 56, 6), H100, 28),
    ((2, 16, 56, 56, 8), H100, 56),
    ((1, 32, 28, 28, 12), H100, 16),
    ((2, 16, 28, 28, 16), FEW_MULTIPROCESSORS, 8),
    ((1, 32, 14, 14, 24), H100, 8),
    ((2, 16, 14, 14, 32), H100, 8),
    ((2, 32, 7, 7, 48), H100, 16),
    ((1, 16, 7, 7, 64), H100, 4),
    # Segments of 8, and a map that no block can hold.
    ((1, 16, 64, 64, 6), H100, 32),
    ((1, 16, 32, 128, 6), H100, 32),
    ((2, 16, 8, 2, 3), H100, 8),
    # Blocks of rows that do not divide a warp's four slots; odd widths; odd ranks; a single column.
    ((1, 16, 21, 30, 7), ONE_MULTIPROCESSOR, 4),
    ((1, 16, 35, 18, 20), ONE_MULTIPROCESSOR, 4),
    ((1, 32, 21, 35, 33), H100, 24),
    ((8, 32, 14, 1, 1), ONE_MULTIPROCESSOR, 64),
    ((2, 16, 7, 65, 9), ONE_MULTIPROCESSOR, 8),
]


@pytest.mark.parametrize(("sizes", "device", "blocks"), SPLITS, ids=str)
def test_small_batches(kernels: Kernels, sizes: Sizes, device: Device, blocks: int) -> None:
    assert check(kernels, sizes, "float16", device, SPLIT).blocks == blocks


@pytest.mark.parametrize(("sizes", "device", "blocks"), SPLITS[1::2], ids=str)
def test_small_batches_in_bfloat16(kernels: Kernels, sizes: Sizes, device: Device, blocks: int) -> None:
    assert check(kernels, sizes, "bfloat16", device, SPLIT).blocks == blocks


@pytest.mark.parametrize("regime", REGIMES[1:], ids=str)
def test_regimes_of_small_batches(kernels: Kernels, regime: Regime) -> None:
    check(kernels, (1, 16, 28, 28, 12), "float16", H100, SPLIT, regime=regime)


@pytest.mark.parametrize(
    "directions",
    [("row",), ("column_reverse",), ("column", "row_reverse"), (*DIRECTIONS, "row", "column")],
    ids=",".join,
)
def test_other_lists_of_directions(kernels: Kernels, directions: Sequence[str]) -> None:
    check(kernels, (1, 16, 28, 28, 12), "float16", ONE_MULTIPROCESSOR, SPLIT, directions=directions)


STREAMS: list[tuple[Sizes, str]] = [
    ((2, 16, 56, 56, 6), "float16"),
    ((1, 32, 28, 28, 12), "bfloat16"),
    ((1, 16, 14, 14, 24), "float16"),
    ((1, 16, 16, 24, 40), "float16"),
    # Blocks of rows that do not divide a warp's four slots; positions that 8 does not divide; odd ranks.
    ((2, 32, 21, 30, 7), "bfloat16"),
    ((1, 16, 7, 2, 1), "float16"),
]


@pytest.mark.parametrize(("sizes", "element_type"), STREAMS, ids=str)
def test_maps_that_stay_in_global_memory(kernels: Kernels, sizes: Sizes, element_type: str) -> None:
    plan = check(kernels, sizes, element_type, ADA, STREAMED)
    assert plan.blocks == sizes[0] * sizes[1] // 16 and plan.workspace_bytes < 1e5


@pytest.mark.parametrize(
    "directions", [("row_reverse",), ("column", "row", "column_reverse", *DIRECTIONS)], ids=",".join
)
def test_other_lists_of_directions_that_are_streamed(kernels: Kernels, directions: Sequence[str]) -> None:
    check(kernels, (1, 16, 14, 20, 12), "float16", ADA, STREAMED, directions=directions)


def test_a_direction_in_one_block(kernels: Kernels) -> None:
    """Where the multiprocessors are busy anyway, the chunks of a direction stay in one block, in turn."""
    plan = make_plan(kernels, (2, 16, 56, 56, 6), "float16", FEW_MULTIPROCESSORS)
    assert plan.blocks == 8 and plan.kernels == SPLIT
    check(kernels, (2, 16, 56, 56, 6), "float16", FEW_MULTIPROCESSORS, SPLIT)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (1, {H100: "SSSSSSSS", A100: "SSSSSSSS", ADA: "SSSSSSSS"}),
        (128, {H100: "RRRRRRRR", A100: "TRRRTRRR", ADA: "TRRRTRRR"}),
    ],
)
def test_plans_of_real_stages(kernels: Kernels, batch: int, expected: dict[Device, str]) -> None:
    """Small batches are divided further; large ones read x once, but for stage 1 where shared memory is too small."""
    tiny = [(96, 56, 6), (192, 28, 12), (384, 14, 24), (768, 7, 48)]
    base = [(256, 56, 8), (512, 28, 16), (1024, 14, 32), (2048, 7, 64)]
    for device, letters in expected.items():
        found = ""
        for d_inner, side, rank in tiny + base:
            scan = make_scan((batch, d_inner, side, side, 1, rank), DIRECTIONS, True, "float16")
            found += "GRST"[kernels.plan_for(scan, *device).kernels]
        assert found == letters, device


@pytest.mark.parametrize(
    ("sizes", "directions", "softplus", "element_type"),
    [
        ((1, 16, 28, 28, 1, 12), DIRECTIONS, True, "float32"),
        ((1, 16, 28, 28, 1, 12), DIRECTIONS, False, "float16"),
        ((1, 16, 28, 28, 1, 0), DIRECTIONS, True, "float16"),
        ((1, 16, 28, 28, 1, 65), DIRECTIONS, True, "float16"),
        ((1, 16, 28, 28, 65, 12), DIRECTIONS, True, "float16"),
        ((1, 24, 28, 28, 1, 12), DIRECTIONS, True, "float16"),
        ((1, 16, 30, 28, 1, 12), DIRECTIONS, True, "float16"),
        ((1, 16, 63, 28, 1, 12), DIRECTIONS, True, "float16"),
        ((1, 16, 32, 27, 1, 12), DIRECTIONS, True, "float16"),
        ((64, 96, 112, 63, 1, 6), DIRECTIONS, True, "float16"),
        ((1, 1 << 21, 7, 7, 1, 48), DIRECTIONS, True, "float16"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_general(
    kernels: Kernels, sizes: tuple[int, ...], directions: Sequence[str], softplus: bool, element_type: str
) -> None:
    scan = make_scan(sizes, directions, softplus, element_type)
    assert kernels.plan_for(scan, *H100).kernels == GENERAL


def test_the_workspace_suffices_for_smaller_scans(kernels: Kernels) -> None:
    """What is asked for a scan is enough for every smaller batch, height and width on any device."""
    largest = make_scan((128, 96, 64, 64, 1, 6), DIRECTIONS, True, "float16")
    asked = kernels._library.quartermap_selective_scan_workspace(largest)
    needed = 0
    for device in (H100, ADA, ONE_MULTIPROCESSOR):
        for batch in (1, 4, 13, 32, 128):
            for height, width in ((64, 64), (56, 56), (64, 7), (7, 64), (8, 8), (63, 35)):
                scan = make_scan((batch, 96, height, width, 1, 6), DIRECTIONS, True, "float16")
                needed = max(needed, kernels.plan_for(scan, *device).workspace_bytes)
    assert 0 < needed <= asked < 100e6


def test_tensors_that_begin_anywhere_are_copied(kernels: Kernels) -> None:
    sizes = (1, 16, 7, 7, 6)
    inputs = make_inputs(sizes, "float16")
    y = kernels.scan_2d(*inputs, DIRECTIONS, True)
    moved = []
    for tensor in inputs:
        space = torch.empty(tensor.numel() + 8, dtype=tensor.dtype)
        first = next(i for i in range(8) if space[i:].data_ptr() % 16)
        moved.append(space[first:][: tensor.numel()].view(tensor.shape).copy_(tensor))
    assert all(tensor.data_ptr() % 16 for tensor in moved)
    assert torch.equal(kernels.scan_2d(*moved, DIRECTIONS, True), y)


# Values that leave float16 -------------------------------------------------------------------------------------------


def large_weight(inputs: list[Tensor]) -> None:
    """A weight that is none in powers of two, and a rank so small that their product is moderate."""
    inputs[1].abs_().clamp_(max=1).mul_(2e-5)
    inputs[7][5] = -6e4


def large_sum(inputs: list[Tensor]) -> None:
    """Three directions give 4e4 each, and the fourth takes it away; states are forgotten at once."""
    x, dt, B, C, A, D, bias, _ = inputs
    x.sign_().mul_(2e4)
    dt.zero_()
    B.fill_(1.5)
    C.fill_(1)
    C[:, 3] = -3
    A.fill_(-30)
    D.fill_(0.1)
    bias.fill_(1)


LARGE: list[tuple[Sizes, int]] = [
    ((1, 128, 7, 7, 48), RESIDENT),
    ((1, 64, 14, 14, 24), RESIDENT),
    ((1, 16, 14, 14, 12), SPLIT),
    # Maps that end within the blocks that add them up.
    ((2, 16, 7, 9, 5), SPLIT),
    ((1, 16, 14, 10, 12), STREAMED),
    ((2, 32, 7, 2, 9), STREAMED),
]


@pytest.mark.parametrize("change", [large_drive, large_state, large_weight, large_sum])
@pytest.mark.parametrize(("sizes", "which"), LARGE, ids=str)
def test_what_leaves_float16_is_computed_in_float32(
    kernels: Kernels, sizes: Sizes, which: int, change: Callable[[list[Tensor]], None]
) -> None:
    inputs = make_inputs(sizes, "float16")
    change(inputs)
    plan = make_plan(kernels, sizes, "float16", H100, which=which)
    assert plan.kernels == which
    y = kernels.scan_2d(*inputs, DIRECTIONS, True, plan)
    assert relative(y, inputs) <= TOLERANCES["float16"]


def test_the_steps_of_bfloat16_are_float16_too(kernels: Kernels) -> None:
    sizes = (1, 128, 7, 7, 48)
    inputs = make_inputs(sizes, "bfloat16")
    inputs[6].add_(1e5)
    inputs[2].mul_(1e-5)
    plan = make_plan(kernels, sizes, "bfloat16", H100, which=RESIDENT)
    y = kernels.scan_2d(*inputs, DIRECTIONS, True, plan)
    assert plan.kernels == RESIDENT and relative(y, inputs) <= TOLERANCES["bfloat16"]


@pytest.mark.parametrize(
    ("sizes", "which"), [((1, 128, 7, 7, 48), RESIDENT), ((1, 16, 14, 10, 12), STREAMED)], ids=str
)
def test_infinity_reaches_what_comes_after_it(kernels: Kernels, sizes: Sizes, which: int) -> None:
    """As by the general kernel: no other channel, though eight positions of 16 channels are computed together."""
    inputs = make_inputs(sizes, "float16")
    inputs[0][0, 5, 3, 1] = float("inf")
    plans = [make_plan(kernels, sizes, "float16", H100, which=kind) for kind in (which, GENERAL)]
    y, general = (kernels.scan_2d(*inputs, DIRECTIONS, True, plan) for plan in plans)
    assert plans[0].kernels == which and plans[1].kernels == GENERAL
    assert torch.equal(y.isfinite(), general.isfinite()) and not y[0, 5].isfinite().all()
    assert y[0, :5].isfinite().all() and y[0, 6:].isfinite().all()


def test_kernels_are_chosen_by_name(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they suit the scan; an unknown name is refused."""
    scan = make_scan((128, 96, 56, 56, 1, 6), DIRECTIONS, True, "float16")
    for kind, name in KINDS.items():
        if kind != SPLIT:  # which would need too much memory
            monkeypatch.setenv("QUARTERMAP_KERNELS", name)
            assert kernels.plan_for(scan, *H100).kernels == kind
    odd = make_scan((1, 5, 9, 11, 1, 6), DIRECTIONS, True, "float16")
    assert kernels.plan_for(odd, *H100).kernels == GENERAL
    monkeypatch.setenv("QUARTERMAP_KERNELS", "fast")
    with pytest.raises(
        PluginError, match="QUARTERMAP_KERNELS has to be general, resident, split or streamed"
    ):
        kernels.plan_for(scan, *H100)


def launch(kernels: Kernels, plan: Plan, inputs: Sequence[Tensor], workspace: Tensor) -> Tensor:
    """Launch a plan with a workspace of the caller's."""
    y = torch.empty_like(inputs[0])
    pointers = [tensor.data_ptr() for tensor in (*inputs, y, workspace)]
    kernels.launch(plan, Tensors(*pointers, workspace.numel()), None)
    return y


def test_a_launch_on_misaligned_tensors_is_refused(kernels: Kernels) -> None:
    sizes = (1, 16, 7, 7, 6)
    inputs, plan = make_inputs(sizes, "float16"), make_plan(kernels, sizes, "float16", H100)
    workspace = torch.empty(plan.workspace_bytes + 8, dtype=torch.uint8)
    with pytest.raises(PluginError, match="multiple of 16 bytes"):
        launch(kernels, plan, inputs, workspace[8:])
    x = torch.empty(inputs[0].numel() + 4, dtype=torch.float16)[4:].view_as(inputs[0])
    with pytest.raises(PluginError, match="multiple of 16 bytes"):
        launch(kernels, plan, [x, *inputs[1:]], workspace)
    assert relative(launch(kernels, plan, inputs, workspace), inputs) <= TOLERANCES["float16"]


def test_nothing_is_taken_from_the_workspace(kernels: Kernels) -> None:
    """Whatever stands in it: another launch has told its maps there, for one."""
    sizes = (1, 16, 28, 28, 12)
    inputs, plan = make_inputs(sizes, "float16"), make_plan(kernels, sizes, "float16", H100)
    assert plan.blocks == 8, "directions are divided"
    kernels._library.quartermap_emulation_order(1)
    kernels._library.quartermap_emulation_blocks(8)
    for value in (0, 1, 255):
        workspace = torch.full((plan.workspace_bytes,), value, dtype=torch.uint8)
        assert relative(launch(kernels, plan, inputs, workspace), inputs) <= TOLERANCES["float16"]


# Barriers -------------------------------------------------------------------------------------------------------------


ORDERED: list[tuple[Sizes, Device]] = [
    ((1, 16, 56, 56, 6), ONE_MULTIPROCESSOR),
    ((1, 16, 28, 28, 12), ONE_MULTIPROCESSOR),
    ((1, 64, 14, 14, 24), ONE_MULTIPROCESSOR),
    ((1, 128, 7, 7, 48), ONE_MULTIPROCESSOR),
    ((1, 16, 28, 28, 12), H100),
    ((2, 16, 28, 28, 16), FEW_MULTIPROCESSORS),
    ((1, 16, 21, 35, 9), H100),
    ((1, 16, 14, 10, 12), ADA),
]


@pytest.mark.parametrize(("sizes", "device"), ORDERED, ids=str)
def test_the_order_of_threads_changes_nothing(kernels: Kernels, sizes: Sizes, device: Device) -> None:
    """Forwards, backwards, and permuted; the blocks of a direction at the same time, the last before the first."""
    which = STREAMED if device == ADA else None
    plan, inputs = make_plan(kernels, sizes, "float16", device, which=which), make_inputs(sizes, "float16")
    y = kernels.scan_2d(*inputs, DIRECTIONS, True, plan)
    for order in (1, 2):
        kernels._library.quartermap_emulation_order(order)
        kernels._library.quartermap_emulation_blocks(8)
        assert torch.equal(kernels.scan_2d(*inputs, DIRECTIONS, True, plan), y), order


GUARDS: list[tuple[str, Sizes, Device]] = [
    ("MapsRead", (1, 16, 56, 56, 6), ONE_MULTIPROCESSOR),
    ("Middle", (1, 16, 56, 56, 6), ONE_MULTIPROCESSOR),
    ("OrientationDone", (1, 16, 56, 56, 6), ONE_MULTIPROCESSOR),
    ("DirectionStaged", (1, 64, 14, 14, 24), ONE_MULTIPROCESSOR),
    ("DirectionDone", (1, 128, 7, 7, 48), ONE_MULTIPROCESSOR),
    ("TaskStaged", (1, 16, 56, 56, 6), ONE_MULTIPROCESSOR),
    ("TaskStaged", (1, 16, 28, 28, 12), H100),
    ("StageRead", (1, 16, 56, 56, 6), ONE_MULTIPROCESSOR),
    ("SegmentsWritten", (1, 16, 56, 56, 6), ONE_MULTIPROCESSOR),
    ("SegmentsWritten", (1, 64, 14, 14, 24), ONE_MULTIPROCESSOR),
    ("SegmentsWritten", (1, 16, 28, 28, 12), H100),
    ("StatesWritten", (1, 16, 28, 28, 12), ONE_MULTIPROCESSOR),
    ("StatesWritten", (1, 128, 7, 7, 48), ONE_MULTIPROCESSOR),
    ("StatesWritten", (1, 16, 28, 28, 12), H100),
    ("TaskDone", (1, 16, 56, 56, 6), ONE_MULTIPROCESSOR),
    ("TaskDone", (2, 16, 56, 56, 6), FEW_MULTIPROCESSORS),
    ("SumDone", (1, 16, 56, 56, 6), ONE_MULTIPROCESSOR),
    ("RowsPacked", (1, 128, 7, 7, 48), ONE_MULTIPROCESSOR),
    ("DirectionAdded", (1, 16, 14, 10, 12), ADA),
    ("AllFinite", (1, 128, 7, 7, 48), ONE_MULTIPROCESSOR),
    ("AllFinite", (1, 16, 14, 10, 12), ADA),
    ("SumsKept", (1, 16, 14, 10, 12), ADA),
    ("Predecessors", (1, 16, 28, 28, 12), H100),
]


@pytest.mark.parametrize(("name", "sizes", "device"), GUARDS, ids=str)
def test_no_barrier_can_be_left_out(kernels: Kernels, name: str, sizes: Sizes, device: Device) -> None:
    """Each keeps accesses apart that race without it, whatever order the threads take."""
    which = STREAMED if device == ADA else None
    plan, inputs = make_plan(kernels, sizes, "float16", device, which=which), make_inputs(sizes, "float16")
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


def test_every_barrier_is_guarded() -> None:
    assert barriers()[-1] == "Count"
    assert {name for name, _, _ in GUARDS} == set(barriers()[:-1])
