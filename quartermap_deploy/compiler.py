"""The compiler, top to bottom: a recipe goes in, a verified bundle comes out."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.bundle import (
    FORMAT,
    MANIFEST,
    MODEL,
    REPORT,
    Bundle,
    check_destination,
    describe_file,
    load_bundle,
    new_bundle,
    operators,
    write_json,
)
from quartermap_deploy.errors import ParityError, RecipeError
from quartermap_deploy.exporting.export import PRECISIONS
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.targets import Target, load_target
from quartermap_deploy.targets.tensorrt.options import EngineOptions

if TYPE_CHECKING:
    import onnx

    from quartermap_deploy.architectures.base import VisualStateSpaceModel
    from quartermap_deploy.architectures.cards import ModelCard
    from quartermap_deploy.architectures.factory import Weights
    from quartermap_deploy.complexity import Complexity
    from quartermap_deploy.exporting.export import Export
    from quartermap_deploy.validation.localise import LocaliseReport
    from quartermap_deploy.validation.parity import ParityReport

ENGINES = frozenset({"tensorrt", "tensorrt-rtx"})
"""The targets that build an engine."""

CALIBRATION_IMAGES = 8
"""How many images the range scan of float16 looks at."""

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


def compile(
    recipe: Recipe | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> Bundle:
    """Compile a model into a verified bundle.

    Args:
        recipe: the recipe, the path of a recipe file (.toml), or the name of a model for a recipe of defaults.
        out: folder of the bundle; it must not exist, unless `force` is given and it is a bundle.
        force: replace a bundle.
        progress: told about the steps.

    Returns:
        The bundle, loaded from disk.

    Raises:
        QuartermapError: of the kind that fits what is wrong; then nothing was written. `ParityError` if a target
            departs from PyTorch by more than the tolerance.
    """
    recipe, out = as_recipe(recipe), Path(out)
    targets = load_targets(recipe)
    check_destination(out, force)
    with progress.step(f"loading {recipe.model}"):
        model, card, loaded = load_model(recipe)
        cases = validation_cases(recipe, card)
        weights = weights_entry(recipe, loaded)
        check_settings(recipe, model, card, cases)
    exported = export_model(recipe, model, card, progress)
    with new_bundle(out, force) as folder:
        (folder / MODEL).write_bytes(exported.model.SerializeToString())
        entries = {}
        for name, target in targets.items():
            with progress.step(f"building for {name}"):
                entries[name] = target.build(
                    folder / MODEL,
                    folder,
                    recipe.engine.with_cache_beside(out),
                    examples=[images.shape for images in cases.values()],
                    progress=progress,
                )
        parity = validate(recipe, model, cases, exported, folder, progress)
        for name in sorted(ENGINES.intersection(targets)):
            entries[name].update(
                prove(recipe, exported, name, targets[name], folder, entries[name], progress)
            )
        write_json(folder / REPORT, {**parity.to_dict(), **precision_entry(exported)})
        write_json(folder / MANIFEST, manifest(recipe, model, card, weights, exported, folder, entries))
        # Checked before it takes its place, which moves the folder and touches no file in it.
        bundle = load_bundle(folder)
    return dataclasses.replace(bundle, path=out)


def as_recipe(recipe: Recipe | str | os.PathLike[str]) -> Recipe:
    """Return a recipe from itself, from a file, or from the name of a model."""
    if isinstance(recipe, Recipe):
        return recipe
    if str(recipe).endswith(".toml"):
        return Recipe.load(Path(recipe))
    return Recipe(model=str(recipe))


def load_targets(recipe: Recipe) -> dict[str, Target]:
    """The recipe's targets by name, each checked to be able to do what the recipe wants.

    Raises:
        UnknownNameError: if there is no such target.
        RecipeError: if a target does not take the recipe's precision, or the type of its input and output.
        QuartermapError: of the target, if it lacks something on this machine.
    """
    targets = {name: load_target(name) for name in recipe.targets}
    for name, target in targets.items():
        check_target(recipe, name, target)
    if recipe.engine != EngineOptions() and ENGINES.isdisjoint(targets):
        raise RecipeError(
            "there are options of engines, but no target that has one; add one to the targets: "
            f"{' or '.join(sorted(ENGINES))}"
        )
    return targets


def check_target(recipe: Recipe, name: str, target: Target) -> None:
    """Check that a target can do what a recipe wants; `load_targets` says what is raised."""
    if recipe.precision in PRECISIONS and recipe.precision not in target.PRECISIONS:
        raise RecipeError(
            f"the target {name} does not take {recipe.precision}; expected {' or '.join(target.PRECISIONS)}, or "
            "another target"
        )
    target.check(recipe)
    if name in ENGINES and recipe.io == "same":
        raise RecipeError(f'the target {name} takes io = "float32" only; leave io out')


def check_settings(
    recipe: Recipe,
    model: VisualStateSpaceModel,
    card: ModelCard,
    cases: Mapping[str, NDArray[np.float32]],
) -> None:
    """Refuse, before the export, settings that would be refused after it.

    Raises:
        RecipeError: if a block that is to stay float32 does not exist.
        InputError: if the profiles of engines do not fit the model, or exclude an image that it is validated on.
    """
    blocks = sum(model.depths)
    if absent := [block for block in recipe.blocks_float32 if block > blocks]:
        raise RecipeError(f"blocks_float32 names block {absent[0]}, but {recipe.model} has {blocks} blocks")
    if ENGINES.isdisjoint(recipe.targets):
        return
    from quartermap_deploy.frontend.exporter import INPUT
    from quartermap_deploy.targets.tensorrt.builder import check_examples

    shape = input_shape(recipe, model, card)
    check_examples(recipe.engine, {INPUT: shape}, [images.shape for images in cases.values()])


def input_shape(recipe: Recipe, model: VisualStateSpaceModel, card: ModelCard) -> tuple[int | str, ...]:
    """The shape of the exported model's input; an open size is a string."""
    sides = ("height", "width") if recipe.dynamic_size else input_size(recipe, card)
    return ("batch" if recipe.dynamic_batch else 1, model.in_channels, *sides)


