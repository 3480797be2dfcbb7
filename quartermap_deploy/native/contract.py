"""What the ONNX side and the plugin agree on, as data.

`plugins/contract/contract.h` holds the same in C++. A built library prints its own as JSON
(`quartermap_plugin_contract`), and `quartermap plugin check` compares the two, so that a library of another release is
found out before an engine is built with it.

How attributes arrive: TensorRT's ONNX parser passes those attributes of a node that the plugin's creator names. STRINGS
become one CHAR field, each string with a NUL behind it; INT becomes INT32. So the node of `lowering.operator` needs no
other attributes than it has, except `plugin_namespace` (and `plugin_version`), by which the parser looks the plugin up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from quartermap_deploy.lowering.operator import (
    DIRECTIONS,
    DOMAIN,
    INPUTS_2D,
    MAPS,
    SELECTIVE_SCAN_2D,
    VERSION,
)

KERNELS = 4
"""QUARTERMAP_SELECTIVE_SCAN_VERSION of `quartermap/selective_scan.h`: of its functions and structures."""

ELEMENT_TYPES = ("float32", "float16", "bfloat16")
"""In the order of `QuartermapElementType`."""

PARSER_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
"""Attributes that a node of the operator carries for TensorRT's parser, which looks the plugin up by them."""


@dataclass(frozen=True)
class Field:
    """A field that the plugin is created from; each has to be there.

    Attributes:
        name: the name of the node's attribute.
        type: TensorRT's name of the field's type.
    """

    name: str
    type: str


@dataclass(frozen=True)
class TensorContract:
    """An input or output.

    Attributes:
        name: as in the operator.
        type: "T", one of the element types and the same for all, or "float32".
        optional: whether it may be left out.
    """

    name: str
    type: str
    optional: bool = False


@dataclass(frozen=True)
class Contract:
    """The whole contract.

    Attributes:
        name: of the operator and the plugin.
        version: of both.
        namespace: of the plugin; the domain of the operator.
        fields: of the plugin.
        directions: the names that the field `directions` knows, in the order of `QuartermapDirection`.
        inputs: in their order.
        outputs: in their order.
        element_types: what T may be.
        kernels: version of the C interface.
    """

    name: str
    version: str
    namespace: str
    fields: tuple[Field, ...]
    directions: tuple[str, ...]
    inputs: tuple[TensorContract, ...]
    outputs: tuple[TensorContract, ...]
    element_types: tuple[str, ...]
    kernels: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON would give them back."""
        return {
            key: [dict(entry) if isinstance(entry, dict) else entry for entry in value]
            if isinstance(value, tuple)
            else value
            for key, value in asdict(self).items()
        }


CONTRACT = Contract(
    name=SELECTIVE_SCAN_2D,
    version=str(VERSION),
    namespace=DOMAIN,
    fields=(Field("directions", "CHAR"), Field("softplus", "INT32")),
    directions=DIRECTIONS,
    inputs=tuple(
        TensorContract(
            name,
            "T" if name in (*INPUTS_2D[MAPS], "dt_weight") else "float32",
            optional=name == "dt_weight",
        )
        for name in INPUTS_2D
    ),
    outputs=(TensorContract("y", "T"),),
    element_types=ELEMENT_TYPES,
    kernels=KERNELS,
)


def differences(found: Mapping[str, Any]) -> list[str]:
    """Compare a library's contract with this package's.

    Args:
        found: what the library prints, read from JSON; keys that this package does not know are left alone.

    Returns:
        One line for each difference; empty when they agree.
    """
    return [
        f"{key}: the library has {found.get(key)!r}, this package {expected!r}"
        for key, expected in CONTRACT.to_dict().items()
        if found.get(key) != expected
    ]
