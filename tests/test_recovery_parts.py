"""The parts of recover_2d by themselves: what they read off graphs of a few nodes, and what they write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import Array, run
from onnx import TensorProto, helper, numpy_helper

from quartermap_deploy.lowering.operator import DIRECTIONS
from quartermap_deploy.passes import lower
from quartermap_deploy.passes.recovery import apart, probing_sizes
from quartermap_deploy.passes.recovery.checking import check_replacement
from quartermap_deploy.passes.recovery.concrete import Concrete, concrete_graph
from quartermap_deploy.passes.recovery.folding import _FAST, evaluated
from quartermap_deploy.passes.recovery.graph_index import (
    GraphIndex,
    attribute,
    elements,
    has_subgraph,
    read_values,
)
from quartermap_deploy.passes.recovery.group import GroupSizes, ScanGroup
from quartermap_deploy.passes.recovery.maps import MapForm
from quartermap_deploy.passes.recovery.merging import Merge
from quartermap_deploy.passes.recovery.operators import depends_on_data, is_affine, is_float, moves, sums
from quartermap_deploy.passes.recovery.probing_sizes import probing_graphs
from quartermap_deploy.passes.recovery.programs import (
    _in_double,
    acts_on_single_positions,
    nodes_between,
    program,
)
from quartermap_deploy.passes.recovery.projections import Projections, _independent_rows
from quartermap_deploy.passes.recovery.reading import Reading, require_same
from quartermap_deploy.passes.recovery.refusal import Refused
from quartermap_deploy.passes.recovery.unrolling import Unrolling, _grid, position_of, read_unrolling
from quartermap_deploy.passes.recovery.writing import NodeWriter, Replacement, ScanParameters, write_map_scan
from quartermap_deploy.pruning.orders import OUTSIDE, steps_of
from quartermap_deploy.pruning.parts import MapPart

HEADER = '<ir_version: 10, opset_import: ["" : 20, "quartermap" : 1]>\n'


def parsed(text: str) -> onnx.ModelProto:
    """A model from ONNX's textual form, without its header."""
    return onnx.parser.parse_model(HEADER + text)


def concrete(text: str, **sizes: tuple[int, ...]) -> Concrete:
    return Concrete(GraphIndex(parsed(text)), sizes)


# Computing a node -----------------------------------------------------------------------------------------------


