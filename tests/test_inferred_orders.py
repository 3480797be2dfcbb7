"""The order of a scan of tokens, followed up to the map that they come from through every operator that leaves them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from quartermap_deploy.frontend.node_names import scan_name
from quartermap_deploy.lowering.operator import SELECTIVE_SCAN
from quartermap_deploy.passes.recovery.concrete import Concrete
from quartermap_deploy.passes.recovery.graph_index import GraphIndex
from quartermap_deploy.passes.recovery.grids import InferredOrder, infer_order
from quartermap_deploy.passes.recovery.group import ScanGroup
from quartermap_deploy.pruning.orders import OUTSIDE

HEIGHT, WIDTH, CHANNELS = 3, 5, 4
RASTER = list(range(HEIGHT * WIDTH))
TOKENS = [OUTSIDE, *RASTER]
GRAPH = """
    flat = Reshape (x, flat_shape)
    tokens = Transpose <perm = [0, 2, 1]> (flat)
    begun = Concat <axis = 1> (token, tokens)
    made = Identity (begun)
    mixed = MatMul (made, square)
    u = Transpose <perm = [0, 2, 1]> (mixed)
    narrow = MatMul (thin, u)
    B = Unsqueeze (narrow, group)
    y = quartermap.SelectiveScan (u, u, A, B, B)
