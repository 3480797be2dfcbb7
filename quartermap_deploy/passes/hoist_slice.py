"""hoist_slice: subsample before the work instead of after it.

    keep(SiLU(DWConv(x)))  →  SiLU(DWConv_stride_s(x))

Subsampling commutes with operators that act on one position at a time, and a convolution with stride s computes exactly
the positions that the Slice would keep, when its padding keeps the size at stride 1. The output is the same number for
number.

Refuses, and leaves the Slice where it is: plans that keep more than one position of each group (no convolution has such
a stride); maps that are no convolution's, with SiLU or without, or are read elsewhere too; one-dimensional scans.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from quartermap_deploy.errors import PassError
from quartermap_deploy.passes.base import PassReport, Selection, producer, selected_scans
from quartermap_deploy.passes.subsampling import require_pruned, strided_slice

NAME = "hoist_slice"


class _CannotHoist(Exception):
    """Why a Slice stays where it is."""


def hoist_slice(graph: gs.Graph, selection: Selection) -> PassReport:
    """Move the Slice of every selected block into the depthwise convolution before it, in place.

    A block whose convolution has the stride already is left as it is.

    Raises:
        PassError: if a selected block was not pruned by this plan, or has neither the Slice nor a convolution with the
            stride.
    """
    report = PassReport(NAME)
    stride = selection.subsample.stride
    for scan in selected_scans(graph, selection, NAME):
        require_pruned(scan, selection.subsample, NAME)
        if not scan.of_map:
            report.refused[scan.block] = "its scan is one-dimensional: single steps of it are kept"
            continue
        if selection.subsample.keep != 1:
            report.refused[scan.block] = (
                f"keep = {selection.subsample.keep} positions of every {stride} cannot be a convolution's stride"
            )
            continue
        node = producer(scan.node.inputs[0])
        if strided_slice(node) == stride:
            assert node is not None
            try:
                conv = _convolution_before(graph, node, scan.block)
            except _CannotHoist as reason:
                report.refused[scan.block] = str(reason)
                continue
            conv.attrs["strides"] = [stride, stride]
            # A restoring node asks for the full size by the Shape of the map that is now smaller.
            for reader in [item for item in node.inputs[0].outputs if item.op == "Shape"]:
                reader.inputs = [conv.inputs[0]]
            _bypass(node)
            report.changed.append(f"block {scan.block}: {conv.name} now has stride {stride}")
        elif not _has_stride(node, stride):
            raise PassError(
                f"{NAME}: block {scan.block} is pruned, but neither a Slice nor a convolution of stride {stride} feeds "
                "its scan"
            )
    graph.cleanup()
    return report


def _convolution_before(graph: gs.Graph, keep: gs.Node, block: int) -> gs.Node:
    """The convolution whose activation `keep` reads.

    Raises:
        _CannotHoist: if the nodes are not activation and convolution, or are read elsewhere too.
    """
    activated = keep.inputs[0]
    conv = _before_activation(producer(activated))
    if conv is None:
        node = producer(activated)
        raise _CannotHoist(
            f"expected SiLU(Conv(x)) before the Slice of block {block}, found "
            f"{'a graph input' if node is None else f'{node.op} {node.name}'}"
        )
    _require_private(graph, keep, conv, block)
    _require_same_size(conv, block)
    return conv


def _require_private(graph: gs.Graph, keep: gs.Node, conv: gs.Node, block: int) -> None:
    """Refuse a convolution or activation that something else than the Slice reads, which needs every position."""
    activation = producer(keep.inputs[0])
    assert activation is not None
    inside = {id(keep), id(activation)}
    values = [keep.inputs[0], conv.outputs[0]]
    for item in activation.inputs:
        gate = producer(item)
        if gate is not None and gate is not conv and activation is not conv:
            inside.add(id(gate))
            values.append(item)
    for value in values:
        outside = [n.name for n in value.outputs if id(n) not in inside and n.op != "Shape"]
        if outside or any(value is output for output in graph.outputs):
            raise _CannotHoist(
                f"{value.name} of block {block} is also read by {', '.join(outside) or 'the graph output'}, "
                "which needs every position"
            )


def _require_same_size(conv: gs.Node, block: int) -> None:
    """Refuse a convolution that changes the size of its map: no stride of it gives the kept positions."""
    kernel = conv.attrs["kernel_shape"] if "kernel_shape" in conv.attrs else conv.inputs[1].shape[2:]
    pads, strides = conv.attrs.get("pads", [0, 0, 0, 0]), conv.attrs.get("strides", [1, 1])
    dilations, auto = conv.attrs.get("dilations", [1, 1]), conv.attrs.get("auto_pad", "NOTSET")
    same = all(2 * pad == size - 1 for pad, size in zip(pads, [*kernel, *kernel], strict=True))
    if not same or {*strides, *dilations} != {1} or auto != "NOTSET":
        raise _CannotHoist(
            f"{conv.name} of block {block} does not keep the size of its map with stride 1, so no stride of it "
            f"gives the kept positions: kernel {list(kernel)}, pads {list(pads)}, strides {list(strides)}, "
            f"dilations {list(dilations)}, auto_pad {auto}"
        )


def _before_activation(node: gs.Node | None) -> gs.Node | None:
    """The convolution in SiLU(Conv(x)) = c·sigmoid(c), given the last node of SiLU."""
    if node is None:
        return None
    if node.op == "Conv":
        return node
    if node.op == "Mul":
        for conv_value, gate in (node.inputs, node.inputs[::-1]):
            sigmoid, conv = producer(gate), producer(conv_value)
            if sigmoid is not None and sigmoid.op == "Sigmoid" and sigmoid.inputs[0] is conv_value:
                return conv if conv is not None and conv.op == "Conv" else None
    return None


def _has_stride(node: gs.Node | None, stride: int) -> bool:
    conv = _before_activation(node)
    return conv is not None and list(conv.attrs.get("strides", [1, 1])) == [stride, stride]


def _bypass(node: gs.Node) -> None:
    """Let the readers of a node's output read its first input instead."""
    source, output = node.inputs[0], node.outputs[0]
    for reader in list(output.outputs):
        reader.inputs = [source if item is output else item for item in reader.inputs]
    node.outputs = []
    node.inputs = []
