"""The options by which commands are told about data sets, and what they say about them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from quartermap_deploy.cli.messages import message
from quartermap_deploy.cli.values import at_least_one, file_or_folder
from quartermap_deploy.evaluation import FORMATS, UNLABELLED
from quartermap_deploy.plain_text import printable

if TYPE_CHECKING:
    from quartermap_deploy.evaluation.datasets import Dataset

SHOWN = 3
"""Broken images that a warning names; --json has all."""


def add_data_options(
    parser: argparse.ArgumentParser, *, limit: bool = True, calibrating: bool = False
) -> argparse._ArgumentGroup:
    """Add --data, --format, --split and --limit.

    Args:
        parser: the command's.
        limit: add --limit.
        calibrating: of a command that calibrates on the images, and takes folders of images without labels too.

    Returns:
        The group of options, for more of them.
    """
    group = parser.add_argument_group("the images")
    group.add_argument(
        "--data",
        type=file_or_folder,
        metavar="PATH",
        help="folder of class folders, or an .npz file of MedMNIST (default: none, for the digits)",
    )
    unlabelled = (
        f"; {UNLABELLED} is a folder of images without labels, and the folders in it" if calibrating else ""
    )
    group.add_argument(
        "--format",
        choices=(*FORMATS, UNLABELLED) if calibrating else FORMATS,
        help=f"how the data is laid out{unlabelled} (default: medmnist for a file .npz, imagefolder for another "
        "--data, else the digits that come with scikit-learn)",
    )
    # Where plans are chosen by the images, the parts that others are judged on are kept for the verification.
    purpose, medmnist, digits = (
        ("to calibrate on", "val", "training") if calibrating else ("", "test", "held_out")
    )
    group.add_argument(
        "--split",
        metavar="NAME",
        help=f"part of the data {purpose}".rstrip()
        + ": a folder in --data (default: val, validation, test, or --data "
        f"itself); train, val or test of MedMNIST (default: {medmnist}); held_out or training of the digits (default: "
        f"{digits})",
    )
    if limit:
        group.add_argument(
            "--limit",
            type=at_least_one,
            metavar="N",
            help="take N images, drawn with a fixed seed (default: all)",
        )
    return group


def dataset_of(options: argparse.Namespace) -> Dataset:
    """Return the data set that the options name.

    Raises:
        QuartermapError: as `open_dataset` does.
    """
    from quartermap_deploy.evaluation.formats import open_dataset

    dataset = open_dataset(options.data, format_of(options), split=options.split)
    limit: int | None = getattr(options, "limit", None)
    return dataset if limit is None else dataset.sample(limit)


def format_of(options: argparse.Namespace) -> str:
    """Return the format that was named, or that --data looks like."""
    if options.format is not None:
        return str(options.format)
    if options.data is None:
        return "digits"
    return "medmnist" if options.data.suffix == ".npz" else "imagefolder"


def warn_of_broken(broken: Sequence[tuple[str, str]], dataset: Dataset) -> None:
    """Say which images could not be read, if any."""
    if broken:
        named = "; ".join(f"{name}: {reason}" for name, reason in broken[:SHOWN])
        more = f"; and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        message(
            "warning",
            printable(
                f"{len(broken)} of {len(dataset)} images of {dataset.name} cannot be read and were left out: "
                f"{named}{more}",
                None,
            ),
        )


def warn_of_data(*datasets: Dataset) -> None:
    """Say what has to be known about data sets before numbers that were measured on them are believed."""
    for text in dict.fromkeys(text for dataset in datasets for text in dataset.warnings):
        message("warning", printable(text, None))
