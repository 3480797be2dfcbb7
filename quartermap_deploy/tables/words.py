"""Sizes, counts, times, errors, plans and weights in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quartermap_deploy.data.preprocessing import Preprocessing

WEIGHTS = {
    "checkpoint": "from a checkpoint",
    "included": "those that come with the package",
    "new": "newly initialised, not trained",
    "given": "those that the module had",
}
SHOWN_LABELS = 4
"""Names of classes that are shown where there are more."""


def size_text(size: Sequence[int | str]) -> str:
    """Return 14x14 for (14, 14)."""
    return "x".join(str(side) for side in size)


def count_text(count: float) -> str:
    """Return 4.9 G for 4.9e9: three digits and a prefix."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return (
                f"{count / factor:.3g} {unit}" if count < 999.5 * factor else f"{count / factor:.0f} {unit}"
            )
    return f"{count:g}"


def ranges(numbers: Sequence[int]) -> str:
    """Return 3, 5–8 for 3, 5, 6, 7, 8."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def error_text(error: float | None) -> str:
    """Return a relative error with two digits."""
    return "–" if error is None else f"{error:.1e}"


def worst_error(report: Mapping[str, Any]) -> float | None:
    """Return the largest relative error of a parity report, or None if an output could not be compared."""
    errors = [output["relative_error"] for case in report["cases"] for output in case["outputs"]]
    return None if None in errors else max(errors, default=None)


def plan_text(plan: Mapping[str, Any] | None) -> str | None:
    """Return a QuarterMap plan in words, or None if there is none."""
    if plan is None:
        return None
    excluded = ", ".join(map(str, plan["exclude_stages"]))
    outside = f" outside stage {excluded}" if excluded else ""
    blocks = "named blocks" if "blocks" in plan else f"every = {plan['every']}{outside}"
    return (
        f"{blocks}; keep {plan['keep']} of {plan['stride']} rows and columns, restore by {plan['upsample']}"
    )


def weights_text(model: Mapping[str, Any]) -> str:
    """Return in words where the weights of a manifest's model come from, and what has to be said about them."""
    text = WEIGHTS.get(model["weights"], str(model["weights"]))
    if model["weights"] == "checkpoint" and model.get("weights_file"):
        text = f"from the checkpoint {model['weights_file']}"
    if model["weights"] != "new" and model.get("head") == "new":
        text += f"; the last layer, for {model['num_classes']} classes, newly initialised"
    return "; ".join((text, *model.get("notes", ())))


def tensor_text(item: Mapping[str, Any]) -> str:
    """Return "images (batch, 3, 64, 64)" for an input or output of a manifest, with its type if that is not float32."""
    kind = "" if item["type"] == "float32" else f" {item['type']}"
    return f"{item['name']} ({', '.join(map(str, item['shape']))}){kind}"


def task_text(manifest: Mapping[str, Any]) -> str:
    """Return "classification, 10 classes: 0, 1, 2, 3 and 6 more" for a manifest."""
    count, names = manifest["model"].get("num_classes"), manifest["labels"]
    if count is None:
        return str(manifest["task"])
    return f"{manifest['task']}, {count:,} classes: {names_text(names) or 'without names'}"


def names_text(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    rest = len(names) - SHOWN_LABELS
    return ", ".join(names[:SHOWN_LABELS]) + (f" and {rest:,} more" if rest > 0 else "")


def preprocessing_text(preprocessing: Preprocessing | None) -> str:
    """Return how an image becomes the input, in words."""
    if preprocessing is None:
        return "not said: it takes arrays alone"
    crop, resize = size_text(preprocessing.crop), size_text(preprocessing.resize)
    cut = "" if crop == resize else f", cropped to {crop}"
    scale = preprocessing.scale
    factor = f"1/{1 / scale:.6g}" if scale < 1 else f"{scale:.6g}"
    mean, std = (
        ", ".join(f"{value:.6g}" for value in values) for values in (preprocessing.mean, preprocessing.std)
    )
    return (
        f"{preprocessing.color}, resized to {resize} ({preprocessing.fit}, {preprocessing.interpolation}){cut}, times "
        f"{factor}, mean {mean}, std {std}"
    )


def origin_text(manifest: Mapping[str, Any]) -> str:
    """Return where the model of a manifest comes from."""
    if manifest["model"].get("source") != "module":
        return "a card of this package"
    module = manifest["recipe"].get("module")
    maker = "" if module is None else f", made by {module['factory']}"
    return f"a module of the user's{maker}"


def reference_text(manifest: Mapping[str, Any], report: Mapping[str, Any]) -> str | None:
    """Return what a module of the user's was compared with outside this machine; None for a model of a card."""
    if manifest["model"].get("source") != "module":
        return None
    given = report.get("given_reference")
    if given is None:
        return (
            "none was given: parity is with PyTorch on this machine, which computes the module's scans as this package "
            "reads them, so that reading is proved against nothing else"
        )
    errors = [output["relative_error"] for output in given["outputs"]]
    outputs = "output" if len(errors) == 1 else "outputs"
    return (
        f"given: the unpruned graph gives what was saved elsewhere, {len(errors)} {outputs}, "
        f"worst error {error_text(max(errors))} of the largest value, tolerance {given['tolerance']['relative']:.0e}"
    )


def speed_text(speed: float | None, quartiles: Sequence[float] | None) -> str | None:
    """Return 1.10 × [1.08 – 1.12], or None."""
    if speed is None:
        return None
    return f"{speed:.2f} ×" + (f" [{quartiles[0]:.2f} – {quartiles[1]:.2f}]" if quartiles else "")


def milliseconds(value: float | None) -> str | None:
    """Return a time with one digit after the point, or None."""
    return None if value is None else f"{value:.1f}"


def rate_text(value: float) -> str:
    """Return images per second with three digits at least."""
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def how_measured(values: Mapping[str, Any], more: str = "") -> list[object]:
    """Return what is said below tables of speeds and accuracies; `more` goes between the threads and the rounds."""
    where = f"{values['target']} on the {values['device'].upper()}, {values['threads']} threads{more}"
    said: list[object] = [
        f"Speed: {where}, {values['repeats']} rounds in turns; in brackets the quartiles of the rounds."
    ]
    data = values["data"]
    if data is not None:
        said.append(f"Accuracy: {data['images']:,} images of {data['name']}.")
    return said