def precision_entry(exported: Export) -> dict[str, Any]:
    """What the report says about 16-bit types: what stayed float32, and the ranges that decided it."""
    cast = exported.cast
    if cast is None:
        return {}
    return {
        "precision": {
            "type": cast.precision,
            "operators": cast.operators,
            "casts": cast.casts,
            "kept_float32": cast.kept,
            "subnormal_weights": cast.subnormal,
            "ranges": None if exported.ranges is None else exported.ranges.to_dict(),
        }
    }


def load_model(recipe: Recipe) -> tuple[VisualStateSpaceModel, ModelCard, Weights]:
    """Build the recipe's model, unpruned, and return it with its card and where its weights come from.

    New weights come from the recipe's seed, without touching torch's global generator.
    """
    from quartermap_deploy.architectures import load_card
    from quartermap_deploy.architectures.factory import create_with_weights

    card = load_card(recipe.model)
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model, weights = create_with_weights(
            recipe.model, num_classes=recipe.num_classes, checkpoint=recipe.checkpoint
        )
    model.check_input_shape((1, model.in_channels, *input_size(recipe, card)))
    if recipe.quartermap is not None:
        recipe.quartermap.select(model.depths)
    return model, card, weights


def input_size(recipe: Recipe, card: ModelCard) -> tuple[int, int]:
    """(height, width) of the recipe's input."""
    return recipe.input_size or card.preprocessing.crop


def export_model(
    recipe: Recipe,
    model: VisualStateSpaceModel,
    card: ModelCard,
    progress: Progress,
    traced: onnx.ModelProto | None = None,
) -> Export:
    """Export the model and run the passes; in float16, images tell which values come near its limit.

    `traced` is that of an earlier export of the same model, or None.
    """
    from quartermap_deploy.exporting.export import export
    from quartermap_deploy.validation.inputs import real_images

    calibration = (
        real_images(card, input_size(recipe, card), recipe.images, count=CALIBRATION_IMAGES)
        if recipe.precision == "float16"
        else None
    )

    with progress.step("exporting to ONNX"):
        return export(
            model,
            (1, model.in_channels, *input_size(recipe, card)),
            recipe.quartermap,
            precision=recipe.precision,
            io=recipe.io,
            keep_float32=recipe.keep_float32,
            blocks_float32=recipe.blocks_float32,
            calibration=calibration,
            dynamic_batch=recipe.dynamic_batch,
            dynamic_size=recipe.dynamic_size,
            optimize=recipe.optimize,
            traced=traced,
        )