def by_onnx_runtime(node: onnx.NodeProto, inputs: Sequence[Array | None]) -> list[Array]:
    feeds = {name: array for name, array in zip(node.input, inputs, strict=True) if array is not None}
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    graph = helper.make_graph(
        [node], "one", values, [helper.make_value_info(name, onnx.TypeProto()) for name in node.output]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return list(run(onnx.shape_inference.infer_shapes(model), feeds).values())


def ints(*values: Any) -> Array:
    return np.array(values, np.int64)


def floats(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


CASES: list[tuple[str, list[Array | None], dict[str, Any]]] = [
    ("Add", [ints(1, 2), ints(3, 5)], {}),
    ("Sub", [ints(7, 2), ints(3, 5)], {}),
    ("Mul", [ints(7, 2), ints(3, 5)], {}),
    ("Neg", [ints(7, -2)], {}),
    ("Div", [ints(7, -7, 7, -7, 6), ints(2, 2, -2, -2, 3)], {}),
    ("Div", [floats(3), floats(3) + 3], {}),
    ("Equal", [ints(1, 2), ints(1, 3)], {}),
    ("Cast", [np.array([1.7, -1.7], np.float32)], {"to": TensorProto.INT64}),
    ("Cast", [ints(1, 0)], {"to": TensorProto.BOOL}),
    ("Concat", [ints([1], [2]), ints([3, 4], [5, 6])], {"axis": 1}),
    ("Concat", [ints([1, 2]), ints([3, 4])], {"axis": 0}),
    ("Expand", [ints([1, 2, 3]), ints(2, 3)], {}),
    ("Expand", [ints([1, 2], [3, 4]), ints(1, 2)], {}),
    ("Gather", [ints([1, 2, 3], [4, 5, 6]), ints(0, 2)], {"axis": 1}),
    ("Gather", [ints([1, 2], [3, 4]), ints(1)], {}),
    ("Gather", [ints([1, 2], [3, 4]), ints(-1)], {"axis": 1}),
    ("Identity", [ints(3)], {}),
    ("Range", [np.array(2), np.array(11), np.array(3)], {}),
    ("Reshape", [floats(2, 3, 4), ints(0, -1)], {}),
    ("Reshape", [floats(2, 3, 4), ints(4, 0, 2)], {}),
    ("Reshape", [floats(0, 3), ints(3, 0)], {"allowzero": 1}),
    ("Squeeze", [floats(1, 3, 1), ints(2)], {}),
    ("Squeeze", [floats(1, 3, 1)], {}),
    ("Transpose", [floats(2, 3, 4)], {"perm": [1, 2, 0]}),
    ("Transpose", [floats(2, 3, 4)], {}),
    ("Unsqueeze", [floats(2, 3), ints(0, -1)], {}),
    ("Where", [np.array([True, False]), ints(1, 2), ints(3, 4)], {}),
    ("ConstantOfShape", [ints(2, 3)], {}),
    ("ConstantOfShape", [ints(2, 3)], {"value": numpy_helper.from_array(ints(7))}),
    ("Constant", [], {"value": numpy_helper.from_array(floats(2, 3))}),
    ("Constant", [], {"value_int": 5}),
    ("Constant", [], {"value_ints": [5, 6]}),
    ("Constant", [], {"value_float": 0.5}),
    ("Constant", [], {"value_floats": [0.5, 1.5]}),
    # What NumPy has no short form of goes through the reference evaluator.
    ("Mod", [ints(7, -7), ints(3, 3)], {}),
    ("Slice", [floats(5, 4), ints(1), ints(4), None, ints(2)], {}),
]


@pytest.mark.parametrize(("op", "inputs", "attributes"), CASES)
def test_nodes_compute_as_in_onnx_runtime(
    op: str, inputs: list[Array | None], attributes: dict[str, Any]
) -> None:
    names = [f"in_{place}" if item is not None else "" for place, item in enumerate(inputs)]
    node = helper.make_node(op, names, ["out"], **attributes)
    # For all but those the reference evaluator would be right too, and take milliseconds for each.
    assert (op in _FAST) is (op not in ("Mod", "Slice"))
    (found,) = evaluated(node, inputs, 20)
    (expected,) = by_onnx_runtime(node, inputs)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert np.array_equal(found, expected)


# A graph at some sizes --------------------------------------------------------------------------------------------

GRAPH = """
agraph (float[batch, 3, height, width] x) => (float[] y)
<float[3] bias = {1, 2, 3}, float[1, 3] odds = {1, 2, 3}, int64[1] two = {2}, float half = {0.5},
 float[1] nothing = {0}>
{
    sizes = Shape (x)
    some = Shape <start = 1, end = 3> (x)
    all = Size (x)
    doubled = Mul (some, two)
    dice = RandomUniform <shape = [2]> ()
    noisy = Add (dice, half)
    coin = Bernoulli (bias)
    drawn = Multinomial <sample_size = 2> (odds)
    like = RandomNormalLike (bias)
    active = Relu (x)
    places = NonZero (active)
    y = Mul (active, half)
}
"""


def test_sizes_are_numbers_and_data_is_not() -> None:
    graph = concrete(GRAPH, x=(2, 3, 5, 7))
    assert graph.array("sizes").tolist() == [2, 3, 5, 7]
    assert graph.array("some").tolist() == [3, 5]
    assert graph.array("all").tolist() == 210 and graph.array("all").shape == ()
    assert graph.array("doubled").tolist() == [6, 10]
    fixed = {"sizes", "some", "all", "doubled", "bias", "half"}
    names = [*fixed, "dice", "noisy", "coin", "drawn", "like", "active", "places", "y", "x"]
    assert {name for name in names if graph.is_fixed(name)} == fixed
    assert graph.shape("active") == (2, 3, 5, 7) and graph.shape("bias") == (3,)
    assert (graph.element_type("active"), graph.element_type("two"), graph.element_type("what")) == (
        TensorProto.FLOAT,
        TensorProto.INT64,
        0,
    )
    assert is_float("active", graph) and not is_float("two", graph) and not is_float("what", graph)
    with pytest.raises(Refused, match="the shape of places is not known"):
        graph.shape("places")


def test_sizes_that_a_graph_contradicts_are_refused() -> None:
    text = "agraph (float[n, 3] x, float[m, 3] z) => (float[n, 3] y) { y = Add (x, z) }"
    assert concrete_graph(GraphIndex(parsed(text)), {"x": (2, 3), "z": (2, 3)}).shape("y") == (2, 3)
    with pytest.raises(Refused, match="contradiction"):
        concrete_graph(GraphIndex(parsed(text)), {"x": (2, 3), "z": (4, 3)})


def test_a_graph_is_indexed_by_its_values() -> None:
    index = GraphIndex(parsed(GRAPH))
    assert index.nodes[index.made_by["doubled"]].op_type == "Mul"
    assert [index.nodes[place].op_type for place in index.read_by["active"]] == ["NonZero", "Mul"]
    assert index.outputs == {"y"} and list(index.inputs) == ["x"]
    assert index.maker("x") is None and index.is_constant("bias") and not index.is_constant("x")
    assert index.constant("bias").tolist() == [1, 2, 3]
    assert index.scans() == []
    node = index.nodes[1]
    assert (attribute(node, "start", 0), attribute(node, "axis"), attribute(node, "axis", 4)) == (1, None, 4)
    assert (elements((2, 3, 4)), elements(())) == (24, 1)


def test_a_subgraph_reads_for_its_node() -> None:
    text = """
    agraph (bool flag, float[2] x, float[2] z) => (float[2] y) {
        y = If (flag) <
            then_branch = g1 () => (float[2] a) { inner = Add (x, z)  a = Relu (inner) },
            else_branch = g2 () => (float[2] z) { }
        >
    }
    """
    (node,) = parsed(text).graph.node
    assert set(read_values(node)) == {"flag", "x", "z"} and has_subgraph(node)
    assert not has_subgraph(helper.make_node("Add", ["x", "z"], ["y"]))
    assert list(read_values(helper.make_node("Clip", ["x", "", "most"], ["y"]))) == ["x", "most"]


# Running a part ---------------------------------------------------------------------------------------------------

PART = """
agraph (float[2, 4, 3, 5] x, float[2, 4, 3, 5] other) => (float[2, 2, 3, 5] y)
<float[2, 2, 1, 1] weight = {1, 2, 3, 4}, float[2] bias = {10, 20}, float[1, 4, 1, 1] scale = {1, 2, 3, 4}>
{
    turned = Transpose <perm = [0, 1, 3, 2]> (x)
    back = Transpose <perm = [0, 1, 3, 2]> (turned)
    scaled = Mul (back, scale)
    y = Conv <group = 2> (scaled, weight, bias)
    sum = Add (scaled, other)
}
"""


def test_a_part_runs_in_float64_convolutions_as_products() -> None:
    graph = concrete(PART, x=(2, 4, 3, 5), other=(2, 4, 3, 5))
    assert nodes_between(graph, ["turned"], ["y"]) == [1, 2, 3]
    x = np.random.default_rng(0).standard_normal((2, 4, 3, 5))
    y, same = program(graph, ["x"], ["y", "x"])(x)
    scaled = x * np.array([1.0, 2, 3, 4])[:, None, None]
    expected = np.stack(
        [scaled[:, 0] + 2 * scaled[:, 1] + 10, 3 * scaled[:, 2] + 4 * scaled[:, 3] + 20], axis=1
    )
    assert y.dtype == np.float64 and np.abs(y - expected).max() <= 1e-12
    assert np.array_equal(same, x)


def test_all_that_is_made_of_the_outputs_of_one_node_is_part() -> None:
    text = """
    agraph (float[4] x) => (float[] y)
    {
        a = Relu (x)
        s, t = Split <axis = 0, num_outputs = 2> (a)
        b = Neg (s)
        c = Abs (t)
        d = Exp (x)
        y = Concat <axis = 0> (d, b, c)
    }
    """
    assert nodes_between(concrete(text, x=(4,)), ["x"], ["y"]) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("shape", "attributes", "single"),
    [
        ((4, 4, 1, 1), {}, True),
        ((4, 4, 1), {}, True),
        ((4, 1, 1, 1), {"strides": [1, 1], "pads": [0, 0, 0, 0], "group": 4}, True),
        ((4, 4, 1, 1), {"strides": [2, 1]}, False),
        ((4, 4, 1, 1), {"strides": [2, 2]}, False),
        ((4, 4, 1, 1), {"pads": [0, 0, 0, 1]}, False),
        ((4, 4, 1, 1), {"pads": [1, 1, 1, 1]}, False),
        ((4, 4, 1, 3), {}, False),
        ((4, 4, 3, 1), {}, False),
        ((4, 4, 3, 3), {"pads": [1, 1, 1, 1]}, False),
        ((4, 4, 2, 2), {"strides": [2, 2]}, False),
    ],
)
def test_which_convolutions_act_on_single_positions(
    shape: tuple[int, ...], attributes: dict[str, Any], single: bool
) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    assert acts_on_single_positions(node, shape) is single


def test_floating_point_numbers_of_a_part_become_float64_and_others_stay() -> None:
    def changed(node: onnx.NodeProto) -> list[Any]:
        before = node.SerializeToString()
        attributes = [helper.get_attribute_value(item) for item in _in_double(node).attribute]
        assert node.SerializeToString() == before
        return [
            numpy_helper.to_array(item) if isinstance(item, onnx.TensorProto) else item for item in attributes
        ]

    for kind in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE):
        assert changed(helper.make_node("Cast", ["x"], ["y"], to=kind)) == [TensorProto.DOUBLE]
    for kind in (TensorProto.INT64, TensorProto.BOOL):
        assert changed(helper.make_node("Cast", ["x"], ["y"], to=kind)) == [kind]
    assert changed(helper.make_node("Other", ["x"], ["y"], to=TensorProto.FLOAT)) == [TensorProto.FLOAT]
    (nothing,) = changed(helper.make_node("ConstantOfShape", ["x"], ["y"]))
    assert nothing.dtype == np.float64 and nothing.tolist() == [0.0]
    for value in (np.float16(0.5), np.float32(0.5), 0.5, np.int64(3)):
        made = helper.make_node(
            "ConstantOfShape", ["x"], ["y"], value=numpy_helper.from_array(np.array([value]))
        )
        (found,) = changed(made)
        assert found.tolist() == [value] and found.dtype == (np.int64 if value == 3 else np.float64)


