"""Tensors that a user saved: what a graph has to return for them, and in which forms they are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from test_source_modules import source

from quartermap_deploy.errors import InputError, ParityError
from quartermap_deploy.validation.given import GivenReference, as_reference
from quartermap_deploy.validation.tolerances import GIVEN

X = np.array([[1.0, -2.0], [4.0, 3.0]], np.float32)
COUNT = np.array([2], np.int64)


def model() -> bytes:
    """Two outputs, of a number and of an integer input."""
    text = """
<ir_version: 10, opset_import: ["": 20]>
sums (float[batch, 2] x, int64[1] n) => (float[batch, 2] twice, float[batch, 2] times) {
    twice = Add (x, x)
    number = Cast <to = 1> (n)
    times = Mul (x, number)
}
"""
    return onnx.parser.parse_model(text).SerializeToString()


def given(**outputs: Any) -> GivenReference:
    return GivenReference({"x": X.astype(np.float64), "n": COUNT}, outputs)


def test_a_graph_that_agrees_is_said_to_in_the_report() -> None:
    found = given(twice=2 * X, times=2 * X).check(model())
    assert found["passed"] is True and found["tolerance"] == GIVEN.to_dict()
    assert [(output["name"], output["passed"]) for output in found["outputs"]] == [
        ("twice", True),
        ("times", True),
    ]
    assert [output["tolerance"] for output in found["outputs"]] == [GIVEN.relative] * 2


@pytest.mark.parametrize("name", ["twice", "times"])
def test_errors_just_above_the_tolerance_are_refused_and_those_below_are_not(name: str) -> None:
    right = {"twice": 2 * X, "times": 2 * X}

    def off(by: float) -> GivenReference:
        return given(**{**right, name: right[name] * np.float32(1 + by)})

    assert off(0.9 * GIVEN.relative).check(model())["passed"]
    with pytest.raises(
        ParityError, match=f"departs from the given reference at '{name}': .* Nothing was written"
    ):
        off(1.1 * GIVEN.relative).check(model())


def test_an_output_that_the_graph_lacks_is_refused() -> None:
    with pytest.raises(ParityError, match="'other': the target has no such output"):
        given(twice=2 * X, other=X).check(model())


def saved(tmp_path: Path, **arrays: Any) -> Path:
    np.savez(tmp_path / "saved.npz", **arrays)
    return tmp_path / "saved.npz"


FIRST, OUTPUT = np.ones((2, 6, 4)), np.ones((2, 3, 4))


@pytest.mark.parametrize(
    ("arrays", "held"),
    [
        ({"first": FIRST}, "first"),
        ({"output": OUTPUT}, "output"),
        ({"first": FIRST, "output": OUTPUT, "more": OUTPUT}, "first, more, output"),
        ({"first": FIRST, "other": OUTPUT}, "first, other"),
    ],
    ids=["no output", "no input", "more", "another"],
)
def test_a_file_with_something_missing_or_unknown_is_refused(
    arrays: dict[str, Any], held: str, tmp_path: Path
) -> None:
    words = f"holds {held}; expected the inputs first, and one at least of the outputs output"
    with pytest.raises(InputError, match=words):
        as_reference(source(), saved(tmp_path, **arrays))


def test_what_is_unknown_is_not_even_read(tmp_path: Path) -> None:
    path = saved(tmp_path, first=FIRST, output=OUTPUT, more=np.array([None]))
    with pytest.raises(InputError, match="holds first, more, output; expected the inputs first"):
        as_reference(source(), path)


def test_several_outputs_are_no_input(tmp_path: Path) -> None:
    names = list(source("list").discovery.outputs)
    with pytest.raises(InputError, match=r"holds .*; expected the inputs first, and one at least"):
        as_reference(source("list"), saved(tmp_path, **dict.fromkeys(names, OUTPUT)))
    found = as_reference(source("list"), saved(tmp_path, first=FIRST, **{names[1]: OUTPUT}))
    assert list(found.inputs) == ["first"] and list(found.outputs) == names[1:]


def test_a_file_that_cannot_be_read_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "saved.npz").write_bytes(b"no archive")
    for path in (tmp_path / "none.npz", tmp_path / "saved.npz", saved(tmp_path, first=np.array([None]))):
        with pytest.raises(
            InputError, match=r"cannot be read: .*expected an .npz file with an array for each"
        ):
            as_reference(source(), path)
    for reference in (3, FIRST, [FIRST, OUTPUT, OUTPUT], {"first": FIRST}):
        with pytest.raises(
            InputError, match=r"the reference is (3 values|a \w+); expected \(inputs, outputs\)"
        ):
            as_reference(source(), reference)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", ["first", "output"])
def test_one_value_that_is_no_number_is_refused(place: str, value: float) -> None:
    arrays = {"first": FIRST.copy(), "output": OUTPUT.copy()}
    arrays[place][1, 2, 3] = value
    with pytest.raises(InputError, match=f"has NaN or infinite values in '{place}'"):
        as_reference(source(), (arrays["first"], arrays["output"]))


def test_doubles_become_float32_and_integers_stay(tmp_path: Path) -> None:
    found = as_reference(source(), saved(tmp_path, first=FIRST, output=OUTPUT))
    assert found.inputs["first"].dtype == found.outputs["output"].dtype == np.float32
    whole = as_reference(source(), (FIRST.astype(np.int64), OUTPUT.astype(np.int32)))
    assert whole.inputs["first"].dtype == np.int64 and whole.outputs["output"].dtype == np.int32
    half = as_reference(
        source(), (torch.ones(2, 6, 4, dtype=torch.bfloat16, requires_grad=True), torch.ones(2, 3, 4))
    )
    assert half.inputs["first"].dtype == np.float32


def test_tensors_of_every_type_are_taken() -> None:
    """NumPy has no bfloat16, and integers are compared as integers."""
    first = torch.randn(2, 6, 4)
    for kind, expected in (
        (torch.bfloat16, np.float32),
        (torch.float16, np.float32),
        (torch.float64, np.float32),
        (torch.int64, np.int64),
        (torch.bool, np.bool_),
    ):
        output = (4 * torch.randn(2, 3, 4)).to(kind)
        for outputs in (output, {"output": output}):
            found = as_reference(source(), (first.to(kind), outputs))
            assert found.inputs["first"].dtype == found.outputs["output"].dtype == expected
            np.testing.assert_array_equal(found.outputs["output"], output.double().numpy())


def test_the_values_are_those_that_were_given() -> None:
    first, output = torch.randn(2, 6, 4), torch.randn(2, 3, 4, requires_grad=True)
    for outputs in (output, {"output": output}, {"output": output.detach().numpy()}):
        found = as_reference(source(), (first, outputs))
        np.testing.assert_array_equal(found.inputs["first"], first.numpy())
        np.testing.assert_array_equal(found.outputs["output"], output.detach().numpy())


def test_two_outputs_are_named_in_the_order_of_the_module() -> None:
    x, z = torch.zeros(2, 6, 4), torch.ones(2, 3, 4)
    names = list(source("list").discovery.outputs)
    for outputs in ([x, z], [x.numpy(), z.numpy()], (x, z)):
        found = as_reference(source("list"), (FIRST, outputs))
        assert list(found.outputs) == names and [array.max() for array in found.outputs.values()] == [0, 1]
    alone = as_reference(source("list"), (FIRST, {names[1]: z}))
    assert list(alone.outputs) == names[1:]


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (([FIRST, FIRST], OUTPUT), "has 2 inputs, the module takes 1: first"),
        (({"second": FIRST}, OUTPUT), "has the inputs second; expected first"),
        (({"first": FIRST, 3: FIRST}, OUTPUT), "has the inputs 3, first; expected first"),
        ((FIRST, [OUTPUT, OUTPUT]), r"has the output '\w+'; the module has output, in this order"),
        ((FIRST, {"other": OUTPUT}), "has the output 'other'; the module has output, in this order"),
        ((FIRST,), "is 1 values; expected"),
        ((FIRST, {}), "has no outputs; expected one at least of output"),
        ((FIRST, []), "has no outputs; expected one at least of output"),
        ((np.array(["a"]), OUTPUT), "an array of <U1; expected numbers"),
        ((FIRST, np.array([1j])), "an array of complex128; expected numbers"),
        ((FIRST, {"output": np.array([None])}), "an array of object; expected numbers"),
    ],
)
def test_what_does_not_fit_the_module_is_refused(reference: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        as_reference(source(), reference)
