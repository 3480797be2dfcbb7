"""A small writer of ONNX nodes with fresh value names, for function bodies and the subgraphs in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from quartermap_deploy.lowering.operator import DOMAIN

OPSET = 20
"""Of the standard operators in function bodies."""
Value = str
Constant = np.ndarray[Any, Any]


class Writer:
    """Collects nodes; every method that adds one returns the names of its outputs.

    NumPy arrays given as inputs become Constant nodes, so that the result needs no initializers and fits a
    FunctionProto, which has none.
    """

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._prefix = prefix
        self._count = 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def fresh(self, stem: str) -> str:
        """Return a value name that was not used before in this writer."""
        self._count += 1
        return f"{self._prefix}{stem}_{self._count}"

    def constant(self, array: Constant) -> Value:
        """Return the value that holds `array`; equal arrays share one node."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.fresh("constant")
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array)))
            self._constants[key] = name
        return self._constants[key]

    def multiple(
        self, op: str, inputs: Sequence[Value | Constant], outputs: int, **attributes: Any
    ) -> list[Value]:
        """Add a node with several outputs."""
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        results = [self.fresh(op.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, names, results, **attributes))
        return results

    def __call__(self, op: str, *inputs: Value | Constant, **attributes: Any) -> Value:
        """Add a node with one output."""
        return self.multiple(op, inputs, 1, **attributes)[0]

    def subgraph(self, name: str, inputs: Sequence[Value], outputs: Sequence[Value]) -> onnx.GraphProto:
        """Return the collected nodes as the body of a Scan, with float32 inputs and outputs of any shape."""

        def info(value: Value) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None)

        return helper.make_graph(self.nodes, name, [info(v) for v in inputs], [info(v) for v in outputs])


def scan_function(
    write: Writer, name: str, inputs: Sequence[Value], result: Value, attributes: Sequence[str], overload: str
) -> onnx.FunctionProto:
    """Return the collected nodes as the body of one of our operators."""
    opset = helper.make_opsetid("", OPSET)
    function = helper.make_function(
        DOMAIN, name, list(inputs), [result], write.nodes, [opset], list(attributes)
    )
    if overload:
        function.overload = overload
    return function


def ints(*values: int) -> Constant:
    """An int64 vector."""
    return np.array(values, dtype=np.int64)


def scalar(value: float) -> Constant:
    """A float32 scalar."""
    return np.array(value, dtype=np.float32)


def shape_of(write: Writer, *sides: int | Value) -> Value | Constant:
    """A shape, of numbers and of values that hold one: a constant where there are numbers alone."""
    numbers = [side for side in sides if isinstance(side, int)]
    if len(numbers) == len(sides):
        return ints(*numbers)
    return write("Concat", *(ints(side) if isinstance(side, int) else side for side in sides), axis=0)
