"""Variants of a model side by side: made, compared with PyTorch, timed in turns, judged, and recorded."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.bench import Timing, interleave
from quartermap_deploy.errors import ParityError
from quartermap_deploy.evaluation.runs import TORCH, call_of, on_device, torch_run
from quartermap_deploy.evaluation.subject import load_subject
from quartermap_deploy.evaluation.variants import Builder, Variant, check_comparable
from quartermap_deploy.progress import Progress, Titled
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.targets import load_target

if TYPE_CHECKING:
    from quartermap_deploy.evaluation.accuracy import Run
    from quartermap_deploy.evaluation.datasets import Dataset
    from quartermap_deploy.targets.placement import Placement

ONNXRUNTIME = "onnxruntime"
TARGETS = (ONNXRUNTIME, TORCH)
CHECKED_IMAGES = 2
"""Real images on which every variant is compared with PyTorch before it is timed."""
MERGED_IMAGES = 8
"""The same for ToMe. Where similarities are equal up to rounding it merges other tokens, and PyTorch itself does so
when the image changes by 1e-6; that takes single images, while a fault of the export takes all."""


def prepare_subject(
    recipe: Recipe, target: str, threads: int | None, dataset: Dataset | None, progress: Progress
) -> tuple[Builder, Dataset | None, dict[str, Any]]:
    """Load the model that is to be measured.

    Args:
        recipe: of the model.
        target: what is to run it.
        threads: of ONNX Runtime; None takes the environment's, or all cores.
        dataset: images with labels, or None.
        progress: told about it.

    Returns:
        What makes the variants, the data with its classes as the model counts them, and what results say about where
        they come from.

    Raises:
        InputError: if the data's classes are not the model's.
        RecipeError: if the recipe is of no classifier of a card, or asks for another precision than float32, or open
            sizes.
        QuartermapError: of the kind that fits, if the model cannot be loaded.
    """
    check_comparable(recipe)
    if target == ONNXRUNTIME:
        load_target(ONNXRUNTIME).check(recipe)
    source = load_subject(dataclasses.replace(recipe, dynamic_batch=True), progress)
    if dataset is not None:
        dataset = dataset.for_model(source.module.num_classes, source.labels)
    builder = Builder(recipe, source)
    return builder, dataset, _describe(recipe, builder, target, threads, dataset)


def _describe(
    recipe: Recipe, builder: Builder, target: str, threads: int | None, dataset: Dataset | None
) -> dict[str, Any]:
    from quartermap_deploy.machine import describe_machine
    from quartermap_deploy.manifest import versions
    from quartermap_deploy.targets.onnxruntime.threads import default_threads

    source = builder.source
    return {
        "versions": versions(),
        "machine": describe_machine(),
        "model": {
            "name": source.name,
            "title": source.title,
            "weights": source.weights.source,
            "trained": source.weights.trained,
            "num_classes": source.module.num_classes,
            "input_size": list(source.size),
            "depths": list(source.depths),
        },
        "target": target,
        "device": _device(target) if recipe.execution.on_cpu else str(recipe.execution),
        "threads": threads or (default_threads() if target == ONNXRUNTIME else _torch_threads()),
        "data": None
        if dataset is None
        else {"name": dataset.name, "images": len(dataset), "fingerprint": dataset.fingerprint},
        "notes": _notes(source.weights.trained, recipe, dataset),
    }


def variant_entry(variant: Variant, builder: Builder, target: str) -> dict[str, Any]:
    """Return what results say about a variant before it is measured."""
    cost = builder.cost(variant)
    return {
        **variant.to_dict(),
        **({} if target == ONNXRUNTIME else {"form": None}),
        "blocks": list(variant.blocks(builder.model.depths)),
        "tokens": cost.tokens,
        "flops": cost.flops,
    }


def _device(target: str) -> str:
    if target == ONNXRUNTIME:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _notes(trained: bool, recipe: Recipe, dataset: Dataset | None) -> list[str]:
    notes = []
    if not trained:
        notes.append(
            f"{recipe.model} has newly initialised weights (seed {recipe.seed}): they decide no time, so the speeds "
            "hold for trained ones too" + ("" if dataset is None else ", but the accuracies mean nothing")
        )
    if dataset is None:
        notes.append("no accuracy was measured, as no images with labels were given")
    else:
        notes += dataset.warnings
    return notes


def portable_name(variant: str) -> str:
    """What a variant is called whose scans run in the portable form beside the native one."""
    return f"{variant}, portable"


class Workbench:
    """Variants of a model, ready to run side by side.

    In ONNX Runtime their scans run by the native operator where it can be had, as everywhere.

    Args:
        builder: makes them.
        variants: unpruned first.
        target: "onnxruntime" or "torch".
        threads: of ONNX Runtime, or None.
        progress: told about the steps.
        portable: hold each variant whose scans the native operator runs ready in the portable form, too.

    Attributes:
        notes: what the user should know about the providers that run the variants.
        checked: for each variant, in order, its nodes, what computes its scans, and its parity, for the results.
    """

    def __init__(
        self,
        builder: Builder,
        variants: list[Variant],
        target: str,
        threads: int | None,
        progress: Progress,
        *,
        portable: bool = False,
    ) -> None:
        self.builder, self.variants, self.target, self.threads = builder, variants, target, threads
        self.progress, self._with_portable = progress, portable
        self.checked: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._runs: dict[str, Run] = {}
        self._portable: dict[str, Run] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="quartermap-")

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *exception: object) -> None:
        self._runs = self._portable = {}
        self._folder.cleanup()

    def prepare(self) -> None:
        """Build the variants and check each against its PyTorch model.

        Raises:
            ParityError: if one departs by more than the tolerance.
        """
        for variant in self.variants:
            nodes = scans = None
            if self.target == ONNXRUNTIME:
                nodes = self._write(variant)
                scans = self._open(variant)
            else:
                self._runs[variant.name] = torch_run(self.builder.pytorch(variant))
            runs = [forms[variant.name] for forms in (self._runs, self._portable) if variant.name in forms]
            parity = self._parity(variant, *runs)
            self.checked.append({"nodes": nodes, "scans": scans, "parity": parity})

    def _write(self, variant: Variant) -> int:
        """Write a variant's ONNX form into a file; returns the nodes of its graph."""
        from quartermap_deploy.evaluation.scan_time import name_scan_bodies

        model = self.builder.graph(variant, self.progress)
        name_scan_bodies(model)
        self._path(variant).write_bytes(model.SerializeToString())
        return len(model.graph.node)

    def _path(self, variant: Variant) -> Path:
        return Path(self._folder.name) / f"{self.variants.index(variant)}.onnx"

    def _open(self, variant: Variant) -> str:
        """Load a variant in ONNX Runtime; returns what computes its scans."""
        from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession

        with self.progress.step(f"loading {variant.name} in ONNX Runtime"):
            execution = self.builder.recipe.execution
            session = OnnxRuntimeSession(self._path(variant), self.threads, execution=execution)
            self._note(variant, session.placement)
            self._runs[variant.name] = session.run
            if self._with_portable and session.scans.kind == "native":
                self._portable[variant.name] = OnnxRuntimeSession(
                    self._path(variant), self.threads, native=False, execution=execution
                ).run
        return str(session.scans)

    def _note(self, variant: Variant, placement: Placement) -> None:
        """Keep what there is to say about a variant's session, and once what does not depend on the variant."""
        for note in placement.notes():
            general = note == placement.passed_over
            if not general or note not in self.notes:
                self.notes.append(note if general else f"{variant.name}: {note}")

    def _parity(self, variant: Variant, *runs: Run) -> dict[str, float] | None:
        """Compare each form of a variant with its PyTorch model; returns what was found of the first."""
        import torch

        from quartermap_deploy.scan.cpu import without_kernels

        if self.target == TORCH and _device(TORCH) == "cpu":
            return None
        images = self.images(MERGED_IMAGES if variant.method == "tome" else CHECKED_IMAGES)
        with (
            self.progress.step(f"comparing {variant.name} with PyTorch"),
            torch.inference_mode(),
            without_kernels(),
        ):
            expected = self.builder.pytorch(variant)(torch.from_numpy(images)).numpy()
            found = [self._compared(variant, expected, run(images)) for run in runs]
        return found[0]

    def _compared(
        self, variant: Variant, expected: NDArray[np.float32], found: NDArray[Any]
    ) -> dict[str, float]:
        from quartermap_deploy.validation.comparison import compare_output
        from quartermap_deploy.validation.tolerances import tolerance_for

        merging = variant.method == "tome"
        tolerance = tolerance_for("float32").relative
        result = compare_output("logits", expected, found, tolerance)
        otherwise = 0
        if merging and not result.passed and np.isfinite(result.relative_error):
            each = [compare_output("logits", *pair, tolerance) for pair in zip(expected, found, strict=True)]
            passed = [one for one in each if one.passed]
            otherwise = len(each) - len(passed)
            if otherwise < len(passed):
                result = max(passed, key=lambda one: one.relative_error)
        if not result.passed:
            raise ParityError(
                f"{variant.name} on {self.target} departs from its PyTorch model: {result.detail}. Nothing was timed"
            )
        return {
            "relative_error": result.relative_error,
            "tolerance": tolerance,
            "images": len(expected),
            "otherwise": otherwise,
        }

    def images(self, batch: int) -> NDArray[np.float32]:
        """Return real images, prepared for the model."""
        from quartermap_deploy.compiling.cases import validation_cases

        source = self.builder.source
        images: NDArray[np.float32] = validation_cases(self.builder.recipe, source, batch)["images"][
            source.inputs[0].name
        ]
        return images

    def time(self, batch: int, repeats: int) -> dict[str, Timing]:
        """Time all variants in turns; those in the portable form are named as `portable_name` says."""
        images = self.images(batch)
        runs = {**self._runs, **{portable_name(name): run for name, run in self._portable.items()}}
        calls = {name: call_of(run, images) for name, run in runs.items()}
        return interleave(calls, repeats, progress=Titled(self.progress, f"batch {batch}"))

    def accuracy(self, name: str, dataset: Dataset | None, batch: int, workers: int) -> dict[str, Any]:
        """Measure the accuracy of a variant, as plain values for JSON."""
        from quartermap_deploy.evaluation.accuracy import evaluate

        source = self.builder.source
        assert dataset is not None
        return evaluate(
            self._runs[name],
            dataset,
            source.image_preprocessing(source.inputs[0]),
            batch=batch,
            progress=Titled(self.progress, name),
            workers=workers,
        ).to_dict()

    def profile(self, batch: int, repeats: int, unrecorded: Mapping[str, float]) -> dict[str, dict[str, Any]]:
        """Record where the time of a call goes, as plain values for JSON, by variant. The variants are closed first.

        Args:
            batch: images per call.
            repeats: recorded calls of each.
            unrecorded: milliseconds of a call that is not recorded, by variant.
        """
        from quartermap_deploy.evaluation import scan_time

        self._runs = self._portable = {}
        images, progress = self.images(batch), Titled(self.progress, f"batch {batch}, recorded")
        if self.target == TORCH:
            models = {variant.name: on_device(self.builder.pytorch(variant)) for variant in self.variants}
            parts = scan_time.profile_torch(models, images, repeats=repeats, progress=progress)
        else:
            parts = scan_time.profile_onnxruntime(
                {variant.name: self._path(variant) for variant in self.variants},
                images,
                Path(self._folder.name),
                threads=self.threads,
                repeats=repeats,
                progress=progress,
            )
        return {name: part.to_dict(unrecorded[name]) for name, part in parts.items()}
