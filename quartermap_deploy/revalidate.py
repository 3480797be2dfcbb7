"""A finished bundle, proved anew: against its golden files, or against PyTorch; and where 16 bits are too few in it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.errors import BundleError, CheckpointError
from quartermap_deploy.plain_text import command
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.targets import DEFAULT, refuse_providers
from quartermap_deploy.targets.execution import ON_CPU, Execution, Where
from quartermap_deploy.targets.scan_form import ScanForm
from quartermap_deploy.targets.tensorrt.options import EngineOptions
from quartermap_deploy.validation.execution import execution_entry, label_of
from quartermap_deploy.validation.forms import FORMS, native_entry, native_form, require_native

if TYPE_CHECKING:
    from collections.abc import Callable

    from quartermap_deploy.bundle import Bundle
    from quartermap_deploy.recipe import Recipe
    from quartermap_deploy.sources.description import Feeds
    from quartermap_deploy.sources.source_model import SourceModel
    from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession
    from quartermap_deploy.validation.localise import LocaliseReport
    from quartermap_deploy.validation.parity import ParityReport

REFERENCES = ("golden", "torch")
NATIVE_OF = {"both": None, "native": True, "portable": False}
"""What a session of other providers is told for each of `FORMS`."""


def validate_bundle(
    bundle: Bundle,
    target: str | None = None,
    *,
    reference: str = "golden",
    checkpoint: str | os.PathLike[str] | None = None,
    factory: str | None = None,
    plugin: Path | None = None,
    scans: str = "both",
    execution: Where = ON_CPU,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Check a bundle on this machine.

    Args:
        bundle: the bundle; its files were checked against its manifest when it was loaded.
        target: the target to check; None for the default.
        reference: "golden" compares with the outputs kept in the bundle and needs no torch; "torch" builds the
            PyTorch model from the bundle's recipe again and compares every block. Both run the images that are kept in
            the bundle: those that it was compiled with.
        checkpoint: for "torch", the file that the bundle was compiled from; None if it was compiled from none.
        factory: for a bundle of a module of the user's, what makes the module, as `package.module:name`. A bundle's own
            word is not enough: nothing that a file names is ever run.
        plugin: the plugin library, for an engine that needs it; None looks for it.
        scans: of the target `onnxruntime`, what is to compute them: "portable", the body in the file; "native", the
            native operator; or "both", one after the other, as far as they can run here. By other providers than the
            CPU's, "both" is the form that they run by themselves.
        execution: of the target `onnxruntime`, the providers that run it; a device, a provider, or a list of providers
            does as well.
        progress: told about the steps.

    Returns:
        The report in the form of the bundle's report.json: of the portable body, with that of the native operator under
        "native"; of the latter alone, if it alone was asked for. It passed if everything in it did.

    Raises:
        BundleError: if the reference is not available for this bundle, or the checkpoint does not belong to it.
        CheckpointError: if there is no checkpoint, or it is another file than that of the bundle.
        UnknownNameError: if the bundle was not built for the target.
        InputError: if another target is to run by providers of ONNX Runtime.
        MissingDependencyError: if a provider is not in the package of ONNX Runtime that is installed.
    """
    execution = Execution.read(execution)
    if reference not in REFERENCES:
        raise BundleError(f"unknown reference {reference!r}; expected one of {', '.join(REFERENCES)}")
    if scans not in FORMS:
        raise BundleError(f"unknown form of scans {scans!r}; expected one of {', '.join(FORMS)}")
    name = bundle.target(target)
    if name != DEFAULT and scans != "both":
        raise BundleError(f"an engine of {name} has one form of scans alone; leave {scans!r} out")
    refuse_providers(name, execution)
    path = None if checkpoint is None else Path(checkpoint)
    if reference == "torch":
        return _against_torch(bundle, target, path, factory, scans, execution, progress)
    if path is not None or factory is not None:
        raise BundleError(
            f"the golden outputs need no {'checkpoint' if factory is None else 'factory'}; leave it out, or take the "
            "reference torch"
        )
    return _against_golden(bundle, target, plugin, scans, progress, execution)


