"""Validation: parity with PyTorch, tolerances, golden files."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quartermap_deploy.errors import BundleError
from quartermap_deploy.progress import SILENT, Progress

if TYPE_CHECKING:
    from quartermap_deploy.bundle import Bundle

REFERENCES = ("golden", "torch")


def validate_bundle(
    bundle: Bundle, target: str | None = None, *, reference: str = "golden", progress: Progress = SILENT
) -> dict[str, Any]:
    """Check a bundle on this machine.

    Args:
        bundle: the bundle; its files were checked against its manifest when it was loaded.
        target: the target to check; None for the default.
        reference: "golden" compares with the outputs kept in the bundle and needs no torch; "torch" builds the
            PyTorch model from the bundle's recipe again and compares every block.
        progress: told about the steps.

    Returns:
        The report in the form of the bundle's report.json.

    Raises:
        BundleError: if the reference is not available for this bundle.
        UnknownNameError: if the bundle was not built for the target.
    """
    if reference not in REFERENCES:
        raise BundleError(f"unknown reference {reference!r}; expected one of {', '.join(REFERENCES)}")
    return (_against_golden if reference == "golden" else _against_torch)(bundle, target, progress)


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


def _against_torch(bundle: Bundle, target: str | None, progress: Progress) -> dict[str, Any]:
    from quartermap_deploy.compiler import load_model, parity_of, validation_cases

    recipe = bundle.recipe()
    if recipe.checkpoint is not None:
        raise BundleError(
            f"the bundle was compiled from the checkpoint {recipe.checkpoint.name}, which is not in it; compile it "
            "again to compare with PyTorch, or validate against the golden outputs"
        )
    if target not in (None, "onnxruntime"):
        raise BundleError(f"blocks can be compared in ONNX Runtime only, not in {target}")
    bundle.session(target)  # refuses a damaged model before the work begins
    with progress.step("building the PyTorch model"):
        model, card = load_model(recipe)
        cases = validation_cases(dataclasses.replace(recipe, images=None), card)
    return parity_of(recipe, model, cases, bundle.model_path.read_bytes(), progress).to_dict()
