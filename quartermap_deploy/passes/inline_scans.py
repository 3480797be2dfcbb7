"""inline_scans: put the body of every scan into the main graph.

    scan(x…)  →  the nodes of its function, named after the scan: `block_3/scan/mul_12`, and last `block_3/scan`

For runtimes and tools that know neither functions nor a domain of ours; for TensorRT's parser, which tells functions
apart by their names alone and ignores their overloads (TensorRT-RTX 1.7: of several bodies it takes one for all scans);
and so that a layer of an engine, or an error, names its block. Names of values and nodes are unique over the main graph
and every subgraph. The node that makes what the scan returned has the name of the scan.

Bodies of loops take what they need as inputs of theirs. A loop that reads a value of the graph around it, as a scan
with several numbers of state reads its state matrix, gets that value as a state which never changes: OpenVINO 2026.4
counts such a value as an input that is missing, and refuses the loop.

Refuses: scans without a function body, and bodies that hand on attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import helper

from quartermap_deploy.errors import PassError
from quartermap_deploy.frontend.node_names import names_scan
from quartermap_deploy.lowering.operator import DOMAIN, SCANS

NAME = "inline_scans"


def inline_scans(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the bodies of its scans in place of them, and without their functions.

    Args:
        model: a model that `lower` gave bodies; not changed.

    Raises:
        PassError: if a scan has no body, or one that takes attributes from its call.
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


def makes_scan(node: onnx.NodeProto) -> bool:
    """Whether a node returns what a scan does: the scan itself, or the last node of one that is written out."""
    if node.domain == DOMAIN:
        return node.op_type in SCANS
    return not node.domain and names_scan(node.name)


def _body(node: onnx.NodeProto, function: onnx.FunctionProto) -> list[onnx.NodeProto]:
    names = dict(zip(function.input, [*node.input, *[""] * len(function.input)], strict=False))
    names |= dict(zip(function.output, node.output, strict=True))
    made = _renamed(function.node, names, node.name)
    made[-1].name = node.name
    return made


def _renamed(nodes: Sequence[onnx.NodeProto], names: Mapping[str, str], prefix: str) -> list[onnx.NodeProto]:
    """Copies of nodes that are named after what they make, behind a prefix.

    Args:
        nodes: of a function or of a subgraph in it.
        names: what values are called from now on that are known already; the others get the prefix.
        prefix: name of the scan, or of the loop.
    """
    own = {"": "", **names}
    made = []
    for inner in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(inner)
        copy.name = f"{prefix}/{inner.output[0]}"
        for values in (copy.input, copy.output):
            renamed = [own.setdefault(value, f"{prefix}/{value}") for value in values]
            del values[:]
            values.extend(renamed)
        for attribute in copy.attribute:
            if attribute.ref_attr_name:
                raise PassError(
                    f"{NAME}: {copy.name} takes its {attribute.name} from the call of its function, and cannot be "
                    "written out"
                )
            if attribute.HasField("g"):
                _rename_subgraph(attribute.g, own, copy.name)
        if copy.op_type == "Scan":
            _close(copy)
        made.append(copy)
    return made


def _rename_subgraph(graph: onnx.GraphProto, around: Mapping[str, str], prefix: str) -> None:
    """Rename what a subgraph defines, in place; `around` are the values of the graph that holds it."""
    own = dict(around)
    own |= {value.name: f"{prefix}/{value.name}" for value in graph.input}
    own |= {name: f"{prefix}/{name}" for node in graph.node for name in node.output}
    nodes = _renamed(graph.node, own, prefix)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.name = prefix
    for value in (*graph.input, *graph.output):
        value.name = own[value.name]


def _close(scan: onnx.NodeProto) -> None:
    """Hand values of the graph around a Scan to its body as states that never change, in place."""
    (body,) = (attribute.g for attribute in scan.attribute if attribute.name == "body")
    (inputs,) = (attribute.i for attribute in scan.attribute if attribute.name == "num_scan_inputs")
    states = len(scan.input) - inputs
    known = {value.name for value in body.input} | {name for node in body.node for name in node.output}
    outer = dict.fromkeys(name for node in body.node for name in node.input if name and name not in known)
    for place, name in enumerate(outer, start=states):
        kept, after = f"{scan.name}/{name}", f"{scan.name}/{name}/after"
        for node in body.node:
            renamed = [kept if value == name else value for value in node.input]
            del node.input[:]
            node.input.extend(renamed)
        body.node.append(helper.make_node("Identity", [kept], [after], after))
        for values, value in ((body.input, kept), (body.output, after)):
            values.insert(place, helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
        scan.input.insert(place, name)
        scan.output.insert(place, f"{scan.name}/{name}/last")
