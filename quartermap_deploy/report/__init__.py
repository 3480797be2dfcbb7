"""Reports: one HTML page about bundles, and the tables that it and the project's evidence are made of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from quartermap_deploy.progress import SILENT, Progress

__all__ = ["write_report"]


def write_report(
    bundles: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    results: Sequence[str | os.PathLike[str]] = (),
    checkpoints: Sequence[str | os.PathLike[str]] = (),
    images: str | os.PathLike[str] | None = None,
    maps: bool = True,
    force: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Write a page about bundles: one HTML file that fetches nothing.

    Args:
        bundles: their folders, at least one.
        out: the file to write; one that is a report already is replaced.
        results: JSON files of eval, compare, ablate, tune, bench and validate.
        checkpoints: files with weights, for the bundles that were compiled from them.
        images: folder of images for activation maps and receptive fields; None takes those that come with the package.
        maps: whether these two are made, which needs torch and takes a while.
        force: replace a file that is no report.
        progress: told about the steps.

    Returns:
        The path of the page.

    Raises:
        ReportError: if the page cannot be written, or a file of results is none.
        BundleError: if a bundle is missing or damaged.
        CheckpointError: if a checkpoint belongs to none of the bundles.
        InputError: if the folder has no images, or one of them cannot be read.
        MissingDependencyError: if jinja2 is not installed.
    """
    from quartermap_deploy.report.assemble import page_sections, page_titles
    from quartermap_deploy.report.page import check_destination, render, require_jinja, write_page

    path = Path(out)
    require_jinja()
    check_destination(path, force)
    sections, named = page_sections(
        [Path(bundle) for bundle in bundles],
        results=[Path(result) for result in results],
        checkpoints=[Path(checkpoint) for checkpoint in checkpoints],
        images=None if images is None else Path(images),
        maps=maps,
        progress=progress,
    )
    with progress.step("writing the page"):
        write_page(path, render(*page_titles(named), sections), force)
    return path
