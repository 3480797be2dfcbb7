"""What a graph pass is: what it takes, what it returns, and the few graph queries that all passes need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from quartermap_deploy.errors import PassError
from quartermap_deploy.frontend.node_names import read_name
from quartermap_deploy.lowering.operator import DOMAIN, SCANS, SELECTIVE_SCAN_2D
from quartermap_deploy.pruning.orders import ScanOrder
from quartermap_deploy.pruning.plan import Subsample


@dataclass(frozen=True)
class Selection:
    """The part of a QuarterMap plan that a graph needs: which blocks, from 1, and how each map is subsampled.

    Attributes:
        blocks: numbers of the blocks.
        subsample: how.
        orders: the order of each one-dimensional scan, by its name, where it is known; see `recover_2d`.
        paths: the path of each block's module, for messages.
    """

    blocks: tuple[int, ...]
    subsample: Subsample
    orders: Mapping[str, ScanOrder] = field(default_factory=dict)
    paths: Mapping[int, str] = field(default_factory=dict)

    def named(self, block: int) -> str:
        """A block in words: its number, and the path of its module where it is known."""
        path = self.paths.get(block)
        return f"block {block} ({path})" if path else f"block {block}"


@dataclass
class PassReport:
    """What a pass did.

    Attributes:
        name: name of the pass.
        changed: one line for each change, in graph order.
        refused: why the pass left a selected block as it was, by block number.
    """

    name: str
    changed: list[str] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)


MAP_AXES = 4
"""Axes of a feature map."""

GraphPass = Callable[[gs.Graph, Selection], PassReport]


@dataclass(frozen=True)
class ScanNode:
    """A scan of the graph and the number of its block; its name tells both."""

    block: int
    node: gs.Node

    @property
    def name(self) -> str:
        """The node's name, as `frontend.node_names` makes it."""
        return str(self.node.name)

    @property
    def of_map(self) -> bool:
        """Whether it scans a feature map, as SelectiveScan2D does, and not sequences."""
        return bool(self.node.op == SELECTIVE_SCAN_2D)


def scans(graph: gs.Graph) -> list[ScanNode]:
    """Every scan of a block, in graph order. A block has several where its module makes several, or is called twice."""
    found = []
    for node in graph.nodes:
        if node.domain == DOMAIN and node.op in SCANS:
            name = read_name(str(node.name))
            if name is not None and name.scan:
                found.append(ScanNode(name.block, node))
    return found


def selected_scans(graph: gs.Graph, selection: Selection, name: str) -> Iterator[ScanNode]:
    """The scans of the blocks that the plan selects, block by block.

    Raises:
        PassError: if the graph has no scan for a selected block.
    """
    by_block: dict[int, list[ScanNode]] = {}
    for scan in scans(graph):
        by_block.setdefault(scan.block, []).append(scan)
    if absent := [block for block in selection.blocks if block not in by_block]:
        raise PassError(
            f"{name}: the plan names {selection.named(absent[0])}, but the graph has scans of {len(by_block)} blocks"
        )
    for block in selection.blocks:
        yield from by_block[block]


def producer(value: gs.Tensor) -> gs.Node | None:
    """The node that makes a value, or None for inputs and constants."""
    return value.inputs[0] if value.inputs else None


def only_consumer(graph: gs.Graph, value: gs.Tensor) -> gs.Node | None:
    """The one node that reads a value, or None if there are more, or none, or the value is a graph output."""
    if len(value.outputs) != 1 or any(value is output for output in graph.outputs):
        return None
    node = value.outputs[0]
    return node if sum(value is item for item in node.inputs) == 1 else None


def constant_of(value: gs.Tensor) -> np.ndarray[Any, Any] | None:
    """The array of a constant value, or None."""
    if isinstance(value, gs.Constant):
        return np.asarray(value.values)
    node = producer(value)
    if node is not None and node.op == "Constant" and "value" in node.attrs:
        return np.asarray(node.attrs["value"].values)
    return None


def sizes(value: gs.Tensor) -> tuple[int | None, ...]:
    """The shape of a feature map, with None for open axes.

    Raises:
        PassError: if the shape is unknown.
    """
    if value.shape is None:
        raise PassError(f"the shape of {value.name} is unknown; run shape inference before the passes")
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def place_of(graph: gs.Graph, node: gs.Node) -> int:
    """Index of a node in its graph.

    By identity: gs.Node compares by contents, which is slow and may match a twin.
    """
    return next(i for i, item in enumerate(graph.nodes) if item is node)


def varies_over_channels_only(value: gs.Tensor, channel: int) -> bool:
    """Whether a value is a constant that is the same at every position of a map with channels on axis `channel`."""
    array = constant_of(value)
    if array is None or array.ndim > MAP_AXES:
        return False
    shape = (1,) * (MAP_AXES - array.ndim) + array.shape
    return all(size == 1 for axis, size in enumerate(shape) if axis != channel)


class GraphWriter:
    """Adds nodes at a place in the list of a graph's nodes, with names that start with a prefix."""

    def __init__(self, graph: gs.Graph, prefix: str, dtype: Any, place: int) -> None:
        self.graph, self.prefix, self.dtype, self._place = graph, prefix, dtype, place

    def constant(self, name: str, values: np.ndarray[Any, Any]) -> gs.Constant:
        """A constant input, named after the prefix."""
        return gs.Constant(f"{self.prefix}/{name}", values)

    def __call__(
        self, op: str, name: str, inputs: Sequence[gs.Tensor], dtype: Any = None, **attributes: Any
    ) -> gs.Variable:
        """Insert a node at the place given at construction, after those inserted earlier; return its output."""
        output = gs.Variable(f"{self.prefix}/{name}", dtype=self.dtype if dtype is None else dtype)
        node = gs.Node(op, name=output.name, attrs=attributes, inputs=list(inputs), outputs=[output])
        self.graph.nodes.insert(self._place, node)
        self._place += 1
        return output

    def several(
        self, op: str, name: str, inputs: Sequence[gs.Tensor], count: int, **attributes: Any
    ) -> list[gs.Variable]:
        """Insert a node with several outputs of one type, as `__call__` does."""
        outputs = [gs.Variable(f"{self.prefix}/{name}_{place}", dtype=self.dtype) for place in range(count)]
        node = gs.Node(
            op, name=f"{self.prefix}/{name}", attrs=attributes, inputs=list(inputs), outputs=outputs
        )
        self.graph.nodes.insert(self._place, node)
        self._place += 1
        return outputs
