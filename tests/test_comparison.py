"""What counts as equal: the comparison of one output, of all outputs of a case, and of all cases."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from quartermap_deploy.errors import UnknownNameError
from quartermap_deploy.frontend.node_names import block_output, scan_name
from quartermap_deploy.validation.comparison import OutputComparison, compare_output, relative_to_largest
from quartermap_deploy.validation.parity import ParityReport
from quartermap_deploy.validation.tolerances import GIVEN, Tolerance, tolerance_for

REFERENCE = np.array([[1.0, -4.0, 2.0], [0.0, 3.0, -2.0]], np.float32)
TOLERANCE = Tolerance("float32", 1e-3, "for these tests", block=1e-4)


def shifted(by: float) -> np.ndarray[Any, Any]:
    """The reference with one value, not the largest, moved by a share of the largest."""
    found = REFERENCE.copy()
    found[1, 0] += np.float32(4.0 * by)
    return found


def test_equal_outputs_pass() -> None:
    result = compare_output("logits", REFERENCE, REFERENCE.copy(), 0.0)
    assert result == OutputComparison("logits", 0.0, 0.0, 4.0, 0.0, True)
    assert result


@pytest.mark.parametrize("tolerance", [1e-5, 1e-3, 0.5])
def test_errors_are_shares_of_the_largest_value_of_the_reference(tolerance: float) -> None:
    below = compare_output("logits", REFERENCE, shifted(0.98 * tolerance), tolerance)
    above = compare_output("logits", REFERENCE, shifted(1.02 * tolerance), tolerance)
    assert below.passed and below.detail == ""
    assert not above.passed and f"tolerance {tolerance:.0e}" in above.detail
    assert below.relative_error == pytest.approx(0.98 * tolerance, rel=1e-3)
    assert below.max_abs_error == pytest.approx(4 * 0.98 * tolerance, rel=1e-3)
    assert below.largest == 4.0


@pytest.mark.parametrize("scale", [1e-6, 0.5, 1e6])
def test_small_outputs_are_judged_as_large_ones_are(scale: float) -> None:
    reference, found = (np.float32(scale) * array for array in (REFERENCE, shifted(0.02)))
    result = compare_output("logits", reference, found, 0.01)
    assert not result.passed and result.relative_error == pytest.approx(0.02, rel=1e-3)
    assert result.largest == pytest.approx(4 * scale)


def test_the_largest_value_is_the_references_and_not_the_targets() -> None:
    result = compare_output("logits", np.float32([1, 0]), np.float32([1, 100]), 1.0)
    assert result.relative_error == 100.0 and not result.passed


def test_the_largest_difference_counts_and_not_the_mean() -> None:
    reference = np.ones(10_000, np.float32)
    found = reference.copy()
    found[7777] = 1.01
    assert not compare_output("logits", reference, found, 1e-3)


def test_differences_are_taken_in_double() -> None:
    """In float16 a difference beyond 65504 would be infinite, and one of large values be rounded away."""
    result = compare_output("logits", np.float16([6e4, 1]), np.float16([-6e4, 1]), 3.0)
    assert result.passed and result.max_abs_error == 120_000


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "target", "both"])
def test_nan_and_infinity_always_fail(value: float, side: str) -> None:
    odd = REFERENCE.copy()
    odd[0, 0] = value
    reference = odd if side in ("reference", "both") else REFERENCE
    found = odd if side in ("target", "both") else REFERENCE
    result = compare_output("logits", reference, found, 1e9)
    assert not result.passed and result.relative_error == math.inf
    assert "1 of 6 values of the " + ("target" if side == "target" else "reference") in result.detail


def test_a_reference_of_zeros_passes_nothing_but_zeros() -> None:
    zeros = np.zeros((2, 3), np.float32)
    assert compare_output("logits", zeros, zeros.copy(), 1e-4)
    wrong = compare_output("logits", zeros, np.full((2, 3), 2e-4, np.float32), 1e-4)
    assert not wrong.passed and wrong.relative_error == pytest.approx(2e-4) and wrong.largest == 0.0
    assert compare_output("logits", zeros, np.full((2, 3), 5e-5, np.float32), 1e-4)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "no such output"),
        (REFERENCE.T, r"shape (3, 2), expected (2, 3)"),
        (REFERENCE[None], r"shape (1, 2, 3), expected (2, 3)"),
        (REFERENCE[:1], r"shape (1, 3), expected (2, 3)"),
        (REFERENCE.astype(np.float64), "type float64, expected float32"),
        (REFERENCE.astype(np.int32), "type int32, expected float32"),
    ],
    ids=["missing", "transposed", "axis", "rows", "double", "integers"],
)
def test_what_cannot_be_compared_fails(found: Any, words: str) -> None:
    result = compare_output("logits", REFERENCE, found, 1e9)
    assert not result.passed and words in result.detail
    assert (result.relative_error, result.max_abs_error, result.largest) == (math.inf,) * 3
    assert result.to_dict()["relative_error"] is None


def test_an_empty_output_proves_nothing() -> None:
    empty = np.zeros((0, 3), np.float32)
    assert not compare_output("logits", empty, empty, 1.0).passed


def compare(reference: dict[str, Any], found: dict[str, Any]) -> dict[str, OutputComparison]:
    return dict(relative_to_largest(TOLERANCE)(reference, found))


def test_blocks_and_scans_have_the_tolerance_of_blocks_and_outputs_their_own() -> None:
    names = ["logits", block_output(3), scan_name(3)]
    between = 3e-4  # above the tolerance of blocks, below that of outputs
    results = compare(dict.fromkeys(names, REFERENCE), dict.fromkeys(names, shifted(between)))
    assert {name: result.passed for name, result in results.items()} == {
        "logits": True,
        block_output(3): False,
        scan_name(3): False,
    }
    assert [result.tolerance for result in results.values()] == [1e-3, 1e-4, 1e-4]


def test_every_output_of_the_reference_is_judged_in_its_order() -> None:
    reference = {"b": REFERENCE, "a": REFERENCE, "c": REFERENCE}
    results = compare(reference, {"a": REFERENCE, "b": REFERENCE})
    assert list(results) == ["b", "a", "c"]
    assert [result.passed for result in results.values()] == [True, True, False]
    assert "no such output" in results["c"].detail


def test_outputs_that_the_reference_lacks_fail_nothing_and_hide_nothing() -> None:
    results = compare({"a": REFERENCE}, {"z": shifted(1), "a": shifted(1)})
    assert list(results) == ["a"] and not results["a"].passed


def report(cases: dict[str, list[OutputComparison]]) -> ParityReport:
    return ParityReport("pytorch", "onnxruntime", TOLERANCE, cases, {2: "layers.0", 3: "layers.1"})


def outcome(name: str, error: float) -> OutputComparison:
    return compare_output(name, REFERENCE, shifted(error), TOLERANCE.of_block)


GOOD, BAD = outcome("logits", 0.0), outcome("logits", 1.0)


@pytest.mark.parametrize(
    ("cases", "passed"),
    [
        ({}, False),
        ({"images": []}, False),
        ({"images": [GOOD], "zeros": []}, False),
        ({"images": [GOOD]}, True),
        ({"images": [GOOD, GOOD], "zeros": [GOOD]}, True),
        ({"images": [GOOD, BAD]}, False),
        ({"images": [BAD], "zeros": [GOOD]}, False),
        ({"images": [GOOD], "zeros": [BAD]}, False),
    ],
)
def test_parity_holds_if_every_output_of_every_case_does_and_there_are_some(
    cases: dict[str, list[OutputComparison]], passed: bool
) -> None:
    assert report(cases).passed is passed
    assert report(cases).to_dict()["passed"] is passed


def test_the_first_block_that_departs_is_the_first_of_the_network_in_any_case() -> None:
    found = report(
        {
            "images": [outcome(block_output(3), 1.0), outcome("logits", 1.0)],
            "zeros": [outcome(scan_name(2), 0.5), outcome(block_output(2), 0.7), outcome("logits", 0.0)],
        }
    )
    assert found.first_departing_block == 2
    assert found.worst == 1.0
    said = found.describe_failure()
    assert "block 2 (layers.0) is the first that departs, in or before its scan, on case 'zeros'" in said
    assert "in 4 of 5 outputs" in said


def test_an_output_that_departs_though_no_block_does_is_told_so() -> None:
    found = report({"images": [outcome(block_output(2), 0.0), BAD]})
    assert found.first_departing_block is None
    assert "logits departs, though no block does by itself" in found.describe_failure()
    assert report({"images": [GOOD]}).describe_failure() == "every output is within the tolerance"


def test_a_block_that_departs_behind_a_scan_that_does_not_is_told_so() -> None:
    found = report({"images": [outcome(scan_name(4), 0.0), outcome(block_output(4), 1.0), GOOD]})
    said = found.describe_failure()
    assert "block 4 is the first that departs, behind its scan, on case 'images'" in said
    assert said.startswith("onnxruntime departs from pytorch in 1 of 3 outputs; ")


def test_a_scan_that_departs_in_any_case_tells_more_than_its_block() -> None:
    found = report(
        {
            "images": [outcome(scan_name(2), 0.0), outcome(block_output(2), 1.0)],
            "zeros": [outcome(scan_name(2), 0.5), outcome(block_output(2), 1.0)],
        }
    )
    said = found.describe_failure()
    assert (
        "block 2 (layers.0) is the first that departs, in or before its scan, on case 'zeros': 5.00e-01"
        in said
    )


def test_of_equal_failures_the_first_is_told_of() -> None:
    cases = {
        name: [outcome(scan_name(4), 0.0), outcome(block_output(4), error)]
        for name, error in (("images", 0.5), ("large", 1.0), ("zeros", 0.25))
    }
    assert "behind its scan, on case 'images': 5.00e-01" in report(cases).describe_failure()
    outputs = [outcome("masks", 0.0), outcome("logits", 0.5), outcome("boxes", 1.0)]
    said = report({"images": [GOOD], "zeros": outputs}).describe_failure()
    assert said.startswith(
        "onnxruntime departs from pytorch in 2 of 4 outputs; logits departs, on case 'zeros'"
    )


def test_a_report_is_plain_and_whole() -> None:
    found = report(
        {"images": [outcome(block_output(3), 1.0)], "zeros": [compare_output("y", REFERENCE, None, 1e-4)]}
    )
    assert found.to_dict() == {
        "passed": False,
        "reference": "pytorch",
        "target": "onnxruntime",
        "tolerance": TOLERANCE.to_dict(),
        "worst_relative_error": None,
        "first_departing_block": 3,
        "cases": [
            {"name": "images", "outputs": [outcome(block_output(3), 1.0).to_dict()]},
            {"name": "zeros", "outputs": [compare_output("y", REFERENCE, None, 1e-4).to_dict()]},
        ],
    }
    assert report({"images": [outcome("y", 0.25)]}).to_dict()["worst_relative_error"] == pytest.approx(0.25)
    assert report({}).to_dict()["worst_relative_error"] is None


def test_a_tolerance_is_written_with_that_of_blocks() -> None:
    assert TOLERANCE.to_dict() == {
        "element_type": "float32",
        "relative": 1e-3,
        "reason": "for these tests",
        "block": 1e-4,
    }
    assert Tolerance("float32", 0.5, "").to_dict()["block"] == 0.5


@pytest.mark.parametrize(
    ("kind", "measured", "limit", "block_measured", "block_limit"),
    [
        ("float32", 100 * 8e-7, 200 * 8e-7, 5e-6, 2e-5),
        ("float16", 2.4e-3, 6e-3, 1.8e-3, 6e-3),
        ("bfloat16", 2.7e-2, 6e-2, 2.5e-2, 4e-2),
        ("given", 2.0**-10, 2.0**-8.5, 2.0**-10, 2.0**-8.5),
    ],
)
def test_tolerances_follow_from_what_their_reasons_say(
    kind: str, measured: float, limit: float, block_measured: float, block_limit: float
) -> None:
    """Above what was measured, and below what a planted fault makes, or two to three times what was measured."""
    tolerance = GIVEN if kind == "given" else tolerance_for(kind)
    assert measured < tolerance.relative < limit
    assert block_measured < tolerance.of_block < block_limit
    assert tolerance.element_type == ("float32" if kind == "given" else kind)


def test_an_unknown_element_type_has_no_tolerance() -> None:
    assert [tolerance_for(kind).element_type for kind in ("float32", "bfloat16")] == ["float32", "bfloat16"]
    with pytest.raises(UnknownNameError, match=r"float8.*float32"):
        tolerance_for("float8")


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_tolerances_lie_between_rounding_and_the_faults_that_they_are_to_find(kind: str) -> None:
    rounding = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[kind]
    tolerance = tolerance_for(kind)
    assert 4 * rounding < tolerance.of_block <= tolerance.relative <= 1700 * rounding
    assert tolerance.relative <= 0.05
