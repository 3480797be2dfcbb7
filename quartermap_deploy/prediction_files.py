"""Predictions as plain values and as files, in a folder that is written whole or not at all.

predictions.json    what was run on what, and for each image what came out
classes.csv         classification: a line for each class of each image
classes.jsonl       the same as JSON, a line for each image
NAME.png            segmentation: the mask, whose pixels are the classes, with a palette
NAME.png            image: the image, where the scale of its values is known
NAME.npz            the arrays of every other output, by name
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.bundle import MANIFEST, write_json
from quartermap_deploy.errors import PredictionError
from quartermap_deploy.files import FolderKind, file_hash
from quartermap_deploy.pictures import mask_png, png
from quartermap_deploy.plain_text import encoded
from quartermap_deploy.predicting import Broken, Classes, Mask, Picture, Prediction, Predictor

FORMAT = 1
INDEX, CSV_FILE, LINES_FILE = "predictions.json", "classes.csv", "classes.jsonl"
FOLDER = FolderKind("folder of predictions", INDEX, PredictionError)
LONGEST = 200
"""Letters of an image's name that the name of its file begins with."""


class PredictionFolder:
    """A folder of predictions that is being written."""

    def __init__(self, folder: Path, predictor: Predictor) -> None:
        """Begin.

        Args:
            folder: an empty one.
            predictor: what predicts.
        """
        self._folder, self._predictor = folder, predictor
        self._entries: list[dict[str, Any]] = []
        self._taken: set[str] = set()
        self._scores: list[Classes] = []

    def add(self, prediction: Prediction) -> str | None:
        """Write a prediction; returns the name of its file, if it has one of its own."""
        name = self._write(prediction)
        self._entries.append({**described(prediction), **({} if name is None else {"file": name})})
        return name

    def finish(self, broken: Sequence[Broken]) -> None:
        """Write what is about all predictions.

        Args:
            broken: the images that nothing was predicted of.
        """
        if self._predictor.bundle.task == "classification":
            (self._folder / CSV_FILE).write_bytes(encoded(_csv(self._scores)))
            lines = [json.dumps(described(one), ensure_ascii=False) + "\n" for one in self._scores]
            (self._folder / LINES_FILE).write_bytes(encoded("".join(lines)))
        values = {"format": FORMAT, **provenance(self._predictor), "images": self._entries}
        write_json(self._folder / INDEX, {**values, "broken": [described_broken(one) for one in broken]})

    def _write(self, prediction: Prediction) -> str | None:
        if isinstance(prediction, Classes):
            self._scores.append(prediction)
            return None
        if isinstance(prediction, Mask):
            return self._file(prediction.source, ".png", mask_png(prediction.mask))
        if isinstance(prediction, Picture):
            if prediction.pixels is not None:
                from PIL import Image

                return self._file(prediction.source, ".png", png(Image.fromarray(prediction.pixels)))
            name = self._predictor.bundle.outputs[0].name
            return self._file(prediction.source, ".npz", npz({name: prediction.values}))
        return self._file(prediction.source, ".npz", npz(prediction.arrays))

    def _file(self, source: str, suffix: str, data: bytes) -> str:
        """Write a file that is named after an image; images of one name in several folders get numbers."""
        stem = Path(source).stem[:LONGEST]
        number, name = 1, stem
        # Some file systems do not tell large and small letters apart.
        while name.casefold() in self._taken:
            number, name = number + 1, f"{stem}_{number + 1}"
        self._taken.add(name.casefold())
        (self._folder / f"{name}{suffix}").write_bytes(data)
        return f"{name}{suffix}"


def provenance(predictor: Predictor) -> dict[str, Any]:
    """What a predictor runs, and how, as plain values."""
    bundle = predictor.bundle
    return {
        "bundle": {
            "name": bundle.path.resolve().name,
            "model": bundle.manifest["model"]["name"],
            "manifest_sha256": file_hash(bundle.path / MANIFEST),
        },
        "task": bundle.task,
        "target": predictor.target,
        "providers": None
        if (placement := predictor.session.placement) is None
        else list(placement.providers),
        "preprocessing": predictor.interface.preprocessing.to_dict(),
        "labels": list(predictor.labels),
    }


def described(prediction: Prediction) -> dict[str, Any]:
    """A prediction as plain values; of arrays their shapes and ranges."""
    source: dict[str, Any] = {"source": prediction.source}
    if isinstance(prediction, Classes):
        scores = [
            {"class": one.index, "label": one.label, "probability": one.probability}
            for one in prediction.scores
        ]
        return {**source, "classes": scores}
    if isinstance(prediction, Mask):
        parts = [
            {"class": index, "label": prediction.labels[index], "share": share}
            for index, share in prediction.shares.items()
        ]
        return {**source, "size": list(prediction.mask.shape), "classes": parts}
    if isinstance(prediction, Picture):
        return {**source, **array_facts(prediction.values)}
    return {**source, "outputs": {name: array_facts(values) for name, values in prediction.arrays.items()}}


def described_broken(broken: Broken) -> dict[str, str]:
    """A broken image as plain values."""
    return {"source": broken.source, "reason": broken.reason}


def array_facts(values: NDArray[Any]) -> dict[str, Any]:
    """Shape, type and range of an array; without a range where it has no finite values."""
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    smallest, largest = (finite.min().item(), finite.max().item()) if finite.size else (None, None)
    return {"shape": list(values.shape), "type": values.dtype.name, "min": smallest, "max": largest}


def npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return arrays as an .npz file; unlike `np.savez` it takes every name, such as "file"."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, values, allow_pickle=False)
    return file.getvalue()


def _csv(scores: Sequence[Classes]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "rank", "class", "label", "probability"])
    for one in scores:
        for rank, score in enumerate(one.scores, 1):
            writer.writerow([one.source, rank, score.index, score.label, repr(score.probability)])
    return text.getvalue()
