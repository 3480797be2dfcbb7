"""QuarterMap on one-dimensional scans, on flattened maps, and on blocks with several scans; and what it refuses.

The graphs are written by hand. What they should compute is computed in PyTorch, in float64, position by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import (
    CHANNEL_FIRST,
    CHANNEL_LAST,
    CHANNELS,
    D_INNER,
    Array,
    chained,
    edited,
    error,
    image,
    main_graph,
    operators,
    run,
    text_model,
    with_outputs,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quartermap_deploy.errors import PassError
from quartermap_deploy.lowering.operator import DIRECTIONS, SELECTIVE_SCAN_2D
from quartermap_deploy.passes import CANONICAL, OPTIMIZED, Selection, lower, run_passes
from quartermap_deploy.passes.recover_2d import recover_2d
from quartermap_deploy.passes.sequence_pruning import kept_steps
from quartermap_deploy.pruning.orders import OUTSIDE, ScanOrder
from quartermap_deploy.pruning.plan import Subsample
from quartermap_deploy.scan.definition import selective_scan_definition

STATE = 2
SEQUENCE_SCAN = "quartermap.SelectiveScan <delta_softplus = 1>"
TOKENS = f"""
    patches = Conv (x, in_proj)
    flat = Reshape (patches, to_flat)
    before, behind = Split <axis = 2> (flat, halves)
    shape = Shape <start = 0, end = 1> (x)
    token_shape = Concat <axis = 0> (shape, one_token)
    token = Expand (class_token, token_shape)
    sequence = Concat <axis = 2> (before, token, behind)
    tokens = Transpose <perm = [0, 2, 1]> (sequence)
    normal = LayerNormalization <axis = -1> (tokens, norm_scale, norm_bias)
    embedded = Transpose <perm = [0, 2, 1]> (normal)
    turned = Slice (embedded, last, first, step_axis, last)
    convolved = Conv <kernel_shape = [4], pads = [3, 3], group = {D_INNER}> (turned, causal)
    cut = Slice (convolved, nought, length, step_axis, one)
    gate = Sigmoid (cut)
    u = Mul (cut, gate)
    delta = MatMul (to_delta, u)
    grouped = Unsqueeze (u, one)
    B = MatMul (to_B, grouped)
    C = MatMul (to_C, grouped)
    scanned = {SEQUENCE_SCAN} (u, delta, A1, B, C, D1, bias1)
    y = Slice (scanned, last, first, step_axis, last)
