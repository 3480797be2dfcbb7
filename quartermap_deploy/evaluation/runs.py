"""Models as functions of images, for whoever measures them: in PyTorch, in a session, or exported and built at once."""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.bundle import MODEL, Bundle
from quartermap_deploy.errors import CheckpointError
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.targets import DEFAULT, Session, load_target

if TYPE_CHECKING:
    from typing import TypeVar

    from torch import nn

    from quartermap_deploy.architectures.base import VisualStateSpaceModel
    from quartermap_deploy.evaluation.accuracy import Run
    from quartermap_deploy.exporting.export import Export
    from quartermap_deploy.pruning.plan import QuarterMap
    from quartermap_deploy.recipe import Recipe
    from quartermap_deploy.sources.architectures import ArchitectureSource
    from quartermap_deploy.sources.reference import Reference
    from quartermap_deploy.sources.source_model import SourceModel

    Model = TypeVar("Model", bound=nn.Module)

TORCH = "torch"
"""What runs a model that is not exported: the name of no target, but taken wherever one is."""

Sizes = Sequence[tuple[int, int]]
"""Smallest and largest batches that a model takes; none if it takes every batch."""


def reference_of(source: SourceModel, plan: QuarterMap | None, progress: Progress = SILENT) -> Reference:
    """Return a source model in PyTorch, pruned by a plan, whatever its kind.

    Raises:
        PlanError: if the plan does not fit the model.
        ExportError: if the orders of the model's scans have to be read off its graph, and it cannot be exported.
    """
    traced = None
    if plan is not None and source.kind == "module":
        # The graph alone tells in which order the scans of a module visit their maps.
        with progress.step("exporting to ONNX"):
            traced = source.trace()
    return source.reference(plan, traced)


def source_run(source: SourceModel, reference: Reference) -> Run:
    """Return a function that runs a source model of one image input in PyTorch; it returns the first output.

    A model of `architectures` runs on the GPU if PyTorch has one, another one on the CPU.

    Args:
        source: the model.
        reference: the same in PyTorch, pruned or not, of `reference_of`.
    """
    sizes = fixed_sizes(source.inputs[0].shape[0])
    if source.kind != "module":
        return batched(torch_run(reference.module), sizes)
    name = source.inputs[0].name

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        first = next(iter(reference.run({name: images}).values()))
        return first.astype(np.float32, copy=False)

    return batched(run, sizes)


def require_own(bundle: Bundle, reference: Reference) -> None:
    """Check that a model that was built again computes what the bundle keeps.

    New weights come from a seed, and another version of PyTorch may draw others from it; what a factory makes may have
    any.

    Raises:
        CheckpointError: if it does not.
        BundleError: if the bundle's golden files cannot be read.
    """
    from quartermap_deploy.validation.comparison import compare_output
    from quartermap_deploy.validation.golden import read_golden
    from quartermap_deploy.validation.tolerances import tolerance_for

    cases, outputs = read_golden(bundle.path, bundle.manifest["golden"])
    name = min(cases, key=lambda case: sum(array.size for array in cases[case].values()))
    found, tolerance = reference.run(cases[name]), tolerance_for("float32").relative
    for output, wanted in outputs[list(cases).index(name)].items():
        result = compare_output(output, wanted, found.get(output), tolerance)
        if not result.passed:
            raise CheckpointError(
                f"the PyTorch model that was built here does not compute the outputs that the bundle keeps "
                f"({output}: {result.detail}); its weights are others, as with newly initialised ones under another "
                "version of torch, or from a factory that makes other ones at every call"
            )


def pruned(source: ArchitectureSource, plan: QuarterMap | None) -> VisualStateSpaceModel:
    """The PyTorch model of a card, pruned by a plan."""
    from quartermap_deploy.pruning.reference import prune

    return source.module if plan is None else prune(source.module, plan)


