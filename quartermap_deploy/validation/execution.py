"""The providers of ONNX Runtime other than the CPU's, judged: a bundle runs by them and is compared with PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quartermap_deploy.errors import ParityError
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.targets.execution import Execution

if TYPE_CHECKING:
    from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession
    from quartermap_deploy.validation.parity import ParityReport


def label_of(session: OnnxRuntimeSession) -> str:
    """What a session is called in reports: `onnxruntime by CUDA (1494 nodes), scans tree`."""
    return f"onnxruntime by {session.placement}, scans {session.scans}"


def execution_entry(
    session: OnnxRuntimeSession, execution: Execution, report: ParityReport | None
) -> dict[str, Any]:
    """What a report says about a run by other providers than the CPU's, as plain values for JSON.

    Why a provider was left out is not among it: such reasons name places on this machine.

    Args:
        session: what ran.
        execution: what was asked for.
        report: the comparison, where this is no part of it already.
    """
    values = {
        "wanted": list(execution.names),
        "options": execution.described(),
        **session.placement.to_dict(),
        "left_out": sorted(session.placement.left_out),
        "scans": str(session.scans),
    }
    if report is None:
        return values
    return {
        **values,
        "passed": report.passed,
        "worst_relative_error": report.worst if np.isfinite(report.worst) else None,
        "cases": report.to_dict()["cases"],
    }


def prove_execution(
    folder: Path,
    model: str,
    golden: Sequence[str],
    precision: str,
    execution: Execution,
    progress: Progress = SILENT,
) -> dict[str, Any] | None:
    """Run a bundle that is being written by the providers of its recipe, in the form that its scans then have.

    Args:
        folder: the bundle, with its golden files, which may be a draft.
        model: name of the portable model in it.
        golden: names of the golden cases.
        precision: element type of the bundle.
        execution: the providers.
        progress: told about the step.

    Returns:
        `execution_entry`; None where the providers are the CPU's alone, by which every bundle is judged.

    Raises:
        ParityError: if it departs from PyTorch by more than the tolerance.
        QuartermapError: if a provider does not start.
    """
    from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession
    from quartermap_deploy.validation.engines import golden_parity

    if execution.on_cpu:
        return None
    with progress.step(f"comparing {execution} with PyTorch"):
        session = OnnxRuntimeSession(folder / model, execution=execution)
        report = golden_parity(folder, golden, session, label_of(session), precision)
    if not report.passed:
        raise ParityError(
            f"{report.describe_failure()}. Nothing was written, though the portable model is right on the CPU: the "
            f"provider computes otherwise, or in fewer bits; its options may help, or leave {execution} out"
        )
    return execution_entry(session, execution, report)
