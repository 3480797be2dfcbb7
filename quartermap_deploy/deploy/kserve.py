"""`deploy_kserve`: a bundle as an InferenceService for KServe, with the model repository that it serves.

The predictor is Triton, by KServe's runtime `kserve-tritonserver`, so that the service needs no container image that
somebody would first have to build, and that CPUs and GPUs are served alike. Its storage holds the folder that
`deploy_triton` writes, which KServe puts to /mnt/models in the container.

Fields are those of serving.kserve.io/v1beta1 as of KServe 0.20; the names of the deployment modes are as of 0.16.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quartermap_deploy.deploy.triton import (
    REPOSITORY,
    Repository,
    TritonOptions,
    TritonPlan,
    plan_triton,
    repository,
    write_repository,
)
from quartermap_deploy.errors import DeployError
from quartermap_deploy.files import check_outside, pending_file
from quartermap_deploy.plain_text import command, encoded
from quartermap_deploy.progress import SILENT, Progress

API_VERSION = "serving.kserve.io/v1beta1"
RUNTIME = "kserve-tritonserver"
RUNTIME_VERSION = "26.01-py3"
"""A tag of Triton's image whose ONNX Runtime, 1.23, runs every bundle in every opset."""
MOUNT = "/mnt/models"
"""Where KServe puts what is in the storage."""
STORAGE_SCHEMES = (
    *("gs", "s3", "pvc", "file", "https", "http", "hdfs", "webhdfs", "oci", "oci+native", "hf"),
)
KNATIVE_METRICS = ("concurrency", "rps")
METRICS = (*KNATIVE_METRICS, "cpu")
"""What KServe scales by: the first two with Knative, the last with Kubernetes' own autoscaler."""
CPU_TARGET = 80
"""Percent of the CPUs that were asked for, above which the autoscaler adds a replica."""
LONGEST_NAME = 63 - len("-predictor")
"""Letters of a service's name, which KServe makes longer for the service of Kubernetes behind it."""
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_DOMAIN = r"[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?(\.[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?)*(:[0-9]+)?"
_PART = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_NAMES = (
    ("runtime", rf"{_LABEL}(\.{_LABEL})*", 253, "small letters, digits, - and . as Kubernetes names things"),
    ("runtime_version", _TAG, 128, "a tag of an image, such as 26.01-py3"),
    (
        *("container", rf"({_DOMAIN}/)?{_PART}(/{_PART})*(:{_TAG})?(@[a-z0-9]+:[0-9a-f]{{32,}})?", 4096),
        "an image, such as registry.example.org/triton-pillow:26.01",
    ),
)
"""Options that Kubernetes or a container registry has rules for: the rule, the most letters, and an example."""
_URI = r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+"
HEADER = "# InferenceService, written by quartermap-deploy.\n"


