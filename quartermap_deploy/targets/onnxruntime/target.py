"""The target `onnxruntime`: the portable model as it is.

On a CPU its scans run by the native operator of the CPU library where that is found and takes the model, and by the
standard operators in the file everywhere else. Both are the same file. With the library, the session's copy of the
graph also has its layer normalisations of maps as one operator each (`fused_norms`). For a GPU the scans are written
anew as the model is loaded; `opening` tells how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.targets.execution import ON_CPU, Execution
from quartermap_deploy.targets.onnxruntime.opening import started
from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession

if TYPE_CHECKING:
    from quartermap_deploy.targets.tensorrt.options import EngineOptions

PRECISIONS = ("float32", "float16")
"""ONNX Runtime has no kernels for bfloat16 on a CPU and refuses such a model."""


def check(recipe: Any = None) -> None:
    """Check, before any work, that the providers of a recipe start here.

    Raises:
        MissingDependencyError: if one is not in the package of ONNX Runtime that is installed.
        BundleError: if one cannot start.
    """
    started(getattr(recipe, "execution", ON_CPU))


def build(
    model_path: Path,
    directory: Path,
    options: EngineOptions | None = None,
    *,
    examples: Sequence[Mapping[str, Sequence[int]]] = (),
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Nothing has to be written: the portable model is loaded as it is. Returns the manifest entry."""
    import onnxruntime

    return {"file": model_path.name, "onnxruntime": onnxruntime.__version__, "providers": list(ON_CPU.names)}


def cannot_run(entry: Mapping[str, Any]) -> str | None:
    """Nothing speaks against running the portable model."""
    return None


def open(
    bundle_path: Path,
    entry: Mapping[str, Any],
    *,
    plugin: Path | None = None,
    native: bool | None = None,
    built_here: bool = False,
    execution: Execution = ON_CPU,
) -> OnnxRuntimeSession:
    """Return a session for the bundle's portable model, which has no plugin and no code of its own.

    What the entry says of providers is where the bundle was proved, and decides nothing here.
    """
    path = Path(bundle_path) / entry["file"]
    return OnnxRuntimeSession(path, rules=entry.get("size_rules", ()), native=native, execution=execution)