def reference_model(recipe: Recipe, model: VisualStateSpaceModel) -> VisualStateSpaceModel:
    """The model as PyTorch prunes it: what the graph is compared with."""
    from quartermap_deploy.pruning.reference import prune

    return model if recipe.quartermap is None else prune(model, recipe.quartermap)


def validation_cases(recipe: Recipe, card: ModelCard) -> dict[str, NDArray[np.float32]]:
    """The inputs that parity is checked on, by name."""
    from quartermap_deploy.validation.inputs import parity_cases, real_images

    cases = parity_cases(real_images(card, input_size(recipe, card), recipe.images))
    return cases if recipe.dynamic_batch else {name: images[:1] for name, images in cases.items()}


def parity_of(
    recipe: Recipe,
    model: VisualStateSpaceModel,
    cases: Mapping[str, NDArray[np.float32]],
    onnx_bytes: bytes,
    progress: Progress = SILENT,
) -> ParityReport:
    """Compare the portable model, in ONNX Runtime, with PyTorch at every block and on every case."""
    import onnx

    from quartermap_deploy.frontend.exporter import INPUT
    from quartermap_deploy.validation.parity import check_parity
    from quartermap_deploy.validation.rounding import rounded_in_float32
    from quartermap_deploy.validation.runners import TorchRunner, onnxruntime_runner
    from quartermap_deploy.validation.tolerances import tolerance_for

    reference = TorchRunner(reference_model(recipe, model))
    # In 16 bits every value is rounded as the types say, which ONNX Runtime's own casts would leave out.
    target = onnxruntime_runner(rounded_in_float32(onnx.load_from_string(onnx_bytes)))
    with progress.step("comparing every block with PyTorch"):
        return check_parity(reference, target, cases, INPUT, tolerance_for(recipe.precision))


def validate(
    recipe: Recipe,
    model: VisualStateSpaceModel,
    cases: Mapping[str, NDArray[np.float32]],
    exported: Export,
    folder: Path,
    progress: Progress,
) -> ParityReport:
    """Check parity and write the golden files.

    Raises:
        ParityError: if the model departs from PyTorch by more than the tolerance.
    """
    from quartermap_deploy.validation.golden import write_golden

    report = parity_of(recipe, model, cases, (folder / MODEL).read_bytes(), progress)
    if not report.passed:
        advice = "please report this with the recipe"
        if recipe.precision != "float32":
            found = localise_precision(recipe, model, cases, exported, progress)
            advice = f"{found.describe()}. {found.advice()}"
        raise ParityError(f"{report.describe_failure()}. Nothing was written; {advice}.")
    with progress.step("writing golden outputs"):
        write_golden(folder, reference_model(recipe, model), cases)
    return report


def localise_precision(
    recipe: Recipe,
    model: VisualStateSpaceModel,
    cases: Mapping[str, NDArray[np.float32]],
    exported: Export,
    progress: Progress,
) -> LocaliseReport:
    """Find the blocks whose return to float32 brings a 16-bit model back within its tolerance."""
    from quartermap_deploy.validation.localise import localise
    from quartermap_deploy.validation.runners import TorchRunner
    from quartermap_deploy.validation.tolerances import tolerance_for

    ranges = exported.ranges.keep_float32 if exported.ranges is not None else ()
    return localise(
        exported.float32,
        recipe.precision,
        TorchRunner(reference_model(recipe, model)),
        cases,
        tolerance_for(recipe.precision),
        keep_float32=(*recipe.keep_float32, *ranges),
        blocks_float32=recipe.blocks_float32,
        progress=progress,
    )


