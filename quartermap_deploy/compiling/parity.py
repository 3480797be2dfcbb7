"""Parity of a graph with PyTorch, and with what its user saved elsewhere; the golden files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.bundle import MODEL
from quartermap_deploy.compiling.cases import Cases
from quartermap_deploy.compiling.localising import localise_precision
from quartermap_deploy.errors import ParityError
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.targets.execution import ON_CPU, Execution

if TYPE_CHECKING:
    from quartermap_deploy.exporting.export import Export
    from quartermap_deploy.sources.source_model import SourceModel, Traced
    from quartermap_deploy.validation.given import GivenReference
    from quartermap_deploy.validation.parity import ParityReport


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
