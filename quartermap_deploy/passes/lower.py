"""lower: give every scan the body that the target wants.

    SelectiveScan2D (no body)  →  SelectiveScan2D + local function `quartermap.SelectiveScan2D` in standard operators
    SelectiveScan (no body)    →  SelectiveScan + local function `quartermap.SelectiveScan`, likewise

The body `scan` serves every size; `tree` is written for each size of the maps, or length of the sequences, that the
graph has, so that such a model holds several functions, told apart by their overload names.

With the function in the file, ONNX Runtime and every other runtime that knows ONNX functions runs the model as it is,
and TensorRT ≥ 10.7 still prefers a plugin of the same name when one is loaded.

Refuses: maps whose scan has a state matrix that is no constant, because the body depends on the state size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
from onnx import helper

from quartermap_deploy.errors import PassError
from quartermap_deploy.lowering.operator import (
    DOMAIN,
    INPUTS_1D,
    INPUTS_2D,
    SELECTIVE_SCAN,
    SELECTIVE_SCAN_2D,
    VERSION,
    ScanVariant,
    SequenceVariant,
)
from quartermap_deploy.lowering.scan_body import scan_body
from quartermap_deploy.lowering.sequence_body import sequence_body
from quartermap_deploy.lowering.sequence_tree_body import SequenceTreeVariant, sequence_tree_body
from quartermap_deploy.lowering.tree_body import TreeVariant, tree_body

Body = Callable[[Any, str], onnx.FunctionProto]
BODIES: dict[str, dict[str, Body]] = {
    "scan": {SELECTIVE_SCAN_2D: scan_body, SELECTIVE_SCAN: sequence_body},
    "tree": {SELECTIVE_SCAN_2D: tree_body, SELECTIVE_SCAN: sequence_tree_body},
}
"""For each kind of body, how the function of each operator is written for one variant."""

NAME = "lower"
_VARIANTS: dict[str, tuple[Sequence[str], Callable[..., Any]]] = {
    SELECTIVE_SCAN_2D: (INPUTS_2D, ScanVariant.of),
    SELECTIVE_SCAN: (INPUTS_1D, SequenceVariant.of),
}


def lower(model: onnx.ModelProto, body: str = "scan") -> onnx.ModelProto:
    """Return the model with a function for each variant of its scans; functions that are there are replaced.

    Args:
        model: a model with SelectiveScan2D or SelectiveScan nodes; not changed.
        body: a key of `BODIES`.

    Raises:
        PassError: if the body is unknown, or the state matrix of a scan of maps is no constant.
    """
    if body not in BODIES:
        raise PassError(f"{NAME}: unknown body {body!r}; expected one of {', '.join(BODIES)}")
    result = onnx.ModelProto()
    result.CopyFrom(model)
    kept = [f for f in result.functions if f.domain != DOMAIN or f.name not in _VARIANTS]
    del result.functions[:]
    result.functions.extend(kept)

    state_sizes = {
        tensor.name: tensor.dims[1] for tensor in result.graph.initializer if len(tensor.dims) == 2
    }
    sizes = scanned_sizes(result) if body == "tree" else {}
    overloads: dict[str, dict[Any, str]] = {name: {} for name in _VARIANTS}
    for node in result.graph.node:
        if node.domain != DOMAIN or node.op_type not in _VARIANTS:
            continue
        inputs, variant_of = _VARIANTS[node.op_type]
        A = node.input[inputs.index("A")]
        if node.op_type == SELECTIVE_SCAN_2D and A not in state_sizes:
            raise PassError(f"{NAME}: the state matrix {A} of {node.name} is no constant (K·d_inner, N)")
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        variant = variant_of(node.input, attributes, state_sizes.get(A))
        if body == "tree":
            variant = _tree_variant(variant, sizes.get(node.input[0]))
        # Runtimes match a plugin by name alone, so the plain name goes to the first, and mostly only, variant.
        own = overloads[node.op_type]
        node.overload = own.setdefault(variant, "" if not own else f"variant_{len(own)}")
    for name, variants in overloads.items():
        result.functions.extend(
            BODIES[body][name](variant, overload) for variant, overload in variants.items()
        )
    _match_opset(result)
    if any(overloads.values()) and DOMAIN not in {item.domain for item in result.opset_import}:
        result.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    return result


def _match_opset(model: onnx.ModelProto) -> None:
    """Let the functions have the opset of a model that is ahead of them, as one in bfloat16 is.

    ONNX wants the same version of an operator inside and outside; later ones only take more types.
    """
    (version,) = (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    for function in model.functions:
        for entry in function.opset_import:
            if entry.domain == "":
                entry.version = max(entry.version, version)


def scanned_sizes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Of the values of a graph, by name, the sizes behind batch and channels, where they are known.

    Those are (H, W) of a map and (L,) of sequences.
    """
    found = {}
    for value in (*model.graph.input, *model.graph.value_info):
        sides = value.type.tensor_type.shape.dim[2:]
        if sides and all(side.dim_value > 0 for side in sides):
            found[value.name] = tuple(side.dim_value for side in sides)
    return found


def _tree_variant(variant: ScanVariant | SequenceVariant, size: tuple[int, ...] | None) -> Any:
    """The variant of a `tree` body, which knows the size of what is scanned, or that it is open."""
    if isinstance(variant, SequenceVariant):
        return SequenceTreeVariant(**vars(variant), length=None if size is None else size[0])
    return TreeVariant(**vars(variant), size=None if size is None else (size[0], size[1]))
