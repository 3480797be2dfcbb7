"""What the operators are called, and every variant of every body once, on one small case whose sizes all differ.

The names are a contract: models that were written have them, and so have the kernels in `plugins/`.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
import torch
from helpers import Array, error, run, scan_case, scan_feeds, scan_model
from test_sequence_body import arguments, scan
from test_tree_body import tree_model

from quartermap_deploy.errors import PassError
from quartermap_deploy.lowering import operator
from quartermap_deploy.lowering.operator import Direction, ScanVariant, SequenceVariant
from quartermap_deploy.lowering.scan_body import scan_body
from quartermap_deploy.lowering.sequence_body import sequence_body
from quartermap_deploy.lowering.sequence_tree_body import SequenceTreeVariant, sequence_tree_body
from quartermap_deploy.lowering.tree_body import TreeVariant, tree_body
from quartermap_deploy.lowering.tree_scan import LONG, OPEN_LENGTH, _scanned, lines
from quartermap_deploy.lowering.writer import OPSET, Writer, ints, scalar, scan_function, shape_of
from quartermap_deploy.scan.definition import selective_scan_definition

TOLERANCE = 1e-6
BATCH, CHANNELS, HEIGHT, WIDTH = 2, 3, 5, 7


# Names ------------------------------------------------------------------------------------------------------------


def test_the_operators_have_the_names_that_models_have() -> None:
    assert (operator.DOMAIN, operator.VERSION) == ("quartermap", 1)
    assert operator.SCANS == ("SelectiveScan2D", "SelectiveScan")
    assert operator.SCANS == (operator.SELECTIVE_SCAN_2D, operator.SELECTIVE_SCAN)
    assert operator.INPUTS_2D == ("x", "dt", "B", "C", "A", "D", "dt_bias", "dt_weight")
    assert operator.INPUTS_2D[operator.MAPS] == ("x", "dt", "B", "C")
    assert operator.INPUTS_1D == ("u", "delta", "A", "B", "C", "D", "delta_bias")
    assert operator.ATTRIBUTES_2D == ("directions", "softplus", "order")
    assert operator.ATTRIBUTES_1D == ("delta_softplus",)
    assert operator.DIRECTIONS == ("row", "column", "row_reverse", "column_reverse")
    assert operator.ORIENTATIONS == ("row", "column")


@pytest.mark.parametrize("low_rank", [False, True])
def test_functions_have_the_operators_inputs_and_attributes(low_rank: bool) -> None:
    wide = ScanVariant(operator.DIRECTIONS, True, 2, low_rank)
    flat = SequenceVariant(True, True, True)
    inputs = operator.INPUTS_2D if low_rank else operator.INPUTS_2D[:7]
    for function in (scan_body(wide, "own"), tree_body(wide, "own")):
        assert (function.domain, function.name, function.overload) == ("quartermap", "SelectiveScan2D", "own")
        assert (tuple(function.input), tuple(function.attribute)) == (inputs, operator.ATTRIBUTES_2D)
        assert [(item.domain, item.version) for item in function.opset_import] == [("", 20)]
    for function in (sequence_body(flat, "own"), sequence_tree_body(flat, "own")):
        assert (function.domain, function.name, function.overload) == ("quartermap", "SelectiveScan", "own")
        assert (tuple(function.input), tuple(function.attribute)) == (
            operator.INPUTS_1D,
            operator.ATTRIBUTES_1D,
        )
    assert scan_body(wide).overload == tree_body(wide).overload == ""
    assert sequence_body(flat).overload == sequence_tree_body(flat).overload == ""


def test_directions_are_read_from_their_names() -> None:
    assert [Direction.parse(name) for name in operator.DIRECTIONS] == [
        Direction("row", False),
        Direction("column", False),
        Direction("row", True),
        Direction("column", True),
    ]
    for name in ("", "rows", "reverse", "row_reverse_reverse", "diagonal_reverse"):
        with pytest.raises(PassError, match=f"unknown scan direction '{name}'; expected row, column, "):
            Direction.parse(name)
    assert operator.direction_names({"directions": [b"row", "column"]}) == ("row", "column")


def test_variants_are_read_from_nodes() -> None:
    directions = {"directions": [b"row", b"column_reverse"]}
    seven, names = ["v"] * 7, ("row", "column_reverse")
    assert ScanVariant.of(seven, directions, 4) == ScanVariant(names, True, 4, False)
    assert ScanVariant.of([*seven, "w"], {**directions, "softplus": 0}, 1) == ScanVariant(
        names, False, 1, True
    )
    for inputs, skip, bias in (
        (["u", "delta", "A", "B", "C"], False, False),
        (["u", "delta", "A", "B", "C", "D"], True, False),
        (["u", "delta", "A", "B", "C", "D", "bias"], True, True),
        (["u", "delta", "A", "B", "C", "", "bias"], False, True),
    ):
        assert SequenceVariant.of(inputs, {}, 4) == SequenceVariant(False, skip, bias)
        assert SequenceVariant.of(inputs, {"delta_softplus": 1}, 4) == SequenceVariant(True, skip, bias)


# Maps -------------------------------------------------------------------------------------------------------------

VARIANTS = list(itertools.product([1, 2], [None, 4], [False, True]))


def departures(y: Array, expected: torch.Tensor) -> float:
    assert y.dtype == np.float32 and y.shape == (BATCH, CHANNELS, HEIGHT, WIDTH)
    return error(y, expected)


@pytest.mark.parametrize(("d_state", "rank", "softplus"), VARIANTS)
def test_maps(d_state: int, rank: int | None, softplus: bool) -> None:
    case = scan_case(BATCH, CHANNELS, HEIGHT, WIDTH, d_state=d_state, rank=rank, softplus=softplus)
    expected, feeds = case.expected(torch.float32), scan_feeds(case)
    models = [scan_model([case.variant]), tree_model(case, (HEIGHT, WIDTH)), tree_model(case, None)]
    del models[2].functions[:]
    models[2].functions.append(tree_body(TreeVariant(**vars(case.variant), longest=HEIGHT * WIDTH)))
    for model in models:
        onnx.checker.check_model(model, full_check=True)
        assert not departures(run(model, feeds)["0/y"], expected) > TOLERANCE
    for direction in ("row", "column", "row_reverse", "column_reverse"):
        alone = scan_case(
            BATCH, CHANNELS, HEIGHT, WIDTH, d_state, rank, directions=(direction,), softplus=softplus
        )
        y = run(scan_model([alone.variant]), scan_feeds(alone))["0/y"]
        assert not departures(y, alone.expected(torch.float32)) > TOLERANCE


@pytest.mark.parametrize("d_state", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(20, 29), (1, 579)])
def test_maps_that_are_cut_into_lines(height: int, width: int, d_state: int) -> None:
    """580 positions are 29 lines of 20; 579 are 24 of 25, the last of which lacks 21."""
    assert lines(580) == (29, 20) and lines(579) == (24, 25)
    case = scan_case(2, 3, height, width, d_state=d_state, directions=("row", "column_reverse"))
    found = run(tree_model(case, (height, width)), scan_feeds(case))["0/y"]
    assert not error(found, case.expected(torch.float32)) > TOLERANCE


# Sequences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d_state", [1, 2])
@pytest.mark.parametrize(("skip", "bias"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("softplus", [False, True])
def test_sequences(d_state: int, skip: bool, bias: bool, softplus: bool) -> None:
    exact = arguments(2, 3, 4, 5, d_state, (0.01, 1.0), 0)
    if not softplus:
        exact[1], exact[6] = exact[1].exp(), exact[6].abs()
    given = [*exact[:5], exact[5] if skip else None, exact[6] if bias else None]
    rounded = [None if tensor is None else tensor.float().double() for tensor in given]
    expected = selective_scan_definition(*rounded, delta_softplus=softplus)  # type: ignore[arg-type]
    for body, sized in (("scan", False), ("tree", False), ("tree", True)):
        y = scan(given, softplus, body, sized)
        assert y.dtype == np.float32 and y.shape == (2, 12, 5)
        assert not error(y, expected) > TOLERANCE


# The tree's shape -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "count", "size"),
    [
        *((1, 1, 1), (2, 1, 2), (255, 1, 255), (256, 1, 256)),
        *((257, 16, 17), (258, 16, 17), (288, 18, 16), (289, 17, 17), (290, 29, 10), (300, 20, 15)),
        *((784, 28, 28), (1000, 40, 25), (3136, 56, 56), (4096, 64, 64), (65536, 256, 256)),
        # 8 divides it, and would make lines that are too short.
        (8 * 41, 18, 19),
    ],
)
def test_long_sequences_are_cut_evenly_where_a_divisor_is_near(length: int, count: int, size: int) -> None:
    assert lines(length) == (count, size)


def test_the_limits_are_those_that_are_told() -> None:
    assert (LONG, OPEN_LENGTH) == (256, 65_536)
    variant = ScanVariant(("row",), True, 1, True)
    assert TreeVariant(**vars(variant)).longest == OPEN_LENGTH
    assert SequenceTreeVariant(True, True, True).longest == OPEN_LENGTH


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 16, 17])
@pytest.mark.parametrize("sums", [False, True])
def test_steps_are_as_few_as_can_be(length: int, sums: bool) -> None:
    """One for each doubling; exponents are joined only where somebody needs them."""
    write = Writer()
    _scanned(write, "exponent", "drive", 2, length, **({"sums": True} if sums else {}))
    counts = {op: sum(node.op_type == op for node in write.nodes) for op in ("Exp", "Concat", "Mul")}
    steps = math.ceil(math.log2(length))
    joined = steps if sums else max(steps - 1, 0)
    assert counts == {"Exp": steps, "Concat": steps + joined, "Mul": steps}


# Writing nodes ----------------------------------------------------------------------------------------------------


def test_names_are_new_and_constants_are_shared() -> None:
    write = Writer("own_")
    first = write("Add", "x", scalar(1.0))
    second = write("Mul", first, scalar(1.0))
    one, two = write.multiple("Split", [second, ints(1, 1)], 2, axis=0)
    third = write("Add", one, np.array(1.0))
    fourth = write("Add", two, np.array([1.0], np.float32))
    names = [name for node in write.nodes for name in node.output]
    assert len(set(names)) == len(names) and all(name.startswith("own_") for name in names)
    assert [node.op_type for node in write.nodes].count("Constant") == 4, "1.0 twice as float32 is one"
    assert (first, second) == ("own_add_2", "own_mul_3") and third != fourth
    assert [list(node.output) for node in write.nodes if node.op_type == "Split"] == [[one, two]]
    split = next(node for node in write.nodes if node.op_type == "Split")
    assert [(item.name, item.i) for item in split.attribute] == [("axis", 0)]
    assert Writer().fresh("value") == "value_1"


def test_constants_have_the_types_of_onnx() -> None:
    assert ints(1, -2).dtype == ints().dtype == np.int64 and ints(1, -2).tolist() == [1, -2]
    assert scalar(0.1).dtype == np.float32 and scalar(0.1).shape == () and scalar(0.5) == 0.5
    write = Writer()
    np.testing.assert_array_equal(shape_of(write, 0, -1, 3), [0, -1, 3])  # type: ignore[arg-type]
    assert write.nodes == []
    name = shape_of(write, 0, "size", -1)
    (zero, least, joined) = write.nodes
    assert (zero.op_type, least.op_type, joined.op_type) == ("Constant", "Constant", "Concat")
    assert list(joined.input) == [zero.output[0], "size", least.output[0]]
    assert list(joined.output) == [name] and joined.attribute[0].i == 0


def test_subgraphs_and_functions_hold_what_was_written() -> None:
    write = Writer()
    result = write("Abs", "x")
    graph = write.subgraph("body", ["x"], [result])
    assert (graph.name, [item.name for item in graph.input]) == ("body", ["x"])
    assert [item.name for item in graph.output] == [result] and list(graph.node) == write.nodes
    kinds = {item.type.tensor_type.elem_type for item in (*graph.input, *graph.output)}
    assert kinds == {onnx.TensorProto.FLOAT} and not graph.input[0].type.tensor_type.HasField("shape")
    function = scan_function(write, "SelectiveScan", ["x"], result, ["delta_softplus"], "own")
    assert OPSET == 20 and [(item.domain, item.version) for item in function.opset_import] == [("", 20)]
    assert (function.name, list(function.input), list(function.output)) == ("SelectiveScan", ["x"], [result])
    assert (list(function.attribute), function.overload) == (["delta_softplus"], "own")


# Few nodes --------------------------------------------------------------------------------------------------------


def nodes(function: onnx.FunctionProto) -> dict[str, int]:
    return dict(Counter(node.op_type for node in function.node))


def trees() -> Iterator[onnx.FunctionProto]:
    for directions, d_state, low_rank in itertools.product(
        (("row",), operator.DIRECTIONS), (1, 2), (False, True)
    ):
        variant = ScanVariant(directions, True, d_state, low_rank)
        yield tree_body(variant)
        for size in ((1, 1), (5, 7), (20, 29), (1, 579)):
            yield tree_body(TreeVariant(**vars(variant), size=size))
    for length in (1, 35, 580, 579):
        yield sequence_tree_body(SequenceTreeVariant(True, True, True, length))


def test_no_node_joins_or_splits_one_value() -> None:
    """A GPU compiler may make a kernel of it."""
    for function in trees():
        for node in function.node:
            assert node.op_type != "Concat" or len(node.input) > 1
            assert node.op_type != "Split" or len(node.output) > 1
    for low_rank in (False, True):
        function = scan_body(ScanVariant(("row",), True, 1, low_rank))
        assert all(len(node.output) > 1 for node in function.node if node.op_type == "Split")


def test_a_map_of_one_state_takes_three_scans_and_one_of_several_one() -> None:
    for low_rank in (False, True):
        for d_state, count in ((1, 3), (2, 1), (16, 1)):
            variant = ScanVariant(operator.DIRECTIONS, True, d_state, low_rank)
            assert nodes(scan_body(variant))["Scan"] == count
    assert nodes(sequence_body(SequenceVariant(True, True, True)))["Scan"] == 1


@pytest.mark.parametrize(("size", "steps"), [((1, 1), 0), ((5, 7), 6), ((16, 16), 8), ((20, 29), 11)])
def test_a_tree_has_a_step_for_each_doubling(size: tuple[int, int], steps: int) -> None:
    """Of 20 x 29 there are 29 lines of 20: five steps each, and one to take up the state before a line."""
    for d_state in (1, 2):
        variant = ScanVariant(operator.DIRECTIONS, False, d_state, True)
        found = nodes(tree_body(TreeVariant(**vars(variant), size=size)))
        assert found.get("Exp", 0) == steps
        # One of D, and one of the states where there are several.
        assert found["ReduceSum"] == d_state