def localise_bundle(
    bundle: Bundle,
    target: str | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    factory: str | None = None,
    plugin: Path | None = None,
    progress: Progress = SILENT,
) -> LocaliseReport:
    """Find the blocks whose return to float32 brings a 16-bit bundle back within its tolerance.

    The PyTorch model is built and exported again, and its graph is typed anew with single blocks in float32. What the
    bundle keeps in float32 stays so.

    Args:
        bundle: a bundle in float16 or bfloat16.
        target: where to look. None, or "onnxruntime", takes the portable model with every 16-bit value rounded. For a
            target with engines one is built for every try and run on the golden inputs, which needs a GPU, and its
            logits are compared; the bundle need not have an engine for it.
        checkpoint: the file that the bundle was compiled from; None if it was compiled from none.
        factory: for a bundle of a module of the user's, what makes the module, as `package.module:name`. A bundle's own
            word is not enough: nothing that a file names is ever run.
        plugin: the plugin library, for a target that needs it; None looks for it.
        progress: told about the steps.

    Raises:
        BundleError: if the bundle is in float32, the checkpoint does not belong to it, or a GPU is needed and there is
            none.
        CheckpointError: if there is no checkpoint, or it is another file than that of the bundle.
        UnknownNameError: if there is no such target.
        QuartermapError: of the target, if it lacks something on this machine.
    """
    from quartermap_deploy.compiling.export import export_model
    from quartermap_deploy.compiling.localising import localise_engine, localise_precision
    from quartermap_deploy.compiling.parity import parity_of

    path = None if checkpoint is None else Path(checkpoint)
    recipe = dataclasses.replace(_recipe_with(bundle, path, factory), images=None)
    if recipe.precision == "float32":
        raise BundleError(f"the bundle {bundle.path} is in float32 everywhere; there is nothing to localise")
    engine = None if target in (None, DEFAULT) else target
    if engine is not None:
        recipe = _for_engine(bundle, recipe, engine, plugin)
    source = _built(recipe, progress)
    cases = _recorded_cases(bundle, source)
    # What the range scan found when the bundle was compiled, on images that may not be here.
    ranges = bundle.report.get("precision", {}).get("ranges") or {}
    kept = (*recipe.keep_float32, *ranges.get("kept_float32", {}))
    recipe = dataclasses.replace(recipe, keep_float32=kept)
    exported = export_model(recipe, source, progress)
    if engine is not None:
        report = localise_engine(recipe, exported, engine, bundle.path, bundle.manifest["golden"], progress)
        if report.passed and engine in bundle.manifest["targets"]:
            _require_own_engine(bundle, engine, plugin, progress)
        return report
    report = localise_precision(recipe, source, cases, exported, progress)
    if report.passed:
        graph = bundle.model_path.read_bytes()
        own = parity_of(recipe, source, cases, graph, exported.traced, progress)
        if not own.passed:
            raise BundleError(
                f"{own.describe_failure()}, though a model exported anew is right: the fault of {bundle.path} is none "
                "of precision; compile it again"
            )
    return report


def _for_engine(bundle: Bundle, recipe: Recipe, target: str, plugin: Path | None) -> Recipe:
    """The recipe for engines of a target that are built for the GPU at hand alone.

    Raises:
        BundleError: if there is no GPU.
        QuartermapError: of the target, if engines cannot be built here.
    """
    from quartermap_deploy import gpu as devices
    from quartermap_deploy.targets import load_target

    module, gpu = load_target(target), devices.find_gpu()
    if gpu is None:
        raise BundleError(
            f"localising in {target} builds engines and runs them, and there is no NVIDIA GPU (no NVIDIA driver "
            "answers); do it on the machine that is to run them, or leave --target out for the portable model"
        )
    entry = bundle.manifest["targets"].get(target, {})
    options = EngineOptions.from_dict(entry.get("options", recipe.engine.to_dict()))
    options = dataclasses.replace(options, plugin=plugin, compute_capabilities=(gpu.compute_capability,))
    recipe = dataclasses.replace(recipe, targets=(target,), engine=options)
    module.check(recipe)
    return recipe