def test_what_else_a_part_reads_or_how_long_it_is_is_refused() -> None:
    graph = concrete(PART, x=(2, 4, 3, 5), other=(2, 4, 3, 5))
    with pytest.raises(Refused, match="also reads other, an input of the model"):
        nodes_between(graph, ["x"], ["sum"])
    assert nodes_between(graph, ["x"], ["y"], most=4) == [0, 1, 2, 3]
    with pytest.raises(Refused, match="more than 3 nodes"):
        nodes_between(graph, ["x"], ["y"], most=3)


# What operators do ------------------------------------------------------------------------------------------------

OPERATORS = """
agraph (float[2, 4, 3, 5] x, float[2, 4, 3, 5] z, int64[2] where, float16[2] half,
 float[2, 5] p, float[2, 6] q, float[5, 6] r) => (float[] y)
<int64[2] fixed = {0, 1}, float[1] zero = {0}, float[1] one = {1}, int64[1] axis = {1}, bool[1] mask = {1},
 int64[4] small = {4, 4, 1, 1}, int64[4] large = {4, 4, 3, 3}, int64[2] sides = {5, 6}>
{
    pointwise = ConstantOfShape (small)
    wide = ConstantOfShape (large)
    matrix = ConstantOfShape (sides)
    gathered = Gather <axis = 1> (x, fixed)
    chosen = Gather <axis = 1> (x, where)
    joined = Concat <axis = 1> (x, z)
    wider = Cast <to = 1> (half)
    whole = Cast <to = 7> (x)
    masked = Where (mask, x, zero)
    compared = Where (mask, x, z)
    added = Add (x, z)
    begun = Add (x, zero)
    shifted = Add (x, one)
    less = Sub (x, z)
    total = ReduceSum <keepdims = 0> (x, axis)
    mean = ReduceMean <keepdims = 0> (x, axis)
    own = Einsum <equation = "bchw->bcwh"> (x)
    product = Einsum <equation = "bchw,bchw->bchw"> (x, z)
    squared = Mul (x, z)
    scaled = Mul (x, one)
    divided = Div (x, one)
    inverse = Div (one, x)
    projected = MatMul (x, matrix)
    convolved = Conv (x, pointwise)
    mixed = Conv <pads = [1, 1, 1, 1]> (x, wide)
    padded = Conv <pads = [1, 1, 1, 1]> (x, pointwise)
    strided = Conv <strides = [2, 2]> (x, pointwise)
    computed = Conv (x, product)
    active = Relu (x)
    ours = quartermap.Other (x)
    gemm = Gemm (p, matrix, q)
    both = Gemm (p, r)
}
"""
MOVES = {"gathered", "joined", "wider", "masked", "compared"}
SUMS = {"added", "begun", "less", "total", "mean", "own"}
AFFINE = {*MOVES, *SUMS, "shifted", "scaled", "divided", "projected", "convolved", "gemm"}


def test_operators_are_told_by_what_they_do() -> None:
    sizes = {"where": (2,), "half": (2,), "p": (2, 5), "q": (2, 6), "r": (5, 6)}
    graph = concrete(OPERATORS, x=(2, 4, 3, 5), z=(2, 4, 3, 5), **sizes)
    made = {node.output[0]: node for node in graph.index.nodes if node.op_type != "ConstantOfShape"}

    def those(asked: Any) -> set[str]:
        return {name for name, node in made.items() if asked(node, graph)}

    assert those(moves) == MOVES
    assert those(sums) == SUMS
    assert those(is_affine) == AFFINE
    assert those(depends_on_data) == {"chosen"}


def test_scattering_that_adds_up_is_no_move() -> None:
    text = """
    agraph (float[4] x, float[2] z) => (float[4] y) <int64[2] places = {0, 2}>
    {
        put = ScatterElements <axis = 0> (x, places, z)
        same = ScatterElements <axis = 0, reduction = "none"> (x, places, z)
        y = ScatterElements <axis = 0, reduction = "add"> (x, places, z)
    }
    """
    graph = concrete(text, x=(4,), z=(2,))
    assert [moves(node, graph) for node in graph.index.nodes] == [True, True, False]
    assert not any(depends_on_data(node, graph) for node in graph.index.nodes)