def prove(
    recipe: Recipe,
    exported: Export,
    name: str,
    target: Target,
    folder: Path,
    entry: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Run an engine that was just built, where that is possible; returns what the manifest says about it.

    Raises:
        ParityError: if it departs by more than the tolerance; in 16 bits with the block that has to stay in float32.
    """
    from quartermap_deploy.validation.engines import prove_engine

    def advice() -> str:
        if recipe.precision == "float32":
            return "please report this with the recipe."
        found = localise_engine(recipe, exported, name, folder, progress)
        return f"{found.describe()}. {found.advice()}."

    plugin = recipe.engine.plugin
    return prove_engine(
        name, target, folder, entry, recipe.precision, advice=advice, plugin=plugin, progress=progress
    )


def localise_engine(
    recipe: Recipe, exported: Export, name: str, bundle: Path, progress: Progress
) -> LocaliseReport:
    """Find the blocks whose return to float32 brings a target's engine back within the tolerance.

    For every try an engine is built and run on the golden inputs of a bundle, which takes a GPU, and time.
    """
    import tempfile

    from quartermap_deploy.validation.engines import engine_runner
    from quartermap_deploy.validation.golden import golden_runner, read_golden
    from quartermap_deploy.validation.localise import localise
    from quartermap_deploy.validation.tolerances import tolerance_for

    cases, outputs = read_golden(bundle)
    ranges = exported.ranges.keep_float32 if exported.ranges is not None else ()
    with tempfile.TemporaryDirectory(prefix="quartermap-localise-") as temporary:
        folder = Path(temporary) / "engine"
        folder.mkdir()
        return localise(
            exported.float32,
            recipe.precision,
            golden_runner(outputs),
            cases,
            tolerance_for(recipe.precision),
            keep_float32=(*recipe.keep_float32, *ranges),
            blocks_float32=recipe.blocks_float32,
            # Each engine has caches of its own, which nobody asks for again.
            runner=engine_runner(
                name,
                load_target(name),
                folder,
                dataclasses.replace(recipe.engine, cache=Path(temporary) / "cache"),
            ),
            progress=progress,
        )


def weights_entry(recipe: Recipe, weights: Weights) -> dict[str, str | None]:
    """What the manifest says about the weights: enough to know the checkpoint's file again."""
    return {
        "weights": weights.source,
        "weights_sha256": None if recipe.checkpoint is None else describe_file(recipe.checkpoint)["sha256"],
        "head": "new" if weights.new_head else "loaded",
    }


def manifest(
    recipe: Recipe,
    model: VisualStateSpaceModel,
    card: ModelCard,
    weights: dict[str, str | None],
    exported: Export,
    folder: Path,
    targets: dict[str, Any],
) -> dict[str, Any]:
    """What the bundle says about itself."""
    from quartermap_deploy.complexity import measure
    from quartermap_deploy.frontend.exporter import INPUT, OUTPUT

    size = input_size(recipe, card)
    before, after = measure(model, size), measure(reference_model(recipe, model), size)
    shape = input_shape(recipe, model, card)
    io_type = recipe.precision if recipe.io == "same" else "float32"
    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "recipe": recipe.to_dict(),
        "model": {
            "name": card.name,
            "title": card.title,
            "parameters": before.parameters,
            "num_classes": model.num_classes,
            **weights,
        },
        "input": {"name": INPUT, "shape": list(shape), "type": io_type},
        "output": {"name": OUTPUT, "shape": [shape[0], model.num_classes], "type": io_type},
        "plan": None if recipe.quartermap is None else recipe.quartermap.to_dict(),
        "blocks": block_map(before, after),
        "totals": {
            "tokens": after.tokens,
            "tokens_unpruned": before.tokens,
            "flops": after.flops,
            "flops_unpruned": before.flops,
        },
        "graph": {**operators(exported.model), "before": operators(exported.traced)},
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
        "targets": targets,
    }


def block_map(before: Complexity, after: Complexity) -> list[dict[str, Any]]:
    """One entry per block: which are pruned, sizes, tokens and FLOPs before and after."""
    return [
        {
            "index": new.index,
            "stage": new.stage,
            "path": new.path,
            "pruned": new.pruned,
            "map_size": list(new.map_size),
            "scanned_size": list(new.scanned_size),
            "tokens": new.tokens,
            "tokens_unpruned": old.tokens,
            "flops": new.flops,
            "flops_unpruned": old.flops,
        }
        for old, new in zip(before.blocks, after.blocks, strict=True)
    ]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that made the bundle."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
