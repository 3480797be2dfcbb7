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

from quartermap_deploy.frontend.node_names import read_name
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
        tolerance: largest relative error that passes.
        passed: whether the relative error is within the tolerance.
        detail: what is wrong, in words; empty if it passed.
    """

    name: str
    relative_error: float
    max_abs_error: float
    largest: float
    tolerance: float
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
    name: str, reference: NDArray[Any], found: NDArray[Any] | None, tolerance: float
) -> OutputComparison:
    """Compare one output. One that is missing, another shape or element type, NaN or infinity always fails.

    Args:
        name: name of the output.
        reference: what is right.
        found: what the target returned, or None.
        tolerance: largest relative error that passes.
    """

    def failed(detail: str) -> OutputComparison:
        return OutputComparison(name, np.inf, np.inf, np.inf, tolerance, False, detail)

    if found is None:
        return failed("the target has no such output")
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
    passed = relative <= tolerance
    detail = "" if passed else f"{relative:.2e} of the largest value, tolerance {tolerance:.0e}"
    return OutputComparison(name, relative, error, largest, tolerance, passed, detail)


def block_of(output: str) -> int | None:
    """The block whose scan or output this is, or None if it is neither."""
    name = read_name(output)
    return None if name is None else name.block


def relative_to_largest(tolerance: Tolerance) -> Callable[[Mapping[str, Any], Mapping[str, Any]], Any]:
    """A polygraphy compare function: reference first, target second, by name; outputs that one side lacks fail."""

    def compare(reference: Mapping[str, Any], found: Mapping[str, Any]) -> OrderedDict[str, OutputComparison]:
        return OrderedDict(
            (
                name,
                compare_output(
                    name,
                    np.asarray(expected),
                    np.asarray(found[name]) if name in found else None,
                    tolerance.relative if block_of(name) is None else tolerance.of_block,
                ),
            )
            for name, expected in reference.items()
        )

    return compare
