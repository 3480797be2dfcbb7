"""From a bundle to models that are ready to serve: sessions are opened, and proved on the bundle's golden inputs."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quartermap_deploy.batch_axis import batch_of, largest_batch
from quartermap_deploy.bundle import MANIFEST, Bundle
from quartermap_deploy.classes import Activation, activation_of, class_labels
from quartermap_deploy.errors import InputError, ParityError, ServeError
from quartermap_deploy.files import file_hash
from quartermap_deploy.image_interface import (
    ImageInterface,
    image_interface,
    image_model_tensors,
    no_image_model,
)
from quartermap_deploy.pictures import Shows, what_it_shows
from quartermap_deploy.plain_text import command
from quartermap_deploy.serving.models import Description, file_input
from quartermap_deploy.serving.options import DEFAULT_BATCH, ServeOptions
from quartermap_deploy.serving.tensors import TensorSpec, datatype_of, element_type_of
from quartermap_deploy.targets import DEFAULT, Session, load_target, refuse_providers
from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession
from quartermap_deploy.targets.onnxruntime.threads import default_threads
from quartermap_deploy.tensor_info import TensorInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quartermap_deploy.validation.comparison import OutputComparison

OPEN_SIDE = 512
"""How large a side that is open is taken to be where room in memory is planned."""
RESERVED = (".", "..", "config", "infer", "ready", "stats", "versions")
"""What stands in the place of a model's name, or behind it, in the paths of the protocol."""
RUNS, LONGEST = 7, 1.0
"""Turns in which sessions are compared, and seconds after which no further one begins."""
WORTH = 0.8
"""Share of the time of one core that all cores take at most where they are worth it."""


@dataclass(frozen=True)
class Plan:
    """How a bundle is going to be served, before anything is loaded.

    Attributes:
        bundle: what.
        target: by which of its targets.
        options: how.
        model: what clients are told about the model.
        images: the model that takes image files; None where there is none.
        no_images: why there is none, for the page; empty where there is one.
        workers: batches that run side by side.
        threads: of a batch on the CPU.
        wide: whether a batch that runs by itself gets all the cores.
    """

    bundle: Bundle
    target: str
    options: ServeOptions
    model: Description
    images: ImagePlan | None
    no_images: str
    workers: int
    threads: int
    wide: bool

    @property
    def image_bytes(self) -> int:
        """Bytes of one entry of the batch of all inputs; sides that are open are taken to be large."""
        if self.images is not None:
            return 4 * math.prod(self.images.interface.preprocessing.input_shape)
        first = 1 if self.model.batch_axis else 0
        return sum(
            element_type_of(spec.datatype).itemsize
            * math.prod(OPEN_SIDE if size == -1 else size for size in spec.shape[first:])
            for spec in self.model.inputs
        )


@dataclass(frozen=True)
class ImagePlan:
    """The model that takes image files.

    Attributes:
        description: what clients are told about it.
        interface: how images become the input of the model itself.
        activation: what makes probabilities of its first output; of a mask of one class, its threshold.
        labels: names of the classes; nothing where nobody gave any.
        shows: what there is to see of an image: its classes, a mask of them, an image, or nothing but tensors. Only for
            "classes" it gives probabilities; otherwise it gives what the model itself does.
    """

    description: Description
    interface: ImageInterface
    activation: Activation
    labels: tuple[str, ...]
    shows: Shows


