"""The unpruned model, QuarterMap and ToMe, compared in one run: the tables 1 and 2 of the QuarterMap paper.

    variants → correctness → speed, in turns → accuracy → time in the scan

No speed is measured before every variant was shown to compute what its PyTorch model computes. All variants are timed
in turns, in one process. Results are written after each part; the same command goes on from what there is.

The results, plain values for JSON:

    command       "compare"
    format        1
    key           hash of model, weights, data and settings
    complete      whether all parts are there
    created       when the measurement began, ISO 8601 in UTC
    version       of quartermap-deploy
    versions      of Python and packages
    machine       system, processor, cores, gpu
    model         name, title, weights ("checkpoint", "included" or "new"), trained, num_classes,
                  input_size [H, W], depths (blocks per stage)
    target        "onnxruntime" or "torch"
    device        "cpu" or "cuda"
    threads       of ONNX Runtime or PyTorch on a CPU
    repeats       timed rounds
    data          name, images, fingerprint; null without data
    variants      a list, unpruned first; each
        name        "unpruned", "QuarterMap k = 3", "ToMe k = 3", …
        method      "unpruned", "quartermap" or "tome"
        plan        QuarterMap plan, or null
        form        of the pruned graph: "hoisted and sunk" or "canonical"; null for other methods and in PyTorch
        blocks      numbers of the changed blocks
        tokens      positions that all scans walk, for one image
        flops       multiply-accumulates for one image, as `complexity` counts them; of ToMe with its similarities
        nodes       of the main graph; null in PyTorch
        scans       what computes its scans, such as "native (avx2)" or "portable"; null in PyTorch
        parity      relative_error and tolerance of the logits, on how many images, and of how many of them ToMe merged
                    other tokens, because similarities are equal up to rounding; null where PyTorch on the CPU is timed
        accuracy    top1, top5, images, per_class, broken, …, as `quartermap eval` has them; null without data
    timings       a list, one entry for each batch size; each
        batch       images per call
        variants    a list in the order above; each
            name
            median_ms, minimum_ms, maximum_ms   of one call
            images_per_second
            speed, speed_quartiles              relative to the unpruned model, 2 for twice as fast
            speed_to_tome, speed_to_tome_quartiles   of QuarterMap, relative to ToMe in the same blocks; else null
            profiled_ms                         of one recorded call, which takes longer; null, as the two below, until
                                                calls were recorded
            scan_ms, scan_share                 of median_ms in the scans, by their share of what was recorded
            portable                            where the native operator runs the scans: median_ms, images_per_second
                                                in the portable form, speed and speed_quartiles relative to the
                                                unpruned model in that form; else null
            added_ms                            likewise in what QuarterMap (Slice, Resize) or ToMe (matching, merging,
                                                unmerging) adds to a block
    skipped       name and reason of each variant that this model cannot have
    notes         what has to be known before the numbers are believed
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.bench import Timing, measured
from quartermap_deploy.errors import InputError, PlanError, UnknownNameError
from quartermap_deploy.evaluation.resumable import ResultFile, Rows, key_of
from quartermap_deploy.evaluation.runs import TORCH, weights_hash
from quartermap_deploy.evaluation.variants import UNPRUNED, Variant
from quartermap_deploy.evaluation.workbench import (
    ONNXRUNTIME,
    TARGETS,
    Workbench,
    portable_name,
    prepare_subject,
    variant_entry,
)
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.pruning.plan import QuarterMap
from quartermap_deploy.recipe import Recipe

if TYPE_CHECKING:
    from quartermap_deploy.evaluation.datasets import Dataset


@dataclass(frozen=True)
class CompareOptions:
    """What is compared, and how.

    Attributes:
        every: the k of the pruned variants; ToMe merges in the blocks of the first.
        batches: images per call.
        target: "onnxruntime" or "torch".
        tome: compare with ToMe.
        canonical: also time the first k in the paper's form, Slice before and Resize after the scan.
        portable: time each variant in the portable form, too, where the native operator runs its scans.
        repeats: timed rounds.
        profile_repeats: recorded calls for the time in the scan; 0 for none.
        threads: of ONNX Runtime; None takes the environment's, or all cores.
        eval_batch: images per call when the accuracy is measured.
        workers: threads that read images.

    Raises:
        InputError: if a value is out of range.
        UnknownNameError: if there is no such target.
    """

    every: tuple[int, ...] = (3, 2)
    batches: tuple[int, ...] = (1, 8)
    target: str = ONNXRUNTIME
    tome: bool = True
    canonical: bool = False
    portable: bool = True
    repeats: int = 15
    profile_repeats: int = 5
    threads: int | None = None
    eval_batch: int = 32
    workers: int = 1

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UnknownNameError.for_choice("target", self.target, TARGETS)
        for name in ("every", "batches"):
            values = getattr(self, name)
            if not values or min(values) < 1 or len(set(values)) != len(values):
                raise InputError(f"{name} = {values}; expected different numbers of at least 1")
        for name in ("repeats", "eval_batch", "workers"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.profile_repeats < 0:
            raise InputError(f"profile_repeats = {self.profile_repeats} must be at least 0")
        if self.canonical and self.target == TORCH:
            raise InputError("the canonical form is one of the graph; in PyTorch there is no other")


def compare(
    recipe: Recipe,
    options: CompareOptions | None = None,
    dataset: Dataset | None = None,
    *,
    out: Path | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> ResultFile:
    """Compare the variants of a model.

    Args:
        recipe: the model. Its plan, if it has one, gives stride, keep, upsampling and excluded stages; which blocks are
            pruned is decided by the options, and a plan of named blocks is one more variant.
        options: what is compared.
        dataset: images with labels, for the accuracy; None for none.
        out: file for the results, .json; a table .csv is written beside it.
        force: replace a file of other results.
        progress: told about the steps.

    Returns:
        The results, of which `values` are described above. They are not marked complete yet: call `finish`.

    Raises:
        ParityError: if a variant departs from its PyTorch model by more than the tolerance; nothing is timed then.
        ReportError: if the results cannot be written, or something else is in their place.
        InputError: if the data's classes are not the model's, or no image can be read.
        RecipeError: if the recipe is of no classifier of a card, or asks for another precision than float32, or open
            sizes.
        QuartermapError: of the kind that fits, if the model cannot be loaded or exported.
    """
    return _Comparison(recipe, options or CompareOptions(), dataset, progress).run(out, force)


def variants_of(
    plan: QuarterMap | None, depths: tuple[int, ...], options: CompareOptions
) -> tuple[list[Variant], list[dict[str, str]]]:
    """Return the variants to compare, unpruned first, and those that the model cannot have, with the reason.

    Args:
        plan: the recipe's plan, or None.
        depths: blocks per stage.
        options: what is compared.
    """
    base = plan or QuarterMap()
    plans = {f"k = {every}": dataclasses.replace(base, every=every, blocks=None) for every in options.every}
    first = next(iter(plans))
    candidates = [Variant(f"QuarterMap {name}", "quartermap", plan) for name, plan in plans.items()]
    if plan is not None and plan.blocks is not None:
        candidates.append(Variant("QuarterMap, the recipe's blocks", "quartermap", plan))
    if options.canonical:
        candidates.append(Variant(f"QuarterMap {first}, canonical", "quartermap", plans[first], "canonical"))
    if options.tome:
        candidates.append(Variant(f"ToMe {first}", "tome", plans[first]))
    found, skipped = [UNPRUNED], []
    for candidate in candidates:
        try:
            candidate.blocks(depths)
            found.append(candidate)
        except PlanError as error:
            skipped.append({"name": candidate.name, "reason": str(error)})
    return found, skipped


class _Comparison:
    def __init__(
        self, recipe: Recipe, options: CompareOptions, dataset: Dataset | None, progress: Progress
    ) -> None:
        self.options, self.progress = options, progress
        self.builder, self.dataset, description = prepare_subject(
            recipe, options.target, options.threads, dataset, progress
        )
        self.variants, skipped = variants_of(recipe.quartermap, self.builder.model.depths, options)
        self.description = {
            **description,
            "repeats": options.repeats,
            "skipped": skipped,
        }

    def run(self, out: Path | None, force: bool) -> ResultFile:
        key = key_of(
            {
                "model": self.description["model"],
                "weights": weights_hash(self.builder.model),
                "data": self.description["data"],
                "variants": [variant.to_dict() for variant in self.variants],
                **{name: self.description[name] for name in ("target", "device", "threads")},
                # Batches may be added to a file, and workers decide nothing.
                "repeats": self.options.repeats,
                "profile_repeats": self.options.profile_repeats,
                "eval_batch": self.options.eval_batch,
                "portable": self.options.portable,
            }
        )
        entries = [variant_entry(variant, self.builder, self.options.target) for variant in self.variants]
        unmeasured = {"nodes": None, "scans": None, "parity": None, "accuracy": None}
        variants = [{**entry, **unmeasured} for entry in entries]
        initial = {**self.description, "variants": variants, "timings": []}
        results = ResultFile(out, "compare", key, initial, rows, force)
        self._measure(results)
        return results

    def _measure(self, results: ResultFile) -> None:
        values, options = results.values, self.options
        timed = {entry["batch"]: entry for entry in values["timings"]}
        untimed = [batch for batch in options.batches if batch not in timed]
        # Other providers put many nodes into one, and their profiles do not tell which of it is a scan.
        recorded_here = options.target == TORCH or self.builder.recipe.execution.on_cpu
        profile = options.profile_repeats > 0 and recorded_here
        unrecorded = [
            batch
            for batch in options.batches
            if profile and (batch in untimed or timed[batch]["variants"][0]["scan_ms"] is None)
        ]
        unjudged = [
            entry for entry in values["variants"] if self.dataset is not None and entry["accuracy"] is None
        ]
        if not (untimed or unrecorded or unjudged):
            return
        values["complete"] = False
        with Workbench(
            self.builder,
            self.variants,
            options.target,
            options.threads,
            self.progress,
            portable=options.portable,
        ) as bench:
            bench.prepare()
            for entry, checked in zip(values["variants"], bench.checked, strict=True):
                entry |= checked
            # Made anew, as an interrupted run that goes on checks its variants again.
            merged = [note for entry in values["variants"] for note in _merged_otherwise(entry)]
            values["notes"] = [*self.description["notes"], *bench.notes, *merged]
            results.save()
            for batch in untimed:
                timings = bench.time(batch, options.repeats)
                values["timings"].append(_timing_entry(batch, timings, self.variants, values["variants"]))
                values["timings"].sort(key=lambda entry: int(entry["batch"]))
                results.save()
            for entry in unjudged:
                entry["accuracy"] = bench.accuracy(
                    entry["name"], self.dataset, options.eval_batch, options.workers
                )
                results.save()
            for batch in unrecorded:
                (timing,) = (entry for entry in values["timings"] if entry["batch"] == batch)
                medians = {entry["name"]: entry["median_ms"] for entry in timing["variants"]}
                recorded = bench.profile(batch, options.profile_repeats, medians)
                for entry in timing["variants"]:
                    entry |= recorded[entry["name"]]
                results.save()


def _merged_otherwise(entry: Mapping[str, Any]) -> list[str]:
    parity = entry["parity"]
    if parity is None or not parity["otherwise"]:
        return []
    return [
        f"{entry['name']} merges other tokens than in PyTorch on {parity['otherwise']} of {parity['images']} images, "
        "where similarities are equal up to rounding; its time is the same"
    ]


def _timing_entry(
    batch: int,
    timings: Mapping[str, Timing],
    variants: list[Variant],
    entries: list[dict[str, Any]],
) -> dict[str, Any]:
    blocks = {entry["name"]: entry["blocks"] for entry in entries}
    tome = next((variant.name for variant in variants if variant.method == "tome"), None)
    unmeasured = {"profiled_ms": None, "scan_ms": None, "scan_share": None, "added_ms": None}
    found = []
    for variant in variants:
        name = variant.name
        entry = {"name": name, **measured(timings[name], timings[UNPRUNED.name], batch)}
        same = tome is not None and variant.method == "quartermap" and blocks[name] == blocks[tome]
        to_tome = timings[tome] if same and tome is not None else None
        entry["speed_to_tome"] = None if to_tome is None else to_tome.ratio(timings[name])
        entry["speed_to_tome_quartiles"] = (
            None if to_tome is None else list(to_tome.ratio_spread(timings[name]))
        )
        entry["portable"] = _portable_entry(name, timings, batch)
        found.append({**entry, **unmeasured})
    return {"batch": batch, "variants": found}


def _portable_entry(name: str, timings: Mapping[str, Timing], batch: int) -> dict[str, Any] | None:
    timing, first = (timings.get(portable_name(variant)) for variant in (name, UNPRUNED.name))
    if timing is None or first is None:
        return None
    values = measured(timing, first, batch)
    return {key: values[key] for key in ("median_ms", "images_per_second", "speed", "speed_quartiles")}


def rows(values: Mapping[str, Any]) -> Rows:
    """Return the table of results: a row for each batch and variant."""
    variants = {entry["name"]: entry for entry in values["variants"]}
    found = []
    for timing in values["timings"]:
        for entry in timing["variants"]:
            variant = variants[entry["name"]]
            accuracy, parity = variant["accuracy"] or {}, variant["parity"] or {}
            found.append(
                {
                    "model": values["model"]["name"],
                    "target": values["target"],
                    "batch": timing["batch"],
                    "variant": entry["name"],
                    "blocks": " ".join(map(str, variant["blocks"])),
                    "tokens": variant["tokens"],
                    "flops": variant["flops"],
                    "top1": accuracy.get("top1"),
                    "top5": accuracy.get("top5"),
                    "median_ms": entry["median_ms"],
                    "images_per_second": entry["images_per_second"],
                    "speed": entry["speed"],
                    "speed_low": entry["speed_quartiles"][0],
                    "speed_high": entry["speed_quartiles"][1],
                    "speed_to_tome": entry["speed_to_tome"],
                    "scans": variant["scans"],
                    "portable_median_ms": (entry["portable"] or {}).get("median_ms"),
                    "portable_speed": (entry["portable"] or {}).get("speed"),
                    "scan_ms": entry["scan_ms"],
                    "added_ms": entry["added_ms"],
                    "profiled_ms": entry["profiled_ms"],
                    "parity_error": parity.get("relative_error"),
                }
            )
    return found