# Sizes to look at -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("divisor", "sides"),
    [
        (32, [(64, 96), (96, 160)]),
        (64, [(128, 192), (192, 256)]),
        (128, [(256, 384)]),
        (224, [(224, 448), (448, 224)]),
        (28, [(224, 448), (448, 224)]),
        (8, [(64, 96), (96, 160)]),
    ],
)
def test_sizes_are_multiples_of_what_models_divide_by(divisor: int, sides: list[tuple[int, int]]) -> None:
    """Windows of so many rows and columns take multiples of them alone; where only one size fits, it is no proof."""
    text = f"""
    agraph (float[1, 3, height, width] x) => (float[] y)
    <int64[1] two = {{2}}, int64[1] three = {{3}}, int64[1] zero = {{0}}, int64[1] one = {{1}},
     int64[4] windows = {{0, 3, -1, {divisor}}}>
    {{
        row = Slice (x, zero, one, two)
        column = Slice (x, zero, one, three)
        rows = Reshape (row, windows)
        columns = Reshape (column, windows)
        y = Relu (x)
    }}
    """
    index = GraphIndex(parsed(text))
    if len(sides) < 2:
        with pytest.raises(Refused):
            probing_graphs(index)
    else:
        assert [each.sizes["x"] for each in probing_graphs(index)] == [(1, 3, *both) for both in sides]


def test_all_sizes_that_are_tried_tell_rows_from_columns_and_halve_often() -> None:
    for height, width in probing_sizes._SIDES:
        assert height != width
        assert all(side % 32 == 0 or side % 28 == 0 for side in (height, width))


def test_open_graphs_are_looked_at_in_two_sizes_of_unequal_sides() -> None:
    text = "agraph (float[batch, 3, height, width] x) => (float[] y) { y = Relu (x) }"
    assert [each.sizes for each in probing_graphs(GraphIndex(parsed(text)))] == [
        {"x": (2, 3, 64, 96)},
        {"x": (1, 3, 96, 160)},
    ]
    text = "agraph (float[batch, 3, 8, 9] x) => (float[] y) { y = Relu (x) }"
    assert [each.sizes["x"] for each in probing_graphs(GraphIndex(parsed(text)))] == [
        (2, 3, 8, 9),
        (1, 3, 8, 9),
    ]
    text = "agraph (float[2, 3, 8, 9] x) => (float[] y) { y = Relu (x) }"
    assert [each.sizes["x"] for each in probing_graphs(GraphIndex(parsed(text)))] == [(2, 3, 8, 9)]


def test_axes_of_one_name_have_one_size() -> None:
    text = (
        "agraph (float[n, side, side] x, float[n, 4, side] z) => (float[] y) { y = Relu (x)  w = Relu (z) }"
    )
    found = probing_graphs(GraphIndex(parsed(text)))
    assert [each.sizes for each in found] == [
        {"x": (2, 64, 64), "z": (2, 4, 64)},
        {"x": (1, 96, 96), "z": (1, 4, 96)},
    ]


def test_axes_without_a_name_have_sizes_of_their_own() -> None:
    text = "agraph (float[?, 3, ?, ?] x, float[?, 4] z) => (float[] y) { y = Relu (x)  w = Relu (z) }"
    assert [each.sizes for each in probing_graphs(GraphIndex(parsed(text)))] == [
        {"x": (2, 3, 64, 96), "z": (2, 4)},
        {"x": (1, 3, 96, 160), "z": (1, 4)},
    ]


def test_sequences_have_a_length_of_the_shorter_and_the_longer_side_in_turns() -> None:
    text = (
        "agraph (float[n, 3, length] x, float[n, other, 5] z) => (float[] y) { y = Relu (x)  w = Relu (z) }"
    )
    assert [each.sizes for each in probing_graphs(GraphIndex(parsed(text)))] == [
        {"x": (2, 3, 96), "z": (2, 64, 5)},
        {"x": (1, 3, 160), "z": (1, 96, 5)},
    ]


def test_sequences_of_an_open_length_are_long_enough_to_tell_rows_from_columns() -> None:
    text = """
    agraph (float[1, length, 4] x) => (float[] y)
    <int64[1] zero = {0}, int64[1] last = {10000}, int64[1] one = {1}, int64[1] step = {16}, float[4, 1] A>
    {
        some = Slice (x, zero, last, one, step)
        u = Transpose <perm = [0, 2, 1]> (some)
        narrow = Slice (u, zero, one, one)
        B = Unsqueeze (narrow, one)
        y = quartermap.SelectiveScan (u, u, A, B, B)
    }
    """
    lengths = [each.sizes["x"][1] for each in probing_graphs(GraphIndex(parsed(text)))]
    assert all(length // 16 >= 6 for length in lengths) and len(set(lengths)) == 2


def test_multiples_of_the_example_are_tried_last() -> None:
    # Only maps of a multiple of 729 positions can be folded so.
    text = """
    agraph (float[batch, 3, height, width] x) => (float[] y) <int64[4] folded = {0, 3, -1, 729}>
    {
        y = Reshape (x, folded)
    }
    """
    index = GraphIndex(parsed(text))
    found = probing_graphs(index, {"x": (1, 3, 27, 54)})
    assert [each.sizes["x"] for each in found] == [(1, 3, 27, 108), (2, 3, 54, 54)]
    with pytest.raises(Refused, match="it runs at 0, not at two"):
        probing_graphs(index)


# Forms and orders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "layout", "sides"),
    [
        ((2, 6, 3, 5), "NCHW", (3, 5)),
        ((2, 3, 5, 6), "NHWC", (3, 5)),
        ((2, 6, 15), "NCL", (15,)),
        ((2, 15, 6), "NLC", (15,)),
    ],
)
def test_forms_of_a_map(shape: tuple[int, ...], layout: str, sides: tuple[int, ...]) -> None:
    (form,) = MapForm.all_of(shape, 6)
    assert (form.layout, form.batch, form.channels, form.sides, form.positions) == (layout, 2, 6, sides, 15)
    flat = np.arange(2 * 6 * 15).reshape(2, 6, 15)
    held = form.write(flat)
    assert held.shape == shape
    place = {"N": 1, "C": 4, "H": 2, "W": 3, "L": 13}
    assert held[tuple(place[axis] for axis in layout)] == flat[1, 4, 2 * 5 + 3]
    assert np.array_equal(form.read(held), flat)


