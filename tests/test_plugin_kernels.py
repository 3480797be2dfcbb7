"""The CUDA kernels, run on the CPU as they are, against the definition.

Every thread is a fibre, every barrier and shuffle happens; see plugins/emulation/emulated_device.h.
"""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plugin_builds
import pytest
import torch
from torch import Tensor

from quartermap_deploy.native.contract import differences
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.scan.cuda import GENERAL, Kernels, enable_cuda_kernels, make_scan
from quartermap_deploy.scan.definition import DIRECTIONS, selective_scan_2d_definition
from quartermap_deploy.scan.vectorized import selective_scan_2d_vectorized

TOLERANCES = {"float32": 2e-6, "float16": 2**-11 + 2e-6, "bfloat16": 2**-8 + 2e-6}
"""Of the largest value: what float32 arithmetic leaves, and half a step of the 16-bit types, as results are rounded."""

H100 = (132, 227 * 1024, 228 * 1024)
ONE_MULTIPROCESSOR = (1, 227 * 1024, 228 * 1024)
LITTLE_SHARED_MEMORY = (16, 24 * 1024, 48 * 1024)
ADA = (128, 99 * 1024, 100 * 1024)

Sizes = tuple[int, int, int, int, int, int]  # batch, d_inner, H, W, N, R


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(plugin_builds.emulated_kernels(tmp_path_factory))


def tensors(sizes: Sizes, element_type: str, count: int, softplus: bool) -> list[Tensor]:
    batch, d_inner, height, width, states, rank = sizes
    generator = torch.Generator().manual_seed(sum(sizes) + count)
    dtype = getattr(torch, element_type)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def maps(channels: int) -> Tensor:
        return normal(batch, channels, height, width).to(dtype)

    wide = count * d_inner
    dt, bias = maps(count * (rank or d_inner)), normal(wide) - 2.5
    weight = (normal(wide, rank) * rank**-0.5).to(dtype) if rank else None
    if not softplus:
        dt, bias = (dt.abs() * 0.1).to(dtype), bias.abs() * 0.1
        weight = None if weight is None else weight.abs()
    found = [
        maps(d_inner),
        dt,
        maps(count * states),
        maps(count * states),
        -normal(wide, states).exp(),
        normal(wide),
    ]
    return [*found, bias, *([] if weight is None else [weight])]


def error(
    kernels: Kernels,
    sizes: Sizes,
    element_type: str = "float32",
    *,
    directions: Sequence[str] = DIRECTIONS,
    softplus: bool = True,
    device: tuple[int, int, int] = H100,
    order: int = 0,
) -> float:
    inputs = tensors(sizes, element_type, len(directions), softplus)
    plan = kernels.plan_for(make_scan(sizes, directions, softplus, element_type), *device)
    assert plan.shared_bytes <= device[1]
    kernels.prepare(plan)
    kernels._library.quartermap_emulation_order(order)
    weight = inputs[7] if len(inputs) > 7 else None
    y = kernels.scan_2d(*inputs[:7], weight, directions, softplus, plan)
    x, dt, B, C, A, D, bias, *rest = (tensor.double() for tensor in inputs)
    expected = selective_scan_2d_definition(
        x, dt, B, C, A, D, bias, rest[0] if rest else None, directions, softplus
    )
    assert y.dtype == inputs[0].dtype and y.shape == expected.shape
    return float((y.double() - expected).abs().max() / expected.abs().max())


MAPS = [(1, 1), (1, 9), (9, 1), (7, 7), (8, 8), (14, 14), (13, 5), (28, 28), (3, 75), (75, 3)]


@pytest.mark.parametrize(("height", "width"), MAPS)
@pytest.mark.parametrize(("states", "rank"), [(1, 0), (1, 3), (1, 20), (3, 0), (5, 9), (16, 2)])
def test_odd_sizes(kernels: Kernels, height: int, width: int, states: int, rank: int) -> None:
    assert error(kernels, (2, 5, height, width, states, rank)) < TOLERANCES["float32"]


