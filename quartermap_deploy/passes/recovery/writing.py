"""Writing what was read as our own models have it: a 1×1 convolution, a Split of channels, and SelectiveScan2D.

    x ─┬─ Conv ─ Split ─ dt, B, C ─┐
       └─────────── SelectiveScan2D ─ y

No size of the map is written where the graph leaves it open: a Reshape keeps axes by 0 and counts by −1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from quartermap_deploy.frontend.node_names import PART
from quartermap_deploy.lowering.operator import DOMAIN, SELECTIVE_SCAN_2D, Direction
from quartermap_deploy.passes.recovery.maps import MapForm
from quartermap_deploy.passes.recovery.projections import Matrix, Projections
from quartermap_deploy.pruning.parts import MapPart

Array = NDArray[Any]
_LIMITS = np.iinfo(np.int64)
"""The numbers that stand for the ends of every axis."""
NEGLIGIBLE = 1e-9
"""Offset of a projection, as a share of its largest weight, that is rounding of float64 and no bias."""


@dataclass(frozen=True)
class ScanParameters:
    """What a scan takes besides maps.

    Attributes:
        A: (K·d_inner, N).
        D: (K·d_inner), zero where the scan had none.
        dt_bias: (K·d_inner), likewise.
        softplus: whether softplus is applied to the time step.
    """

    A: Array
    D: Array
    dt_bias: Array
    softplus: bool

    def of(self, direction: int, count: int) -> ScanParameters:
        """What one of `count` directions takes, counted from 0."""
        A, D, dt_bias = (np.split(array, count)[direction] for array in (self.A, self.D, self.dt_bias))
        return ScanParameters(A, D, dt_bias, self.softplus)


@dataclass(frozen=True)
class Replacement:
    """Nodes that make some values of the graph anew.

    Attributes:
        nodes: in order.
        initializers: the weights that they read.
        targets: the values that they make in place of the nodes that made them.
        scans: the names of the scans among the nodes.
    """

    nodes: tuple[onnx.NodeProto, ...]
    initializers: tuple[onnx.TensorProto, ...]
    targets: tuple[str, ...]
    scans: tuple[str, ...]


class NodeWriter:
    """Collects nodes and weights whose names start with a prefix."""

    def __init__(self, prefix: str, whole: NodeWriter | None = None) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = [] if whole is None else whole.nodes
        self.initializers: list[onnx.TensorProto] = [] if whole is None else whole.initializers

    def below(self, name: str) -> NodeWriter:
        """A writer that adds to the same nodes, with a name of its own behind the prefix."""
        return NodeWriter(f"{self.prefix}/{name}", self)

    def constant(self, name: str, array: Array) -> str:
        """Add a weight; returns its name."""
        full = f"{self.prefix}/{name}"
        self.initializers.append(numpy_helper.from_array(np.array(array, order="C"), full))
        return full

    def __call__(self, op: str, name: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        """Add a node with one output, which is named after the node unless told otherwise; returns the output."""
        full = f"{self.prefix}/{name}"
        made = output or full
        self.nodes.append(helper.make_node(op, list(inputs), [made], name=full, **attributes))
        return made

    def split(self, name: str, value: str, parts: Sequence[tuple[str, int]]) -> list[str]:
        """Split the channels of a map into named parts."""
        sizes = self.constant(f"{name}_sizes", np.array([size for _, size in parts], np.int64))
        made = [f"{self.prefix}/{part}" for part, _ in parts]
        self.nodes.append(
            helper.make_node("Split", [value, sizes], made, name=f"{self.prefix}/{name}", axis=1)
        )
        return made

    def to_map(self, value: str, form: MapForm, height: int, width: int) -> str:
        """Bring a value of a form into (batch, channels, H, W).

        Sides that the value does not tell apart are written as numbers: the caller sees to it that they are not open.
        """
        if form.layout == "NLC":
            value = self("Transpose", "channels_first", [value], perm=[0, 2, 1])
        if len(form.sides) == 1:
            shape = np.array([0, form.channels, height, width], np.int64)
            return self("Reshape", "map", [value, self.constant("map_shape", shape)])
        if form.layout == "NHWC":
            return self("Transpose", "map", [value], perm=[0, 3, 1, 2])
        return value

    def from_map(self, value: str, form: MapForm, target: str) -> None:
        """Bring (batch, channels, H, W) into a form, as the value `target`."""
        if form.layout == "NCL":
            self("Reshape", "merged", [value, self.constant("flat", np.array([0, 0, -1], np.int64))], target)
        elif form.layout == "NHWC":
            self("Transpose", "merged", [value], target, perm=[0, 2, 3, 1])
        else:
            last = self("Transpose", "channels_last", [value], perm=[0, 2, 3, 1])
            flat = self.constant("flat", np.array([0, -1, form.channels], np.int64))
            self("Reshape", "merged", [last, flat], target)

    def part(self, value: str, part: MapPart) -> str:
        """Take a part of a map (batch, channels, H, W)."""
        if part.is_whole:
            return value
        limits = {
            "first": part.first,
            "end": (_LIMITS.max, _LIMITS.max),
            "axes": (2, 3),
            "strides": part.stride,
        }
        inputs = [self.constant(name, np.array(numbers, np.int64)) for name, numbers in limits.items()]
        return self("Slice", PART, [value, *inputs])

    def sequence(self, value: str, direction: str, target: str = "") -> str:
        """Bring the positions of a map (batch, channels, H, W) into the order of a direction, (batch, channels, L)."""
        parsed = Direction.parse(direction)
        if parsed.orientation == "column":
            value = self("Transpose", "columns", [value], perm=[0, 1, 3, 2])
        flat = self.constant("flat", np.array([0, 0, -1], np.int64))
        value = self("Reshape", "steps", [value, flat], "" if parsed.reverse else target)
        if parsed.reverse:
            limits = {"last": -1, "before_first": _LIMITS.min, "step_axis": 2, "backwards": -1}
            inputs = [self.constant(name, np.array([number], np.int64)) for name, number in limits.items()]
            value = self("Slice", "reversed", [value, *inputs], target)
        return value

    def scan(
        self,
        name: str,
        x: str,
        projections: Projections,
        parameters: ScanParameters,
        directions: Sequence[str],
        output: str = "",
    ) -> str:
        """Add the projections and the scan of a map; the scan is named `name`. Returns the scan's output."""
        count, d_inner = len(directions), projections.dt.shape[2]
        parts = (
            ("dt", projections.dt, np.zeros(projections.dt.shape[:2])),
            ("B", projections.B, projections.B_offset),
            ("C", projections.C, projections.C_offset),
        )
        weight = np.concatenate([rows.reshape(-1, d_inner) for _, rows, _ in parts])[:, :, None, None]
        bias = np.concatenate([offset.ravel() for _, _, offset in parts])
        inputs = [x, self.constant("projection_weight", _single(weight))]
        if not np.abs(bias).max() <= NEGLIGIBLE * np.abs(weight).max():
            inputs.append(self.constant("projection_bias", _single(bias)))
        projected = self("Conv", "project", inputs, kernel_shape=[1, 1])
        maps = self.split("split", projected, [(part, count * rows.shape[1]) for part, rows, _ in parts])
        dt_bias = parameters.dt_bias + projections.dt_offset.ravel()
        operands = [
            x,
            *maps,
            self.constant("A", _single(parameters.A)),
            self.constant("D", _single(parameters.D)),
            self.constant("dt_bias", _single(dt_bias)),
        ]
        if projections.dt_weight is not None:
            operands.append(
                self.constant("dt_weight", _single(projections.dt_weight.reshape(count * d_inner, -1)))
            )
        made = output or f"{self.prefix}/scanned"
        self.nodes.append(
            helper.make_node(
                SELECTIVE_SCAN_2D,
                operands,
                [made],
                name=name,
                domain=DOMAIN,
                directions=list(directions),
                softplus=int(parameters.softplus),
            )
        )
        return made

    def replacement(self, targets: Sequence[str]) -> Replacement:
        """What was collected."""
        scans = tuple(node.name for node in self.nodes if node.domain == DOMAIN)
        return Replacement(tuple(self.nodes), tuple(self.initializers), tuple(targets), scans)


def write_map_scan(
    name: str,
    source: tuple[str, MapForm],
    target: tuple[str, MapForm],
    sides: tuple[int, int],
    projections: Projections,
    parameters: ScanParameters,
    directions: Sequence[str],
    share: float = 1.0,
) -> Replacement:
    """Write one scan of a map in some directions that are summed in place.

    Args:
        name: of the scan.
        source: the map, and how the graph holds it.
        target: the value to make, and how.
        sides: (H, W) of the map.
        projections: of all directions.
        parameters: of all directions.
        directions: their names.
        share: what the sum is multiplied with.
    """
    write = NodeWriter(name)
    x = write.to_map(*source, *sides)
    value, form = target
    direct = share == 1 and form.layout == "NCHW"
    y = write.scan(name, x, projections, parameters, directions, output=value if direct else "")
    if not direct:
        if share != 1:
            scale = write.constant("share", np.array(share, np.float32))
            y = write("Mul", "shared", [y, scale], value if form.layout == "NCHW" else "")
        if form.layout != "NCHW":
            write.from_map(y, form, value)
    return write.replacement([value])


def _single(array: Matrix | Array) -> NDArray[np.float32]:
    return np.asarray(array, np.float32)
