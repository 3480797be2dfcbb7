"""Results of long measurements: written after each part, whole or not at all, and taken up again after an interruption.

A result file is JSON; beside it stands a table of the same results, .csv. Its key says which measurement it belongs to:
model, weights, data and settings. A file with the same key is gone on with, any other one is in the way.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quartermap_deploy.errors import ReportError
from quartermap_deploy.files import folders_for, obstacle_to, write_whole
from quartermap_deploy.plain_text import encoded
from quartermap_deploy.reading import ReadingError, read_json

FORMAT = 1
Rows = Sequence[Mapping[str, Any]]


def key_of(settings: Mapping[str, Any]) -> str:
    """Return a hash of everything that a result depends on."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def check_place(path: Path) -> None:
    """Check, before any work, that results can be written to `path`; folders that it is to lie in may be missing.

    Raises:
        ReportError: if its name does not end in .json, it is a folder, or it cannot be written.
    """
    if path.suffix != ".json":
        raise ReportError(
            f"results are written to a file ending in .json and a table ending in .csv; found {path}"
        )
    if path.is_dir():
        raise ReportError(f"{path} is a folder; name a file for the results, such as {path / 'results.json'}")
    if (obstacle := obstacle_to(path)) is not None:
        raise ReportError(f"results cannot be written to {path}: {obstacle}; name another file with -o")


class ResultFile:
    """The results of one measurement, in memory and in a file.

    Attributes:
        values: the results, plain values for JSON.
        path: the file, or None to keep them in memory alone.
        resumed: whether the file held some of them already.
    """

    def __init__(
        self,
        path: Path | None,
        command: str,
        key: str,
        initial: Mapping[str, Any],
        rows: Callable[[Mapping[str, Any]], Rows],
        force: bool = False,
    ) -> None:
        """Take up what the file holds, and check that it can be written.

        Args:
            path: the file, .json, or None.
            command: the command that the results are of.
            key: which measurement they are of, by `key_of`.
            initial: the results before the first measurement.
            rows: makes the table of the results; all rows have the same keys.
            force: begin anew where the file holds something else.

        Raises:
            ReportError: if the file holds something else, without `force`, or cannot be written.
        """
        from quartermap_deploy import __version__

        self.path, self._rows = path, rows
        self.values: dict[str, Any] = {
            "command": command,
            "format": FORMAT,
            "key": key,
            "complete": False,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "version": __version__,
            **initial,
        }
        self.resumed = False
        if path is None:
            return
        check_place(path)
        if path.exists():
            self._take_up(path, force)
        try:
            self._write()
        except OSError as error:
            raise ReportError(
                f"results cannot be written to {path}: {error.strerror or error}; name another file with -o"
            ) from error

    def _take_up(self, path: Path, force: bool) -> None:
        try:
            found = read_json(path)
            known = {name: found[name] for name in ("command", "format", "key")}
        except (OSError, ReadingError, KeyError, TypeError):
            known, found = {}, {}
        same = all(known.get(name) == self.values[name] for name in ("command", "format", "key"))
        if same and found.keys() >= self.values.keys():
            self.values, self.resumed = found, True
        elif not force:
            what = "results of other settings, model or data" if known else "something else than results"
            raise ReportError(f"{path} holds {what}; name another file with -o, or replace it with --force")

    def save(self) -> None:
        """Write what there is so far. If that fails, as on a full disk, the files stay what they were."""
        try:
            self._write()
        except OSError:
            # The measurement goes on: `finish` tries again, and says so if it is in vain.
            return

    def finish(self) -> None:
        """Write the complete results.

        Raises:
            ReportError: if they cannot be written; `values` has them.
        """
        self.values["complete"] = True
        try:
            self._write()
        except OSError as error:
            raise ReportError(
                f"the results cannot be written to {self.path}: {error.strerror or error}. The file has what was "
                "measured until then; make room, and the same command goes on from it"
            ) from error

    def _write(self) -> None:
        if self.path is None:
            return
        with folders_for(self.path):
            write_whole(self.path, encoded(json.dumps(self.values, indent=2, ensure_ascii=False) + "\n"))
            write_whole(self.path.with_suffix(".csv"), encoded(_table(self._rows(self.values))))


def _table(rows: Rows) -> str:
    """Comma-separated values with a line of headings; a None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if rows:
        writer.writerow(rows[0])
    writer.writerows(["" if cell is None else cell for cell in row.values()] for row in rows)
    return text.getvalue()
