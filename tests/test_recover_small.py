"""recover_2d on a graph of some twenty nodes: two directions of a map, one from its end, edited line by line."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import Array, error, run
from onnx import helper, numpy_helper

from quartermap_deploy.frontend.node_names import scan_name
from quartermap_deploy.lowering.operator import SELECTIVE_SCAN, SELECTIVE_SCAN_2D
from quartermap_deploy.passes import lower
from quartermap_deploy.passes.recover_2d import Recovered, recover_2d

D_INNER, N, HEIGHT, WIDTH = 4, 2, 3, 5
GRAPH = """
    flat = Reshape (x, flat_shape)
    back = Slice (flat, last, before_first, along, backwards)
    u = Concat <axis = 1> (flat, back)
    delta_1 = MatMul (dt_1, flat)
    delta_2 = MatMul (dt_2, back)
    delta = Concat <axis = 1> (delta_1, delta_2)
    narrow_B1 = MatMul (B_1, flat)
    narrow_B2 = MatMul (B_2, back)
    B1 = Unsqueeze (narrow_B1, group)
    B2 = Unsqueeze (narrow_B2, group)
    B = Concat <axis = 1> (B1, B2)
    narrow_C1 = MatMul (C_1, flat)
    narrow_C2 = MatMul (C_2, back)
    C1 = Unsqueeze (narrow_C1, group)
    C2 = Unsqueeze (narrow_C2, group)
    C = Concat <axis = 1> (C1, C2)
    scanned = quartermap.SelectiveScan <delta_softplus = 1> (u, delta, A, B, C, D, bias)
    forth, turned = Split <axis = 1, num_outputs = 2> (scanned)
    again = Slice (turned, last, before_first, along, backwards)
    merged = Add (forth, again)
    map = Reshape (merged, map_shape)
    y = Relu (map)
