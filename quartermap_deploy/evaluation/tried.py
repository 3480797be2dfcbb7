"""What a search for a plan has tried, in memory and in the file beside the recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quartermap_deploy.errors import RecipeError
from quartermap_deploy.evaluation.fidelity import Fidelity
from quartermap_deploy.evaluation.savings import Savings
from quartermap_deploy.evaluation.search import Candidate
from quartermap_deploy.files import folders_for, write_whole
from quartermap_deploy.reading import read_json

FORMAT = 1


class Tried:
    """What was tried, in memory and in the file beside the recipe.

    Attributes:
        path: the file.
        found: how each candidate did on the calibration images.
        savings: what single blocks save, if that was timed.
        savings_key: the settings that it was timed with.
        unpruned: how the unpruned model does, by the fingerprint of the images and whether accuracies were measured.
    """

    def __init__(self, path: Path, key: str, force: bool) -> None:
        """Read the file, if it is there.

        Args:
            path: the file.
            key: what the file has to belong to: model, images, how they are prepared, and labels.
            force: begin anew where the file belongs to something else, or is damaged.

        Raises:
            RecipeError: if the file belongs to something else, without `force`.
        """
        self.path, self.key = path, key
        self.found: dict[Candidate, Fidelity] = {}
        self.savings: Savings | None = None
        self.savings_key: dict[str, Any] = {}
        self.unpruned: dict[tuple[str, bool], Fidelity] = {}
        if path.exists():
            self._read(force)

    def _read(self, force: bool) -> None:
        try:
            values = read_json(self.path)
            if values["format"] == FORMAT and values["key"] == self.key:
                found = {
                    Candidate(tuple(entry["blocks"]), entry["stride"]): _fidelity(entry)
                    for entry in values["tried"]
                }
                # Files of older versions have none.
                unpruned = {
                    (str(entry["images"]), bool(entry["labels"])): _fidelity(entry)
                    for entry in values.get("unpruned", [])
                }
                savings = None if values["savings"] is None else Savings.from_dict(values["savings"])
                # Of a damaged file nothing is taken.
                self.found, self.savings, self.savings_key = found, savings, values["savings_key"]
                self.unpruned = unpruned
                return
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        if not force:
            raise RecipeError(
                f"{self.path} exists and is not what was tried for this model and these images, judged in this way; "
                "choose another recipe, or replace it with --force"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "format": FORMAT,
            "key": self.key,
            "complete": False,
            "savings_key": self.savings_key,
            "savings": None if self.savings is None else self.savings.to_dict(),
            "unpruned": [
                {"images": images, "labels": labels, **fidelity.to_dict()}
                for (images, labels), fidelity in self.unpruned.items()
            ],
            "tried": [
                {"blocks": list(c.blocks), "stride": c.stride, **f.to_dict()} for c, f in self.found.items()
            ],
        }

    def write(self, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write the file, whole or not at all; returns what it holds.

        Raises:
            OSError: if that fails; it is then what it was before.
        """
        values = _finite({**self.to_dict(), **(more or {})})
        with folders_for(self.path):
            write_whole(self.path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())
        return dict(values)


def _fidelity(entry: Mapping[str, Any]) -> Fidelity:
    return Fidelity(entry["agreement"], float(entry["divergence"]), entry["accuracy"])


def _finite(value: Any) -> Any:
    """The value with a word for what JSON has no number for; `float` reads it back."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