def test_a_shape_of_equal_sizes_may_be_either() -> None:
    assert [form.layout for form in MapForm.all_of((2, 6, 6, 6), 6)] == ["NCHW", "NHWC"]
    assert [form.layout for form in MapForm.all_of((2, 6, 6), 6)] == ["NCL", "NLC"]
    assert MapForm.all_of((2, 5, 5, 5), 6) == [] == MapForm.all_of((6,), 6)


SIZES = GroupSizes((2, 1), batch=2, d_inner=3, d_state=1, steps=4)


def test_directions_of_several_scans_stand_side_by_side() -> None:
    first, second = np.arange(48).reshape(2, 6, 4), 100 + np.arange(24).reshape(2, 3, 4)
    joined = SIZES.by_direction([first, second])
    assert SIZES.count == 3 and joined.shape == (2, 3, 3, 4)
    assert joined[1, 1, 2, 3] == first[1, 5, 3] and joined[1, 2, 2, 3] == second[1, 2, 3]
    for back, own in zip(SIZES.by_scan(joined), (first, second), strict=True):
        assert np.array_equal(back, own)


def entries(order: Sequence[int], positions: int = 5) -> Array:
    """Numbers (batch 2, 1 direction, 3 channels, steps) of positions in their own image and channel."""
    image, channel = np.arange(2)[:, None, None, None], np.arange(3)[:, None]
    found = (image * 3 + channel) * positions + np.array(order)
    return np.where(np.array(order) == OUTSIDE, -1, found)


def test_positions_are_told_from_numbers() -> None:
    sizes = GroupSizes((1,), 2, 3, 1, 4)
    good = entries([4, 0, OUTSIDE, 2])
    assert position_of(good, sizes, 5, "u").tolist() == [[4, 0, OUTSIDE, 2]]
    other = good.copy()
    other[0, 0, 1, 0] -= 1
    with pytest.raises(Refused, match="u takes other positions for some channels or images"):
        position_of(other, sizes, 5, "u")
    with pytest.raises(Refused, match="positions of another image of the batch"):
        position_of(good[::-1], sizes, 5, "u")
    with pytest.raises(Refused, match="values of another channel"):
        position_of(good[:, :, ::-1], sizes, 5, "u")


def unrolling(*order: Sequence[int], sides: tuple[int, int] = (2, 2)) -> Unrolling:
    return Unrolling("x", MapForm("NCHW", 1, 3, sides), *sides, np.array(order, np.int64))


def test_the_sides_of_a_sequence_are_told_by_columns_where_all_directions_have_names() -> None:
    row, column, back = (steps_of(name, 3, 5) for name in ("row", "column", "column_reverse"))
    shuffled = np.random.default_rng(3).permutation(15)
    assert _grid(np.stack([row, column]), 15) == (3, 5) == _grid(back[None], 15)
    assert _grid(row[None], 15) == (1, 15) == _grid(np.stack([column, shuffled]), 15)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ("u = Gather <axis = 2> (x, places)", "the order of its steps depends on the data"),
        ("u = Add (x, x)", "u is moved from u (2 × 8 × 6), which is no feature map of its channels"),
        ("u = Identity (x)", "u is moved from x (2 × 8 × 6), which is no feature map of its channels"),
        (
            "a, b = Split <axis = 2, num_outputs = 2> (z)  c, d = Split <axis = 2, num_outputs = 2> (x)"
            "  u = Concat <axis = 2> (d, b)",
            "u is put together from 2 values: x, z",
        ),
    ],
)
def test_what_stands_above_the_steps_instead_of_a_map_is_told(made: str, reason: str) -> None:
    text = f"""
    agraph (float[2, 8, 6] x, float[2, 8, 6] z, int64[6] places, float[2, 8, 6] delta, float[2, 2, 1, 6] B)
    => (float[] y) <float[8, 1] A = {{-1, -1, -1, -1, -1, -1, -1, -1}}>
    {{
        {made}
        y = quartermap.SelectiveScan (u, delta, A, B, B)
    }}
    """
    graph = concrete(text, x=(2, 8, 6), z=(2, 8, 6), places=(6,), delta=(2, 8, 6), B=(2, 2, 1, 6))
    with pytest.raises(Refused) as refusal:
        read_unrolling(ScanGroup(graph.index, tuple(graph.index.scans())), graph)
    assert str(refusal.value) == reason


def test_a_map_that_makes_u_alone_is_refused_by_what_else_is_read() -> None:
    text = """
    agraph (float[2, 8, 2, 3] x, float[2, 8, 6] delta, float[2, 1, 1, 6] B) => (float[] y)
    <float[8, 1] A = {-1, -1, -1, -1, -1, -1, -1, -1}, int64[3] flat = {0, 8, -1}>
    { u = Reshape (x, flat)  y = quartermap.SelectiveScan (u, delta, A, B, B) }
    """
    graph = concrete(text, x=(2, 8, 2, 3), delta=(2, 8, 6), B=(2, 1, 1, 6))
    with pytest.raises(
        Refused, match="delta is not made of x alone: it also reads delta, an input of the model"
    ):
        read_unrolling(ScanGroup(graph.index, tuple(graph.index.scans())), graph)


def test_a_scan_is_to_be_the_same_at_every_size_and_its_map_to_tell_its_sides() -> None:
    small, large = unrolling([0, 1, 2, 3]), unrolling([0, 1, 2, 3, 4, 5], sides=(2, 3))
    require_same(True, small, large)
    with pytest.raises(Refused, match="it scans a map of 2×3 otherwise than one of 2×2"):
        require_same(False, small, large)
    as_sequence = replace(small, form=MapForm("NCL", 1, 3, (4,)))
    require_same(True, as_sequence, small)
    with pytest.raises(Refused, match="the sides of the map are open, and x, which holds it as a sequence"):
        require_same(True, as_sequence, large)


