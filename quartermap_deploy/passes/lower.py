"""lower: give every scan the body that the target wants.

    SelectiveScan2D (no body)  →  SelectiveScan2D + local function `quartermap.SelectiveScan2D` in standard operators
    SelectiveScan (no body)    →  SelectiveScan + local function `quartermap.SelectiveScan`, likewise

The body `scan` serves every size; `tree` is written for each size of the maps, or length of the sequences, that the
graph has, so that such a model holds several functions, told apart by their overload names. Where the graph leaves it
open, the sizes of the inputs at hand tell how large it may be.

With the function in the file, ONNX Runtime and every other runtime that knows ONNX functions runs the model as it is,
and TensorRT ≥ 10.7 still prefers a plugin of the same name when one is loaded.

Refuses: maps whose scan has a state matrix that is no constant, because the body depends on the state size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    direction_names,
)
from quartermap_deploy.lowering.scan_body import scan_body
from quartermap_deploy.lowering.sequence_body import sequence_body
from quartermap_deploy.lowering.sequence_tree_body import SequenceTreeVariant, sequence_tree_body
from quartermap_deploy.lowering.tree_body import TreeVariant, tree_body
from quartermap_deploy.lowering.tree_scan import OPEN_LENGTH
from quartermap_deploy.lowering.versions import stamp_ir_version
from quartermap_deploy.passes.shapes import infer_shapes_at

Body = Callable[[Any, str], onnx.FunctionProto]
InputShapes = Mapping[str, Sequence[int]]
"""The shape of each input of a graph, by name."""
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


def lower(model: onnx.ModelProto, body: str = "scan", at: Sequence[InputShapes] = ()) -> onnx.ModelProto:
    """Return the model with a function for each variant of its scans; functions that are there are replaced.

    Its IR version is the lowest that is valid: 9 in opset 20, and 10 where functions have overloads.

    Args:
        model: a model with SelectiveScan2D or SelectiveScan nodes; not changed.
        body: a key of `BODIES`.
        at: for a body that depends on sizes, shapes of all inputs between which those lie that it has to serve, such as
            the smallest and the largest; without them it serves maps of up to 65,536 positions where sizes are open.

    Raises:
        PassError: if the body is unknown, the state matrix of a scan of maps is no constant, or the graph contradicts
            itself at the given shapes.
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
    sizes = _Sizes(result, at) if body == "tree" else None
    overloads: dict[str, dict[Any, str]] = {name: {} for name in _VARIANTS}
    for node in result.graph.node:
        if node.domain != DOMAIN or node.op_type not in _VARIANTS:
            continue
        inputs, variant_of = _VARIANTS[node.op_type]
        A = node.input[inputs.index("A")]
        if node.op_type == SELECTIVE_SCAN_2D and A not in state_sizes:
            raise PassError(f"{NAME}: the state matrix {A} of {node.name} is no constant (K·d_inner, N)")
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == SELECTIVE_SCAN_2D:
            _write_order(node, direction_names(attributes))
        variant = variant_of(node.input, attributes, state_sizes.get(A))
        if sizes is not None:
            variant = sizes.tree_variant(variant, node.input[0])
        # Runtimes match a plugin by name alone, so the plain name goes to the first, and mostly only, variant.
        own = overloads[node.op_type]
        overload = own.setdefault(variant, "" if not own else f"variant_{len(own)}")
        # Files of IR versions before 10 have no such field, not even an empty one.
        node.ClearField("overload")
        if overload:
            node.overload = overload
    for name, variants in overloads.items():
        result.functions.extend(
            BODIES[body][name](variant, overload) for variant, overload in variants.items()
        )
    _match_opset(result)
    if any(overloads.values()) and DOMAIN not in {item.domain for item in result.opset_import}:
        result.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    stamp_ir_version(result)
    return result


def _write_order(node: onnx.NodeProto, directions: Sequence[str]) -> None:
    """Say the directions once more, in a form that a native kernel can read."""
    kept = [attribute for attribute in node.attribute if attribute.name != "order"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("order", ",".join(directions))])


def _match_opset(model: onnx.ModelProto) -> None:
    """Let the functions have the opset of a model that is ahead of them, as one in bfloat16 is.

    ONNX wants the same version of an operator inside and outside; later ones only take more types.
    """
    (version,) = (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    for function in model.functions:
        for entry in function.opset_import:
            if entry.domain == "":
                entry.version = max(entry.version, version)


class _Sizes:
    """What is known of the size of what is scanned: of (H, W) of maps and of (L,) of sequences."""

    def __init__(self, model: onnx.ModelProto, at: Sequence[InputShapes]) -> None:
        self._known = _sides(
            (value.name, value.type) for value in (*model.graph.input, *model.graph.value_info)
        )
        self._model, self._at = model, at

    def tree_variant(self, variant: ScanVariant | SequenceVariant, name: str) -> Any:
        """The variant of a `tree` body for a scan of the value `name`."""
        sizes = {self._known[name]} if name in self._known else self._possible(name)
        size = next(iter(sizes)) if len(sizes) == 1 else None
        longest = max(map(math.prod, sizes), default=OPEN_LENGTH)
        if isinstance(variant, SequenceVariant):
            return SequenceTreeVariant(
                **vars(variant), length=None if size is None else size[0], longest=longest
            )
        pair = None if size is None else (size[0], size[1])
        return TreeVariant(**vars(variant), size=pair, longest=longest)

    def _possible(self, name: str) -> set[tuple[int, ...]]:
        """The sizes that a value has at the given shapes; none where one of them stays unknown."""
        sizes = [found.get(name) for found in self._at_shapes]
        return {size for size in sizes if size is not None} if None not in sizes else set()

    @functools.cached_property
    def _at_shapes(self) -> list[dict[str, tuple[int, ...]]]:
        found = []
        for shapes in self._at:
            try:
                found.append(_sides(infer_shapes_at(self._model, shapes).items()))
            except PassError as error:
                sizes = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
                raise PassError(f"{NAME}: the graph does not fit inputs of {sizes}: {error}") from error
        return found


def _sides(values: Iterable[tuple[str, onnx.TypeProto]]) -> dict[str, tuple[int, ...]]:
    """Of the values whose type is given by name, the sizes behind batch and channels, where all of them are known."""
    found = {}
    for name, kind in values:
        sides = kind.tensor_type.shape.dim[2:]
        if sides and all(side.dim_value > 0 for side in sides):
            found[name] = tuple(side.dim_value for side in sides)
    return found
