"""How far a target may depart from the reference: one table, with the reason for each entry."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from quartermap_deploy.errors import UnknownNameError


@dataclass(frozen=True)
class Tolerance:
    """The largest difference that counts as equal, as a share of the largest absolute value of the reference output.

    Attributes:
        element_type: type that weights and activations have in the target.
        relative: for the logits, from image to logits.
        reason: where the numbers come from.
        block: for every scan and every block; None if it is that of the logits.
    """

    element_type: str
    relative: float
    reason: str
    block: float | None = None

    @property
    def of_block(self) -> float:
        """The tolerance of scans and blocks."""
        return self.relative if self.block is None else self.block

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "block": self.of_block}


_TABLE = (
    Tolerance(
        "float32",
        1e-4,
        "float32 rounds to 6e-8. A scan or block of the deepest models, given its input, errs by up to 8e-7, by up to "
        "5e-6 on weights made to amplify errors, and a fault of direction moves the scan by 2e-5 at least in the "
        "models tried, new weights among them. On their way to the logits errors may grow a hundredfold",
        block=1e-5,
    ),
    Tolerance(
        "float16",
        5e-3,
        "float16 rounds to 5e-4. Rounded after every operator, the blocks of seven models err by 0.8e-3 to 1.8e-3 by "
        "themselves, the logits by up to 2.4e-3, and no more with 21 blocks than with 8; a runtime that adds up in "
        "float16 comes on top",
        block=5e-3,
    ),
    Tolerance(
        "bfloat16",
        5e-2,
        "bfloat16 rounds to 4e-3. Rounded after every operator, the blocks of seven models err by 0.6e-2 to 2.5e-2 by "
        "themselves, the logits by up to 2.7e-2",
        block=3e-2,
    ),
)

GIVEN = Tolerance(
    "float32",
    2e-3,
    "a reference that the user saved was computed by other kernels, mostly on a GPU: exponentials in less precision, "
    "products in TF32 (10 bits) if PyTorch was told so; a wrong reading of a scan moves an output by far more",
)
"""For the tensors that a user gives as a reference."""

STORED = {
    "float32": Tolerance("float32", 1e-4, "weights as they are: the tolerance of float32"),
    "float16": Tolerance(
        "float32",
        5e-3,
        "weights rounded to 11 bits, 5e-4, each once, and everything computed in float32: VMamba-T errs by 7e-4, the "
        "digits by 2e-4. The tolerance is that of float16 as a type",
    ),
    "int8": Tolerance(
        "float32",
        5e-2,
        "weights rounded to 8 bits with a scale for each channel, 4e-3 of a channel's largest weight. VMamba-T errs by "
        "1.7e-2 with it, the digits by 2e-3. That is another model, whose accuracy has to be measured",
    ),
}
"""For weights that are stored in a smaller type than they are computed in, by how they are stored."""


def tolerance_for(element_type: str) -> Tolerance:
    """Return the tolerance of an element type.

    Raises:
        UnknownNameError: if there is none.
    """
    for entry in _TABLE:
        if entry.element_type == element_type:
            return entry
    raise UnknownNameError.for_choice("element type", element_type, (entry.element_type for entry in _TABLE))
