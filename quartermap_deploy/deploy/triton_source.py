"""What of a bundle Triton serves: which backend, which files, and how large its batches may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.batch_axis import batch_of
from quartermap_deploy.bundle import MODEL, Bundle
from quartermap_deploy.errors import DeployError, EngineError, QuartermapError
from quartermap_deploy.onnx_bounds import check_model
from quartermap_deploy.plain_text import command
from quartermap_deploy.targets.tensorrt.options import EngineOptions, Profile

if TYPE_CHECKING:
    from quartermap_deploy.targets.tensorrt.plugin import WantedLibrary

BACKENDS = ("onnxruntime", "tensorrt")
"""Of Triton, each with the target of the same name; TensorRT for RTX has none."""

ONNX_FILE, PLAN_FILE = "model.onnx", "model.plan"
"""The names that Triton looks for by itself."""


@dataclass(frozen=True)
class Source:
    """What is served.

    Attributes:
        backend: one of `BACKENDS`.
        files: what lies in the version's folder, by name.
        default_file: the file for every GPU that `capability_files` does not name, or None if it is no use there.
        capability_files: names of engines by compute capability, such as "8.9".
        profiles: optimisation profiles of the engines; empty without engines.
        batch_limit: largest batch, or None if only memory limits it; 1 where requests are never put together.
        static_batch: whether they never are: the inputs and outputs have no open batch in common.
        plugin: the plugin library that the engines need, or None.
        version_compatible: whether later versions of TensorRT run the engines.
        tensorrt: the version of TensorRT that the engines are for, or None.
    """

    backend: str
    files: Mapping[str, Path]
    default_file: str | None
    static_batch: bool
    batch_limit: int | None
    capability_files: Mapping[str, str] = field(default_factory=dict)
    profiles: tuple[Profile, ...] = ()
    plugin: Path | None = None
    version_compatible: bool = False
    tensorrt: str | None = None


def choose_backend(bundle: Bundle, backend: str | None = None) -> str:
    """Return the backend that is asked for, or else the one that fits the bundle's targets: an engine comes first.

    Raises:
        DeployError: if there is no such backend, or the bundle was not built for it.
    """
    targets: dict[str, Any] = bundle.manifest["targets"]
    if backend is not None and backend not in BACKENDS:
        raise DeployError(
            f"Triton has no backend {backend!r} for these bundles; expected {' or '.join(BACKENDS)}"
        )
    if backend is None:
        backend = next((name for name in reversed(BACKENDS) if name in targets), None)
    if backend in targets:
        assert backend is not None
        return backend
    has = f"the bundle {bundle.path} was built for {', '.join(targets)}"
    if backend is None:
        raise DeployError(
            f"{has}, and Triton has no backend for that; compile it with --target onnxruntime or tensorrt"
        )
    remedy = (
        f"add an engine with `{command('quartermap', 'rebuild', bundle.path, '--target', 'tensorrt')}`"
        if backend == "tensorrt"
        else "compile it with onnxruntime among its --target"
    )
    raise DeployError(f"{has}, not for {backend}; {remedy}")


def find_source(
    bundle: Bundle,
    backend: str | None = None,
    *,
    engines_from: Sequence[Bundle] = (),
    plugin: Path | None = None,
) -> Source:
    """Find what is served of a bundle.

    Args:
        bundle: the bundle.
        backend: one of `BACKENDS`; None takes the one that fits.
        engines_from: more bundles of the same model, whose engines are for other GPUs.
        plugin: the plugin library of the engines; None looks where `quartermap compile` does.

    Raises:
        DeployError: if the bundle was not built for the backend, an engine does not say for which GPU it is, or the
            bundles or the plugin do not belong together.
        EngineError: if there is no plugin library.
    """
    chosen = choose_backend(bundle, backend)
    static = not isinstance(batch_of(bundle), str)
    if chosen == "onnxruntime":
        for value, name in ((engines_from, "other bundles' engines"), (plugin, "a plugin")):
            if value:
                raise DeployError(f"the backend onnxruntime takes no engines, so {name} must be left out")
        check_model(bundle.path / MODEL)
        return Source(chosen, {ONNX_FILE: bundle.path / MODEL}, ONNX_FILE, static, 1 if static else None)
    return _engines([bundle, *engines_from], static, plugin)


def _engines(bundles: Sequence[Bundle], static: bool, plugin: Path | None) -> Source:
    """What is served of bundles of one model, each with an engine."""
    for other in bundles[1:]:
        choose_backend(other, "tensorrt")
    entries = [bundle.manifest["targets"]["tensorrt"] for bundle in bundles]
    first = entries[0]
    options = EngineOptions.from_dict(first["options"])
    for bundle, entry in zip(bundles[1:], entries[1:], strict=True):
        _compare(bundles[0], bundle, first, entry)
    files: dict[str, Path] = {}
    by_capability: dict[str, str] = {}
    default = None
    for bundle, entry in zip(bundles, entries, strict=True):
        engine = bundle.path / entry["file"]
        if EngineOptions.from_dict(entry["options"]).hardware_compatibility == "ampere_plus":
            if default is not None:
                raise DeployError(
                    f"{bundle.path} and another bundle both have an engine for every GPU; leave one out"
                )
            default, files[PLAN_FILE] = PLAN_FILE, engine
            continue
        for capability in entry["compute_capabilities"]:
            if capability in by_capability:
                raise DeployError(
                    f"{bundle.path} and another bundle both have an engine for compute capability {capability}; "
                    "leave one out"
                )
            name = f"model.sm{capability.replace('.', '')}.plan"
            by_capability[capability], files[name] = name, engine
    return Source(
        "tensorrt",
        files,
        default,
        static,
        1 if static else batch_limit(options.profiles, bundles[0].path),
        by_capability,
        options.profiles,
        _plugin(bundles[0], first, plugin),
        options.version_compatible,
        first["version"],
    )


def _compare(first: Bundle, other: Bundle, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Check that two engines can be one model to Triton."""
    same = {
        "model.onnx": (
            first.manifest["files"][MODEL]["sha256"][:12],
            other.manifest["files"][MODEL]["sha256"][:12],
        ),
        "version of TensorRT": (expected["version"], found["version"]),
        "plugin": tuple(
            "none" if wanted is None else wanted.sha256[:12]
            for wanted in (_wanted(first, expected), _wanted(other, found))
        ),
        "profiles": (expected["options"].get("profiles"), found["options"].get("profiles")),
    }
    for name, (wanted, is_there) in same.items():
        if wanted != is_there:
            raise DeployError(
                f"the engines of {first.path} and {other.path} do not belong together: {name} {wanted} and {is_there}; "
                "give engines of one model, built alike on GPUs of different kinds"
            )


