"""`quartermap ablate`: what each choice of QuarterMap costs and saves."""

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
from quartermap_deploy.cli.values import at_least_one, whole, words
from quartermap_deploy.limits import LARGEST_BATCH
from quartermap_deploy.tables.ablation import tables

if TYPE_CHECKING:
    from quartermap_deploy.cli.parsing import Subparsers

GROUPS = ("every", "stage", "stride", "upsample", "form")
"""Those of `evaluation.ablate`, which a help text need not import."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "ablate",
        run,
        summary="measure what each choice of QuarterMap costs and saves",
        description="""
            Measure the ablations of QuarterMap on a model, in groups:

            every      k from 1 to 6
            stage      all blocks of one stage, each stage alone
            stride     stride s and keep n: of every s rows and columns the first n
            upsample   nearest, bilinear and bicubic
            form       the pruned graph in the paper's form (Slice before and Resize after the scan), with the Slice
                       hoisted, with the Resize sunk, and with both; the numbers are the same, so only speed is measured

            The variants of a group are timed in turns, in one process, together with the unpruned model, after each was
            shown to compute what its PyTorch model computes. Plans that prune nothing in a model are left out, by name.

            With -o, results are written after each group, with a table .csv beside them, and at the end plots as PNG
            and SVG. An interrupted run goes on from there when it is started again.
            """,
        examples="""
            quartermap ablate vmamba_digits -o ablations/digits.json
            quartermap ablate vmamba_tiny_s1l8 --checkpoint F --data imagenet --limit 2000 -o tiny.json
            quartermap ablate vmamba_tiny_s1l8 --groups every,form --batch 8 -o tiny_speed.json
            quartermap ablate export/medmamba_t_k3.toml --data bloodmnist.npz --target torch --json
            """,
    )
    add_model_argument(parser)
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--groups",
        type=words,
        metavar="NAMES",
        default=GROUPS,
        help=f"groups to measure, with commas between (default: {','.join(GROUPS)})",
    )
    group.add_argument(
        "--every",
        type=at_least_one,
        metavar="K",
        help="in the groups stride, upsample and form, prune every K-th block (default: as the recipe says, or 3)",
    )
    group.add_argument(
        "--batch",
        type=whole(1, LARGEST_BATCH),
        default=1,
        metavar="N",
        help="images per call (default: %(default)s)",
    )
    group.add_argument(
        "--plots",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with -o, draw the results; needs matplotlib, the extra report (default: --plots)",
    )
    add_measuring_options(group)
    add_data_options(parser)
    add_evaluation_options(parser)
    add_result_options(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, and print the tables."""
    from quartermap_deploy.evaluation.ablate import AblateOptions, ablate
    from quartermap_deploy.evaluation.ablation_plots import require_matplotlib, write_plots
    from quartermap_deploy.evaluation.resumable import check_place

    if options.out is not None:
        check_place(options.out)
    recipe = recipe_of(options)
    settings = AblateOptions(
        groups=tuple(options.groups),
        every=options.every,
        batch=options.batch,
        **measuring_settings(options),
    )
    if options.plots and options.out is not None:
        require_matplotlib()
    dataset = labelled_images(options, recipe)
    with results_only(), kept_on_interruption(options.out):
        results = ablate(
            recipe,
            settings,
            dataset,
            out=options.out,
            force=options.force,
            progress=make_progress(options),
        )
    print_results(results, options, tables(results.values), dataset)
    if options.plots and options.out is not None:
        write_plots(results.values, options.out)