def _require_own_engine(bundle: Bundle, target: str, plugin: Path | None, progress: Progress) -> None:
    """Check that the bundle's own engine is as right as one that was built anew.

    Raises:
        BundleError: if it departs.
    """
    own = _against_golden(bundle, target, plugin, "both", progress)
    if not own["passed"]:
        raise BundleError(
            f"the {target} engine of {bundle.path} departs, though one that is built anew is right: the fault is none "
            f"of precision; make it again with `{command('quartermap', 'rebuild', bundle.path, '--target', target)}`"
        )


def rebuild_torch(
    bundle: Bundle,
    checkpoint: Path | None = None,
    factory: str | None = None,
    progress: Progress = SILENT,
) -> SourceModel:
    """Build the PyTorch model that a bundle was compiled from, unpruned.

    Args:
        bundle: the bundle.
        checkpoint: the file that it was compiled from; None if it was compiled from none.
        factory: for a bundle of a module of the user's, what makes the module, as `package.module:name`. A bundle's own
            word is not enough: nothing that a file names is ever run.
        progress: told about the step.

    Raises:
        BundleError: if the bundle was compiled from a checkpoint and there is none here, or the other way round, or if
            it is of a module of the user's and there is no factory.
        CheckpointError: if the checkpoint is another file than that of the bundle.
    """
    return _built(_recipe_with(bundle, checkpoint, factory), progress)


def _built(recipe: Recipe, progress: Progress) -> SourceModel:
    from quartermap_deploy.compiling.source import load_source

    with progress.step("building the PyTorch model"):
        return load_source(recipe)


def _recipe_with(bundle: Bundle, checkpoint: Path | None, factory: str | None) -> Recipe:
    """The recipe of a bundle, with the checkpoint and the factory that are here, after a check that they fit."""
    _check_checkpoint(bundle, checkpoint)
    recipe = dataclasses.replace(bundle.recipe(), checkpoint=checkpoint)
    if bundle.manifest["model"].get("source") != "module":
        if factory is not None:
            raise BundleError(f"the bundle {bundle.path} is of the model {recipe.model}; leave {factory} out")
        return dataclasses.replace(recipe, module=None)
    own = recipe.module
    if factory is None:
        named = f" ({own.factory}, as the bundle says)" if own is not None else ""
        raise BundleError(
            f"the bundle {bundle.path} is of a module of yours, and what makes it{named} is run only if you name it: "
            "--factory package.module:name (in Python: factory=)"
        )
    from quartermap_deploy.sources.factories import EXAMPLE_TYPES, UserModule

    example = _golden(bundle)[0]["example"]
    shapes = {name: array.shape for name, array in example.items()}
    types = {name: str(array.dtype) for name, array in example.items() if str(array.dtype) in EXAMPLE_TYPES}
    arguments = {} if own is None else own.arguments
    strict = own is None or own.strict_weights
    stages = None if own is None else own.stages
    module = UserModule(factory, shapes, arguments, strict, stages, types=types)
    return dataclasses.replace(recipe, module=module)


def _golden(bundle: Bundle) -> Any:
    from quartermap_deploy.validation.golden import read_golden

    return read_golden(bundle.path, bundle.manifest["golden"])


def _recorded_cases(bundle: Bundle, source: SourceModel) -> dict[str, Feeds]:
    """The cases that a bundle was validated on, from the inputs that are kept in it."""
    inputs, _ = _golden(bundle)
    if source.kind == "module":
        return dict(inputs)
    images = inputs["images"][source.inputs[0].name]
    return source.cases(lambda preprocessing: images)


