"""How a session of ONNX Runtime computes the scans of its model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["native", "portable", "tree", "none"]


@dataclass(frozen=True)
class ScanForm:
    """What runs the scans of a model.

    Attributes:
        kind: "native", the operator of the CPU library, or of the CUDA library; "portable", the standard operators that
            the file holds; "tree", standard operators without a loop, written as a model is loaded for a GPU; "none",
            as the model has no scan.
        instruction_set: of the native operator, such as "avx2", or "cuda"; None for the others.
        reason: why the native operator is not used; None where it is, or where there is nothing to use it for.
    """

    kind: Kind
    instruction_set: str | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.kind == "native":
            return f"native ({self.instruction_set})"
        return "no scans" if self.kind == "none" else self.kind
