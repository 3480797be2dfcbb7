"""Models that are ready to run, from a bundle, a recipe or a name, on any target."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.architectures.cards import ModelCard, load_card
from quartermap_deploy.bundle import MODEL, Bundle, load_bundle
from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.errors import BundleError, UnknownNameError
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.pruning.plan import QuarterMap
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.targets import DEFAULT, Session, list_targets, load_target

if TYPE_CHECKING:
    from quartermap_deploy.architectures.base import VisualStateSpaceModel
    from quartermap_deploy.evaluation.accuracy import Run
    from quartermap_deploy.exporting.export import Export

TORCH = "torch"


@dataclass(frozen=True, eq=False)
class Runner:
    """A model that is ready to run.

    Attributes:
        name: for people: the bundle's folder, the recipe's file or the model's name.
        target: what it runs on: "torch", or a target of `targets`.
        run: images (n, 3, H, W) of float32 → logits (n, num_classes) of float32, for any n from 1.
        card: the model's card.
        preprocessing: how images are prepared for it: the card's, at the size of the model's input.
        plan: the QuarterMap plan, or None.
        num_classes: size of the output.
        weights: "checkpoint", "included" or "new".
        trained: whether all of its weights are trained, the last layer's too.
        identity: hash of everything that decides the logits: weights, plan, precision and target.
    """

    name: str
    target: str
    run: Run
    card: ModelCard
    preprocessing: Preprocessing
    plan: QuarterMap | None
    num_classes: int
    weights: str
    trained: bool
    identity: str


def runner_for(
    source: str | Path | Recipe | Bundle,
    target: str | None = None,
    *,
    checkpoint: Path | None = None,
    progress: Progress = SILENT,
) -> Runner:
    """Make a model ready to run.

    A bundle opens its session. A recipe or a model is built in memory, pruned by its plan: in PyTorch for the target
    "torch", else exported and, where the target has engines, built in a temporary folder. Nothing proves that it
    computes what PyTorch computes; `compile` does.

    Args:
        source: a bundle or its folder, a recipe or its .toml file, or the name of a model.
        target: "torch" or a target of `targets`; None for the bundle's default, or "onnxruntime".
        checkpoint: weights, in place of the recipe's; for a bundle in PyTorch, the file it was compiled from.
        progress: told about the steps.

    Raises:
        UnknownNameError: if there is no such target, or the bundle was not built for it.
        QuartermapError: of the kind that fits, if the source is no bundle, recipe or model, or cannot be built.
    """
    if target is not None and target not in (TORCH, *list_targets()):
        raise UnknownNameError.for_choice("target", target, (TORCH, *list_targets()))
    if isinstance(source, Bundle) or (not isinstance(source, Recipe) and _is_bundle(source)):
        bundle = source if isinstance(source, Bundle) else load_bundle(source)
        return _bundle_runner(bundle, target or bundle.default_target, checkpoint, progress)
    from quartermap_deploy.compiler import as_recipe

    recipe = as_recipe(source)
    name = recipe.model if isinstance(source, Recipe) else Path(source).stem
    if checkpoint is not None:
        recipe = dataclasses.replace(recipe, checkpoint=checkpoint)
    return _recipe_runner(recipe, name, target or DEFAULT, progress)


def _is_bundle(source: str | Path) -> bool:
    text = str(source)
    # The name of a model is no path, unless there is such a folder; what looks like a path gets an error about bundles.
    return not text.endswith(".toml") and (Path(source).is_dir() or "/" in text or "\\" in text)


def _bundle_runner(bundle: Bundle, target: str, checkpoint: Path | None, progress: Progress) -> Runner:
    recipe, manifest = bundle.recipe(), bundle.manifest
    card = load_card(recipe.model)
    identity: dict[str, Any] = {"model": manifest["files"][MODEL], "target": target}
    if target == TORCH:
        from quartermap_deploy.compiler import reference_model
        from quartermap_deploy.revalidate import rebuild_torch

        model = reference_model(recipe, rebuild_torch(bundle, checkpoint, progress))
        run = torch_run(model)
        # A bundle in 16 bits and one in float32 have the same PyTorch model.
        identity = {"weights": weights_hash(model), "plan": _plan_entry(recipe), "target": target}
    else:
        if checkpoint is not None:
            raise BundleError(
                f"the bundle {bundle.path} has its weights in it; --checkpoint is for the target {TORCH} alone"
            )
        with progress.step(f"loading {bundle.path.name}"):
            session = bundle.session(target)
        file = manifest["targets"][target].get("file", MODEL)
        identity["file"] = manifest["files"].get(file)
        run = session_run(session, _sizes(recipe.dynamic_batch, manifest["targets"][target]))
    return Runner(
        name=bundle.path.name or str(bundle.path),
        target=target,
        run=run,
        card=card,
        preprocessing=preprocessing_of(recipe, card),
        plan=recipe.quartermap,
        num_classes=manifest["model"]["num_classes"],
        weights=manifest["model"]["weights"],
        trained=manifest["model"]["weights"] != "new" and manifest["model"].get("head") != "new",
        identity=_hash(identity),
    )


def _recipe_runner(recipe: Recipe, name: str, target: str, progress: Progress) -> Runner:
    from quartermap_deploy.compiler import load_model, reference_model

    with progress.step(f"loading {recipe.model}"):
        model, card, weights = load_model(recipe)
    identity = {"weights": weights_hash(model), "plan": _plan_entry(recipe), "target": target}
    if target == TORCH:
        run = torch_run(reference_model(recipe, model))
    else:
        identity |= {
            name: getattr(recipe, name)
            for name in ("precision", "optimize", "io", "keep_float32", "blocks_float32")
        }
        run = _built_run(dataclasses.replace(recipe, targets=(target,)), model, card, progress)
    return Runner(
        name=name,
        target=target,
        run=run,
        card=card,
        preprocessing=preprocessing_of(recipe, card),
        plan=recipe.quartermap,
        num_classes=model.num_classes,
        weights=weights.source,
        trained=weights.source != "new" and not weights.new_head,
        identity=_hash(identity),
    )


def _built_run(recipe: Recipe, model: VisualStateSpaceModel, card: ModelCard, progress: Progress) -> Run:
    """Export a model and open it on the recipe's only target."""
    from quartermap_deploy.compiler import ENGINES, export_model, load_targets
    from quartermap_deploy.targets.tensorrt.options import EngineOptions

    if ENGINES.isdisjoint(recipe.targets):
        recipe = dataclasses.replace(recipe, engine=EngineOptions())
    load_targets(recipe)
    return exported_run(export_model(recipe, model, card, progress), recipe, progress)


