"""inline_scans: put the body of every scan into the main graph.

    scan(x…)  →  the nodes of its function, named after the scan: `block_3/scan/mul_12`

For TensorRT's parser, which tells functions apart by their names alone and ignores their overloads (TensorRT-RTX 1.7:
of several bodies it takes one for all scans), and so that a layer of an engine, or an error, names its block.

Refuses: scans without a function body.
"""

from __future__ import annotations

import onnx

from quartermap_deploy.errors import PassError
from quartermap_deploy.lowering.operator import DOMAIN, SCANS

NAME = "inline_scans"


def inline_scans(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the bodies of its scans in place of them, and without their functions.

    Args:
        model: a model that `lower` gave bodies; not changed. Its body must not be a loop over subgraphs.

    Raises:
        PassError: if a scan has no body, or one with subgraphs.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    functions = {(f.name, f.overload): f for f in result.functions if f.domain == DOMAIN}
    nodes: list[onnx.NodeProto] = []
    for node in result.graph.node:
        if node.domain != DOMAIN or node.op_type not in SCANS:
            nodes.append(node)
            continue
        if (node.op_type, node.overload) not in functions:
            raise PassError(f"{NAME}: the scan {node.name} has no function body; run lower first")
        nodes += _body(node, functions[node.op_type, node.overload])
    kept = [f for f in result.functions if f.domain != DOMAIN]
    opsets = [item for item in result.opset_import if item.domain != DOMAIN]
    for field, values in (
        (result.graph.node, nodes),
        (result.functions, kept),
        (result.opset_import, opsets),
    ):
        copies = list(values)
        del field[:]
        field.extend(copies)
    return result


def _body(node: onnx.NodeProto, function: onnx.FunctionProto) -> list[onnx.NodeProto]:
    names = dict(zip(function.input, [*node.input, *[""] * len(function.input)], strict=False))
    names |= dict(zip(function.output, node.output, strict=True))
    names[""] = ""
    made = []
    for inner in function.node:
        if any(attribute.HasField("g") or attribute.ref_attr_name for attribute in inner.attribute):
            raise PassError(f"{NAME}: the body of {node.name} has a subgraph, {inner.op_type}")
        copy = onnx.NodeProto()
        copy.CopyFrom(inner)
        copy.name = f"{node.name}/{inner.output[0]}"
        for values in (copy.input, copy.output):
            renamed = [names.setdefault(value, f"{node.name}/{value}") for value in values]
            del values[:]
            values.extend(renamed)
        made.append(copy)
    return made
