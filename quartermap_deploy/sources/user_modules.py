"""Source models from what a recipe or the command line names: a factory, weights, and shapes of example inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from quartermap_deploy.data.labels import class_names
from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.errors import InputError
from quartermap_deploy.files import file_hash
from quartermap_deploy.sources.description import WeightsOrigin
from quartermap_deploy.sources.factories import FLOAT32, UserModule, build_module, find_scans
from quartermap_deploy.sources.modules import ModuleSource, module_source
from quartermap_deploy.sources.signature import input_names
from quartermap_deploy.weights import LoadedWeights, load_weights

UNNAMED = "images"
"""The name of an example input that was given without one."""


def user_module_source(
    wanted: UserModule,
    *,
    name: str,
    weights: Path | None = None,
    task: str | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    labels: str | Path | Sequence[str] | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    seed: int = 0,
) -> ModuleSource:
    """Make the user's module, load its weights, and describe it.

    Args:
        wanted: the factory, its arguments, and the shapes of the example inputs.
        name: what the model is called.
        weights: file with its weights; None leaves those that the factory gives it.
        task: what its outputs are; None tells it from their shapes.
        preprocessing: how an image becomes its input, by the names of `Preprocessing`, or None.
        labels: names of the classes, or a file or set of them.
        dynamic_batch: leave the batch open.
        dynamic_size: leave height and width open.
        seed: of new weights and of the example inputs, without touching torch's global generator.

    Raises:
        InputError: if the factory is not there or raises, or the example inputs do not fit.
        CheckpointError: if the weights cannot be read, or do not fit.
        ExportError: if the module fails, has no scan, or gives another output at every call.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build_module(wanted)
    origin = WeightsOrigin("new")
    if weights is not None:
        loaded = load_weights(module, weights, strict=wanted.strict_weights)
        origin = WeightsOrigin(
            "checkpoint", file=weights.name, sha256=file_hash(weights), notes=_notes(loaded)
        )
    source = module_source(
        module,
        example_inputs(module, wanted.example, seed, wanted.types),
        name=name,
        task=task,
        preprocessing=_preprocessing(preprocessing, wanted.example),
        dynamic_batch=dynamic_batch,
        dynamic_size=dynamic_size,
        stages=wanted.stages,
        scans=find_scans(wanted),
        weights=origin,
    )
    if labels is None:
        return source
    first = next(iter(source.discovery.outputs.values()))
    return source.with_labels(class_names(labels, first.shape[1] if first.ndim > 1 else 0))


def example_inputs(
    module: nn.Module, shapes: Mapping[str, Sequence[int]], seed: int, types: Mapping[str, str] | None = None
) -> Any:
    """Random example inputs of given shapes: by keyword where their names are those of the module's forward.

    Args:
        module: the module.
        shapes: of the inputs, by name.
        seed: of the values.
        types: element types of those that are not float32. Whole numbers are 0 or 1, which every table has entries for.

    Raises:
        InputError: if forward has no input of a name.
    """
    generator = np.random.default_rng(seed)
    arrays = {}
    for name, shape in shapes.items():
        kind = (types or {}).get(name, FLOAT32)
        whole = kind != FLOAT32
        values = (
            generator.integers(2, size=tuple(shape)) if whole else generator.standard_normal(tuple(shape))
        )
        arrays[name] = torch.from_numpy(values.astype(kind))
    if list(arrays) == [UNNAMED]:
        return arrays[UNNAMED]
    known = input_names(module, list(arrays.values()))
    if set(arrays) == set(known):
        return tuple(arrays[name] for name in known)
    if absent := [name for name in arrays if name not in known]:
        raise InputError(
            f"the module's forward has no input {absent[0]!r}; its first inputs are {', '.join(known)}"
        )
    return arrays


def _preprocessing(
    values: Mapping[str, Any] | None, example: Mapping[str, tuple[int, ...]]
) -> Preprocessing | None:
    """The preprocessing that a recipe names; its size is that of the first example input that can be an image."""
    if values is None:
        return None
    sizes = [shape[2:] for shape in example.values() if len(shape) == 4]
    return Preprocessing.from_dict(values, (sizes[0][0], sizes[0][1]) if sizes else None)


def _notes(loaded: LoadedWeights) -> tuple[str, ...]:
    """What has to be said about weights that do not fit exactly."""
    found = []
    for keys, what in (
        (loaded.missing, "stay newly initialised"),
        (loaded.unexpected, "of the file are left out"),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            found.append(f"{', '.join(keys[:3])}{more} {what}")
    return tuple(found)
