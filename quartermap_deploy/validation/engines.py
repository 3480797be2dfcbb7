"""Engines against the golden outputs: those that were just built, and those that a localisation builds for each try."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.errors import ParityError
from quartermap_deploy.progress import SILENT, Progress

if TYPE_CHECKING:
    import onnx
    from polygraphy.backend.base import BaseRunner

    from quartermap_deploy.targets import Session, Target
    from quartermap_deploy.targets.tensorrt.options import EngineOptions
    from quartermap_deploy.validation.parity import ParityReport

NO_GOLDEN = "the bundle has no golden inputs that a profile of the engine takes"


def golden_parity(
    folder: Path, cases: Sequence[str], session: Session, name: str, precision: str
) -> ParityReport:
    """Run a session on a bundle's golden inputs and compare its outputs with the golden ones.

    Args:
        folder: the bundle.
        cases: names of the golden cases, as its manifest lists them.
        session: what to run.
        name: what to call it.
        precision: element type of the bundle, by which the tolerance is chosen.

    Raises:
        BundleError: if the golden files cannot be read.
        QuartermapError: of the session, if it cannot run.
    """
    from quartermap_deploy.validation.golden import read_golden

    inputs, outputs = read_golden(folder, cases)
    return _compared(inputs, outputs, session, name, precision)


def _compared(
    cases: Mapping[str, Any], outputs: list[dict[str, Any]], session: Session, name: str, precision: str
) -> ParityReport:
    from quartermap_deploy.validation.golden import golden_runner
    from quartermap_deploy.validation.parity import check_parity
    from quartermap_deploy.validation.runners import SessionRunner
    from quartermap_deploy.validation.tolerances import tolerance_for

    runner = SessionRunner(session, name)
    return check_parity(golden_runner(outputs), runner, cases, tolerance_for(precision))


def prove_engine(
    name: str,
    target: Target,
    folder: Path,
    entry: Mapping[str, Any],
    precision: str,
    golden: Sequence[str],
    *,
    advice: Callable[[], str],
    plugin: Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Run an engine that this process has just built, if it can be run on this machine, and compare its outputs.

    Args:
        name: of the target.
        target: the target.
        folder: the bundle, with its golden files, which may be a draft.
        entry: what the target's `build` returned.
        precision: element type of the bundle.
        golden: names of the golden cases.
        advice: says what to do, in one sentence, where the engine departs.
        plugin: the plugin library that the engine was built with, if any was named.
        progress: told about the step.

    Returns:
        For the manifest: `run`, whether the engine ran here; `not_run`, why not; `parity`, what was found.

    Raises:
        ParityError: if the engine departs from PyTorch by more than the tolerance.
        QuartermapError: if it should run here and does not.
    """
    if (reason := target.cannot_run(entry)) is not None:
        return _not_run(reason)
    cases, outputs = _taken(folder, entry, golden)
    if not cases:
        return _not_run(NO_GOLDEN)
    with progress.step(f"running the engine for {name}"):
        session = target.open(folder, entry, plugin=plugin, built_here=True)
        report = _compared(cases, outputs, session, name, precision)
    if not report.passed:
        raise ParityError(f"{report.describe_failure()}. Nothing was written; {advice()}")
    return {
        "run": True,
        "not_run": None,
        "parity": {
            "worst_relative_error": report.worst,
            "tolerance": report.tolerance.relative,
            "cases": list(report.cases),
        },
    }


def _not_run(reason: str) -> dict[str, Any]:
    return {"run": False, "not_run": reason, "parity": None}


def _taken(
    folder: Path, entry: Mapping[str, Any], golden: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The golden cases that a profile of the engine takes, and their outputs; none where there are no golden files."""
    from quartermap_deploy.targets.tensorrt.options import EngineOptions
    from quartermap_deploy.validation.golden import INPUTS_FILE, read_golden

    if not (folder / INPUTS_FILE).is_file():
        return {}, []
    profiles = EngineOptions.from_dict(entry["options"]).profiles
    cases, outputs = read_golden(folder, golden)
    kept = [
        (name, feeds, output)
        for (name, feeds), output in zip(cases.items(), outputs, strict=True)
        if any(
            profile.takes({key: array.shape for key, array in feeds.items()}, entry["inputs"])
            for profile in profiles
        )
    ]
    return {name: feeds for name, feeds, _ in kept}, [output for *_, output in kept]


def engine_runner(
    name: str, target: Target, folder: Path, options: EngineOptions
) -> Callable[[onnx.ModelProto], BaseRunner]:
    """How a localisation runs a typed model: by an engine that is built for it alone.

    Args:
        name: of the target.
        target: the target.
        folder: where to build; one engine takes the place of the other.
        options: how to build.
    """

    def make(model: onnx.ModelProto) -> BaseRunner:
        import onnx

        from quartermap_deploy.validation.runners import SessionRunner

        path = folder / "model.onnx"
        onnx.save(model, path)
        entry = target.build(path, folder, options)
        return SessionRunner(target.open(folder, entry, plugin=options.plugin, built_here=True), name)

    return make
