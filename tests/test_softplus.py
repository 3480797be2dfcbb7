"""Softplus in standard operators, run by ONNX Runtime, against float64."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import Array, run_session, session
from onnx import helper

from quartermap_deploy.lowering.softplus import write_softplus
from quartermap_deploy.lowering.writer import Writer

UNIT = float(np.finfo(np.float32).eps) / 2
"""A rounding error of float32, relative to the value."""


@functools.cache
def ready() -> onnxruntime.InferenceSession:
    """Return a session that computes softplus of a vector z."""
    write = Writer()
    result = write_softplus(write, "z")
    graph = helper.make_graph(
        write.nodes,
        "softplus",
        [helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, ["n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return session(model)


def softplus(values: Array) -> Array:
    """Run softplus in float32."""
    (y,) = run_session(ready(), {"z": values.astype(np.float32)}).values()
    return y


@pytest.mark.parametrize(
    ("low", "high"), [(-60, -20), (-20, -5), (-5, -1), (-1, 1), (1, 20), (20, 90), (90, 1e4), (-1e-4, 1e-4)]
)
def test_exact_to_a_few_units_in_the_last_place(low: float, high: float) -> None:
    z = np.linspace(low, high, 20001).astype(np.float32)
    expected = np.logaddexp(0.0, z.astype(np.float64))
    assert (np.abs(softplus(z) - expected) / expected).max() <= 8 * UNIT


def test_far_below_zero_it_vanishes_without_harm() -> None:
    z = np.linspace(-1000, -60, 20001).astype(np.float32)
    y = softplus(z)
    assert (y >= 0).all() and (np.diff(y) >= -1e-30).all()
    assert np.abs(y - np.logaddexp(0.0, z.astype(np.float64))).max() <= 8 * UNIT * np.exp(-60.0)


def test_the_ends_of_the_number_line() -> None:
    largest = np.finfo(np.float32).max
    y = softplus(np.array([-np.inf, np.inf, np.nan, largest, -largest, 0.0, -0.0]))
    expected = [0, np.inf, np.nan, largest, 0, np.log(2), np.log(2)]
    np.testing.assert_allclose(y, np.array(expected, dtype=np.float32), rtol=8 * UNIT)
