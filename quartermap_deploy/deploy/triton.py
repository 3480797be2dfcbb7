"""`deploy_triton`: a bundle as a model repository for NVIDIA's Triton Inference Server.

quartermap.json                   what is here, and the hash of every file
libquartermap_plugin.so           with engines that need it; Triton overlooks files at this level
NAME/                             the model itself, with all of its inputs and outputs
    config.pbtxt  labels.txt  warmup/  1/model.onnx or 1/model.sm89.plan
NAME_image/                       takes JPEG or PNG files, where one input takes images, by way of
NAME_preprocess/                  the decoded and prepared image, and
NAME_probabilities/               of a classifier, what makes probabilities of its logits
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.bundle import Bundle, describe_file, load_bundle, write_json
from quartermap_deploy.classes import activation_of, class_labels
from quartermap_deploy.data import pixels
from quartermap_deploy.deploy.runtime_versions import (
    Version,
    check_triton,
    onnxruntime_for,
    triton_for,
    written,
)
from quartermap_deploy.deploy.textproto import textproto
from quartermap_deploy.deploy.triton_config import (
    LABELS_FILE,
    Interface,
    Sample,
    ensemble_config,
    is_known_type,
    model_config,
    preprocess_config,
    probabilities_config,
)
from quartermap_deploy.deploy.triton_source import Source, find_source
from quartermap_deploy.errors import DeployError, InputError
from quartermap_deploy.files import FolderKind, check_outside
from quartermap_deploy.image_interface import (
    ImageInterface,
    image_interface,
    image_model_tensors,
    no_image_model,
)
from quartermap_deploy.onnx_bounds import versions_of
from quartermap_deploy.plain_text import command, encoded
from quartermap_deploy.progress import SILENT, Progress

FORMAT = 1
MARKER = "quartermap.json"
REPOSITORY = FolderKind("model repository that quartermap wrote", MARKER, DeployError)
PLUGIN_FILE = "libquartermap_plugin.so"
DEVICES = ("cpu", "cuda", "gpu")
"""The last is another name of cuda, as Triton has it."""
CPU_BATCH, GPU_BATCH = 8, 32
"""Largest batches where nothing else says: on a CPU larger ones gain little and make the first image wait."""
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
"""Names of models: Triton takes a folder's name as the model's, and users put it into addresses."""
NO_CACHE = (
    "This file keeps Python from making a folder of its name, which Triton would take for a change of the model "
    "where it polls.\n"
)
_MODELS = Path(__file__).parent / "triton_models"


@dataclass(frozen=True)
class TritonOptions:
    """How a bundle is served.

    Attributes:
        backend: "onnxruntime" or "tensorrt"; None takes the one that fits the bundle's targets.
        name: of the model; None takes the one that it has in the bundle.
        version: of the model.
        labels: file with the name of a class on each line, or a set of `data/labels.py`; None takes the bundle's.
        preprocessing: values of the bundle's preprocessing to replace, by name.
        max_batch: largest batch; None takes what the engine takes, or 8 on a CPU and 32 on a GPU.
        max_delay_us: how long a request may wait for others, in microseconds.
        device: "cpu" or "cuda" ("gpu" is the same), for the backend onnxruntime; None is a CPU. Engines run on GPUs.
        instances: of the model, on the CPU or on each GPU.
        threads: of an instance on the CPU; 0 for all cores.
        images: whether to write the models that take images, where the bundle has an input for them.
        image_workers: how many images are decoded at the same time.
        plugin: the plugin library of the engines; None looks where `quartermap compile` does.
        engines_from: more bundles of the same model, whose engines are for other GPUs.
        signed_by: PEM files of public keys by all of which the bundles must be signed; see `load_bundle`.
        mounted_at: where the repository will lie on the machine that serves it; None for where it is written.
        release: of Triton that will serve it, such as "24.03", so that one that is too old is refused; None for any.
    """

    backend: str | None = None
    name: str | None = None
    version: int = 1
    labels: str | Path | None = None
    preprocessing: Mapping[str, Any] | None = None
    max_batch: int | None = None
    max_delay_us: int = 1000
    device: str | None = None
    instances: int = 1
    threads: int = 0
    images: bool = True
    image_workers: int = 2
    plugin: Path | None = None
    engines_from: tuple[Path, ...] = ()
    signed_by: tuple[Path, ...] = ()
    mounted_at: str | None = None
    release: str | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("version", 1),
            ("instances", 1),
            ("image_workers", 1),
            ("max_delay_us", 0),
            ("threads", 0),
            ("max_batch", 1),
        ):
            value = getattr(self, name)
            if value is None and name == "max_batch":
                continue
            # Triton's configuration has 32 bits for them.
            if type(value) is not int or not least <= value < 1 << 31:
                raise DeployError(
                    f"{name} = {value!r}; expected a whole number of at least {least}, and below 2^31"
                )
        if self.release is not None and not re.fullmatch(r"\d\d\.\d\d(-[\w.-]+)?", self.release):
            raise DeployError(f"release = {self.release!r}; expected one of Triton, such as 24.03")
        if self.device not in (None, *DEVICES):
            raise DeployError(f"unknown device {self.device!r}; expected {' or '.join(DEVICES)}")
        if self.name is not None and not re.fullmatch(NAME, self.name):
            raise DeployError(
                f"a model cannot be named {self.name!r}; expected letters, digits, and _ . - after the first"
            )


@dataclass(frozen=True)
class TritonPlan:
    """What will be written, decided and checked before anything is.

    Attributes:
        bundle: the bundle.
        source: what is served of it.
        interface: what the models agree on.
        options: how it is served.
        gpu: whether the model runs on GPUs.
        labels: names of the classes, or their numbers; nothing where the model tells none apart.
        golden: a golden case to warm up with: an array for each input.
        no_images: why no model takes images, if that was not asked for; else empty.
        place: where the repository will lie on the machine that serves it.
    """

    bundle: Bundle
    source: Source
    interface: Interface
    options: TritonOptions
    gpu: bool
    labels: tuple[str, ...]
    golden: Mapping[str, NDArray[Any]]
    no_images: str
    place: str

    @property
    def models(self) -> dict[str, str]:
        """The models by name, and what each is."""
        interface = self.interface
        given, made = (
            ", ".join(item.name for item in items) for items in (interface.inputs, interface.outputs)
        )
        found = {interface.name: f"{self.source.backend}: {given} → {made}"}
        if interface.images is None:
            return found
        prepared, logits = interface.prepared.name, interface.outputs[0].name
        answer = made if interface.classes is None else interface.probabilities
        found |= {
            interface.ensemble: f"ensemble: JPEG or PNG files → {answer}",
            interface.preprocess: f"python, a step of it: files → {prepared}",
        }
        if interface.classes is not None:
            found[interface.softmax] = f"python, a step of it: {logits} → {interface.probabilities}"
        return found

    @property
    def server_arguments(self) -> list[str]:
        """What Triton needs to be told besides where the repository is."""
        found = []
        if self.source.plugin is not None:
            # Triton opens it as its TensorRT backend starts. LD_PRELOAD would be too early: the library registers
            # itself with the TensorRT that is loaded already, and then there is none.
            found.append(f"--backend-config=tensorrt,plugins={self.place}/{PLUGIN_FILE}")
        if self.source.version_compatible:
            found.append("--backend-config=tensorrt,version-compatible=true")
        return found

    @property
    def onnxruntime(self) -> Version:
        """The oldest ONNX Runtime that runs the portable model."""
        return onnxruntime_for(*versions_of(self.bundle.model_path))

    def check_release(self, named: str, what: str) -> None:
        """Refuse a release of Triton, or an image or tag of one, that is too old for the model.

        Raises:
            DeployError: if it is.
        """
        if self.source.backend == "onnxruntime":
            check_triton(named, what, self.onnxruntime)

    def notes(self) -> list[str]:
        """What the one who starts Triton has to know."""
        found = []
        if self.source.backend == "onnxruntime":
            needed = self.onnxruntime
            found.append(
                f"needs ONNX Runtime {written(needed)} or newer: Triton {written(triton_for(needed), 2)} or newer"
            )
        else:
            capabilities = ", ".join(self.source.capability_files)
            gpus = f"GPUs of compute capability {capabilities}" if capabilities else "any GPU from Ampere on"
            if capabilities and self.source.default_file:
                gpus += ", and others from Ampere on"
            version = "or newer" if self.source.version_compatible else "and no other version"
            found.append(f"needs TensorRT {self.source.tensorrt} {version} in Triton, and {gpus}")
        if self.interface.images is not None:
            found.append(
                "the image models need Pillow where Triton runs, and refuse requests without: pip install pillow"
            )
        if self.no_images:
            found.append(f"there are no image models: {self.no_images}")
        return found


@dataclass(frozen=True)
class Repository:
    """A model repository that was written.

    Attributes:
        path: where it is.
        models: the models by name, and what each is.
        backend: of the model itself.
        device: "cpu" or "cuda".
        max_batch: largest batch, or 0 where the graph has a batch of its own.
        files: every file, relative to the repository.
        command: the line that starts Triton with it.
        notes: what the one who starts it has to know.
    """

    path: Path
    models: dict[str, str]
    backend: str
    device: str
    max_batch: int
    files: tuple[str, ...]
    command: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def deploy_triton(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: TritonOptions | None = None,
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> Repository:
    """Write a model repository for Triton.

    Args:
        bundle: folder of the bundle.
        out: folder of the repository; it must not exist, unless `force` is given and it is one of ours.
        options: how the bundle is served.
        force: replace a repository.
        progress: told about the steps.

    Raises:
        BundleError: if the bundle is none, or is damaged.
        DeployError: if it cannot be served so, or something else is in the way. Nothing is written then.
        InputError: if the labels or the preprocessing do not fit.
        TrustError: if a bundle is not signed by those who should have.
        QuartermapError: if a plugin library is missing.
    """
    out, options = Path(out), options or TritonOptions()
    check_outside(out, map(Path, (bundle, *options.engines_from)), DeployError)
    REPOSITORY.check_destination(out, force)
    with progress.step("checking the bundle"):
        plan = plan_triton(bundle, out, options)
    with progress.step("writing the model repository"), REPOSITORY.new(out, force) as draft:
        write_repository(plan, draft)
    return repository(plan, out)


def repository(plan: TritonPlan, path: Path) -> Repository:
    """Describe the repository that a plan became."""
    return Repository(
        path,
        plan.models,
        plan.source.backend,
        DEVICES[plan.gpu],
        plan.interface.max_batch,
        tuple(sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())),
        command("tritonserver", f"--model-repository={plan.place}", *plan.server_arguments),
        tuple(plan.notes()),
    )


def plan_triton(bundle: str | os.PathLike[str], out: Path, options: TritonOptions) -> TritonPlan:
    """Decide what will be written; `deploy_triton` says what is raised."""
    from quartermap_deploy.validation.golden import read_golden

    loaded = load_bundle(bundle, signed_by=options.signed_by)
    others = [load_bundle(path, signed_by=options.signed_by) for path in options.engines_from]
    source = find_source(loaded, options.backend, engines_from=others, plugin=options.plugin)
    if source.backend == "tensorrt" and options.device == "cpu":
        raise DeployError(
            "engines of TensorRT run on GPUs; leave the device out, or take the backend onnxruntime"
        )
    gpu = source.backend == "tensorrt" or options.device in DEVICES[1:]
    if unknown := [item for item in (*loaded.inputs, *loaded.outputs) if not is_known_type(item.type)]:
        raise DeployError(
            f"{unknown[0].name} of {loaded.path} is of {unknown[0].type}, which no client of Triton could send or "
            'read; compile it with io = "float32"'
        )
    name = options.name or str(loaded.manifest["model"]["name"])
    if not re.fullmatch(NAME, name):
        raise DeployError(
            f"the model is named {name!r} in {loaded.path}, which Triton does not take; name it with --name"
        )
    if source.static_batch and (options.max_batch or 1) > 1:
        raise DeployError(
            f"the bundle {loaded.path} takes one request at a time, as its inputs and outputs have no open batch in "
            "common; compile it with dynamic_batch = true for batches"
        )
    images, no_images = _images(loaded, options)
    files, probabilities = image_model_tensors(loaded)
    interface = Interface(
        name,
        loaded.inputs,
        loaded.outputs,
        0 if source.static_batch else _max_batch(options, source, gpu),
        images,
        _classes(loaded),
        files,
        probabilities,
    )
    place = _place(options, source, out)
    golden, _ = read_golden(loaded.path, loaded.manifest["golden"])
    if not golden:
        raise DeployError(f"the bundle {loaded.path} has no golden inputs to warm up with; compile it again")
    case = golden.get("images") or next(iter(golden.values()))
    labels = class_labels(loaded, options.labels) or tuple(map(str, range(loaded.num_classes or 0)))
    plan = TritonPlan(loaded, source, interface, options, gpu, labels, case, no_images, place)
    if options.release is not None:
        plan.check_release(options.release, "the release")
    return plan


def _images(bundle: Bundle, options: TritonOptions) -> tuple[ImageInterface | None, str]:
    """How image files become the input of a bundle's model; or why there are no models that take some.

    Raises:
        InputError: if a preprocessing is given that does not fit.
    """
    if not options.images:
        return None, ""
    reason = no_image_model(bundle)
    try:
        if reason is None:
            return image_interface(bundle, options.preprocessing), ""
    except InputError as error:
        if options.preprocessing:
            raise
        reason = str(error)
    if options.preprocessing:
        raise InputError(f"a preprocessing is for image files, and the model takes none: {reason}")
    return None, reason


def _classes(bundle: Bundle) -> int | None:
    """How many classes the first output has logits of; None if it has none."""
    logits = bundle.task == "classification" and len(bundle.outputs[0].shape) == 2
    return bundle.num_classes if logits else None


def _max_batch(options: TritonOptions, source: Source, gpu: bool) -> int:
    """The largest batch of a model whose batch is open."""
    limit = source.batch_limit
    if limit is not None and (options.max_batch or 0) > limit:
        raise DeployError(
            f"the engine takes batches of up to {limit}, {options.max_batch} were asked for; build it with a wider "
            "profile, or ask for fewer"
        )
    return options.max_batch or limit or (GPU_BATCH if gpu else CPU_BATCH)


def _place(options: TritonOptions, source: Source, out: Path) -> str:
    """Where the repository will lie."""
    place = str(out.absolute()) if options.mounted_at is None else options.mounted_at.rstrip("/") or "/"
    if not place.startswith("/"):
        raise DeployError(
            f"the repository cannot be mounted at {place!r}; expected a path that begins with /"
        )
    if source.plugin is not None and ";" in place:
        raise DeployError(
            f"Triton separates plugins by semicolons, so none can lie in {place}; choose another place"
        )
    return place


# Writing --------------------------------------------------------------------------------------------------------


def write_repository(plan: TritonPlan, folder: Path) -> None:
    """Write everything into an empty folder."""
    _write_model(plan, folder / plan.interface.name)
    if plan.interface.images is not None:
        _write_image_models(plan, plan.interface.images, folder)
    if plan.source.plugin is not None:
        shutil.copyfile(plan.source.plugin, folder / PLUGIN_FILE)
    manifest = plan.bundle.manifest
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    write_json(
        folder / MARKER,
        {
            "format": FORMAT,
            "bundle": {
                "name": plan.bundle.path.absolute().name,
                **{key: manifest.get(key) for key in ("created", "model", "plan", "versions")},
            },
            "backend": plan.source.backend,
            "tensorrt": plan.source.tensorrt,
            "server_arguments": plan.server_arguments,
            "models": plan.models,
            "files": {str(file.relative_to(folder)): describe_file(file) for file in files},
        },
    )


def _write_model(plan: TritonPlan, folder: Path) -> None:
    """Write the model itself."""
    interface, options = plan.interface, plan.options
    version = folder / str(options.version)
    version.mkdir(parents=True)
    for name, file in plan.source.files.items():
        shutil.copyfile(file, version / name)
    files: dict[str, bytes] = {}
    samples = []
    for index, sample in enumerate(_samples(plan), 1):
        names = {}
        for place, item in enumerate(interface.inputs, 1):
            # Not the input's name, which may be no name for a file.
            names[item.name] = f"sample{index}_input{place}"
            values = sample[item.name].astype(np.dtype(item.type).newbyteorder("<"))
            files[names[item.name]] = values.tobytes()
        shapes = {name: values.shape for name, values in sample.items()}
        samples.append(Sample(f"sample {index}", names, shapes))
    tuned = {profile.batch[1] for profile in plan.source.profiles} | {interface.max_batch}
    samples += [
        replace(samples[0], name=f"batch of {size}", batch=size)
        for size in sorted(tuned)
        if 1 < size <= interface.max_batch
    ]
    config = model_config(
        interface,
        plan.source,
        samples,
        gpu=plan.gpu,
        instances=options.instances,
        threads=options.threads,
        max_delay_us=options.max_delay_us,
    )
    _write(folder, config, plan.labels if interface.classes is not None else None, files)


def _samples(plan: TritonPlan) -> list[dict[str, NDArray[Any]]]:
    """The golden case as Triton makes requests of it: one for each entry of the batch, or all of it at once."""
    if not plan.interface.max_batch:
        return [dict(plan.golden)]
    count = len(next(iter(plan.golden.values())))
    return [{name: values[place] for name, values in plan.golden.items()} for place in range(count)]


def _write_image_models(plan: TritonPlan, images: ImageInterface, folder: Path) -> None:
    """Write the models that images go through besides the model itself."""
    interface, version = plan.interface, str(plan.options.version)
    settings = {**images.preprocessing.to_dict(), "type": images.item.type, "largest": pixels.LARGEST}
    config = preprocess_config(interface, json.dumps(settings), plan.options.image_workers)
    labels = None if interface.classes is None else plan.labels
    _write(folder / interface.preprocess, config)
    _write(folder / interface.ensemble, ensemble_config(interface), labels)
    scripts = {interface.preprocess: "preprocess.py"}
    if interface.classes is not None:
        config = probabilities_config(interface, activation_of(plan.bundle))
        _write(folder / interface.softmax, config, labels)
        scripts[interface.softmax] = "probabilities.py"
    for name, script in scripts.items():
        (folder / name / version).mkdir()
        (folder / name / version / "model.py").write_text(_script(script), encoding="utf-8")
        (folder / name / version / "__pycache__").write_text(NO_CACHE, encoding="utf-8")
    # Triton wants a version of the ensemble too, and storage for objects forgets folders that are empty.
    (folder / interface.ensemble / version).mkdir()
    (folder / interface.ensemble / version / "ensemble.txt").write_text(
        "An ensemble has no file of its own; this one keeps its version's folder.\n", encoding="utf-8"
    )


def _script(name: str) -> str:
    """The text of a model, with that of `data/pixels.py` in the place where it imports from there."""
    text = (_MODELS / name).read_text(encoding="utf-8")
    source = Path(pixels.__file__).read_text(encoding="utf-8")
    code = source.partition("import annotations\n")[2].strip()
    return re.sub(r"(?m)^from quartermap_deploy\.data\.pixels import (\([^)]*\)|.*)$", lambda _: code, text)


def _write(
    folder: Path,
    config: Mapping[str, Any],
    labels: Sequence[str] | None = None,
    warmup: Mapping[str, bytes] | None = None,
) -> None:
    """Write what lies beside the versions of a model."""
    folder.mkdir(exist_ok=True)
    (folder / "config.pbtxt").write_bytes(encoded(textproto(config)))
    if labels is not None:
        (folder / LABELS_FILE).write_text("".join(f"{name}\n" for name in labels), encoding="utf-8")
    if warmup:
        (folder / "warmup").mkdir()
        for name, data in warmup.items():
            (folder / "warmup" / name).write_bytes(data)
