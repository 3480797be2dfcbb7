"""The compiler, top to bottom: a recipe or a module goes in, a verified bundle comes out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.bundle import (
    MANIFEST,
    MODEL,
    REPORT,
    Bundle,
    load_bundle,
    new_bundle,
    write_json,
)
from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.errors import ParityError, RecipeError
from quartermap_deploy.manifest import make_manifest
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.pruning.plan import QuarterMap
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.targets import DEFAULT, Target, load_target
from quartermap_deploy.targets.execution import ON_CPU, Execution
from quartermap_deploy.targets.tensorrt.options import EngineOptions
from quartermap_deploy.validation.execution import prove_execution
from quartermap_deploy.validation.forms import prove_native

if TYPE_CHECKING:
    from torch import nn

    from quartermap_deploy.exporting.export import Export
    from quartermap_deploy.sources.description import Feeds
    from quartermap_deploy.sources.source_model import SourceModel, Traced
    from quartermap_deploy.validation.given import GivenReference
    from quartermap_deploy.validation.localise import LocaliseReport
    from quartermap_deploy.validation.parity import ParityReport

ENGINES = frozenset({"tensorrt", "tensorrt-rtx"})
"""The targets that build an engine."""

CALIBRATION_IMAGES = 8
"""How many images the range scan of float16 looks at."""

Cases = Mapping[str, "Feeds"]


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


def load_targets(recipe: Recipe) -> dict[str, Target]:
    """The recipe's targets by name, each checked to be able to do what the recipe wants.

    Raises:
        UnknownNameError: if there is no such target.
        RecipeError: if a target does not take the recipe's precision, or the type of its input and output.
        QuartermapError: of the target, if it lacks something on this machine.
    """
    targets = {name: load_target(name) for name in recipe.targets}
    if not recipe.execution.on_cpu and DEFAULT not in targets:
        raise RecipeError(
            f"there are providers of ONNX Runtime ({recipe.execution}), but {DEFAULT} is no target; add it to the "
            "targets"
        )
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
    if recipe.precision not in target.PRECISIONS:
        raise RecipeError(
            f"the target {name} does not take {recipe.precision}; expected {' or '.join(target.PRECISIONS)}, or "
            "another target"
        )
    target.check(recipe)
    if name in ENGINES and recipe.io == "same":
        raise RecipeError(f'the target {name} takes io = "float32" only; leave io out')
    if name in ENGINES and (recipe.inline or recipe.opset is not None):
        setting = "inline" if recipe.inline else "opset"
        raise RecipeError(
            f"the target {name} writes its own form of the scans, in an opset of its own; leave {setting} out, or "
            "compile a bundle for the engine and another one for other tools"
        )


def check_settings(recipe: Recipe, source: SourceModel, cases: Cases) -> None:
    """Refuse, before the export, settings that would be refused after it.

    Raises:
        PlanError: if the plan does not fit the model.
        RecipeError: if a block that is to stay float32 does not exist.
        InputError: if the profiles of engines do not fit the model, or exclude what it is validated on.
    """
    source.selected(recipe.quartermap)
    blocks = len(source.blocks)
    if absent := [block for block in recipe.blocks_float32 if block > blocks]:
        raise RecipeError(f"blocks_float32 names block {absent[0]}, but {recipe.model} has {blocks} blocks")
    if ENGINES.isdisjoint(recipe.targets):
        return
    from quartermap_deploy.targets.tensorrt.builder import check_examples

    check_examples(
        recipe.engine,
        {item.name: item.shape for item in source.inputs},
        [{name: array.shape for name, array in feeds.items()} for feeds in cases.values()],
    )


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


def load_source(recipe: Recipe) -> SourceModel:
    """The model of a recipe, unpruned: from its card, or made by the user's factory.

    Raises:
        UnknownNameError: if there is no such card.
        QuartermapError: of the kind that fits, if it cannot be made, or its weights or preprocessing do not fit.
    """
    if recipe.module is not None:
        from quartermap_deploy.sources.user_modules import user_module_source

        source: SourceModel = user_module_source(
            recipe.module,
            name=recipe.model,
            weights=recipe.path("checkpoint"),
            task=recipe.task,
            preprocessing=recipe.preprocessing,
            labels=recipe.labels,
            dynamic_batch=recipe.dynamic_batch,
            dynamic_size=recipe.dynamic_size,
            seed=recipe.seed,
        )
    else:
        from quartermap_deploy.sources.architectures import card_source

        source = card_source(
            recipe.model,
            num_classes=recipe.num_classes,
            in_chans=recipe.in_chans,
            features_only=recipe.features_only,
            checkpoint=recipe.path("checkpoint"),
            input_size=recipe.input_size,
            dynamic_batch=recipe.dynamic_batch,
            dynamic_size=recipe.dynamic_size,
            preprocessing=recipe.preprocessing,
            labels=recipe.labels,
            seed=recipe.seed,
        )
    source.selected(recipe.quartermap)
    return source


def load_reference(recipe: Recipe, source: SourceModel) -> GivenReference | None:
    """What the user saved of a module where it runs in its own environment, or None.

    Raises:
        InputError: if the file cannot be read, or does not fit the module.
    """
    if (path := recipe.path("reference")) is None:
        return None
    from quartermap_deploy.sources.modules import ModuleSource
    from quartermap_deploy.validation.given import read_reference

    assert isinstance(source, ModuleSource)
    return read_reference(source, path)


def export_model(
    recipe: Recipe, source: SourceModel, progress: Progress, traced: Traced | None = None
) -> Export:
    """Export the model and run the passes; in float16, images tell which values come near its limit.

    `traced` is that of an earlier export of the same model, or None.
    """
    from quartermap_deploy.exporting.export import export

    calibration: Mapping[str, NDArray[Any]] | None = None
    if recipe.precision == "float16":
        cases = validation_cases(recipe, source, CALIBRATION_IMAGES)
        calibration = cases.get("images") or cases["example"]
    if traced is None:
        with progress.step("exporting to ONNX"):
            traced = source.trace()
    with progress.step("running the passes"):
        return export(
            source,
            recipe.quartermap,
            precision=recipe.precision,
            io=recipe.io,
            keep_float32=recipe.keep_float32,
            blocks_float32=recipe.blocks_float32,
            calibration=calibration,
            optimize=recipe.optimize,
            inline=recipe.inline,
            opset=recipe.opset,
            traced=traced,
        )


def validation_cases(recipe: Recipe, source: SourceModel, count: int | None = None) -> dict[str, Feeds]:
    """The inputs that parity is checked on, by name; `count` images instead of the usual number."""
    from quartermap_deploy.validation.inputs import COUNT, real_images

    digits = source.name == "vmamba_digits"

    def pictures(preprocessing: Preprocessing) -> NDArray[np.float32]:
        return real_images(preprocessing, recipe.path("images"), count or COUNT, digits=digits)

    return source.cases(pictures)


def parity_of(
    recipe: Recipe,
    source: SourceModel,
    cases: Cases,
    onnx_bytes: bytes,
    traced: Traced | None = None,
    progress: Progress = SILENT,
    *,
    native: bool | None = False,
    execution: Execution = ON_CPU,
) -> ParityReport:
    """Compare the model, in ONNX Runtime, with PyTorch at every block and on every case.

    `native` says whether the native operator computes its scans, or else the portable body; None takes what the
    providers of `execution` run by themselves.
    """
    import onnx

    from quartermap_deploy.validation.parity import check_parity
    from quartermap_deploy.validation.rounding import rounded_in_float32
    from quartermap_deploy.validation.runners import TorchRunner, onnxruntime_runner
    from quartermap_deploy.validation.tolerances import tolerance_for

    # A module's outputs are compared from the input on; its own rounding, where it can be avoided, is nobody's fault.
    reference = TorchRunner(source.reference(recipe.quartermap, traced), double=source.kind == "module")
    # In 16 bits every value is rounded as the types say, which ONNX Runtime's own casts would leave out.
    rounded = rounded_in_float32(onnx.load_from_string(onnx_bytes))
    target = onnxruntime_runner(rounded, native=native, execution=execution)
    paths = {block.index: block.path for block in source.blocks}
    further = {} if traced is None else source.further_cases(traced)
    with progress.step("comparing every block with PyTorch"):
        return check_parity(reference, target, {**cases, **further}, tolerance_for(recipe.precision), paths)


def validate(
    recipe: Recipe,
    source: SourceModel,
    cases: Cases,
    exported: Export,
    folder: Path,
    progress: Progress,
) -> ParityReport:
    """Check parity and write the golden files.

    Raises:
        ParityError: if the model departs from PyTorch by more than the tolerance.
    """
    from quartermap_deploy.validation.golden import write_golden

    report = parity_of(recipe, source, cases, (folder / MODEL).read_bytes(), exported.traced, progress)
    if not report.passed:
        advice = "please report this with the recipe"
        if recipe.precision != "float32":
            found = localise_precision(recipe, source, cases, exported, progress)
            advice = f"{found.describe()}. {found.advice()}"
        raise ParityError(f"{report.describe_failure()}. Nothing was written; {advice}.")
    with progress.step("writing golden outputs"):
        write_golden(folder, source.reference(recipe.quartermap, exported.traced), cases)
    return report


def check_given(given: GivenReference | None, exported: Export, progress: Progress) -> dict[str, Any] | None:
    """Compare the unpruned graph with what the user saved; returns what the report says about it.

    Raises:
        ParityError: if it departs by more than the tolerance.
    """
    if given is None:
        return None
    from quartermap_deploy.passes import infer_shapes, lower

    with progress.step("comparing with the given reference"):
        unpruned = lower(infer_shapes(exported.traced.model))
        return given.check(unpruned.SerializeToString())


def localise_precision(
    recipe: Recipe,
    source: SourceModel,
    cases: Cases,
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
        TorchRunner(source.reference(recipe.quartermap, exported.traced)),
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
    golden: Sequence[str],
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
        found = localise_engine(recipe, exported, name, folder, golden, progress)
        return f"{found.describe()}. {found.advice()}."

    plugin = recipe.engine.plugin
    return prove_engine(
        name, target, folder, entry, recipe.precision, golden, advice=advice, plugin=plugin, progress=progress
    )


def localise_engine(
    recipe: Recipe, exported: Export, name: str, bundle: Path, golden: Sequence[str], progress: Progress
) -> LocaliseReport:
    """Find the blocks whose return to float32 brings a target's engine back within the tolerance.

    For every try an engine is built and run on the golden inputs of a bundle, which takes a GPU, and time.
    """
    import tempfile

    from quartermap_deploy.validation.engines import engine_runner
    from quartermap_deploy.validation.golden import golden_runner, read_golden
    from quartermap_deploy.validation.localise import localise
    from quartermap_deploy.validation.tolerances import tolerance_for

    cases, outputs = read_golden(bundle, golden)
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
