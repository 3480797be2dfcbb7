"""`quartermap predict`: what a bundle makes of image files."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.cli.execution import add_execution_options, execution_of, tell_placement
from quartermap_deploy.cli.messages import message
from quartermap_deploy.cli.options import add_bundle_argument, add_output_options, add_signature_option
from quartermap_deploy.cli.overrides import add_labels_option, add_preprocessing_option, preprocessing_of
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.progress_display import make_progress
from quartermap_deploy.cli.results import print_json, results_only, show
from quartermap_deploy.cli.values import at_least_one, file_or_folder, whole
from quartermap_deploy.limits import LARGEST_BATCH
from quartermap_deploy.plain_text import printable
from quartermap_deploy.tables.layout import table

if TYPE_CHECKING:
    from quartermap_deploy.cli.parsing import Subparsers
    from quartermap_deploy.data.images import ImageLike
    from quartermap_deploy.predicting import Broken, Prediction, Predictor
    from quartermap_deploy.progress import Progress

TOP = 5
SHOWN = 100
"""Images in the table; --json and -o have all."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "predict",
        run,
        summary="run a bundle on image files",
        description="""
            Run a bundle on image files, and print or write what comes out, by the task of its model:

            classification   the most probable classes             -o: classes.csv and classes.jsonl
            segmentation     the classes of the pixels of a mask   -o: a PNG file for each, with a palette; its pixels
                             and their shares                      are the numbers of the classes
            image            size and range of the image           -o: a PNG file for each, where the scale of the
                                                                   values is known: mean 0 and std 1; else .npz
            features, other  sizes and ranges of all outputs       -o: an .npz file for each, with every output by name

            Preprocessing, class names and task are in the bundle; --preprocessing and --labels replace them. Of a
            folder all image files in it are taken. Images that cannot be read are named and left out; where none can
            be, the exit code is 2. Masks and images have the size that the model sees, after resize and crop.

            With -o everything goes into one folder, which is written whole or not at all; predictions.json in it says
            what was run on what. A model with several inputs, or with inputs that are no images, takes arrays, from
            Python: bundle.run({"name": array, …}).
            """,
        examples="""
            quartermap predict bundles/digits_k3 digit.png
            quartermap predict bundles/digits_k3 photographs/ --top 1 --json | jq '.images[].classes[0]'
            quartermap predict bundles/unet slices/*.png -o masks
            quartermap predict bundles/tiny a.jpg --labels imagenet --preprocessing mean=0.5,0.5,0.5 std=0.5,0.5,0.5
            """,
    )
    add_bundle_argument(parser)
    parser.add_argument(
        "files",
        nargs="+",
        type=file_or_folder,
        metavar="FILES",
        help="image files, and folders of image files; put options behind them",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=file_or_folder,
        metavar="DIR",
        help="folder to write into (default: write nothing)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace what --out holds, if it was written by this command (default: refuse)",
    )
    parser.add_argument(
        "--top",
        type=at_least_one,
        default=TOP,
        metavar="N",
        help="classes of each image, the most probable or largest ones (default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=whole(1, LARGEST_BATCH),
        metavar="N",
        help="images at once (default: 8, or what the graph or the engine takes)",
    )
    parser.add_argument(
        "--target", metavar="NAME", help="target to run (default: onnxruntime, or the bundle's only one)"
    )
    add_execution_options(parser)
    add_labels_option(parser)
    add_signature_option(parser)
    add_preprocessing_option(parser)
    add_output_options(parser)


def run(options: argparse.Namespace) -> None:
    """Predict, write what was asked for, then print the table.

    Raises:
        QuartermapError: if the bundle cannot be run on these files.
    """
    from quartermap_deploy.bundle import load_bundle
    from quartermap_deploy.errors import PredictionError
    from quartermap_deploy.files import check_outside
    from quartermap_deploy.predicting import listed, make_predictor
    from quartermap_deploy.prediction_files import FOLDER

    overrides = preprocessing_of(options)
    if options.out is not None:
        check_outside(options.out, [options.bundle], PredictionError)
        FOLDER.check_destination(options.out, options.force)
    progress = make_progress(options)
    with results_only():
        bundle = load_bundle(options.bundle, signed_by=options.signed_by)
        images = listed(options.files)
        with progress.step("opening the bundle"):
            predictor = make_predictor(
                bundle,
                top=options.top,
                batch=options.batch,
                target=options.target,
                execution=execution_of(options),
                preprocessing=overrides,
                labels=options.labels,
            )
        tell_placement(predictor.session)
        outcome = Outcome(options.json, SHOWN)
        broken = _predict(predictor, images, outcome, options.out, options.force, progress)
    if broken:
        message("warning", printable(_broken_warning(broken, len(images)), None))
    if options.json:
        print_json(outcome.to_json(predictor, broken, options.out))
    elif not options.quiet:
        outcome.show(options.top)


