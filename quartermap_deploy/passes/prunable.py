"""Which scans can be pruned soundly: those of one image's whole map whose order is known.

A plan keeps rows and columns of a map. A scan that walks a part of the map, or windows of it, loses what it is made for
when the map shrinks, and in a map in which two images lie side by side or between one another every second column is
not a coarser picture of one of them. Such blocks are refused before anything is changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_graphsurgeon as gs

from quartermap_deploy.errors import PassError
from quartermap_deploy.frontend.node_names import without_direction
from quartermap_deploy.lowering.operator import INPUTS_1D
from quartermap_deploy.passes.base import ScanNode, Selection, constant_of, producer
from quartermap_deploy.pruning.orders import OUTSIDE, ScanOrder

CHANNEL, SPACE, BATCH = "C", "S", "N"
Roles = tuple[str, ...]
"""What each axis of a value stands for: `BATCH`, `CHANNEL` or `SPACE`."""


def require_prunable(scan: ScanNode, selection: Selection, pass_name: str) -> None:
    """Refuse a scan of which a plan cannot keep rows and columns.

    Raises:
        PassError: if its order on a map is unknown, it walks parts of a map, or its map holds several images.
    """
    where = f"{pass_name}: {selection.named(scan.block)} cannot be pruned"
    instead = "choose other blocks (every, blocks, exclude_stages)"
    traced = without_direction(scan.name)
    order = selection.orders.get(traced)
    if scan.of_map:
        if order is not None and order.directions is None:
            raise PassError(f"{where}: {why_not_whole(order)}; {instead}")
        if order is None and traced != scan.name:
            # It may be of a part of the map, or of a sequence in a map of one row.
            raise PassError(
                f"{where}: {scan.name} scans one direction by itself, and whether of a whole map is not known; "
                f"{instead}"
            )
        rank = 4
    elif order is None:
        raise PassError(
            f"{where}: its scan {scan.name} is one-dimensional, and in which order its steps visit the positions of a "
            f"map is not known; {instead}"
        )
    elif why := _why_not_by_steps(scan, order, selection):
        raise PassError(f"{where}: {why}; {instead}")
    else:
        rank = 3
    roles = (BATCH, CHANNEL, *[SPACE] * (rank - 2))
    if meeting := images_meeting(scan.node.inputs[0], roles):
        raise PassError(
            f"{where}: several images or maps lie in the map that {scan.name} walks: they are put together along its "
            f"positions by {meeting.op} {meeting.name}; {instead}"
        )


def why_not_whole(order: ScanOrder) -> str:
    """Why rows and columns of the map cannot be kept of an order, in words."""
    visited = (order.order != OUTSIDE).sum(axis=1)
    positions = order.height * order.width
    if (visited < positions).any():
        return f"its directions scan parts of the map, {int(visited.min())} of {positions} positions, and not all of it"
    return "it scans windows or another order that is not kept when rows and columns are left out"


def _why_not_by_steps(scan: ScanNode, order: ScanOrder, selection: Selection) -> str:
    length = scan.node.inputs[INPUTS_1D.index("u")].shape[-1]
    if not order.walks_lines:
        return why_not_whole(order)
    if min(order.height, order.width) < 2:
        return f"its scan {scan.name} follows a sequence that is no map"
    if length != order.order.shape[1]:
        found = (
            f"{length} steps"
            if isinstance(length, int)
            else "as many steps as the size of the input gives it"
        )
        return f"its scan {scan.name} has {found}, and its order is known for {order.order.shape[1]}"
    if selection.subsample.upsample != "nearest":
        return (
            f"its scan {scan.name} is one-dimensional, and {selection.subsample.upsample} interpolation needs a map; "
            "use nearest"
        )
    return ""


def images_meeting(value: gs.Tensor, roles: Roles) -> gs.Node | None:
    """The node upstream of a map that puts values side by side along its positions, or None.

    Where what an axis stands for cannot be told any more, the search ends.
    """
    pending, seen = [(value, roles)], set()
    while pending:
        found, axes = pending.pop()
        node = producer(found)
        if node is None or id(found) in seen:
            continue
        seen.add(id(found))
        if node.op in ("Concat", "ScatterElements", "ScatterND"):
            sources = _moved_from(node)
            if len(sources) > 1 and SPACE in _joined(node, axes):
                return node
            if len(sources) == 1:
                # Patches of one map: a roll, a padding, or neighbours that become channels.
                source = sources[0]
                rank = len(source.shape or ())
                pending.append((source, _standard(rank, axes)))
                continue
        pending += [(item, before) for item, before in _above(node, found, axes)]
    return None


def _joined(node: gs.Node, roles: Roles) -> Roles:
    """What the axes stand for along which a node joins its inputs."""
    if node.op == "ScatterND":
        indices = node.inputs[1].shape
        written = indices[-1] if indices and isinstance(indices[-1], int) else 1
        return roles[:written]
    axis = int(node.attrs.get("axis", 0))
    return roles[axis : axis + 1] if axis >= 0 else roles[axis : axis + 1 or None]


_MOVES = {"Concat", "Flatten", "Gather", "Identity", "Pad", "Reshape", "ScatterElements", "ScatterND"}
_MOVES |= {"Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}


def _moved_from(node: gs.Node) -> list[gs.Tensor]:
    """The values that come from the data of which a node is put together, through nodes that move elements."""
    pending, found, seen = list(node.inputs), [], set()
    while pending:
        value = pending.pop()
        if id(value) in seen or not _comes_from_data(value):
            continue
        seen.add(id(value))
        maker = producer(value)
        if maker is not None and maker.op in _MOVES:
            pending += maker.inputs
        else:
            found.append(value)
    return found


def _comes_from_data(value: gs.Tensor) -> bool:
    """Whether elements of an input reach a value, and not only sizes and weights."""
    pending, seen = [value], set()
    while pending:
        item = pending.pop()
        if id(item) in seen or constant_of(item) is not None or not item.name:
            continue
        seen.add(id(item))
        node = producer(item)
        if node is None:
            return True
        if node.op not in ("Shape", "Size"):
            pending += node.inputs
    return False


_POSITIONWISE = {
    "Add",
    "BatchNormalization",
    "Cast",
    "Clip",
    "Div",
    "Dropout",
    "Elu",
    "Erf",
    "Exp",
    "Gelu",
    "HardSigmoid",
}
_POSITIONWISE |= {
    "HardSwish",
    "Identity",
    "InstanceNormalization",
    "GroupNormalization",
    "LeakyRelu",
    "Mul",
    "Neg",
    "Pow",
}
_POSITIONWISE |= {
    "PRelu",
    "Relu",
    "Resize",
    "Sigmoid",
    "Softplus",
    "Sqrt",
    "Sub",
    "Tanh",
    "Pad",
    "Concat",
    "SelectiveScan2D",
}
_POSITIONWISE |= {"AveragePool", "MaxPool", "Split", "Where", "ReduceMean", "SelectiveScan"}


def _above(node: gs.Node, value: gs.Tensor, roles: Roles) -> list[tuple[gs.Tensor, Roles]]:
    """What a node reads that holds the same map, and what its axes stand for."""
    rank = len(roles)
    first = node.inputs[0]
    if node.op == "Transpose" and len(node.attrs.get("perm", ())) == rank:
        before = [""] * rank
        for axis, source in enumerate(node.attrs["perm"]):
            before[source] = roles[axis]
        return [(first, tuple(before))]
    if node.op in ("Conv", "ConvTranspose"):
        return [(first, (BATCH, CHANNEL, *[SPACE] * (rank - 2)))]
    if node.op in ("MatMul", "Gemm", "LayerNormalization"):
        return [(first, (BATCH, *[SPACE] * (rank - 2), CHANNEL))]
    if node.op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
        reshaped = _reshaped(first, value, roles)
        return [] if reshaped is None else [(first, reshaped)]
    if node.op in _POSITIONWISE:
        return [(item, roles) for item in node.inputs if len(item.shape or ()) == rank]
    return []


def _reshaped(source: gs.Tensor, value: gs.Tensor, roles: Roles) -> Roles | None:
    """What the axes of a reshaped value stood for before; None if its channels were taken apart.

    An axis stays itself in a reshape where as many elements lie before and behind it as did.
    """
    old, new = source.shape, value.shape
    if old is None or new is None or CHANNEL not in roles:
        return None
    place = roles.index(CHANNEL)
    wanted = _around(new, place)
    places = [axis for axis in range(1, len(old)) if old[axis] == new[place] and _around(old, axis) == wanted]
    if wanted is None or len(places) != 1:
        return None
    return tuple(BATCH if axis == 0 else CHANNEL if axis == places[0] else SPACE for axis in range(len(old)))


def _around(shape: Sequence[object], place: int) -> tuple[int, int] | None:
    """How many elements of one entry of the batch lie before and behind an axis; None if that is not known."""
    before, behind = shape[1:place], shape[place + 1 :]
    if place == 0 or not all(isinstance(size, int) for size in (shape[place], *before, *behind)):
        return None
    return math.prod(before), math.prod(behind)  # type: ignore[arg-type]


def _standard(rank: int, roles: Roles) -> Roles:
    """Roles of a value of another rank, with channels where they stood: last or second."""
    if len(roles) == rank:
        return roles
    last = roles[-1] == CHANNEL
    spaces = [SPACE] * max(0, rank - 2)
    return (BATCH, *spaces, CHANNEL) if last else (BATCH, CHANNEL, *spaces)
