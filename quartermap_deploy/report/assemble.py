"""Putting a report together: which sections it has, and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quartermap_deploy.bundle import bundle_labels
from quartermap_deploy.errors import ReportError
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.report.bundles import (
    blocks_section,
    files_parts,
    graph_section,
    overview,
    parity_section,
)
from quartermap_deploy.report.maps import ACTIVATIONS, FIELDS, map_sections
from quartermap_deploy.report.parts import Note, Section, Table, left_out
from quartermap_deploy.report.results import read_results, result_sections
from quartermap_deploy.report.verdict import verdicts

if TYPE_CHECKING:
    from quartermap_deploy.bundle import Bundle


def page_sections(
    paths: Sequence[Path],
    *,
    results: Sequence[Path] = (),
    checkpoints: Sequence[Path] = (),
    images: Path | None = None,
    maps: bool = True,
    progress: Progress = SILENT,
) -> tuple[list[Section], dict[str, Bundle]]:
    """Return the sections of a report, and its bundles by their names in it; `write_report` tells the rest."""
    from quartermap_deploy.bundle import load_bundle

    if not paths:
        raise ReportError("a report is about bundles, and none was named; name at least one")
    found = read_results(results)
    bundles: dict[str, Bundle] = {}
    with progress.step("reading the bundles", total=len(paths)) as advance:
        for name, path in zip(bundle_labels(paths), paths, strict=True):
            bundles[name] = load_bundle(path)
            bundles[name].check_graph()
            advance(1)
    if maps:
        activations, fields = map_sections(bundles, checkpoints, images, progress)
    else:
        reason = "Left out, as --no-maps asks for."
        activations, fields = (
            left_out(name, title, reason)
            for name, title in (("activations", ACTIVATIONS), ("fields", FIELDS))
        )
    validations = [(result.name, result.values) for result in found if result.kind == "validate"]
    sections = [
        Section("overview", "Overview", (*verdicts(bundles, found), overview(bundles))),
        blocks_section(bundles),
        parity_section(bundles, validations),
        *result_sections(found),
        activations,
        fields,
        graph_section(bundles),
        Section("environment", "Environment and files", (_environment(), *files_parts(bundles))),
    ]
    return _without_empty(sections), bundles


def _without_empty(sections: Sequence[Section]) -> list[Section]:
    """The sections that hold something, and one at the end that says in a line each why others do not."""
    kept = [section for section in sections if not section.left_out]
    empty = [section for section in sections if section.left_out]
    if empty:
        lines = tuple(Note(f"{section.title}: {section.reasons}", reason=True) for section in empty)
        kept.append(Section("left-out", "Not in this report", lines))
    return kept


def page_titles(bundles: Mapping[str, Bundle]) -> tuple[str, str]:
    """Return the models that the bundles hold, as a title, and the names of the bundles, as a line below it."""
    titles = dict.fromkeys(str(bundle.manifest["model"]["title"]) for bundle in bundles.values())
    return ", ".join(titles), f"Report on the bundle{'s' if len(bundles) > 1 else ''} {', '.join(bundles)}"


def _environment() -> Table:
    from quartermap_deploy.machine import describe_machine
    from quartermap_deploy.manifest import versions

    rows = {**describe_machine(), **versions()}
    return Table("where this page was made", ("what", "value"), tuple(rows.items()))
