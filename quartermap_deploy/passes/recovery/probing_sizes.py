"""The sizes at which a graph with open sizes is run to see what it does.

Two of them, so that what holds at one size only is found out. Height and width differ, so that rows and columns cannot
be confused, and there are two images, so that the images of a batch cannot be either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx

from quartermap_deploy.passes.recovery.concrete import Concrete, Shape, concrete_graph
from quartermap_deploy.passes.recovery.graph_index import GraphIndex
from quartermap_deploy.passes.recovery.refusal import Refused

BATCHES = (2, 1)
_SIDES = (
    (64, 96),
    (96, 160),
    (128, 192),
    (192, 256),
    (224, 448),
    (448, 224),
    (56, 84),
    (112, 168),
    (256, 384),
)
"""Heights and widths of images to try: multiples of what models divide by, with maps of at least 2×3 after five
halvings, the smaller ones first; then multiples of 7, for windows."""
_FEWEST_STEPS = 6
"""Steps of a map of 2×3, the smallest on which rows and columns differ and neither is a single one."""


def probing_graphs(
    index: GraphIndex, example: Mapping[str, Sequence[int]] | None = None
) -> tuple[Concrete, ...]:
    """The graph at the sizes to probe it at: one if none is open, else two.

    Args:
        index: the graph.
        example: shapes of its inputs that it takes, or None.

    Raises:
        Refused: if the graph cannot be run at the sizes that are tried.
    """
    opened = _open_axes(index.model)
    wanted = 2 if opened else 1
    # Where the batch alone is open, maps are as large as they are.
    chosen_sides = any(axis > 0 for axis in opened)
    found: list[Concrete] = []
    why = ""
    for shapes in _candidates(index.model, example or {}):
        try:
            concrete = concrete_graph(index, shapes)
            if not chosen_sides or _is_large_enough(concrete):
                found.append(concrete)
        except Refused as refusal:
            why = str(refusal)
        if len(found) == wanted:
            return tuple(found)
    raise Refused(
        f"the graph's sizes are open, but of those tried it runs at {len(found)}, not at two, so that what its scans "
        f"do cannot be seen; leave its sizes closed, or trace it with an example of other sizes. {why}".rstrip()
    )


def _is_large_enough(concrete: Concrete) -> bool:
    index = concrete.index
    lengths = [concrete.shape(index.nodes[place].input[0])[-1] for place in index.scans()]
    return all(length >= _FEWEST_STEPS for length in lengths)


def _candidates(model: onnx.ModelProto, example: Mapping[str, Sequence[int]]) -> Iterator[dict[str, Shape]]:
    """Shapes of the inputs, with numbers for the open axes; axes of one name have one number."""
    own = next((tuple(shape[2:]) for shape in example.values() if len(shape) == 4), ())
    multiples = [(own[0], 2 * own[1]), (2 * own[0], own[1]), (2 * own[0], 3 * own[1])] if own else []
    for number, sides in enumerate((*_SIDES, *multiples)):
        chosen: dict[str, int] = {}
        yield {
            value.name: tuple(
                _size(value, axis, chosen, BATCHES[number % len(BATCHES)], sides)
                for axis in range(len(value.type.tensor_type.shape.dim))
            )
            for value in model.graph.input
        }


def _size(
    value: onnx.ValueInfoProto, axis: int, chosen: dict[str, int], batch: int, sides: tuple[int, int]
) -> int:
    """The size of one axis; height and width are the last two of an input, in turns."""
    dim = value.type.tensor_type.shape.dim[axis]
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    rank = len(value.type.tensor_type.shape.dim)
    new = batch if axis == 0 else sides[(axis - rank) % 2]
    return chosen.setdefault(dim.dim_param or f"{value.name}.{axis}", new)


def _open_axes(model: onnx.ModelProto) -> list[int]:
    """The open axes of all inputs."""
    return [
        axis
        for value in model.graph.input
        for axis, dim in enumerate(value.type.tensor_type.shape.dim)
        if not dim.HasField("dim_value")
    ]
