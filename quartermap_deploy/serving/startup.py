"""From a bundle to models that are ready to serve: sessions are opened, and proved on the bundle's golden inputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quartermap_deploy.architectures.cards import load_card
from quartermap_deploy.bundle import MANIFEST, Bundle
from quartermap_deploy.data.labels import read_labels
from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.errors import ParityError, ServeError
from quartermap_deploy.files import file_hash
from quartermap_deploy.serving.models import PROBABILITIES, Description, image_input
from quartermap_deploy.serving.options import DEFAULT_BATCH, ServeOptions
from quartermap_deploy.serving.tensors import TensorSpec, datatype_of
from quartermap_deploy.targets import DEFAULT, Session, load_target
from quartermap_deploy.targets.onnxruntime_cpu import OnnxRuntimeSession, default_threads

RESERVED = (".", "..", "config", "infer", "ready", "stats", "versions")
"""What stands in the place of a model's name, or behind it, in the paths of the protocol."""


@dataclass(frozen=True)
class Plan:
    """How a bundle is going to be served, before anything is loaded.

    Attributes:
        bundle: what.
        target: by which of its targets.
        options: how.
        model: what clients are told about the model.
        image_model: what they are told about the one that takes image files.
        preprocessing: how images are prepared.
        workers: batches that run side by side.
        threads: of a batch on the CPU.
        wide: whether a batch that runs by itself gets all the cores.
    """

    bundle: Bundle
    target: str
    options: ServeOptions
    model: Description
    image_model: Description
    preprocessing: Preprocessing
    workers: int
    threads: int
    wide: bool


