"""The target `tensorrt-rtx`: engines for GeForce and RTX GPUs, built without a GPU.

The model is lowered again with the scan's `tree` body, put into the main graph; or, from TensorRT for RTX 1.7 on and
where that is asked for, scans become nodes for our plugin, as for the target `tensorrt`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy import gpu as devices
from quartermap_deploy.errors import InputError
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.targets.tensorrt import target as tensorrt
from quartermap_deploy.targets.tensorrt.cuda_runtime import require_runtime
from quartermap_deploy.targets.tensorrt.flavour import TENSORRT_RTX, version_numbers
from quartermap_deploy.targets.tensorrt.options import EngineOptions
from quartermap_deploy.targets.tensorrt.plugin import check_library, find_library, require_code

if TYPE_CHECKING:
    import onnx

    from quartermap_deploy.targets.tensorrt.session import EngineSession

FIRST_WITH_PLUGINS = (1, 7)
PRECISIONS = ("float32", "float16", "bfloat16")


def check(recipe: Any = None) -> None:
    """Check, before any work, that engines can be built here.

    Raises:
        MissingDependencyError: if TensorRT for RTX is absent or its version is not supported, or if there is a GPU that
            the engine is for, but no CUDA runtime to run it.
        InputError: if it does not know a compute capability or cannot build for it, or the recipe has an option that it
            has not.
        EngineError: if scans are to be the plugin, and there is no library of it, or none for these GPUs.
        PluginError: if the plugin library is damaged, not ours, or of another release.
    """
    from quartermap_deploy.targets.tensorrt.builder import known_capabilities

    trt = TENSORRT_RTX.load()
    options = getattr(recipe, "engine", None) or EngineOptions()
    known_capabilities(trt, options.compute_capabilities)
    gpu = devices.find_gpu()
    if gpu is not None and gpu.compute_capability in options.compute_capabilities:
        require_runtime("running the engine that is built, to prove it,")
    idle = ["version_compatible"] if options.version_compatible else []
    idle += ["hardware_compatibility"] if options.hardware_compatibility != "none" else []
    alone = "tensorrt" not in getattr(recipe, "targets", ())
    if idle and alone:
        raise InputError(f"TensorRT for RTX has no {', '.join(idle)}; leave it out")
    if options.scan == "plugin":
        _library(trt, options)
    elif options.plugin is not None and alone:
        raise InputError(
            f"with scan = {options.scan!r} an engine of TensorRT for RTX takes no plugin library; leave it out, or ask "
            'for scan = "plugin" (--scan plugin)'
        )


def _library(trt: Any, options: EngineOptions) -> Path:
    """The plugin library for an engine, checked.

    Raises:
        InputError: if this TensorRT for RTX takes no plugins.
        EngineError: if there is no library, or none for these GPUs.
        PluginError: if it is damaged, not ours, or of another release.
    """
    if version_numbers(trt.__version__)[:2] < FIRST_WITH_PLUGINS:
        raise InputError(
            f"TensorRT for RTX {trt.__version__} takes no plugins, its parser and builder do from 1.7 on; install that "
            '(pip install -U tensorrt-rtx-cu13), or leave the scan to standard operators: scan = "tree" (--scan tree)'
        )
    path = find_library(options.plugin)
    require_code(check_library(trt, path), options.compute_capabilities)
    return path


def prepare(model: onnx.ModelProto, at: Sequence[Mapping[str, Sequence[int]]] = ()) -> onnx.ModelProto:
    """The model as the parser gets it where scans are no plugins: in standard operators, in the main graph.

    Args:
        model: the portable model.
        at: the smallest and the largest shapes of its inputs that the engine has to take.
    """
    from quartermap_deploy.passes.inline_scans import inline_scans
    from quartermap_deploy.passes.lower import lower

    return inline_scans(lower(model, "tree", at))


def build(
    model_path: Path,
    directory: Path,
    options: EngineOptions | None = None,
    *,
    examples: Sequence[Mapping[str, Sequence[int]]] = (),
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Build an engine; see `builder.build_engine`. `check` says what else is refused."""
    from quartermap_deploy.targets.tensorrt.builder import build_engine

    options = options or EngineOptions()
    library = _library(TENSORRT_RTX.load(), options) if options.scan == "plugin" else None
    return build_engine(
        TENSORRT_RTX,
        Path(model_path),
        Path(directory),
        options,
        prepare if library is None else tensorrt.prepare,
        plugin=library,
        examples=examples,
        progress=progress,
    )


def cannot_run(entry: Mapping[str, Any]) -> str | None:
    """Why no engine of this entry can be run here, or None; see `session.cannot_run`."""
    from quartermap_deploy.targets.tensorrt import session

    return session.cannot_run(TENSORRT_RTX, entry)


def open(
    bundle_path: Path,
    entry: Mapping[str, Any],
    *,
    plugin: Path | None = None,
    native: bool | None = None,
    built_here: bool = False,
) -> EngineSession:
    """Return a session; see `session.open_engine`."""
    from quartermap_deploy.targets.tensorrt.session import open_engine

    return open_engine(TENSORRT_RTX, Path(bundle_path), entry, plugin=plugin, built_here=built_here)
