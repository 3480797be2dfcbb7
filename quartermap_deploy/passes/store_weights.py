"""store_weights: keep large weights in fewer bits in the file, and compute in float32 as before.

    weight (float32)  →  Cast(weight/stored (float16))
    weight (float32)  →  Mul(Cast(weight/stored (int8)), weight/scale)

A runtime that folds constants does so once, as it loads the file, and then runs what it ran before. The file is half or
a quarter as large, which counts where it is sent to every visitor of a page. Every weight is rounded, to 11 bits of its
own or to 8 bits of its channel's largest; `validation.tolerances.STORED` says what that may cost.

Leaves alone: weights of fewer than `FEWEST` numbers, which are norms, biases and step sizes and would save nothing;
those with values that float16 cannot hold; with int8 also vectors, which have no channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from quartermap_deploy.errors import UnknownNameError

Storage = Literal["float16", "int8", "float32"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
FEWEST = 1024
"""Numbers of a weight below which its bits are left alone."""


def store_weights(model: onnx.ModelProto, storage: Storage) -> onnx.ModelProto:
    """Return the model with the large float32 weights of its main graph stored in another type.

    Args:
        model: the model; not changed.
        storage: how; "float32" changes nothing.

    Raises:
        UnknownNameError: if there is no such storage.
    """
    if storage not in STORAGES:
        raise UnknownNameError.for_choice("storage of weights", storage, STORAGES)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    taken = _names(graph)
    given = {item.name for item in graph.input}
    kept, nodes = [], []
    for tensor in graph.initializer:
        made = None
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name not in given:
            made = _stored(tensor.name, numpy_helper.to_array(tensor), storage, taken)
        if made is None:
            kept.append(tensor)
        else:
            kept += made[0]
            nodes += made[1]
    nodes += graph.node
    _replace(graph.initializer, kept)
    _replace(graph.node, nodes)
    return result


def _stored(
    name: str, values: NDArray[np.float32], storage: Storage, taken: set[str]
) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]] | None:
    """The tensors and nodes that a weight becomes; None where it stays as it is."""
    if values.size < FEWEST or storage == "float32":
        return None
    stored, cast = (_new(f"{name}/{part}", taken) for part in ("stored", "cast"))
    if storage == "float16":
        # Larger ones, NaN and infinity fail this.
        if not np.abs(values).max() <= np.finfo(np.float16).max:
            return None
        tensors = [numpy_helper.from_array(values.astype(np.float16), stored)]
        return tensors, [_cast(stored, name, cast)]
    if values.ndim < 2 or not np.isfinite(values).all():
        return None
    levels, scale = _levels(values)
    factor, wide, product = (_new(f"{name}/{part}", taken) for part in ("scale", "levels", "product"))
    tensors = [numpy_helper.from_array(levels, stored), numpy_helper.from_array(scale, factor)]
    return tensors, [_cast(stored, wide, cast), helper.make_node("Mul", [wide, factor], [name], name=product)]


def _levels(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The whole numbers from -127 to 127, and the scale of each channel, along whichever axis fits best."""
    best: tuple[float, NDArray[np.int8], NDArray[np.float32]] | None = None
    for axis in range(values.ndim):
        others = tuple(other for other in range(values.ndim) if other != axis)
        scale = (np.abs(values).max(axis=others, keepdims=True) / np.float32(127)).astype(np.float32)
        scale[scale == 0] = 1
        levels = np.clip(np.rint(values / scale), -127, 127).astype(np.int8)
        error = float(np.square(levels * scale - values, dtype=np.float64).sum())
        if best is None or error < best[0]:
            best = error, levels, scale
    assert best is not None
    return best[1], best[2]


def _cast(source: str, target: str, name: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=name, to=onnx.TensorProto.FLOAT)


def _names(graph: onnx.GraphProto) -> set[str]:
    """All names of values and nodes in the main graph."""
    found = {item.name for items in (graph.input, graph.initializer, graph.node) for item in items}
    return found | {name for node in graph.node for name in (*node.input, *node.output)}


def _new(wanted: str, taken: set[str]) -> str:
    name, number = wanted, 1
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    taken.add(name)
    return name


def _replace(field: object, values: Iterable[object]) -> None:
    """Give a repeated field of protobuf other entries, some of which may be its own."""
    copies = list(values)
    del field[:]  # type: ignore[attr-defined]
    field.extend(copies)  # type: ignore[attr-defined]
