"""Ablations of QuarterMap, as in the appendix of its paper: what each of its choices costs and saves.

    groups of variants → for each: correctness → speed, in turns with the unpruned model → accuracy → results

The groups:

    every      k from 1 to 6
    stage      the blocks of one stage alone, all of them
    stride     of every s rows and columns the first n are kept, at every k-th block
    upsample   nearest, bilinear and bicubic, at every k-th block
    form       the pruned graph in the paper's canonical form, with the Slice hoisted, with the Resize sunk, and with
               both: these compute the same numbers, so their accuracy is one; in ONNX Runtime alone

All variants of a group are timed in turns, in one process, together with the unpruned model. Results are written after
each group; the same command goes on from what there is. Groups may be asked for one after the other.

The results, plain values for JSON; what is not explained is as in `compare`:

    command ("ablate"), format, key, complete, created, version, versions, machine, model, target, device, threads,
    repeats, data, notes
    every         k of the groups stride, upsample and form
    batch         images per call
    groups        a list; each
        name        as above
        title       in words
        variants    a list, the unpruned model first; each
            name, method, plan, form, blocks, tokens, flops, nodes, parity, accuracy
            setting     what the variant stands for in its group: "3", "stage 2", "3, keep 1", "bicubic", "sunk"
            median_ms, minimum_ms, maximum_ms, images_per_second, speed, speed_quartiles
            time_ratio  median over the rounds of its time as a part of the unpruned model's
    skipped       group, name and reason of each variant that this model cannot have
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.bench import measured
from quartermap_deploy.errors import InputError, PlanError, UnknownNameError
from quartermap_deploy.evaluation.resumable import ResultFile, Rows, key_of
from quartermap_deploy.evaluation.runs import TORCH, weights_hash
from quartermap_deploy.evaluation.variants import FORMS, UNPRUNED, Builder, Variant
from quartermap_deploy.evaluation.workbench import TARGETS, Workbench, prepare_subject, variant_entry
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.pruning.plan import UPSAMPLE_MODES, QuarterMap
from quartermap_deploy.recipe import Recipe

if TYPE_CHECKING:
    from quartermap_deploy.evaluation.datasets import Dataset

GROUPS = {
    "every": "every k-th block",
    "stage": "the blocks of one stage alone",
    "stride": "stride and keep",
    "upsample": "upsampling",
    "form": "form of the graph",
}
"""Titles of the groups, by name, in the order in which they are measured."""
EVERY = range(1, 7)
STRIDES = ((2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3))
"""Pairs of stride and keep."""


@dataclass(frozen=True)
class AblateOptions:
    """What is measured, and how.

    Attributes:
        groups: keys of `GROUPS`.
        every: k of the groups stride, upsample and form; None takes the recipe's, or 3.
        batch: images per call.
        target: "onnxruntime" or "torch".
        repeats: timed rounds.
        threads: of ONNX Runtime; None takes the environment's, or all cores.
        eval_batch: images per call when the accuracy is measured.
        workers: threads that read images.

    Raises:
        InputError: if a value is out of range.
        UnknownNameError: if there is no such group or target.
    """

    groups: tuple[str, ...] = tuple(GROUPS)
    every: int | None = None
    batch: int = 1
    target: str = TARGETS[0]
    repeats: int = 15
    threads: int | None = None
    eval_batch: int = 32
    workers: int = 1

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UnknownNameError.for_choice("target", self.target, TARGETS)
        for name in self.groups:
            if name not in GROUPS:
                raise UnknownNameError.for_choice("group of ablations", name, GROUPS)
        for name in ("every", "batch", "repeats", "eval_batch", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} = {value} must be at least 1")


@dataclass(frozen=True)
class Ablation:
    """One variant of a group.

    Attributes:
        setting: what it stands for in its group.
        variant: the variant.
    """

    setting: str
    variant: Variant


def ablate(
    recipe: Recipe,
    options: AblateOptions | None = None,
    dataset: Dataset | None = None,
    *,
    out: Path | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> ResultFile:
    """Measure the ablations of a model.

    Args:
        recipe: the model. Its plan, if it has one, gives whatever a group does not vary; where it names blocks, these
            are what the groups stride, upsample and form prune.
        options: what is measured.
        dataset: images with labels, for the accuracy; None for none.
        out: file for the results, .json; a table .csv is written beside it.
        force: replace a file of other results.
        progress: told about the steps.

    Returns:
        The results, of which `values` are described above. They are not marked complete yet: call `finish`.

    Raises:
        ParityError: if a variant departs from its PyTorch model by more than the tolerance.
        ReportError: if the results cannot be written, or something else is in their place.
        InputError: if the data's classes are not the model's, or no image can be read.
        RecipeError: if the recipe is of no classifier of a card, or asks for another precision than float32, or open
            sizes.
        QuartermapError: of the kind that fits, if the model cannot be loaded or exported.
    """
    options = options or AblateOptions()
    builder, dataset, description = prepare_subject(
        recipe, options.target, options.threads, dataset, progress
    )
    base = recipe.quartermap or QuarterMap()
    if options.every is not None:
        base = dataclasses.replace(base, every=options.every, blocks=None)
    settings = {
        "every": None if base.blocks is not None else base.every,
        "batch": options.batch,
        "repeats": options.repeats,
    }
    key = key_of(
        {
            **{name: description[name] for name in ("model", "target", "device", "threads", "data")},
            **settings,
            "weights": weights_hash(builder.model),
            "plan": base.to_dict(),
            "eval_batch": options.eval_batch,
        }
    )
    initial = {**description, **settings, "groups": [], "skipped": []}
    results = ResultFile(out, "ablate", key, initial, rows, force)
    for name in GROUPS:
        if name in options.groups and name not in {group["name"] for group in results.values["groups"]}:
            _measure(name, base, builder, options, dataset, results, progress)
    return results


def ablations(name: str, base: QuarterMap, depths: Sequence[int]) -> list[Ablation]:
    """Return the variants of a group.

    Args:
        name: of the group.
        base: gives what the group does not vary.
        depths: blocks per stage of the model.
    """
    if name == "every":
        plans = {str(every): dataclasses.replace(base, every=every, blocks=None) for every in EVERY}
        return [_ablation(f"k = {every}", every, plan) for every, plan in plans.items()]
    if name == "stage":
        ends = [sum(depths[: stage + 1]) for stage in range(len(depths))]
        blocks = [tuple(range(end - depth + 1, end + 1)) for end, depth in zip(ends, depths, strict=True)]
        return [
            _ablation(f"stage {stage}", f"stage {stage}", dataclasses.replace(base, every=None, blocks=own))
            for stage, own in enumerate(blocks, start=1)
        ]
    if name == "stride":
        return [
            _ablation(
                f"keep {keep} of {stride}",
                f"{stride}, keep {keep}",
                dataclasses.replace(base, stride=stride, keep=keep),
            )
            for stride, keep in STRIDES
        ]
    if name == "upsample":
        modes: tuple[Any, ...] = UPSAMPLE_MODES
        return [_ablation(mode, mode, dataclasses.replace(base, upsample=mode)) for mode in modes]
    return [_ablation(form, form, base, form) for form in FORMS]


def _ablation(name: str, setting: str, plan: QuarterMap, form: str | None = None) -> Ablation:
    variant = Variant(name, "quartermap", plan)
    return Ablation(setting, variant if form is None else dataclasses.replace(variant, form=form))


def _measure(
    name: str,
    base: QuarterMap,
    builder: Builder,
    options: AblateOptions,
    dataset: Dataset | None,
    results: ResultFile,
    progress: Progress,
) -> None:
    """Measure one group and add it to the results."""
    values = results.values
    values["complete"] = False
    # What a group that is measured anew skips is said anew.
    values["skipped"] = [entry for entry in values["skipped"] if entry["group"] != name]
    depths = builder.model.depths
    chosen = []
    for ablation in ablations(name, base, depths):
        try:
            if name == "form" and options.target == TORCH:
                raise PlanError(
                    "it is a form of the graph, and PyTorch runs none; take the target onnxruntime"
                )
            ablation.variant.blocks(depths)
            chosen.append(ablation)
        except PlanError as error:
            values["skipped"].append({"group": name, "name": ablation.variant.name, "reason": str(error)})
    if not chosen:
        results.save()
        return
    chosen.insert(0, Ablation(UNPRUNED.name, UNPRUNED))
    variants = [ablation.variant for ablation in chosen]
    with Workbench(builder, variants, options.target, options.threads, progress) as bench:
        bench.prepare()
        values["notes"] += [note for note in bench.notes if note not in values["notes"]]
        timings = bench.time(options.batch, options.repeats)
        entries: list[dict[str, Any]] = []
        for ablation, checked in zip(chosen, bench.checked, strict=True):
            entry = {
                "setting": ablation.setting,
                **variant_entry(ablation.variant, builder, options.target),
                **checked,
            }
            timing, unpruned = timings[ablation.variant.name], timings[UNPRUNED.name]
            entry |= _timing(timing, unpruned, options.batch)
            entry["accuracy"] = _known_accuracy(entry, [*values["groups"], {"variants": entries}])
            if entry["accuracy"] is None and dataset is not None:
                entry["accuracy"] = bench.accuracy(
                    ablation.variant.name, dataset, options.eval_batch, options.workers
                )
            entries.append(entry)
    values["groups"].append({"name": name, "title": GROUPS[name], "variants": entries})
    values["groups"].sort(key=lambda group: list(GROUPS).index(group["name"]))
    results.save()


def _timing(timing: Any, unpruned: Any, batch: int) -> dict[str, Any]:
    return {**measured(timing, unpruned, batch), "time_ratio": timing.ratio(unpruned)}


def _known_accuracy(entry: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> Any:
    """The accuracy of the same blocks pruned in the same way, if it was measured before, whatever the form."""

    def identity(variant: Mapping[str, Any]) -> Any:
        plan = variant["plan"] or {}
        return variant["blocks"], [plan.get(name) for name in ("stride", "keep", "upsample")]

    for group in groups:
        for other in group["variants"]:
            if other["accuracy"] is not None and identity(other) == identity(entry):
                return other["accuracy"]
    return None


def rows(values: Mapping[str, Any]) -> Rows:
    """Return the table of results: a row for each group and variant."""
    found = []
    for group in values["groups"]:
        for entry in group["variants"]:
            accuracy, parity, plan = entry["accuracy"] or {}, entry["parity"] or {}, entry["plan"] or {}
            found.append(
                {
                    "model": values["model"]["name"],
                    "target": values["target"],
                    "batch": values["batch"],
                    "group": group["name"],
                    "variant": entry["name"],
                    "setting": entry["setting"],
                    "blocks": " ".join(map(str, entry["blocks"])),
                    "stride": plan.get("stride"),
                    "keep": plan.get("keep"),
                    "upsample": plan.get("upsample"),
                    "form": entry["form"],
                    "tokens": entry["tokens"],
                    "flops": entry["flops"],
                    "top1": accuracy.get("top1"),
                    "top5": accuracy.get("top5"),
                    "median_ms": entry["median_ms"],
                    "images_per_second": entry["images_per_second"],
                    "speed": entry["speed"],
                    "speed_low": entry["speed_quartiles"][0],
                    "speed_high": entry["speed_quartiles"][1],
                    "time_ratio": entry["time_ratio"],
                    "parity_error": parity.get("relative_error"),
                }
            )
    return found
