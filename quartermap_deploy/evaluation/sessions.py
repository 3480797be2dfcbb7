"""Classifiers that are ready to run, from a bundle, a recipe or a name, on any target."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from quartermap_deploy.bundle import MODEL, Bundle, load_bundle
from quartermap_deploy.data.labels import class_names
from quartermap_deploy.data.preprocessing import KEYS, Preprocessing
from quartermap_deploy.errors import BundleError, InputError, TrustError, UnknownNameError
from quartermap_deploy.evaluation.runs import (
    TORCH,
    Sizes,
    exported_session,
    reference_of,
    require_own,
    session_run,
    source_run,
    target_sizes,
    weights_hash,
)
from quartermap_deploy.image_interface import fitting_preprocessing
from quartermap_deploy.plain_text import printable
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.pruning.plan import QuarterMap
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.targets import DEFAULT, Session, list_targets, load_target, refuse_providers
from quartermap_deploy.targets.execution import ON_CPU, Execution
from quartermap_deploy.targets.placement import Placement

if TYPE_CHECKING:
    from quartermap_deploy.evaluation.accuracy import Run
    from quartermap_deploy.sources.source_model import SourceModel
    from quartermap_deploy.tensor_info import TensorInfo

Labels: TypeAlias = "str | Path | Sequence[str]"


@dataclass(frozen=True, eq=False)
class Runner:
    """A classifier of images that is ready to run.

    Attributes:
        name: for people: the bundle's folder, the recipe's file or the model's name.
        model: name of the model.
        target: what it runs on: "torch", or a target of `targets`.
        run: images (n, channels, H, W) of float32 → logits (n, num_classes) of float32, for any n from 1.
        preprocessing: how images are prepared for it.
        labels: names of its classes, or nothing.
        plan: the QuarterMap plan, or None.
        num_classes: how many classes it tells apart.
        weights: "checkpoint", "included", "new" or "given".
        trained: whether all of its weights are trained, the last layer's too, as far as that is known.
        identity: hash of everything that decides the logits: weights, plan, precision and target.
        overridden: what was said otherwise than the bundle or the model's card says: "labels", and names of values of
            the preprocessing.
        placement: what of it runs where, in ONNX Runtime; None elsewhere.
    """

    name: str
    model: str
    target: str
    run: Run
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    plan: QuarterMap | None
    num_classes: int
    weights: str
    trained: bool
    identity: str
    overridden: tuple[str, ...] = ()
    placement: Placement | None = None


@dataclass(frozen=True)
class Given:
    """What the user says beside naming a model.

    Attributes:
        checkpoint: a file with weights.
        factory: what makes the module of a bundle's.
        labels: names of the classes.
        preprocessing: values of the preprocessing, by name.
    """

    checkpoint: Path | None = None
    factory: str | None = None
    labels: Labels | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)


def runner_for(
    source: str | Path | Recipe | Bundle,
    target: str | None = None,
    *,
    execution: Execution = ON_CPU,
    checkpoint: Path | None = None,
    factory: str | None = None,
    labels: Labels | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    run_module: bool = False,
    signed_by: Sequence[Path] = (),
    progress: Progress = SILENT,
) -> Runner:
    """Make a classifier ready to run.

    A bundle opens its session, and says itself how images are prepared and what its classes are. A recipe or a model is
    built in memory, pruned by its plan: in PyTorch for the target "torch", else exported and, where the target has
    engines, built in a temporary folder. Nothing proves that it computes what PyTorch computes; `compile` does.

    Args:
        source: a bundle or its folder, a recipe or its .toml file, or the name of a model.
        target: "torch" or a target of `targets`; None for the bundle's default, or "onnxruntime".
        execution: of the target "onnxruntime", the providers that run it, whatever the bundle or the recipe says.
        checkpoint: weights, in place of the recipe's; for a bundle in PyTorch, the file it was compiled from.
        factory: for a bundle of a module of the user's in PyTorch, what makes the module, as `package.module:name`.
        labels: names of the classes in place of those that the source has: a list, a file, or a set by name.
        preprocessing: values that replace those of the source's preprocessing, by name; all of them where it has none.
        run_module: agree to run the module that a recipe file names in [module].
        signed_by: for the folder of a bundle, PEM files of the public keys by which it must be signed.
        progress: told about the steps.

    Raises:
        TrustError: if the bundle is not signed so, or what is no bundle is to be; or if a recipe file names code, and
            `run_module` does not agree.
        UnknownNameError: if there is no such target, or the bundle was not built for it.
        InputError: if it is no classifier of one image, nobody says how images are prepared for it, or the labels or
            the preprocessing do not fit it.
        QuartermapError: of the kind that fits, if the source is no bundle, recipe or model, or cannot be built.
    """
    if target is not None and target not in (TORCH, *list_targets()):
        raise UnknownNameError.for_choice("target", target, (TORCH, *list_targets()))
    given = Given(checkpoint, factory, labels, preprocessing or {})
    if isinstance(source, Bundle) or (not isinstance(source, Recipe) and _is_bundle(source)):
        bundle = source if isinstance(source, Bundle) else load_bundle(source, signed_by=signed_by)
        chosen = target or bundle.default_target
        if bundle.changed is not None:
            # Its PyTorch model is the bundle's, and computes nothing of the file.
            bundle.target(chosen)
        refuse_providers(chosen, execution)
        return _bundle_runner(bundle, chosen, given, execution, progress)
    refuse_providers(target or DEFAULT, execution)
    from quartermap_deploy.compiler import as_recipe

    if signed_by:
        raise TrustError(
            f"{printable(source)} is no bundle, and nothing else is signed; compile it, and sign the bundle"
        )
    if isinstance(source, str) and names_a_factory(source):
        raise InputError(
            f"{source} names a module of yours; write a recipe with it in [module], its example input, and in "
            "[preprocessing] how images are prepared for it, and give that; or compile it, and give the bundle"
        )
    if factory is not None:
        raise InputError(
            f"{source} is no bundle, and a recipe names its factory itself, in [module]; leave {factory} out"
        )
    recipe = as_recipe(source, run_module=run_module)
    name = recipe.model if isinstance(source, Recipe) else Path(source).stem
    return _recipe_runner(recipe, name, target or DEFAULT, given, execution, progress)


def _is_bundle(source: str | Path) -> bool:
    text = str(source)
    # The name of a model is no path, unless there is such a folder; what looks like a path gets an error about bundles.
    if text.endswith(".toml") or names_a_factory(text):
        return False
    return text.endswith(".onnx") or Path(source).is_dir() or "/" in text or "\\" in text


def names_a_factory(source: str) -> bool:
    """Whether a text is package.module:name, or path/to/model.py:name."""
    where, colon, name = source.rpartition(":")
    return bool(where and colon) and name.isidentifier() and not Path(source).exists()


def _bundle_runner(
    bundle: Bundle, target: str, given: Given, execution: Execution, progress: Progress
) -> Runner:
    placement = None
    recipe, manifest = bundle.recipe(), bundle.manifest
    name = bundle.name
    image = image_input(name, bundle.task, bundle.inputs)
    classes = _known_classes(name, bundle.num_classes)
    preprocessing = fitting_preprocessing(
        f"the bundle {bundle.path}", image, bundle.preprocessing, given.preprocessing
    )
    labels = class_names(given.labels, classes, bundle.labels)
    identity: dict[str, Any] = {"model": manifest["files"][MODEL], "target": target}
    if target == TORCH:
        from quartermap_deploy.revalidate import rebuild_torch

        source = rebuild_torch(bundle, given.checkpoint, given.factory, progress)
        reference = reference_of(source, recipe.quartermap, progress)
        with progress.step("comparing it with what the bundle keeps"):
            require_own(bundle, reference)
        run = source_run(source, reference)
        # A bundle in 16 bits and one in float32 have the same PyTorch model.
        identity = _torch_identity(source, recipe)
    else:
        _refuse_for_torch(bundle, given)
        with progress.step(f"loading {name}"):
            session = bundle.session(target, execution=execution)
        placement = session.placement
        identity |= _execution_identity(execution)
        entry = manifest["targets"][target]
        identity["file"] = manifest["files"].get(entry.get("file", MODEL))
        run = session_run(session, target_sizes(image.shape[0], entry))
    return Runner(
        name=name,
        model=manifest["model"]["name"],
        target=target,
        run=run,
        preprocessing=preprocessing,
        labels=labels,
        plan=recipe.quartermap,
        num_classes=classes,
        weights=manifest["model"]["weights"],
        trained=manifest["model"]["weights"] != "new" and manifest["model"].get("head") != "new",
        identity=_hash(identity),
        overridden=_overridden(given.labels, given.preprocessing),
        placement=placement,
    )


def _refuse_for_torch(bundle: Bundle, given: Given) -> None:
    """Refuse what only the PyTorch model of a bundle needs."""
    if given.checkpoint is not None:
        raise BundleError(
            f"the bundle {bundle.path} has its weights in it; --checkpoint is for the target {TORCH} alone"
        )
    if given.factory is not None:
        raise BundleError(
            f"the bundle {bundle.path} runs without the module that it was made from; --factory is for the target "
            f"{TORCH} alone"
        )


def _execution_identity(execution: Execution) -> dict[str, Any]:
    """What of the providers decides the logits: which they are, unless they are the CPU's alone."""
    return {} if execution.on_cpu else {"execution": str(execution)}


