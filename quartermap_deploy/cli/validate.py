"""`quartermap validate`: prove a bundle again, on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quartermap_deploy.cli.execution import add_execution_options, execution_of, tell_report
from quartermap_deploy.cli.options import (
    add_bundle_argument,
    add_factory_option,
    add_output_options,
    add_plugin_option,
    add_signature_option,
)
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.progress_display import make_progress
from quartermap_deploy.cli.results import print_json, results_only, show
from quartermap_deploy.cli.values import file_or_folder
from quartermap_deploy.errors import InputError, ParityError
from quartermap_deploy.frontend.node_names import read_name
from quartermap_deploy.revalidate import REFERENCES
from quartermap_deploy.tables.layout import table, with_verdict
from quartermap_deploy.tables.words import error_text, worst_error
from quartermap_deploy.validation.forms import FORMS

if TYPE_CHECKING:
    from rich.table import Table

    from quartermap_deploy.bundle import Bundle
    from quartermap_deploy.cli.parsing import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "validate",
        run,
        summary="prove on this machine that a bundle computes what it should",
        description="""
            Check that the files of a bundle are those that were compiled, run it on this machine, and compare its
            outputs with a reference: on the images that it was compiled with, in another batch size, and on edge
            cases.

            golden   outputs that PyTorch computed in float64 when the bundle was compiled; needs no torch
            torch    the PyTorch model, built again; compares every block and names the first one that departs

            For torch, a bundle that was compiled from a checkpoint needs that very file: --checkpoint. A bundle of a
            module of yours needs what makes it too: --factory, as nothing that a bundle names is ever run.

            --localise finds, in a bundle of 16-bit precision that departs, the block that has to stay in float32: its
            casts are flipped block by block, and each form is compared with PyTorch. With --target tensorrt or
            tensorrt-rtx each form is built as an engine and run, which needs a GPU; otherwise it is the portable model,
            on a CPU, with every value rounded as the types say.

            With --device or --provider the bundle is run by other execution providers of ONNX Runtime; which of them
            runs how many nodes is in the title, and under "execution" in JSON.

            A bundle that departs by more than the tolerance of its element type ends with exit code 2.
            """,
        examples="""
            quartermap validate bundles/vmamba_digits_k3
            quartermap validate bundles/vmamba_digits_k3 --reference torch
            quartermap validate bundles/base_k3 --reference torch --checkpoint vssm_base_0229_ckpt_epoch_237.pth
            quartermap validate bundles/mine --reference torch --factory model.py:Net --checkpoint weights.pth
            quartermap validate bundles/tiny_float16 --localise
            quartermap validate bundles/tiny_float16 --localise --target tensorrt --plugin libquartermap_plugin.so
            quartermap validate bundles/vmamba_digits_k3 --provider OpenVINO
            quartermap validate bundles/vmamba_digits_k3 --json | jq .passed
            """,
    )
    add_bundle_argument(parser)
    parser.add_argument(
        "--target",
        metavar="NAME",
        help="target to check, or to localise in (default: onnxruntime, or to check the bundle's only one)",
    )
    parser.add_argument(
        "--reference",
        choices=REFERENCES,
        default=REFERENCES[0],
        help="what to compare with (default: %(default)s)",
    )
    parser.add_argument(
        "--scans",
        choices=FORMS,
        default=FORMS[0],
        help="of onnxruntime, the form of the scans to check: the portable one in the file, the native operator, or "
        "both as far as they can run here; by other providers than the CPU's, the form that they run by themselves "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--localise",
        action="store_true",
        help="find the block whose return to float32 brings a 16-bit bundle back within its tolerance (default: no)",
    )
    parser.add_argument(
        "--checkpoint",
        type=file_or_folder,
        metavar="FILE",
        help="for --reference torch and --localise, the file that the bundle was compiled from "
        "(default: it was compiled from none)",
    )
    add_factory_option(parser, "for --reference torch and --localise of a bundle of a module of yours")
    add_execution_options(parser)
    add_plugin_option(parser)
    add_signature_option(parser)
    add_output_options(parser)


def run(options: argparse.Namespace) -> None:
    """Print the parity table.

    Raises:
        ParityError: if the bundle departs from the reference.
    """
    from quartermap_deploy.bundle import load_bundle
    from quartermap_deploy.revalidate import validate_bundle

    bundle = load_bundle(options.bundle, signed_by=options.signed_by)
    if options.localise:
        if not execution_of(options).on_cpu:
            raise InputError(
                "--localise looks in the portable model on the CPU; leave --device and --provider out"
            )
        run_localise(bundle, options)
        return
    with results_only():
        report = validate_bundle(
            bundle,
            options.target,
            reference=options.reference,
            checkpoint=options.checkpoint,
            factory=options.factory,
            plugin=options.plugin,
            scans=options.scans,
            execution=execution_of(options),
            progress=make_progress(options),
        )
    tell_report(report)
    if options.json:
        print_json(report)
    elif not options.quiet:
        tolerance = report["tolerance"]
        show(
            *parity_tables(report),
            with_verdict(
                report["passed"],
                f"worst error {error_text(worst_error(report))}{native_text(report)}, tolerance "
                f"{tolerance['relative']:.0e} for {tolerance['element_type']}: {tolerance['reason']}",
            ),
        )
    if not report["passed"]:
        raise ParityError(failure(report, bundle, options.reference))


def run_localise(bundle: Bundle, options: argparse.Namespace) -> None:
    """Print which block has to stay in float32.

    Raises:
        ParityError: if the bundle departs, with the block's name.
    """
    from quartermap_deploy.revalidate import localise_bundle
    from quartermap_deploy.validation.localise import part_name

    with results_only():
        report = localise_bundle(
            bundle,
            options.target,
            checkpoint=options.checkpoint,
            factory=options.factory,
            plugin=options.plugin,
            progress=make_progress(options),
        )
    if options.json:
        print_json(report.to_dict())
    elif not options.quiet:
        rows = [
            (part_name(part), error_text(error), "yes" if passed else "")
            for part, (passed, error) in report.alone.items()
        ]
        if rows:
            show(table("returned to float32 alone", ["part", ">error left", "restores parity"], rows), "")
        show(with_verdict(report.passed, report.describe()))
    if not report.passed:
        raise ParityError(f"{report.describe()}; {report.advice()}")


def parity_tables(report: Mapping[str, Any]) -> list[Table | str]:
    """Return a table of what was checked, and one of the native operator where that was checked beside it."""
    found: list[Table | str] = [parity_table(report, report["target"]), ""]
    native = report.get("native")
    if native is not None and native["run"]:
        found += [parity_table(native, f"the native operator ({native['instruction_set']})"), ""]
    return found


def native_text(report: Mapping[str, Any]) -> str:
    """Say how the native operator did, or why it did not run; nothing where there is nothing to say."""
    native = report.get("native")
    if native is None:
        return ""
    if not native["run"]:
        return f" (the native operator did not run: {native['not_run']})"
    return f", {error_text(native['worst_relative_error'])} with the native operator"


def parity_table(report: Mapping[str, Any], what: str) -> Table:
    """Return the largest difference of every output in every case, as a share of the reference's largest value."""
    from rich.text import Text

    names = list(dict.fromkeys(output["name"] for case in report["cases"] for output in case["outputs"]))
    cells: dict[tuple[str, str], Text] = {}
    for case in report["cases"]:
        for output in case["outputs"]:
            style = "" if output["passed"] else "bold red"
            mark = "" if output["passed"] else " FAILED"
            cells[output["name"], case["name"]] = Text(
                error_text(output["relative_error"]) + mark, style=style
            )
    cases = [case["name"] for case in report["cases"]]
    return table(
        f"{what}: error, as a share of the largest value of the reference",
        ["output", *(f">{case}" for case in cases)],
        [(name, *(cells.get((name, case)) for case in cases)) for name in names],
    )


def failure(report: Mapping[str, Any], bundle: Bundle, reference: str) -> str:
    """Return in one sentence where and by how much a bundle departs."""
    native = report.get("native") or {}
    if native.get("run") and all(output["passed"] for case in report["cases"] for output in case["outputs"]):
        # The portable body is right.
        return f"with the native operator, {failure({**native, 'native': None}, bundle, reference)}"
    failures = [
        (case["name"], output)
        for case in report["cases"]
        for output in case["outputs"]
        if not output["passed"]
    ]
    block = report["first_departing_block"]
    # Of a block, its scan comes before its output.
    case, output = next(
        ((case, output) for case, output in failures if _block_of(output["name"]) == block), failures[0]
    )
    where = f"{output['name']} departs"
    if block is not None:
        path = next((entry["path"] for entry in bundle.manifest["blocks"] if entry["index"] == block), "")
        where = f"block {block}{f' ({path})' if path else ''} is the first that departs"
    text = f"{bundle.path} departs from the {reference} reference: {where}, on {case!r}: {output['detail']}"
    return text if block is not None or reference == "torch" else f"{text}. --reference torch names the block"


def _block_of(output: str) -> int | None:
    name = read_name(output)
    return None if name is None else name.block