def exported_run(exported: Export, recipe: Recipe, progress: Progress = SILENT) -> Run:
    """Return a function that runs an exported model on the recipe's only target."""
    from quartermap_deploy.targets.onnxruntime_cpu import OnnxRuntimeSession

    (target,) = recipe.targets
    data = exported.model.SerializeToString()
    if target == DEFAULT:
        return session_run(OnnxRuntimeSession(data), _sizes(recipe.dynamic_batch, {}))
    module = load_target(target)
    # An engine is read when it is opened; its folder may go then.
    with tempfile.TemporaryDirectory(prefix="quartermap-") as folder, progress.step(f"building for {target}"):
        path = Path(folder) / MODEL
        path.write_bytes(data)
        entry = module.build(path, Path(folder), recipe.engine, progress=progress)
        return session_run(module.open(Path(folder), entry), _sizes(recipe.dynamic_batch, entry))


def torch_run(model: VisualStateSpaceModel) -> Run:
    """Return a function that runs a PyTorch model on arrays, on the GPU if PyTorch has one."""
    import torch

    model = on_device(model)
    device = next(model.parameters()).device

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = model(torch.from_numpy(images).to(device)).float().cpu().numpy()
        return logits

    return run


def on_device(model: VisualStateSpaceModel) -> VisualStateSpaceModel:
    """Return the model, or a copy of it on the GPU if PyTorch has one."""
    import torch

    return copy.deepcopy(model).to("cuda") if torch.cuda.is_available() else model


def session_run(session: Session, sizes: Sequence[tuple[int, int]]) -> Run:
    """Return a function that runs a session on any number of images.

    A model of a fixed batch gets so many at a time, an engine as many as one of its profiles takes: images are repeated
    to fill up, and what was filled is cut off again.

    Args:
        session: the session.
        sizes: smallest and largest batches that it takes; none if it takes every batch.
    """
    element_type = getattr(session, "input_type", np.dtype(np.float32))
    largest = max((high for _, high in sizes), default=None)

    def run_some(images: NDArray[np.float32]) -> NDArray[np.float32]:
        count = len(images)
        if sizes and not any(low <= count <= high for low, high in sizes):
            images = images[np.arange(min(low for low, _ in sizes if low > count)) % count]
        logits = session.run(images.astype(element_type, copy=False))[:count]
        return logits.astype(np.float32, copy=False)

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        if largest is None or len(images) <= largest:
            return run_some(images)
        starts = range(0, len(images), largest)
        return np.concatenate([run_some(images[start : start + largest]) for start in starts])

    return run


def _sizes(dynamic_batch: bool, entry: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The batches that a target's session takes: those of a fixed model, or of the profiles of an engine."""
    if not dynamic_batch:
        return [(1, 1)]
    profiles = entry.get("options", {}).get("profiles", [])
    return [(profile["batch"][0], profile["batch"][-1]) for profile in profiles]


def preprocessing_of(recipe: Recipe, card: ModelCard) -> Preprocessing:
    """How images are prepared for a recipe's model: as its card says, at the recipe's size."""
    return (
        card.preprocessing if recipe.input_size is None else card.preprocessing.with_size(*recipe.input_size)
    )


def _plan_entry(recipe: Recipe) -> Any:
    return None if recipe.quartermap is None else recipe.quartermap.to_dict()


def weights_hash(model: VisualStateSpaceModel) -> str:
    """Hash of a model's weights and of what they belong to."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.hexdigest()


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