@dataclass(frozen=True)
class KServeOptions:
    """How the service is run.

    Attributes:
        name: of the service; None takes the model's, in letters that Kubernetes allows.
        storage_uri: where the model repository will be stored; None for `pvc://models/NAME`, a folder on the persistent
            volume claim `models`.
        runtime: KServe's serving runtime, one that runs Triton.
        runtime_version: tag of the runtime's image; None takes one with a fitting ONNX Runtime. Engines need the tag
            whose TensorRT is that of the engine.
        container: image to run instead of the runtime's: Triton with Pillow, for the models that take images. They are
            left out without it, as NVIDIA's image has no Pillow.
        min_replicas: fewest replicas; 0 only with "concurrency" and "rps".
        max_replicas: most replicas.
        scale_metric: one of `METRICS`; None takes "cpu" on CPUs and "concurrency" on GPUs, whose load no CPU shows.
        scale_target: of each replica: requests at once, requests each second, or percent of its CPUs; None for the
            largest batch or 80 %. "rps" has no default.
        cpus: of each replica.
        memory: of each replica, as Kubernetes writes it.
        gpus: of each replica; None for one where the model runs on GPUs.
    """

    name: str | None = None
    storage_uri: str | None = None
    runtime: str = RUNTIME
    runtime_version: str | None = None
    container: str | None = None
    min_replicas: int = 1
    max_replicas: int = 3
    scale_metric: str | None = None
    scale_target: int | None = None
    cpus: int = 2
    memory: str = "4Gi"
    gpus: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("min_replicas", 0), ("max_replicas", 1), ("cpus", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise DeployError(f"{name} = {value!r}; expected a whole number of at least {least}")
        for name in ("scale_target", "gpus"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise DeployError(f"{name} = {value!r}; expected a whole number of at least 1")
        if self.min_replicas > self.max_replicas:
            raise DeployError(
                f"min_replicas = {self.min_replicas} is more than max_replicas = {self.max_replicas}"
            )
        if self.scale_metric not in (None, *METRICS):
            raise DeployError(
                f"unknown scale_metric {self.scale_metric!r}; expected one of {', '.join(METRICS)}"
            )
        amount = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(Ki|Mi|Gi|Ti|k|M|G|T)?", self.memory)
        if amount is None or not float(amount[1]) > 0:
            raise DeployError(f"memory = {self.memory!r}; expected an amount above 0, such as 4Gi")
        for name, pattern, longest, expected in _NAMES:
            value = getattr(self, name)
            if value is not None and not (len(value) <= longest and re.fullmatch(pattern, value)):
                raise DeployError(f"{name} = {value!r}; expected {expected}")
        if self.storage_uri is not None:
            scheme, separator, rest = self.storage_uri.partition("://")
            if not (separator and re.fullmatch(_URI, rest)) or scheme not in STORAGE_SCHEMES:
                raise DeployError(
                    f"KServe knows no storage {self.storage_uri!r}; expected a place that begins with "
                    f"{', '.join(f'{known}://' for known in STORAGE_SCHEMES)}, in the letters of URIs: a blank as %20"
                )


@dataclass(frozen=True)
class Service:
    """An InferenceService that was written.

    Attributes:
        path: its file.
        name: of the service.
        storage_uri: where the repository has to be stored.
        scaling: how it scales, in words.
        repository: the model repository.
    """

    path: Path
    name: str
    storage_uri: str
    scaling: str
    repository: Repository

    @property
    def steps(self) -> tuple[str, ...]:
        """What is left to do."""
        return (
            f"copy what is in {self.repository.path} to {self.storage_uri}",
            command("kubectl", "apply", "-f", self.path),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "path": self.path,
            "name": self.name,
            "storage_uri": self.storage_uri,
            "scaling": self.scaling,
            "steps": self.steps,
            "repository": self.repository.to_dict(),
        }


def deploy_kserve(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: KServeOptions | None = None,
    triton: TritonOptions | None = None,
    *,
    repository_folder: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Service:
    """Write an InferenceService, and the model repository that it serves.

    Args:
        bundle: folder of the bundle.
        out: file of the InferenceService; it must not exist, unless `force` is given and it is one of ours.
        options: how the service is run.
        triton: how the bundle is served; threads, images and the place of the repository follow from `options`.
        repository_folder: where to write the repository; None for digits-repository beside digits.yaml.
        force: replace both.
        progress: told about the steps.

    Raises:
        BundleError: if the bundle is none, or is damaged.
        DeployError: if it cannot be served so, or something else is in the way. Nothing is written then.
        InputError: if the labels or the preprocessing do not fit.
        TrustError: if a bundle is not signed by those who should have.
        QuartermapError: if a plugin library is missing.
    """
    out, options, triton = Path(out), options or KServeOptions(), triton or TritonOptions()
    folder = out.with_name(f"{out.stem}-repository") if repository_folder is None else Path(repository_folder)
    for path in (out, folder):
        check_outside(path, map(Path, (bundle, *triton.engines_from)), DeployError)
    whole, file = folder.resolve(), out.resolve()
    if whole == file or whole in file.parents or file in whole.parents:
        raise DeployError(
            f"the InferenceService {out} and the repository {folder} need places beside each other"
        )
    _check_file(out, force)
    REPOSITORY.check_destination(folder, force)
    with progress.step("checking the bundle"):
        triton = replace(
            triton,
            threads=max(1, options.cpus // triton.instances),
            images=options.container is not None,
            mounted_at=MOUNT,
        )
        plan = plan_triton(bundle, folder, triton)
        for what, named in (
            ("--runtime-version", options.runtime_version),
            ("--container", options.container),
        ):
            if named is not None:
                plan.check_release(named, what)
        values = inference_service(plan, options)
    text = HEADER + to_yaml(values)
    with (
        progress.step("writing the model repository"),
        pending_file(out, encoded(text)),
        REPOSITORY.new(folder, force) as draft,
    ):
        write_repository(plan, draft)
    predictor = values["spec"]["predictor"]
    return Service(
        out,
        values["metadata"]["name"],
        predictor["model"]["storageUri"],
        f"{predictor['minReplicas']} to {predictor['maxReplicas']} replicas, by {predictor['scaleMetric']}, target "
        f"{predictor['scaleTarget']}",
        repository(plan, folder),
    )


def inference_service(plan: TritonPlan, options: KServeOptions) -> dict[str, Any]:
    """Return the InferenceService as plain values.

    Raises:
        DeployError: if the options do not fit each other or the bundle.
    """
    name = service_name(plan.interface.name) if options.name is None else options.name
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > LONGEST_NAME:
        raise DeployError(
            f"a service cannot be named {name!r}; expected up to {LONGEST_NAME} small letters, digits and -, with a "
            "letter first and none of - last"
        )
    metric, target = _scaling(plan, options)
    knative = metric in KNATIVE_METRICS
    # Knative scales by itself; the other autoscaler has to be named, or KServe reads the metric as one of Knative's.
    annotations = {"serving.kserve.io/deploymentMode": "Knative" if knative else "Standard"}
    if not knative:
        annotations["serving.kserve.io/autoscalerClass"] = "hpa"
    return {
        "apiVersion": API_VERSION,
        "kind": "InferenceService",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {
            "predictor": {
                "minReplicas": options.min_replicas,
                "maxReplicas": options.max_replicas,
                "scaleMetric": metric,
                "scaleTarget": target,
                "model": {
                    "modelFormat": {"name": "triton", "version": "2"},
                    "protocolVersion": "v2",
                    "runtime": options.runtime,
                    **_image(plan, options),
                    "storageUri": options.storage_uri or f"pvc://models/{name}",
                    **_arguments(plan),
                    "resources": _resources(plan, options),
                    "readinessProbe": {
                        "httpGet": {"path": "/v2/health/ready", "port": 8080},
                        "failureThreshold": 3,
                        "periodSeconds": 10,
                    },
                },
            }
        },
    }


def service_name(model: str) -> str:
    """The name of a model in the letters that Kubernetes allows."""
    name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    return name if name[:1].isalpha() else f"model-{name}".rstrip("-")


def _scaling(plan: TritonPlan, options: KServeOptions) -> tuple[str, int]:
    """What to scale by, and the target."""
    metric = options.scale_metric or ("concurrency" if plan.gpu else "cpu")
    if options.min_replicas == 0 and metric == "cpu":
        raise DeployError(
            f"min_replicas = 0 needs scale_metric {' or '.join(KNATIVE_METRICS)}: where no replica runs, no CPU shows "
            "that one is wanted"
        )
    defaults = {"cpu": CPU_TARGET, "concurrency": max(1, plan.interface.max_batch)}
    target = options.scale_target or defaults.get(metric)
    if target is None:
        raise DeployError(
            "scale_metric = rps needs a scale_target: how many requests each second a replica answers"
        )
    if metric == "cpu" and target > 100:
        raise DeployError(f"scale_target = {target}; cpu is in percent of what a replica asks for")
    return metric, target


def _image(plan: TritonPlan, options: KServeOptions) -> dict[str, str]:
    """Which image runs: the runtime's with a tag, or another one."""
    if options.container is not None:
        if options.runtime_version is not None:
            raise DeployError(
                "runtime_version is a tag of the runtime's image; leave it out where container names another image"
            )
        return {"image": options.container}
    if options.runtime_version is not None:
        return {"runtimeVersion": options.runtime_version}
    if plan.source.backend == "tensorrt":
        raise DeployError(
            f"the engine is for TensorRT {plan.source.tensorrt}; name the tag of Triton's image that has it with "
            "--runtime-version (NVIDIA's support matrix lists them), or an image with --container"
        )
    return {"runtimeVersion": RUNTIME_VERSION}


def _arguments(plan: TritonPlan) -> dict[str, list[str]]:
    """Arguments for Triton, which KServe appends to the runtime's own."""
    arguments = plan.server_arguments
    return {"args": arguments} if arguments else {}


def _resources(plan: TritonPlan, options: KServeOptions) -> dict[str, Any]:
    """What a replica asks for, and its limits, which are the same."""
    amounts = {"cpu": str(options.cpus), "memory": options.memory}
    gpus = options.gpus if options.gpus is not None else int(plan.gpu)
    if gpus and not plan.gpu:
        raise DeployError(
            "the model runs on the CPU, so it needs no GPUs; take the device cuda, or leave them out"
        )
    limits = amounts | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    return {"requests": amounts, "limits": limits}


# Files ----------------------------------------------------------------------------------------------------------


def to_yaml(values: Mapping[str, Any]) -> str:
    """Return plain values as YAML, in their order."""
    import yaml

    class Plain(yaml.SafeDumper):  # type: ignore[misc]
        """Writes a value that is there twice out twice, instead of as a reference."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    text: str = yaml.dump(dict(values), Dumper=Plain, sort_keys=False, width=120)
    return text


def _check_file(path: Path, force: bool) -> None:
    """Check, before any work, that an InferenceService may be written to `path`."""
    if not path.parent.exists():
        raise DeployError(f"cannot write to {path}: there is no folder {path.parent}; make it first")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise DeployError(f"cannot write to {path}: {path.parent} is no folder that you may write to")
    if not path.exists() and not path.is_symlink():
        return
    ours = path.is_file() and not path.is_symlink() and path.read_bytes().startswith(HEADER.encode())
    if ours and force:
        return
    remedy = "choose another file"
    if ours:
        remedy += ", or replace it with --force"
    elif force:
        remedy = f"it was not written by quartermap, so --force does not replace it; {remedy}"
    raise DeployError(f"{path} exists already; {remedy}")
