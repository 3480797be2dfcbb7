"""The 16-bit types by their numbers, and where a graph has them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest

from quartermap_deploy.errors import UnknownNameError
from quartermap_deploy.lowering.element_types import (
    SIXTEEN_BIT,
    element_type,
    types_of_values,
    types_present,
)


@pytest.mark.parametrize(("name", "dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_limits_are_those_of_the_type(name: str, dtype: type) -> None:
    found, limits = element_type(name), ml_dtypes.finfo(dtype)
    assert found is SIXTEEN_BIT[name] and found.name == name and found.tensor_type == f"tensor({name})"
    assert found.largest == float(limits.max)
    assert found.smallest_normal == float(limits.smallest_normal)
    assert found.digits == limits.nmant + 1
    assert found.opset == {"float16": 20, "bfloat16": 22}[name]
    tensor = found.tensor(np.float32([1 / 3, 3.402e38]), "third")
    values = onnx.numpy_helper.to_array(tensor)
    assert tensor.name == "third" and values.dtype == dtype
    assert values[0] == dtype(1 / 3) and np.isinf(values[1].astype(np.float32))


def test_other_types_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"float32.*float16"):
        element_type("float32")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SIXTEEN_BIT)
def test_what_is_too_large_becomes_infinite_without_a_word(name: str) -> None:
    found = element_type(name).rounded(np.float32([-3.402e38, 1.0, 3.402e38])).astype(np.float32)
    assert found.tolist() == [-np.inf, 1.0, np.inf]


def test_types_are_those_of_weights_values_inputs_and_outputs() -> None:
    text = '<ir_version: 10, opset_import: ["": 20]> g (float16[2] x) => (bfloat16[2] y)'
    text += " <float[2] half = {1, 2}, double[2] inner> { inner = Abs (x) y = Abs (inner) }"
    graph = onnx.parser.parse_model(text).graph
    assert types_of_values(graph) == {"half": 1, "inner": 11, "x": 10, "y": 16}
    assert [item.name for item in types_present(graph)] == ["float16", "bfloat16"]
    del graph.input[:]
    assert [item.name for item in types_present(graph)] == ["bfloat16"]
    graph.initializer[0].data_type = 10
    del graph.output[:]
    assert [item.name for item in types_present(graph)] == ["float16"]


def test_a_number_elsewhere_is_no_type() -> None:
    """An axis of 10, and what other operators call `to`."""
    text = '<ir_version: 10, opset_import: ["": 20, "other": 1]> g (float[2] x) => (float[2] y) {'
    text += "a = Softmax <axis = 10> (x)\n b = other.Move <to = 16> (a)\n"
    text += "y = Cast <saturate = 10, to = 1> (b)}"
    assert list(types_present(onnx.parser.parse_model(text).graph)) == []


@pytest.mark.parametrize(("number", "names"), [(1, []), (10, ["float16"]), (16, ["bfloat16"])])
def test_a_cast_alone_brings_its_type(number: int, names: list[str]) -> None:
    text = '<ir_version: 10, opset_import: ["": 20]> g (float[2] x) => (float[2] y) {'
    text += f"half = Cast <to = {number}> (x)\n y = Cast <to = 1> (half)}}"
    assert [item.name for item in types_present(onnx.parser.parse_model(text).graph)] == names
