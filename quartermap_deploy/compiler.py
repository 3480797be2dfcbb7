"""The compiler, top to bottom: a recipe or a module goes in, a verified bundle comes out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.bundle import (
    MANIFEST,
    MODEL,
    REPORT,
    Bundle,
    load_bundle,
    new_bundle,
    write_json,
)
from quartermap_deploy.compiling.cases import validation_cases
from quartermap_deploy.compiling.engines import prove
from quartermap_deploy.compiling.export import export_model, precision_entry
from quartermap_deploy.compiling.parity import check_given, validate
from quartermap_deploy.compiling.settings import check_settings
from quartermap_deploy.compiling.source import load_reference, load_source
from quartermap_deploy.compiling.targets import ENGINES, load_targets
from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.manifest import make_manifest
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.pruning.plan import QuarterMap
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.targets import DEFAULT, Target
from quartermap_deploy.targets.execution import ON_CPU, Execution
from quartermap_deploy.targets.tensorrt.options import EngineOptions
from quartermap_deploy.validation.execution import prove_execution
from quartermap_deploy.validation.forms import prove_native

if TYPE_CHECKING:
    from torch import nn

    from quartermap_deploy.sources.source_model import SourceModel
    from quartermap_deploy.validation.given import GivenReference


def compile(
    recipe: Recipe | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    plugin: str | os.PathLike[str] | None = None,
    run_module: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> Bundle:
    """Compile a model into a verified bundle.

    Args:
        recipe: the recipe, the path of a recipe file (.toml), or the name of a model for a recipe of defaults.
        out: folder of the bundle; it must not exist, unless `force` is given and it is a bundle.
        plugin: the plugin library of engines, which a recipe file may not name; None leaves it to the
            recipe's `engine`, or looks for it.
        run_module: agree to run the module that a recipe file names in [module].
        force: replace a bundle.
        progress: told about the steps.

    Returns:
        The bundle, loaded from disk.

    Raises:
        QuartermapError: of the kind that fits what is wrong; then nothing was written. `ParityError` if a target
            departs from PyTorch by more than the tolerance.
    """
    recipe, out = as_recipe(recipe, run_module=run_module), Path(out)
    if plugin is not None:
        recipe = dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, plugin=Path(plugin)))
    targets = load_targets(recipe)
    # From the start, so that of two into one folder the second is told before it has worked.
    with new_bundle(out, force) as folder:
        with progress.step(f"loading {recipe.model}"):
            source = load_source(recipe)
            given = load_reference(recipe, source)
        bundle = _compile(recipe, source, targets, folder, given, progress)
    return dataclasses.replace(bundle, path=out)


def compile_module(
    model: nn.Module,
    example_inputs: Any,
    out: str | os.PathLike[str],
    *,
    quartermap: QuarterMap | None = None,
    task: str | None = None,
    preprocessing: Preprocessing | None = None,
    labels: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    precision: str = "float32",
    targets: Sequence[str] = ("onnxruntime",),
    execution: Execution = ON_CPU,
    reference: tuple[Any, Any] | str | os.PathLike[str] | None = None,
    scans: Mapping[str, Callable[..., Any]] | None = None,
    name: str | None = None,
    stages: Sequence[int] | None = None,
    images: str | os.PathLike[str] | None = None,
    engine: EngineOptions | None = None,
    optimize: bool = True,
    inline: bool = False,
    opset: int | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Bundle:
    """Compile any PyTorch module with selective scans in it, as it is, into a verified bundle.

    The module may be public code that needs mamba-ssm or CUDA; see `public_code` for how it is imported without.

    Args:
        model: the module, which is not changed; it is taken in eval mode, in float32, on the CPU.
        example_inputs: a tensor, a tuple of them, or a dictionary by the names of the keyword arguments of its forward.
        out: folder of the bundle; it must not exist, unless `force` is given and it is a bundle.
        quartermap: the plan, or None to prune nothing. Blocks are the modules that call scans, in the order of a run.
        task: "classification", "segmentation", "features", "image" or "other"; None tells it from the outputs.
        preprocessing: how an image becomes the input; without it the bundle takes arrays alone.
        labels: names of the classes.
        dynamic_batch: leave the batch open.
        dynamic_size: leave height and width of inputs of four axes open.
        precision: element type of weights and activations: "float32", "float16" or "bfloat16".
        targets: what to build and validate.
        execution: the providers by which `onnxruntime` runs the bundle, too, to prove it; the CPU's always do.
        reference: (inputs, outputs) that were saved where the module runs in its own environment, as on a GPU with
            mamba-ssm: each a tensor, a sequence or a dictionary, or the path of an .npz file with all by their names.
            The unpruned graph is compared with them, so that our reading of the scan is proved too.
        scans: for scans that we do not know, `{"package.module:function": adapter}`; see `public_code`.
        name: what the model is called; None takes the name of its class.
        stages: how many blocks each stage has; None tells stages apart by the length of their sequences.
        images: folder of images to validate with; None takes those that come with scikit-learn.
        engine: how engines are built, for the targets that have some.
        optimize: run the passes that make pruned blocks cheaper without changing a number.
        inline: write the scans out in standard operators, without functions; no native operator takes their place then.
        opset: of the standard operators, 17 to 23; None takes 20, or 22 in bfloat16.
        force: replace a bundle.
        progress: told about the steps.

    Returns:
        The bundle, loaded from disk.

    Raises:
        InputError: if the inputs, the task, the labels or the preprocessing do not fit the module.
        ExportError: if the module cannot be exported.
        PlanError: if the plan does not fit its blocks.
        PassError: if a block that the plan names cannot be pruned; the message says why.
        ParityError: if the graph departs from PyTorch, or from the given reference; then nothing was written.
    """
    from quartermap_deploy.sources.modules import module_source, unwrapped
    from quartermap_deploy.validation.given import as_reference

    out, model = Path(out), unwrapped(model)
    recipe = Recipe(
        model=name or type(model).__name__,
        quartermap=quartermap,
        precision=precision,
        targets=tuple(targets),
        execution=execution,
        dynamic_batch=dynamic_batch,
        dynamic_size=dynamic_size,
        images=None if images is None else Path(images),
        engine=engine or EngineOptions(),
        optimize=optimize,
        inline=inline,
        opset=opset,
    )
    built = load_targets(recipe)
    with new_bundle(out, force) as folder:
        with progress.step(f"running {recipe.model} on its example inputs"):
            source = module_source(
                model,
                example_inputs,
                name=recipe.model,
                task=task,
                preprocessing=preprocessing,
                labels=() if labels is None else labels,
                dynamic_batch=dynamic_batch,
                dynamic_size=dynamic_size,
                stages=stages,
                scans=scans,
            )
            given = None if reference is None else as_reference(source, reference)
        bundle = _compile(recipe, source, built, folder, given, progress)
    return dataclasses.replace(bundle, path=out)


def _compile(
    recipe: Recipe,
    source: SourceModel,
    targets: Mapping[str, Target],
    folder: Path,
    given: GivenReference | None,
    progress: Progress,
) -> Bundle:
    """Source → export → recover → passes → lower per target → build → validate → bundle, in its draft folder."""
    from quartermap_deploy.validation.golden import golden_cases

    cases = validation_cases(recipe, source)
    golden = list(golden_cases(cases))
    check_settings(recipe, source, cases)
    exported = export_model(recipe, source, progress)
    (folder / MODEL).write_bytes(exported.model.SerializeToString())
    entries = {}
    for name, target in targets.items():
        with progress.step(f"building for {name}"):
            entries[name] = target.build(
                folder / MODEL,
                folder,
                recipe.engine,
                examples=[{key: array.shape for key, array in feeds.items()} for feeds in cases.values()],
                progress=progress,
            )
    parity = validate(recipe, source, cases, exported, folder, progress)
    given_entry = check_given(given, exported, progress)
    native = prove_native(folder, MODEL, golden, recipe.precision, progress) if DEFAULT in targets else None
    execution = prove_execution(folder, MODEL, golden, recipe.precision, recipe.execution, progress)
    if execution is not None:
        kept = ("providers", "nodes", "on_cpu", "scans")
        entries[DEFAULT] |= {name: execution[name] for name in kept}
    for name in sorted(ENGINES.intersection(targets)):
        entries[name].update(
            prove(recipe, exported, name, targets[name], folder, entries[name], golden, progress)
        )
    report = {
        **parity.to_dict(),
        "native": native,
        "execution": execution,
        "given_reference": given_entry,
        **precision_entry(exported),
    }
    write_json(folder / REPORT, report)
    write_json(folder / MANIFEST, make_manifest(recipe, source, exported, golden, folder, entries))
    # Checked before it takes its place, which moves the folder and touches no file in it.
    return load_bundle(folder)


def as_recipe(recipe: Recipe | str | os.PathLike[str], *, run_module: bool = False) -> Recipe:
    """Return a recipe from itself, from a file (`run_module` is `Recipe.load`'s), or from the name of a model."""
    if isinstance(recipe, Recipe):
        return recipe
    if str(recipe).endswith(".toml"):
        return Recipe.load(Path(recipe), run_module=run_module)
    return Recipe(model=str(recipe))
