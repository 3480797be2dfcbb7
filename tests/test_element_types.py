"""The 16-bit types by their numbers, and where a graph has them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest

from quartermap_deploy.errors import UnknownNameError
from quartermap_deploy.lowering.element_types import SIXTEEN_BIT, element_type, types_present


@pytest.mark.parametrize(("name", "dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_limits_are_those_of_the_type(name: str, dtype: type) -> None:
    found, limits = element_type(name), ml_dtypes.finfo(dtype)
    assert found is SIXTEEN_BIT[name] and found.name == name and found.tensor_type == f"tensor({name})"
    assert found.largest == float(limits.max)
    assert found.smallest_normal == float(limits.smallest_normal)
    assert found.digits == limits.nmant + 1
    tensor = found.tensor(np.float32([1 / 3, 3.402e38]), "third")
    values = onnx.numpy_helper.to_array(tensor)
    assert tensor.name == "third" and values.dtype == dtype
    assert values[0] == dtype(1 / 3) and np.isinf(values[1].astype(np.float32))


def test_other_types_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"float32.*float16"):
        element_type("float32")


@pytest.mark.parametrize(("number", "names"), [(1, []), (10, ["float16"]), (16, ["bfloat16"])])
def test_a_cast_alone_brings_its_type(number: int, names: list[str]) -> None:
    text = '<ir_version: 10, opset_import: ["": 20]> g (float[2] x) => (float[2] y) {'
    text += f"half = Cast <to = {number}> (x)\n y = Cast <to = 1> (half)}}"
    assert [item.name for item in types_present(onnx.parser.parse_model(text).graph)] == names
