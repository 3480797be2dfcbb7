"""Files without functions: one form of names and numbers, and what sessions and validation make of them."""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import toy_bundles
import toy_modules
from helpers import (
    digits,
    images_for,
    main_graph,
    onnx_outputs,
    output_errors,
    reference,
    run,
    torch_outputs,
    traced,
    traced_digits,
)
from made_once import made_once
from onnx import TensorProto, helper

import quartermap_deploy as qm
from quartermap_deploy.bundle import Bundle, load_bundle
from quartermap_deploy.compiler import compile_module
from quartermap_deploy.errors import BundleError, RecipeError
from quartermap_deploy.lowering.versions import opset_of
from quartermap_deploy.passes import Selection, infer_shapes, lower, run_passes
from quartermap_deploy.passes.cast_precision import cast_precision
from quartermap_deploy.passes.settle_shapes import settle_shapes
from quartermap_deploy.pruning.plan import Subsample
from quartermap_deploy.revalidate import validate_bundle
from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession
from quartermap_deploy.validation.rounding import rounded_in_float32
from quartermap_deploy.validation.runners import with_block_outputs

inline_scans_module = importlib.import_module("quartermap_deploy.passes.inline_scans")
NAMES = ("vmamba_s2_channel_first", "medmamba")


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


def check_form(model: onnx.ModelProto) -> None:
    """No function, no domain but ONNX's own, and every name there once and not empty."""
    onnx.checker.check_model(model, full_check=True)
    assert not model.functions and {entry.domain for entry in model.opset_import} == {""}
    every = list(graphs(model.graph))
    nodes = Counter(node.name for graph in every for node in graph.node)
    values = Counter(name for graph in every for node in graph.node for name in node.output)
    values.update(value.name for graph in every for value in (*graph.input, *graph.initializer))
    assert max(nodes.values()) == 1 and "" not in nodes
    assert max(values.values()) == 1 and "" not in values
    assert all(not node.domain for graph in every for node in graph.node)
    typed = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    assert typed.issuperset(name for node in model.graph.node for name in node.output)
    # What a loop reads comes in by its inputs.
    for graph in every[1:]:
        known = {value.name for value in graph.input} | {name for node in graph.node for name in node.output}
        assert known.issuperset(name for node in graph.node for name in node.input)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers_without_functions(name: str) -> None:
    lowered = lower(traced(name))
    before = lowered.SerializeToString()
    flat = qm.inline(lowered)
    assert lowered.SerializeToString() == before
    check_form(flat)
    assert opset_of(flat) == 20 and flat.ir_version == 9
    images = images_for(name, 3)
    found, usual = onnx_outputs(flat, images), onnx_outputs(lowered, images)
    for output, value in usual.items():
        np.testing.assert_array_equal(found[output], value)
    errors = output_errors(found, torch_outputs(reference(name).model, images))
    assert not max(errors.values()) > 1e-5
    assert main_graph(qm.inline(flat)) == main_graph(flat)


def test_pruned_blocks_are_written_out_too() -> None:
    shaped, _ = run_passes(traced("medmamba"), Selection((2, 4), Subsample(2, 1, "nearest")))
    lowered = lower(shaped)
    flat = qm.inline(lowered)
    check_form(flat)
    feeds = {"images": images_for("medmamba", 2)}
    np.testing.assert_array_equal(run(flat, feeds)["logits"], run(lowered, feeds)["logits"])


def test_validation_finds_every_scan_of_a_file_without_functions() -> None:
    lowered = lower(traced_digits())
    flat = qm.inline(lowered)
    _, images = digits()
    found, usual = (run(with_block_outputs(model), {"images": images}) for model in (flat, lowered))
    assert list(found) == list(usual) and sum(name.endswith("/scan") for name in found) == 10
    for name, value in usual.items():
        np.testing.assert_array_equal(found[name], value)


