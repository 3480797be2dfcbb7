"""Computing a node whose inputs are known, in NumPy: what graphs compute sizes and indices with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from quartermap_deploy.passes.recovery.graph_index import attribute

Array = NDArray[Any]


def evaluated(node: onnx.NodeProto, inputs: Sequence[Array | None], opset: int) -> list[Array]:
    """The outputs of a node, given its inputs; an input that is left out is None.

    Raises:
        Exception: whatever NumPy or the reference evaluator raises on values that do not fit the node.
    """
    # The reference evaluator knows every operator, but takes milliseconds to be made for one.
    if node.op_type in _FAST and not any(item is None for item in inputs):
        return [np.asarray(_FAST[node.op_type](node, *inputs))]
    from onnx.reference import ReferenceEvaluator

    present = {name: value for name, value in zip(node.input, inputs, strict=True) if value is not None}
    model = helper.make_model(
        helper.make_graph(
            [node],
            "one",
            [helper.make_value_info(name, onnx.TypeProto()) for name in present],
            [helper.make_value_info(name, onnx.TypeProto()) for name in node.output if name],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
    )
    return [np.asarray(value) for value in ReferenceEvaluator(model).run(None, present)]


def _divided(node: onnx.NodeProto, a: Array, b: Array) -> Array:
    if not np.issubdtype(a.dtype, np.integer):
        return np.asarray(a / b)
    # ONNX rounds towards zero, NumPy down.
    return np.asarray(np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)), dtype=a.dtype)


def _reshaped(node: onnx.NodeProto, a: Array, shape: Array) -> Array:
    copied = attribute(node, "allowzero", 0) == 0
    return a.reshape([a.shape[i] if n == 0 and copied else int(n) for i, n in enumerate(shape)])


def _squeezed(node: onnx.NodeProto, a: Array, axes: Array | None = None) -> Array:
    return np.squeeze(a, None if axes is None else tuple(axes.ravel()))


def _unsqueezed(node: onnx.NodeProto, a: Array, axes: Array) -> Array:
    return np.expand_dims(a, tuple(axes.ravel()))


def _constant(node: onnx.NodeProto) -> Array:
    (item,) = node.attribute
    value = helper.get_attribute_value(item)
    if isinstance(value, onnx.TensorProto):
        return np.asarray(numpy_helper.to_array(value))
    return np.asarray(value, dtype=np.float32 if "float" in item.name else np.int64)


def _filled(node: onnx.NodeProto, shape: Array) -> Array:
    value = attribute(node, "value")
    fill = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
    return np.full([int(n) for n in shape], fill[0], fill.dtype)


def _cast(node: onnx.NodeProto, a: Array) -> Array:
    return a.astype(helper.tensor_dtype_to_np_dtype(attribute(node, "to")))


_FAST: dict[str, Callable[..., Any]] = {
    "Add": lambda node, a, b: a + b,
    "Cast": _cast,
    "Concat": lambda node, *items: np.concatenate(items, axis=attribute(node, "axis")),
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "Div": _divided,
    "Equal": lambda node, a, b: a == b,
    "Expand": lambda node, a, shape: a * np.ones([int(n) for n in shape], a.dtype),
    "Gather": lambda node, a, indices: np.take(a, indices, axis=attribute(node, "axis", 0)),
    "Identity": lambda node, a: a,
    "Mul": lambda node, a, b: a * b,
    "Neg": lambda node, a: -a,
    "Range": lambda node, start, limit, step: np.arange(start, limit, step, dtype=start.dtype),
    "Reshape": _reshaped,
    "Squeeze": _squeezed,
    "Sub": lambda node, a, b: a - b,
    "Transpose": lambda node, a: np.transpose(a, attribute(node, "perm")),
    "Unsqueeze": _unsqueezed,
    "Where": lambda node, condition, a, b: np.where(condition, a, b),
}
