"""What a graph says about its outputs, and about the maps of its scans."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from quartermap_deploy.errors import PlanError
from quartermap_deploy.frontend.node_names import PART
from quartermap_deploy.lowering.operator import DOMAIN, SELECTIVE_SCAN_2D
from quartermap_deploy.pruning.orders import ScanOrder
from quartermap_deploy.pruning.parts import order_at
from quartermap_deploy.tensor_info import TensorInfo

if TYPE_CHECKING:
    import onnx


def output_infos(model: onnx.ModelProto) -> tuple[TensorInfo, ...]:
    """Names, shapes and types of a graph's outputs; an axis of which the graph says nothing is named "any"."""
    return tuple(map(TensorInfo.of_value, model.graph.output))


class SizedOrders:
    """The orders of a graph's scans at whatever sizes its inputs have.

    Args:
        model: a graph with open sizes.
        orders: of the module's scans, by name, at whatever size they were read off.
        nodes: names of the graph's scans that several of the module's are together.
    """

    def __init__(
        self, model: onnx.ModelProto, orders: Mapping[str, ScanOrder], nodes: Mapping[str, str]
    ) -> None:
        from quartermap_deploy.passes.recovery.graph_index import GraphIndex

        self._index, self._orders, self._nodes = GraphIndex(model), orders, nodes
        self._known: dict[tuple[tuple[str, tuple[int, ...]], ...], dict[str, ScanOrder]] = {}

    def at(self, shapes: Mapping[str, Sequence[int]]) -> Mapping[str, ScanOrder]:
        """The orders that are known where the inputs, by name, have these shapes."""
        key = tuple((name, tuple(shape)) for name, shape in shapes.items())
        if key not in self._known:
            self._known[key] = self._computed(dict(key))
        return self._known[key]

    def _computed(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, ScanOrder]:
        from quartermap_deploy.passes.recovery.concrete import concrete_graph
        from quartermap_deploy.passes.recovery.refusal import Refused

        found: dict[str, ScanOrder] = {}
        with contextlib.suppress(Refused):
            concrete = concrete_graph(self._index, shapes)
            maps = {
                node.name: self._whole_map(node)
                for node in self._index.nodes
                if node.domain == DOMAIN and node.op_type == SELECTIVE_SCAN_2D
            }
            for name, order in self._orders.items():
                node_name = self._nodes.get(name, name)
                # Directions that are scanned one by one have their numbers behind the name; the first tells enough.
                if (map_ := maps.get(node_name, maps.get(f"{node_name}/1"))) is not None:
                    with contextlib.suppress(PlanError, Refused):
                        _, _, height, width = concrete.shape(map_)
                        found[name] = order_at(order, height, width)
        return found

    def _whole_map(self, scan: onnx.NodeProto) -> str:
        """The map that a scan is of; of one that takes a part of it, all of the map."""
        maker = self._index.maker(scan.input[0])
        is_part = maker is not None and maker.name == f"{scan.name}/{PART}"
        return str(maker.input[0]) if maker is not None and is_part else str(scan.input[0])