def test_16_bits_stay_16_bits() -> None:
    typed, _ = cast_precision(
        run_passes(traced("medmamba"), Selection((), Subsample(2, 1, "nearest")))[0], "float16"
    )
    lowered = lower(typed)
    flat = qm.inline(lowered)
    check_form(flat)
    feeds = {"images": images_for("medmamba", 2)}
    found, usual = (run(with_block_outputs(rounded_in_float32(model)), feeds) for model in (flat, lowered))
    assert list(found) == list(usual) and "block_1/scan" in found
    for name, value in usual.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_loop_gets_what_it_reads_from_around_and_nothing_for_an_input_that_is_left_out() -> None:
    text = """
        <ir_version: 9, opset_import: ["": 20]>
        g (float[4] x, float most) => (float[4] y) {
            zero = Constant <value = float {0}> ()
            last, y = Scan <num_scan_inputs = 1, body = b (float s, float item) => (float s_next, float made) {
                made = Clip (item, , most)
                s_next = Add (s, made)
            }> (zero, x)
        }
    """
    model = onnx.parser.parse_model(text)
    feeds = {"x": np.array([1, 5, 2, 9], np.float32), "most": np.array(4, np.float32)}
    before = run(model, feeds)["y"]
    scan = model.graph.node[1]
    scan.name = "loop"
    inline_scans_module._close(scan)
    assert list(scan.input) == ["zero", "most", "x"]
    np.testing.assert_array_equal(run(model, feeds)["y"], before)


# IR versions ------------------------------------------------------------------------------------------------------


def test_the_ir_version_is_the_lowest_that_is_valid() -> None:
    lowered = lower(traced("medmamba"))
    assert lowered.ir_version == 9 and not any(f.HasField("overload") for f in lowered.functions)
    assert not any(node.HasField("overload") for node in lowered.graph.node)
    # One body for each size of the maps, so functions of one name.
    tree = lower(infer_shapes(traced("medmamba")), "tree")
    assert len(tree.functions) > 1 and tree.ir_version == 10
    onnx.checker.check_model(tree, full_check=True)
    wide, _ = cast_precision(traced("medmamba"), "bfloat16")
    assert lower(wide).ir_version == 10


# Shapes -----------------------------------------------------------------------------------------------------------


def test_shapes_that_are_known_become_constants_and_idle_casts_go() -> None:
    text = """
        <ir_version: 9, opset_import: ["": 20]>
        g (float[batch, 2, 3, 4] x) => (float[batch, 2, 12] y, float[batch, 24] z, int64[2] open) {
            wide = Cast <to: int = 1> (x)
            block_1 = Cast <to: int = 1> (wide)
            sizes = Shape <start: int = 1, end: int = 2> (wide)
            rest = Constant <value = int64[1] {12}> ()
            kept = Constant <value = int64[1] {0}> ()
            shape = Concat <axis: int = 0> (kept, sizes, rest)
            r = Reshape (block_1, shape)
            y = CastLike (r, wide)
            z = Flatten <axis: int = 1> (wide)
            open = Shape <start: int = 0, end: int = 2> (wide)
        }
    """
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        node.name = node.output[0]
    model.graph.node[0].name, model.graph.node[7].name = "first", "block_1/scan"
    settled = settle_shapes(model)
    kinds = {node.name: node.op_type for node in settled.graph.node}
    # The name of a block's output stays, and the scan's goes to what makes the same now.
    assert kinds["block_1"] == "Cast" and kinds["block_1/scan"] == "Reshape" and kinds["z"] == "Reshape"
    assert "first" not in kinds and "y" not in kinds and kinds["open"] == "Shape"
    x = np.random.default_rng(0).standard_normal((3, 2, 3, 4)).astype(np.float32)
    found, usual = run(settled, {"x": x}), run(model, {"x": x})
    for name, value in usual.items():
        np.testing.assert_array_equal(found[name], value)
    assert not [node for node in settled.graph.node if node.op_type in ("Concat", "CastLike", "Flatten")]


