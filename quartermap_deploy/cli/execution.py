"""The options that say where ONNX Runtime runs a model, and the words about where it does."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from quartermap_deploy.cli.messages import message
from quartermap_deploy.errors import UnknownNameError
from quartermap_deploy.targets.execution import DEVICES, Execution, require_device
from quartermap_deploy.targets.placement import Placement

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quartermap_deploy.targets.session import Session


def add_execution_options(options: Any, default: object = None) -> None:
    """Add --device and --provider, to a parser or a group of one.

    Args:
        options: where to.
        default: of both attributes, where neither is given.
    """
    options.add_argument(
        "--device",
        type=_device,
        choices=DEVICES,
        default=default,
        help="where the target onnxruntime runs: cuda, or else an error; auto: cuda where it really starts, or else "
        "the CPU, with a word (default: cpu)",
    )
    options.add_argument(
        "--provider",
        dest="providers",
        action="append",
        metavar="NAME[:KEY=VALUE,…]",
        default=default,
        help="in the place of --device, an execution provider of ONNX Runtime with its options, such as "
        "OpenVINO:device_type=GPU; several in order of preference. One that cannot start is an error, unless CPU is "
        "named behind it (default: CPU)",
    )


def _device(text: str) -> str:
    """Read the name of a device, for argparse, whose own nearest name for gpu would be cpu."""
    try:
        return require_device(text)
    except UnknownNameError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def execution_of(options: argparse.Namespace) -> Execution:
    """Read what `add_execution_options` added.

    Raises:
        InputError: if both a device and a provider are given, or a provider cannot be read.
        UnknownNameError: if there is no such provider.
    """
    return Execution.of(options.device, options.providers or ())


def given_execution(options: argparse.Namespace) -> Execution | None:
    """Read what was added with `argparse.SUPPRESS`; None where neither option was given."""
    device, providers = getattr(options, "device", None), getattr(options, "providers", None)
    return None if device is None and providers is None else Execution.of(device, providers or ())


def tell_placement(session: Session, name: str | None = None, told: set[str] | None = None) -> None:
    """Say what was left out, and what of the model runs on the CPU though another provider is preferred.

    Args:
        session: what runs.
        name: of what it runs, where there are several.
        told: what was said already, which is not said again; it grows.
    """
    if session.placement is not None:
        tell_notes(session.placement, name, told)


def tell_report(report: Mapping[str, Any]) -> None:
    """Say the same of a run that a report is about, if that was one by providers, or by a native operator."""
    if report.get("native") is not None:
        tell_native()
    if (entry := report.get("execution")) is not None:
        left_out = dict.fromkeys(entry["left_out"], "`quartermap doctor` says why")
        tell_notes(Placement(tuple(entry["providers"]), entry["nodes"], entry["on_cpu"], left_out))


def tell_native() -> None:
    """Say which CPU library was passed over, and why, as a warning; for what runs without a session that knows it."""
    from quartermap_deploy.native.cpu_library import find_cpu_library

    if (warning := find_cpu_library().warning) is not None:
        message("warning", warning)


def tell_notes(placement: Placement, name: str | None = None, told: set[str] | None = None) -> None:
    """Say what `Placement.notes` has, as warnings; `tell_placement` says what the others are."""
    told = set() if told is None else told
    for note in placement.notes():
        # Which native library there is does not depend on what is run.
        text = note if name is None or note == placement.passed_over else f"{name}: {note}"
        if text not in told:
            told.add(text)
            message("warning", text)
