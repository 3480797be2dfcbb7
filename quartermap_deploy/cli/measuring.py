"""What the commands share that measure variants of a model: their options, and how their results are given out."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.cli.data import dataset_of, warn_of_broken
from quartermap_deploy.cli.execution import add_execution_options, execution_of
from quartermap_deploy.cli.messages import message
from quartermap_deploy.cli.options import add_output_options
from quartermap_deploy.cli.overrides import add_preprocessing_option, preprocessing_of
from quartermap_deploy.cli.results import print_json, show
from quartermap_deploy.cli.values import file_or_folder, whole
from quartermap_deploy.errors import InputError
from quartermap_deploy.limits import LARGEST_BATCH, MOST_ROUNDS, MOST_THREADS, MOST_WORKERS
from quartermap_deploy.plain_text import printable
from quartermap_deploy.reading import read_json
from quartermap_deploy.targets import refuse_providers

if TYPE_CHECKING:
    from quartermap_deploy.evaluation.datasets import Dataset
    from quartermap_deploy.evaluation.resumable import ResultFile
    from quartermap_deploy.recipe import Recipe

TARGETS = ("onnxruntime", "torch")
DIGITS_MODEL = "vmamba_digits"
"""The model for which the digits are the data where none is named."""


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add the model or recipe, its weights, and how its images are prepared."""
    parser.add_argument("source", metavar="MODEL|RECIPE.toml", help="name of a model, or a recipe file")
    parser.add_argument(
        "--checkpoint",
        type=file_or_folder,
        metavar="FILE",
        help="weights, .pth or .safetensors (default: the recipe's, those that come with the package, or new ones)",
    )
    add_preprocessing_option(parser, "as the recipe or the model's card says")


def add_measuring_options(group: argparse._ArgumentGroup) -> None:
    """Add how times are taken."""
    group.add_argument(
        "--target",
        choices=TARGETS,
        default=TARGETS[0],
        help="what runs the models: ONNX Runtime, or PyTorch, on a GPU if it has one (default: %(default)s)",
    )
    add_execution_options(group)
    group.add_argument(
        "--threads",
        type=whole(1, MOST_THREADS),
        metavar="N",
        help="threads of ONNX Runtime (default: QUARTERMAP_THREADS, or all cores)",
    )
    group.add_argument(
        "--repeats",
        type=whole(1, MOST_ROUNDS),
        default=15,
        metavar="N",
        help="rounds that are timed (default: %(default)s)",
    )


