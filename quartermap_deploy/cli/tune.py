"""`quartermap tune`: choose the blocks to prune, for a budget or a speed-up."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.cli.data import add_data_options, format_of
from quartermap_deploy.cli.execution import add_execution_options
from quartermap_deploy.cli.measuring import kept_on_interruption, recipe_of
from quartermap_deploy.cli.messages import message
from quartermap_deploy.cli.options import add_output_options
from quartermap_deploy.cli.overrides import add_preprocessing_option
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.progress_display import make_progress
from quartermap_deploy.cli.results import print_json, results_only, show
from quartermap_deploy.cli.values import at_least_one, file_or_folder, numbers, numbers_or_none, whole
from quartermap_deploy.limits import LARGEST_BATCH, MOST_ROUNDS
from quartermap_deploy.plain_text import printable
from quartermap_deploy.tables.layout import facts
from quartermap_deploy.tables.search import fixed_table, front_table, sensitivity_table
from quartermap_deploy.tables.words import ranges

if TYPE_CHECKING:
    from quartermap_deploy.cli.parsing import Subparsers
    from quartermap_deploy.evaluation.datasets import Dataset

MEASURES = ("time", "flops", "tokens")
"""Those of `evaluation.savings`, which a help text need not import."""

PARTS = {"digits": ("training", "held_out"), "medmnist": ("val", "test")}
"""Parts to calibrate and to verify on, of data that comes in parts for such purposes."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "tune",
        run,
        summary="choose the blocks to prune, for a budget or a speed-up",
        description="""
            Choose the set of blocks to prune, and the stride, instead of every k-th block. Every block is pruned alone
            to see what that costs and saves; sets of blocks are searched and run on calibration images; the plan is
            verified on other images and written as a recipe that `compile` takes.

            What a plan costs is its drop: without labels the share of images on which it names another class than the
            unpruned model, with labels the loss of accuracy. With --budget, the fastest plan within it is chosen; with
            --speedup, the plan of that speed with the smallest drop, and the smallest divergence where drops are equal.

            What it saves is measured in turns on the target (time), or counted: multiply-accumulates (flops) or
            positions that the scans walk (tokens). Where times are too noisy, flops are taken, and a warning says so.

            Beside the recipe, a .json file holds all that was tried, with the Pareto front and every k-th block for
            comparison. It is there before the first plan is run: a search that was stopped goes on from it, and one
            with another budget uses it. Plans are run in PyTorch, on a GPU if there is one.
            """,
        examples="""
            quartermap tune vmamba_digits --budget 1% -o digits_tuned.toml
            quartermap tune export/vmamba_tiny_s1l8_k3.toml --checkpoint F --data imagenet --speedup 1.15 -o tiny.toml
            quartermap tune vmamba_tiny_s1l8 --checkpoint F --data photographs --format images --budget 0.02 -o t.toml
            """,
    )
    parser.add_argument(
        "source",
        metavar="RECIPE.toml|MODEL",
        help="recipe file, whose plan is replaced, or name of a model",
    )
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--budget",
        type=share,
        metavar="DROP",
        help="largest drop, as 0.01 or 1%%: find the fastest plan within it (default: none; give this or --speedup)",
    )
    goal.add_argument(
        "--speedup",
        type=factor,
        metavar="X",
        help="least speed relative to the unpruned model, as 1.2: find the plan with the smallest drop (default: none; "
        "give this or --budget)",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=file_or_folder,
        required=True,
        metavar="RECIPE.toml",
        help="recipe to write, in a folder that is made where it is missing; what was tried goes beside it, as .json "
        "(default: none; it has to be named)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace the recipe, and what was tried for another model or other images (default: refuse)",
    )
    parser.add_argument(
        "--checkpoint",
        type=file_or_folder,
        metavar="FILE",
        help="weights (default: the recipe's, or those that come with the package)",
    )
    add_preprocessing_option(parser, "as the recipe or the model's card says")
    _add_image_options(parser)
    _add_search_options(parser)
    add_output_options(parser)


def _add_image_options(parser: argparse.ArgumentParser) -> None:
    group = add_data_options(parser, limit=False, calibrating=True)
    group.add_argument(
        "--verify-split",
        metavar="NAME",
        help="part of the data to verify on (default: without --split held_out of the digits and test of MedMNIST, "
        "else other images of the part that is calibrated on, drawn with --seed)",
    )
    group.add_argument(
        "--calibration",
        type=at_least_one,
        default=256,
        metavar="N",
        help="images to calibrate on (default: %(default)s, or half of a part that is divided)",
    )
    group.add_argument(
        "--verification",
        type=at_least_one,
        default=1000,
        metavar="N",
        help="images to verify on at most (default: %(default)s)",
    )
    group.add_argument(
        "--labels",
        action=argparse.BooleanOptionalAction,
        help="judge by accuracy, or without labels by agreement (default: by accuracy if there are labels)",
    )
    group.add_argument(
        "--seed",
        type=whole(0),
        default=0,
        metavar="N",
        help="seed of the draw of images (default: %(default)s)",
    )