def merge(*steps: Sequence[int], share: Sequence[float] = (1.0, 1.0)) -> Merge:
    return Merge("y", MapForm("NCHW", 1, 3, (2, 2)), np.array(steps, np.int64), np.array(share))


def test_a_merge_is_in_place_where_each_step_returns_to_its_position() -> None:
    read = unrolling([0, 1, 2, 3], [3, 0, 1, 2])
    assert read.directions == ("row", None)
    assert merge([0, 1, 2, 3], [1, 2, 3, 0]).is_in_place(read)
    assert not merge([0, 1, 2, 3], [3, 0, 1, 2]).is_in_place(read)
    assert not merge([0, 1, 2, OUTSIDE], [1, 2, 3, 0]).is_in_place(read)
    assert merge([0], [0]).is_even and not merge([0], [0], share=(1.0, 0.5)).is_even


def test_parts_of_a_map_are_given_back_where_only_they_get_anything() -> None:
    read = unrolling([2, 0], [1, 3])
    assert merge([1, OUTSIDE, 0, OUTSIDE], [OUTSIDE, 0, OUTSIDE, 1]).gives_back(read)
    assert not merge([0, OUTSIDE, 1, OUTSIDE], [OUTSIDE, 0, OUTSIDE, 1]).gives_back(read)
    assert not merge([1, 0, 0, OUTSIDE], [OUTSIDE, 0, OUTSIDE, 1]).gives_back(read)
    assert not merge([1, OUTSIDE, OUTSIDE, OUTSIDE], [OUTSIDE, 0, OUTSIDE, 1]).gives_back(read)


def test_which_directions_may_be_scanned_one_by_one() -> None:
    own = Reading(ScanGroup(None, ()))  # type: ignore[arg-type]
    unnamed, named = unrolling([3, 0, 1, 2], [0, 1, 2, 3]), unrolling([0, 1, 2, 3], [0, 2, 1, 3])
    rightly = {"unnamed": merge([1, 2, 3, 0], [0, 1, 2, 3]), "named": merge([0, 1, 2, 3], [0, 2, 1, 3])}
    assert apart._is_apart(replace(own, merge=rightly["unnamed"]), unnamed)
    # Summed in place in named directions, it is the scan of the whole map, or was refused for something else.
    assert not apart._is_apart(replace(own, merge=rightly["named"]), named)
    assert not apart._is_apart(replace(own, merge=rightly["named"]), unnamed)
    uneven = replace(rightly["unnamed"], share=np.array([1.0, 0.5]))
    assert not apart._is_apart(replace(own, merge=uneven), unnamed)
    # With a gate for each, whatever their order, but for snakes and sequences.
    assert apart._is_apart(replace(own, unsummed=True), named)
    assert not apart._is_apart(own, named)
    assert not apart._is_apart(replace(own, unsummed=True), unrolling([0, 1, 3, 2], [0, 1, 2, 3]))
    for sides in ((1, 4), (4, 1)):
        assert not apart._is_apart(replace(own, unsummed=True), unrolling([3, 0, 1, 2], sides=sides))


def test_narrow_directions_stay_together() -> None:
    part = MapPart((0, 0), (2, 2), "row")

    def pays(d_inner: int, d_state: int, *parts: MapPart | None) -> bool:
        try:
            apart._require_pays(GroupSizes((len(parts),), 1, d_inner, d_state, 9), parts)
        except Refused as refusal:
            assert f"with {d_inner} channels" in str(refusal)
            return False
        return True

    assert [pays(d_inner, 4, part, part) for d_inner in (95, 96)] == [False, True]
    assert [pays(d_inner, 1, part, part) for d_inner in (31, 32)] == [False, True]
    assert [pays(d_inner, 1, part, None) for d_inner in (127, 128)] == [False, True]
    assert pays(1, 4, part) and not pays(1, 4, None)


def test_snakes_go_along_whole_lines_from_both_ends() -> None:
    rows = [0, 1, 2, 5, 4, 3]
    assert apart._is_snake(np.array(rows), unrolling(rows, sides=(2, 3)))
    assert apart._is_snake(np.array([0, 3, 4, 1, 2, 5]), unrolling(rows, sides=(2, 3)))
    assert not apart._is_snake(steps_of("column", 2, 3), unrolling(rows, sides=(2, 3)))
    assert not apart._is_snake(np.array([0, 1, 4, 3, 2, 5]), unrolling(rows, sides=(2, 3)))


# Matrices ---------------------------------------------------------------------------------------------------------


def test_rows_that_make_all_rows_are_found_up_to_rounding() -> None:
    random = np.random.default_rng(0)
    made = random.standard_normal((9, 2)) @ random.standard_normal((2, 20))
    rows = _independent_rows(made, 4)
    assert rows is not None and len(rows) == 2
    assert rows[0] == np.linalg.norm(made, axis=1).argmax()
    assert np.linalg.matrix_rank(made[rows]) == 2
    found = _independent_rows(made + 1e-8 * random.standard_normal(made.shape), 2)
    assert found is not None and len(found) == 2
    assert _independent_rows(made + 1e-4 * random.standard_normal(made.shape), 4) is None
    assert _independent_rows(made, 1) is None
    nothing = _independent_rows(np.zeros((3, 4)), 1)
    assert nothing is not None and not len(nothing)


def projections(K: int = 2, R: int = 2, d: int = 4, N: int = 3) -> Projections:
    random = np.random.default_rng(1).standard_normal
    return Projections(
        random((K, R, d)),
        random((K, d, R)),
        random((K, d)),
        random((K, N, d)),
        random((K, N)),
        random((K, N, d)),
        random((K, N)),
    )


def test_projections_of_one_direction_are_its_own() -> None:
    both = projections()
    own = both.of(1)
    assert both.rank == own.rank == 2
    for name in ("dt", "dt_weight", "dt_offset", "B", "B_offset", "C", "C_offset"):
        assert np.array_equal(getattr(own, name), getattr(both, name)[1:])
    x = np.random.default_rng(2).standard_normal((1, 2, 4, 6))
    expected = both.dt_weight[1] @ (both.dt[1] @ x[0, 1]) + both.dt_offset[1][:, None]  # type: ignore[index]
    assert np.allclose(both.delta(x)[0, 1], expected) and np.allclose(own.delta(x[:, 1:])[0, 0], expected)
    full = Projections(
        np.ones((1, 4, 4)), None, np.zeros((1, 4)), both.B, both.B_offset, both.C, both.C_offset
    )
    assert full.rank is None and full.delta(x[:, :1])[0, 0, 0, 0] == pytest.approx(x[0, 0, :, 0].sum())


