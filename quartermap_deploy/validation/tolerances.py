"""How far a target may depart from the reference: one table, with the reason for each entry."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from quartermap_deploy.errors import UnknownNameError


@dataclass(frozen=True)
class Tolerance:
    """The largest difference that counts as equal.

    Attributes:
        element_type: type that weights and activations have in the target.
        relative: largest absolute difference, as a share of the largest absolute value of the reference output.
        reason: where the number comes from.
    """

    element_type: str
    relative: float
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


_TABLE = (
    Tolerance(
        "float32",
        1e-4,
        "float32 rounds to 6e-8; through the blocks of the deepest model that grows to 1e-6 to 1e-5 of the largest "
        "output. A wrong direction shows far above that where the scan matters, but on weights with which it hardly "
        "matters, such as new ones, it can stay below",
    ),
)


def tolerance_for(element_type: str) -> Tolerance:
    """Return the tolerance of an element type.

    Raises:
        UnknownNameError: if there is none.
    """
    for entry in _TABLE:
        if entry.element_type == element_type:
            return entry
    raise UnknownNameError.for_choice("element type", element_type, (entry.element_type for entry in _TABLE))
