"""The ONNX operators of domain `quartermap`: their names, inputs and attributes.

    y = SelectiveScan2D(x, dt, B, C, A, D, dt_bias, dt_weight)      directions, softplus, order
    y = SelectiveScan(u, delta, A, B, C, D, delta_bias)             delta_softplus

`dt_weight` is optional: without it, dt is the full time-step map. So are `D` and `delta_bias`. `scan.operators`
defines the values. `order` says the same as `directions`, joined by commas: kernels of ONNX Runtime can read a string,
and no list of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quartermap_deploy.errors import PassError

DOMAIN = "quartermap"
VERSION = 1
SELECTIVE_SCAN_2D = "SelectiveScan2D"
SELECTIVE_SCAN = "SelectiveScan"
SCANS = (SELECTIVE_SCAN_2D, SELECTIVE_SCAN)
INPUTS_2D = ("x", "dt", "B", "C", "A", "D", "dt_bias", "dt_weight")
INPUTS_1D = ("u", "delta", "A", "B", "C", "D", "delta_bias")
ATTRIBUTES_2D = ("directions", "softplus", "order")
ATTRIBUTES_1D = ("delta_softplus",)
MAPS = slice(0, 4)
"""The inputs of SelectiveScan2D that are feature maps; the others are parameters."""

DIRECTIONS = ("row", "column", "row_reverse", "column_reverse")
"""The scan orders of VMamba's SS2D, in the order in which its checkpoints store their parameters."""

ORIENTATIONS = ("row", "column")

OPSETS = range(17, 24)
"""The opsets of the standard operators in which a model can be written. 17 is the first with LayerNormalization."""


@dataclass(frozen=True)
class Direction:
    """One scan order: along rows or columns, from the first position or from the last."""

    orientation: str
    reverse: bool

    @classmethod
    def parse(cls, name: str) -> Direction:
        """Read a name such as `column_reverse`.

        Raises:
            PassError: if the name is unknown.
        """
        orientation = name.removesuffix("_reverse")
        if orientation not in ORIENTATIONS:
            raise PassError(
                f"unknown scan direction {name!r}; expected row, column, row_reverse or column_reverse"
            )
        return cls(orientation, name != orientation)


def direction_names(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """The scan orders of a SelectiveScan2D, given its attributes."""
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in attributes["directions"])


@dataclass(frozen=True)
class ScanVariant:
    """What a function body depends on beside its tensors: nodes that share it can share the function.

    Attributes:
        directions: the scan orders, in the order of the parameters.
        softplus: whether softplus is applied to the time step.
        d_state: N, the state size.
        low_rank: whether dt is the low-rank map that `dt_weight` projects.
    """

    directions: tuple[str, ...]
    softplus: bool
    d_state: int
    low_rank: bool

    @classmethod
    def of(cls, inputs: Sequence[str], attributes: Mapping[str, Any], d_state: int) -> ScanVariant:
        """Read the variant from a node's inputs, its attributes and the second axis of A."""
        return cls(
            direction_names(attributes),
            bool(attributes.get("softplus", 1)),
            d_state,
            len(inputs) == len(INPUTS_2D),
        )


@dataclass(frozen=True)
class SequenceVariant:
    """What the function body of the one-dimensional operator depends on beside its tensors.

    Attributes:
        softplus: whether softplus is applied to the time step.
        skip: whether there is a D.
        bias: whether there is a delta_bias.
    """

    softplus: bool
    skip: bool
    bias: bool

    @classmethod
    def of(cls, inputs: Sequence[str], attributes: Mapping[str, Any], d_state: int) -> SequenceVariant:
        """Read the variant from a node's inputs and its attributes."""
        present = {name for name, value in zip(INPUTS_1D, inputs, strict=False) if value}
        return cls(bool(attributes.get("delta_softplus", 0)), "D" in present, "delta_bias" in present)
