"""The batch of a bundle: whether its inputs and outputs have one, and how large it may be."""

from __future__ import annotations

from collections.abc import Iterable

from quartermap_deploy.model_facts import ModelFacts
from quartermap_deploy.tensor_info import TensorInfo


def shared_batch(items: Iterable[TensorInfo]) -> int | str | None:
    """The first axis that all of some inputs and outputs have in common.

    Returns:
        Its name if it is open, its size if it is fixed; None if there is an item without axes, or with another one.
    """
    firsts = {item.shape[0] if item.shape else None for item in items}
    return firsts.pop() if len(firsts) == 1 else None


def batch_of(bundle: ModelFacts) -> int | str | None:
    """The batch that all inputs and outputs of a bundle share, as `shared_batch` says."""
    return shared_batch((*bundle.inputs, *bundle.outputs))


def largest_batch(bundle: ModelFacts, target: str) -> int | None:
    """The largest batch that a target takes at once: a fixed one, or that of an engine's widest profile.

    Returns:
        None if only memory limits it.
    """
    first = bundle.inputs[0].shape[:1]
    if first and isinstance(first[0], int):
        return first[0]
    profiles = bundle.manifest["targets"][target].get("options", {}).get("profiles")
    return max(profile["batch"][2] for profile in profiles) if profiles else None