"""


def weights() -> dict[str, Array]:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    narrow = {f"{name}_{k}": normal(N, D_INNER) for name in ("B", "C") for k in (1, 2)}
    return {
        **narrow,
        "dt_1": normal(D_INNER, 1) @ normal(1, D_INNER),
        "dt_2": normal(D_INNER, 1) @ normal(1, D_INNER),
        "A": -np.exp(normal(2 * D_INNER, N)),
        "D": normal(2 * D_INNER),
        "bias": normal(2 * D_INNER),
        "flat_shape": np.array([0, D_INNER, -1]),
        "map_shape": np.array([0, D_INNER, HEIGHT, WIDTH]),
        "last": np.array([-1]),
        "before_first": np.array([np.iinfo(np.int64).min]),
        "along": np.array([2]),
        "backwards": np.array([-1]),
        "group": np.array([1]),
        "half": np.array([0.5], np.float32),
        "two": np.array([2.0], np.float32),
    }


def model(
    *edits: tuple[str, str],
    batch: int | str = 2,
    sides: tuple[int | str, int | str] = (HEIGHT, WIDTH),
    outputs: tuple[str, ...] = ("y",),
    **more: Array,
) -> onnx.ModelProto:
    text = GRAPH
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    header = '<ir_version: 10, opset_import: ["" : 20, "quartermap" : 1]>\n'
    results = ", ".join(f"float[] {name}" for name in outputs)
    shape = f"{batch}, {D_INNER}, {sides[0]}, {sides[1]}"
    made = onnx.parser.parse_model(f"{header}agraph (float[{shape}] x) => ({results}) {{{text}}}")
    read = {name for node in made.graph.node for name in node.input}
    for name, array in {**weights(), **more}.items():
        if name in read:
            made.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    place = 0
    for node in made.graph.node:
        if node.op_type == SELECTIVE_SCAN:
            place += 1
            node.name = scan_name(1, place=place)
    return made


def image(*shape: int) -> Array:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def of_type(found: Recovered, op: str) -> list[onnx.NodeProto]:
    return [node for node in found.model.graph.node if node.op_type == op]


def same(before: onnx.ModelProto, found: Recovered, *shapes: tuple[int, ...]) -> None:
    for shape in shapes:
        feeds = {"x": image(*shape)}
        expected, actual = run(lower(before), feeds), run(lower(found.model), feeds)
        assert expected.keys() == actual.keys()
        assert all(error(actual[name], expected[name]) <= 1e-5 for name in expected)


def refusal(*edits: tuple[str, str], outputs: tuple[str, ...] = ("y",), **more: Array) -> str:
    before = model(*edits, outputs=outputs, **more)
    found = recover_2d(before)
    assert not of_type(found, SELECTIVE_SCAN_2D) and found.report.changed == []
    (scan,) = found.report.scans
    assert scan.refused is not None and found.report.refused == {1: scan.refused}
    assert scan.nodes == scan.scans == ("block_1/scan",)
    assert scan.describe().startswith(f"block_1/scan: stays one-dimensional: {scan.refused}")
    same(before, found, (2, D_INNER, HEIGHT, WIDTH))
    return scan.refused


def test_two_directions_become_one_scan_of_the_map() -> None:
    before = model()
    untouched = before.SerializeToString(deterministic=True)
    found = recover_2d(before)
    assert before.SerializeToString(deterministic=True) == untouched
    (scan,) = of_type(found, SELECTIVE_SCAN_2D)
    assert scan.name == "block_1/scan"
    assert helper.get_node_attr_value(scan, "directions") == [b"row", b"row_reverse"]
    assert helper.get_node_attr_value(scan, "softplus") == 1
    assert not of_type(found, SELECTIVE_SCAN) and len(of_type(found, "Conv")) == 1
    # The unrolling is gone, and what it was read from is not kept.
    assert not of_type(found, "Slice")
    kept = {tensor.name for tensor in found.model.graph.initializer}
    assert (
        kept == {name for node in found.model.graph.node for name in node.input} & kept and "dt_1" not in kept
    )
    line = "block_1/scan: row, row_reverse of 4×3×5, state 2, time step of rank 1, from x (NCHW)"
    assert found.report.changed == [line] and found.report.refused == {}
    (recovery,) = found.report.scans
    assert (recovery.d_inner, recovery.d_state, recovery.rank, recovery.apart) == (4, 2, 1, False)
    order = found.orders["block_1/scan"]
    assert (order.height, order.width, order.merged, order.directions) == (3, 5, True, ("row", "row_reverse"))
    same(before, found, (2, D_INNER, HEIGHT, WIDTH))
    again = recover_2d(found.model)
    assert again.report.scans == [] and len(again.model.graph.node) == len(found.model.graph.node)


def test_open_sizes_stay_open() -> None:
    open_map = ("map = Reshape (merged, map_shape)", "size = Shape (x)\n    map = Reshape (merged, size)")
    before = model(open_map, batch="n", sides=("h", "w"))
    found = recover_2d(before)
    assert len(of_type(found, SELECTIVE_SCAN_2D)) == 1
    same(before, found, (1, D_INNER, 3, 5), (2, D_INNER, 6, 4), (3, D_INNER, 2, 7))
    before = model(batch="n")
    found = recover_2d(before)
    assert len(of_type(found, SELECTIVE_SCAN_2D)) == 1
    same(before, found, (1, D_INNER, 3, 5), (3, D_INNER, 3, 5))


def test_scans_of_several_maps_are_told_of_in_the_order_of_the_graph() -> None:
    edit = (
        "y = Relu (map)",
        "bent = Sigmoid (flat)\n    narrow = MatMul (B_1, bent)\n    group_B = Unsqueeze (narrow, group)\n"
        "    alone = quartermap.SelectiveScan (bent, bent, A_1, group_B, group_B)\n    act = Relu (map)\n"
        "    sums = Reshape (alone, map_shape)\n    y = Add (act, sums)",
    )
    before = model(edit, A_1=-np.ones((D_INNER, N), np.float32))
    found = recover_2d(before)
    assert [scan.scans for scan in found.report.scans] == [("block_1/scan",), ("block_1/scan_2",)]
    assert len(of_type(found, SELECTIVE_SCAN_2D)) == 2 or found.report.refused
    same(before, found, (2, D_INNER, HEIGHT, WIDTH))


def test_the_matrices_of_a_map_of_six_positions_are_read_from_several_maps() -> None:
    before = model(batch=1, sides=(2, 3), map_shape=np.array([0, D_INNER, 2, 3]))
    found = recover_2d(before)
    assert "row, row_reverse of 4×2×3, state 2, time step of rank 1" in found.report.changed[0]
    same(before, found, (1, D_INNER, 2, 3))


@pytest.mark.parametrize("sides", [(1, 1), (1, 5), (3, 1)])
def test_maps_of_one_line_or_position_are_read_or_left_alone(sides: tuple[int, int]) -> None:
    before = model(sides=sides, map_shape=np.array([0, D_INNER, *sides]))
    found = recover_2d(before)
    assert found.report.changed or found.report.refused
    same(before, found, (2, D_INNER, *sides))


def test_columns_tell_the_sides_of_a_map_that_is_held_as_a_sequence() -> None:
    columns = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).T.ravel()
    edits = (
        ("flat = Reshape (x, flat_shape)", "raster = Reshape (x, flat_shape)\n    flat = Relu (raster)"),
        (
            "back = Slice (flat, last, before_first, along, backwards)",
            "back = Gather <axis = 2> (flat, columns)",
        ),
        (
            "again = Slice (turned, last, before_first, along, backwards)",
            "again = Gather <axis = 2> (turned, rows)",
        ),
    )
    for batch, shapes in ((2, [2]), ("n", [1, 3])):
        before = model(*edits, batch=batch, columns=columns, rows=np.argsort(columns))
        found = recover_2d(before)
        assert found.report.changed and found.report.changed[0].startswith(
            "block_1/scan: row, column of 4×3×5"
        )
        assert found.report.changed[0].endswith("from flat (NCL)")
        same(before, found, *((size, D_INNER, HEIGHT, WIDTH) for size in shapes))


def test_means_of_directions_are_scaled_sums() -> None:
    edit = (
        "merged = Add (forth, again)",
        "one = Unsqueeze (forth, group)\n    other = Unsqueeze (again, group)\n"
        "    both = Concat <axis = 1> (one, other)\n    merged = ReduceMean <keepdims = 0> (both, group)",
    )
    before = model(edit)
    found = recover_2d(before)
    assert len(of_type(found, SELECTIVE_SCAN_2D)) == 1
    same(before, found, (2, D_INNER, HEIGHT, WIDTH))


def test_maps_whose_channels_are_last_are_transposed() -> None:
    edits = (
        (
            "flat = Reshape (x, flat_shape)",
            "t = Transpose <perm = [0, 2, 3, 1]> (x)\n    m = Sigmoid (t)\n"
            "    l = Reshape (m, last_shape)\n    flat = Transpose <perm = [0, 2, 1]> (l)",
        ),
        (
            "map = Reshape (merged, map_shape)",
            "q = Transpose <perm = [0, 2, 1]> (merged)\n    map = Reshape (q, last_map)",
        ),
    )
    before = model(
        *edits, last_shape=np.array([0, -1, D_INNER]), last_map=np.array([0, HEIGHT, WIDTH, D_INNER])
    )
    found = recover_2d(before)
    assert "from m (NHWC)" in found.report.changed[0]
    same(before, found, (2, D_INNER, HEIGHT, WIDTH))


def test_offsets_of_projections_and_full_rank_are_kept() -> None:
    random = np.random.default_rng(4).standard_normal
    edits = (
        (
            "delta_1 = MatMul (dt_1, flat)",
            "wide_1 = MatMul (dt_full, flat)\n    delta_1 = Add (wide_1, step)",
        ),
        (
            "narrow_B1 = MatMul (B_1, flat)",
            "bare_B1 = MatMul (B_1, flat)\n    narrow_B1 = Add (bare_B1, offset)",
        ),
    )
    more = {
        "dt_full": random((D_INNER, D_INNER)).astype(np.float32),
        "step": random((D_INNER, 1)).astype(np.float32),
        "offset": random((N, 1)).astype(np.float32),
    }
    before = model(*edits, **more)
    found = recover_2d(before)
    assert "time step of full rank" in found.report.changed[0]
    (conv,) = of_type(found, "Conv")
    assert len(conv.input) == 3
    same(before, found, (2, D_INNER, HEIGHT, WIDTH))


def test_directions_that_differ_in_softplus_or_have_no_skip() -> None:
    before = model((", C, D, bias)", ", C)"), ("delta_softplus = 1", "delta_softplus = 0"))
    found = recover_2d(before)
    (scan,) = of_type(found, SELECTIVE_SCAN_2D)
    assert helper.get_node_attr_value(scan, "softplus") == 0
    same(before, found, (2, D_INNER, HEIGHT, WIDTH))


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ([("again = Slice (turned, last, before_first, along, backwards)", "again = Identity (turned)")],
         "put back into map elsewhere than it was taken from"),
        ([("merged = Add (forth, again)", "merged = Sub (forth, again)")],
         "direction 2 is not added to merged with one weight"),
        ([("merged = Add (forth, again)", "merged = Mul (forth, again)")],
         "do not meet in a map by being added up: Mul  reads"),
        ([("narrow_C2 = MatMul (C_2, back)", "bent = MatMul (C_2, back)\n    narrow_C2 = Tanh (bent)")],
         "go through Tanh , which is not affine in one position"),
        ([("narrow_B2 = MatMul (B_2, back)", "narrow_B2 = MatMul (B_2, flat)")],
         "B is not affine in one position of x, or is of another one than u"),
        ([("delta_2 = MatMul (dt_2, back)", "delta_2 = MatMul (dt_2, flat)")],
         "delta is not affine in one position of x, or is of another one than u"),
        ([("u = Concat <axis = 1> (flat, back)", "bent = Sigmoid (back)\n    u = Concat <axis = 1> (flat, bent)")],
         "u is not x moved about: it holds values that are not in it"),
        ([("(u, delta, A, B", "(u, delta, grown, B"),
          ("u = Concat", "most = ReduceMax <keepdims = 0> (x)\n    grown = Mul (A, most)\n    u = Concat")],
         "its A depends on the data"),
        ([("u = Concat <axis = 1> (flat, back)",
           "swapped = Gather <axis = 1> (back, channels)\n    u = Concat <axis = 1> (flat, swapped)")],
         "u, unrolled from x, takes values of another channel"),
        ([("u = Concat <axis = 1> (flat, back)",
           "other = Gather <axis = 2> (flat, shuffled)\n    u = Concat <axis = 1> (flat, other)")],
         "direction 2 visits the positions of x in an order that is none of row, column, row_reverse, column_reverse"),
        ([("u = Concat <axis = 1> (flat, back)",
           "other = Gather <axis = 2> (flat, doubled)\n    u = Concat <axis = 1> (flat, other)")],
         "a direction takes a position of x twice"),
        ([("u = Concat <axis = 1> (flat, back)",
           "other = Gather <axis = 0> (back, images)\n    u = Concat <axis = 1> (flat, other)")],
         "takes positions of another image of the batch"),
    ],
)  # fmt: skip
def test_near_misses_are_left_alone_and_told_apart(edits: list[tuple[str, str]], words: str) -> None:
    shuffled = np.random.default_rng(3).permutation(HEIGHT * WIDTH)
    found = refusal(
        *edits,
        channels=np.array([1, 0, 2, 3]),
        images=np.array([1, 0]),
        shuffled=shuffled,
        doubled=np.array([0, *range(HEIGHT * WIDTH - 1)]),
    )
    assert words in found


def test_a_value_on_the_way_that_the_model_returns_is_needed() -> None:
    assert "scanned is an output of the model" in refusal(outputs=("y", "scanned"))


def test_a_sequence_is_no_map() -> None:
    # Without the map behind it nothing tells rows from columns.
    edits = (("map = Reshape (merged, map_shape)\n    y = Relu (map)", "y = Relu (merged)"),)
    found = recover_2d(model(*edits))
    assert len(found.report.scans) == 1
    before = model(
        ("flat = Reshape (x, flat_shape)", "raster = Reshape (x, flat_shape)\n    flat = Relu (raster)"),
        *edits,
    )
    found = recover_2d(before)
    assert "its steps follow a sequence, flat, not the rows or columns of a map" in found.report.refused[1]
    # For pruning, the grid that the sequence was read from is known all the same.
    (scan,) = found.report.scans
    assert scan.inferred == "the 3×5 positions of x"
    assert scan.describe().endswith("; for pruning, its steps are the 3×5 positions of x")
    order = found.orders["block_1/scan"]
    assert (order.height, order.width, order.merged) == (3, 5, False)
    assert order.directions == ("row", "row_reverse")


def test_a_graph_that_runs_at_no_size_that_is_tried_is_left_alone() -> None:
    # Only maps of a multiple of 729 positions can be folded so.
    folded = (
        "flat = Reshape (x, flat_shape)",
        "folds = Reshape (x, fold)\n    flat = Reshape (x, flat_shape)",
    )
    fold = np.array([0, D_INNER, -1, 729])
    before = model(folded, batch="n", sides=("h", "w"), outputs=("y", "folds"), fold=fold)
    found = recover_2d(before)
    assert "of those tried it runs at" in found.report.refused[1]
    (scan,) = found.report.scans
    assert (scan.d_inner, scan.d_state, scan.rank, scan.source, dict(scan.orders)) == (0, 0, None, None, {})
    assert [node.op_type for node in found.model.graph.node] == [node.op_type for node in before.graph.node]