def batch_limit(profiles: Sequence[Profile], bundle: Path) -> int:
    """The largest n such that a profile takes each batch from 1 to n, as Triton may form any of them.

    Where profiles differ in height or width too, each of them has to take these batches.

    Raises:
        DeployError: if no profile takes a single image.
    """
    if any(profile.height or profile.width for profile in profiles):
        reached = min(profile.batch[2] if profile.batch[0] == 1 else 0 for profile in profiles)
    else:
        reached, before = 0, -1
        while reached != before:
            before = reached
            reached = max(
                [reached, *(profile.batch[2] for profile in profiles if profile.batch[0] <= reached + 1)]
            )
    if reached == 0:
        raise DeployError(
            f"no profile of the engine in {bundle} takes a single image, which Triton sends when nothing else waits; "
            "build it with a profile whose smallest batch is 1"
        )
    return reached


def _wanted(bundle: Bundle, entry: dict[str, Any]) -> WantedLibrary | None:
    """The plugin library that an engine was built with, as its manifest says."""
    from quartermap_deploy.targets.tensorrt.plugin import WantedLibrary

    try:
        return WantedLibrary.of_entry(entry)
    except EngineError as error:
        raise DeployError(f"{bundle.path}: {error}") from error


def _plugin(bundle: Bundle, entry: dict[str, Any], named: Path | None) -> Path | None:
    """The plugin library that an engine was built with."""
    from quartermap_deploy.targets.tensorrt.plugin import find_library, wrong_library

    wanted = _wanted(bundle, entry)
    if wanted is None:
        if named is not None:
            raise DeployError(f"the engine in {bundle.path} needs no plugin; leave {named} out")
        return None
    try:
        found = find_library(named, wanted)
    except QuartermapError as error:
        raise DeployError(
            f"the engine in {bundle.path} needs the plugin that it was built with, {wanted}, to go with it: name it "
            f"with --plugin ({error})"
        ) from error
    if (reason := wrong_library(found, wanted)) is not None:
        raise DeployError(f"of the engine in {bundle.path}: {reason}; name that one with --plugin")
    return found
