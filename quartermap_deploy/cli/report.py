"""`quartermap report`: one page about bundles."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from quartermap_deploy.cli.options import add_output_options
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.progress_display import make_progress
from quartermap_deploy.cli.results import print_json, results_only, show
from quartermap_deploy.cli.values import file_or_folder

if TYPE_CHECKING:
    from quartermap_deploy.cli.parsing import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "report",
        run,
        summary="write one HTML page about bundles: blocks, parity, accuracy, speed, activation maps",
        description="""
            Write one HTML page about one or several bundles: inputs and outputs, block maps, parity of every block,
            operators, versions, and, computed by the PyTorch model, activation maps and effective receptive fields.
            The page holds everything that it shows and fetches nothing.

            Accuracy, speed, ablations and the choice of blocks come from what other commands print with --json: give
            these files to --results. A section without results says so.

            Activation maps and receptive fields need the weights: a bundle that was compiled from a checkpoint needs
            that very file, with --checkpoint; without it they are left out, and of a module of yours always: they are
            made inside the blocks of models of cards.
            """,
        examples="""
            quartermap report bundles/vmamba_digits_k3 -o report.html
            quartermap eval bundles/vmamba_digits_k3 --json > eval.json
            quartermap report bundles/vmamba_digits bundles/vmamba_digits_k3 -o report.html --results eval.json
            quartermap report bundles/base_k3 -o base.html --checkpoint vssm_base_0229_ckpt_epoch_237.pth
            """,
    )
    parser.add_argument(
        "bundles",
        nargs="+",
        type=file_or_folder,
        metavar="BUNDLE",
        help="folder that `quartermap compile` wrote",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=file_or_folder,
        default=Path("report.html"),
        metavar="FILE",
        help="the page, in a folder that is made where it is missing; a page that is there is replaced "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--results",
        nargs="+",
        action="extend",
        default=[],
        type=file_or_folder,
        metavar="FILE",
        help="JSON of eval, compare, ablate, tune, bench or validate (default: none)",
    )
    parser.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        type=file_or_folder,
        metavar="FILE",
        help="weights that a bundle was compiled from; may be given several times (default: none)",
    )
    parser.add_argument(
        "--images",
        type=file_or_folder,
        metavar="FOLDER",
        help="images for activation maps and receptive fields (default: those that come with the package)",
    )
    parser.add_argument(
        "--no-maps",
        action="store_true",
        help="leave activation maps and receptive fields out, which need torch and a while (default: make them)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a file that is no report (default: refuse)"
    )
    add_output_options(parser)


def run(options: argparse.Namespace) -> None:
    """Write the page.

    Raises:
        ReportError: if it cannot be written.
    """
    from quartermap_deploy.report import write_report

    with results_only():
        path = write_report(
            options.bundles,
            options.out,
            results=options.results,
            checkpoints=options.checkpoint,
            images=options.images,
            maps=not options.no_maps,
            force=options.force,
            progress=make_progress(options),
        )
    size = path.stat().st_size
    if options.json:
        print_json({"path": path, "bytes": size})
    elif not options.quiet:
        show(f"wrote {path}, {size / 1e3:,.0f} kB")
