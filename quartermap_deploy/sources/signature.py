"""How a module is called by named inputs, and how what it returns gets names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quartermap_deploy.errors import InputError

BASE_NAMES = {"classification": "logits", "segmentation": "logits", "features": "features", "image": "image"}
"""Name of the only output of a task, and what the names of several begin with."""
OTHER = "output"


@dataclass(frozen=True)
class Signature:
    """How a module is called.

    Attributes:
        inputs: names of its inputs, in the order of its forward.
        by_keyword: whether they are given by keyword.
        base: name of an output that has none of its own; several are numbered.
    """

    inputs: tuple[str, ...]
    by_keyword: bool
    base: str

    def call(self, module: nn.Module, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a module on named inputs; returns its outputs by name, flattened."""
        if self.by_keyword:
            return self.named(module(**{name: feeds[name] for name in self.inputs}))
        return self.named(module(*(feeds[name] for name in self.inputs)))

    def named(self, outputs: Any) -> dict[str, Tensor]:
        """Name the tensors in what a module returned, in the order in which torch flattens it.

        A tensor by itself has the name of its task; one in a dictionary or a named tuple that of its key, one in a list
        its number. None is no output.

        Raises:
            InputError: if there is no tensor, something else than tensors, or the same tensor name twice.
        """
        found: dict[str, Tensor] = {}
        for path, value in _leaves(outputs, ()):
            name = self._name(path)
            if name in found:
                raise InputError(f"the module returns two outputs named {name!r}; give them different keys")
            if not isinstance(value, Tensor):
                raise InputError(
                    f"the module returns a {type(value).__name__} as {name!r}; expected tensors, or lists, tuples and "
                    "dictionaries of them: return the tensors alone from a small module around it"
                )
            found[name] = value
        if not found:
            raise InputError("the module returns no tensor")
        return found

    def _name(self, path: Sequence[str]) -> str:
        name = "_".join(path) or self.base
        if name[0].isdigit():
            name = f"{self.base}_{name}"
        # In a graph an input and an output cannot have one name.
        return f"{name}_output" if name in self.inputs else name


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Everything in nested lists, tuples and dictionaries, as torch's pytree flattens them."""
    import torch.utils._pytree as pytree

    for keys, leaf in pytree.tree_flatten_with_path(value)[0]:
        if leaf is None:
            continue
        yield (*path, *(_key(key) for key in keys)), leaf


def _key(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return "".join(letter if letter.isalnum() else "_" for letter in str(getattr(key, attribute)))
    return "".join(letter if letter.isalnum() else "_" for letter in str(key)).strip("_")


def input_names(module: nn.Module, example: Any) -> tuple[str, ...]:
    """Names of positional inputs: those of the parameters of the module's forward.

    Args:
        module: the module.
        example: its inputs, one tensor or a sequence of them.
    """
    import inspect

    count = 1 if isinstance(example, Tensor) else len(example)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = [
            p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds
        ]
    except (TypeError, ValueError):
        parameters = []
    names = parameters[:count]
    names += [f"input_{place}" for place in range(len(names), count)]
    return tuple(names)


def as_tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Arrays or tensors by name, as tensors on the CPU."""
    return {
        name: value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(value)
        for name, value in values.items()
    }
