"""cast_precision: the type of every value, the float32 islands, few casts, and numbers that stay within the tolerance.

Graphs are those of `helpers`. What a 16-bit runtime would compute is shown by `rounded_in_float32`, which has tests of
its own at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
import torch
from helpers import (
    CHANNEL_FIRST,
    CHANNEL_LAST,
    GATED,
    Array,
    block_weights,
    chained,
    digits,
    error,
    image,
    images_for,
    main_graph,
    output_errors,
    reference,
    run,
    run_session,
    session,
    text_model,
    torch_outputs,
    traced,
    traced_digits,
    with_outputs,
)
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from reference_models import tiny

from quartermap_deploy.architectures import load_card
from quartermap_deploy.data.digits import load_digits
from quartermap_deploy.data.images import prepare
from quartermap_deploy.errors import ExportError, PassError, UnknownNameError
from quartermap_deploy.exporting.export import export, export_onnx
from quartermap_deploy.frontend.exporter import INPUT
from quartermap_deploy.lowering.element_types import SIXTEEN_BIT, types_of_values
from quartermap_deploy.lowering.operator import DOMAIN, INPUTS_2D
from quartermap_deploy.passes import Selection, infer_shapes, lower, run_passes, write_gelu
from quartermap_deploy.passes.block_parts import block_parts
from quartermap_deploy.passes.cast_precision import cast_precision
from quartermap_deploy.pruning.plan import QuarterMap, Subsample
from quartermap_deploy.pruning.reference import prune
from quartermap_deploy.sources.architectures import architecture_source
from quartermap_deploy.validation.rounding import has_16_bits, rounded_in_float32
from quartermap_deploy.validation.runners import with_block_outputs

FORMS = {"channel_first": CHANNEL_FIRST, "channel_last": CHANNEL_LAST, "gated": GATED}
PRECISIONS = sorted(SIXTEEN_BIT)
FLOAT, INT64 = int(TensorProto.FLOAT), int(TensorProto.INT64)
TOLERANCES = {"float16": 5e-3, "bfloat16": 3e-2}
HEAD = """
    pooled = GlobalAveragePool (y)
    logits = Conv (pooled, head)