def torch_run(model: nn.Module) -> Run:
    """Return a function that runs a PyTorch model on arrays, on the GPU if PyTorch has one."""
    import torch

    model = on_device(model)
    device = next(model.parameters()).device

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = model(torch.from_numpy(images).to(device)).float().cpu().numpy()
        return logits

    return run


def on_device(model: Model) -> Model:
    """Return the model, or a copy of it on the GPU if PyTorch has one."""
    import torch

    return copy.deepcopy(model).to("cuda") if torch.cuda.is_available() else model


def session_run(session: Session, sizes: Sizes = ()) -> Run:
    """Return a function that runs a session of one image input on any number of images; it returns the first output.

    Args:
        session: the session.
        sizes: smallest and largest batches that it takes; none if it takes every batch.
    """
    taken, given = session.inputs[0], session.outputs[0].name
    element_type = session.input_type

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        logits = session.infer({taken.name: images.astype(element_type, copy=False)})[given]
        return logits.astype(np.float32, copy=False)

    return batched(run, sizes)


def batched(run_some: Run, sizes: Sizes) -> Run:
    """Return a function that runs any number of images by one that takes batches of some sizes alone.

    A model of a fixed batch gets so many at a time, an engine as many as one of its profiles takes: images are repeated
    to fill up, and what was filled is cut off again.
    """
    if not sizes:
        return run_some
    largest = max(high for _, high in sizes)

    def filled(images: NDArray[np.float32]) -> NDArray[np.float32]:
        count = len(images)
        if not any(low <= count <= high for low, high in sizes):
            images = images[np.arange(min(low for low, _ in sizes if low > count)) % count]
        return run_some(images)[:count]

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        starts = range(0, len(images), largest)
        return np.concatenate([filled(images[start : start + largest]) for start in starts])

    return run


def fixed_sizes(batch: int | str) -> list[tuple[int, int]]:
    """The batches that a model takes by the first axis of its input; none if that is open."""
    return [] if isinstance(batch, str) else [(batch, batch)]


def target_sizes(batch: int | str, entry: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The batches that a target's session takes: those of a fixed model, or of the profiles of an engine."""
    profiles = entry.get("options", {}).get("profiles", [])
    return fixed_sizes(batch) or [(profile["batch"][0], profile["batch"][-1]) for profile in profiles]


def exported_run(
    exported: Export, recipe: Recipe, batch: int | str = "batch", progress: Progress = SILENT
) -> Run:
    """Return a function that runs an exported model; `exported_session` says what the arguments are."""
    return session_run(*exported_session(exported, recipe, batch, progress))


def exported_session(
    exported: Export, recipe: Recipe, batch: int | str = "batch", progress: Progress = SILENT
) -> tuple[Session, Sizes]:
    """Return a session of an exported model on the recipe's only target, and the batches that it takes.

    Args:
        exported: the model.
        recipe: names the target, its providers, and how engines are built.
        batch: the first axis of its input: a number, or a name if it is open.
        progress: told about the step.
    """
    from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession

    (target,) = recipe.targets
    data, rules = exported.model.SerializeToString(), exported.traced.rules
    if target == DEFAULT:
        return OnnxRuntimeSession(data, rules=rules, execution=recipe.execution), fixed_sizes(batch)
    module = load_target(target)
    # An engine is read when it is opened; its folder may go then.
    with tempfile.TemporaryDirectory(prefix="quartermap-") as folder, progress.step(f"building for {target}"):
        path = Path(folder) / MODEL
        path.write_bytes(data)
        entry = module.build(path, Path(folder), recipe.engine, progress=progress)
        session = module.open(Path(folder), {**entry, "size_rules": rules})
        return session, target_sizes(batch, entry)


def weights_hash(model: nn.Module) -> str:
    """Hash of a model's weights and of what they belong to."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.hexdigest()


def call_of(run: Run, images: NDArray[np.float32]) -> Callable[[], object]:
    """Return a call of a model on one batch, for `bench.interleave`."""
    return lambda: run(images)