def make_plan(bundle: Bundle, options: ServeOptions) -> Plan:
    """Check that a bundle can be served as asked.

    Raises:
        UnknownNameError: if the bundle was not built for the target, or there is no card of its model.
        InputError: if the labels cannot be read, or do not fit.
        ServeError: if the options ask for what the bundle cannot do.
    """
    manifest = bundle.manifest
    target = bundle.target(options.target)
    card = load_card(manifest["model"]["name"])
    sides = [size for size in manifest["input"]["shape"][2:] if isinstance(size, int)]
    # A graph with open sizes takes every size; files are prepared for the one that the card, or the recipe, names.
    size = sides if len(sides) == 2 else bundle.manifest["recipe"]["input_size"] or card.preprocessing.crop
    name = card.name if options.name is None else options.name
    if not name.strip() or not name.isprintable() or set(name) & set('/\\"'):
        raise ServeError(f"{name!r} is no name that clients could use; choose one without quotes or slashes")
    if name in RESERVED:
        raise ServeError(
            f"{name!r} is a word in the paths of the protocol, so no model can have it for a name"
        )
    batch = max_batch(bundle, target, options.max_batch)
    if options.queue < batch:
        raise ServeError(f"a queue of {options.queue} images holds no batch of {batch}; make it longer")
    properties = provenance(bundle, target)
    labels = read_labels(options.labels, manifest["output"]["shape"][1], card.labels)
    inputs, outputs = _specs(manifest["input"], target), _specs(manifest["output"], target)
    delay = options.max_delay
    cores = default_threads()
    workers = options.workers or (cores if target == DEFAULT else 1)
    probabilities = TensorSpec(PROBABILITIES, "FP32", (-1, len(labels)))
    return Plan(
        bundle,
        target,
        options,
        Description(name, _platform(target), inputs, outputs, batch, delay, labels, properties),
        Description(
            f"{name}_image", "ensemble", (image_input(),), (probabilities,), batch, delay, labels, properties
        ),
        card.preprocessing.with_size(*size),
        workers,
        max(1, cores // workers),
        wide=target == DEFAULT and options.workers is None and cores > 1,
    )


def max_batch(bundle: Bundle, target: str, wanted: int | None) -> int:
    """Return the largest batch that is run.

    Raises:
        ServeError: if more is wanted than the model takes.
    """
    size = bundle.manifest["input"]["shape"][0]
    largest: int | None = None if isinstance(size, str) else size
    profiles = bundle.manifest["targets"][target].get("options", {}).get("profiles")
    if largest is None and profiles:
        largest = max(profile["batch"][2] for profile in profiles)
    if wanted is None:
        return largest or DEFAULT_BATCH
    if largest is not None and wanted > largest:
        raise ServeError(
            f"batches of {wanted} are asked for, and the bundle takes {largest} at most with the target {target}; "
            "compile it with a dynamic batch and a wider profile, or ask for less"
        )
    return wanted


def provenance(bundle: Bundle, target: str) -> dict[str, str]:
    """Return where a bundle comes from, as the properties of a model's metadata."""
    manifest, report = bundle.manifest, bundle.report
    plan = manifest["plan"]
    blocks = [str(block["index"]) for block in manifest["blocks"] if block["pruned"]]
    worst = report.get("worst_relative_error")
    entry = manifest["targets"][target]
    file = entry.get("file", "")
    return {
        "model": manifest["model"]["name"],
        "title": manifest["model"]["title"],
        "weights": str(manifest["model"]["weights"]),
        "weights_sha256": str(manifest["model"].get("weights_sha256") or ""),
        "plan": json.dumps(plan) if plan else "",
        "pruned_blocks": ",".join(blocks),
        "precision": str(manifest["recipe"]["precision"]),
        "parity_worst_relative_error": "" if worst is None else f"{worst:.3g}",
        "parity_tolerance": str(report["tolerance"]["relative"]),
        "target": target,
        "file": file,
        "file_sha256": str(manifest["files"].get(file, {}).get("sha256", "")),
        "manifest_sha256": file_hash(bundle.path / MANIFEST),
        "created": str(manifest["created"]),
        "versions": json.dumps(manifest["versions"]),
    }


@dataclass(frozen=True)
class Sessions:
    """What runs the batches.

    Attributes:
        workers: one for each worker; they may be one and the same.
        wide: for a batch that runs by itself.
    """

    workers: Sequence[Session]
    wide: Session | None

    def different(self) -> list[Session]:
        """Each of them once."""
        every = [*self.workers, *([] if self.wide is None else [self.wide])]
        return list({id(session): session for session in every}.values())


def open_sessions(plan: Plan) -> Sessions:
    """Open the sessions.

    Raises:
        BundleError: if the target's runtime refuses the bundle.
    """
    bundle, entry = plan.bundle, plan.bundle.manifest["targets"][plan.target]
    if plan.target != DEFAULT:
        opened = [load_target(plan.target).open(bundle.path, entry) for _ in range(plan.workers)]
        return Sessions(opened, None)
    path = bundle.path / entry["file"]
    if plan.wide:
        # A session of one thread is run in the thread that calls it, by as many as like, and has the weights once.
        return Sessions([OnnxRuntimeSession(path, 1)] * plan.workers, OnnxRuntimeSession(path, plan.workers))
    # Side by side, sessions with a thread for each core would only be in each other's way.
    return Sessions([OnnxRuntimeSession(path, plan.threads) for _ in range(plan.workers)], None)


def check_golden(plan: Plan, sessions: Sequence[Session]) -> float:
    """Run the golden inputs of the bundle through every session.

    Returns:
        The worst error, as a share of the largest value.

    Raises:
        ParityError: if a session departs from the golden outputs by more than the tolerance.
        BundleError: if the golden files cannot be read.
    """
    from quartermap_deploy.validation.comparison import compare_output
    from quartermap_deploy.validation.golden import read_golden
    from quartermap_deploy.validation.tolerances import tolerance_for

    cases, outputs = read_golden(plan.bundle.path)
    tolerance = tolerance_for(plan.bundle.manifest["recipe"]["precision"])
    worst = 0.0
    for session in sessions:
        for (case, images), expected in zip(cases.items(), outputs, strict=True):
            ((name, wanted),) = expected.items()
            found = session.run(images.astype(getattr(session, "input_type", np.float32), copy=False))
            compared = compare_output(name, wanted, found.astype(np.float32, copy=False), tolerance.relative)
            if not compared.passed:
                raise ParityError(
                    f"{plan.bundle.path} is not served: {plan.target} departs from the golden outputs on {case!r}: "
                    f"{compared.detail}. `quartermap validate {plan.bundle.path} --target {plan.target}` says more"
                )
            worst = max(worst, compared.relative_error)
    return worst


def _specs(value: dict[str, Any], target: str) -> tuple[TensorSpec, ...]:
    # Engines take and give float32 whatever is in them.
    kind = value["type"] if target == DEFAULT else "float32"
    shape = tuple(size if isinstance(size, int) else -1 for size in value["shape"])
    return (TensorSpec(value["name"], datatype_of(kind), shape),)


def _platform(target: str) -> str:
    return {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}.get(target, target)