"""
"""A token model: patches, a class token between them, and one scan from the end, with a causal convolution before."""


def token_weights(height: int, width: int) -> dict[str, Array]:
    """Return the weights of TOKENS for a map of this size."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    length = height * width + 1
    return {
        "to_flat": np.array([0, D_INNER, -1]),
        "halves": np.array([length // 2, length - 1 - length // 2]),
        "one_token": np.array([D_INNER, 1]),
        "class_token": normal(1, D_INNER, 1),
        "last": np.array([-1]),
        "first": np.array([-(2**62)]),
        "step_axis": np.array([2]),
        "nought": np.array([0]),
        "one": np.array([1]),
        "length": np.array([length]),
        "causal": normal(D_INNER, 1, 4),
        "to_delta": normal(D_INNER, D_INNER),
        "to_B": normal(STATE, D_INNER),
        "to_C": normal(STATE, D_INNER),
        "A1": -np.abs(normal(D_INNER, STATE)),
        "D1": normal(D_INNER),
        "bias1": normal(D_INNER),
    }


def token_model(height: int, width: int) -> onnx.ModelProto:
    """Return TOKENS for images of this size."""
    return text_model(TOKENS, height, width, weights=token_weights(height, width), rank=3)


def select(orders: dict[str, ScanOrder], subsample: Subsample, *blocks: int) -> Selection:
    """Return a selection of blocks, the first by default, whose module is called layers.0."""
    return Selection(blocks or (1,), subsample, orders, {1: "layers.0"})


def pruned_scan(parts: Sequence[Tensor], order: Array, size: tuple[int, int], subsample: Subsample) -> Tensor:
    """Scan the kept steps of sequences (batch, d, L), and give every step the output of the one that stands for it."""
    u, delta, A, B, C, D, bias = parts
    height, width = size
    rows, columns = (subsample.kept_indices(side) for side in size)
    steps = [
        step
        for step, position in enumerate(order)
        if position == OUTSIDE or (position // width in rows and position % width in columns)
    ]
    y = selective_scan_definition(
        u[..., steps], delta[..., steps], A, B[..., steps], C[..., steps], D, bias, delta_softplus=True
    )
    outputs = []
    for step, position in enumerate(order):
        if position == OUTSIDE:
            source = step
        else:
            row, column = divmod(int(position), width)
            row, column = rows[row * len(rows) // height], columns[column * len(columns) // width]
            (source,) = np.flatnonzero(order == row * width + column)
        outputs.append(y[..., steps.index(source)])
    return torch.stack(outputs, dim=-1)


def values(model: onnx.ModelProto, names: Sequence[str], x: Array) -> list[Tensor]:
    """Return values of a graph in float64."""
    found = run(lower(with_outputs(model, names)), {"x": x})
    return [torch.from_numpy(found[name]).double() for name in names]


def weights_of(model: onnx.ModelProto, *names: str) -> list[Tensor]:
    """Return weights of a graph in float64."""
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return [torch.from_numpy(arrays[name].copy()).double() for name in names]


# A one-dimensional scan whose steps are a map's ----------------------------------------------------------------------


def test_the_order_of_tokens_is_inferred_from_the_patches() -> None:
    recovered = recover_2d(token_model(3, 4))
    (scan,) = recovered.report.scans
    order = recovered.orders["block_1/scan"]
    assert (order.height, order.width, order.merged, order.directions) == (3, 4, False, None)
    assert order.order.tolist() == [[11, 10, 9, 8, 7, 6, OUTSIDE, 5, 4, 3, 2, 1, 0]]
    assert scan.refused is not None and scan.inferred == "the 3×4 positions of patches"


@given(
    height=st.integers(2, 6),
    width=st.integers(2, 6),
    subsample=st.sampled_from([Subsample(), Subsample(3), Subsample(3, 2)]),
)
def test_a_sequence_is_pruned_by_its_steps(height: int, width: int, subsample: Subsample) -> None:
    model, x = token_model(height, width), image(height, width)
    orders = recover_2d(model).orders
    pruned, reports = run_passes(model, select(orders, subsample), OPTIMIZED)
    assert [bool(report.changed) for report in reports] == [True, False, False]
    u, delta, B, C = values(model, ("u", "delta", "B", "C"), x)
    A, D, bias = weights_of(model, "A1", "D1", "bias1")
    order = orders["block_1/scan"].order[0]
    expected = pruned_scan((u, delta, A, B, C, D, bias), order, (height, width), subsample).flip(-1)
    assert error(run(lower(pruned), {"x": x})["y"], expected) <= 1e-5
    onnx.checker.check_model(lower(pruned), full_check=True)


def test_a_sequence_that_is_pruned_is_left_alone_the_second_time() -> None:
    model = token_model(3, 4)
    selection = select(recover_2d(model).orders, Subsample())
    once, _ = run_passes(model, selection, OPTIMIZED)
    twice, reports = run_passes(once, selection, OPTIMIZED)
    assert all(not report.changed for report in reports)
    assert main_graph(twice) == main_graph(once)
    with pytest.raises(PassError, match="another plan"):
        run_passes(once, select(dict(selection.orders), Subsample(3)), CANONICAL)


@pytest.mark.parametrize(
    "directions", [("row", "row_reverse"), ("row", "column", "row_reverse", "column_reverse")]
)
def test_kept_steps_of_directions(directions: tuple[str, ...]) -> None:
    order = ScanOrder.of_directions(4, 5, directions)
    kept, source = kept_steps(order, Subsample())
    for steps, stands, visits in zip(kept, source, order.order, strict=True):
        positions = visits[steps]
        assert set(positions) == {0, 2, 4, 10, 12, 14}
        rows, columns = np.divmod(visits, 5)
        assert positions[stands].tolist() == [
            (0, 0, 2, 2)[row] * 5 + (0, 0, 2, 2, 4)[column] for row, column in zip(rows, columns, strict=True)
        ]


def several_directions(orders: Array) -> str:
    """Return the nodes of a block whose sequences are gathered in any order and whose directions are weighted."""
    count = len(orders)
    gathers = "\n".join(f"    s_{k} = Gather <axis = 2> (flat, order_{k})" for k in range(count))
    joined = ", ".join(f"s_{k}" for k in range(count))
    return f"""
    features = Conv (x, in_proj)
    flat = Reshape (features, to_flat)
{gathers}
    u = Concat <axis = 1> ({joined})
    delta = Mul (u, half)
    grouped = Reshape (u, to_groups)
    B = MatMul (to_B, grouped)
    C = MatMul (to_C, grouped)
    scanned = {SEQUENCE_SCAN} (u, delta, A1, B, C, D1, bias1)
    by_direction = Reshape (scanned, to_groups)
    y = Mul (by_direction, weights)
"""


def directions_model(orders: Array, height: int, width: int) -> onnx.ModelProto:
    """Return a graph of `several_directions`."""
    random, count = np.random.default_rng(0), len(orders)

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    weights: dict[str, Any] = {f"order_{k}": np.array(one) for k, one in enumerate(orders)}
    weights |= {
        "to_flat": np.array([0, D_INNER, -1]),
        "to_groups": np.array([0, count, D_INNER, -1]),
        "half": np.float32(0.5),
        "to_B": normal(count, STATE, D_INNER),
        "to_C": normal(count, STATE, D_INNER),
        "A1": -np.abs(normal(count * D_INNER, STATE)),
        "D1": normal(count * D_INNER),
        "bias1": normal(count * D_INNER),
        "weights": np.arange(1, count + 1, dtype=np.float32).reshape(1, -1, 1, 1),
    }
    return text_model(several_directions(orders), height, width, weights=weights)


SNAKE = np.array([[0, 1, 2, 3], [7, 6, 5, 4], [8, 9, 10, 11]]).ravel()


def test_directions_that_visit_the_map_each_in_its_own_order_are_pruned_each_by_its_own_steps() -> None:
    height, width, subsample = 3, 4, Subsample()
    raster = np.arange(12).reshape(3, 4)
    orders = np.stack([raster.ravel(), raster.T.ravel(), SNAKE])
    model, x = directions_model(orders, height, width), image(height, width)
    recovered = recover_2d(model)
    (scan,) = recovered.report.scans
    assert scan.refused is not None and "direction 3 visits the positions of features" in scan.refused
    assert recovered.orders["block_1/scan"].order.tolist() == orders.tolist()
    pruned, _ = run_passes(model, select(recovered.orders, subsample), CANONICAL)
    u, delta, B, C = values(model, ("u", "delta", "B", "C"), x)
    A, D, bias, factors = weights_of(model, "A1", "D1", "bias1", "weights")
    expected = []
    for k, order in enumerate(orders):
        part = slice(k * D_INNER, (k + 1) * D_INNER)
        parts = (u[:, part], delta[:, part], A[part], B[:, k : k + 1], C[:, k : k + 1], D[part], bias[part])
        expected.append(pruned_scan(parts, order, (height, width), subsample))
    wanted = torch.stack(expected, dim=1) * factors
    assert error(run(lower(pruned), {"x": x})["y"], wanted) <= 1e-5


# What is refused -----------------------------------------------------------------------------------------------------


def refuse(
    model: onnx.ModelProto, message: str, subsample: Subsample | None = None, *, orders: bool = True
) -> None:
    """Require that pruning block 1 is refused with a message that names it, and that nothing is changed."""
    before = model.SerializeToString(deterministic=True)
    found = recover_2d(model).orders if orders else {}
    with pytest.raises(PassError, match=rf"block 1 \(layers\.0\) cannot be pruned: {message}"):
        run_passes(model, select(found, subsample or Subsample()), OPTIMIZED)
    assert model.SerializeToString(deterministic=True) == before


def test_a_sequence_of_unknown_order_is_refused() -> None:
    refuse(token_model(3, 4), "its scan block_1/scan is one-dimensional.*is not known", orders=False)


def test_a_sequence_cannot_be_interpolated() -> None:
    refuse(token_model(3, 4), ".*bilinear interpolation needs a map", Subsample(upsample="bilinear"))


def test_directions_that_scan_parts_of_the_map_are_refused() -> None:
    raster = np.arange(16).reshape(4, 4)
    quarters = np.stack([raster[a::2, b::2].ravel() for a in (0, 1) for b in (0, 1)])
    refuse(directions_model(quarters, 4, 4), "its directions scan parts of the map, 4 of 16 positions")


def test_a_sequence_that_was_no_map_is_refused() -> None:
    refuse(
        token_model(1, 12),
        ".*follows a sequence that is no map|.*is not known",
    )


SIDE_BY_SIDE = {
    "two halves": "joined = Concat <axis = {axis}> (features, other)",
    "one behind the other": """a = Unsqueeze (features, stacked)
    b = Unsqueeze (other, stacked)
    both = Concat <axis = {stacked}> (a, b)
    joined = Reshape (both, joined_shape)""",
}


@pytest.mark.parametrize("form", SIDE_BY_SIDE)
@pytest.mark.parametrize("axis", [2, 3])
def test_two_images_in_one_map_are_refused(form: str, axis: int) -> None:
    sides = [0, D_INNER, 4, 6]
    sides[axis] *= 2
    joining = SIDE_BY_SIDE[form].format(axis=axis, stacked=axis + 1)
    text = edited(
        "\n".join(CHANNEL_LAST.strip().splitlines()[:3]) + "\n",
        "projected = Transpose <perm = [0, 3, 1, 2]> (wide)",
        f"features = Transpose <perm = [0, 3, 1, 2]> (wide)\n    other = Sigmoid (features)\n    {joining}",
    )
    rest = (
        "\n".join(CHANNEL_LAST.strip().splitlines()[3:10])
        .replace("projected", "joined")
        .replace("(features", "(silu")
    )
    rest = (
        rest.replace("features =", "silu =")
        .replace("scanned =", "y =")
        .replace("    last = Transpose <perm = [0, 2, 3, 1]> (scanned)", "")
    )
    weights = {"stacked": np.array([axis + 1]), "joined_shape": np.array(sides)}
    refuse(
        text_model("\n    " + text + rest, 4, 6, weights=weights),
        "several images or maps lie in the map that block_1/scan walks.*by Concat",
    )


@pytest.mark.parametrize(
    "joining",
    [
        # Channels side by side, as in a U-Net.
        "less = Conv (x, half_in)\n    more = Conv (x, half_in)\n    projected = Concat <axis = 1> (less, more)",
        # A roll, which puts parts of one map elsewhere.
        "whole = Conv (x, in_proj)\n    left, right = Split <axis = 3> (whole, roll)\n"
        "    projected = Concat <axis = 3> (right, left)",
    ],
)
def test_parts_of_one_map_and_channels_of_two_may_be_put_together(joining: str) -> None:
    text = edited(CHANNEL_FIRST, "projected = Conv (x, in_proj)", joining)
    half = np.random.default_rng(1).standard_normal((D_INNER // 2, CHANNELS, 1, 1)).astype(np.float32)
    model = text_model(text, 6, 6, weights={"half_in": half, "roll": np.array([2, 4])})
    _, reports = run_passes(model, select({}, Subsample()), OPTIMIZED)
    assert all(report.changed for report in reports)


# Flattened maps ------------------------------------------------------------------------------------------------------

FLATTENED = edited(
    edited(
        CHANNEL_LAST,
        "normal = LayerNormalization <axis = -1> (last, norm_scale, norm_bias)",
        "flat = Reshape (last, flat_shape)\n"
        "    flat_normal = LayerNormalization <axis = 2> (flat, norm_scale, norm_bias)\n"
        "    scaled = Mul (flat_normal, channel_scale)",
    ),
    "mixed = MatMul (normal, out_matrix)",
    "flat_mixed = MatMul (scaled, out_matrix)\n    mixed = Reshape (flat_mixed, map_shape)",
)


@pytest.mark.parametrize("flat_shape", [[0, -1, D_INNER], [-1, 42, D_INNER], [2, 42, D_INNER]])
@pytest.mark.parametrize("again", [[0, 6, 7, CHANNELS], [-1, 6, 7, CHANNELS]])
def test_restoring_passes_what_is_normalised_as_a_sequence(flat_shape: list[int], again: list[int]) -> None:
    weights = {
        "flat_shape": np.array(flat_shape),
        "map_shape": np.array(again),
        "channel_scale": np.linspace(1, 2, D_INNER, dtype=np.float32),
    }
    model = text_model(FLATTENED, 6, 7, weights=weights)
    if flat_shape[0] == 2:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    selection, x = select({}, Subsample()), image(6, 7)
    canonical, _ = run_passes(model, selection, CANONICAL)
    optimized, reports = run_passes(model, selection, OPTIMIZED)
    assert reports[2].changed == ["block 1: restored after LayerNormalization, Mul, MatMul"]
    assert "Reshape" not in operators(optimized)
    assert error(run(lower(optimized), {"x": x})["y"], run(lower(canonical), {"x": x})["y"]) <= 1e-6
    again_optimized, reports = run_passes(optimized, selection, OPTIMIZED)
    assert all(not report.changed for report in reports)
    assert main_graph(again_optimized) == main_graph(optimized)


def test_where_the_map_is_not_made_again_the_sequence_stays_one() -> None:
    text = edited(
        FLATTENED,
        "mixed = Reshape (flat_mixed, map_shape)",
        "mixed = Transpose <perm = [0, 2, 1]> (flat_mixed)",
    )
    text = text[: text.index("    added =")].replace("mixed = Transpose", "y = Transpose")
    weights = {"flat_shape": np.array([0, -1, D_INNER]), "channel_scale": np.ones(D_INNER, np.float32)}
    for sizes in ((6, 7), ("height", "width")):
        model, x = text_model(text, *sizes, weights=weights, rank=3), image(6, 7)
        canonical, _ = run_passes(model, select({}, Subsample()), CANONICAL)
        optimized, reports = run_passes(model, select({}, Subsample()), OPTIMIZED)
        assert reports[2].changed == ["block 1: restored after LayerNormalization, Mul, MatMul"]
        assert operators(optimized).count("Reshape") == 1
        found, wanted = (run(lower(graph), {"x": x})["y"] for graph in (optimized, canonical))
        assert wanted.shape == (2, CHANNELS, 42)
        assert error(found, wanted) <= 1e-6


# Blocks with several scans -------------------------------------------------------------------------------------------


def test_all_scans_of_a_block_are_pruned_together() -> None:
    model = text_model(chained(CHANNEL_FIRST, 3), 7, 9)
    first, second, third = (node for node in model.graph.node if node.op_type == SELECTIVE_SCAN_2D)
    first.name, second.name, third.name = "block_1/scan", "block_2/scan", "block_1/call_2/scan"
    pruned, reports = run_passes(model, select({}, Subsample()), OPTIMIZED)
    assert reports[0].changed == ["block 1: keep 1 of 2 rows and columns, restore by nearest"]
    assert [line.split(":")[0] for line in reports[1].changed] == ["block 1", "block 1"]
    by_block, _ = run_passes(
        text_model(chained(CHANNEL_FIRST, 3), 7, 9), select({}, Subsample(), 1, 3), OPTIMIZED
    )
    x = image(7, 9)
    assert np.array_equal(run(lower(pruned), {"x": x})["y"], run(lower(by_block), {"x": x})["y"])
    names = [node.name for node in pruned.graph.node]
    assert len(set(names)) == len(names)


def test_directions_that_are_scanned_one_by_one_share_the_smaller_map() -> None:
    text = edited(
        CHANNEL_FIRST,
        "last = Transpose <perm = [0, 2, 3, 1]> (scanned)",
        "again = " + CHANNEL_FIRST.split("scanned = ")[1].split("\n")[0] + "\n"
        "    weighted = Mul (again, half)\n    both = Add (scanned, weighted)\n"
        "    last = Transpose <perm = [0, 2, 3, 1]> (both)",
    )
    model = text_model(text, 7, 9, weights={"half": np.float32(0.5)})
    for number, node in enumerate(node for node in model.graph.node if node.op_type == SELECTIVE_SCAN_2D):
        node.name = f"block_1/scan/{number + 1}"
    x = image(7, 9)
    with pytest.raises(PassError, match=r"block_1/scan/1 scans one direction.*whole map is not known"):
        run_passes(model, select({}, Subsample()), CANONICAL)
    selection = select({"block_1/scan": ScanOrder.of_directions(7, 9, DIRECTIONS)}, Subsample())
    canonical, _ = run_passes(model, selection, CANONICAL)
    optimized, reports = run_passes(model, selection, OPTIMIZED)
    assert reports[1].changed == ["block 1: convolved now has stride 2"]
    assert operators(canonical).count("Slice") == 1 and "Slice" not in operators(optimized)
    assert error(run(lower(optimized), {"x": x})["y"], run(lower(canonical), {"x": x})["y"]) <= 1e-6
