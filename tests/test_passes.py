"""The graph passes on small graphs written by hand: each fires, refuses, changes nothing twice, and keeps its numbers.

Graphs are those of `helpers`, edited line by line for the near-misses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
import torch
from helpers import (
    CHANNEL_FIRST,
    CHANNEL_LAST,
    CHANNELS,
    D_INNER,
    GATED,
    Array,
    block_weights,
    chained,
    edited,
    error,
    image,
    main_graph,
    operators,
    run,
    run_session,
    scan_case,
    session,
    text_model,
    with_outputs,
)
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper
from torch import Tensor
from torch.nn import functional

from quartermap_deploy.errors import PassError
from quartermap_deploy.frontend.node_names import scan_name
from quartermap_deploy.lowering.operator import DOMAIN, SELECTIVE_SCAN_2D
from quartermap_deploy.passes import (
    CANONICAL,
    OPTIMIZED,
    GraphPass,
    PassReport,
    Selection,
    hoist_slice,
    infer_shapes,
    insert_quartermap,
    lower,
    run_passes,
    sink_resize,
)
from quartermap_deploy.pruning.plan import Subsample
from quartermap_deploy.scan.definition import selective_scan_2d_definition

FORMS = {"channel_first": CHANNEL_FIRST, "channel_last": CHANNEL_LAST, "gated": GATED}
NEAREST = [Subsample(stride, keep) for stride, keep in ((2, 1), (3, 1), (3, 2), (4, 1), (5, 3))]
INTERPOLATED = [Subsample(upsample="bilinear"), Subsample(3, 2, "bicubic")]
HOISTED = (insert_quartermap, hoist_slice)
SUNK = (insert_quartermap, sink_resize)


def select(*blocks: int, stride: int = 2, keep: int = 1, upsample: str = "nearest") -> Selection:
    """Return a selection of blocks."""
    return Selection(blocks, Subsample(stride, keep, upsample))  # type: ignore[arg-type]


def output(model: onnx.ModelProto, x: Array) -> Array:
    """Return what a model without bodies computes."""
    return run(lower(model), {"x": x})["y"]


def by_torch(form: str, x: Array, subsample: Subsample | None) -> Tensor:
    """Compute a block of `helpers` in float64, with indices instead of Slice, Gather and Resize."""
    weights = {name: torch.from_numpy(array) for name, array in block_weights().items()}
    parts = weights["parts"].tolist()
    w = {name: tensor.double() for name, tensor in weights.items()}
    images = torch.from_numpy(x).double()
    projected = functional.conv2d(images, w["in_proj"])
    full = functional.silu(functional.conv2d(projected, w["conv"], padding=1, groups=D_INNER))
    height, width = full.shape[2:]
    small = full
    if subsample is not None:
        rows, columns = (list(subsample.kept_indices(size)) for size in (height, width))
        small = full[:, :, rows][:, :, :, columns]
    dt, B, C = functional.conv2d(small, w["x_proj"]).split(parts, dim=1)
    scanned = selective_scan_2d_definition(
        small, dt, B, C, w["A"], w["D"], w["dt_bias"], dt_weight=w["dt_weight"]
    )
    if subsample is not None and subsample.upsample == "nearest":
        rows, columns = (
            [i * kept // size for i in range(size)]
            for size, kept in zip((height, width), scanned.shape[2:], strict=True)
        )
        scanned = scanned[:, :, rows][:, :, :, columns]
    elif subsample is not None:
        scanned = functional.interpolate(
            scanned, size=(height, width), mode=subsample.upsample, align_corners=False
        )
    last = scanned.permute(0, 2, 3, 1)
    normal = functional.layer_norm(last, (D_INNER,), w["norm_scale"], w["norm_bias"]).permute(0, 3, 1, 2)
    if form == "gated":
        normal = normal * functional.silu(functional.conv2d(images, w["in_proj"]))
    return images + functional.conv2d(normal, w["out_proj"])


def node_making(model: onnx.ModelProto, value: str) -> onnx.NodeProto:
    """Return the node that makes a value."""
    (node,) = (node for node in model.graph.node if value in node.output)
    return node


def readers(model: onnx.ModelProto, value: str) -> list[str]:
    """Return the operators that read a value."""
    return sorted(node.op_type for node in model.graph.node if value in node.input)


forms = st.sampled_from(sorted(FORMS))
heights = st.integers(1, 12)


# All passes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", sorted(FORMS))
def test_the_graphs_of_these_tests_are_what_they_say(form: str) -> None:
    model = text_model(FORMS[form])
    x = image(5, 7)
    assert error(output(model, x), by_torch(form, x, None)) <= 1e-5


@given(
    form=forms,
    height=heights,
    width=heights,
    known=st.booleans(),
    subsample=st.sampled_from(NEAREST + INTERPOLATED),
)
def test_insertion_is_quartermap(
    form: str, height: int, width: int, known: bool, subsample: Subsample
) -> None:
    model = text_model(FORMS[form], *((height, width) if known else ()))
    inserted, _ = run_passes(model, Selection((1,), subsample), CANONICAL)
    x = image(height, width)
    assert error(output(inserted, x), by_torch(form, x, subsample)) <= 1e-5


@given(
    form=forms,
    height=heights,
    width=heights,
    known=st.booleans(),
    blocks=st.sampled_from([(1,), (2,), (1, 2)]),
    subsample=st.sampled_from(NEAREST + INTERPOLATED),
)
def test_optimising_changes_no_number(
    form: str, height: int, width: int, known: bool, blocks: tuple[int, ...], subsample: Subsample
) -> None:
    model = text_model(chained(FORMS[form], 2), *((height, width) if known else ()))
    selection, x = Selection(blocks, subsample), image(height, width)
    canonical, _ = run_passes(model, selection, CANONICAL)
    optimized, _ = run_passes(model, selection, OPTIMIZED)
    assert error(output(optimized, x), output(canonical, x)) <= 1e-6


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("subsample", [NEAREST[0], NEAREST[1], NEAREST[2]])
def test_open_sizes_take_any_size_in_one_session(form: str, subsample: Subsample) -> None:
    optimized, _ = run_passes(text_model(FORMS[form]), Selection((1,), subsample))
    ready = session(lower(optimized))
    for height, width, batch in ((8, 8, 1), (7, 9, 3), (1, 5, 2), (6, 1, 1), (13, 24, 1)):
        x = image(height, width, batch)
        assert error(run_session(ready, {"x": x})["y"], by_torch(form, x, subsample)) <= 1e-5


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("sizes", [(7, 9), ("height", "width"), (8, "width")])
@pytest.mark.parametrize("subsample", [NEAREST[0], NEAREST[1], NEAREST[2], INTERPOLATED[0]])
def test_each_pass_changes_nothing_the_second_time(
    form: str, sizes: tuple[int | str, int | str], subsample: Subsample
) -> None:
    model = text_model(chained(FORMS[form], 2), *sizes)
    selection = Selection((1, 2), subsample)
    for graph_pass in OPTIMIZED:
        model, _ = run_passes(model, selection, (graph_pass,))
        again, (report,) = run_passes(model, selection, (graph_pass,))
        assert report.name == graph_pass.__name__
        assert report.changed == []
        assert main_graph(again) == main_graph(model)


@pytest.mark.parametrize("passes", [CANONICAL, OPTIMIZED])
def test_all_passes_change_nothing_the_second_time(passes: Sequence[GraphPass]) -> None:
    selection = select(1)
    once, _ = run_passes(text_model(CHANNEL_FIRST), selection, OPTIMIZED)
    twice, reports = run_passes(once, selection, passes)
    assert [report.changed for report in reports] == [[] for _ in passes]
    assert main_graph(twice) == main_graph(once)


@pytest.mark.parametrize("other", [Subsample(3), Subsample(3, 2), Subsample(upsample="bilinear")])
@pytest.mark.parametrize("passes", [CANONICAL, OPTIMIZED])
def test_a_block_that_another_plan_has_pruned_is_an_error(
    passes: Sequence[GraphPass], other: Subsample
) -> None:
    pruned, _ = run_passes(text_model(CHANNEL_FIRST), select(1), passes)
    with pytest.raises(PassError, match=r"insert_quartermap.*block 1"):
        run_passes(pruned, Selection((1,), other), passes)


@pytest.mark.parametrize("graph_pass", OPTIMIZED)
def test_a_block_that_does_not_exist_is_an_error(graph_pass: GraphPass) -> None:
    with pytest.raises(PassError, match=rf"{graph_pass.__name__}.*block 3.*scans of 2 blocks"):
        run_passes(text_model(chained(CHANNEL_FIRST, 2)), select(3), (graph_pass,))
    with pytest.raises(PassError, match=r"block 1.*scans of 0 blocks"):
        run_passes(text_model("\n    y = Relu (x)\n"), select(1), (graph_pass,))


@pytest.mark.parametrize("graph_pass", [hoist_slice, sink_resize])
@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_selected_block_that_was_not_pruned_is_an_error(graph_pass: GraphPass, form: str) -> None:
    model = text_model(chained(FORMS[form], 2))
    inserted, _ = run_passes(model, select(1), CANONICAL)
    with pytest.raises(PassError, match=r"block 2.*run insert_quartermap first"):
        run_passes(inserted, select(1, 2), (graph_pass,))
    # Not even where the pass would refuse the plan: that is said of pruned blocks only.
    for selection in (select(1, stride=3, keep=2), select(1, upsample="bilinear")):
        with pytest.raises(PassError, match=r"block 1.*run insert_quartermap first"):
            run_passes(model, selection, (graph_pass,))


def test_the_model_that_is_given_stays_as_it_is() -> None:
    model = text_model(chained(CHANNEL_FIRST, 2))
    before = model.SerializeToString(deterministic=True)
    changed, reports = run_passes(model, select(2))
    lower(changed)
    assert model.SerializeToString(deterministic=True) == before
    assert [report.name for report in reports] == ["insert_quartermap", "hoist_slice", "sink_resize"]
    assert all("block 2" in line for report in reports for line in report.changed)
    assert all(len(report.changed) == 1 and not report.refused for report in reports)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_blocks_that_are_not_selected_stay_as_they_are(form: str) -> None:
    model = text_model(chained(FORMS[form], 3), 8, 8)
    changed, _ = run_passes(model, select(2))

    def block(of: onnx.ModelProto, number: int) -> list[onnx.NodeProto]:
        last = "y" if number == 3 else f"y_{number}"
        nodes = [
            n for n in of.graph.node if n.name in (last, scan_name(number)) or n.name.endswith(f"_{number}")
        ]
        return sorted(nodes, key=lambda node: node.name)

    assert len(block(model, 1)) == len(model.graph.node) / 3
    for number in (1, 3):
        assert block(changed, number) == block(model, number)
    assert block(changed, 2) != block(model, 2)
    # The number of a block is its place in the graph, so the first block's values are the same numbers.
    x = image(8, 8)
    before, after = (run(lower(with_outputs(m, ["y_1"])), {"x": x}) for m in (model, changed))
    assert np.array_equal(before["y_1"], after["y_1"]) and error(after["y"], before["y"]) > 1e-3


@pytest.mark.parametrize("passes", [CANONICAL, OPTIMIZED])
@pytest.mark.parametrize("sizes", [(7, 9), ("height", "width")])
@pytest.mark.parametrize("form", sorted(FORMS))
def test_the_result_is_a_valid_model(
    form: str, sizes: tuple[int | str, int | str], passes: Sequence[GraphPass]
) -> None:
    for subsample in (NEAREST[0], NEAREST[2], INTERPOLATED[0]):
        model, _ = run_passes(text_model(FORMS[form], *sizes), Selection((1,), subsample), passes)
        lowered = lower(model)
        onnx.checker.check_model(lowered, full_check=True)
        assert (lowered.ir_version, lowered.opset_import[0].version) == (9, 20)
        names = [name for node in model.graph.node for name in node.output]
        assert len(set(names)) == len(names)
        assert len({node.name for node in model.graph.node}) == len(model.graph.node)


# insert_quartermap --------------------------------------------------------------------------------------------------


class TestInsert:
    """The one pass that changes what the model computes."""

    @pytest.mark.parametrize("sizes", [(8, 12), (7, 9), ("height", "width")])
    def test_writes_the_canonical_form(self, sizes: tuple[int | str, int | str]) -> None:
        model, (report,) = run_passes(text_model(CHANNEL_FIRST, *sizes), select(1), CANONICAL)
        assert [line.split(":")[0] for line in report.changed] == ["block 1"]
        (kept,) = (node for node in model.graph.node if node.op_type == "Slice")
        (scan,) = (node for node in model.graph.node if node.op_type == SELECTIVE_SCAN_2D)
        (resize,) = (node for node in model.graph.node if node.op_type == "Resize")
        assert kept.input[0] == "features"
        assert readers(model, kept.output[0]) == ["Conv", SELECTIVE_SCAN_2D]
        assert scan.input[0] == kept.output[0] and resize.input[0] == scan.output[0]
        # The restored map has the name that the scan's output had, so that what reads it is as it was.
        assert list(resize.output) == ["scanned"]
        assert readers(model, "scanned") == ["Transpose"]

    def test_writes_nodes_for_what_the_plan_says(self) -> None:
        def added(subsample: Subsample, *sizes: int) -> list[str]:
            model, _ = run_passes(text_model(CHANNEL_FIRST, *sizes), Selection((1,), subsample), CANONICAL)
            before = operators(text_model(CHANNEL_FIRST))
            return [op for op in operators(model) if op in ("Slice", "Gather", "Resize") and op not in before]

        assert added(Subsample(), 8, 8) == ["Slice", "Resize"]
        # A Resize would be one position off at 94 rows.
        assert added(Subsample(3, 1), 94, 12) == ["Slice", "Gather", "Gather"]
        assert added(Subsample(3, 2), 9, 9) == ["Gather", "Gather", "Resize"]
        assert added(Subsample(3, 2), 9, 94).count("Resize") in (0, 1)

    def test_a_map_that_is_read_elsewhere_too_stays_whole_there(self) -> None:
        text = edited(
            CHANNEL_FIRST,
            "y = Add (x, mixed)",
            "beside = Conv (features, out_proj)\n    y = Add (beside, mixed)",
        )
        model, _ = run_passes(text_model(text), select(1), CANONICAL)
        assert readers(model, "features") == ["Conv", "Shape", "Slice"]
        assert output(model, image(7, 9)).shape == (2, CHANNELS, 7, 9)

    def test_projections_may_be_several_pointwise_nodes(self) -> None:
        text = edited(
            CHANNEL_FIRST,
            "narrow = Conv (features, x_proj)",
            "halved = Mul (features, scale)\n    shifted = Add (halved, offset)\n    narrow = Conv (shifted, x_proj)",
        )
        constants = {
            "scale": np.float32(0.5),
            "offset": np.arange(D_INNER, dtype=np.float32).reshape(1, -1, 1, 1),
        }
        model = text_model(text, weights=constants)
        canonical, _ = run_passes(model, select(1), CANONICAL)
        optimized, _ = run_passes(model, select(1), OPTIMIZED)
        x = image(7, 9)
        assert error(output(optimized, x), output(canonical, x)) <= 1e-6
        assert readers(canonical, "features") == ["Shape", "Slice"]

    @pytest.mark.parametrize(
        ("line", "replacement", "message"),
        [
            (
                "narrow = Conv (features, x_proj)",
                "mixed_up = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 6> (features, conv)\n"
                "    narrow = Conv (mixed_up, x_proj)",
                r"block 1 has the node mixed_up \(Conv\)",
            ),
            (
                "narrow = Conv (features, x_proj)",
                "means = ReduceMean <keepdims = 1> (features, axes)\n    lifted = Add (features, means)\n"
                "    narrow = Conv (lifted, x_proj)",
                r"block 1 has the node means \(ReduceMean\)",
            ),
            (
                "narrow = Conv (features, x_proj)",
                "narrow = Conv (convolved, x_proj)",
                r"block 1 has the node convolved \(Conv\)",
            ),
            (
                "narrow = Conv (features, x_proj)",
                "narrow = Conv (x, wide)",
                r"block 1 projects x, which does not come from features",
            ),
            (
                "dt, B, C = Split <axis = 1> (narrow, parts)",
                "turned = Transpose <perm = [0, 1, 3, 2]> (narrow)\n"
                "    dt, B, C = Split <axis = 1> (turned, parts)",
                r"block 1 has the node turned \(Transpose\)",
            ),
        ],
    )
    def test_refuses_projections_that_mix_positions(self, line: str, replacement: str, message: str) -> None:
        weights = {
            "axes": np.array([2, 3]),
            "wide": np.zeros((20, CHANNELS, 1, 1), dtype=np.float32),
        }
        model = text_model(edited(CHANNEL_FIRST, line, replacement), weights=weights)
        with pytest.raises(PassError, match=message):
            run_passes(model, select(1), CANONICAL)

    @pytest.mark.parametrize("sizes", [(8, 9), ("height", "width")])
    def test_refuses_projections_with_a_constant_for_each_position(
        self, sizes: tuple[int | str, int | str]
    ) -> None:
        text = edited(
            CHANNEL_FIRST,
            "narrow = Conv (features, x_proj)",
            "placed = Add (features, position)\n    narrow = Conv (placed, x_proj)",
        )
        model = text_model(text, *sizes, weights={"position": np.ones((1, D_INNER, 8, 9), dtype=np.float32)})
        with pytest.raises(PassError, match="block 1"):
            run_passes(model, select(1), CANONICAL)

    def test_refuses_projections_that_are_read_elsewhere(self) -> None:
        text = edited(
            CHANNEL_FIRST,
            "y = Add (x, mixed)",
            "beside = Conv (narrow, other)\n    y = Add (beside, mixed)",
        )
        model = text_model(text, weights={"other": np.ones((CHANNELS, 20, 1, 1), dtype=np.float32)})
        with pytest.raises(PassError, match="block 1"):
            run_passes(model, select(1), CANONICAL)

    def test_takes_a_scan_that_ends_the_graph(self) -> None:
        lines = CHANNEL_FIRST.strip().splitlines()
        text = "\n" + "\n".join(lines[:7]).replace("scanned =", "y =") + "\n"
        model, _ = run_passes(text_model(text), select(1), CANONICAL)
        assert output(model, image(7, 9)).shape == (2, D_INNER, 7, 9)


# hoist_slice --------------------------------------------------------------------------------------------------------


def assert_left_alone(inserted: onnx.ModelProto, message: str) -> None:
    """Require that hoist_slice leaves block 1 of a pruned graph as it is, and says why."""
    after, (report,) = run_passes(inserted, select(1), (hoist_slice,))
    assert report.changed == []
    assert re.search(message, report.refused[1])
    assert main_graph(after) == main_graph(inserted)


class TestHoist:
    """The Slice becomes the stride of the convolution."""

    @pytest.mark.parametrize("form", sorted(FORMS))
    @pytest.mark.parametrize("stride", [2, 3])
    def test_fires(self, form: str, stride: int) -> None:
        model, reports = run_passes(text_model(FORMS[form], 7, 9), select(1, stride=stride), HOISTED)
        assert reports[1].changed == [f"block 1: convolved now has stride {stride}"]
        assert "Slice" not in operators(model)
        strides = helper.get_node_attr_value(node_making(model, "convolved"), "strides")
        assert list(strides) == [stride, stride]

    @given(
        kernel=st.sampled_from([(1, 1), (3, 3), (5, 5), (3, 5), (7, 1)]),
        stride=st.integers(2, 5),
        height=heights,
        width=heights,
        known=st.booleans(),
    )
    def test_changes_no_number(
        self, kernel: tuple[int, int], stride: int, height: int, width: int, known: bool
    ) -> None:
        pads = [size // 2 for size in kernel] * 2
        text = edited(
            CHANNEL_FIRST,
            "kernel_shape = [3, 3], pads = [1, 1, 1, 1]",
            f"kernel_shape = {list(kernel)}, pads = {pads}",
        )
        weights = np.random.default_rng(0).standard_normal((D_INNER, 1, *kernel)).astype(np.float32)
        model = text_model(text, *((height, width) if known else ()), weights={"conv": weights})
        selection, x = select(1, stride=stride), image(height, width)
        before, _ = run_passes(model, selection, CANONICAL)
        after, reports = run_passes(model, selection, HOISTED)
        assert reports[1].changed
        assert error(output(after, x), output(before, x)) <= 1e-6

    def test_takes_a_convolution_without_activation(self) -> None:
        text = edited(CHANNEL_FIRST, "gate = Sigmoid (convolved)\n    features = Mul (convolved, gate)\n", "")
        text = edited(text, "convolved = Conv", "features = Conv")
        model, reports = run_passes(text_model(text), select(1), HOISTED)
        assert reports[1].changed == ["block 1: features now has stride 2"]
        before, _ = run_passes(text_model(text), select(1), CANONICAL)
        assert error(output(model, image(7, 9)), output(before, image(7, 9))) <= 1e-6

    @pytest.mark.parametrize("form", sorted(FORMS))
    def test_reports_that_keep_above_one_cannot_be_a_stride(self, form: str) -> None:
        model = text_model(FORMS[form], 7, 9)
        before, _ = run_passes(model, select(1, stride=3, keep=2), CANONICAL)
        after, (report,) = run_passes(before, select(1, stride=3, keep=2), (hoist_slice,))
        assert report.changed == [] and list(report.refused) == [1]
        assert "keep = 2" in report.refused[1]
        assert main_graph(after) == main_graph(before)
        both = Selection((1, 2), Subsample(3, 2))
        _, (_, report) = run_passes(text_model(chained(FORMS[form], 2), 7, 9), both, HOISTED)
        assert list(report.refused) == [1, 2]

    @pytest.mark.parametrize(
        ("edits", "message"),
        [
            # Nothing but SiLU is known to stand between the convolution and the scan.
            (
                [
                    (
                        "gate = Sigmoid (convolved)\n    features = Mul (convolved, gate)",
                        "features = Relu (convolved)",
                    )
                ],
                r"SiLU\(Conv\(x\)\) before the Slice of block 1, found Relu features",
            ),
            (
                [("gate = Sigmoid (convolved)", "gate = Sigmoid (projected)")],
                r"SiLU\(Conv\(x\)\) before the Slice of block 1, found Mul features",
            ),
            (
                [
                    (
                        "projected = Conv (x, in_proj)",
                        "projected = Conv (x, in_proj)\n    sums = Add (projected, projected)",
                    ),
                    ("features = Mul (convolved, gate)", "features = Mul (sums, gate)"),
                ],
                r"SiLU\(Conv\(x\)\) before the Slice of block 1",
            ),
            # Whoever else reads the map needs every position of it.
            (
                [("y = Add (x, mixed)", "beside = Conv (features, out_proj)\n    y = Add (beside, mixed)")],
                r"features of block 1 is also read by beside",
            ),
            # A convolution that shrinks, shifts or strides its map.
            (
                [
                    ("pads = [1, 1, 1, 1], ", "pads = [0, 0, 0, 0], "),
                    ("y = Add (x, mixed)", "y = Relu (mixed)"),
                ],
                r"convolved of block 1 does not keep the size",
            ),
            (
                [("pads = [1, 1, 1, 1], ", "pads = [2, 2, 0, 0], ")],
                r"convolved of block 1 does not keep the size",
            ),
            (
                [
                    ("pads = [1, 1, 1, 1], ", "pads = [1, 1, 1, 1], strides = [2, 2], "),
                    ("y = Add (x, mixed)", "y = Relu (mixed)"),
                ],
                r"convolved of block 1 does not keep the size",
            ),
        ],
    )
    def test_refuses(self, edits: list[tuple[str, str]], message: str) -> None:
        text = CHANNEL_FIRST
        for old, new in edits:
            text = edited(text, old, new)
        inserted, _ = run_passes(text_model(text), select(1), CANONICAL)
        assert_left_alone(inserted, message)

    @pytest.mark.parametrize("value", ["features", "convolved"])
    def test_refuses_a_map_that_is_an_output_of_the_graph(self, value: str) -> None:
        model = text_model(CHANNEL_FIRST, outputs=("y", value))
        inserted, _ = run_passes(model, select(1), CANONICAL)
        assert_left_alone(inserted, rf"{value} of block 1 is also read by the graph output")

    @pytest.mark.parametrize("value", ["convolved", "gate"])
    def test_refuses_a_convolution_that_is_read_elsewhere(self, value: str) -> None:
        text = edited(
            CHANNEL_FIRST,
            "y = Add (x, mixed)",
            f"beside = Conv ({value}, out_proj)\n    y = Add (beside, mixed)",
        )
        inserted, _ = run_passes(text_model(text), select(1), CANONICAL)
        assert_left_alone(inserted, r"block 1.*beside")

    @pytest.mark.parametrize("attributes", ["", 'kernel_shape = [1, 1], auto_pad = "SAME_UPPER", '])
    def test_takes_or_refuses_a_convolution_without_pads(self, attributes: str) -> None:
        text = edited(CHANNEL_FIRST, "kernel_shape = [3, 3], pads = [1, 1, 1, 1], ", attributes)
        model = text_model(text, weights={"conv": np.ones((D_INNER, 1, 1, 1), dtype=np.float32)})
        before, _ = run_passes(model, select(1), CANONICAL)
        try:
            after, _ = run_passes(model, select(1), HOISTED)
        except PassError as refusal:
            assert "block 1" in str(refusal)
        else:
            assert error(output(after, image(7, 9)), output(before, image(7, 9))) <= 1e-6

    def test_takes_or_refuses_a_dilated_convolution(self) -> None:
        text = edited(CHANNEL_FIRST, "pads = [1, 1, 1, 1], ", "pads = [1, 1, 1, 1], dilations = [2, 2], ")
        text = edited(text, "y = Add (x, mixed)", "y = Relu (mixed)")
        before, _ = run_passes(text_model(text), select(1), CANONICAL)
        try:
            after, _ = run_passes(text_model(text), select(1), HOISTED)
        except PassError as refusal:
            assert "block 1" in str(refusal)
        else:
            assert error(output(after, image(7, 9)), output(before, image(7, 9))) <= 1e-6


# sink_resize --------------------------------------------------------------------------------------------------------


def sunk(
    text: str, selection: Selection, *sizes: int, **weights: Array
) -> tuple[onnx.ModelProto, PassReport]:
    """Insert and sink, check that no number has changed, and return the model and what sink_resize reports."""
    model = text_model(text, *sizes, weights=weights)
    before, _ = run_passes(model, selection, CANONICAL)
    after, (_, report) = run_passes(model, selection, SUNK)
    x = image(*sizes) if sizes else image(7, 9)
    assert error(output(after, x), output(before, x)) <= 1e-6
    return after, report


class TestSink:
    """The restoring nodes move down to the first node that reads another map."""

    @pytest.mark.parametrize("sizes", [(), (7, 9), (8, 8)])
    @pytest.mark.parametrize("subsample", NEAREST)
    @pytest.mark.parametrize(
        ("form", "passed", "reader"),
        [
            ("channel_first", "LayerNormalization, Conv", "Add"),
            ("channel_last", "LayerNormalization, MatMul", "Add"),
            ("gated", "LayerNormalization", "Mul"),
        ],
    )
    def test_fires(
        self, form: str, passed: str, reader: str, subsample: Subsample, sizes: tuple[int, ...]
    ) -> None:
        model, report = sunk(FORMS[form], Selection((1,), subsample), *sizes)
        assert report.changed == [f"block 1: restored after {passed}"] and not report.refused
        restoring = [n for n in model.graph.node if n.name.rsplit("/", 1)[-1].startswith("restore")]
        assert restoring
        end = "normal" if form == "gated" else "mixed"
        # The value has its name still, now made by the restoring nodes, or by the transpose behind them.
        assert node_making(model, end).op_type == (
            "Transpose" if form != "channel_first" else restoring[-1].op_type
        )
        assert readers(model, end) == [reader]

    @pytest.mark.parametrize("subsample", INTERPOLATED)
    @pytest.mark.parametrize("form", sorted(FORMS))
    def test_reports_that_interpolation_mixes_positions(self, form: str, subsample: Subsample) -> None:
        model = text_model(FORMS[form], 7, 9)
        selection = Selection((1,), subsample)
        before, _ = run_passes(model, selection, CANONICAL)
        after, (report,) = run_passes(before, selection, (sink_resize,))
        assert report.changed == [] and list(report.refused) == [1]
        assert subsample.upsample in report.refused[1]
        assert main_graph(after) == main_graph(before)

    @pytest.mark.parametrize(
        ("line", "passed"),
        [
            ("scaled = Mul (first, by_channel)", "LayerNormalization, Mul, Conv"),
            ("scaled = Sub (by_channel, first)", "LayerNormalization, Sub, Conv"),
            ("scaled = Div (first, scalar)", "LayerNormalization, Div, Conv"),
            ("scaled = Gelu (first)", "LayerNormalization, Gelu, Conv"),
            ("scaled = Conv (first, square)", "LayerNormalization, Conv, Conv"),
        ],
    )
    def test_passes_what_acts_on_one_position_at_a_time(self, line: str, passed: str) -> None:
        text = edited(
            CHANNEL_FIRST, "mixed = Conv (first, out_proj)", f"{line}\n    mixed = Conv (scaled, out_proj)"
        )
        random = np.random.default_rng(0)
        _, report = sunk(
            text,
            select(1),
            by_channel=random.standard_normal((D_INNER, 1, 1)).astype(np.float32),
            scalar=np.float32(2),
            square=random.standard_normal((D_INNER, D_INNER, 1, 1)).astype(np.float32),
        )
        assert report.changed == [f"block 1: restored after {passed}"]

    @pytest.mark.parametrize(
        "line",
        [
            "scaled = Mul (first, by_position)",
            "scaled = Add (first, by_row)",
            "scaled = Mul (first, first)",
            "scaled = Softmax <axis = 3> (first)",
            "scaled = LayerNormalization <axis = 3> (first, row_scale)",
            "scaled = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 6> (first, conv)",
            "scaled = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (first)",
            "scaled = MatMul (first, row_matrix)",
            "scaled = Add (first, convolved)",
        ],
    )
    def test_stops_at_what_does_not(self, line: str) -> None:
        text = edited(
            CHANNEL_FIRST, "mixed = Conv (first, out_proj)", f"{line}\n    mixed = Conv (scaled, out_proj)"
        )
        random = np.random.default_rng(0)
        model, report = sunk(
            text,
            select(1),
            8,
            9,
            by_position=random.standard_normal((8, 9)).astype(np.float32),
            by_row=random.standard_normal((8, 1)).astype(np.float32),
            row_scale=random.standard_normal(9).astype(np.float32),
            row_matrix=random.standard_normal((9, 9)).astype(np.float32),
        )
        assert report.changed == ["block 1: restored after LayerNormalization"]
        assert readers(model, "first")

    @pytest.mark.parametrize(
        ("convolution", "begin"),
        [
            ("Conv <pads = [1, 1, 1, 1]>", 1),
            ("Conv <pads = [0, 0, 1, 1]>", 0),
            ("Conv <kernel_shape = [1, 1], pads = [1, 0, 0, 0]>", 0),
        ],
    )
    def test_stops_at_a_convolution_of_one_position_that_is_padded(
        self, convolution: str, begin: int
    ) -> None:
        """What it adds at the edges would be upsampled with the rest."""
        text = edited(
            CHANNEL_FIRST,
            "mixed = Conv (first, out_proj)",
            f"wide = {convolution} (first, square)\n    cut = Slice (wide, begins, ends, sides)\n"
            "    mixed = Conv (cut, out_proj)",
        )
        model, report = sunk(
            text,
            select(1),
            8,
            9,
            square=np.random.default_rng(0).standard_normal((D_INNER, D_INNER, 1, 1)).astype(np.float32),
            begins=np.array([begin, begin]),
            ends=np.array([begin + 8, begin + 9]),
            sides=np.array([2, 3]),
        )
        assert report.changed == ["block 1: restored after LayerNormalization"]
        assert readers(model, "first")

    @pytest.mark.parametrize("line", ["beside = Conv (scanned, out_proj)", "beside = ReduceMax (scanned)"])
    def test_leaves_a_map_that_is_read_twice(self, line: str) -> None:
        text = edited(CHANNEL_FIRST, "y = Add (x, mixed)", f"{line}\n    y = Add (beside, mixed)")
        model, report = sunk(text, select(1))
        assert report.changed == []
        assert list(report.refused) == [1]
        assert "Transpose last and" in report.refused[1] and "beside" in report.refused[1]
        assert node_making(model, "scanned").op_type == "Resize"

    def test_leaves_a_map_that_is_an_output_of_the_graph(self) -> None:
        model = text_model(CHANNEL_FIRST, outputs=("y", "scanned"))
        after, (_, report) = run_passes(model, select(1), SUNK)
        assert report.changed == []
        assert "the graph's outputs" in report.refused[1]
        assert run(lower(after), {"x": image(7, 9)})["scanned"].shape == (2, D_INNER, 7, 9)

    def test_stops_before_a_value_that_is_read_twice(self) -> None:
        text = edited(
            CHANNEL_FIRST,
            "y = Add (x, mixed)",
            "beside = Conv (first, out_proj)\n    y = Add (beside, mixed)",
        )
        model, report = sunk(text, select(1))
        assert report.changed == ["block 1: restored after LayerNormalization"]
        assert readers(model, "first") == ["Conv", "Conv"]

    def test_takes_a_block_that_ends_the_graph(self) -> None:
        text = edited(
            CHANNEL_FIRST,
            "    mixed = Conv (first, out_proj)\n    y = Add (x, mixed)\n",
            "    y = Conv (first, out_proj)\n",
        )
        sunk(text, select(1))


# lower and infer_shapes ---------------------------------------------------------------------------------------------


class TestLower:
    """Every scan gets a body."""

    def test_one_function_serves_blocks_that_share_a_variant(self) -> None:
        model = lower(text_model(chained(CHANNEL_FIRST, 3)))
        assert [(f.domain, f.name, f.overload) for f in model.functions] == [(DOMAIN, SELECTIVE_SCAN_2D, "")]
        onnx.checker.check_model(model, full_check=True)

    def test_variants_get_functions_of_their_own(self) -> None:
        text = chained(CHANNEL_FIRST, 3)
        text = text.replace("dt_bias, dt_weight)", "dt_bias, dt_weight_2)", 1)
        lines = text.splitlines()
        second = next(i for i, line in enumerate(lines) if line.strip().startswith("scanned_2"))
        lines[second] = lines[second].replace("softplus = 1", "softplus = 0")
        parameters = {"dt_weight_2": block_weights()["dt_weight"]}
        model = lower(text_model("\n".join(lines) + "\n", weights=parameters))
        assert [function.overload for function in model.functions] == ["", "variant_1"]
        nodes = [node for node in model.graph.node if node.op_type == SELECTIVE_SCAN_2D]
        assert [node.overload for node in nodes] == ["", "variant_1", ""]
        onnx.checker.check_model(model, full_check=True)
        assert output(text_model("\n".join(lines) + "\n", weights=parameters), image(4, 5)).shape == (
            2,
            4,
            4,
            5,
        )

    def test_lowering_twice_changes_nothing(self) -> None:
        once = lower(text_model(CHANNEL_FIRST))
        assert main_graph(lower(once)) == main_graph(once)

    def test_functions_of_others_stay(self) -> None:
        model = text_model(CHANNEL_FIRST)
        other = helper.make_function(
            "other",
            "Twice",
            ["x"],
            ["y"],
            [helper.make_node("Add", ["x", "x"], ["y"])],
            [helper.make_opsetid("", 20)],
        )
        model.functions.append(other)
        assert [function.name for function in lower(model).functions] == ["Twice", SELECTIVE_SCAN_2D]

    def test_the_operators_domain_is_imported(self) -> None:
        model = text_model(CHANNEL_FIRST)
        del model.opset_import[1:]
        imported = {item.domain: item.version for item in lower(model).opset_import}
        assert imported == {"": 20, DOMAIN: 1}

    def test_refuses_an_unknown_body(self) -> None:
        with pytest.raises(PassError, match=r"'scann'.*scan"):
            lower(text_model(CHANNEL_FIRST), "scann")

    def test_refuses_a_state_matrix_that_is_computed(self) -> None:
        text = edited(CHANNEL_FIRST, "(features, dt, B, C, A, D,", "(features, dt, B, C, negative, D,")
        text = edited(
            text,
            "narrow = Conv (features, x_proj)",
            "negative = Neg (A)\n    narrow = Conv (features, x_proj)",
        )
        with pytest.raises(PassError, match=r"negative of block_1/scan is no constant"):
            lower(text_model(text))

    def test_a_graph_without_scans_is_left_alone(self) -> None:
        model = text_model("\n    y = Relu (x)\n")
        lowered = lower(model)
        assert lowered.ir_version == 9
        lowered.ir_version = model.ir_version
        assert main_graph(lowered) == main_graph(model)


class TestInferShapes:
    """Shapes of values, although scans have no body yet."""

    def test_every_value_gets_its_shape(self) -> None:
        model = infer_shapes(text_model(CHANNEL_LAST, 8, 9))
        shapes = {
            value.name: [size.dim_value or size.dim_param for size in value.type.tensor_type.shape.dim]
            for value in model.graph.value_info
        }
        assert {name for node in model.graph.node for name in node.output} - set(shapes) == {"y"}
        assert shapes["scanned"] == ["batch", D_INNER, 8, 9] and shapes["normal"] == ["batch", 8, 9, D_INNER]

    def test_large_weights_do_not_matter(self) -> None:
        large = {"out_proj": np.zeros((4000, D_INNER, 1, 1), dtype=np.float32)}
        model = text_model(
            edited(CHANNEL_FIRST, "y = Add (x, mixed)", "y = Relu (mixed)"), 8, 9, weights=large
        )
        inferred = infer_shapes(model)
        assert [tensor.name for tensor in inferred.graph.initializer] == [
            t.name for t in model.graph.initializer
        ]
        assert [value.name for value in inferred.graph.input] == ["x"]
        (mixed,) = (value for value in inferred.graph.value_info if value.name == "mixed")
        assert mixed.type.tensor_type.shape.dim[1].dim_value == 4000

    def test_shapes_that_are_wrong_are_replaced(self) -> None:
        model = text_model(CHANNEL_FIRST, 8, 9)
        model.graph.value_info.append(
            helper.make_tensor_value_info("scanned", onnx.TensorProto.FLOAT, [1, 2, 3, 4])
        )
        found = [value for value in infer_shapes(model).graph.value_info if value.name == "scanned"]
        assert [size.dim_value for size in found[0].type.tensor_type.shape.dim] == [0, D_INNER, 8, 9]

    def test_a_graph_that_contradicts_itself_is_refused(self) -> None:
        model = text_model(edited(CHANNEL_FIRST, "y = Add (x, mixed)", "y = Add (last, mixed)"), 8, 9)
        with pytest.raises(PassError, match="contradiction"):
            infer_shapes(model)


def test_a_scan_with_full_time_steps_is_pruned_and_lowered_too() -> None:
    """Plans do not care whether dt is low rank: here it comes from the projection at full width."""
    case = scan_case(d_inner=D_INNER, d_state=2, rank=None)
    text = edited(CHANNEL_FIRST, "dt_bias, dt_weight)", "dt_bias)")
    random = np.random.default_rng(0)
    weights = {
        "x_proj": random.standard_normal((4 * D_INNER + 16, D_INNER, 1, 1)).astype(np.float32),
        "parts": np.array([4 * D_INNER, 8, 8]),
        "A": case.tensors[4].float().numpy(),
    }
    model = text_model(text, weights=weights)
    canonical, _ = run_passes(model, select(1), CANONICAL)
    optimized, _ = run_passes(model, select(1), OPTIMIZED)
    x = image(7, 9)
    assert error(output(optimized, x), output(canonical, x)) <= 1e-6
    assert error(output(canonical, x), output(model, x)) > 1e-3
