"""Models in other opsets: whole models in each, and what operators become below the opset that brought them."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest
import torch
from helpers import run, shortened, traced_with_open_sizes
from onnx import parser

import quartermap_deploy as qm
from quartermap_deploy.errors import PassError
from quartermap_deploy.lowering.operator import OPSETS
from quartermap_deploy.lowering.versions import opset_of
from quartermap_deploy.passes import at_opset, infer_shapes, lower
from quartermap_deploy.passes.cast_precision import cast_precision

NAMES = ("vmamba_s2_channel_first", "medmamba")
IR = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}


@functools.cache
def lowered(name: str) -> onnx.ModelProto:
    return lower(infer_shapes(traced_with_open_sizes(name)))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", NAMES)
def test_whole_models_in_every_opset(name: str, opset: int) -> None:
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(opset))
    with torch.inference_mode():
        expected = shortened(name)(images).numpy()
    model = at_opset(lowered(name), opset)
    for form in (model, qm.inline(model)):
        onnx.checker.check_model(form, full_check=True)
        assert (opset_of(form), form.ir_version) == (opset, IR[opset])
        assert all(opset_of(function) == opset for function in form.functions)
        error = np.abs(run(form, {"images": images})["logits"] - expected).max() / np.abs(expected).max()
        assert not error > 1e-5
    kinds = {node.op_type for node in model.graph.node}
    assert ("Gelu" in kinds) == (name.startswith("vmamba") and opset >= 20)
    assert "LayerNormalization" in kinds and len(model.functions) == 1


def small(
    body: str, inputs: str = "float[2, 7] x", outputs: str = "float[] y", opset: int = 20
) -> onnx.ModelProto:
    text = f'<ir_version: 9, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    return infer_shapes(onnx.shape_inference.infer_shapes(parser.parse_model(text)))


X = np.random.default_rng(0).standard_normal((2, 7)).astype(np.float32) * 3


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        ("y = Gelu (x)", {"Div", "Erf", "Add", "Mul", "Constant"}),
        ('y = Gelu <approximate = "tanh"> (x)', {"Tanh", "Add", "Mul", "Constant"}),
        ("a = Constant <value = int64[1] {1}> () y = ReduceMax (x, a)", {"ReduceMax", "Constant"}),
        (
            "a = Constant <value = int64[1] {-1}> () y = ReduceMean <keepdims = 0> (x, a)",
            {"ReduceMean", "Constant"},
        ),
        ("y = ReduceL2 (x)", {"ReduceL2"}),
        # Without axes, and with none in a list, all are reduced.
        ("a = Constant <value = int64[0] {}> () y = ReduceMax (x, a)", {"ReduceMax", "Constant"}),
        ("a = Constant <value = int64[2] {0, -1}> () y = ReduceMin (x, a)", {"ReduceMin", "Constant"}),
        ("y, z = Split <axis = -1, num_outputs = 2> (x)", {"Split", "Constant"}),
        ("y, z = Split <num_outputs = 2> (x)", {"Split", "Constant"}),
        ("a = Constant <value = int64[2] {3, 4}> () y, z = Split <axis = 1> (x, a)", {"Split", "Constant"}),
        ("y, z = Split <axis = 1, num_outputs = 2> (x)", {"Split", "Constant"}),
        # The last part of an uneven split is smaller.
        ("y, z, w, v = Split <axis = 1, num_outputs = 4> (x)", {"Split", "Constant"}),
        ("y = Cast <to = 1, saturate = 1> (x)", {"Cast"}),
    ],
)
def test_newer_operators_are_written_in_older_ones(body: str, kinds: set[str]) -> None:
    names = [name for name in "yzwv" if f"{name}," in body or f", {name} " in body or f"{name} =" in body]
    model = small(body, outputs=", ".join(f"float[] {name}" for name in names))
    older = at_opset(model, 17)
    onnx.checker.check_model(older, full_check=True)
    assert {node.op_type for node in older.graph.node} == kinds
    found, usual = run(older, {"x": X}), run(model, {"x": X})
    for name, value in usual.items():
        assert found[name].shape == value.shape
        assert not np.abs(found[name] - value).max() > 1e-6


def test_gelu_in_16_bits_has_constants_in_16_bits() -> None:
    model = small("y = Gelu (x)", "float16[2, 7] x", "float16[] y")
    older = at_opset(model, 19)
    onnx.checker.check_model(older, full_check=True)
    found = run(older, {"x": X.astype(np.float16)})["y"]
    assert found.dtype == np.float16
    assert not np.abs(found - run(model, {"x": X.astype(np.float16)})["y"]).max() > 1e-2


def test_gelu_of_a_type_that_is_not_known_is_taken_for_float32() -> None:
    """Functions have no types; those of others are not inferred."""
    model = parser.parse_model("""
        <ir_version: 9, opset_import: ["": 20, "other": 1]>
        g (float[2, 7] x) => (float[2, 7] y) { y = other.Twice (x) }
        <domain: "other", opset_import: ["": 20]>
        Twice (a) => (c) { b = Gelu (a)  c = Gelu (b) }
    """)
    older = at_opset(model, 17)
    assert "Gelu" not in {node.op_type for function in older.functions for node in function.node}
    np.testing.assert_allclose(run(older, {"x": X})["y"], run(model, {"x": X})["y"], atol=1e-6)


def test_axes_that_became_attributes_leave_no_weights_behind() -> None:
    model = small("y = ReduceMax (x, axes)", "float[2, 7] x, int64[1] axes")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axes"))
    del model.graph.input[1]
    older = at_opset(model, 17)
    assert not older.graph.initializer and list(older.graph.node[0].input) == ["x"]
    np.testing.assert_array_equal(run(older, {"x": X})["y"], run(model, {"x": X})["y"])


@pytest.mark.parametrize(
    ("mode", "older"), [("cubic", "bicubic"), ("linear", "bilinear"), ("nearest", "nearest")]
)
def test_the_names_of_modes_of_grids_changed(mode: str, older: str) -> None:
    inputs = "float[1, 1, 4, 4] x, float[1, 2, 2, 2] grid"
    model = at_opset(small(f'y = GridSample <mode = "{mode}", align_corners = 1> (x, grid)', inputs), 19)
    (node,) = model.graph.node
    found = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    assert found == {"mode": older.encode(), "align_corners": 1}
    onnx.checker.check_model(model, full_check=True)


def test_nodes_in_branches_are_written_too_and_read_the_constants_around_them() -> None:
    text = """
    <ir_version: 9, opset_import: ["": 20]>
    g (float[2, 7] x, bool flag) => (float[2, 1] y) <int64[1] axes = {1}, int64[1] unread = {3}, float[1] far = {9}> {
        y = If (flag) <
            then_branch = a () => (float[2, 1] p) { p = ReduceMax (x, axes) },
            else_branch = b () => (float[2, 1] q) { m = ReduceMin (x, axes)  q = Add (m, far) }
        >
    }
    """
    model = parser.parse_model(text)
    older = at_opset(model, 17)
    onnx.checker.check_model(older, full_check=True)
    assert [tensor.name for tensor in older.graph.initializer] == ["far"]
    for flag in (True, False):
        feeds = {"x": X, "flag": np.array(flag)}
        np.testing.assert_array_equal(run(older, feeds)["y"], run(model, feeds)["y"])


@pytest.mark.parametrize(
    ("body", "inputs", "opset", "words"),
    [
        ("y = ReduceMax (x, axes)", "float[2, 7] x, int64[1] axes", 17, "its axes are computed"),
        (
            "a = Constant <value = int64[1] {1}> () y = ReduceMax <noop_with_empty_axes = 1> (x, a)",
            *("float[2, 7] x", 17, "noop_with_empty_axes is not known there"),
        ),
        ("y = Mish (x)", "float[2, 7] x", 17, "there is no such operator"),
        ('y = Pad <mode = "wrap"> (x, p)', "float[2, 7] x, int64[4] p", 18, "mode = wrap is not known there"),
        (
            "y = Pad (x, p, , a)",
            "float[2, 7] x, int64[2] p, int64[1] a",
            17,
            "its input axes is not known there",
        ),
        (
            "y = AveragePool <kernel_shape = [2], dilations = [2]> (x)",
            "float[1, 2, 6] x",
            18,
            "its attribute dilations is not known there",
        ),
        (
            "y = GroupNormalization <num_groups = 2> (x, s, s)",
            "float[1, 4, 6] x, float[2] s",
            21,
            "it means something else there",
        ),
    ],
)
def test_what_another_opset_cannot_say_is_refused(body: str, inputs: str, opset: int, words: str) -> None:
    with pytest.raises(PassError, match=words):
        at_opset(small(body, inputs), opset)


@pytest.mark.parametrize("opset", [16, 24])
def test_there_are_seven_opsets(opset: int) -> None:
    with pytest.raises(PassError, match=f"there is no opset {opset}; expected 17 to 23"):
        at_opset(small("y = Relu (x)"), opset)


def test_float16_in_an_older_opset() -> None:
    typed, _ = cast_precision(infer_shapes(traced_with_open_sizes("vmamba_s2_channel_first")), "float16")
    model = lower(typed)
    older = at_opset(model, 17)
    onnx.checker.check_model(older, full_check=True)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    found, usual = run(older, {"images": images})["logits"], run(model, {"images": images})["logits"]
    assert not np.abs(found - usual).max() > 5e-3 * np.abs(usual).max()