"""
WEIGHTS = {
    "head": np.random.default_rng(9).standard_normal((3, 4, 1, 1)).astype(np.float32),
    # The blocks of `helpers` do not normalise what they read, so that B and C would take later scans out of range.
    "x_proj": block_weights()["x_proj"] / 6,
}

precisions = st.sampled_from(PRECISIONS)


def blocks(form: str, count: int, head: bool = True) -> onnx.ModelProto:
    """Return some blocks, whose outputs are named as the exporter names them, and a classifier head."""
    text = chained(FORMS[form], count)
    for index in range(1, count):
        text = text.replace(f"y_{index} ", f"block_{index} ").replace(f"y_{index},", f"block_{index},")
        text = text.replace(f"y_{index})", f"block_{index})")
    text = text.replace("    y = ", f"    block_{count} = ")
    closing = HEAD.replace("(y)", f"(block_{count})") if head else f"\n    y = Relu (block_{count})\n"
    return text_model(text + closing, weights=WEIGHTS, outputs=["logits" if head else "y"])


def weight(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    (found,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    return found


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (found,) = (item for item in model.graph.node if item.name == name)
    return found


def casts(model: onnx.ModelProto) -> list[tuple[str, str]]:
    return [(item.input[0], item.output[0]) for item in model.graph.node if item.op_type == "Cast"]


def require_few_casts(model: onnx.ModelProto) -> None:
    """No value is cast twice to one type, no cast is cast, none changes nothing, and somebody reads each."""
    types, made = types_of_values(model.graph), dict(map(reversed, casts(model)))
    read = {name for item in model.graph.node for name in item.input} | {o.name for o in model.graph.output}
    assert len({(source, types[result]) for source, result in casts(model)}) == len(casts(model))
    for source, result in casts(model):
        assert source not in made
        assert types[source] != types[result]
        assert result in read


def half(precision: str) -> int:
    return SIXTEEN_BIT[precision].number


# Types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("form", sorted(FORMS))
def test_every_value_has_the_type_that_it_should(form: str, precision: str) -> None:
    typed, report = cast_precision(blocks(form, 2), precision)
    types = types_of_values(typed.graph)
    for item in typed.graph.node:
        made = {types[name] for name in item.output if name in types}
        if item.op_type == "Cast":
            continue
        assert made == {FLOAT if item.name in ("pooled", "logits") else half(precision)}, item.name
        if item.domain == DOMAIN:
            wanted = [FLOAT if name in ("A", "D", "dt_bias") else half(precision) for name in INPUTS_2D]
            assert [types[name] for name in item.input] == wanted
    integers = {tensor.name for tensor in typed.graph.initializer if tensor.data_type == INT64}
    assert "parts" in integers
    assert [info.type.tensor_type.elem_type for info in (*typed.graph.input, *typed.graph.output)] == [
        FLOAT
    ] * 2
    assert casts(typed) == [("x", f"x/to_{precision}"), ("block_2", "block_2/to_float32")]
    assert set(report.kept) == {"pooled", "logits"}
    assert report.casts == 2
    assert report.operators["float32"] == 2
    assert report.precision == precision


@given(
    form=st.sampled_from(sorted(FORMS)),
    count=st.integers(1, 3),
    head=st.booleans(),
    precision=precisions,
    same=st.booleans(),
    pruned=st.booleans(),
    known=st.booleans(),
    data=st.data(),
)
def test_small_graphs_stay_valid_and_right(
    form: str,
    count: int,
    head: bool,
    precision: str,
    same: bool,
    pruned: bool,
    known: bool,
    data: st.DataObject,
) -> None:
    model = blocks(form, count, head)
    if known:
        for axis, size in ((2, 7), (3, 9)):
            model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size
    if pruned:
        model, _ = run_passes(model, Selection((1,), Subsample()))
    names = [item.name for item in model.graph.node if item.op_type not in ("Shape", "Concat")]
    values = [name for name, kind in types_of_values(infer_shapes(model).graph).items() if kind == FLOAT]
    keep = data.draw(st.lists(st.sampled_from(sorted({*names, *values})), max_size=4, unique=True))
    back = data.draw(st.lists(st.integers(1, count), max_size=2, unique=True))
    io = "same" if same else "float32"
    before = main_graph(model)
    typed, _ = cast_precision(model, precision, keep_float32=keep, blocks_float32=back, io=io)  # type: ignore[arg-type]
    assert main_graph(model) == before

    if has_16_bits(typed):
        again, report = cast_precision(typed, precision)
        assert again.SerializeToString() == typed.SerializeToString()
        assert report.changed == []
    else:
        assert len(back) == count

    require_few_casts(typed)
    types = types_of_values(typed.graph)
    end = half(precision) if same else FLOAT
    assert {types[info.name] for info in (*typed.graph.input, *typed.graph.output)} == {end}
    made = {name for item in typed.graph.node for name in item.output}
    assert {f"block_{i}" for i in range(1, count + 1)} <= made
    for name in keep:
        if name in names and name not in made:
            assert types[node(typed, name).output[0]] == FLOAT
    for block in back:
        assert types[f"block_{block}"] == FLOAT

    lowered = lower(typed)
    onnx.checker.check_model(lowered, full_check=True)
    x = image(7, 9)
    (expected,) = run(lower(model), {"x": x}).values()
    (found,) = run(rounded_in_float32(lowered), {"x": x}).values()
    assert error(found, expected) <= TOLERANCES[precision]


@pytest.mark.parametrize("form", sorted(FORMS))
def test_onnx_runtime_takes_float16_and_refuses_bfloat16(form: str) -> None:
    model, x = blocks(form, 2), image(6, 8)
    expected = run(lower(model), {"x": x})["logits"]
    typed, _ = cast_precision(model, "float16")
    found = run(lower(typed), {"x": x})["logits"]
    assert found.dtype == np.float32
    assert error(found, expected) <= TOLERANCES["float16"]
    # When this fails, ONNX Runtime has learned bfloat16 and `rounding` should say so.
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        session(lower(cast_precision(model, "bfloat16")[0]))


def test_inputs_and_outputs_can_have_the_same_type() -> None:
    typed, _ = cast_precision(blocks("channel_first", 1), "float16", io="same")
    x = image(4, 5)
    found = run(lower(typed), {"x": x.astype(np.float16)})["logits"]
    assert found.dtype == np.float16
    assert casts(typed) == [("block_1", "block_1/to_float32"), ("logits/float32", "logits")]
    assert error(found, run(lower(blocks("channel_first", 1)), {"x": x})["logits"]) <= 5e-3


def test_a_graph_output_among_the_typed_values_keeps_its_name() -> None:
    model = with_outputs(blocks("channel_first", 2), ["block_1"])
    typed, _ = cast_precision(model, "float16")
    assert ("block_1/float16", "block_1") in casts(typed)
    assert "block_1" not in {name for item in typed.graph.node for name in item.input}
    require_few_casts(typed)
    x = image(5, 5)
    outputs = run(lower(typed), {"x": x})
    assert error(outputs["block_1"], run(lower(model), {"x": x})["block_1"]) <= 5e-3


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_body_serves_blocks_of_both_types(precision: str) -> None:
    typed, _ = cast_precision(blocks("gated", 3), precision, blocks_float32=[2])
    lowered = lower(typed)
    assert len(lowered.functions) == 1
    types = types_of_values(typed.graph)
    assert [types[f"scanned_{i}"] for i in (1, 2, 3)] == [half(precision), FLOAT, half(precision)]
    onnx.checker.check_model(lowered, full_check=True)
    if precision == "float16":
        x = image(5, 6)
        assert (
            error(run(lowered, {"x": x})["logits"], run(lower(blocks("gated", 3)), {"x": x})["logits"])
            <= 5e-3
        )


def test_bfloat16_has_the_opset_that_knows_it_for_all_operators() -> None:
    lowered = lower(cast_precision(blocks("gated", 1), "bfloat16")[0])
    versions = {item.domain: item.version for item in lowered.opset_import}
    assert versions[""] == 22
    assert {item.version for function in lowered.functions for item in function.opset_import} == {22}
    assert {i.domain: i.version for i in cast_precision(blocks("gated", 1), "float16")[0].opset_import}[
        ""
    ] == 20


# Islands ------------------------------------------------------------------------------------------------------------


def test_a_named_operator_computes_in_float32() -> None:
    model = blocks("channel_first", 2)
    node(model, "mixed_1").name = "projection"
    typed, report = cast_precision(model, "float16", keep_float32=["projection"])
    types = types_of_values(typed.graph)
    assert types["mixed_1"] == FLOAT
    assert types["block_1"] == half("float16")
    assert types["first_1"] == half("float16")
    assert weight(typed, "out_proj").data_type == FLOAT
    # The second block reads the same weight in 16 bits.
    assert weight(typed, "out_proj/to_float16").data_type == half("float16")
    assert report.kept["projection"] == "named by the caller"
    assert ("first_1", "first_1/to_float32") in casts(typed)


def test_a_named_value_is_float32_where_it_is_made_and_read() -> None:
    typed, _ = cast_precision(blocks("channel_first", 1), "float16", keep_float32=["convolved_1"])
    types = types_of_values(typed.graph)
    assert {types[name] for name in ("convolved_1", "gate_1", "features_1")} == {FLOAT}
    assert {types[name] for name in ("projected_1", "narrow_1", "block_1")} == {half("float16")}


def test_a_named_input_of_a_scan_takes_the_scan_with_it() -> None:
    typed, _ = cast_precision(blocks("channel_first", 1), "bfloat16", keep_float32=["features_1"])
    types = types_of_values(typed.graph)
    scan = node(typed, "block_1/scan")
    assert {types[name] for name in scan.input} == {FLOAT}
    assert types["scanned_1"] == FLOAT
    assert weight(typed, "dt_weight").data_type == FLOAT
    onnx.checker.check_model(lower(typed), full_check=True)


def test_what_is_moved_on_to_operators_of_16_bits_is_moved_in_16_bits() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 20]>
        agraph (float[2, 3] x) => (float[3, 2] z)
        { a = Sin (x)  moved = Transpose (a)  y = Cos (moved)  z = Neg (y) }
    """)
    typed, _ = cast_precision(model, "float16", keep_float32=["x"])
    types = types_of_values(typed.graph)
    assert [types[name] for name in ("a", "moved", "y")] == [FLOAT, half("float16"), half("float16")]


