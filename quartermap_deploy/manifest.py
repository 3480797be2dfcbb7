"""What a bundle says about itself: its manifest, format 2.

It stands alone: who runs, serves or evaluates a bundle reads preprocessing, class names, task, inputs and outputs here,
and nowhere else.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.bundle import FORMAT, MANIFEST, describe_file, operators
from quartermap_deploy.tensor_info import TensorInfo

if TYPE_CHECKING:
    from quartermap_deploy.exporting.export import Export
    from quartermap_deploy.recipe import Recipe
    from quartermap_deploy.sources.source_model import SourceModel

_PACKAGES = (
    "quartermap-deploy",
    "torch",
    "onnx",
    "onnxscript",
    "onnx-graphsurgeon",
    "onnxruntime",
    "tensorrt-rtx-cu13",
    "tensorrt-cu13",
    "polygraphy",
    "numpy",
)


def make_manifest(
    recipe: Recipe,
    source: SourceModel,
    exported: Export,
    golden: Iterable[str],
    folder: Path,
    targets: Mapping[str, Any],
) -> dict[str, Any]:
    """What a bundle says about itself.

    Args:
        recipe: what it was compiled from.
        source: the model.
        exported: the model as ONNX.
        golden: names of the golden cases.
        folder: the bundle, with all files but the manifest.
        targets: what each target says about itself.
    """
    from quartermap_deploy.sources.cost import cost_of

    cost = cost_of(source, recipe.quartermap, exported.traced)
    io_type = recipe.precision if recipe.io == "same" else None
    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "recipe": recipe.to_dict(),
        "model": {
            "name": source.name,
            "title": source.title,
            "source": source.kind,
            "parameters": cost.parameters,
            "num_classes": num_classes(source.task, exported.traced.outputs),
            "weights": source.weights.source,
            "weights_file": source.weights.file,
            "weights_sha256": source.weights.sha256,
            "head": "new" if source.weights.new_head else "loaded",
            "notes": list(source.weights.notes),
        },
        "task": source.task,
        "labels": list(source.labels),
        "preprocessing": None if source.preprocessing is None else source.preprocessing.to_dict(),
        "inputs": [_typed(item, io_type) for item in source.inputs],
        "outputs": [_typed(item, io_type) for item in exported.traced.outputs],
        "size_rules": list(exported.traced.rules),
        "golden": list(golden),
        "plan": None if recipe.quartermap is None else recipe.quartermap.to_dict(),
        "blocks": [block.to_dict() for block in cost.blocks],
        "totals": cost.totals(),
        "graph": {**operators(exported.model), "before": operators(exported.traced.model)},
        "passes": [
            {
                "name": report.name,
                "changed": report.changed,
                "refused": {str(block): reason for block, reason in report.refused.items()},
            }
            for report in exported.passes
        ],
        "files": {
            path.name: describe_file(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST
        },
        "targets": dict(targets),
    }


def num_classes(task: str, outputs: Iterable[TensorInfo]) -> int | None:
    """How many classes a model tells apart: the second axis of its logits; None where it tells none."""
    first = next(iter(outputs))
    if task not in ("classification", "segmentation") or len(first.shape) < 2:
        return None
    return first.shape[1] if isinstance(first.shape[1], int) else None


def _typed(item: TensorInfo, io_type: str | None) -> dict[str, Any]:
    """An input or output, in the type that it has in the graph."""
    values = item.to_dict()
    if io_type is not None and item.type == "float32":
        values["type"] = io_type
    return values


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that made the bundle."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
