"""Layer normalisation of maps as one native operator, put in as a session is made; the file stays as it is.

    Transpose(0, 2, 3, 1) → LayerNormalization(axis=-1) → Transpose(0, 3, 1, 2)  →  quartermap.LayerNormalization2D

Visual state-space models normalise the channels of maps that lie channel-first, three times a block. ONNX's operator
takes the last axis, so each map is turned over twice for it; on a CPU that takes longer than the normalisation. The
native operator reads and writes the map as it lies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.lowering.operator import DOMAIN, VERSION

if TYPE_CHECKING:
    import onnx

NORM = "LayerNormalization2D"
TO_CHANNEL_LAST = [0, 2, 3, 1]
TO_CHANNEL_FIRST = [0, 3, 1, 2]
_DEFAULT_EPSILON = 1e-5


def fused_model(model: Path | bytes) -> Path | bytes:
    """Return a model with its normalisations replaced, serialised; as it came where it has none."""
    import onnx

    found = onnx.load_model_from_string(model) if isinstance(model, bytes) else onnx.load(model)
    return found.SerializeToString() if fuse_norms(found) else model


def fuse_norms(model: onnx.ModelProto) -> int:
    """Replace every layer normalisation between two transpositions; return how many there were.

    Args:
        model: changed in place. Only maps in float32 are meant: those whose scale and bias are float32 constants.
    """
    from onnx import helper

    graph = model.graph
    makers = {node.output[0]: node for node in graph.node if len(node.output) == 1}
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(value.name for value in graph.output)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    replaced: dict[str, onnx.NodeProto] = {}
    gone: set[str] = set()
    for last in graph.node:
        norm = makers.get(last.input[0]) if _turns(last, TO_CHANNEL_FIRST) else None
        if norm is None or uses[norm.output[0]] != 1 or not _is_meant(norm, constants):
            continue
        first = makers.get(norm.input[0])
        if first is None or not _turns(first, TO_CHANNEL_LAST):
            continue
        replaced[last.output[0]] = helper.make_node(
            NORM,
            [first.input[0], *norm.input[1:]],
            [last.output[0]],
            name=norm.name,
            domain=DOMAIN,
            epsilon=float(_attributes(norm).get("epsilon", _DEFAULT_EPSILON)),
        )
        gone.add(norm.output[0])
        uses[first.output[0]] -= 1
        if uses[first.output[0]] == 0:
            gone.add(first.output[0])
    if replaced:
        kept = [replaced.get(node.output[0], node) for node in graph.node if node.output[0] not in gone]
        del graph.node[:]
        graph.node.extend(kept)
        if DOMAIN not in {entry.domain for entry in model.opset_import}:
            model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    return len(replaced)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _turns(node: onnx.NodeProto, order: list[int]) -> bool:
    """Whether a node transposes maps so."""
    return node.op_type == "Transpose" and node.domain == "" and _attributes(node).get("perm") == order


def _is_meant(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a node normalises the last of four axes, with constants in float32."""
    from onnx import TensorProto

    if node.op_type != "LayerNormalization" or node.domain != "" or len(node.input) != 3:
        return False
    found = [constants.get(name) for name in node.input[1:]]
    return _attributes(node).get("axis", -1) in (-1, 3) and all(
        tensor is not None and tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 1
        for tensor in found
    )
