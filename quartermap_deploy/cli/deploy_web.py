"""`quartermap deploy web`: a bundle as a folder of static files, which run it in visitors' browsers."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from quartermap_deploy.cli.options import add_bundle_argument, add_output_options, add_signature_option
from quartermap_deploy.cli.overrides import add_labels_option, add_preprocessing_option, preprocessing_of
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.progress_display import make_progress
from quartermap_deploy.cli.results import print_json, results_only, show
from quartermap_deploy.cli.values import file_or_folder
from quartermap_deploy.tables.layout import facts
from quartermap_deploy.tables.words import error_text
from quartermap_deploy.validation.tolerances import STORED

if TYPE_CHECKING:
    from quartermap_deploy.cli.parsing import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "web",
        run,
        summary="write a site that runs the model in the browser",
        description="""
            Write a folder of static files. Whoever opens the page gives it an image, and the model runs in their own
            browser: no image leaves their machine, and the server runs no code. The page shows classes, a mask or an
            image, checks a golden input of the bundle in that very browser, and says where the model comes from.
            """,
        examples="""
            quartermap deploy web bundles/digits_k3 -o site
            python -m http.server --directory site
            quartermap deploy web bundles/digits_k3 -o site --from-file
            quartermap deploy web bundles/tiny_k3 -o site --weights int8 --runtime onnxruntime-web-1.30.0.tgz
            """,
    )
    add_bundle_argument(parser)
    parser.add_argument(
        "-o", "--out", type=file_or_folder, required=True, metavar="SITE", help="folder of the site"
    )
    parser.add_argument(
        "--weights",
        choices=tuple(STORED),
        default="float16",
        help="how weights are stored; everything is computed in float32. float16 halves the file, int8 quarters it and "
        "changes answers (default: float16)",
    )
    parser.add_argument(
        "--from-file",
        action="store_true",
        help="make a site that also works without a web server, when index.html is opened; then it has one thread",
    )
    parser.add_argument(
        "--runtime",
        type=file_or_folder,
        metavar="PATH",
        help="folder or tarball of the npm package onnxruntime-web (default: the tested version, fetched once by npm)",
    )
    add_labels_option(parser)
    add_preprocessing_option(parser)
    add_signature_option(parser)
    parser.add_argument(
        "--force", action="store_true", help="replace what is there, if it was written by this command"
    )
    add_output_options(parser)


def run(options: argparse.Namespace) -> None:
    """Write a site, then print what was written and how to look at it.

    Raises:
        QuartermapError: if the bundle cannot be shown so.
    """
    import dataclasses

    from quartermap_deploy.deploy.web import WebOptions, deploy_web
    from quartermap_deploy.plain_text import command

    chosen = WebOptions(
        storage=options.weights,
        from_file=options.from_file,
        runtime=options.runtime,
        labels=options.labels,
        preprocessing=preprocessing_of(options),
        signed_by=tuple(options.signed_by),
    )
    with results_only():
        made = deploy_web(
            options.bundle, options.out, chosen, force=options.force, progress=make_progress(options)
        )
    if options.json:
        print_json(dataclasses.asdict(made))
        return
    if options.quiet:
        return
    summary: dict[str, object] = {
        "shows": made.shows,
        "weights": f"stored as {made.storage}, error {error_text(made.error)} on the golden inputs",
        "model": f"{made.model_bytes / 1e6:.1f} MB",
        "size": f"{made.bytes / 1e6:.1f} MB in {len(made.files)} files",
        "runs by": f"onnxruntime-web {made.runtime}",
        "where": made.path,
    }
    for index, note in enumerate(made.notes):
        summary["" if index else "note"] = note
    look = (
        f"open {made.path / 'index.html'}, or put the folder on any web server"
        if options.from_file
        else command("python", "-m", "http.server", "--directory", made.path)
    )
    show(facts("site", summary), "", "look at it with:", f"  {look}")
