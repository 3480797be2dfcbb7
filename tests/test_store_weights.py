"""store_weights: large weights in fewer bits, the same graph behind them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import Array, error, run
from onnx import TensorProto, helper, numpy_helper

from quartermap_deploy.errors import UnknownNameError
from quartermap_deploy.passes.store_weights import FEWEST, Storage, store_weights


def layer(weight: Array, bias: Array) -> onnx.ModelProto:
    """x (batch, n) → x @ weight + bias."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "weight"], ["product"], name="weight/cast"),
            helper.make_node("Add", ["product", "bias"], ["y"]),
        ],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", weight.shape[1]])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def types(model: onnx.ModelProto) -> dict[str, int]:
    return {tensor.name: tensor.data_type for tensor in model.graph.initializer}


@pytest.fixture
def arrays() -> tuple[Array, Array, Array]:
    random = np.random.default_rng(0)
    # Channels of different sizes, which one scale for all would not hold.
    weight = (random.normal(size=(48, 40)) * np.logspace(-3, 1, 40)).astype(np.float32)
    return weight, random.normal(size=40).astype(np.float32), random.normal(size=(3, 48)).astype(np.float32)


@pytest.mark.parametrize(("storage", "most", "bytes_each"), [("float16", 1e-3, 2), ("int8", 1e-2, 1)])
def test_weights_are_rounded_and_nothing_else_changes(
    arrays: tuple[Array, Array, Array], storage: Storage, most: float, bytes_each: int
) -> None:
    weight, bias, x = arrays
    model = layer(weight, bias)
    before = model.SerializeToString()
    stored = store_weights(model, storage)
    assert model.SerializeToString() == before
    onnx.checker.check_model(stored, full_check=True)
    kind = TensorProto.FLOAT16 if storage == "float16" else TensorProto.INT8
    found = types(stored)
    assert found["bias"] == TensorProto.FLOAT and found["weight/stored"] == kind and "weight" not in found
    assert stored.ByteSize() < weight.size * bytes_each + 2000
    made, right = run(stored, {"x": x})["y"], run(model, {"x": x})["y"]
    assert 0 < error(made, right) <= most
    # Channel by channel: each is right for its own size.
    for channel in range(0, 40, 13):
        assert error(made[:, channel] - bias[channel], right[:, channel] - bias[channel]) <= 3e-2


def test_the_axis_that_fits_best_is_chosen_at_every_size_of_number(
    arrays: tuple[Array, Array, Array],
) -> None:
    """In float32 the squares of large numbers would be infinite, and every axis as good as the first."""
    weight, bias, _ = arrays
    usual, large = (
        store_weights(layer(w, bias), "int8").graph for w in (weight, weight * np.float32(2.0**80))
    )
    levels = [
        numpy_helper.to_array(next(tensor for tensor in graph.initializer if tensor.name == "weight/stored"))
        for graph in (usual, large)
    ]
    assert np.array_equal(*levels)


def test_float32_and_a_second_run_change_nothing(arrays: tuple[Array, Array, Array]) -> None:
    model = layer(*arrays[:2])
    assert store_weights(model, "float32") == model
    for storage in ("float16", "int8"):
        once = store_weights(model, storage)
        assert store_weights(once, storage) == once


def test_what_does_not_fit_stays() -> None:
    for value in (1e6, np.inf, np.nan):
        weight = np.ones((48, 40), np.float32)
        weight[3, 4] = value
        model = layer(weight, np.zeros(40, np.float32))
        assert types(store_weights(model, "float16"))["weight"] == TensorProto.FLOAT
        if not np.isfinite(value):
            assert types(store_weights(model, "int8"))["weight"] == TensorProto.FLOAT
    rows = FEWEST // 32
    for count, stored in ((rows - 1, False), (rows, True)):
        model = layer(np.ones((count, 32), np.float32), np.zeros(32, np.float32))
        assert ("weight/stored" in types(store_weights(model, "float16"))) == stored
    vector = layer(np.ones((2, FEWEST), np.float32), np.linspace(0, 1, FEWEST, dtype=np.float32))
    assert types(store_weights(vector, "int8"))["bias"] == TensorProto.FLOAT
    assert types(store_weights(vector, "float16"))["bias/stored"] == TensorProto.FLOAT16


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = np.random.default_rng(1).normal(size=(48, 40)).astype(np.float32)
    weight[:, 7] = 0
    x = np.ones((1, 48), np.float32)
    found = run(store_weights(layer(weight, np.zeros(40, np.float32)), "int8"), {"x": x})["y"]
    assert found[0, 7] == 0 and np.isfinite(found).all()


def test_an_unknown_storage_names_the_known_ones(arrays: tuple[Array, Array, Array]) -> None:
    with pytest.raises(UnknownNameError, match="float16"):
        store_weights(layer(*arrays[:2]), "float61")  # type: ignore[arg-type]
