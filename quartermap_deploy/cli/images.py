"""`quartermap images`: the images of a data set as files."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from quartermap_deploy.cli.data import add_data_options, dataset_of, warn_of_broken
from quartermap_deploy.cli.options import add_output_options
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.progress_display import make_progress
from quartermap_deploy.cli.results import print_json, results_only, show
from quartermap_deploy.cli.values import file_or_folder
from quartermap_deploy.tables.layout import table

if TYPE_CHECKING:
    from quartermap_deploy.cli.parsing import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "images",
        run,
        summary="write images of a data set as PNG files",
        description="""
            Write the images of a data set as PNG files, a folder for each class, for `predict`, `eval`, and people who
            want to look at them. Without --data these are handwritten digits that come with scikit-learn, and that the
            model vmamba_digits was not trained on.
            """,
        examples="""
            quartermap images -o images --limit 20
            quartermap images --data pathmnist.npz --split test -o images
            """,
    )
    parser.add_argument(
        "-o", "--out", type=file_or_folder, required=True, metavar="DIR", help="folder to write"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace a folder that this command wrote (default: refuse)",
    )
    add_data_options(parser)
    add_output_options(parser)


def run(options: argparse.Namespace) -> None:
    """Write the folder, and say what is in it.

    Raises:
        QuartermapError: if the images cannot be read, or the folder may not be written.
    """
    from quartermap_deploy.evaluation.image_folder_writer import FOLDER, write_images

    FOLDER.check_destination(options.out, options.force)
    with results_only():
        dataset = dataset_of(options)
        written = write_images(dataset, options.out, force=options.force, progress=make_progress(options))
    warn_of_broken(written.broken, dataset)
    if options.json:
        broken = [{"image": name, "reason": reason} for name, reason in written.broken]
        print_json({"path": options.out, "images": written.files, "broken": broken})
    elif not options.quiet:
        counts: dict[str, int] = {}
        for name in written.files:
            folder = name.rpartition("/")[0]
            counts[folder] = counts.get(folder, 0) + 1
        rows = sorted(counts.items())
        show(table(f"{dataset.name}, in {options.out}", ["folder", ">images"], rows))
