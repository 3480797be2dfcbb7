"""What the graph passes are made of: the questions that they ask of nodes and shapes, each on a few nodes."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from helpers import run
from onnx import helper

from quartermap_deploy.errors import PassError
from quartermap_deploy.lowering.element_types import element_type
from quartermap_deploy.lowering.tree_body import TreeVariant
from quartermap_deploy.passes import flattened_maps, hoist_slice, lower, prunable, run_passes
from quartermap_deploy.passes.base import (
    GraphWriter,
    Selection,
    constant_of,
    only_consumer,
    place_of,
    producer,
    scans,
    selected_scans,
    sizes,
    varies_over_channels_only,
)
from quartermap_deploy.passes.block_parts import block_parts
from quartermap_deploy.passes.cast_precision import cast_precision
from quartermap_deploy.passes.inline_scans import inline_scans
from quartermap_deploy.passes.lower import _sides, _Sizes
from quartermap_deploy.passes.precision.operator_types import typed_inputs
from quartermap_deploy.passes.precision.weight_range import unfit
from quartermap_deploy.passes.sequence_pruning import kept_steps
from quartermap_deploy.passes.shapes import infer_shapes, infer_shapes_at
from quartermap_deploy.passes.subsampling import (
    _resize_is_exact,
    is_keep,
    is_pruned,
    pruned_prefix,
    restore_chain,
    restored_like,
    scanned_name,
    strided_slice,
    write_keep,
    write_restore,
)
from quartermap_deploy.pruning.orders import OUTSIDE, ScanOrder
from quartermap_deploy.pruning.plan import Subsample

sink = importlib.import_module("quartermap_deploy.passes.sink_resize")
"""The module: the package has the function of its name."""
hoist_slice_module = importlib.import_module("quartermap_deploy.passes.hoist_slice")
"""The module, likewise."""

HEADER = '<ir_version: 10, opset_import: ["" : 20, "quartermap" : 1]>\n'


def parsed(text: str) -> onnx.ModelProto:
    return infer_shapes(onnx.parser.parse_model(HEADER + text))


def graph_of(text: str) -> gs.Graph:
    return gs.import_onnx(parsed(text))


def nodes_of(text: str) -> dict[str, gs.Node]:
    """Nodes by the name of their first output."""
    return {node.outputs[0].name: node for node in graph_of(text).nodes}


def value(*shape: int | str | None, name: str = "v") -> gs.Variable:
    return gs.Variable(name, dtype=np.float32, shape=list(shape))


# Graph queries ----------------------------------------------------------------------------------------------------

QUERIES = """
agraph (float[2, 3, 4, 5] x) => (float[] y, float[] kept)
<float[1] one = {1}>
{
    a = Relu (x)
    squared = Mul (a, a)
    b = Relu (squared)
    kept = Relu (b)
    c = Relu (kept)
    fixed = Constant <value = float[1] {7}> ()
    y = Add (c, fixed)
    other = Relu (c)
}
"""


def test_who_makes_and_who_alone_reads_a_value() -> None:
    graph = graph_of(QUERIES)
    values = graph.tensors()
    assert producer(values["a"]) is values["a"].inputs[0] and producer(values["x"]) is None
    alone = {name: only_consumer(graph, values[name]) for name in ("a", "squared", "b", "kept", "c", "y")}
    # A value that is read twice by one node, or by two, or is an output has no such reader.
    assert {name: None if node is None else node.outputs[0].name for name, node in alone.items()} == {
        "a": None,
        "squared": "b",
        "b": "kept",
        "kept": None,
        "c": None,
        "y": None,
    }
    assert constant_of(values["a"]) is None and constant_of(values["x"]) is None
    assert [place_of(graph, node) for node in graph.nodes] == list(range(len(graph.nodes)))


def test_constants_are_weights_and_constant_nodes() -> None:
    node = gs.Node(
        "Constant", attrs={"value": gs.Constant("v", np.array([7.0]))}, outputs=[gs.Variable("made")]
    )
    found = constant_of(node.outputs[0])
    assert found is not None and found.tolist() == [7.0]
    found = constant_of(gs.Constant("w", np.array([1.0, 2.0])))
    assert found is not None and found.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("shape", "first", "last"),
    [
        ((), True, True),
        ((6,), False, True),
        ((6, 1, 1), True, False),
        ((1, 6, 1, 1), True, False),
        ((1, 1, 1, 6), False, True),
        ((1, 6, 1, 2), False, False),
        ((2, 6, 1, 1), False, False),
        ((1, 1, 1, 1, 1), False, False),
    ],
)
def test_constants_that_vary_over_channels_only(shape: tuple[int, ...], first: bool, last: bool) -> None:
    constant = gs.Constant("c", np.zeros(shape, np.float32))
    assert varies_over_channels_only(constant, 1) is first
    assert varies_over_channels_only(constant, 3) is last
    assert not varies_over_channels_only(value(1), 1)


def test_open_sizes_are_none_and_unknown_ones_an_error() -> None:
    assert sizes(value("batch", 3, None, 5)) == (None, 3, None, 5)
    with pytest.raises(PassError, match="the shape of v is unknown"):
        sizes(gs.Variable("v"))


SCANS = """
agraph (float[2, 3, 4, 5] x, float[2, 4, 4, 5] n) => (float[] y)
<float[12, 1] A, float[12] D, float[12] bias>
{
    a = quartermap.SelectiveScan2D (x, x, n, n, A, D, bias)
    b = quartermap.SelectiveScan2D (a, x, n, n, A, D, bias)
    c = quartermap.SelectiveScan2D (b, x, n, n, A, D, bias)
    d = quartermap.Other (c)
    e = quartermap.SelectiveScan2D (d, x, n, n, A, D, bias)
    y = Relu (e)
}
"""


def test_scans_are_found_by_operator_and_name_and_come_block_by_block() -> None:
    model = onnx.parser.parse_model(HEADER + SCANS)
    names = ("block_1/scan", "block_2/scan_2", "block_1/scan_2", "block_1/scan_3", "head", "block_1/scan_4")
    for node, name in zip(model.graph.node, names, strict=True):
        node.name = name
    graph = gs.import_onnx(model)
    assert [(scan.block, scan.name, scan.of_map) for scan in scans(graph)] == [
        (1, "block_1/scan", True),
        (2, "block_2/scan_2", True),
        (1, "block_1/scan_2", True),
    ]
    wanted = Selection((2, 1), Subsample(), paths={3: "layers.2"})
    assert [scan.name for scan in selected_scans(graph, wanted, "p")] == [
        "block_2/scan_2",
        "block_1/scan",
        "block_1/scan_2",
    ]
    assert (wanted.named(1), wanted.named(3)) == ("block 1", "block 3 (layers.2)")
    with pytest.raises(PassError, match=r"p: the plan names block 4, but the graph has scans of 2 blocks"):
        list(selected_scans(graph, Selection((1, 4), Subsample()), "p"))


def test_nodes_are_written_one_behind_the_other_at_their_place() -> None:
    graph = graph_of(QUERIES)
    write = GraphWriter(graph, "p", np.dtype(np.float32), 2)
    first = write("Relu", "first", [graph.tensors()["x"]])
    parts = write.several("Split", "parts", [first], 2, axis=0, num_outputs=2)
    last = write("Shape", "last", [parts[1]], dtype=np.dtype(np.int64), start=1)
    assert [node.name for node in graph.nodes[2:5]] == ["p/first", "p/parts", "p/last"]
    assert [item.name for item in parts] == ["p/parts_0", "p/parts_1"]
    assert (first.dtype, parts[0].dtype, last.dtype) == (np.float32, np.float32, np.int64)
    assert graph.nodes[4].attrs == {"start": 1} and graph.nodes[3].attrs == {"axis": 0, "num_outputs": 2}
    assert write.constant("c", np.zeros(2)).name == "p/c"


# Keeping and restoring --------------------------------------------------------------------------------------------


def scan_of_block(output: str = "scanned") -> Any:
    node = gs.Node("SelectiveScan2D", name="block_3/scan", domain="quartermap", outputs=[gs.Variable(output)])
    (scan,) = scans(gs.Graph(nodes=[node]))
    return scan


def test_the_name_of_a_pruned_scan_tells_its_plan() -> None:
    plan = Subsample(3, 2)
    scan = scan_of_block()
    assert pruned_prefix(scan) == "block_3/quartermap"
    assert scanned_name(scan, plan) == "block_3/quartermap/scanned_nearest_2_of_3"
    assert not is_pruned(scan, plan, "p")
    done = scan_of_block("block_3/quartermap/scanned_nearest_2_of_3")
    assert is_pruned(done, plan, "p")
    with pytest.raises(
        PassError, match=r"block 3 .* another plan already \(nearest_2_of_3\), expected nearest_1_of_3"
    ):
        is_pruned(done, Subsample(3), "p")


@pytest.mark.parametrize("subsample", [Subsample(2), Subsample(3), Subsample(3, 2), Subsample(5, 2)])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_what_is_written_is_found_again(subsample: Subsample, known: bool, mode: Any) -> None:
    subsample = Subsample(subsample.stride, subsample.keep, mode)
    sides: list[int | str] = [94, 7] if known else ["h", "w"]
    x = gs.Variable("x", np.float32, ["n", 2, *sides])
    graph = gs.Graph(inputs=[x], opset=20, ir_version=10)
    write = GraphWriter(graph, "p", np.dtype(np.float32), 0)
    kept = write_keep(write, x, subsample)
    made = producer(kept)
    assert is_keep(made) and not is_keep(producer(x))
    assert strided_slice(made) == (subsample.stride if subsample.keep == 1 else None)
    assert strided_slice(None) is None
    between = write("Relu", "between", [kept])
    assert not is_keep(producer(between)) and strided_slice(producer(between)) is None
    restored = write_restore(write, between, x, subsample)
    chain = restore_chain(between)
    assert chain and chain[-1].outputs[0] is restored and restore_chain(x) == []
    assert restored_like(chain) is (restored if known else x)
    graph.outputs = [restored]
    images = np.random.default_rng(0).standard_normal((2, 2, 94, 7)).astype(np.float32)
    found = run(infer_shapes(gs.export_onnx(graph)), {"x": images})[restored.name]
    rows, columns = (list(subsample.kept_indices(size)) for size in (94, 7))
    small = np.maximum(images, 0)[:, :, rows][:, :, :, columns]
    assert found.shape == images.shape
    if mode == "nearest":
        up = [np.arange(size) * len(kept_) // size for size, kept_ in ((94, rows), (7, columns))]
        assert np.array_equal(found, small[:, :, up[0]][:, :, :, up[1]])


def test_sizes_at_which_a_resize_is_exact() -> None:
    assert all(_resize_is_exact(size, Subsample()) for size in (1, 7, 8, 94, None))
    assert _resize_is_exact(9, Subsample(3)) and not _resize_is_exact(94, Subsample(3))
    # Where the size is open, nothing is known but of every second position.
    assert not _resize_is_exact(None, Subsample(3)) and not _resize_is_exact(None, Subsample(3, 2))


def test_steps_outside_of_a_map_all_stay_and_stand_for_themselves() -> None:
    order = ScanOrder(2, 3, np.array([[OUTSIDE, 0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0, OUTSIDE]]), merged=True)
    kept, source = kept_steps(order, Subsample(2))
    # Of 2 × 3 positions row 0 and the columns 0 and 2 stay.
    assert kept.tolist() == [[0, 1, 3], [3, 5, 6]]
    assert source.tolist() == [[0, 1, 1, 2, 1, 1, 2], [0, 1, 1, 0, 1, 1, 2]]
    assert kept.dtype == source.dtype == np.int64


def test_a_block_that_a_pass_refuses_does_not_end_it() -> None:
    """A one-dimensional scan before a map."""
    subsample = Subsample(2)
    u, x = value(2, 4, 15, name="u"), value(2, 4, 6, 8, name="x")
    graph = gs.Graph(inputs=[u, x], opset=20)
    weight = gs.Constant("w", np.ones((4, 1, 3, 3), np.float32))
    convolved, small, scanned = (gs.Variable(name, np.float32) for name in ("c", "s", "m"))
    convolved.shape = [2, 4, 6, 8]
    graph.nodes += [
        gs.Node("SelectiveScan", "block_1/scan", domain="quartermap", inputs=[u], outputs=[small]),
        gs.Node("Conv", "conv", {"pads": [1, 1, 1, 1], "group": 4}, [x, weight], [convolved]),
    ]
    kept = write_keep(GraphWriter(graph, "block_2/quartermap", x.dtype, 2), convolved, subsample)
    graph.nodes.append(
        gs.Node("SelectiveScan2D", "block_2/scan", domain="quartermap", inputs=[kept], outputs=[scanned])
    )
    for scan in scans(graph):
        scan.node.outputs[0].name = scanned_name(scan, subsample)
    write = GraphWriter(graph, "block_2/quartermap", x.dtype, len(graph.nodes))
    restored = write_restore(write, scanned, convolved, subsample)
    restored.shape = convolved.shape
    graph.nodes.append(gs.Node("Sigmoid", "act", inputs=[restored], outputs=[gs.Variable("y", np.float32)]))
    graph.outputs = [small, graph.nodes[-1].outputs[0]]
    selection = Selection((1, 2), subsample)
    for graph_pass, words in (
        (sink.sink_resize, "restored after Sigmoid"),
        (hoist_slice, "conv now has stride 2"),
    ):
        report = graph_pass(graph, selection)
        assert report.changed == [f"block 2: {words}"] and list(report.refused) == [1]
        assert "its scan is one-dimensional" in report.refused[1]


# Whether images meet ----------------------------------------------------------------------------------------------


def test_axes_along_which_values_are_joined() -> None:
    roles = ("N", "C", "S", "S")

    def joined(axis: int) -> tuple[str, ...]:
        return prunable._joined(gs.Node("Concat", attrs={"axis": axis}), roles)

    assert [joined(axis) for axis in (0, 1, 2, 3)] == [("N",), ("C",), ("S",), ("S",)]
    assert [joined(axis) for axis in (-1, -2, -3, -4)] == [("S",), ("S",), ("C",), ("N",)]
    scattered = [
        gs.Node("ScatterND", inputs=[value(2, 3, 4, 5), value(*shape, name="i"), value(1, name="u")])
        for shape in ((7, 1), (7, 3), (7, None))
    ]
    assert [prunable._joined(node, roles) for node in scattered] == [("N",), ("N", "C", "S"), ("N",)]


@pytest.mark.parametrize(
    ("old", "new", "roles", "expected"),
    [
        ((2, 6, 3, 5), (2, 6, 15), "NCS", "NCSS"),
        ((2, 15, 6), (2, 3, 5, 6), "NSSC", "NSC"),
        ((2, 3, 5, 6), (2, 15, 6), "NSC", "NSSC"),
        ((2, 12, 15), (2, 6, 30), "NCS", None),  # channels taken apart
        ((2, 6, 15), (1, 12, 15), "NCS", None),  # images put into channels
        ((2, 6, None, 5), (2, 6, 15), "NCS", None),
        ((2, 6, 15), (2, 6, 3, None), "NCSS", None),
        ((2, 6, 3, 5), (2, 6, 15), "NSS", None),
    ],
)
def test_what_axes_stood_for_before_a_reshape(
    old: tuple[int | None, ...], new: tuple[int | None, ...], roles: str, expected: str | None
) -> None:
    found = prunable._reshaped(value(*old), value(*new), tuple(roles))
    assert found == (None if expected is None else tuple(expected))


def test_shapes_that_are_not_known_tell_no_axes() -> None:
    assert prunable._reshaped(gs.Variable("v"), value(2, 6, 15), ("N", "C", "S")) is None
    assert prunable._around((2, 6, 3, 5), 1) == (1, 15) and prunable._around((2, 6, 3, 5), 3) == (18, 1)
    assert prunable._around((2, 6, 3, 5), 0) is None and prunable._around((2, 6, None, 5), 1) is None
    assert prunable._around((None, 6, 3), 1) == (1, 3)
    assert prunable._standard(3, ("N", "C", "S", "S")) == ("N", "C", "S")
    assert prunable._standard(4, ("N", "S", "C")) == ("N", "S", "S", "C")
    assert prunable._standard(3, ("N", "S", "C")) == ("N", "S", "C")


def meeting(body: str, weights: str = "") -> str | None:
    given = "float[2, 6, 4, 5] x, float[2, 6, 4, 5] z, float[7, 6, 1, 1] w, float[6, 7] m"
    text = f"agraph ({given}) => (float[] end) {weights} {{ {body}  end = Relu (y) }}"
    y = graph_of(text).tensors()["y"]
    node = prunable.images_meeting(y, ("N", "C", *["S"] * (len(y.shape) - 2)))
    return None if node is None else str(node.outputs[0].name)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("a = Concat <axis = 2> (x, z)  y = Relu (a)", "a"),
        ("a = Concat <axis = 3> (x, z)  y = Relu (a)", "a"),
        ("a = Concat <axis = -1> (x, z)  b = Add (a, a)  y = Sigmoid (b)", "a"),
        ("a = Concat <axis = 1> (x, z)  y = Relu (a)", None),
        ("a = Concat <axis = 0> (x, z)  y = Relu (a)", None),
        ("a = Concat <axis = 2> (x, x)  y = Relu (a)", None),  # one map, twice
        ("y = Add (x, z)", None),
        # Channels last, and back.
        (
            "t = Transpose <perm = [0, 2, 3, 1]> (x)  s = Transpose <perm = [0, 2, 3, 1]> (z)  "
            "a = Concat <axis = 1> (t, s)  y = Transpose <perm = [0, 3, 1, 2]> (a)",
            "a",
        ),
        (
            "t = Transpose <perm = [0, 2, 3, 1]> (x)  s = Transpose <perm = [0, 2, 3, 1]> (z)  "
            "a = Concat <axis = 3> (t, s)  y = Transpose <perm = [0, 3, 1, 2]> (a)",
            None,
        ),
    ],
)
def test_images_meet_where_maps_are_put_side_by_side(body: str, found: str | None) -> None:
    assert meeting(body) == found


def test_images_are_followed_through_convolutions_products_and_reshapes() -> None:
    weights = "<int64[3] flat = {2, 6, 40}, int64[3] tokens = {2, 40, 6}, int64[4] map = {2, 6, 8, 5}>"
    joined = "a = Concat <axis = 2> (x, z)"
    assert meeting(f"{joined}  y = Conv (a, w)", weights=weights) == "a"
    assert meeting(f"{joined}  f = Reshape (a, flat)  y = Relu (f)", weights=weights) == "a"
    assert meeting(f"{joined}  f = Reshape (a, flat)  y = Reshape (f, map)", weights=weights) == "a"
    assert (
        meeting(
            f"{joined}  t = Transpose <perm = [0, 2, 3, 1]> (a)  l = Reshape (t, tokens)  p = MatMul (l, m)  "
            "y = Transpose <perm = [0, 2, 1]> (p)",
            weights=weights,
        )
        == "a"
    )


# Flattened maps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "shape", "flattens"),
    [
        ((2, 4, 5, 6), [2, 20, 6], True),
        ((2, 4, 5, 6), [0, -1, 6], True),
        ((2, 4, 5, 6), [2, -1, 6], True),
        ((2, 4, 5, 6), [-1, 20, 6], True),
        (("n", 4, 5, 6), [-1, 20, 6], True),
        (("n", 4, 5, 6), [0, 20, 6], True),
        ((2, 4, 5, 6), [1, 40, 6], False),
        ((2, 4, 5, 6), [-1, 40, 6], False),
        ((2, 4, 5, 6), [2, 24, 5], False),
        ((2, 4, 5, 6), [2, 4, 30], False),
        ((2, 4, 5, 6), [2, 120], False),
        ((2, 20, 6), [2, 20, 6], False),
        (("n", "h", 5, 6), [-1, 20, 6], False),
    ],
)
def test_which_reshapes_flatten_a_map(before: tuple[Any, ...], shape: list[int], flattens: bool) -> None:
    out = gs.Variable("out", np.float32, ["n", "l", 6] if len(shape) == 3 else None)
    node = gs.Node(
        "Reshape", inputs=[value(*before), gs.Constant("s", np.array(shape, np.int64))], outputs=[out]
    )
    assert flattened_maps._flattens(node) is flattens
    out.shape = None
    assert flattened_maps._flattens(node) is flattens
    node.op = "Expand"
    assert not flattened_maps._flattens(node)


@pytest.mark.parametrize(
    ("made", "again"),
    [
        ((2, 4, 5, 6), True),
        (("n", 4, 5, 6), True),
        ((2, 5, 4, 6), False),
        ((2, 4, 5, 3), False),
        ((2, 20, 6), False),
        ((2, "h", 5, 6), False),
        ((2, 4, "w", 6), False),
    ],
)
def test_which_reshapes_make_the_map_again(made: tuple[Any, ...], again: bool) -> None:
    node = gs.Node("Reshape", inputs=[value(2, 20, 6), value(4, name="s")], outputs=[value(*made, name="o")])
    assert flattened_maps._makes_map_again(node, value(2, 4, 5, 12)) is again
    assert not flattened_maps._makes_map_again(node, gs.Variable("u"))
    node.op = "Expand"
    assert not flattened_maps._makes_map_again(node, value(2, 4, 5, 12))


def test_what_acts_on_one_position_of_a_sequence() -> None:
    x, y = value(2, 20, 6), gs.Variable("y")

    def acts(op: str, *others: gs.Tensor, turned: bool = False, outputs: int = 1, **attrs: Any) -> bool:
        inputs = [*others, x] if turned else [x, *others]
        node = gs.Node(op, attrs=attrs, inputs=inputs, outputs=[gs.Variable(f"y{i}") for i in range(outputs)])
        return flattened_maps._acts_on_positions(node, x)

    def weight(*shape: int) -> gs.Constant:
        return gs.Constant("w", np.zeros(shape, np.float32))

    scale = weight(6)
    assert acts("LayerNormalization", scale) and acts("LayerNormalization", scale, axis=2)
    assert not acts("LayerNormalization", scale, axis=1)
    assert not acts("LayerNormalization", scale, outputs=3)
    assert acts("MatMul", weight(6, 4)) and not acts("MatMul", weight(2, 6, 4))
    assert not acts("MatMul", weight(20, 20), turned=True) and not acts("MatMul", y)
    assert acts("Add", scale) and acts("Sub", scale, turned=True) and acts("Mul", weight())
    assert not acts("Add", weight(20, 1)) and not acts("Mul", x) and not acts("Add", y)
    assert acts("Gelu") and acts("Sigmoid") and not acts("Softmax")


UNARY = ("Sigmoid", "Gelu", "Relu", "Tanh", "Identity", "Cast", "Erf", "Neg")


@pytest.mark.parametrize("op", UNARY)
def test_activations_act_on_one_position_of_maps_and_sequences(op: str) -> None:
    sequence, map_ = value(2, 20, 6), value(2, 6, 4, 5)
    assert flattened_maps._acts_on_positions(gs.Node(op, inputs=[sequence]), sequence)
    assert sink._acts_on_positions(gs.Node(op, inputs=[map_]), map_, (0, 1, 2, 3))


def test_what_acts_on_one_position_of_a_map() -> None:
    x, first, last = value(2, 6, 4, 5), (0, 1, 2, 3), (0, 2, 3, 1)

    def acts(axes: tuple[int, ...], op: str, *others: gs.Tensor, turned: bool = False, **attrs: Any) -> bool:
        node = gs.Node(op, attrs=attrs, inputs=[*others, x] if turned else [x, *others])
        node.outputs = [gs.Variable("y")]
        return sink._acts_on_positions(node, x, axes)

    def weight(*shape: int) -> gs.Constant:
        return gs.Constant("w", np.zeros(shape, np.float32))

    pointwise = weight(7, 6, 1, 1)
    assert acts(first, "Conv", pointwise) and acts(
        first, "Conv", pointwise, strides=[1, 1], pads=[0, 0, 0, 0]
    )
    assert not acts(last, "Conv", pointwise) and not acts(first, "Conv", weight(7, 6, 1, 3))
    assert not acts(first, "Conv", pointwise, strides=[1, 2]) and not acts(
        first, "Conv", pointwise, turned=True
    )
    assert not acts(first, "Conv", value(7, 6, 1, 1, name="computed"))
    assert acts(last, "LayerNormalization", weight(6)) and acts(last, "LayerNormalization", weight(6), axis=3)
    assert not acts(first, "LayerNormalization", weight(5)) and not acts(last, "LayerNormalization", axis=2)
    assert acts(last, "MatMul", weight(6, 7)) and not acts(first, "MatMul", weight(5, 7))
    assert not acts(last, "MatMul", weight(1, 6, 7)) and not acts(last, "MatMul", weight(6, 6), turned=True)
    for op in ("Mul", "Add", "Sub", "Div"):
        assert acts(first, op, weight(6, 1, 1)) and acts(last, op, weight(6), turned=True)
        assert not acts(first, op, weight(5)) and not acts(first, op, x)
    assert acts(first, "Transpose", perm=[0, 2, 3, 1]) and not acts(first, "Transpose", perm=[0, 2, 1])
    assert not acts(first, "Transpose") and not acts(first, "Softmax")


POSITIONWISE = (
    *(
        "Add",
        "BatchNormalization",
        "Cast",
        "Clip",
        "Div",
        "Dropout",
        "Elu",
        "Erf",
        "Exp",
        "Gelu",
        "HardSigmoid",
    ),
    *(
        "HardSwish",
        "Identity",
        "InstanceNormalization",
        "GroupNormalization",
        "LeakyRelu",
        "Mul",
        "Neg",
        "Pow",
    ),
    *(
        "PRelu",
        "Relu",
        "Resize",
        "Sigmoid",
        "Softplus",
        "Sqrt",
        "Sub",
        "Tanh",
        "Pad",
        "Concat",
        "SelectiveScan2D",
    ),
    *("AveragePool", "MaxPool", "Split", "Where", "ReduceMean", "SelectiveScan"),
)


@pytest.mark.parametrize("op", POSITIONWISE)
def test_what_a_map_is_followed_through(op: str) -> None:
    x, scalar, roles = value(2, 6, 4, 5), value(1, name="s"), ("N", "C", "S", "S")
    node = gs.Node(op, inputs=[x, scalar], outputs=[value(2, 6, 4, 5, name="y")])
    assert [(item.name, axes) for item, axes in prunable._above(node, node.outputs[0], roles)] == [
        ("v", roles)
    ]
    node.op = "Unknown"
    assert prunable._above(node, node.outputs[0], roles) == []


def test_what_axes_stand_for_above_products_and_convolutions() -> None:
    def above(op: str, *roles: str, **attrs: Any) -> list[tuple[str, ...]]:
        node = gs.Node(op, attrs=attrs, inputs=[value(2, 6, 20), value(1, name="w")])
        return [axes for _, axes in prunable._above(node, value(2, 6, 20, name="y"), roles)]

    for op in ("Conv", "ConvTranspose"):
        assert above(op, "N", "", "") == [("N", "C", "S")]
    for op in ("MatMul", "Gemm", "LayerNormalization"):
        assert above(op, "N", "", "") == [("N", "S", "C")]
    assert above("Transpose", "N", "C", "S", perm=[0, 2, 1]) == [("N", "S", "C")]
    assert above("Transpose", "N", "C", "S", perm=[2, 0, 1]) == [("C", "S", "N")]


def test_only_data_counts_among_what_is_put_together() -> None:
    values = graph_of("""
    agraph (float[2, 3] x, float[2, 3] z) => (float[] y) <float[2, 3] w = {1, 2, 3, 4, 5, 6}, int64[1] one = {1}>
    {
        size = Shape (x)
        sized = ConstantOfShape (size)
        a = Transpose <perm = [1, 0]> (x)
        b = Transpose <perm = [1, 0]> (a)
        c = Relu (z)
        y = Concat <axis = 0> (b, w, sized, c, x)
    }
    """).tensors()
    data = {name: prunable._comes_from_data(values[name]) for name in ("x", "w", "size", "sized", "a", "c")}
    assert data == {"x": True, "w": False, "size": False, "sized": False, "a": True, "c": True}
    found = prunable._moved_from(producer(values["y"]))
    assert sorted(item.name for item in found) == ["c", "x"]


# Bodies in the main graph -----------------------------------------------------------------------------------------


def test_bodies_written_out_compute_the_same_and_are_named_after_their_scans() -> None:
    from helpers import scan_case, scan_feeds, scan_model

    case = scan_case(d_inner=3, height=2, width=3, d_state=2, rank=1)
    model = scan_model([case.variant])
    del model.functions[:]
    for tensor, name in zip(
        case.converted(torch.float32), ("x", "dt", "B", "C", "A", "D", "dt_bias", "dt_weight"), strict=True
    ):
        if name == "A":
            model.graph.initializer.append(onnx.numpy_helper.from_array(tensor.numpy(), "0/A"))
    model.graph.node[0].name = "block_1/scan"
    with pytest.raises(PassError, match="the scan block_1/scan has no function body; run lower first"):
        inline_scans(model)
    handed_on = lower(model, "scan")
    handed_on.functions[0].node[0].attribute.append(
        onnx.AttributeProto(name="to", ref_attr_name="softplus", type=onnx.AttributeProto.INT)
    )
    with pytest.raises(PassError, match="takes its to from the call of its function"):
        inline_scans(handed_on)
    model.graph.node.append(helper.make_node("Relu", ["0/y"], ["end"], "last"))
    other = helper.make_function("other", "Twice", ["a"], ["b"], [], [helper.make_opsetid("", 20)])
    lowered = lower(model, "tree", [{name: array.shape for name, array in scan_feeds(case).items()}])
    lowered.functions.append(other)
    flat = inline_scans(lowered)
    assert [function.name for function in flat.functions] == ["Twice"]
    assert {entry.domain for entry in flat.opset_import} == {""}
    # Other operators of our domain have no body to write out, nor has another's of the same name.
    for op, domain in (("Other", "quartermap"), ("SelectiveScan2D", "other")):
        strange = onnx.ModelProto()
        strange.CopyFrom(flat)
        strange.graph.node.append(helper.make_node(op, ["0/y"], ["strange"], "strange", domain=domain))
        assert inline_scans(strange).graph.node[-1] == strange.graph.node[-1]
    assert flat.graph.node[-1].name == "last"
    assert all(node.name.startswith("block_1/scan/") and not node.domain for node in flat.graph.node[:-2])
    assert flat.graph.node[-2].name == "block_1/scan" and list(flat.graph.node[-2].output) == ["0/y"]
    names = [name for node in flat.graph.node for name in node.output]
    assert len(set(names)) == len(names) and "0/y" in names
    del lowered.functions[-1], flat.functions[:]
    feeds = scan_feeds(case)
    assert np.array_equal(run(flat, feeds)["0/y"], run(lowered, feeds)["0/y"])


# Bodies for sizes -------------------------------------------------------------------------------------------------


def test_sides_are_the_sizes_behind_batch_and_channels() -> None:
    def kind(*shape: int | str | None) -> onnx.TypeProto:
        return helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, shape)

    found = _sides(
        {
            "map": kind("n", 3, 4, 5),
            "open": kind(1, 3, "h", 5),
            "flat": kind(2, 3),
            "steps": kind(2, 3, 9),
        }.items()
    )
    assert found == {"map": (4, 5), "steps": (9,)}


def test_a_tree_is_for_the_size_that_is_known_or_the_largest_that_is_possible() -> None:
    def variants(height: Any, width: Any, *at: tuple[int, int]) -> Any:
        text = f"""
        agraph (float[1, 3, {height}, {width}] x) => (float[] y)
        {{ half = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (x)  y = Relu (half) }}
        """
        shapes = [{"x": (1, 3, *sides)} for sides in at]
        made = _Sizes(parsed(text), shapes).tree_variant(_variant(), "half")
        assert isinstance(made, TreeVariant)
        return made.size, made.longest

    assert variants(8, 12) == ((4, 6), 24)
    assert variants("h", "w", (8, 12)) == ((4, 6), 24)
    assert variants("h", "w", (8, 12), (16, 8), (4, 4)) == (None, 32)
    assert variants("h", "w") == (None, 65536)
    text = """
    agraph (float[1, 3, h, w] x) => (float[] y) <float[1, 3, 1, 1] k = {1, 2, 3}> { c = Add (x, k)  y = Relu (c) }
    """
    with pytest.raises(PassError, match=r"the graph does not fit inputs of x \(1, 4, 8, 8\)"):
        _Sizes(parsed(text), [{"x": (1, 4, 8, 8)}]).tree_variant(_variant(), "c")


def _variant() -> Any:
    from helpers import scan_case

    return scan_case().variant


def test_types_and_shapes_at_given_sizes() -> None:
    model = parsed(
        "agraph (float[n, 3, h, w] x) => (float[] y) { c = Transpose <perm = [0, 2, 3, 1]> (x)  y = Relu (c) }"
    )
    before = model.SerializeToString(deterministic=True)
    found = infer_shapes_at(model, {"x": (2, 3, 5, 7)})
    shapes = {name: [dim.dim_value for dim in kind.tensor_type.shape.dim] for name, kind in found.items()}
    assert shapes == {"x": [2, 3, 5, 7], "c": [2, 5, 7, 3], "y": [2, 5, 7, 3]}
    assert model.SerializeToString(deterministic=True) == before
    assert [dim.dim_param for dim in infer_shapes(model).graph.value_info[0].type.tensor_type.shape.dim][
        :1
    ] == ["n"]


# 16-bit types -----------------------------------------------------------------------------------------------------


def test_weights_fit_a_type_or_are_too_large_or_too_small() -> None:
    half, brain = element_type("float16"), element_type("bfloat16")

    def judged(*values: float, kind: Any = half) -> tuple[str | None, float]:
        return unfit(np.array(values, np.float32), kind)

    assert judged() == (None, 0.0)
    assert judged(0.0, 0.0) == (None, 0.0)
    assert judged(65504.0, -1.0) == (None, 0.0)
    reason, _ = judged(1.0, -65520.0)
    assert reason == "its largest value is 6.55e+04, float16 ends at 6.55e+04"
    assert judged(1.0, -65520.0, kind=brain) == (None, 0.0)
    # 2⁻¹⁵ is below the smallest normal number of float16, and is held exactly.
    assert judged(2.0**-14, 2.0**-15, 1.0, 0.0) == (None, 0.25)
    reason, share = judged(2.0**-26, 2.0**-26)
    assert reason is not None and reason.startswith("1.0e+00 of it would be lost") and share == 1.0
    # One unit in the last place of the whole tensor is what rounding may take.
    assert judged(1.0, 2.0**-26) == (None, 0.5)


def test_inputs_that_have_the_type_of_their_operator() -> None:
    half = element_type("float16")

    def slots(op: str, count: int, domain: str = "") -> set[int]:
        node = helper.make_node(op, [f"i{place}" for place in range(count)], ["o"], domain=domain)
        return set(typed_inputs(node, 20, half))

    assert slots("Conv", 3) == {0, 1, 2} and slots("Concat", 4) == {0, 1, 2, 3}
    assert slots("Gather", 2) == {0} and slots("Resize", 4) == {0} and slots("BatchNormalization", 5) == {0}
    assert slots("SelectiveScan2D", 8, "quartermap") == {0, 1, 2, 3, 7}
    assert slots("SelectiveScan", 7, "quartermap") == {0, 1, 3, 4}
    assert slots("Cast", 1) == set() == slots("Unknown", 1) and slots("Shape", 1) == set()


def test_parts_of_a_graph_whose_output_no_node_makes() -> None:
    model = parsed("agraph (float[2] x) => (float[] y, float[2] x) { block_1 = Relu (x)  y = Neg (block_1) }")
    parts = block_parts(model.graph)
    assert {block: [node.op_type for node in nodes] for block, nodes in parts.items()} == {
        1: ["Relu"],
        0: ["Neg"],
    }


def test_operators_without_a_name_cannot_be_named() -> None:
    model = parsed("agraph (float[2] x) => (float[2] y) { a = Relu (x)  y = Neg (a) }")
    with pytest.raises(PassError, match="has no operator and no float32 value ''"):
        cast_precision(model, "float16", keep_float32=[""])
    _, report = cast_precision(model, "float16", keep_float32=["a"])
    assert report.operators == {"float32": 2}


@pytest.mark.parametrize(
    "moved",
    [
        "m = Flatten (a)",
        "m = Gather (a, first)",
        "m = Identity (a)",
        "m = Reshape (a, shape)",
        "m = Slice (a, zero, first)",
        "m, rest = Split <num_outputs = 2> (a)",
        "m = Squeeze (a, first)",
        "m = Transpose (a)",
        "m = Unsqueeze (a, first)",
    ],
)
def test_what_only_moves_values_between_float32_operators_stays_float32(moved: str) -> None:
    text = f"""
    agraph (float[2, 1, 4] x) => (float[] y) <int64[1] zero = {{0}}, int64[1] first = {{1}}, int64[2] shape = {{4, 2}}>
    {{ a = Exp (x)  {moved}  b = Exp (m)  y = Neg (b) }}
    """
    _, report = cast_precision(parsed(text), "float16", keep_float32=["a", "b"])
    assert report.operators == {"float32": 4} and report.casts == 0
    # An operator that makes new numbers takes the type.
    new = text.replace(moved, "m = Sin (a)")
    _, report = cast_precision(parsed(new), "float16", keep_float32=[])
    assert report.operators == {"float16": 4}


def test_casts_are_named_after_the_value_and_the_type() -> None:
    model = parsed(
        "agraph (float[2] x) => (float[2] y) { a = Relu (x)  b = Exp (a)  c = Sin (b)  y = Neg (c) }"
    )

    def casts(kept: str, io: Any) -> list[tuple[str, ...]]:
        typed, _ = cast_precision(model, "float16", keep_float32=[kept], io=io)
        nodes = [node for node in typed.graph.node if node.op_type == "Cast"]
        return [(node.name, *node.input, *node.output) for node in nodes]

    assert casts("a", "float32") == [
        ("b/to_float16", "b", "b/to_float16"),
        ("y/float16/to_float32", "y/float16", "y"),
    ]
    assert casts("c", "same") == [
        ("b/to_float32", "b", "b/to_float32"),
        ("y/float32/to_float16", "y/float32", "y"),
    ]


def test_constants_of_a_shape_have_one_element_of_the_type() -> None:
    text = """
    agraph (float[2, 3] x) => (float[2, 3] y)
    { size = Shape (x)  nothing = ConstantOfShape (size)  s = Add (x, nothing)  y = Relu (s) }
    """
    model, _ = cast_precision(parsed(text), "float16")
    (node,) = (node for node in model.graph.node if node.op_type == "ConstantOfShape")
    value_ = helper.get_node_attr_value(node, "value")
    assert (list(value_.dims), value_.data_type) == ([1], onnx.TensorProto.FLOAT16)
    x = np.array([[1, -2, 3], [4, 5, -6]], np.float32)
    assert np.array_equal(run(model, {"x": x})["y"], np.maximum(x, 0))


# Running passes ---------------------------------------------------------------------------------------------------


def test_passes_run_in_their_order_and_the_format_of_the_file_stays() -> None:
    from quartermap_deploy.passes import PassReport

    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]>\nagraph (float[2, 3] x) => (float[] y) { y = Relu (x) }'
    )
    seen: list[str] = []

    def named(name: str) -> Any:
        def graph_pass(graph: gs.Graph, selection: Selection) -> PassReport:
            seen.append(name)
            graph.nodes[0].name += name
            return PassReport(name)

        return graph_pass

    changed, reports = run_passes(model, Selection((), Subsample()), (named("a"), named("b")))
    assert seen == ["a", "b"] == [report.name for report in reports]
    assert changed.graph.node[0].name.endswith("ab") and changed.ir_version == 9
    assert model.graph.node[0].name == ""


def test_nodes_that_a_pass_leaves_behind_their_readers_are_put_in_order() -> None:
    from quartermap_deploy.passes import PassReport

    def written_last(graph: gs.Graph, selection: Selection) -> PassReport:
        (node,) = graph.nodes
        turned = gs.Variable("turned", np.float32)
        graph.nodes.append(gs.Node("Neg", "neg", inputs=[node.inputs[0]], outputs=[turned]))
        node.inputs = [turned]
        return PassReport("written_last")

    model = parsed("agraph (float[2, 3] x) => (float[2, 3] y) { y = Relu (x) }")
    changed, _ = run_passes(model, Selection((), Subsample()), (written_last,))
    assert [node.op_type for node in changed.graph.node] == ["Neg", "Relu"]


def test_what_is_flattened_behind_stands_before_who_reads_it() -> None:
    graph = graph_of("""
    agraph (float[2, 4, 5, 6] x) => (float[2, 20, 6] y) <int64[3] shape = {2, 20, 6}>
    { flat = Reshape (x, shape)  a = Gelu (flat)  b = Sigmoid (a)  y = Softmax (b) }
    """)
    flattened_maps.unflatten_below(graph, graph.tensors()["x"], "p")
    assert [node.op for node in graph.nodes] == [
        *("Gelu", "Sigmoid", "Shape", "Shape", "Concat", "Reshape", "Softmax")
    ]
    assert [node.name for node in graph.nodes[2:6]] == [
        *("p/flat_batch", "p/flat_channels", "p/flat_shape", "p/flatten")
    ]
    x = np.random.default_rng(0).standard_normal((2, 4, 5, 6)).astype(np.float32)
    before = parsed("""
    agraph (float[2, 4, 5, 6] x) => (float[2, 20, 6] y) <int64[3] shape = {2, 20, 6}>
    { flat = Reshape (x, shape)  a = Gelu (flat)  b = Sigmoid (a)  y = Softmax (b) }
    """)
    after = infer_shapes(gs.export_onnx(graph))
    assert np.array_equal(run(after, {"x": x})["y"], run(before, {"x": x})["y"])


def test_which_convolution_an_activation_is_of() -> None:
    made = nodes_of("""
    agraph (float[2, 6, 4, 5] x) => (float[] y) <float[6, 1, 3, 3] w>
    {
        c = Conv <group = 6> (x, w)  gate = Sigmoid (c)  silu = Mul (c, gate)  turned = Mul (gate, c)
        other = Mul (c, c)  bent = Tanh (c)  softer = Mul (c, bent)  strange = Sigmoid (bent)  apart = Mul (c, strange)
        of_input = Sigmoid (x)  without = Mul (x, of_input)  relu = Relu (c)  of_relu = Sigmoid (relu)
        behind = Mul (relu, of_relu)
        y = Neg (c)
    }
    """)
    found = {name: hoist_slice_module._before_activation(node) for name, node in made.items()}
    assert {name for name, conv in found.items() if conv is made["c"]} == {"c", "silu", "turned"}
    assert all(conv is None for name, conv in found.items() if name not in ("c", "silu", "turned"))
    assert hoist_slice_module._before_activation(None) is None


@pytest.mark.parametrize(("kernel", "padding"), [(3, {"pads": [1, 1, 1, 1]}), (1, {})])
def test_a_convolution_without_activation_may_read_what_others_read_too(
    kernel: int, padding: dict[str, list[int]]
) -> None:
    x = gs.Variable("x", np.float32, [2, 4, 6, 8])
    weight = gs.Constant("w", np.ones((4, 1, kernel, kernel), np.float32))
    graph = gs.Graph(inputs=[x], opset=20)
    whole = GraphWriter(graph, "p", x.dtype, 0)("Relu", "whole", [x])
    convolved = gs.Variable("c", np.float32, [2, 4, 6, 8])
    graph.nodes.append(gs.Node("Conv", "conv", {**padding, "group": 4}, [whole, weight], [convolved]))
    subsample = Subsample(2)
    kept = write_keep(GraphWriter(graph, "block_1/quartermap", x.dtype, 2), convolved, subsample)
    scanned, residual = gs.Variable("s", np.float32), gs.Variable("r", np.float32)
    graph.nodes += [
        gs.Node("SelectiveScan2D", "block_1/scan", domain="quartermap", inputs=[kept], outputs=[scanned]),
        gs.Node("Sigmoid", "beside", inputs=[whole], outputs=[residual]),
    ]
    (scan,) = scans(graph)
    scanned.name = scanned_name(scan, subsample)
    graph.outputs = [scanned, residual]
    graph.outputs.append(convolved)
    report = hoist_slice(graph, Selection((1,), subsample))
    assert not report.changed and "c of block 1 is also read by the graph output" in report.refused[1]
    graph.outputs.pop()
    report = hoist_slice(graph, Selection((1,), subsample))
    assert report.changed == ["block 1: conv now has stride 2"] and not report.refused


def test_a_block_that_is_said_to_be_pruned_and_is_not_is_an_error() -> None:
    x, scanned = gs.Variable("x", np.float32, [2, 4, 6, 8]), gs.Variable("s", np.float32)
    graph = gs.Graph(inputs=[x], opset=20)
    made = GraphWriter(graph, "p", x.dtype, 0)("Relu", "relu", [x])
    graph.nodes.append(
        gs.Node("SelectiveScan2D", "block_1/scan", domain="quartermap", inputs=[made], outputs=[scanned])
    )
    (scan,) = scans(graph)
    scanned.name = scanned_name(scan, Subsample(2))
    graph.outputs = [scanned]
    with pytest.raises(
        PassError, match="block 1 is pruned, but neither a Slice nor a convolution of stride 2"
    ):
        hoist_slice(graph, Selection((1,), Subsample(2)))


def test_a_lowered_model_has_the_body_of_each_variant_once() -> None:
    with pytest.raises(PassError, match="unknown body 'loop'; expected one of scan, tree"):
        lower(onnx.ModelProto(), "loop")
