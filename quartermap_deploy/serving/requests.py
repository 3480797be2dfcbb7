"""An inference request, whichever way it came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.serving.refusal import invalid, shown
from quartermap_deploy.serving.tensors import TensorSpec


@dataclass(frozen=True)
class RequestedOutput:
    """An output that a request asks for.

    Attributes:
        name: its name.
        binary: over HTTP, whether its values come as raw bytes behind the JSON.
        classes: how many classes, the most probable first, come in the place of the values; 0 for the values.
    """

    name: str
    binary: bool = False
    classes: int = 0


@dataclass(frozen=True)
class InferRequest:
    """A request whose inputs are those of its model.

    Attributes:
        inputs: values by name.
        outputs: what is to come back, at least one.
        id: what the client calls it.
        raw: over gRPC, whether values come and go as raw bytes.
    """

    inputs: Mapping[str, NDArray[Any]]
    outputs: Sequence[RequestedOutput]
    id: str = ""
    raw: bool = field(default=True)


def match_inputs(specs: Sequence[TensorSpec], names: Sequence[object]) -> list[TensorSpec]:
    """Return the specifications of the inputs that a request names, in its order.

    Raises:
        Refusal: if these are not exactly the model's inputs.
    """
    by_name = {spec.name: spec for spec in specs}
    expected = ", ".join(map(repr, by_name))
    for name in names:
        if not isinstance(name, str) or name not in by_name:
            raise invalid(f"unknown input {shown(name)}; the model takes {expected}")
    if sorted(map(str, names)) != sorted(by_name):
        found = ", ".join(repr(name) for name in names) or "none"
        raise invalid(f"the inputs are {found[:200]}; expected {expected}, each once")
    return [by_name[str(name)] for name in names]


def check_batch(inputs: Mapping[str, NDArray[Any]]) -> None:
    """Check that inputs whose first axis is one and the same batch have as many entries there.

    Raises:
        Refusal: if they have not.
    """
    if len(inputs) < 2:
        return
    (first, count), *others = ((name, len(values)) for name, values in inputs.items())
    for name, found in others:
        if found != count:
            raise invalid(
                f"input {name!r} is a batch of {found}, and {first!r} one of {count}; expected the same for all"
            )


def match_outputs(specs: Sequence[TensorSpec], wanted: Sequence[RequestedOutput]) -> list[RequestedOutput]:
    """Return the requested outputs.

    Raises:
        Refusal: if one is not the model's, is asked for twice, or is asked for as classes and has none.
    """
    names, shapes = [spec.name for spec in specs], {spec.name: spec.shape for spec in specs}
    for output in wanted:
        if output.name not in names:
            raise invalid(f"unknown output {shown(output.name)}; the model has {', '.join(map(repr, names))}")
        if output.classes and len(shapes[output.name]) != 2:
            raise invalid(
                f"output {output.name!r} has shape {list(shapes[output.name])}; only one of (batch, classes) comes as "
                "classes"
            )
    if len({output.name for output in wanted}) != len(wanted):
        raise invalid("an output is asked for twice")
    return list(wanted)


def class_count(value: object) -> int:
    """Read the parameter `classification` of a requested output.

    Raises:
        Refusal: if it is no number of classes.
    """
    if type(value) is not int or value < 0:
        raise invalid(f"the parameter classification is {shown(value)}; expected a number of classes")
    return value


def classified(values: NDArray[Any], count: int, labels: Sequence[str]) -> NDArray[Any]:
    """Return the most probable classes as strings "value:index:label", (batch, count), as Triton writes them.

    Args:
        values: (batch, classes); the larger, the more probable.
        count: how many; all where there are fewer.
        labels: names of the classes; they are left out where there is not one for each.
    """
    order = np.argsort(-values.astype(np.float64), axis=1, kind="stable")[:, :count]
    result = np.empty(order.shape, dtype=object)
    for row, indices in enumerate(order):
        for column, index in enumerate(indices):
            label = f":{labels[index]}" if len(labels) == values.shape[1] else ""
            result[row, column] = f"{values[row, index]:f}:{index}{label}".encode()
    return result
