"""Gelu in float16, written out: the numbers are those that ONNX Runtime computes, and it has nothing to say."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import Array, operators, traced
from onnx import TensorProto, parser

from quartermap_deploy.passes import infer_shapes, lower, write_gelu
from quartermap_deploy.passes.cast_precision import cast_precision

NAME = "vmamba_s2_channel_first"
FORMS = ("none", "tanh")
WARNING = 2


def gelu(kind: str, approximate: str) -> onnx.ModelProto:
    model = parser.parse_model(f"""
        <ir_version: 9, opset_import: ["" : 20]>
        g ({kind}[n] x) => ({kind}[n] y) {{ y = Gelu <approximate = "{approximate}"> (x) }}
    """)
    return infer_shapes(model)


def computed(model: onnx.ModelProto, x: Array) -> Array:
    """What a session of nobody's settings computes, which may print."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    return np.asarray(found)


@pytest.mark.parametrize("approximate", FORMS)
def test_the_numbers_are_those_of_the_operator(approximate: str) -> None:
    x = np.concatenate([np.linspace(-12, 12, 4001), [1e-7, -1e-7, 200.0, -200.0]]).astype(np.float16)
    model = gelu("float16", approximate)
    written = write_gelu(model)
    onnx.checker.check_model(written, full_check=True)
    assert "Gelu" not in operators(written) and operators(model) == ["Gelu"]
    assert {value.type.tensor_type.elem_type for value in written.graph.value_info} == {TensorProto.FLOAT16}
    assert write_gelu(written) is written
    found, before = computed(written, x), computed(model, x)
    if approximate == "none":
        assert np.array_equal(found, before)
        return
    # Its constants are rounded once, and not at every step: no worse, and not to the last bit.
    wide = x.astype(np.float64)
    exact = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    assert np.abs(found - exact).max() <= np.abs(before - exact).max() <= 1e-3


def test_sessions_of_a_whole_model_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    typed, _ = cast_precision(traced(NAME), "float16")
    images = np.random.default_rng(0).standard_normal((2, 3, 56, 56)).astype(np.float32)
    onnxruntime.set_default_logger_severity(
        WARNING
    )  # an earlier test may have opened a provider, which silences all
    found = computed(lower(write_gelu(typed)), images)
    assert capfd.readouterr() == ("", "")
    assert np.array_equal(found, computed(lower(typed), images))
    # When this fails, ONNX Runtime has learned it, and the pass can go.
    assert "can't constant fold Sqrt" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["float", "bfloat16"])
def test_other_types_keep_theirs(kind: str) -> None:
    model = gelu(kind, "none")
    assert write_gelu(model) is model


def test_a_model_whose_blocks_have_two_types() -> None:
    typed, _ = cast_precision(traced(NAME), "float16", blocks_float32=[1])
    assert operators(typed).count("Gelu") >= 2
    written = write_gelu(typed)
    onnx.checker.check_model(lower(written), full_check=True)
    assert 1 <= operators(written).count("Gelu") < operators(typed).count("Gelu")
    assert operators(written).count("Erf") == operators(typed).count("Gelu") - operators(written).count(
        "Gelu"
    )
