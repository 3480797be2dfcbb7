"""`quartermap eval`: the accuracy of a model on labelled images."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from quartermap_deploy.cli.data import add_data_options, dataset_of, warn_of_broken, warn_of_data
from quartermap_deploy.cli.execution import add_execution_options, execution_of, tell_native, tell_notes
from quartermap_deploy.cli.measuring import kept_on_interruption
from quartermap_deploy.cli.messages import message
from quartermap_deploy.cli.options import (
    add_factory_option,
    add_output_options,
    add_run_module_option,
    add_signature_option,
)
from quartermap_deploy.cli.overrides import (
    add_labels_option,
    add_preprocessing_option,
    preprocessing_of,
)
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.progress_display import make_progress
from quartermap_deploy.cli.results import print_json, results_only, show
from quartermap_deploy.cli.values import file_or_folder, whole
from quartermap_deploy.limits import LARGEST_BATCH, MOST_WORKERS
from quartermap_deploy.tables.layout import facts, table

if TYPE_CHECKING:
    from rich.table import Table

    from quartermap_deploy.cli.parsing import Subparsers
    from quartermap_deploy.evaluation.accuracy import Accuracy
    from quartermap_deploy.evaluation.datasets import Dataset
    from quartermap_deploy.evaluation.sessions import Runner

CLASSES_SHOWN = 20
"""Lines of the table of classes; where there are more, the ones that the model does worst on are shown."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "eval",
        run,
        summary="measure the accuracy of a model on labelled images",
        description="""
            Measure top-1, top-5 and per-class accuracy and images per second of a classifier, on any target. Images
            are prepared as the bundle says, or the recipe or the model's card, in the background, while the model
            runs; --preprocessing says otherwise, for a checkpoint that was trained in another way.

            A bundle is run as it is, and nothing beside it is asked. A recipe or the name of a model is built in
            memory, pruned by its plan; nothing proves then that it computes what PyTorch computes, as `compile` does.
            The target torch is the PyTorch model itself, of a bundle too; of a bundle of a module of yours it is made
            by what --factory names, and nothing that a bundle names is ever run.

            imagefolder   a folder for each class, named by synset (n01440764), by the index of its logit, or by any
                          name; in a part such as val, or without parts. Folders that have the names of the model's
                          classes are those; other classes are in the order of their names, unless a file classes.txt
                          or LOC_synset_mapping.txt beside them says otherwise. One flat folder is read too, with
                          synsets in the file names or a file labels.csv of lines "file,class"
            medmnist      an .npz file of MedMNIST's 2D sets
            digits        the digits that come with scikit-learn

            Images that cannot be read are named, counted and left out. With --resume, an evaluation that was stopped
            goes on where it was, and gives the numbers that it would have given.
            """,
        examples="""
            # the 450 held-out digits
            quartermap eval bundles/vmamba_digits_k3

            quartermap eval vmamba_tiny_s1l8 --checkpoint F --data imagenet --resume tiny.json
            quartermap eval bundles/medmamba_t --data pathmnist.npz --split test --target tensorrt
            quartermap eval bundles/vmamba_digits_k3 --device auto
            quartermap eval export/vmamba_digits_k3.toml --target torch --json | jq .top1
            quartermap eval bundles/mine --data photos --labels classes.txt --preprocessing mean=0.5,0.5,0.5
            quartermap eval bundles/mine --data photos --target torch --factory my_package.models:build
            """,
    )
    add_source_options(parser)
    add_data_options(parser)
    parser.add_argument(
        "--batch",
        type=whole(1, LARGEST_BATCH),
        default=32,
        metavar="N",
        help="images per call (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=whole(1, MOST_WORKERS),
        default=1,
        metavar="N",
        help="threads that read and prepare images (default: %(default)s)",
    )
    parser.add_argument(
        "--resume",
        type=file_or_folder,
        metavar="STATE",
        help="small file that keeps how far the evaluation is; if it is there, go on from it, and if its folder is "
        "missing, make it (default: keep nothing)",
    )
    add_output_options(parser)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add what is evaluated, on what, and with which weights."""
    parser.add_argument(
        "source",
        metavar="BUNDLE|RECIPE.toml|MODEL",
        help="folder that `quartermap compile` wrote, recipe file, or name of a model",
    )
    parser.add_argument(
        "--target",
        metavar="NAME",
        help="torch, onnxruntime, tensorrt or tensorrt-rtx (default: onnxruntime, or the bundle's only one)",
    )
    parser.add_argument(
        "--checkpoint",
        type=file_or_folder,
        metavar="FILE",
        help="weights of a recipe or model; of a bundle on the target torch, the file that it was compiled from "
        "(default: the recipe's, or those that come with the package)",
    )
    add_execution_options(parser)
    add_factory_option(parser, "on the target torch, for a bundle of a module of yours")
    add_run_module_option(parser)
    add_signature_option(parser)
    add_labels_option(parser, "the bundle's, the recipe's or those of the model's card")
    add_preprocessing_option(parser, "as the bundle, the recipe or the model's card says")


def run(options: argparse.Namespace) -> None:
    """Evaluate and print the tables."""
    from quartermap_deploy.evaluation.accuracy import evaluate
    from quartermap_deploy.evaluation.runs import TORCH
    from quartermap_deploy.evaluation.sessions import runner_for
    from quartermap_deploy.evaluation.tally import check_place

    progress, prepared = make_progress(options), preprocessing_of(options)
    if options.resume is not None:
        check_place(options.resume)
    execution = execution_of(options)
    # The data first: it is opened in a moment, and a model may take minutes.
    dataset = dataset_of(options)
    with results_only(), kept_on_interruption(options.resume):
        runner = runner_for(
            options.source,
            options.target,
            checkpoint=options.checkpoint,
            execution=execution,
            factory=options.factory,
            run_module=options.run_module,
            labels=options.labels,
            preprocessing=prepared,
            signed_by=options.signed_by,
            progress=progress,
        )
        dataset = dataset.for_model(runner.num_classes, runner.labels)
        warn_of_data(dataset)
        accuracy = evaluate(
            runner.run,
            dataset,
            runner.preprocessing,
            batch=options.batch,
            progress=progress,
            checkpoint=options.resume,
            identity=runner.identity,
            workers=options.workers,
        )
    if runner.placement is not None:
        tell_notes(runner.placement)
    elif runner.target == TORCH:
        tell_native()
    warn(runner, dataset, accuracy)
    if options.json:
        print_json(result(runner, dataset, accuracy, options.batch))
    elif not options.quiet:
        show(facts(f"{runner.name} on {dataset.name}", summary(runner, accuracy, options.batch)), "")
        show(class_table(accuracy))


def warn(runner: Runner, dataset: Dataset, accuracy: Accuracy) -> None:
    """Say what has to be known before the numbers are believed."""
    warn_of_broken(accuracy.broken, dataset)
    if not runner.trained:
        message(
            "warning",
            f"{runner.model} has newly initialised weights, so its accuracy means nothing; give the trained ones "
            "with --checkpoint, or in the recipe",
        )
    if accuracy.not_finite:
        message(
            "warning",
            f"the logits of {accuracy.not_finite} images have NaN or infinite values, which counts as wrong; "
            "`quartermap validate` tells where a bundle departs",
        )


def summary(runner: Runner, accuracy: Accuracy, batch: int) -> dict[str, object]:
    """Return the facts of an evaluation."""
    wait = 1 - accuracy.compute_seconds / accuracy.seconds if accuracy.seconds > 0 else 0.0
    placed = None if runner.placement is None else str(runner.placement)
    otherwise = {"set otherwise": ", ".join(runner.overridden)} if runner.overridden else {}
    return {
        "target": runner.target if placed in (None, "CPU") else f"{runner.target} by {placed}",
        **otherwise,
        "images": f"{accuracy.images:,}{f', {len(accuracy.broken)} broken' if accuracy.broken else ''}",
        "top-1": f"{accuracy.top1:.2%}",
        "top-5": "not measured: with at most five classes it is 100 % for any model"
        if accuracy.top5 is None
        else f"{accuracy.top5:.2%}",
        "images/s": f"{accuracy.images_per_second:,.1f} at batch {batch}, {wait:.1%} of the time outside the model",
    }


def class_table(accuracy: Accuracy) -> Table:
    """Return the accuracy of each class, or of those that the model does worst on."""
    rows = list(accuracy.per_class.items())
    title = "by class"
    if len(rows) > CLASSES_SHOWN:
        rows = sorted(rows, key=lambda row: row[1][0] / row[1][1])[:CLASSES_SHOWN]
        title = f"the {CLASSES_SHOWN} worst of {len(accuracy.per_class)} classes"
    return table(
        title,
        ["class", ">right", ">images", ">accuracy"],
        [(name, right, images, f"{right / images:.1%}") for name, (right, images) in rows],
    )


def result(runner: Runner, dataset: Dataset, accuracy: Accuracy, batch: int) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {
        "model": runner.model,
        "source": runner.name,
        "target": runner.target,
        "execution": None if runner.placement is None else runner.placement.to_dict(),
        "weights": runner.weights,
        "plan": None if runner.plan is None else runner.plan.to_dict(),
        "preprocessing": runner.preprocessing.to_dict(),
        "overridden": list(runner.overridden),
        "data": {"name": dataset.name, "images": len(dataset), "fingerprint": dataset.fingerprint},
        "batch": batch,
        **accuracy.to_dict(),
    }
