"""`quartermap compare`: the unpruned model, QuarterMap and ToMe in one run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from quartermap_deploy.cli.data import add_data_options
from quartermap_deploy.cli.measuring import (
    add_evaluation_options,
    add_measuring_options,
    add_model_argument,
    add_result_options,
    kept_on_interruption,
    labelled_images,
    measuring_settings,
    print_results,
    recipe_of,
)
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.progress_display import make_progress
from quartermap_deploy.cli.results import results_only
from quartermap_deploy.cli.values import at_least_one, whole
from quartermap_deploy.limits import LARGEST_BATCH
from quartermap_deploy.tables.comparison import tables

if TYPE_CHECKING:
    from quartermap_deploy.cli.parsing import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "compare",
        run,
        summary="compare QuarterMap with the unpruned model and with ToMe, in one run",
        description="""
            Measure the unpruned model, QuarterMap at every k-th block, and ToMe in the same blocks side by side:
            accuracy, images per second, time in the scans, and the time that pruning or merging adds. All are timed in
            turns, in one process, after each was shown to compute what its PyTorch model computes.

            ToMe (arXiv 2210.09461) merges similar tokens before the scan, to as many as QuarterMap keeps, and gives
            every position the output of its token afterwards. It merges in the blocks of the first --every.

            Accuracy is measured where images with labels are given; the digits model takes the held-out digits. Without
            a checkpoint a model has new weights, which are good for speed.

            With -o, results are written after each part, with a table beside them; an interrupted run goes on from
            there when it is started again.
            """,
        examples="""
            quartermap compare vmamba_digits -o digits.json
            quartermap compare vmamba_tiny_s1l8 --batch 1 8 -o tiny.json
            quartermap compare vmamba_base_s2l15 --checkpoint F --data imagenet --limit 5000 -o base.json
            quartermap compare export/medmamba_t_k3.toml --data bloodmnist.npz --target torch --json
            """,
    )
    add_model_argument(parser)
    group = parser.add_argument_group("what is compared")
    group.add_argument(
        "--every",
        type=at_least_one,
        nargs="+",
        default=[3, 2],
        metavar="K",
        help="prune every K-th block, a variant for each (default: 3 2)",
    )
    group.add_argument(
        "--tome",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with ToMe in the blocks of the first K (default: --tome)",
    )
    group.add_argument(
        "--canonical",
        action="store_true",
        help="also time the first K in the paper's form, Slice before and Resize after the scan (default: only the "
        "form that compile gives)",
    )
    group.add_argument(
        "--portable",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time each variant in the portable form, too, where the native operator runs its scans (default: "
        "--portable)",
    )
    group.add_argument(
        "--batch",
        type=whole(1, LARGEST_BATCH),
        nargs="+",
        default=[1, 8],
        metavar="N",
        help="images per call, a comparison for each (default: 1 8)",
    )
    add_measuring_options(group)
    add_data_options(parser)
    add_evaluation_options(parser)
    add_result_options(parser)


def run(options: argparse.Namespace) -> None:
    """Compare and print the tables."""
    from quartermap_deploy.evaluation.compare import CompareOptions, compare
    from quartermap_deploy.evaluation.resumable import check_place

    if options.out is not None:
        check_place(options.out)
    recipe = recipe_of(options)
    dataset = labelled_images(options, recipe)
    settings = CompareOptions(
        every=tuple(options.every),
        batches=tuple(options.batch),
        tome=options.tome,
        canonical=options.canonical,
        portable=options.portable,
        **measuring_settings(options),
    )
    with results_only(), kept_on_interruption(options.out):
        results = compare(
            recipe,
            settings,
            dataset,
            out=options.out,
            force=options.force,
            progress=make_progress(options),
        )
    print_results(results, options, tables(results.values), dataset)
