"""The sizes at which a graph with open sizes is run to see what it does.

Two of them, so that what holds at one size only is found out. Height and width differ, so that rows and columns cannot
be confused, and there are two images, so that the images of a batch cannot be either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx

from quartermap_deploy.errors import PassError
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
    index: GraphIndex, sizes: Sequence[Mapping[str, Sequence[int]]] | None = None
) -> tuple[Concrete, ...]:
    """The graph at the sizes to probe it at: one if none is open, else two.

    Args:
        index: the graph.
        sizes: shapes of the inputs to use, for a graph that takes few; None chooses them.

    Raises:
        PassError: if the graph cannot be run at the sizes that are given, or at none that is tried.
    """
    if sizes is not None:
        try:
            return tuple(
                concrete_graph(index, {name: tuple(shape) for name, shape in one.items()}) for one in sizes
            )
        except Refused as refusal:
            raise PassError(f"the graph cannot be run at the sizes {list(sizes)}: {refusal}") from refusal
    found: list[Concrete] = []
    why = ""
    wanted = 2 if _open_axes(index.model) else 1
    for shapes in _candidates(index.model):
        try:
            concrete = concrete_graph(index, shapes)
            if _large_enough(concrete) or wanted == 1:
                found.append(concrete)
        except Refused as refusal:
            why = str(refusal)
        if len(found) == wanted:
            return tuple(found)
    raise PassError(
        f"the graph has open sizes, and of the sizes tried it can be run at {len(found)}, not at two; give the sizes "
        f"that it takes. {why}"
    )


def _large_enough(concrete: Concrete) -> bool:
    index = concrete.index
    lengths = [concrete.shape(index.nodes[place].input[0])[-1] for place in index.scans()]
    return all(length >= _FEWEST_STEPS for length in lengths)


def _candidates(model: onnx.ModelProto) -> Iterator[dict[str, Shape]]:
    """Shapes of the inputs, with numbers for the open axes; an axis's name has one number in all inputs."""
    for number, (height, width) in enumerate(_SIDES):
        batch = BATCHES[number % len(BATCHES)]
        chosen: dict[str, int] = {}
        shapes = {}
        for value in model.graph.input:
            shape = []
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if dim.HasField("dim_value"):
                    shape.append(dim.dim_value)
                    continue
                name = dim.dim_param or f"{value.name}.{axis}"
                sides = [size for key, size in chosen.items() if key != "batch" and size > max(BATCHES)]
                new = batch if axis == 0 else (height, width)[len(sides) % 2]
                shape.append(chosen.setdefault(name, new))
            shapes[value.name] = tuple(shape)
        yield shapes


def _open_axes(model: onnx.ModelProto) -> bool:
    return any(
        not dim.HasField("dim_value")
        for value in model.graph.input
        for dim in value.type.tensor_type.shape.dim
    )