@pytest.mark.parametrize(
    ("inputs", "body", "kinds"),
    [
        # One open side may be told by the others, two may not.
        ("float[n, 2, 3] x", "y = Flatten <axis = 1> (x)", ["Constant", "Reshape"]),
        ("float[n, 2, m] x", "y = Flatten <axis = 1> (x)", ["Flatten"]),
        ("float[n, 2, m] x", "s = Shape (x)  y = ConstantOfShape (s)", ["Shape", "ConstantOfShape"]),
        ("float[n, 2, m] x", "y = Shape <start = 1, end = 2> (x)", ["Constant"]),
        ("float[n, 2, 3] x", "y = Shape <start = 1> (x)", ["Constant"]),
        ("float[4, 2, m] x", "y = Shape <end = 2> (x)", ["Constant"]),
        ("float[n, 2, m] x", "y = Shape <start = -1> (x)", ["Shape"]),
        ("float[n, 2, m] x", "y = Shape (weight)", ["Constant"]),
        # Another's operator of the same name is not known.
        ("float[4, 2, 3] x", "y = other.Shape (x)", ["Shape"]),
    ],
)
def test_which_sizes_are_known(inputs: str, body: str, kinds: list[str]) -> None:
    kind = "int64" if "y = Shape" in body else "float"
    header = '<ir_version: 9, opset_import: ["": 20, "other": 1]>'
    text = f"{header} g ({inputs}) => ({kind}[] y) <float[2] weight = {{1, 2}}> {{ {body} }}"
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    assert [node.op_type for node in settle_shapes(model).graph.node] == kinds


def test_a_castlike_to_another_type_says_the_type() -> None:
    graph = helper.make_graph(
        [helper.make_node("CastLike", ["x", "like"], ["y"], "c")],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
            helper.make_tensor_value_info("like", TensorProto.FLOAT16, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    (node,) = settle_shapes(model).graph.node
    assert (node.op_type, list(node.input), node.attribute[0].i) == ("Cast", ["x"], TensorProto.FLOAT16)


# Bundles ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    def make(path: Path) -> None:
        example = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        compile_module(
            toy_modules.Classifier(), example, path, labels=toy_bundles.NAMES, inline=True, opset=17
        )

    return load_bundle(made_once("toy_inlined", make))


def test_a_bundle_says_that_no_operator_takes_the_place_of_its_scans(bundle: Bundle) -> None:
    model = onnx.load(bundle.model_path)
    check_form(model)
    assert opset_of(model) == 17 and model.ir_version == 8
    recipe = bundle.recipe()
    assert (recipe.inline, recipe.opset) == (True, 17)
    assert qm.Recipe.load(_saved(recipe, bundle)).opset == 17
    native = bundle.report["native"]
    assert native["run"] is False and "written out in the file" in native["not_run"]
    session = OnnxRuntimeSession(bundle.model_path)
    assert session.scans.kind == "portable" and "written out" in str(session.scans.reason)
    with pytest.raises(BundleError, match="the scans are written out in the file"):
        OnnxRuntimeSession(bundle.model_path, native=True)
    names = [output["name"] for output in bundle.report["cases"][0]["outputs"]]
    assert "block_1/scan" in names and "block_2/scan" in names
    assert validate_bundle(bundle)["passed"] is True


def _saved(recipe: qm.Recipe, bundle: Bundle) -> Path:
    path = bundle.path.parent / "toy_inlined.toml"
    plain = dataclasses.replace(recipe, module=None, labels=None, task=None)
    path.write_text(plain.to_toml(path.parent), encoding="utf-8")
    assert "inline = true" in path.read_text(encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"opset": 16}, "opset = 16; expected 17 to 23"),
        ({"opset": "20"}, "opset = '20' is not of type int"),
        ({"inline": 1}, "inline = 1 is not of type bool"),
        ({"opset": 21, "precision": "bfloat16"}, "operators take bfloat16 from opset 22 on"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        qm.Recipe("vmamba_digits", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"inline": True}, {"opset": 21}])
def test_engines_write_their_own_form(settings: dict[str, object], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    recipe = qm.Recipe("vmamba_digits", targets=("tensorrt-rtx",), **settings)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=f"leave {next(iter(settings))} out"):
        qm.compile(recipe, tmp_path / "bundle")