# What is written --------------------------------------------------------------------------------------------------


def written(writer: NodeWriter, source: str, x: Array, target: str) -> Array:
    graph = helper.make_graph(
        writer.nodes,
        "written",
        [helper.make_tensor_value_info(source, TensorProto.FLOAT, [None] * x.ndim)],
        [helper.make_tensor_value_info(target, TensorProto.FLOAT, None)],
        writer.initializers,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("quartermap", 1)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    return run(lower(onnx.shape_inference.infer_shapes(model)), {source: x})[target]


FORMS = [
    MapForm("NCHW", 2, 6, (3, 5)),
    MapForm("NHWC", 2, 6, (3, 5)),
    MapForm("NCL", 2, 6, (15,)),
    MapForm("NLC", 2, 6, (15,)),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.layout)
def test_a_map_of_any_form_is_brought_into_channels_first_and_back(form: MapForm) -> None:
    flat = floats(2, 6, 15)
    write = NodeWriter("block_1/scan")
    made = write.to_map("x", form, 3, 5)
    assert made == ("x" if form.layout == "NCHW" else "block_1/scan/map")
    if made != "x":
        assert np.array_equal(written(write, "x", form.write(flat), made), flat.reshape(2, 6, 3, 5))
        write = NodeWriter("block_1/scan")
        write.from_map("x", form, "y")
        assert np.array_equal(written(write, "x", flat.reshape(2, 6, 3, 5), "y"), form.write(flat))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_map_is_brought_into_the_order_of_a_direction(direction: str) -> None:
    x = floats(2, 6, 3, 5)
    write = NodeWriter("block_1/scan")
    assert write.sequence("x", direction, "y") == "y"
    expected = x.reshape(2, 6, 15)[:, :, steps_of(direction, 3, 5)]
    assert np.array_equal(written(write, "x", x, "y"), expected)


def test_a_part_of_a_map_is_sliced_out_of_it() -> None:
    x = floats(2, 6, 5, 8)
    write = NodeWriter("block_1/scan")
    assert write.part("x", MapPart((0, 0), (1, 1), "row")) == "x" and not write.nodes
    made = write.below("2").part("x", MapPart((1, 0), (2, 3), "row"))
    assert made.startswith("block_1/scan/2/")
    assert np.array_equal(written(write, "x", x, made), x[:, :, 1::2, ::3])


def test_what_is_written_is_named_after_the_scan_and_what_it_is() -> None:
    def names(writer: NodeWriter) -> tuple[list[tuple[str, str]], list[str]]:
        return (
            [(node.op_type, node.name.removeprefix("s/")) for node in writer.nodes],
            [item.name.removeprefix("s/") for item in writer.initializers],
        )

    def with_maps(form: MapForm) -> tuple[list[tuple[str, str]], list[str]]:
        write = NodeWriter("s")
        write.from_map(write.to_map("x", form, 3, 5), form, "y")
        return names(write)

    nchw, nhwc, ncl, nlc = FORMS
    assert with_maps(nhwc) == ([("Transpose", "map"), ("Transpose", "merged")], [])
    assert with_maps(ncl) == ([("Reshape", "map"), ("Reshape", "merged")], ["map_shape", "flat"])
    assert with_maps(nlc) == (
        [
            ("Transpose", "channels_first"),
            *(("Reshape", "map"), ("Transpose", "channels_last"), ("Reshape", "merged")),
        ],
        ["map_shape", "flat"],
    )
    write = NodeWriter("s")
    write.part("x", MapPart((1, 0), (2, 3), "row"))
    assert names(write) == ([("Slice", "part")], ["first", "end", "axes", "strides"])
    write = NodeWriter("s")
    assert write.sequence("x", "column_reverse") == "s/reversed"
    assert names(write) == (
        [("Transpose", "columns"), ("Reshape", "steps"), ("Slice", "reversed")],
        ["flat", "last", "before_first", "step_axis", "backwards"],
    )
    parameters = ScanParameters(-np.ones((12, 3)), np.zeros(12), np.zeros(12), True)
    directions = ("row", "column")
    made = write_map_scan(
        "s", ("x", nchw), ("y", nchw), (3, 5), projections(d=6), parameters, directions, share=0.5
    )
    assert [(node.op_type, node.name) for node in made.nodes] == [
        *(("Conv", "s/project"), ("Split", "s/split"), ("SelectiveScan2D", "s"), ("Mul", "s/shared"))
    ]
    assert [list(node.output) for node in made.nodes] == [
        *(["s/project"], ["s/dt", "s/B", "s/C"], ["s/scanned"], ["y"])
    ]
    assert [item.name.removeprefix("s/") for item in made.initializers] == [
        *("projection_weight", "projection_bias", "split_sizes", "A", "D", "dt_bias", "dt_weight", "share")
    ]
    assert {numpy_helper.to_array(item).dtype for item in made.initializers} == {
        np.dtype(np.float32),
        np.dtype(np.int64),
    }
    assert (made.targets, made.scans) == (("y",), ("s",))


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.layout)
def test_the_scan_that_is_written_is_the_same_in_every_form(form: MapForm, share: float) -> None:
    random = np.random.default_rng(3)
    parameters = ScanParameters(
        -np.exp(random.standard_normal((12, 3))), random.standard_normal(12), random.standard_normal(12), True
    )
    own = projections(K=2, R=2, d=6)
    flat = floats(2, 6, 15)

    def scanned(held: MapForm, times: float) -> Array:
        made = write_map_scan(
            "block_1/scan", ("x", held), ("y", held), (3, 5), own, parameters, ("row", "column"), times
        )
        assert made.targets == ("y",) and made.scans == ("block_1/scan",)
        write = NodeWriter("")
        write.nodes, write.initializers = list(made.nodes), list(made.initializers)
        return held.read(written(write, "x", held.write(flat), "y"))

    expected = share * scanned(FORMS[0], 1.0)
    assert np.abs(scanned(form, share) - expected).max() <= 1e-5 * np.abs(expected).max()


