"""Comparing the outputs of two runners: what counts as equal, and what is said about it.

The function returned by `relative_to_largest` is a compare function for polygraphy's `Comparator.compare_accuracy`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.validation.tolerances import Tolerance


@dataclass(frozen=True)
class OutputComparison:
    """How one output of a target compares with the reference.

    Attributes:
        name: name of the output.
        relative_error: largest absolute difference / largest absolute value of the reference; infinite where the two
            cannot be compared.
        max_abs_error: largest absolute difference.
        largest: largest absolute value of the reference.
        passed: whether the relative error is within the tolerance.
        detail: what is wrong, in words; empty if it passed.
    """

    name: str
    relative_error: float
    max_abs_error: float
    largest: float
    passed: bool
    detail: str = ""

    def __bool__(self) -> bool:
        return self.passed

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which has no infinity."""
        values = asdict(self)
        for name in ("relative_error", "max_abs_error", "largest"):
            if not np.isfinite(values[name]):
                values[name] = None
        return values


def compare_output(
    name: str, reference: NDArray[Any], found: NDArray[Any], tolerance: Tolerance
) -> OutputComparison:
    """Compare one output. A wrong shape, a wrong type, NaN or infinity always fails."""

    def failed(detail: str) -> OutputComparison:
        return OutputComparison(name, float("inf"), float("inf"), float("inf"), False, detail)

    if reference.shape != found.shape:
        return failed(f"shape {found.shape}, expected {reference.shape}")
    if reference.dtype != found.dtype:
        return failed(f"type {found.dtype}, expected {reference.dtype}")
    for label, array in (("the reference", reference), ("the target", found)):
        if not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            return failed(f"{count} of {array.size} values of {label} are NaN or infinite")
    if reference.size == 0:
        return failed("the output is empty")
    wide = reference.astype(np.float64)
    error = float(np.abs(found.astype(np.float64) - wide).max())
    largest = float(np.abs(wide).max())
    # An output of zeros has no scale; then every difference counts in full.
    relative = error / largest if largest > 0 else error
    passed = relative <= tolerance.relative
    detail = "" if passed else f"{relative:.2e} of the largest value, tolerance {tolerance.relative:.0e}"
    return OutputComparison(name, relative, error, largest, passed, detail)


def relative_to_largest(tolerance: Tolerance) -> Callable[[Mapping[str, Any], Mapping[str, Any]], Any]:
    """A polygraphy compare function: reference first, target second, by name; outputs that one side lacks fail."""

    def compare(reference: Mapping[str, Any], found: Mapping[str, Any]) -> OrderedDict[str, OutputComparison]:
        results: OrderedDict[str, OutputComparison] = OrderedDict()
        for name in reference:
            if name in found:
                results[name] = compare_output(
                    name, np.asarray(reference[name]), np.asarray(found[name]), tolerance
                )
            else:
                results[name] = OutputComparison(
                    name, float("inf"), float("inf"), float("inf"), False, "the target has no such output"
                )
        return results

    return compare
