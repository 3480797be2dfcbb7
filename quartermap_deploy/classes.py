"""The classes that a bundle tells apart: their names, and how its output becomes probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.data.labels import class_names
from quartermap_deploy.errors import BundleError, InputError
from quartermap_deploy.model_facts import ModelFacts
from quartermap_deploy.onnx_bounds import check_model

if TYPE_CHECKING:
    import onnx

Activation = Literal["softmax", "sigmoid", "none"]
"""What makes probabilities of an output: "none" where the model ends in one of the others itself."""

_PASSED = ("Cast", "Identity", "Reshape", "Squeeze", "Flatten")
"""Operators between the last one and the output that change no value."""


def class_labels(
    bundle: ModelFacts, given: str | PathLike[str] | Sequence[str] | None = None
) -> tuple[str, ...]:
    """Return the names of a bundle's classes; nothing where nobody gave any.

    Args:
        bundle: the bundle.
        given: names in the place of the bundle's: a list, a file with one on each line, or a set of `data/labels.py`.

    Raises:
        InputError: if names are given to a model without classes, or not one for each class.
    """
    classes = bundle.num_classes
    if classes is not None:
        return class_names(given, classes, bundle.labels)
    if given is not None:
        raise InputError(
            f"labels are names of classes, and the model of {bundle.path} tells none apart (its task is "
            f"{bundle.task}); leave them out"
        )
    return ()


def named(labels: Sequence[str], index: int) -> str:
    """The name of a class, or its number where it has none."""
    return labels[index] if index < len(labels) else str(index)


def activation_of(bundle: ModelFacts) -> Activation:
    """Tell how the first output of a bundle becomes probabilities.

    A module may end in a softmax or sigmoid of its own; a second one would make other numbers of its probabilities, and
    nobody would see it. So the end of the graph is looked at, except of the models of this package, which give logits.

    Raises:
        BundleError: if the model cannot be read.
    """
    if bundle.manifest["model"].get("source") != "card" and _last_operator(bundle) in ("Softmax", "Sigmoid"):
        return "none"
    return "sigmoid" if bundle.num_classes == 1 else "softmax"


def probabilities(values: NDArray[Any], activation: Activation) -> NDArray[np.float64]:
    """Return probabilities, (n, classes), for an output of the same shape, computed in float64."""
    wide = values.astype(np.float64)
    if activation == "none":
        return wide
    if activation == "sigmoid":
        # The hyperbolic tangent overflows nowhere.
        result: NDArray[np.float64] = 0.5 + 0.5 * np.tanh(0.5 * wide)
        return result
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    result = powers / powers.sum(axis=1, keepdims=True)
    return result


def _last_operator(bundle: ModelFacts) -> str | None:
    """The operator that makes the first output; None where an input is passed on."""
    import onnx

    check_model(bundle.model_path)
    try:
        graph = onnx.load(bundle.model_path, load_external_data=False).graph
    except Exception as error:  # protobuf has several kinds
        raise BundleError(f"{bundle.model_path} is no valid ONNX model ({str(error)[:200]})") from error
    made_by: dict[str, onnx.NodeProto] = {name: node for node in graph.node for name in node.output}
    node = made_by.get(bundle.outputs[0].name)
    while node is not None and node.op_type in _PASSED:
        node = made_by.get(node.input[0])
    return None if node is None else str(node.op_type)
