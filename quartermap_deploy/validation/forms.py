"""Both forms of a bundle's scans, judged: the portable body in its file, and the native operator that takes its place.

The body is what the file is, so it is compared everywhere, block by block. The native operator is judged beside it
where it is there and takes the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quartermap_deploy.errors import BundleError, ParityError
from quartermap_deploy.progress import SILENT, Progress

if TYPE_CHECKING:
    from quartermap_deploy.targets.scan_form import ScanForm
    from quartermap_deploy.validation.parity import ParityReport

FORMS = ("both", "native", "portable")
"""What a check may be asked to judge; "both" is every form that can run here."""


def native_form(model: Path) -> ScanForm:
    """Load a model as it would be served, and tell what then computes its scans.

    Raises:
        BundleError: if ONNX Runtime refuses it.
    """
    from quartermap_deploy.targets.onnxruntime.opening import open_session

    return open_session(model)[1]


def native_entry(form: ScanForm, report: ParityReport | None) -> dict[str, Any] | None:
    """What a report says about the native operator, as plain values for JSON; None of a model without scans.

    Args:
        form: what computes the scans when nothing else is said.
        report: the comparison, where that is the native operator.
    """
    if form.kind == "none":
        return None
    if report is None:
        return {"run": False, "not_run": form.reason, "instruction_set": None}
    return {
        "run": True,
        "not_run": None,
        "instruction_set": form.instruction_set,
        "passed": report.passed,
        "worst_relative_error": report.worst if np.isfinite(report.worst) else None,
        "first_departing_block": report.first_departing_block,
        "cases": report.to_dict()["cases"],
    }


def prove_native(
    folder: Path, model: str, golden: Sequence[str], precision: str, progress: Progress = SILENT
) -> dict[str, Any] | None:
    """Run a bundle that is being written with the native operator, where that is there; returns its `native_entry`.

    Args:
        folder: the bundle, with its golden files, which may be a draft.
        model: name of the portable model in it.
        golden: names of the golden cases.
        precision: element type of the bundle.
        progress: told about the step.

    Raises:
        ParityError: if it departs from PyTorch by more than the tolerance.
    """
    from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession
    from quartermap_deploy.validation.engines import golden_parity
    from quartermap_deploy.validation.runners import NATIVE

    with progress.step("comparing the native operator with PyTorch"):
        session = OnnxRuntimeSession(folder / model)
        if session.scans.kind != "native":
            return native_entry(session.scans, None)
        report = golden_parity(folder, golden, session, NATIVE, precision)
    if not report.passed:
        raise ParityError(
            f"{report.describe_failure()}. Nothing was written, though the portable model is right: please report this "
            "with the output of `quartermap doctor`; QUARTERMAP_NATIVE=0 compiles without the native operator"
        )
    return native_entry(session.scans, report)


def require_native(form: ScanForm, model: Path) -> None:
    """Refuse a check of the native operator alone where it cannot run.

    Raises:
        BundleError: if so.
    """
    if form.kind != "native":
        reason = form.reason or "the model has no scans"
        raise BundleError(f"the native operator does not run {model}: {reason}")
