"""Faults planted around the scan of three spellings: none may ever become a SelectiveScan2D of the whole map.

A fault is a change of what one scan of the traced graph reads or makes, as a module that is nearly right would have it.
Every change is written on values (batch, 4, c, L): the four directions of the scan side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from helpers import Array, error, run
from onnx import helper, numpy_helper
from scan_modules import CHANNELS, DIRECTIONS
from test_recover_2d import picture, scan_nodes, spelt
from tracing import INPUT

from quartermap_deploy.lowering.operator import INPUTS_1D, SELECTIVE_SCAN, SELECTIVE_SCAN_2D
from quartermap_deploy.passes import lower
from quartermap_deploy.passes.recover_2d import recover_2d

HEIGHT, WIDTH = 4, 6
LENGTH = HEIGHT * WIDTH
RASTER = np.arange(LENGTH).reshape(HEIGHT, WIDTH)
ORDERS = np.stack([RASTER.ravel(), RASTER.T.ravel(), RASTER.ravel()[::-1], RASTER.T.ravel()[::-1]])
"""Of the four directions."""


class Change:
    """Writes nodes that change a value; each operation takes and returns names of values (batch, 4, c, L)."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, array: Array) -> str:
        name = f"{self.prefix}/constant_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"{self.prefix}/{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def reshaped(self, value: str, *shape: int) -> str:
        return self.node("Reshape", value, self.constant(np.array(shape, np.int64)))

    def times(self, value: str, factor: Array) -> str:
        return self.node("Mul", value, self.constant(factor.astype(np.float32)))

    def plus(self, value: str, term: Array) -> str:
        return self.node("Add", value, self.constant(term.astype(np.float32)))

    def taken(self, value: str, axis: int, *indices: int) -> str:
        return self.node("Gather", value, self.constant(np.array(indices, np.int64)), axis=axis)

    def other_image(self, value: str) -> str:
        """The images of the batch in reverse order."""
        first, last, step = (self.constant(np.array([n], np.int64)) for n in (-1, -(2**62), -1))
        return self.node("Slice", value, first, last, self.constant(np.array([0], np.int64)), step)

    def steps(self, value: str, orders: Array) -> str:
        """Other steps for each direction: step l of direction k becomes step orders[k, l]."""
        parts = [
            self.taken(self.taken(value, 1, direction), 3, *order) for direction, order in enumerate(orders)
        ]
        return self.node("Concat", *parts, axis=1)


Edit = Callable[[Change, str], str]
PROJECTED = ("delta", "B", "C")


@dataclass(frozen=True)
class Fault:
    """What is changed.

    Attributes:
        inputs: a change for each input of the scan that has one.
        output: a change of what the scan makes, or None.
    """

    inputs: dict[str, Edit] = field(default_factory=dict)
    output: Edit | None = None


def everywhere(edit: Edit) -> Fault:
    """A change of the sequences, which u and its projections follow."""
    return Fault(dict.fromkeys(("u", *PROJECTED), edit))


def steps_of(*directions: int) -> Array:
    """The steps that make the four directions visit the map as these do."""
    inverse = np.argsort(ORDERS, axis=1)
    return np.stack([inverse[k][ORDERS[other]] for k, other in enumerate(directions)])


def same_steps(function: Callable[[Array], Array]) -> Array:
    return np.stack([function(np.arange(LENGTH)) for _ in range(DIRECTIONS)])


UNFLIPPED = np.stack([np.arange(LENGTH)] * 2 + [np.arange(LENGTH)[::-1]] * 2)
CHANNEL = np.arange(CHANNELS).reshape(1, 1, CHANNELS, 1)
TERM = np.linspace(-1, 1, LENGTH)
SWAPPED = (1, 0, *range(2, CHANNELS))
WEIGHTS = np.array([1.0, 0.5, 1.0, 1.0]).reshape(1, 4, 1, 1)
SNAKE = np.where(np.arange(HEIGHT)[:, None] % 2 == 0, RASTER, RASTER[:, ::-1]).ravel()

FAULTS = {
    "no flip in the merge": Fault(output=lambda c, y: c.steps(y, UNFLIPPED)),
    "wrong direction": everywhere(lambda c, v: c.steps(v, steps_of(0, 0, 2, 3))),
    "wrong direction of the projections": Fault(
        dict.fromkeys(PROJECTED, lambda c, v: c.steps(v, steps_of(1, 0, 2, 3)))
    ),
    "a positional term in delta": Fault({"delta": lambda c, v: c.plus(v, TERM)}),
    "a positional term in B": Fault({"B": lambda c, v: c.plus(v, 1e-3 * TERM)}),
    "a positional term in u": Fault({"u": lambda c, v: c.plus(v, TERM)}),
    "an activation in the projections": Fault({"C": lambda c, v: c.node("Tanh", v)}),
    "an activation on u": Fault({"u": lambda c, v: c.node("Sigmoid", v)}),
    "an activation before the merge": Fault(output=lambda c, y: c.node("Tanh", y)),
    "a clamp that is seldom reached": Fault(
        {"delta": lambda c, v: c.node("Clip", v, c.constant(np.float32(-50)), c.constant(np.float32(50)))}
    ),
    "directions swapped in the merge": Fault(output=lambda c, y: c.taken(y, 1, 0, 3, 2, 1)),
    "u doubled": Fault({"u": lambda c, v: c.times(v, np.array(2.0))}),
    "u added to itself": Fault({"u": lambda c, v: c.node("Add", v, v)}),
    "steps shifted by one": everywhere(lambda c, v: c.steps(v, same_steps(lambda s: np.roll(s, 1)))),
    "windows shifted, and not shifted back": everywhere(
        lambda c, v: c.steps(
            v, np.argsort(ORDERS, 1)[np.arange(4)[:, None], np.roll(RASTER, 1, 1).ravel()[ORDERS]]
        )
    ),
    "output shifted by one": Fault(output=lambda c, y: c.steps(y, same_steps(lambda s: np.roll(s, 1)))),
    "projections of the step before": Fault(
        dict.fromkeys(PROJECTED, lambda c, v: c.steps(v, same_steps(lambda s: np.roll(s, 1))))
    ),
    "one channel of u permuted": Fault({"u": lambda c, v: c.taken(v, 2, *SWAPPED)}),
    "one channel of the output permuted": Fault(output=lambda c, y: c.taken(y, 2, *SWAPPED)),
    "directions weighted differently": Fault(output=lambda c, y: c.times(y, WEIGHTS)),
    "a direction subtracted": Fault(
        output=lambda c, y: c.times(y, np.array([1, 1, 1, -1]).reshape(1, 4, 1, 1))
    ),
    "u of another image": Fault({"u": lambda c, v: c.other_image(v)}),
    "projections of another image": Fault(dict.fromkeys(PROJECTED, lambda c, v: c.other_image(v))),
    "all of another image": everywhere(lambda c, v: c.other_image(v)),
    "output of another image": Fault(output=lambda c, y: c.other_image(y)),
    "a snake": everywhere(lambda c, v: c.steps(v, np.stack([SNAKE, *np.tile(np.arange(LENGTH), (3, 1))]))),
    "a positional term before the merge": Fault(output=lambda c, y: c.plus(y, TERM)),
}
LEGAL = {
    "steps moved nowhere": Fault(
        {"u": lambda c, v: c.steps(v, steps_of(0, 1, 2, 3))}, lambda c, y: c.taken(y, 1, *range(4))
    ),
    "two directions taken in another order": everywhere(
        lambda c, v: c.taken(c.taken(v, 1, 1, 0, 3, 2), 1, 1, 0, 3, 2)
    ),
    "a bias for each channel of delta": Fault({"delta": lambda c, v: c.plus(v, CHANNEL)}),
    "a bias of C": Fault({"C": lambda c, v: c.plus(v, np.ones(1))}),
    "B doubled": Fault({"B": lambda c, v: c.node("Add", v, v)}),
}
SPELLED = {"stacked": 1, "assigned": 2, "channel_last": 3}
"""Blocks of the graph that have one scan of four directions, by their spelling."""


def planted(model: onnx.ModelProto, name: str, fault: Fault, length: int = LENGTH) -> onnx.ModelProto:
    """Return the model with a fault around a scan of sequences of this length."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    nodes = list(result.graph.node)
    place = next(i for i, node in enumerate(nodes) if node.name == name)
    scan, before, after = nodes[place], Change("fault/in"), Change("fault/out")
    for operand, edit in fault.inputs.items():
        number = INPUTS_1D.index(operand)
        changed = edit(before, before.reshaped(scan.input[number], 0, 4, -1, length))
        final = (0, -1, length) if operand in ("u", "delta") else (0, 4, -1, length)
        scan.input[number] = before.reshaped(changed, *final)
    if fault.output is not None:
        made = scan.output[0]
        scan.output[0] = "fault/scanned"
        after.reshaped(fault.output(after, after.reshaped("fault/scanned", 0, 4, -1, length)), 0, -1, length)
        after.nodes[-1].output[0] = made
    del result.graph.node[:]
    result.graph.node.extend([*nodes[:place], *before.nodes, scan, *after.nodes, *nodes[place + 1 :]])
    result.graph.initializer.extend([*before.weights, *after.weights])
    del result.graph.value_info[:]
    return result


@functools.cache
def alone(spelling: str) -> onnx.ModelProto:
    """Return the graph of one spelling, of those that were traced side by side."""
    result = onnx.ModelProto()
    result.CopyFrom(spelt(False)[1])
    (output,) = [result.graph.output[SPELLED[spelling] - 1]]
    read, kept = {output.name}, []
    for node in reversed(result.graph.node):
        if read & set(node.output):
            read.update(node.input)
            kept.append(node)
    parts = {
        "node": kept[::-1],
        "output": [output],
        "initializer": [tensor for tensor in result.graph.initializer if tensor.name in read],
    }
    for name, items in parts.items():
        copies = [type(item)() for item in items]
        for copy, item in zip(copies, items, strict=True):
            copy.CopyFrom(item)
        result.graph.ClearField(name)
        getattr(result.graph, name).extend(copies)
    return result


def output(model: onnx.ModelProto) -> Array:
    """Return what a model without bodies makes of a random picture."""
    (found,) = run(lower(model), {INPUT: picture(2, CHANNELS, HEIGHT, WIDTH).numpy()}).values()
    return found


@pytest.mark.parametrize("spelling", SPELLED)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_never_becomes_a_scan_of_the_map(name: str, spelling: str) -> None:
    scan = f"block_{SPELLED[spelling]}/scan"
    faulty = planted(alone(spelling), scan, FAULTS[name])
    recovered = recover_2d(faulty)
    assert scan_nodes(recovered.model) == {scan: SELECTIVE_SCAN}
    (found,) = recovered.report.scans
    assert found.refused is not None
    assert recovered.report.refused == {SPELLED[spelling]: found.refused}
    assert error(output(recovered.model), output(faulty)) <= 1e-6


@pytest.mark.parametrize("spelling", SPELLED)
@pytest.mark.parametrize("name", LEGAL)
def test_what_is_no_fault_is_recovered(name: str, spelling: str) -> None:
    scan = f"block_{SPELLED[spelling]}/scan"
    changed = planted(alone(spelling), scan, LEGAL[name])
    recovered = recover_2d(changed)
    assert scan_nodes(recovered.model) == {scan: SELECTIVE_SCAN_2D}
    assert error(output(recovered.model), output(changed)) <= 1e-6
