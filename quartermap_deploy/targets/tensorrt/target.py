"""The target `tensorrt`: engines for the GPU at hand, scans by our plugin."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy import gpu as devices
from quartermap_deploy.errors import InputError
from quartermap_deploy.lowering.operator import DOMAIN, SELECTIVE_SCAN_2D, VERSION, direction_names
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.targets.tensorrt.cuda_runtime import require_runtime
from quartermap_deploy.targets.tensorrt.flavour import TENSORRT
from quartermap_deploy.targets.tensorrt.objects import require_driver, require_gpu
from quartermap_deploy.targets.tensorrt.options import EngineOptions
from quartermap_deploy.targets.tensorrt.plugin import check_library, find_library, require_code

if TYPE_CHECKING:
    import onnx

    from quartermap_deploy.targets.tensorrt.session import EngineSession

PRECISIONS = ("float32", "float16", "bfloat16")


def check(recipe: Any = None) -> None:
    """Check, before any work, that engines can be built and run here.

    Raises:
        MissingDependencyError: if TensorRT or the CUDA runtime is absent, or the version is not supported.
        EngineError: if there is no GPU, no plugin library, or one that is not for a GPU or for this TensorRT.
        InputError: if this TensorRT has not the hardware compatibility that is asked for, or scans are to be something
            else than the plugin.
        PluginError: if the plugin library is damaged, not ours, or of another release.
    """
    from quartermap_deploy.targets.tensorrt.builder import hardware_level

    trt, gpu = TENSORRT.load(), devices.find_gpu()
    require_gpu(TENSORRT, gpu)
    require_driver(TENSORRT)
    require_runtime("running the engine that is built, to prove it,")
    options = getattr(recipe, "engine", None) or EngineOptions()
    hardware_level(trt, TENSORRT, options)
    if options.scan == "tree" and "tensorrt-rtx" not in getattr(recipe, "targets", ()):
        raise InputError(
            'scan = "tree" is for the target tensorrt-rtx; for tensorrt scans are the plugin, so leave it out'
        )
    library = check_library(trt, find_library(options.plugin))
    require_code(library, [] if gpu is None else [gpu.compute_capability])


def prepare(model: onnx.ModelProto, at: Sequence[Mapping[str, Sequence[int]]] = ()) -> onnx.ModelProto:
    """The model as the parser gets it: scans without bodies, with attributes that become fields of the plugin.

    The plugin scans maps; a scan of sequences becomes such scans of maps with one row, see `sequences_as_maps`. The
    parser finds a plugin by the name of the node and its attributes `plugin_namespace` and `plugin_version`. A list
    of strings becomes one string of names with commas. Without bodies there is nothing to fall back to, should the
    plugin be missing.

    Args:
        model: the portable model.
        at: shapes that the engine has to take, which change nothing here: the plugin takes any size.

    Raises:
        PassError: if the graph does not tell how many groups a scan of sequences has.
    """
    from onnx import helper

    from quartermap_deploy.passes.sequences_as_maps import sequences_as_maps

    result = sequences_as_maps(model)
    kept = [function for function in result.functions if function.domain != DOMAIN]
    del result.functions[:]
    result.functions.extend(kept)
    for node in result.graph.node:
        if node.domain != DOMAIN or node.op_type != SELECTIVE_SCAN_2D:
            continue
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        fields = {
            "directions": ",".join(direction_names(attributes)),
            "softplus": int(attributes.get("softplus", 1)),
            "plugin_namespace": DOMAIN,
            "plugin_version": str(VERSION),
        }
        node.overload = ""
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(name, value) for name, value in fields.items())
    return result


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

    TENSORRT.load()
    require_gpu(TENSORRT, devices.find_gpu())
    options = dataclasses.replace(options or EngineOptions(), scan="plugin")
    return build_engine(
        TENSORRT,
        Path(model_path),
        Path(directory),
        options,
        prepare,
        plugin=find_library(options.plugin),
        examples=examples,
        progress=progress,
    )


def cannot_run(entry: Mapping[str, Any]) -> str | None:
    """Why no engine of this entry can be run here, or None; see `session.cannot_run`."""
    from quartermap_deploy.targets.tensorrt import session

    return session.cannot_run(TENSORRT, entry)


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

    return open_engine(TENSORRT, Path(bundle_path), entry, plugin=plugin, built_here=built_here)