"""
WEIGHTS = {
    "flat_shape": np.array([0, CHANNELS, -1]),
    "token": np.ones((2, 1, CHANNELS), np.float32),
    "square": np.ones((CHANNELS, CHANNELS), np.float32),
    "thin": np.ones((2, CHANNELS), np.float32),
    "group": np.array([1]),
    "A": -np.ones((CHANNELS, 2), np.float32),
    "scale": np.ones(CHANNELS, np.float32),
    "rows": np.ones(16, np.float32),
    "mask": np.ones(1, bool),
    "two": np.full(1, 2, np.float32),
    "over": np.ones((16, 16), np.float32),
    "kernel": np.ones((CHANNELS, 1, 3), np.float32),
    "last_axis": np.array([2]),
    "A2": -np.ones((2 * CHANNELS, 2), np.float32),
    "backwards": np.array([-1]),
    "begin": np.array([-1]),
    "end": np.array([np.iinfo(np.int64).min]),
    "pointwise": np.ones((CHANNELS, CHANNELS, 1, 1), np.float32),
    "ones": np.ones(16, np.int64),
    "shuffled": np.random.default_rng(0).permutation(16),
}


def inferred(*edits: tuple[str, str], scan: int = -1) -> InferredOrder | None:
    text = GRAPH
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    header = '<ir_version: 10, opset_import: ["" : 20, "quartermap" : 1]>\n'
    shape = f"2, {CHANNELS}, {HEIGHT}, {WIDTH}"
    model = onnx.parser.parse_model(f"{header}agraph (float[{shape}] x) => (float[] y) {{{text}}}")
    read = {name for node in model.graph.node for name in node.input}
    for name, array in WEIGHTS.items():
        if name in read:
            model.graph.initializer.append(numpy_helper.from_array(array, name))
    for node in model.graph.node:
        if node.op_type == SELECTIVE_SCAN:
            node.name = scan_name(1)
    index = GraphIndex(model)
    return infer_order(
        ScanGroup(index, (index.scans()[scan],)), Concrete(index, {"x": (2, CHANNELS, HEIGHT, WIDTH)})
    )


def order(*edits: tuple[str, str], scan: int = -1) -> list[int] | None:
    found = inferred(*edits, scan=scan)
    if found is None:
        return None
    assert (found.grid, found.order.height, found.order.width, found.order.merged) == (
        "x",
        HEIGHT,
        WIDTH,
        False,
    )
    (steps,) = found.order.order.tolist()
    return list(steps)


def test_tokens_are_followed_to_their_map() -> None:
    assert order() == TOKENS


UNARY = (
    *(
        "Abs",
        "Cast <to = 1>",
        "Clip",
        "Elu",
        "Erf",
        "Exp",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Log",
    ),
    *("Neg", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Tanh"),
)
FORMS = (
    *(f"made = {op} (begun)" for op in UNARY),
    *(f"made = {op} (begun, two)" for op in ("Add", "Div", "Mul", "Pow", "PRelu", "Sub", "Sum")),
    *(f"made = {op} (two, begun)" for op in ("Add", "Sub")),
    "made = Where (mask, begun, two)",
    "made = BatchNormalization (begun, rows, rows, rows, rows)",
    "made = LayerNormalization (begun, scale)",
    "made = MatMul (begun, square)",
    # A sum of two ways that lead to the same map.
    "other = Relu (begun)\n    made = Add (begun, other)",
    "turned = Transpose <perm = [0, 2, 1]> (begun)\n    left = MatMul (square, turned)\n"
    "    made = Transpose <perm = [0, 2, 1]> (left)",
    "turned = Transpose <perm = [0, 2, 1]> (begun)\n    near = Conv <group = 4, pads = [1, 1]> (turned, kernel)\n"
    "    made = Transpose <perm = [0, 2, 1]> (near)",
    "turned = Transpose <perm = [0, 2, 1]> (begun)\n    near = Conv <group = 4, pads = [2, 0]> (turned, kernel)\n"
    "    made = Transpose <perm = [0, 2, 1]> (near)",
)


@pytest.mark.parametrize("line", FORMS)
def test_what_leaves_a_step_where_it_is(line: str) -> None:
    assert order(("made = Identity (begun)", line)) == TOKENS


def test_steps_that_are_moved_are_followed() -> None:
    turned = "made = Slice (begun, begin, end, group, backwards)"
    assert order(("made = Identity (begun)", turned)) == TOKENS[::-1]
    mixed = "made = Gather <axis = 1> (begun, shuffled)"
    assert order(("made = Identity (begun)", mixed)) == [TOKENS[place] for place in WEIGHTS["shuffled"]]
    assert order(
        ("begun = Concat <axis = 1> (token, tokens)", "begun = Concat <axis = 1> (tokens, token)")
    ) == [
        *RASTER,
        OUTSIDE,
    ]
    by_columns = (
        "flat = Reshape (x, flat_shape)",
        "s = Transpose <perm = [0, 1, 3, 2]> (x)\n    flat = Reshape (s, flat_shape)",
    )
    columns = np.array(RASTER).reshape(HEIGHT, WIDTH).T.ravel().tolist()
    assert order(by_columns) == [OUTSIDE, *columns]


def test_scans_hand_the_order_of_their_steps_on() -> None:
    second = (
        "y = quartermap.SelectiveScan (u, u, A, B, B)",
        "first = quartermap.SelectiveScan (u, u, A, B, B)\n    y = quartermap.SelectiveScan (first, u, A, B, B)",
    )
    assert order(second) == TOKENS
    assert order(second, scan=0) == TOKENS


@pytest.mark.parametrize(
    "line",
    [
        "made = Softmax <axis = 1> (begun)",
        "turned = Transpose <perm = [0, 2, 1]> (begun)\n    wide = MatMul (turned, over)\n"
        "    made = Transpose <perm = [0, 2, 1]> (wide)",
        "made = MatMul (over, begun)",
    ],
)
def test_what_mixes_steps_ends_the_search(line: str) -> None:
    assert order(("made = Identity (begun)", line)) is None


def test_steps_of_one_position_alone_follow_no_map() -> None:
    edits = (
        ("flat = Reshape (x, flat_shape)", "c = Conv (x, pointwise)\n    flat = Reshape (c, flat_shape)"),
        ("made = Identity (begun)", "made = Gather <axis = 1> (begun, ones)"),
    )
    assert order(*edits) is None
    found = inferred(edits[0])
    assert found is not None and found.grid == "c" and found.order.order.tolist() == [TOKENS]


def test_a_value_is_looked_at_once_however_many_ways_lead_to_it() -> None:
    """Forty residual sums have 2⁴⁰ ways up."""
    lines = ["a0 = Softmax <axis = 1> (begun)"]
    for place in range(40):
        lines += [f"b{place} = Relu (a{place})", f"a{place + 1} = Add (a{place}, b{place})"]
    lines.append("made = Identity (a40)")
    assert order(("made = Identity (begun)", "\n    ".join(lines))) is None


def test_two_maps_side_by_side_are_no_grid() -> None:
    edit = (
        "tokens = Transpose <perm = [0, 2, 1]> (flat)",
        "other = Relu (flat)\n    both = Concat <axis = 2> (flat, other)\n"
        "    tokens = Transpose <perm = [0, 2, 1]> (both)",
    )
    assert order(edit) is None


def test_each_direction_of_a_scan_has_its_own_order() -> None:
    edits = (
        ("narrow = MatMul (thin, u)", "back = Slice (u, begin, end, last_axis, backwards)\n"
         "    twice = Concat <axis = 1> (u, back)\n    narrow = MatMul (thin, u)"),
        ("B = Unsqueeze (narrow, group)", "one = Unsqueeze (narrow, group)\n    B = Concat <axis = 1> (one, one)"),
        ("(u, u, A, B, B)", "(twice, twice, A2, B, B)"),
    )  # fmt: skip
    found = inferred(*edits)
    assert found is not None and found.order.order.tolist() == [TOKENS, TOKENS[::-1]]


def test_a_scan_of_which_one_direction_follows_no_map_has_no_order() -> None:
    edits = (
        ("narrow = MatMul (thin, u)", "mixed_steps = Softmax <axis = 2> (u)\n"
         "    twice = Concat <axis = 1> (u, mixed_steps)\n    narrow = MatMul (thin, u)"),
        ("B = Unsqueeze (narrow, group)", "one = Unsqueeze (narrow, group)\n    B = Concat <axis = 1> (one, one)"),
        ("(u, u, A, B, B)", "(twice, twice, A2, B, B)"),
    )  # fmt: skip
    assert inferred(*edits) is None