def _predict(
    predictor: Predictor,
    images: Sequence[tuple[str, ImageLike]],
    outcome: Outcome,
    out: Path | None,
    force: bool,
    progress: Progress,
) -> list[Broken]:
    """Predict from all images, and write the folder if there is to be one; returns those that are broken."""
    from quartermap_deploy.predicting import Broken, require_some
    from quartermap_deploy.prediction_files import FOLDER, PredictionFolder

    broken: list[Broken] = []
    with contextlib.ExitStack() as stack:
        writer: PredictionFolder | None = None
        if out is not None:
            writer = PredictionFolder(stack.enter_context(FOLDER.new(out, force)), predictor)
        with progress.step("predicting", total=len(images)) as advance:
            for found in predictor.each(images):
                advance(1)
                if isinstance(found, Broken):
                    broken.append(found)
                else:
                    outcome.add(found, None if writer is None else writer.add(found))
        require_some(len(images) - len(broken), broken)
        if writer is not None:
            writer.finish(broken)
    return broken


def _broken_warning(broken: Sequence[Broken], count: int) -> str:
    from quartermap_deploy.predicting import broken_text

    return f"{len(broken)} of {count} images cannot be used and were left out: {broken_text(broken)}"


class Outcome:
    """What is printed, gathered while images are predicted from: arrays do not pile up in memory."""

    def __init__(self, every: bool, shown: int) -> None:
        """Begin.

        Args:
            every: keep what `to_json` prints of every image.
            shown: keep what the table shows of this many.
        """
        self._every, self._shown = every, shown
        self._entries: list[dict[str, Any]] = []
        self._count = 0

    def add(self, prediction: Prediction, file: str | None) -> None:
        """Add a prediction, and the name of the file that it was written to."""
        from quartermap_deploy.prediction_files import described

        self._count += 1
        if self._every or self._count <= self._shown:
            self._entries.append({**described(prediction), **({} if file is None else {"file": file})})

    def to_json(self, predictor: Predictor, broken: Sequence[Broken], out: Path | None) -> dict[str, Any]:
        """Return what `--json` prints."""
        from quartermap_deploy.prediction_files import described_broken, provenance

        return {
            **provenance(predictor),
            "out": out,
            "images": self._entries,
            "broken": [described_broken(one) for one in broken],
        }

    def show(self, top: int) -> None:
        """Print the table, with at most so many classes of each mask."""
        columns, rows_of = _layout(self._entries[0])
        written = any("file" in entry for entry in self._entries)
        rows = []
        for entry in self._entries[: self._shown]:
            for place, row in enumerate(rows_of(entry, top)):
                first = place == 0
                file = [printable(entry.get("file", ""), None) if first else ""] if written else []
                rows.append([printable(entry["source"], None) if first else "", *row, *file])
        show(table(None, ["image", *columns, *(["file"] if written else [])], rows))
        if (left := self._count - self._shown) > 0:
            show("", f"and {left:,} more images; --json and -o have all")


_Rows = Callable[[dict[str, Any], int], list[list[object]]]


def _layout(entry: dict[str, Any]) -> tuple[list[str], _Rows]:
    """The columns of the table for predictions of a kind, and what makes the rows of one."""
    if "outputs" in entry:
        return ["output", "size", "type", "values"], _array_rows
    if "shape" in entry:
        return ["size", "type", "values"], lambda values, top: [_array_row(values)]
    if "size" in entry:
        return ["class", ">share of the pixels"], _mask_rows
    return ["class", ">probability"], _class_rows


def _class_rows(entry: dict[str, Any], top: int) -> list[list[object]]:
    return [[one["label"], f"{one['probability']:.2%}"] for one in entry["classes"]]


def _mask_rows(entry: dict[str, Any], top: int) -> list[list[object]]:
    return [[one["label"], f"{one['share']:.2%}"] for one in entry["classes"][:top]]


def _array_rows(entry: dict[str, Any], top: int) -> list[list[object]]:
    return [[printable(name), *_array_row(values)] for name, values in entry["outputs"].items()]


def _array_row(values: dict[str, Any]) -> list[object]:
    spread = None if values["min"] is None else f"{values['min']:.3g} … {values['max']:.3g}"
    return [" x ".join(map(str, values["shape"])) or "1", values["type"], spread]