def _add_search_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the search")
    group.add_argument(
        "--stride",
        dest="strides",
        type=numbers,
        default=(2, 3),
        metavar="2,3",
        help="strides to choose from (default: 2,3)",
    )
    group.add_argument(
        "--exclude-stages",
        type=numbers_or_none,
        default=(),
        metavar="1,2",
        help="stages whose blocks are not pruned (default: none)",
    )
    group.add_argument(
        "--evaluations",
        type=at_least_one,
        default=128,
        metavar="N",
        help="plans to run; if all sets of blocks are no more, all are (default: %(default)s)",
    )
    group.add_argument(
        "--measure",
        choices=MEASURES,
        default="time",
        help="what speed is: measured, or counted (default: %(default)s)",
    )
    group.add_argument(
        "--target", default="onnxruntime", metavar="NAME", help="what is timed on (default: %(default)s)"
    )
    add_execution_options(group)
    group.add_argument(
        "--batch",
        type=whole(1, LARGEST_BATCH),
        default=8,
        metavar="N",
        help="images per timed call (default: %(default)s)",
    )
    group.add_argument(
        "--repeats",
        type=whole(1, MOST_ROUNDS),
        default=15,
        metavar="N",
        help="timed rounds (default: %(default)s)",
    )


def share(text: str) -> float:
    """Read 0.01 or 1% as a share, for argparse."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 0.01 or 1%") from None
    if not 0 <= value < 1:
        hint = (
            f"; for {text} in a hundred write {text}%" if 1 <= value < 100 and not text.endswith("%") else ""
        )
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1{hint}")
    return value


def factor(text: str) -> float:
    """Read a speed of more than 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no speed such as 1.2") from None
    if not 1 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no speed above 1, that of the unpruned model")
    return value


def run(options: argparse.Namespace) -> None:
    """Search and print what was found."""
    from quartermap_deploy.evaluation.search import Goal
    from quartermap_deploy.evaluation.tune import tune
    from quartermap_deploy.evaluation.tune_options import TuneOptions

    recipe = recipe_of(options)
    goal = Goal(budget=options.budget, speedup=options.speedup)
    names = [field.name for field in dataclasses.fields(TuneOptions)]
    settings = TuneOptions(**{name: getattr(options, name) for name in names})
    calibration, verification = image_sets(options)
    # The current folder has no name that a suffix could be put to; it is refused below.
    tried = options.out.with_suffix(".json") if options.out.name else None
    with results_only(), kept_on_interruption(tried):
        tuned = tune(
            recipe,
            goal,
            calibration,
            verification,
            options.out,
            settings,
            force=options.force,
            progress=make_progress(options),
        )
    for warning in tuned.warnings:
        message("warning", printable(warning, None))
    if options.json:
        print_json({"recipe": options.out, **tuned.report})
    elif not options.quiet:
        show_report(tuned.report, options.out)


def image_sets(options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Return the images to calibrate on and those to verify on."""
    from quartermap_deploy.evaluation.formats import open_dataset
    from quartermap_deploy.evaluation.tune import divide

    format, split, other = format_of(options), options.split, options.verify_split
    if split is None and format in PARTS:
        split, other = PARTS[format][0], other or PARTS[format][1]
    dataset = open_dataset(options.data, format, split=split)
    if other is None or other == split:
        return divide(dataset, options.calibration, options.verification, options.seed)
    rest = open_dataset(options.data, format, split=other)
    return dataset.sample(options.calibration, options.seed), rest.sample(options.verification, options.seed)


def show_report(report: Mapping[str, Any], out: Path) -> None:
    """Print the tables of a search."""
    chosen, images = report["chosen"], report["verification"]
    times, found = chosen["measured"], chosen["verification"]
    rows: dict[str, object] = {
        "recipe": out,
        "blocks": f"{ranges(chosen['blocks'])} at stride {chosen['stride']}",
        "speed": f"{chosen['speed']:.3f} × by {report['measure']} ({report['measure_note']})",
    }
    if times is not None:
        low, high = times["quartiles"]
        rows["timed by itself"] = f"{times['speed']:.3f} × [{low:.3f} – {high:.3f}]"
    if found["accuracy"] is not None:
        rows["accuracy"] = f"{found['accuracy']:.2%}, unpruned {images['unpruned_accuracy']:.2%}"
    rows["agreement"] = f"{found['agreement']:.2%} with the unpruned model"
    rows["verified on"] = f"{images['images']} images of {images['name']}"
    rows["calibrated on"] = f"{report['calibration']['images']} images of {report['calibration']['name']}"
    count = "all sets" if report["exhaustive"] else "a guided search"
    rows["tried"] = f"{len(report['tried'])} plans, {count}; all in {out.with_suffix('.json')}"
    show(
        facts(f"a plan for {report['model']}", rows),
        "",
        sensitivity_table(report),
        "",
        fixed_table(report),
        "",
    )
    show(front_table(report))