def make_plan(bundle: Bundle, options: ServeOptions) -> Plan:
    """Check that a bundle can be served as asked.

    Raises:
        UnknownNameError: if the bundle was not built for the target.
        InputError: if the labels cannot be read, or do not fit, or the preprocessing does not, or if an engine is to
            run by providers of ONNX Runtime.
        ServeError: if the options ask for what the bundle cannot do.
    """
    target = bundle.target(options.target)
    refuse_providers(target, options.execution)
    if options.tolerance is not None and bundle.changed is None:
        raise ServeError(
            f"{bundle} has a tolerance of its own, and it was proved within it; a tolerance is for a file that another "
            "tool changed, with --like"
        )
    name = str(bundle.manifest["model"]["name"]) if options.name is None else options.name
    if not name.strip() or not name.isprintable() or set(name) & set('/\\"'):
        raise ServeError(f"{name!r} is no name that clients could use; choose one without quotes or slashes")
    if name in RESERVED:
        raise ServeError(
            f"{name!r} is a word in the paths of the protocol, so no model can have it for a name"
        )
    batch = max_batch(bundle, target, options.max_batch)
    if options.queue < batch:
        raise ServeError(f"a queue of {options.queue} images holds no batch of {batch}; make it longer")
    labels, shared = class_labels(bundle, options.labels), batch_of(bundle)
    model = Description(
        name,
        _platform(target),
        tuple(_spec(item, target) for item in bundle.inputs),
        tuple(_spec(item, target) for item in bundle.outputs),
        batch,
        options.max_delay,
        labels or tuple(map(str, range(bundle.num_classes or 0))),
        provenance(bundle, target),
        batch_axis=shared is not None,
    )
    images, no_images = _image_plan(bundle, options, labels, model)
    cores = default_threads()
    on_cpu = target == DEFAULT and options.execution.on_cpu
    workers = options.workers or (cores if on_cpu else 1)
    return Plan(
        bundle,
        target,
        options,
        model,
        images,
        no_images,
        workers,
        max(1, cores // workers),
        wide=on_cpu and options.workers is None and cores > 1,
    )


def _image_plan(
    bundle: Bundle, options: ServeOptions, labels: tuple[str, ...], model: Description
) -> tuple[ImagePlan | None, str]:
    """The model that takes image files, or why there is none.

    Raises:
        InputError: if a preprocessing is given that does not fit.
    """
    if (reason := no_image_model(bundle)) is None:
        try:
            interface = image_interface(bundle, options.preprocessing)
        except InputError as error:
            if options.preprocessing:
                raise
            reason = str(error)
    if reason is not None:
        if options.preprocessing:
            raise InputError(f"a preprocessing is for image files, and the model takes none: {reason}")
        return None, reason
    files, probabilities = image_model_tensors(bundle)
    outputs = model.outputs
    shows = what_it_shows(bundle, interface.preprocessing)
    # The graph is looked at for it, which takes a while where it is large.
    activation = activation_of(bundle) if shows in ("classes", "mask") else "none"
    if shows == "classes":
        outputs = (TensorSpec(probabilities, "FP32", (-1, len(model.labels))),)
    description = dataclasses.replace(
        model,
        name=f"{model.name}_image",
        platform="ensemble",
        inputs=(file_input(files),),
        outputs=outputs,
    )
    return ImagePlan(description, interface, activation, labels, shows), ""


def max_batch(bundle: Bundle, target: str, wanted: int | None) -> int:
    """Return the largest batch that is run.

    Raises:
        ServeError: if more is wanted than the model takes.
    """
    largest = largest_batch(bundle, target)
    if not any(item.shape and isinstance(item.shape[0], str) for item in bundle.inputs):
        largest = largest or 1
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
    # What was proved of a bundle's model says nothing of a file that another tool made of it.
    worst = report.get("worst_relative_error") if bundle.changed is None else None
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
    bundle = plan.bundle
    entry = bundle.entry(plan.target)
    if plan.target != DEFAULT:
        opened = [load_target(plan.target).open(bundle.path, entry) for _ in range(plan.workers)]
        return Sessions(opened, None)
    path, rules = bundle.path / entry["file"], entry["size_rules"]
    if plan.wide:
        # A session of one thread is run in the thread that calls it, by as many as like, and has the weights once.
        one = OnnxRuntimeSession(path, 1, rules)
        return Sessions([one] * plan.workers, OnnxRuntimeSession(path, plan.workers, rules))
    if not plan.options.execution.on_cpu:
        # One that all workers run, as a device would hold the weights of each.
        one = OnnxRuntimeSession(path, plan.threads, rules, execution=plan.options.execution)
        return Sessions([one] * plan.workers, None)
    # Side by side, sessions with a thread for each core would only be in each other's way.
    return Sessions([OnnxRuntimeSession(path, plan.threads, rules) for _ in range(plan.workers)], None)


def without_waste(plan: Plan, sessions: Sessions) -> Sessions:
    """Leave the wide session out where it is hardly faster: it takes all cores, those of clients here and of others.

    A golden input that comes alone is run by both in turns, and the fastest runs are compared.
    """
    from quartermap_deploy.validation.golden import read_golden

    wide = sessions.wide
    if wide is None:
        return sessions
    cases, _ = read_golden(plan.bundle.path, plan.bundle.manifest["golden"])
    first = slice(1 if plan.model.joins else None)
    alone = [
        {name: values[first] for name, values in _feeds(wide, given).items()} for given in cases.values()
    ]
    feeds = next(feeds for feeds in alone if plan.bundle.changed is None or _takes(wide.inputs, feeds))
    fastest = {wide: math.inf, sessions.workers[0]: math.inf}
    start = time.monotonic()
    for _ in range(RUNS):
        for session in fastest:
            before = time.perf_counter()
            session.infer(feeds)
            fastest[session] = min(fastest[session], time.perf_counter() - before)
        if time.monotonic() - start > LONGEST:
            break
    pays = fastest[wide] <= WORTH * fastest[sessions.workers[0]]
    return sessions if pays else Sessions(sessions.workers, None)


def note_form(plan: Plan, sessions: Sessions) -> list[str]:
    """Add to a model's provenance what only the opened session knows: what computes its scans, and what runs where.

    Returns:
        What whoever reads the log should know about the providers.
    """
    session = sessions.workers[0]
    properties, placement = plan.model.properties, session.placement
    properties["scans"] = "" if session.scans is None else str(session.scans)
    properties["providers"] = "" if placement is None else ",".join(placement.providers)
    nodes = None if placement is None else placement.nodes
    properties["nodes"] = "" if nodes is None else json.dumps(nodes)
    return [] if placement is None else placement.notes()


def check_golden(plan: Plan, sessions: Sequence[Session]) -> float:
    """Run the golden inputs of the bundle through every session.

    Returns:
        The worst error, as a share of the largest value.

    Raises:
        ParityError: if a session departs from the golden outputs by more than the tolerance, or takes none of the
            inputs.
        BundleError: if the golden files cannot be read.
    """
    from quartermap_deploy.validation.comparison import compare_output
    from quartermap_deploy.validation.golden import read_golden
    from quartermap_deploy.validation.tolerances import tolerance_for

    manifest = plan.bundle.manifest
    cases, outputs = read_golden(plan.bundle.path, manifest["golden"])
    tolerance = plan.options.tolerance or tolerance_for(manifest["recipe"]["precision"]).relative
    compared: list[tuple[str, OutputComparison]] = []
    for session in sessions:
        for (case, given), expected in zip(cases.items(), outputs, strict=True):
            feeds = _feeds(session, given)
            # Another tool may have fixed a batch, or sizes.
            if plan.bundle.changed is not None and not _takes(session.inputs, feeds):
                continue
            found = session.infer(feeds)
            for name, wanted in expected.items():
                values = found[name].astype(wanted.dtype, copy=False) if name in found else None
                compared.append((case, compare_output(name, wanted, values, tolerance)))
    if not compared:
        raise ParityError(
            f"{plan.bundle} is not served: it takes none of the golden inputs of {plan.bundle.path}, as its sizes are "
            "fixed at others, so nothing shows what it computes; have the tool leave the batch open, or fix it at 1"
        )
    case, worst = max(compared, key=lambda item: item[1].relative_error)
    if not worst.passed:
        raise ParityError(
            f"{plan.bundle} is not served: {plan.target} departs from the golden outputs on {case!r}, in {worst.name}: "
            f"{worst.detail}. {_advice(plan, worst.relative_error)}"
        )
    return worst.relative_error


def _feeds(session: Session, given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What a session takes of golden inputs, in its types."""
    return {
        item.name: given[item.name].astype(item.type, copy=False)
        for item in session.inputs
        if item.name in given
    }


def _takes(inputs: Sequence[TensorInfo], feeds: Mapping[str, NDArray[Any]]) -> bool:
    """Whether arrays have the sizes that inputs are fixed at."""
    return all(
        isinstance(size, str) or size == own
        for item in inputs
        if item.name in feeds
        for size, own in zip(item.shape, feeds[item.name].shape, strict=True)
    )


def _advice(plan: Plan, error: float) -> str:
    """What to do about a departure from the golden outputs."""
    bundle = plan.bundle
    if bundle.changed is None:
        return f"`{command('quartermap', 'validate', bundle.path, '--target', plan.target)}` says more"
    measure = command("quartermap", "eval", bundle.changed, "--like", bundle.path)
    if not error < 1:
        return f"The file computes something else; `{measure}` tells what is left of the accuracy"
    # One digit, rounded up.
    scale = 10.0 ** math.floor(math.log10(error))
    return (
        f"Where the tool was to trade so much for size or speed, `--tolerance {math.ceil(error / scale) * scale:.0e}` "
        f"allows it; `{measure}` tells what it costs in accuracy"
    )


def _spec(item: TensorInfo, target: str) -> TensorSpec:
    """What clients are told about an input or output.

    Raises:
        ServeError: if it has an element type that the protocol has not.
    """
    # Engines take and give float32 whatever is in them.
    kind = "float32" if target != DEFAULT and item.type.startswith(("float", "bfloat")) else item.type
    datatype = datatype_of(kind)
    if datatype is None:
        raise ServeError(
            f"{item.name} is of {item.type}, and the protocol has no such type; compile the bundle with io = "
            '"float32"'
        )
    return TensorSpec(
        item.name, datatype, tuple(size if isinstance(size, int) else -1 for size in item.shape)
    )


def _platform(target: str) -> str:
    return {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}.get(target, target)
