"""The target `tensorrt`: engines for the GPU at hand, scans by our plugin."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.errors import EngineError
from quartermap_deploy.lowering.operator import DOMAIN, SELECTIVE_SCAN_2D, VERSION
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.targets.tensorrt_flavour import TENSORRT
from quartermap_deploy.targets.tensorrt_options import EngineOptions

if TYPE_CHECKING:
    import onnx

    from quartermap_deploy.targets.tensorrt_session import EngineSession

PLUGIN_VARIABLE = "QUARTERMAP_PLUGIN"

PRECISIONS = ("float32", "float16", "bfloat16")


def check(recipe: Any = None) -> None:
    """Check, before any work, that engines can be built here.

    Raises:
        MissingDependencyError: if TensorRT is absent or its version is not supported.
        EngineError: if there is no plugin library.
    """
    TENSORRT.load()
    plugin_library(getattr(recipe, "engine", None))


def plugin_library(options: EngineOptions | None = None) -> Path:
    """The plugin library: the one of the options, of the environment variable QUARTERMAP_PLUGIN, or in ./plugin.

    Raises:
        EngineError: if there is none.
    """
    from quartermap_deploy.plugin.build import DEFAULT_OUTPUT, PLUGIN_LIBRARY

    built_here = DEFAULT_OUTPUT / PLUGIN_LIBRARY
    named = (options.plugin if options else None) or os.environ.get(PLUGIN_VARIABLE)
    if not named and built_here.is_file():
        named = built_here
    if not named:
        raise EngineError(
            "the target tensorrt needs the SelectiveScan2D plugin; build it with `quartermap plugin build` and name "
            f"the library in the option plugin or in the environment variable {PLUGIN_VARIABLE}"
        )
    if not Path(named).is_file():
        raise EngineError(f"there is no plugin library {named}; build it with `quartermap plugin build`")
    return Path(named).absolute()


def prepare(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as the parser gets it: scans without bodies, with attributes that become fields of the plugin.

    The parser finds a plugin by the name of the node and its attributes `plugin_namespace` and `plugin_version`. A list
    of strings becomes one string of names with commas. Without bodies there is nothing to fall back to, should the
    plugin be missing.
    """
    from onnx import ModelProto, helper

    result = ModelProto()
    result.CopyFrom(model)
    kept = [function for function in result.functions if function.domain != DOMAIN]
    del result.functions[:]
    result.functions.extend(kept)
    for node in result.graph.node:
        if node.domain != DOMAIN or node.op_type != SELECTIVE_SCAN_2D:
            continue
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        names = [name.decode() if isinstance(name, bytes) else name for name in attributes["directions"]]
        fields = {
            "directions": ",".join(names),
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
    examples: Sequence[Sequence[int]] = (),
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Build an engine; see `tensorrt_builder.build_engine`."""
    from quartermap_deploy.targets.tensorrt_builder import build_engine

    TENSORRT.load()
    return build_engine(
        TENSORRT,
        Path(model_path),
        Path(directory),
        options or EngineOptions(),
        prepare,
        plugin=plugin_library(options),
        examples=examples,
        progress=progress,
    )


def open(bundle_path: Path, entry: dict[str, Any]) -> EngineSession:
    """Return a session; see `tensorrt_session.open_engine`."""
    from quartermap_deploy.targets.tensorrt_session import open_engine

    return open_engine(TENSORRT, Path(bundle_path), entry, plugin_library)