def _recipe_runner(
    recipe: Recipe, name: str, target: str, given: Given, execution: Execution, progress: Progress
) -> Runner:
    from quartermap_deploy.compiling.source import load_source

    placement = None
    recipe = _with_given(recipe, given)
    if target != TORCH:
        # A model may take minutes to load.
        load_target(target).check(dataclasses.replace(recipe, targets=(target,), execution=execution))
    with progress.step(f"loading {recipe.model}"):
        source = load_source(recipe)
    image = image_input(name, source.task, source.inputs)
    preprocessing = fitting_preprocessing(name, image, source.preprocessing)
    identity = _torch_identity(source, recipe)
    identity["target"] = target
    if target == TORCH:
        run = source_run(source, reference_of(source, recipe.quartermap, progress))
    else:
        identity |= {
            name: getattr(recipe, name)
            for name in ("precision", "optimize", "inline", "opset", "io", "keep_float32", "blocks_float32")
        }
        recipe = dataclasses.replace(recipe, targets=(target,), execution=execution)
        session, sizes = _built_session(recipe, source, progress)
        run, placement = session_run(session, sizes), session.placement
        identity |= _execution_identity(execution)
    # What a recipe says of a module of the user's is all that is known of it; of a card's model it is said otherwise.
    own = given if recipe.module is not None else Given(None, None, recipe.labels, recipe.preprocessing or {})
    return Runner(
        name=name,
        model=source.name,
        target=target,
        run=run,
        preprocessing=preprocessing,
        labels=source.labels,
        plan=recipe.quartermap,
        num_classes=_known_classes(name, _classes_of(source)),
        weights=source.weights.source,
        trained=source.weights.trained,
        identity=_hash(identity),
        overridden=_overridden(own.labels, own.preprocessing),
        placement=placement,
    )