@pytest.mark.parametrize("element_type", TOLERANCES)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 3, 17, 23, 1, 6),
        (2, 7, 14, 14, 1, 0),
        (1, 4, 56, 56, 1, 8),
        (1, 3, 5, 200, 3, 2),
        (2, 65, 7, 7, 1, 64),
    ],
    ids=str,
)
def test_element_types(kernels: Kernels, element_type: str, sizes: Sizes) -> None:
    assert error(kernels, sizes, element_type) < TOLERANCES[element_type]


@pytest.mark.parametrize("device", [H100, ADA, ONE_MULTIPROCESSOR, LITTLE_SHARED_MEMORY], ids=str)
@pytest.mark.parametrize("element_type", TOLERANCES)
@pytest.mark.parametrize(
    "sizes", [(2, 37, 14, 14, 1, 6), (1, 9, 28, 30, 1, 5), (1, 2, 40, 41, 5, 0)], ids=str
)
def test_devices(kernels: Kernels, element_type: str, sizes: Sizes, device: tuple[int, int, int]) -> None:
    """Large tiles, small tiles, and maps that stay in global memory."""
    assert error(kernels, sizes, element_type, device=device) < TOLERANCES[element_type]


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    ("sizes", "device"),
    [
        ((1, 5, 14, 14, 16, 9), H100),
        ((1, 9, 28, 28, 1, 9), ONE_MULTIPROCESSOR),
        ((1, 2, 40, 41, 2, 0), LITTLE_SHARED_MEMORY),
        ((1, 37, 14, 14, 1, 9), (1, 60_000, 70_000)),
        ((2, 65, 7, 7, 1, 8), ONE_MULTIPROCESSOR),
    ],
    ids=str,
)
def test_no_barrier_is_missing(
    kernels: Kernels, sizes: Sizes, device: tuple[int, int, int], order: int
) -> None:
    """Threads take turns in other orders, which shows where one reads what another has not written yet."""
    assert error(kernels, sizes, device=device, order=order) < TOLERANCES["float32"]


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(
    "directions",
    [
        ("row",),
        ("column",),
        ("row_reverse",),
        ("column_reverse",),
        ("column_reverse", "column_reverse", "column"),
        DIRECTIONS * 2,
    ],
    ids=",".join,
)
def test_directions(kernels: Kernels, directions: Sequence[str], rank: int, softplus: bool) -> None:
    sizes = (1, 3, 9, 11, 1, rank)
    assert error(kernels, sizes, directions=directions, softplus=softplus) < TOLERANCES["float32"]


def test_forgotten_states_are_zero(kernels: Kernels) -> None:
    """Products of decays underflow; no quotient of them may bring NaN back."""
    inputs = tensors((1, 2, 30, 30, 1, 0), "float32", 4, True)
    inputs[1] = inputs[1] + 60.0  # time steps of about 60
    inputs[4] = torch.full_like(inputs[4], -50.0)
    y = kernels.scan_2d(*inputs[:7], None, DIRECTIONS, True)
    x, dt, B, C, A, D, bias = (tensor.double() for tensor in inputs)
    expected = selective_scan_2d_definition(x, dt, B, C, A, D, bias)
    assert float((y.double() - expected).abs().max() / expected.abs().max()) < TOLERANCES["float32"]


def test_small_time_steps_keep_their_digits(kernels: Kernels) -> None:
    """softplus of about -9 is 1e-4, where log(1 + e) has lost three digits."""
    inputs = tensors((1, 2, 10, 10, 1, 0), "float32", 4, True)
    inputs[5] = torch.zeros_like(inputs[5])
    inputs[6] = torch.full_like(inputs[6], -9.0)
    y = kernels.scan_2d(*inputs[:7], None, DIRECTIONS, True)
    x, dt, B, C, A, D, bias = (tensor.double() for tensor in inputs)
    expected = selective_scan_2d_definition(x, dt, B, C, A, D, bias)
    assert float((y.double() - expected).abs().max() / expected.abs().max()) < TOLERANCES["float32"]


VMAMBA_TINY = [(96, 56, 6), (192, 28, 12), (384, 14, 24), (768, 7, 48)]
VMAMBA_BASE = [(256, 56, 8), (512, 28, 16), (1024, 14, 32), (2048, 7, 64)]