@pytest.mark.parametrize(
    "move",
    [
        "Flatten (a)",
        "Gather (a, one)",
        "Identity (a)",
        "Reshape (a, shape)",
        "Slice (a, one, shape)",
        "Squeeze (a)",
        "Transpose (a)",
        "Unsqueeze (a, one)",
    ],
)
def test_what_is_moved_between_operators_of_32_bits_is_moved_in_32_bits(move: str) -> None:
    model = onnx.parser.parse_model(f"""
        <ir_version: 9, opset_import: ["" : 20]>
        agraph (float[2, 3] x) => (float[] z) <int64[1] one = {{1}}, int64[1] shape = {{-1}}>
        {{ b = Neg (x)  a = Sin (b)  moved = {move}  y = Cos (moved)  z = Neg (y) }}
    """)
    for item in model.graph.node:
        item.name = f"make_{item.output[0]}"
    typed, report = cast_precision(infer_shapes(model), "float16", keep_float32=["make_a", "make_y"])
    types = types_of_values(typed.graph)
    assert [types[name] for name in ("a", "moved", "y")] == [FLOAT] * 3
    assert report.kept["make_moved"] == "between float32 operators"


def test_what_is_moved_on_from_an_input_has_16_bits_unless_it_is_named() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 20]>
        agraph (float[2, 3] x) => (float[3, 2] y) { moved = Transpose (x)  y = Sin (moved) }
    """)
    typed, _ = cast_precision(model, "float16", keep_float32=["y"])
    assert types_of_values(typed.graph)["moved"] == half("float16")


def test_values_are_not_cast_to_and_fro_on_their_way_between_float32_operators() -> None:
    keep = ["scanned_1", "normal_1"]
    typed, report = cast_precision(blocks("channel_first", 1), "float16", keep_float32=keep)
    # A Transpose stands between the scan and the normalisation, and another behind it.
    assert types_of_values(typed.graph)["last_1"] == FLOAT
    assert not {"last_1", "scanned_1"} & {source for source, _ in casts(typed)}
    assert report.kept["last_1"] == "scanned_1 was named by the caller"


@pytest.mark.parametrize(("block", "inside"), [(1, "mixed_1"), (2, "mixed_2"), (3, "mixed_3")])
def test_a_block_in_float32_is_that_block(block: int, inside: str) -> None:
    typed, _ = cast_precision(blocks("channel_last", 3), "float16", blocks_float32=[block])
    types = types_of_values(typed.graph)
    for index in (1, 2, 3):
        names = [f"{stem}_{index}" for stem in ("wide", "features", "scanned", "normal", "mixed")]
        assert {types[name] for name in names} == {FLOAT if index == block else half("float16")}
    assert types[inside] == FLOAT


def test_the_parts_of_a_graph_are_all_of_it() -> None:
    model = blocks("gated", 3)
    parts = block_parts(model.graph)
    assert sorted(parts) == [0, 1, 2, 3]
    assert [item.name for item in parts[0]] == ["pooled", "logits"]
    assert sum(map(len, parts.values())) == len(model.graph.node)


def test_weights_beyond_the_range_stay_float32() -> None:
    weights = block_weights()
    large = weights["in_proj"].copy()
    large[0, 0] = 7e4
    model = text_model(CHANNEL_FIRST, weights={"in_proj": large})
    typed, report = cast_precision(model, "float16")
    assert weight(typed, "in_proj").data_type == FLOAT
    assert np.array_equal(numpy_helper.to_array(weight(typed, "in_proj")), large)
    assert "7e+04" in report.kept["in_proj"]
    assert "65504" in report.kept["in_proj"] or "6.55e+04" in report.kept["in_proj"]
    assert "in_proj" in report.kept["projected"]
    assert any("in_proj" in line for line in report.changed)
    # bfloat16 reaches as far as float32.
    typed, report = cast_precision(model, "bfloat16")
    assert weight(typed, "in_proj").data_type == half("bfloat16")
    assert "in_proj" not in report.kept


def test_weights_too_small_for_the_type_stay_float32() -> None:
    tiny = block_weights()["conv"] * np.float32(1e-6)
    typed, report = cast_precision(text_model(CHANNEL_FIRST, weights={"conv": tiny}), "float16")
    assert weight(typed, "conv").data_type == FLOAT
    assert "too small" in report.kept["conv"]
    assert report.subnormal["conv"] == 1.0
    # One small element among others of ordinary size does no harm.
    mixed = block_weights()["conv"].copy()
    mixed[0, 0, 0] = 1e-7
    typed, report = cast_precision(text_model(CHANNEL_FIRST, weights={"conv": mixed}), "float16")
    assert weight(typed, "conv").data_type == half("float16")
    assert report.subnormal["conv"] == round(3 / mixed.size, 4)


def test_statistics_are_float32() -> None:
    text = CHANNEL_FIRST.replace(
        "    y = Add (x, mixed)",
        "    normal2 = BatchNormalization (mixed, scale, shift, mean, variance)\n    y = Add (x, normal2)",
    ).replace("<axis = -1> (last", "<axis = -1, stash_type = 16> (last")
    own = {name: np.ones(4, np.float32) for name in ("scale", "shift", "mean", "variance")}
    typed, _ = cast_precision(text_model(text, weights=own), "float16")
    attributes = {a.name: a.i for a in node(typed, "normal").attribute}
    assert attributes["stash_type"] == FLOAT
    assert {weight(typed, name).data_type for name in own} == {FLOAT}
    assert types_of_values(typed.graph)["normal2"] == half("float16")
    run(lower(typed), {"x": image(4, 4)})


def test_operators_without_a_form_of_the_type_stay_float32() -> None:
    text = CHANNEL_FIRST.replace(
        "    y = Add (x, mixed)",
        """    size = Shape <start = 2, end = 3> (mixed)
    width = Squeeze (size)
    wide = Cast <to = 1> (width)
    zero = Constant <value = float {0.0}> ()
    one = Constant <value = float {1.0}> ()
    ramp = Range (zero, wide, one)
    column = Unsqueeze (ramp, last_axis)
    shifted = Add (mixed, column)
    y = Add (x, shifted)""",
    )
    model = text_model(text, weights={"last_axis": np.array([1])})
    typed, report = cast_precision(model, "float16")
    types = types_of_values(typed.graph)
    assert types["ramp"] == FLOAT
    assert types["shifted"] == half("float16")
    assert "Range" in report.kept["ramp"]
    x = image(5, 6)
    assert error(run(lower(typed), {"x": x})["y"], run(lower(model), {"x": x})["y"]) <= 5e-3


# Refusals -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_typed_is_refused() -> None:
    model = blocks("gated", 2)
    with pytest.raises(UnknownNameError, match="float16"):
        cast_precision(model, "float61")
    with pytest.raises(PassError, match=r"before lower"):
        cast_precision(lower(model), "float16")
    with pytest.raises(PassError, match=r"bfloat16 already.*float32 graph"):
        cast_precision(cast_precision(model, "bfloat16")[0], "float16")
    with pytest.raises(PassError, match=r"did you mean mixed_2 or mixed_1"):
        cast_precision(model, "float16", keep_float32=["mixed_"])
    for block in (0, 3):
        with pytest.raises(PassError, match="2 blocks"):
            cast_precision(model, "float16", blocks_float32=[block])
    with pytest.raises(PassError, match="expected float32 or same"):
        cast_precision(model, "float16", io="int8")  # type: ignore[arg-type]


def test_subgraphs_are_refused() -> None:
    model = blocks("gated", 1)
    inner = helper.make_graph([], "inner", [], [])
    model.graph.node.append(helper.make_node("If", ["condition"], ["z"], name="branch", then_branch=inner))
    with pytest.raises(PassError, match=r"If branch has a subgraph"):
        cast_precision(model, "float16")


# Whole models -------------------------------------------------------------------------------------------------------


def selected(depths: Sequence[int]) -> Selection:
    plan = QuarterMap()
    return Selection(plan.select(depths), plan.subsample)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["digits", "medmamba"])
def test_whole_models_are_right_at_every_block(name: str, precision: str) -> None:
    if name == "digits":
        (model, images), graph = digits(), traced_digits()
    else:
        model, images, graph = reference(name).model, images_for(name, 2), traced(name)
    pruned, _ = run_passes(graph, selected(model.depths))
    typed, report = cast_precision(pruned, precision)
    assert report.casts == 2
    assert report.operators["float32"] == 2
    lowered = lower(typed)
    onnx.checker.check_model(lowered, full_check=True)
    marked = with_block_outputs(rounded_in_float32(lowered))
    expected = torch_outputs(prune(model, QuarterMap()), images)
    errors = output_errors(run(marked, {INPUT: images}), expected)
    assert max(errors.values()) <= TOLERANCES[precision], errors
    # Were the casts left out, the errors would be those of float32.
    assert max(errors.values()) >= 1e-4


def test_the_held_out_digits_are_read_as_in_float32() -> None:
    model, _ = digits()
    images = prepare(list(load_digits().held_out.images), load_card("vmamba_digits").preprocessing)
    batches = np.array_split(images, 10)
    pruned, _ = run_passes(traced_digits(), selected(model.depths))
    pruned_model = prune(model, QuarterMap())
    with torch.inference_mode():
        expected = np.concatenate(
            [pruned_model(torch.from_numpy(part)).argmax(1).numpy() for part in batches]
        )
    for precision in PRECISIONS:
        ready = session(rounded_in_float32(lower(cast_precision(pruned, precision)[0])))
        found = np.concatenate([run_session(ready, {INPUT: part})["logits"].argmax(1) for part in batches])
        assert (found == expected).mean() >= 0.995, precision


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_export_writes_types(precision: str) -> None:
    model = tiny("v2")
    images = np.random.default_rng(0).standard_normal((3, 3, 64, 64)).astype(np.float32)
    plan = QuarterMap(every=2, exclude_stages=())
    source = architecture_source(model, (1, 3, 64, 64))
    exported = export(source, plan, precision=precision, calibration={INPUT: images})
    assert exported.cast is not None
    assert exported.passes[-1] is exported.cast
    assert exported.cast.operators[precision] > 20
    assert (exported.ranges is not None) == (precision == "float16")
    assert types_of_values(exported.float32.graph)["block_1"] == FLOAT
    assert types_of_values(exported.model.graph)["block_1"] == half(precision)
    again, _ = cast_precision(exported.float32, precision)
    assert lower(write_gelu(again)).SerializeToString() == exported.model.SerializeToString()
    with torch.inference_mode():
        expected = prune(model, plan)(torch.from_numpy(images)).numpy()
    found = run(rounded_in_float32(exported.model), {INPUT: images})["logits"]
    assert error(found, expected) <= TOLERANCES[precision]


def test_an_unknown_precision_is_refused_by_the_export() -> None:
    model, images = digits()
    with pytest.raises(ExportError, match="bfloat16"):
        export_onnx(model, tuple(images.shape), precision="fp16")
    with pytest.raises(ExportError, match="float32, same"):
        export_onnx(model, tuple(images.shape), io="half")  # type: ignore[arg-type]


# The rounded form ---------------------------------------------------------------------------------------------------


def products(precision: str) -> tuple[onnx.ModelProto, Array]:
    """Return y = (1000·x)·0.001, whose middle is beyond float16 for the first element of the given x."""
    header = '<ir_version: 10, opset_import: ["": 20]> products (float[n] x) => (float[n] y)'
    model = onnx.parser.parse_model(header + "{a = Mul (x, big) y = Mul (a, small)}")
    for name, value in (("big", 1000), ("small", 0.001)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    return cast_precision(model, precision)[0], np.array([100, 1.234567, 3e-4], np.float32)


def test_onnx_runtime_does_not_show_an_overflow_of_float16_and_the_rounded_form_does() -> None:
    typed, x = products("float16")
    # When this fails, ONNX Runtime has kernels of its own, and `rounding` should say so.
    assert np.isfinite(run(typed, {"x": x})["y"]).all()
    assert np.isinf(run(rounded_in_float32(typed), {"x": x})["y"][0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_rounded_form_rounds_after_every_operator(precision: str) -> None:
    kind = SIXTEEN_BIT[precision]
    typed, x = products(precision)

    def rounded(values: Array) -> Array:
        return kind.rounded(values.astype(np.float32)).astype(np.float32)

    expected = rounded(rounded(rounded(x) * rounded(np.array(1000))) * rounded(np.array(0.001)))
    assert np.array_equal(run(rounded_in_float32(typed), {"x": x})["y"], expected)


def test_the_rounded_form_has_the_names_and_float32_types() -> None:
    typed, _ = cast_precision(blocks("gated", 2), "bfloat16", io="same")
    form = rounded_in_float32(lower(typed))
    onnx.checker.check_model(form, full_check=True)
    made = {name for item in form.graph.node for name in item.output}
    # The output of a scan is named after its node, as parity wants it.
    expected = {
        item.name if item.domain == "quartermap" else name
        for item in typed.graph.node
        for name in item.output
    }
    assert expected <= made
    types = types_of_values(form.graph)
    still = [name for name, kind in types.items() if kind == half("bfloat16")]
    assert all(name.startswith("rounded/") for name in still)
    model = blocks("gated", 2)
    assert rounded_in_float32(model) is model
