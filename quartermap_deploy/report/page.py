"""Writing a report as one HTML page that fetches nothing: style, pictures and charts are all in the file."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from quartermap_deploy import __version__
from quartermap_deploy.errors import MissingDependencyError, ReportError
from quartermap_deploy.files import folders_for, obstacle_to, write_whole
from quartermap_deploy.plain_text import encoded
from quartermap_deploy.report.markup import Html
from quartermap_deploy.report.parts import Section

GENERATOR = "quartermap-deploy"
"""What a page says it was made by; a file that says so may be replaced by a newer page."""
_SEARCHED = 4096
_FOLDER = Path(__file__).parent


def require_jinja() -> None:
    """Check that the template engine is there.

    Raises:
        MissingDependencyError: if it is not.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError.for_extra("a report needs", "jinja2", "report") from error


def check_destination(path: Path, force: bool) -> None:
    """Check, before any work, that a page may be written to `path`; folders that it is to lie in may be missing.

    Raises:
        ReportError: if it is a folder, lies where nothing can be written, or is a file that is no report, which only
            `force` replaces.
    """
    if path.is_dir():
        raise ReportError(f"{path} is a folder; name a file in it, such as {path / 'report.html'}")
    if (obstacle := obstacle_to(path)) is not None:
        raise ReportError(f"cannot write {path}: {obstacle}; choose another place")
    if path.exists() and not force and not _is_report(path):
        raise ReportError(f"{path} exists and is no report; choose another file, or replace it with --force")


def _is_report(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return f'name="generator" content="{GENERATOR}'.encode() in file.read(_SEARCHED)
    except OSError:
        return False


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return the page.

    Args:
        title: its heading.
        subtitle: a line below it.
        sections: what is in it, in order.

    Raises:
        MissingDependencyError: if jinja2 is not installed.
    """
    require_jinja()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    now = datetime.datetime.now(datetime.timezone.utc)
    return environment.get_template("page.html.j2").render(
        title=title,
        subtitle=subtitle,
        generator=f"{GENERATOR} {__version__}",
        style=Html((_FOLDER / "page.css").read_text(encoding="utf-8")),
        made=f"Made by quartermap-deploy {__version__} on {now:%Y-%m-%d %H:%M} UTC.",
        footer="This page holds everything that it shows; nothing is fetched.",
        sections=[
            {
                "name": section.name,
                "title": section.title,
                "parts": [{"kind": type(part).__name__, "value": part} for part in section.parts],
            }
            for section in sections
        ],
    )


def write_page(path: Path, text: str, force: bool = False) -> None:
    """Write a page, whole or not at all.

    Raises:
        ReportError: if it cannot be written; then `path` is what it was before.
    """
    check_destination(path, force)
    try:
        with folders_for(path):
            write_whole(path, encoded(text))
    except OSError as error:
        raise ReportError(
            f"the report {path} was not written: {error.strerror or error}. Nothing was changed; free some space or "
            "choose another file"
        ) from error