@pytest.mark.parametrize("device", [H100, ADA], ids=str)
@pytest.mark.parametrize(("d_inner", "side", "rank"), VMAMBA_TINY + VMAMBA_BASE)
@pytest.mark.parametrize("batch", [1, 8, 128])
def test_plans_of_real_stages(
    kernels: Kernels, batch: int, d_inner: int, side: int, rank: int, device: tuple[int, int, int]
) -> None:
    """In float32 every map is read once on both devices, and no workspace is needed."""
    scan = make_scan((batch, d_inner, side, side, 1, rank), DIRECTIONS, True, "float32")
    plan = kernels.plan_for(scan, *device)
    assert (plan.resident, plan.kernels) == (1, GENERAL)
    assert plan.workspace_bytes == 0
    assert plan.blocks == batch * -(-d_inner // plan.channels)
    assert plan.threads % 32 == 0 and plan.threads <= 256


@pytest.mark.parametrize("d_inner", [1, 2, 3, 5, 8])
def test_blocks_are_whole_warps(kernels: Kernels, d_inner: int) -> None:
    """Of maps so small that a sequence takes a quarter or a half of a warp, too: shuffles name all of its lanes."""
    for height, width in ((1, 1), (3, 5), (7, 7), (9, 11), (14, 14)):
        for batch in (1, 1000):
            scan = make_scan((batch, d_inner, height, width, 1, 3), DIRECTIONS, True, "float32")
            assert kernels.plan_for(scan, *H100).threads % 32 == 0


@pytest.mark.parametrize("element_type", TOLERANCES)
def test_the_workspace_suffices_on_the_smallest_device(kernels: Kernels, element_type: str) -> None:
    """What is asked for without a device is at least what a plan for any device needs."""
    squares = [(side, side) for side in (32, 64, 100, 101, 104, 108, 112, 128, 200, 300)]
    # Maps of few columns, whose rows are padded by a share of them that counts.
    strips = [(1000, 8), (8, 1000), (1023, 8), (1360, 6), (2040, 4), (5461, 2), (5450, 2)]
    for height, width in (*squares, *strips):
        for states, rank in ((1, 0), (1, 64), (16, 3), (256, 1024)):
            for d_inner in (8, 16):
                scan = make_scan((2, d_inner, height, width, states, rank), DIRECTIONS, True, element_type)
                plan = kernels.plan_for(scan, *ADA)
                # As it lies in the tensor it would fit the 64 KiB that every device has.
                if (width, rank) == (2, 64):
                    assert element_type == "float32" or plan.workspace_bytes > 0
                asked = kernels._library.quartermap_selective_scan_workspace(scan)
                assert asked >= plan.workspace_bytes, (height, width, states, rank, plan.shared_bytes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 0}, "not positive"),
        ({"d_state": 0}, "not positive"),
        ({"dt_rank": -1}, "not positive"),
        ({"d_state": 257}, "too large"),
        ({"height": 1 << 20, "width": 1 << 20}, "too large"),
        ({"height": 1 << 62, "width": 1 << 62}, "too large"),
        ({"batch": 1 << 40}, "too large"),
        ({"direction_count": 0}, "directions"),
        ({"direction_count": 9}, "directions"),
        ({"element_type": 3}, "element type"),
        ({"element_type": -1}, "element type"),
    ],
    ids=str,
)
def test_bad_scans_are_refused(kernels: Kernels, changes: dict[str, int], words: str) -> None:
    scan = make_scan((1, 2, 3, 4, 1, 0), DIRECTIONS, True, "float32")
    for name, value in changes.items():
        setattr(scan, name, value)
    with pytest.raises(PluginError, match=words):
        kernels.check(kernels._library.quartermap_selective_scan_validate(scan))
    assert kernels._library.quartermap_selective_scan_workspace(scan) == 0
    with pytest.raises(PluginError, match=words):
        kernels.plan_for(scan, *H100)


def test_bad_directions_are_refused(kernels: Kernels) -> None:
    scan = make_scan((1, 2, 3, 4, 1, 0), DIRECTIONS, True, "float32")
    scan.directions[2] = 4
    with pytest.raises(PluginError, match="column_reverse"):
        kernels.plan_for(scan, *H100)
    with pytest.raises(PluginError, match="diagonal"):
        make_scan((1, 2, 3, 4, 1, 0), ("row", "diagonal"), True, "float32")


