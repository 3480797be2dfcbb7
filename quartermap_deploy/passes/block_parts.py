"""The operators of each block of a graph, told by the values that blocks end with."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from quartermap_deploy.frontend.node_names import block_output


def block_parts(graph: onnx.GraphProto) -> dict[int, list[onnx.NodeProto]]:
    """The operators of each block, from 1, in graph order, each with what leads into it; 0 is what follows the last.

    A block ends with the value `block_<i>`. Operators that make only numbers for shapes are in the block that first
    asks for them.
    """
    maker = {name: place for place, node in enumerate(graph.node) for name in node.output}
    parts: dict[int, list[onnx.NodeProto]] = {}
    taken: set[int] = set()

    def collect(part: int, values: Iterable[str]) -> None:
        pending, own = [maker[value] for value in values if value in maker], set()
        while pending:
            place = pending.pop()
            if place not in taken and place not in own:
                own.add(place)
                pending += [maker[name] for name in graph.node[place].input if name in maker]
        taken.update(own)
        parts[part] = [graph.node[place] for place in sorted(own)]

    index = 1
    while block_output(index) in maker:
        collect(index, [block_output(index)])
        index += 1
    collect(0, [output.name for output in graph.output])
    return parts