def _against_golden(
    bundle: Bundle,
    target: str | None,
    plugin: Path | None,
    scans: str,
    progress: Progress,
    execution: Execution = ON_CPU,
) -> dict[str, Any]:
    from quartermap_deploy.validation.engines import golden_parity
    from quartermap_deploy.validation.runners import NATIVE

    name, precision = bundle.target(target), bundle.manifest["recipe"]["precision"]

    def compared(label: str, native: bool | None) -> ParityReport:
        with progress.step(f"loading the model for {label}"):
            session = bundle.session(name, plugin=plugin, native=native)
        with progress.step("comparing with the golden outputs"):
            return golden_parity(bundle.path, bundle.manifest["golden"], session, label, precision)

    if name != DEFAULT:
        return compared(name, None).to_dict()
    if not execution.on_cpu:
        with progress.step(f"loading the model for {execution}"):
            session = _provider_session(bundle, scans, execution)
        with progress.step("comparing with the golden outputs"):
            report = golden_parity(
                bundle.path, bundle.manifest["golden"], session, label_of(session), precision
            )
        return {**report.to_dict(), "execution": execution_entry(session, execution, None)}
    return _both_forms(bundle, scans, lambda native: compared(NATIVE if native else name, native))


def _provider_session(bundle: Bundle, scans: str, execution: Execution) -> OnnxRuntimeSession:
    """A session by other providers than the CPU's alone."""
    from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession

    session = bundle.session(DEFAULT, native=NATIVE_OF[scans], execution=execution)
    assert isinstance(session, OnnxRuntimeSession)
    return session


def _both_forms(bundle: Bundle, scans: str, compared: Callable[[bool], ParityReport]) -> dict[str, Any]:
    """Judge the forms of the scans that are asked for; `compared` does so for the native operator, or for the body."""
    form = ScanForm("none") if scans == "portable" else native_form(bundle.model_path)
    if scans == "native":
        require_native(form, bundle.model_path)
        return compared(True).to_dict()
    report = compared(False)
    native = compared(True) if form.kind == "native" else None
    passed = report.passed and (native is None or native.passed)
    return {**report.to_dict(), "native": native_entry(form, native), "passed": passed}


def _against_torch(
    bundle: Bundle,
    target: str | None,
    checkpoint: Path | None,
    factory: str | None,
    scans: str,
    execution: Execution,
    progress: Progress,
) -> dict[str, Any]:
    from quartermap_deploy.compiling.parity import parity_of

    recipe = _recipe_with(bundle, checkpoint, factory)
    if target not in (None, DEFAULT):
        raise BundleError(f"blocks can be compared in ONNX Runtime only, not in {target}")
    if DEFAULT in bundle.manifest["targets"]:
        bundle.session(DEFAULT)  # refuses a damaged model before the work begins
    _golden(bundle)
    source = _built(recipe, progress)
    traced = None
    if source.kind == "module":
        # The graph alone tells in which order the scans of a module visit their maps.
        with progress.step("exporting to ONNX"):
            traced = source.trace()
    cases = _recorded_cases(bundle, source)
    graph = bundle.model_path.read_bytes()
    if not execution.on_cpu:
        session = _provider_session(bundle, scans, execution)
        report = parity_of(
            recipe, source, cases, graph, traced, progress, native=NATIVE_OF[scans], execution=execution
        )
        return {**report.to_dict(), "execution": execution_entry(session, execution, None)}
    return _both_forms(
        bundle,
        scans,
        lambda native: parity_of(recipe, source, cases, graph, traced, progress, native=native),
    )


def _check_checkpoint(bundle: Bundle, checkpoint: Path | None) -> None:
    """Check that the checkpoint is the file that the bundle was compiled from, or that neither is there."""
    from quartermap_deploy.bundle import describe_file
    from quartermap_deploy.weights import require_file

    compiled_from = bundle.recipe().path("checkpoint")
    if compiled_from is None:
        if checkpoint is not None:
            raise BundleError(
                f"the bundle {bundle.path} was not compiled from a checkpoint; leave {checkpoint} out"
            )
        return
    if checkpoint is None:
        raise BundleError(
            f"the bundle was compiled from the checkpoint {compiled_from.name}, which is not in it; give the file with "
            "--checkpoint (in Python: checkpoint=), or validate against the golden outputs"
        )
    require_file(checkpoint)
    # A bundle without the hash has another one than any file.
    expected = bundle.manifest["model"].get("weights_sha256")
    found = describe_file(checkpoint)["sha256"]
    if found != expected:
        raise CheckpointError(
            f"{checkpoint} is not the file that the bundle was compiled from, {compiled_from.name} (sha256 "
            f"{found[:12]}…, expected {str(expected)[:12]}…); give that file"
        )
