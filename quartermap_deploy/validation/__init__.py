"""Validation: parity with PyTorch, tolerances, golden files."""

from __future__ import annotations

import dataclasses
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.errors import BundleError, CheckpointError
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.targets import DEFAULT

if TYPE_CHECKING:
    from quartermap_deploy.architectures.base import VisualStateSpaceModel
    from quartermap_deploy.bundle import Bundle
    from quartermap_deploy.recipe import Recipe
    from quartermap_deploy.validation.localise import LocaliseReport

REFERENCES = ("golden", "torch")


def validate_bundle(
    bundle: Bundle,
    target: str | None = None,
    *,
    reference: str = "golden",
    checkpoint: str | os.PathLike[str] | None = None,
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
        progress: told about the steps.

    Returns:
        The report in the form of the bundle's report.json.

    Raises:
        BundleError: if the reference is not available for this bundle, or the checkpoint does not belong to it.
        CheckpointError: if there is no checkpoint, or it is another file than that of the bundle.
        UnknownNameError: if the bundle was not built for the target.
    """
    if reference not in REFERENCES:
        raise BundleError(f"unknown reference {reference!r}; expected one of {', '.join(REFERENCES)}")
    path = None if checkpoint is None else Path(checkpoint)
    if reference == "torch":
        return _against_torch(bundle, target, path, progress)
    if path is not None:
        raise BundleError("the golden outputs need no checkpoint; leave it out, or take the reference torch")
    return _against_golden(bundle, target, progress)


def localise_bundle(
    bundle: Bundle, *, checkpoint: str | os.PathLike[str] | None = None, progress: Progress = SILENT
) -> LocaliseReport:
    """Find the blocks whose return to float32 brings a 16-bit bundle back within its tolerance.

    The PyTorch model is built and exported again, and its graph is typed anew with single blocks in float32. What the
    bundle keeps in float32 stays so.

    Args:
        bundle: a bundle in float16 or bfloat16.
        checkpoint: the file that the bundle was compiled from; None if it was compiled from none.
        progress: told about the steps.

    Raises:
        BundleError: if the bundle is in float32, or the checkpoint does not belong to it.
        CheckpointError: if there is no checkpoint, or it is another file than that of the bundle.
    """
    from quartermap_deploy.compiler import export_model, load_model, localise_precision, parity_of
    from quartermap_deploy.validation.golden import read_golden
    from quartermap_deploy.validation.inputs import parity_cases

    path = None if checkpoint is None else Path(checkpoint)
    _check_checkpoint(bundle, path)
    recipe = dataclasses.replace(bundle.recipe(), checkpoint=path, images=None)
    if recipe.precision == "float32":
        raise BundleError(f"the bundle {bundle.path} is in float32 everywhere; there is nothing to localise")
    golden, _ = read_golden(bundle.path)
    cases = parity_cases(golden["images"])
    with progress.step("building the PyTorch model"):
        model, card, _ = load_model(recipe)
    # What the range scan found when the bundle was compiled, on images that may not be here.
    ranges = bundle.report.get("precision", {}).get("ranges") or {}
    kept = (*recipe.keep_float32, *ranges.get("kept_float32", {}))
    recipe = dataclasses.replace(recipe, keep_float32=kept)
    exported = export_model(recipe, model, card, progress)
    report = localise_precision(recipe, model, cases, exported, progress)
    if report.passed:
        own = parity_of(recipe, model, cases, bundle.model_path.read_bytes(), progress)
        if not own.passed:
            raise BundleError(
                f"{own.describe_failure()}, though a model exported anew is right: the fault of {bundle.path} is none "
                "of precision; compile it again"
            )
    return report


def rebuild_torch(
    bundle: Bundle, checkpoint: Path | None = None, progress: Progress = SILENT
) -> VisualStateSpaceModel:
    """Build the PyTorch model that a bundle was compiled from, unpruned.

    Args:
        bundle: the bundle.
        checkpoint: the file that it was compiled from; None if it was compiled from none.
        progress: told about the step.

    Raises:
        BundleError: if the bundle was compiled from a checkpoint and there is none here, or the other way round.
        CheckpointError: if the checkpoint is another file than that of the bundle.
    """
    from quartermap_deploy.compiler import load_model

    recipe = _recipe_with(bundle, checkpoint)
    with progress.step("building the PyTorch model"):
        return load_model(recipe)[0]


def _recipe_with(bundle: Bundle, checkpoint: Path | None) -> Recipe:
    """The recipe of a bundle with the checkpoint that is here, after a check that it is the bundle's."""
    _check_checkpoint(bundle, checkpoint)
    return dataclasses.replace(bundle.recipe(), checkpoint=checkpoint)


def _against_golden(bundle: Bundle, target: str | None, progress: Progress) -> dict[str, Any]:
    from quartermap_deploy.frontend.exporter import INPUT
    from quartermap_deploy.validation.golden import read_golden
    from quartermap_deploy.validation.parity import check_parity
    from quartermap_deploy.validation.runners import SessionRunner
    from quartermap_deploy.validation.tolerances import tolerance_for

    cases, outputs = read_golden(bundle.path)
    with progress.step("loading the model"):
        session = bundle.session(target)
    runner = SessionRunner(session, target or bundle.default_target)
    tolerance = tolerance_for(bundle.manifest["recipe"]["precision"])
    with progress.step("comparing with the golden outputs"):
        return check_parity(_GoldenRunner(outputs), runner, cases, INPUT, tolerance).to_dict()


def _GoldenRunner(outputs: list[dict[str, Any]]) -> Any:
    """A polygraphy runner that plays back recorded outputs, one batch after the other."""
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class Golden(BaseRunner):  # type: ignore[misc]
        def get_input_metadata_impl(self) -> Any:
            return TensorMetadata()

        def infer_impl(self, feed_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
            self.inference_time = 0.0
            return OrderedDict(next(self._recorded))

        def activate_impl(self) -> None:
            self._recorded = iter(outputs)

        def infer(self, feed_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            return self.infer_impl(feed_dict)

    return Golden(name="golden outputs")


def _against_torch(
    bundle: Bundle, target: str | None, checkpoint: Path | None, progress: Progress
) -> dict[str, Any]:
    from quartermap_deploy.compiler import parity_of
    from quartermap_deploy.validation.golden import read_golden
    from quartermap_deploy.validation.inputs import parity_cases

    recipe = _recipe_with(bundle, checkpoint)
    if target not in (None, DEFAULT):
        raise BundleError(f"blocks can be compared in ONNX Runtime only, not in {target}")
    if DEFAULT in bundle.manifest["targets"]:
        bundle.session(DEFAULT)  # refuses a damaged model before the work begins
    cases, _ = read_golden(bundle.path)
    model = rebuild_torch(bundle, checkpoint, progress)
    report = parity_of(recipe, model, parity_cases(cases["images"]), bundle.model_path.read_bytes(), progress)
    return report.to_dict()


def _check_checkpoint(bundle: Bundle, checkpoint: Path | None) -> None:
    """Check that the checkpoint is the file that the bundle was compiled from, or that neither is there."""
    from quartermap_deploy.architectures.checkpoint import require_file
    from quartermap_deploy.bundle import describe_file

    compiled_from = bundle.recipe().checkpoint
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
