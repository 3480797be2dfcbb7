"""The target `tensorrt-rtx`: engines for GeForce and RTX GPUs, built without a GPU.

TensorRT for RTX takes no plugin nodes. The model is lowered again with the scan's `tree` body, put into the main graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy import gpu as devices
from quartermap_deploy.errors import InputError
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.targets.tensorrt.cuda_runtime import require_runtime
from quartermap_deploy.targets.tensorrt.flavour import TENSORRT_RTX
from quartermap_deploy.targets.tensorrt.options import EngineOptions

if TYPE_CHECKING:
    import onnx

    from quartermap_deploy.targets.tensorrt.session import EngineSession

TURING = "7.5"
PRECISIONS = ("float32", "float16", "bfloat16")


def check(recipe: Any = None) -> None:
    """Check, before any work, that engines can be built here.

    Raises:
        MissingDependencyError: if TensorRT for RTX is absent or its version is not supported, or if there is a GPU that
            the engine is for, but no CUDA runtime to run it.
        InputError: if it does not know a compute capability or cannot build for it, or the recipe has an option that it
            has not.
    """
    from quartermap_deploy.targets.tensorrt.builder import known_capabilities

    trt = TENSORRT_RTX.load()
    options = getattr(recipe, "engine", None) or EngineOptions()
    known_capabilities(trt, options.compute_capabilities)
    if TURING in options.compute_capabilities:
        raise InputError(
            f"TensorRT for RTX {trt.__version__} has no float32 matrix product for compute capability {TURING} "
            "(Turing), and the scan's time step is one; leave it out, or run the bundle by ONNX Runtime there"
        )
    gpu = devices.find_gpu()
    if gpu is not None and gpu.compute_capability in options.compute_capabilities:
        require_runtime("running the engine that is built, to prove it,")
    idle = [name for name in ("plugin", "version_compatible") if getattr(options, name)]
    idle += ["hardware_compatibility"] if options.hardware_compatibility != "none" else []
    if idle and "tensorrt" not in getattr(recipe, "targets", ()):
        raise InputError(f"TensorRT for RTX has no {', '.join(idle)}; leave it out")


def prepare(model: onnx.ModelProto, at: Sequence[Mapping[str, Sequence[int]]] = ()) -> onnx.ModelProto:
    """The model as the parser gets it: scans in standard operators, in the main graph.

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
    """Build an engine; see `builder.build_engine`."""
    from quartermap_deploy.targets.tensorrt.builder import build_engine

    return build_engine(
        TENSORRT_RTX,
        Path(model_path),
        Path(directory),
        options or EngineOptions(),
        prepare,
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
    """Return a session; see `session.open_engine`. These engines have no plugin."""
    from quartermap_deploy.targets.tensorrt.session import open_engine

    return open_engine(TENSORRT_RTX, Path(bundle_path), entry, built_here=built_here)