def replacing(text: str, target: str, **weights: Array) -> Replacement:
    """Nodes that make a value anew."""
    nodes = onnx.parser.parse_graph(f"agraph (float[n] x) => (float[n] {target}) {{ {text} }}").node
    tensors = tuple(numpy_helper.from_array(array, name) for name, array in weights.items())
    return Replacement(tuple(nodes), tensors, (target,), ())


def test_a_replacement_that_differs_anywhere_is_refused() -> None:
    text = """
    agraph (float[2, 50] x) => (float[] y) <float scale = {3}>
    { scaled = Mul (x, scale)  y = Relu (scaled)  nothing = Sub (y, y)  wild = Log (scaled) }
    """
    graph = concrete(text, x=(2, 50))
    three, near, far = (np.array(factor, np.float32) for factor in (3.0, 3 * (1 + 5e-6), 3 * (1 + 1e-3)))
    same = "own = Mul (x, factor)  y = Relu (own)"
    check_replacement(graph, "x", replacing(same, "y", factor=three), 0)
    check_replacement(graph, "x", replacing(same, "y", factor=near), 0)
    # It may also read what the graph makes of the map already.
    check_replacement(graph, "x", replacing("y = Relu (scaled)", "y"), 0)
    with pytest.raises(Refused, match=r"would make y differ from what it is now by 1\.0e-03 of its largest"):
        check_replacement(graph, "x", replacing(same, "y", factor=far), 0)
    # Right at half the places, and at all but one.
    with pytest.raises(Refused, match="would make y differ"):
        check_replacement(graph, "x", replacing("y = Mul (x, factor)", "y", factor=three), 0)
    most = np.full((2, 50), 3, np.float32)
    most[np.unravel_index(np.random.default_rng(7).standard_normal((2, 50)).argmax(), most.shape)] = 3.1
    with pytest.raises(Refused, match="would make y differ"):
        check_replacement(graph, "x", replacing(same, "y", factor=most), 7)
    with pytest.raises(Refused, match=r"y would become \(50, 2\) instead of \(2, 50\)"):
        turned = f"{same.replace('y =', 'z =')}  y = Transpose <perm = [1, 0]> (z)"
        check_replacement(graph, "x", replacing(turned, "y", factor=three), 0)
    for value, made in (("wild", "wild = Log (scaled)"), ("nothing", "nothing = Relu (scaled)")):
        with np.errstate(all="ignore"), pytest.raises(Refused, match=f"would make {value} differ"):
            check_replacement(graph, "x", replacing(made, value), 0)


def test_each_direction_takes_its_own_parameters() -> None:
    A, D, bias = np.arange(12).reshape(6, 2), np.arange(6), 10 + np.arange(6)
    own = ScanParameters(A, D, bias, True).of(1, 3)
    assert (
        own.A.tolist() == [[4, 5], [6, 7]] and own.D.tolist() == [2, 3] and own.dt_bias.tolist() == [12, 13]
    )
    assert own.softplus


def test_offsets_that_are_rounding_are_no_bias() -> None:
    parameters = ScanParameters(-np.ones((12, 3)), np.zeros(12), np.zeros(12), False)
    for size, inputs in ((0.0, 2), (1e-12, 2), (1e-3, 3)):
        own = projections(K=2, R=2, d=6)
        own = Projections(
            own.dt,
            own.dt_weight,
            own.dt_offset,
            own.B,
            np.full_like(own.B_offset, size),
            own.C,
            np.full_like(own.C_offset, size),
        )
        write = NodeWriter("s")
        write.scan("s", "x", own, parameters, ("row", "column"))
        (conv,) = (node for node in write.nodes if node.op_type == "Conv")
        assert len(conv.input) == inputs
        scan = write.nodes[-1]
        assert helper.get_node_attr_value(scan, "softplus") == 0
        (found,) = (numpy_helper.to_array(item) for item in write.initializers if item.name == "s/dt_bias")
        assert np.allclose(found, own.dt_offset.ravel())


def test_scans_that_are_read_together_agree_on_their_softplus() -> None:
    text = """
    agraph (float[1, 2, 3] u, float[1, 1, 1, 3] B) => (float[] y) <float[2, 1] A = {-1, -1}, float[2] D = {1, 1}>
    {
        a = quartermap.SelectiveScan <delta_softplus = 1> (u, u, A, B, B, D)
        b = quartermap.SelectiveScan <delta_softplus = 0> (u, u, A, B, B)
        c = quartermap.SelectiveScan (u, u, A, B, B)
    }
    """
    index = GraphIndex(parsed(text))
    assert index.scans() == [0, 1, 2] and not ScanGroup(index, (2,)).softplus
    assert ScanGroup(index, (0,)).softplus and not ScanGroup(index, (1,)).softplus
    both = ScanGroup(index, (0, 1))
    with pytest.raises(Refused, match="one direction has a softplus"):
        _ = both.softplus
    assert both.inputs("D") == ["D", ""] and both.outputs == ["a", "b"]
    sizes = GroupSizes.of(both, Concrete(index, {"u": (1, 2, 3), "B": (1, 1, 1, 3)}))
    assert (sizes.directions, sizes.batch, sizes.d_inner, sizes.d_state, sizes.steps) == ((1, 1), 1, 2, 1, 3)


def test_scans_of_other_sizes_are_not_read_together() -> None:
    text = """
    agraph (float[1, 2, 3] u, float[1, 2, 4] v, float[1, 1, 1, 3] B, float[1, 1, 1, 4] C) => (float[] y)
    <float[2, 1] A = {-1, -1}>
    {
        a = quartermap.SelectiveScan (u, u, A, B, B)
        y = quartermap.SelectiveScan (v, v, A, C, C)
    }
    """
    sizes = {"u": (1, 2, 3), "v": (1, 2, 4), "B": (1, 1, 1, 3), "C": (1, 1, 1, 4)}
    index = GraphIndex(parsed(text))
    assert GroupSizes.of(ScanGroup(index, (1,)), Concrete(index, sizes)).steps == 4
    with pytest.raises(Refused, match="its directions differ in channels, state size or length"):
        GroupSizes.of(ScanGroup(index, (0, 1)), Concrete(index, sizes))