def add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    """Add how accuracies are measured."""
    group = parser.add_argument_group("the accuracy")
    group.add_argument(
        "--eval-batch",
        type=whole(1, LARGEST_BATCH),
        default=32,
        metavar="N",
        help="images per call (default: %(default)s)",
    )
    group.add_argument(
        "--workers",
        type=whole(1, MOST_WORKERS),
        default=1,
        metavar="N",
        help="threads that read and prepare images (default: %(default)s)",
    )


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """Add where results go."""
    parser.add_argument(
        "-o",
        "--out",
        type=file_or_folder,
        metavar="FILE.json",
        help="file for the results, in a folder that is made where it is missing; a table .csv is written beside it "
        "(default: none)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace what is in the place of the results (default: go on with results of the same run, else refuse)",
    )
    add_output_options(parser)


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Return the recipe that is named, or that of a model's defaults, with what the options say on top of it.

    Raises:
        InputError: if a bundle is named, whose graph cannot be pruned in other ways any more, or a module by its
            factory.
        RecipeError: if the recipe is of a module.
        QuartermapError: if there is no such model, or the recipe is none.
    """
    from quartermap_deploy.architectures.cards import load_card
    from quartermap_deploy.bundle import MANIFEST
    from quartermap_deploy.evaluation.sessions import names_a_factory
    from quartermap_deploy.evaluation.subject import CARDS_ALONE, require_card
    from quartermap_deploy.recipe import Recipe

    source: str = options.source
    if source.endswith(".toml"):
        recipe = Recipe.load(Path(source))
        require_card(recipe)
    elif (Path(source) / MANIFEST).is_file():
        raise InputError(_about_bundle(source, Path(source) / MANIFEST))
    elif names_a_factory(source):
        raise InputError(f"{source} names a module of yours by its factory, and {CARDS_ALONE}")
    else:
        load_card(source)
        recipe = Recipe(source)
    # Where a recipe is proved is not where it is measured, unless that is said here.
    recipe = dataclasses.replace(recipe, execution=execution_of(options))
    if not recipe.execution.on_cpu and options.target != TARGETS[0]:
        refuse_providers(options.target, recipe.execution)
    prepared = preprocessing_of(options)
    if prepared:
        recipe = dataclasses.replace(recipe, preprocessing={**(recipe.preprocessing or {}), **prepared})
    return (
        recipe if options.checkpoint is None else dataclasses.replace(recipe, checkpoint=options.checkpoint)
    )


def _about_bundle(source: str, manifest: Path) -> str:
    """Why a bundle is not what plans are measured on, and what to name instead."""
    from quartermap_deploy.evaluation.subject import CARDS_ALONE

    try:
        model = read_json(manifest)["model"]
        name, is_module = str(model["name"]), model.get("source") == "module"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        name, is_module = "a name from `quartermap models`, or a file .toml", False
    if is_module:
        return f"{source} is a bundle of a module of yours, and {CARDS_ALONE}"
    return f"{source} is a bundle, which is pruned in one way for good; give its model or recipe: {name}"


def labelled_images(options: argparse.Namespace, recipe: Recipe) -> Dataset | None:
    """Return the data that was named, the digits for the model that reads them, or None.

    Raises:
        InputError: if there is a limit on the images, but no data.
        QuartermapError: as `open_dataset` does.
    """
    named = any(getattr(options, name) is not None for name in ("data", "format", "split"))
    if named or recipe.model == DIGITS_MODEL:
        return dataset_of(options)
    if options.limit is not None:
        raise InputError("--limit takes a part of the data, but none was named; add --data, or leave it out")
    return None


KEPT = ("position", "tried", "unpruned", "savings", "groups", "timings")
"""What a file holds of eval, tune, ablate and compare once something was measured; see there."""


@contextmanager
def kept_on_interruption(path: Path | None) -> Iterator[None]:
    """While open, say on an interruption or termination whether what was measured is kept in `path`."""
    try:
        yield
    except KeyboardInterrupt:
        if path is not None:
            if _holds_something(path):
                text = f"what was measured so far is kept in {path}; the same command goes on from there"
            else:
                text = f"nothing was measured yet that could be kept in {path}; the same command begins anew"
            message("warning", text)
        raise


def _holds_something(path: Path) -> bool:
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and any(values.get(name) for name in KEPT)


def measuring_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that `add_measuring_options` and `add_evaluation_options` read."""
    names = ("target", "repeats", "threads", "eval_batch", "workers")
    return {name: getattr(options, name) for name in names}


def print_results(
    results: ResultFile, options: argparse.Namespace, shown: Sequence[object], dataset: Dataset | None
) -> None:
    """Print the results and then finish their file, so that a full disk takes nothing away.

    Raises:
        ReportError: if the file cannot be written.
    """
    values = results.values
    for note in values["notes"]:
        message("warning", printable(note, None))
    for skipped in values["skipped"]:
        message("warning", f"{skipped['name']} is left out: {skipped['reason']}")
    if dataset is not None:
        warn_of_broken(_broken(values), dataset)
    values["complete"] = True
    if options.json:
        print_json(values)
    elif not options.quiet:
        show(*shown)
    results.finish()


def _broken(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The broken images of the data, which are the same for every variant."""
    variants = [entry for part in (values, *values.get("groups", ())) for entry in part.get("variants", ())]
    for entry in variants:
        if entry["accuracy"]:
            return [(image["image"], image["reason"]) for image in entry["accuracy"]["broken"]]
    return []