def _with_given(recipe: Recipe, given: Given) -> Recipe:
    """A recipe with what the user says on top of it."""
    prepared = {**(recipe.preprocessing or {}), **given.preprocessing}
    if given.preprocessing and recipe.module is not None and len(recipe.module.example) == 1:
        # The example input says which size the images must have.
        (shape,) = recipe.module.example.values()
        prepared.setdefault("crop", list(shape[2:]))
    labels = recipe.labels
    if given.labels is not None:
        labels = given.labels if isinstance(given.labels, (str, Path)) else tuple(given.labels)
    return dataclasses.replace(
        recipe,
        checkpoint=given.checkpoint or recipe.checkpoint,
        labels=labels,
        preprocessing=prepared or None,
    )


def _built_session(recipe: Recipe, source: SourceModel, progress: Progress) -> tuple[Session, Sizes]:
    """Export a model and open it on the recipe's only target."""
    from quartermap_deploy.compiling.export import export_model
    from quartermap_deploy.compiling.targets import ENGINES, load_targets
    from quartermap_deploy.targets.tensorrt.options import EngineOptions

    if ENGINES.isdisjoint(recipe.targets):
        recipe = dataclasses.replace(recipe, engine=EngineOptions())
    load_targets(recipe)
    exported = export_model(recipe, source, progress)
    return exported_session(exported, recipe, source.inputs[0].shape[0], progress)


# What can be evaluated ------------------------------------------------------------------------------------------


def image_input(name: str, task: str, inputs: Sequence[TensorInfo]) -> TensorInfo:
    """Return the input that images go into.

    Args:
        name: of the model, for messages.
        task: what its outputs are.
        inputs: what it takes.

    Raises:
        InputError: if the model is no classifier, or takes anything else than one batch of images.
    """
    instead = "`quartermap bench` times any bundle, and `quartermap validate` compares it with PyTorch"
    if task != "classification":
        raise InputError(f"{name} is a model of the task {task!r}, and accuracy is of classifiers; {instead}")
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        taken = ", ".join(f"{item.name} ({', '.join(map(str, item.shape))})" for item in inputs)
        raise InputError(
            f"{name} takes {taken}, and accuracy is of models that take one batch of images, (batch, channels, height, "
            f"width); {instead}"
        )
    return inputs[0]


def _known_classes(name: str, classes: int | None) -> int:
    if classes is None:
        raise InputError(f"the output of {name} has no fixed number of classes, so there is nothing to count")
    return classes


def _overridden(labels: Labels | None, preprocessing: Mapping[str, Any]) -> tuple[str, ...]:
    names = () if labels is None else ("labels",)
    return (*names, *(key for key in KEYS if key in preprocessing))


def _classes_of(source: SourceModel) -> int | None:
    """How many classes a source model tells apart."""
    from quartermap_deploy.sources.architectures import ArchitectureSource
    from quartermap_deploy.sources.modules import ModuleSource

    if isinstance(source, ArchitectureSource):
        return source.module.num_classes
    assert isinstance(source, ModuleSource)
    first = next(iter(source.discovery.outputs.values()))
    return first.shape[1] if first.ndim > 1 else None


def _torch_identity(source: SourceModel, recipe: Recipe) -> dict[str, Any]:
    plan = None if recipe.quartermap is None else recipe.quartermap.to_dict()
    return {"weights": weights_hash(source.module), "plan": plan, "target": TORCH}


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
