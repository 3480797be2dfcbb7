"""sequences_as_maps: a scan of sequences becomes scans of maps that have one row each, so that the plugin serves it.

    y = SelectiveScan(u, delta, A, B, C, D, delta_bias)      of G groups
    →
    y_g = SelectiveScan2D(u_g, delta_g, B_g, C_g, A_g, D_g, delta_bias_g) <directions = ["row"]>, maps of 1 × L
    y = Concat(y_1, …, y_G)

The row order of a map with one row is the order of the sequence, so nothing changes. Each group has its own input,
which the directions of one SelectiveScan2D have not, so each becomes a scan of its own, named `block_3/scan/group_2`;
the scan of a single group keeps its name.

Refuses: scans whose number of groups or channels the graph does not tell.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from quartermap_deploy.errors import PassError
from quartermap_deploy.lowering.operator import DOMAIN, INPUTS_1D, SELECTIVE_SCAN, SELECTIVE_SCAN_2D

NAME = "sequences_as_maps"


def sequences_as_maps(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with scans of maps in place of its scans of sequences.

    Args:
        model: a model with the shapes of its values; not changed. Function bodies of the scans are of no use any more.

    Raises:
        PassError: if the number of groups or channels of a scan is not known.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    shapes = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input)
    } | {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.domain == DOMAIN and node.op_type == SELECTIVE_SCAN:
            writer = _Writer(graph, node, shapes)
            writer.write()
            nodes += writer.nodes
        else:
            nodes.append(node)
    copies = list(nodes)
    del graph.node[:]
    graph.node.extend(copies)
    return result


class _Writer:
    """Writes the scans of maps of one scan of sequences."""

    def __init__(self, graph: onnx.GraphProto, node: onnx.NodeProto, shapes: Mapping[str, list[int]]) -> None:
        self.graph, self.node = graph, node
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self.values = {name: value for name, value in zip(INPUTS_1D, node.input, strict=False) if value}
        self.groups = self._known(shapes, "B", 1)
        self.channels = self._known(shapes, "A", 0)

    def write(self) -> None:
        """Add the nodes."""
        attributes = {item.name: helper.get_attribute_value(item) for item in self.node.attribute}
        sequences = {
            name: [self._map(value, f"{name}_{group}") for group, value in enumerate(self._split(name, 1), 1)]
            for name in ("u", "delta")
        }
        # (batch, 1, N, L) → (batch, N, 1, L).
        columns = {
            name: [
                self._add("Transpose", f"{name}_{group}", [value], perm=[0, 2, 1, 3])
                for group, value in enumerate(self._split(name, 1), 1)
            ]
            for name in ("B", "C")
        }
        parameters = {name: self._split(name, 0) for name in ("A", "D", "delta_bias")}
        # The inputs of SelectiveScan2D, in their order: x, dt, B, C, A, D, dt_bias.
        operands = zip(
            *(sequences[name] for name in ("u", "delta")),
            *(columns[name] for name in ("B", "C")),
            *(parameters[name] for name in ("A", "D", "delta_bias")),
            strict=True,
        )
        made = []
        for group, inputs in enumerate(operands, start=1):
            scanned = self._add(
                SELECTIVE_SCAN_2D,
                f"group_{group}",
                list(inputs),
                domain=DOMAIN,
                directions=["row"],
                softplus=int(attributes.get("delta_softplus", 0)),
            )
            if self.groups == 1:
                self.nodes[-1].name = self.node.name
            made.append(self._add("Squeeze", f"row_{group}", [scanned, self._axis(2)]))
        result = self.node.output[0]
        if len(made) == 1:
            self.nodes[-1].output[0] = result
        else:
            self.nodes.append(helper.make_node("Concat", made, [result], f"{self.node.name}/joined", axis=1))

    def _known(self, shapes: Mapping[str, list[int]], name: str, axis: int) -> int:
        shape = shapes.get(self.values[name], [])
        size = shape[axis] if axis < len(shape) else 0
        if size < 1:
            raise PassError(
                f"{NAME}: the size of axis {axis} of {name} of the scan {self.node.name} is not known, so its groups "
                "cannot be told apart; give it a fixed size in the module, or build for tensorrt-rtx"
            )
        return size

    def _split(self, name: str, axis: int) -> list[str]:
        """One part of an input for each group; of a parameter that is not there, zeros."""
        value = self.values.get(name)
        if value is None:
            zeros = np.zeros(self.channels // self.groups, np.float32)
            return [self._constant(f"no_{name}", zeros)] * self.groups
        if self.groups == 1:
            return [value]
        if value in self.weights:
            array = numpy_helper.to_array(self.weights[value])
            parts = np.split(array, self.groups, axis)
            return [self._constant(f"{name}_{group}", part) for group, part in enumerate(parts, start=1)]
        names = [f"{self.node.name}/{name}_of_group_{group}" for group in range(1, self.groups + 1)]
        self.nodes.append(
            helper.make_node(
                "Split", [value], names, f"{self.node.name}/{name}", axis=axis, num_outputs=self.groups
            )
        )
        return names

    def _map(self, value: str, name: str) -> str:
        """(batch, d, L) → (batch, d, 1, L)."""
        return self._add("Unsqueeze", name, [value, self._axis(2)])

    def _axis(self, axis: int) -> str:
        return self._constant(f"axis_{axis}", np.array([axis], np.int64))

    def _constant(self, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> str:
        full = f"{self.node.name}/{name}"
        if full not in self.weights:
            self.weights[full] = self.graph.initializer.add()
            self.weights[full].CopyFrom(numpy_helper.from_array(array, full))
        return full

    def _add(self, op: str, name: str, inputs: list[str], domain: str = "", **attributes: object) -> str:
        full = f"{self.node.name}/{name}"
        self.nodes.append(
            helper.make_node(op, inputs, [f"{full}_out"], full, domain=domain, **attributes)  # type: ignore[arg-type]
        )
        return f"{full}_out"
