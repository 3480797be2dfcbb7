"""cast_precision: write 16-bit types into a float32 graph.

    images ─ Conv ─ … ─ block_n ─ … ─ ReduceMean ─ Gemm ─ logits                        all float32
    →
    images ─ Cast ─ Conv ─ … ─ block_n ─ … ─ Cast ─ ReduceMean ─ Gemm ─ logits
             └────────── float16 or bfloat16 ─┘  └──────── float32 ─────┘

Weights and activations get 16 bits. These stay float32:

* A, D and dt_bias of every scan, as the operator wants them; its state is float32 inside;
* the statistics of every LayerNormalization, by its attribute stash_type;
* the scale, shift and statistics of every BatchNormalization;
* the classifier head, from the global pool on, and the logits;
* every operator that has no form of the type;
* weights that the type cannot hold, and whatever the caller names, with the operators that read or make it.

`precision/plan.py` chooses them, and `precision/writing.py` writes the types.

TensorRT 11 has no precision flags any more: what it computes in is what is written here.

Refuses: graphs with function bodies or subgraphs, because the pass comes before `lower`; graphs of the other 16-bit
type.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx

from quartermap_deploy.errors import PassError
from quartermap_deploy.lowering.element_types import (
    FLOAT,
    ElementType,
    element_type,
    types_of_values,
    types_present,
)
from quartermap_deploy.passes.base import PassReport
from quartermap_deploy.passes.precision.plan import NAME, PrecisionPlan
from quartermap_deploy.passes.precision.writing import TypeWriter
from quartermap_deploy.passes.shapes import infer_shapes

IO = Literal["float32", "same"]


@dataclass
class CastReport(PassReport):
    """What the pass did.

    Attributes:
        precision: the 16-bit type.
        kept: why an operator or weight beside the scans' parameters is float32, by its name.
        operators: how many operators of the graph make values of each type, casts left out.
        casts: casts in the graph.
        subnormal: share of elements too small for all the type's bits, for weights with more than 1 % of them.
    """

    precision: str = ""
    kept: dict[str, str] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    casts: int = 0
    subnormal: dict[str, float] = field(default_factory=dict)


def cast_precision(
    model: onnx.ModelProto,
    precision: str,
    *,
    keep_float32: Iterable[str] = (),
    io: IO = "float32",
    blocks_float32: Iterable[int] = (),
) -> tuple[onnx.ModelProto, CastReport]:
    """Write 16-bit types into a model.

    Args:
        model: a float32 model whose scans have no bodies yet; not changed. A model that has the precision already is
            returned as it is.
        precision: "float16" or "bfloat16".
        keep_float32: names of values to hold in float32, and the operators that make and read them compute in float32
            too; or of operators to compute in float32, if there is no value of that name.
        io: type of the model's inputs and outputs: "float32", or "same" for that of `precision`.
        blocks_float32: blocks, from 1, to compute in float32, each with what leads into it: the stem before the first
            block, the downsampling before the first of a stage.

    Returns:
        The new model, with the type and shape of all its values, and what the pass did. Its opset is 22 for bfloat16.

    Raises:
        UnknownNameError: if there is no such precision.
        PassError: if the graph has bodies or another precision, or a name or block does not exist.
    """
    kind = element_type(precision)
    if io not in ("float32", "same"):
        raise PassError(f"{NAME}: io = {io!r}; expected float32 or same")
    _require_bare(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    present = list(types_present(model.graph))
    if present == [kind]:
        report = CastReport(NAME, precision=precision)
        report.operators, report.casts = _count_operators(result), _casts(result)
        return result, report
    if present:
        raise PassError(f"{NAME}: the graph is in {present[0].name} already; start from the float32 graph")
    _raise_opset(result, kind)
    result = infer_shapes(result)
    _initializers_for_constants(result.graph)
    plan = PrecisionPlan(result, kind)
    plan.keep_unsupported()
    plan.keep_head()
    plan.keep_named(keep_float32)
    plan.keep_blocks(blocks_float32)
    plan.keep_weights_out_of_range()
    plan.keep_between_float32(float32_outputs=io == "float32")
    report = CastReport(NAME, precision=precision, kept=plan.described(), subnormal=plan.subnormal)
    TypeWriter(plan, FLOAT if io == "float32" else kind.number).write()
    typed = infer_shapes(result)
    report.operators, report.casts = _count_operators(typed), _casts(typed)
    report.changed = _changes(typed, kind, report)
    return typed, report


def _require_bare(model: onnx.ModelProto) -> None:
    """Refuse graphs that the pass cannot see through."""
    if bodies := [f.name for f in model.functions]:
        raise PassError(
            f"{NAME}: the model has a body for {bodies[0]}; the pass comes before lower, which attaches the bodies"
        )
    for node in model.graph.node:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise PassError(f"{NAME}: {node.op_type} {node.name} has a subgraph, which the pass cannot type")


def _raise_opset(model: onnx.ModelProto, kind: ElementType) -> None:
    """Raise the opset to the first that has the type.

    From 20 to 22 operators gained types and none changed its meaning but GroupNormalization.
    """
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version < kind.opset:
            for node in model.graph.node:
                if node.op_type == "GroupNormalization":
                    raise PassError(f"{NAME}: {node.name}: GroupNormalization differs in opset {kind.opset}")
            entry.version = kind.opset


def _initializers_for_constants(graph: onnx.GraphProto) -> None:
    """Turn float32 Constant nodes into initializers, which are typed by who reads them."""
    kept = []
    for node in graph.node:
        values = {a.name: a for a in node.attribute} if node.op_type == "Constant" else {}
        if "value" in values and values["value"].t.data_type == FLOAT:
            tensor = graph.initializer.add()
            tensor.CopyFrom(values["value"].t)
            tensor.name = node.output[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _count_operators(model: onnx.ModelProto) -> dict[str, int]:
    """How many operators of a typed graph make values of each floating-point type, casts left out."""
    types = types_of_values(model.graph)
    names = {FLOAT: "float32", **{item.number: item.name for item in types_present(model.graph)}}
    counts: dict[str, int] = {}
    for node in model.graph.node:
        name = names.get(types.get(node.output[0], 0))
        if name is not None and node.op_type not in ("Cast", "Constant"):
            counts[name] = counts.get(name, 0) + 1
    return counts


def _casts(model: onnx.ModelProto) -> int:
    return sum(node.op_type == "Cast" for node in model.graph.node)


def _changes(model: onnx.ModelProto, kind: ElementType, report: CastReport) -> list[str]:
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type == kind.number]
    size = sum(int(np.prod(tensor.dims)) for tensor in weights)
    made = report.operators
    lines = [
        f"{len(weights)} weights, {size:,} numbers, in {kind.name}",
        f"{made.get(kind.name, 0)} operators in {kind.name}, {made.get('float32', 0)} in float32",
        f"{report.casts} casts",
    ]
    return lines + [f"{name} stays float32: {reason}" for name, reason in report.kept.items()]