@pytest.mark.parametrize("index", range(8))
@pytest.mark.parametrize("axis", [0, 1])
def test_tensors_of_wrong_shapes_are_refused(kernels: Kernels, index: int, axis: int) -> None:
    inputs = tensors((2, 3, 4, 5, 2, 2), "float32", 4, True)
    if axis >= inputs[index].dim():
        pytest.skip("has one axis")
    inputs[index] = torch.cat([inputs[index], inputs[index]], dim=axis)
    with pytest.raises(PluginError, match="expected"):
        kernels.scan_2d(*inputs, DIRECTIONS, True)


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4, 1, 2), (2, 0, 3, 4, 1, 2), (2, 2, 0, 4, 1, 0)], ids=str)
def test_nothing_to_scan_is_no_error(kernels: Kernels, sizes: Sizes) -> None:
    inputs = tensors(sizes, "float32", 4, True)
    weight = inputs[7] if sizes[5] else None
    y = kernels.scan_2d(*inputs[:7], weight, DIRECTIONS, True)
    assert y.shape == inputs[0].shape and y.dtype == inputs[0].dtype
    expected = selective_scan_2d_vectorized(*inputs[:7], weight, DIRECTIONS, True)
    assert expected.shape == y.shape
    inputs[4] = inputs[4].new_zeros(3, 1)
    with pytest.raises(PluginError, match="A is"):
        kernels.scan_2d(*inputs[:7], weight, DIRECTIONS, True)


def test_a_plan_is_prepared_before_it_is_launched(tmp_path_factory: pytest.TempPathFactory) -> None:
    """CUDA refuses a kernel that needs more shared memory than it was allowed; the emulated device any other too."""
    original = plugin_builds.emulated_kernels(tmp_path_factory)
    # A copy, whose kernels nobody has prepared yet.
    copy = tmp_path_factory.mktemp("fresh") / original.name
    shutil.copy(original, copy)
    kernels = Kernels(copy)
    count = kernels._library.quartermap_emulation_preparations
    sizes: Sizes = (1, 3, 7, 7, 1, 2)
    inputs = tensors(sizes, "float32", 4, True)
    plan = kernels.plan_for(make_scan(sizes, DIRECTIONS, True, "float32"), *H100)
    with pytest.raises(PluginError, match="not prepared"):
        kernels.scan_2d(*inputs, DIRECTIONS, True, plan)
    assert count() == 0
    kernels.scan_2d(*inputs, DIRECTIONS, True)
    assert count() == 1
    kernels.scan_2d(*inputs, DIRECTIONS, True)
    assert count() == 1, "once for each scan"


def test_float64_is_refused(kernels: Kernels) -> None:
    inputs = [tensor.double() for tensor in tensors((1, 2, 3, 4, 1, 0), "float32", 4, True)]
    with pytest.raises(PluginError, match="float64"):
        kernels.scan_2d(*inputs[:7], None, DIRECTIONS, True)


def test_emulated_kernels_are_no_cuda_implementation(kernels: Kernels, tmp_path_factory: Any) -> None:
    with pytest.raises(PluginError, match="emulation"):
        enable_cuda_kernels(plugin_builds.emulated_kernels(tmp_path_factory))


def test_the_contract_is_the_same(tmp_path_factory: pytest.TempPathFactory) -> None:
    library = ctypes.CDLL(str(plugin_builds.emulated_kernels(tmp_path_factory)))
    library.quartermap_plugin_contract.restype = ctypes.c_char_p
    found = json.loads(library.quartermap_plugin_contract())
    assert differences(found) == []
    found["fields"][0]["name"] = "orders"
    assert len(differences(found)) == 1
    assert found["build"] == {"tensorrt": None, "cuda": None, "architectures": None}


def test_other_libraries_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="no plugin library"):
        Kernels(tmp_path / "missing.so")
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"\x7fELF and then nothing")
    with pytest.raises(PluginError, match="no 64-bit ELF library"):
        Kernels(damaged)
