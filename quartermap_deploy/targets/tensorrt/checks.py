"""What an engine is, compared with what its graph says, and with what it is to run on."""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quartermap_deploy.errors import EngineError
from quartermap_deploy.lowering.operator import DOMAIN, SELECTIVE_SCAN_2D
from quartermap_deploy.targets.tensorrt.products import inspector_type, network_type, plan_lines, plan_type

SIXTEEN_BITS = ("float16", "bfloat16")
INSPECTOR, PLAN = "engine inspector", "plan"
"""How an engine was read, as a manifest says it."""
_PLUGINS = b"custom_layer={ "
_LAUNCHES = (b"function={ ", b"fully_connected={ ", b"corrltn={ ", b"runtime_fusion={ ", _PLUGINS)
LEAST_SHARE = 0.5
"""Of the share of 16-bit values in the graph, what must be left in the engine: fusion takes values away from both
types, but never all of one."""


def network_types(network: Any) -> Counter[str]:
    """How many layers of a parsed network make values of each float type."""
    found: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.num_outputs == 0 or str(layer.type).rpartition(".")[2] == "CONSTANT":
            continue
        kind = network_type(layer.get_output(0))
        if kind is not None:
            found[kind] += 1
    return found


def plan_types(plan: bytes) -> Counter[str]:
    """How many tensors of each float type a TensorRT-RTX engine keeps in memory; empty where they cannot be read.

    The plan holds its program as text. That is not documented, so nothing depends on finding it.
    """
    found: Counter[str] = Counter()
    for line in plan_lines(plan, b"tensor={ "):
        kind = None if b"hmem" in line else plan_type(line)
        if kind is not None:
            found[kind] += 1
    return found


def plan_kernels(plan: bytes) -> int:
    """How many kernels a TensorRT-RTX engine launches for one input, as far as its plan can be read; else 0."""
    return sum(1 for start in _LAUNCHES for _ in plan_lines(plan, start))


def plan_plugins(plan: bytes) -> list[str]:
    """Names of the layers of a TensorRT-RTX engine that are our plugin; empty where they cannot be read.

    The text of the program has a line for each layer of a plugin, with the layer's name; which plugin it is stands in
    the data behind it.
    """
    if DOMAIN.encode() not in plan or SELECTIVE_SCAN_2D.encode() not in plan:
        return []
    names = (re.search(rb' name="([^"]*)"', line) for line in plan_lines(plan, _PLUGINS))
    return [name[1].decode(errors="replace") for name in names if name is not None]


def inspected(information: str) -> tuple[Counter[str], list[str]]:
    """Read the engine inspector's JSON: layers by the float type of their output, and the names of plugin layers.

    Raises:
        EngineError: if it holds layer names only, as an engine without detailed profiling verbosity gives.
    """
    try:
        layers = json.loads(information)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"the engine inspector's answer cannot be read: {error}") from error
    if layers and not all(isinstance(layer, Mapping) for layer in layers):
        raise EngineError("the engine holds no layer information; build it with detailed profiling verbosity")
    types: Counter[str] = Counter()
    plugins = []
    for layer in layers:
        if "plugin" in str(layer.get("LayerType", "")).lower():
            plugins.append(
                f"{layer.get('Name', '')} {layer.get('Metadata', '')} {layer.get('PluginType', '')}"
            )
        for output in layer.get("Outputs") or []:
            text = str(output.get("Format/Datatype") or output.get("Datatype") or "")
            kind = inspector_type(text)
            if kind is not None:
                types[kind] += 1
                break
    return types, plugins


def check_types(graph: Mapping[str, int], engine: Mapping[str, int], where: str) -> None:
    """Check that an engine has 16-bit types at all, as its graph has; `check_products` looks at each product.

    Args:
        graph: layers of the parsed graph by float type.
        engine: the same of the engine; empty if no type could be read. Read from the plan, that is no fault, since its
            form is not documented, and the manifest says that nothing was checked. The inspector always has types.
        where: how the engine was read, `INSPECTOR` or `PLAN`.

    Raises:
        EngineError: if it does not, or the inspector names no types.
    """
    total, engine_total = sum(graph.values()), sum(engine.values())
    for kind in SIXTEEN_BITS:
        wanted = graph.get(kind, 0) / total if total else 0.0
        if wanted and not engine_total and where == INSPECTOR:
            raise EngineError(
                f"{wanted:.0%} of the graph's layers are {kind}, and the engine inspector names no type that is known "
                "here, so nobody can say what the engine computes in; please report this with the version of TensorRT"
            )
        found = engine.get(kind, 0) / engine_total if engine_total else 0.0
        if engine_total and found < LEAST_SHARE * wanted:
            raise EngineError(
                f"{wanted:.0%} of the graph's layers are {kind}, but only {found:.0%} of the engine's are ({where}: "
                f"{engine.get(kind, 0)} of {engine_total}); TensorRT did not keep the types, please report this"
            )


def check_plugins(scans: Iterable[str], found: Iterable[str], where: str) -> None:
    """Check that every scan of the graph became our plugin.

    Args:
        scans: names of the graph's scans.
        found: names of plugin layers, perhaps with more text.
        where: how they were found, for the message.

    Raises:
        EngineError: if one did not, named.
    """
    texts = list(found)
    missing = [name for name in scans if not any(_names(text, name) for text in texts)]
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise EngineError(
            f"{len(missing)} scans did not become the SelectiveScan2D plugin: {shown} ({where}); check the library "
            "with `quartermap plugin check`"
        )


def _names(text: str, name: str) -> bool:
    return re.search(rf"(?<![\w/]){re.escape(name)}(?![\w/])", text) is not None


# Files ----------------------------------------------------------------------------------------------------------

_RTX_MAGIC = b"vtrt"
_HEADER = struct.Struct("<4sIQQ4B")
"""Magic, format, zero, bytes of the file, version: as TensorRT-RTX 1.7 writes them."""


def rtx_header(start: bytes) -> tuple[int, str] | None:
    """(bytes of the file, version) in the header of a TensorRT-RTX engine, or None if there is no such header."""
    if len(start) < _HEADER.size or not start.startswith(_RTX_MAGIC):
        return None
    _, _, _, size, *version = _HEADER.unpack_from(start)
    return size, ".".join(map(str, version))


def check_file(path: Path, entry: Mapping[str, Any]) -> None:
    """Check that an engine file is whole, by its size and by its own header where it has one that we know.

    Raises:
        EngineError: if it is missing or not whole.
    """
    if not path.is_file():
        raise EngineError(f"there is no engine {path}")
    size, expected = path.stat().st_size, entry["build"]["engine_bytes"]
    if size != expected:
        raise EngineError(f"the engine {path} has {size:,} bytes, it was built with {expected:,}")
    with path.open("rb") as file:
        header = rtx_header(file.read(_HEADER.size))
    if header is not None and header[0] != size:
        raise EngineError(f"the engine {path} has {size:,} bytes, its own header says {header[0]:,}")
