"""Convolutions and matrix products of a graph, and the types in which an engine computes them.

Fusion takes away element-wise layers by the hundred, so that shares of layers say little. Each product stays, and the
engine names the ONNX node that it comes from: these are compared one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from quartermap_deploy.errors import EngineError

_KINDS = ("CONVOLUTION", "DECONVOLUTION", "EINSUM", "MATRIX_MULTIPLY")
_NETWORK_TYPES = {"HALF": "float16", "BF16": "bfloat16", "FLOAT": "float32"}
_PLAN_TYPES = {"half": "float16", "bf16": "bfloat16", "float": "float32"}
_INSPECTOR_TYPES = (
    (re.compile(r"\b(half|fp16|float16)\b", re.IGNORECASE), "float16"),
    (re.compile(r"\b(bf16|bfloat16)\b", re.IGNORECASE), "bfloat16"),
    (re.compile(r"\b(float|fp32|float32)\b", re.IGNORECASE), "float32"),
)
_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
"""How TensorRT writes in a layer's metadata, and in what becomes of the layer, the node that it comes from."""
_PRODUCTS, _OTHERS = (b"corrltn={ ", b"fully_connected={ ", b"runtime_fusion={ "), (b"function={ ",)
_SHOWN = 4


def network_type(tensor: Any) -> str | None:
    """The float type of a network's tensor, or None for another type or no tensor."""
    return None if tensor is None else _NETWORK_TYPES.get(str(tensor.dtype).rpartition(".")[2])


def inspector_type(text: str) -> str | None:
    """The float type that the inspector's text about a tensor names, or None."""
    return next((name for pattern, name in _INSPECTOR_TYPES if pattern.search(text)), None)


def network_products(network: Any) -> dict[str, str]:
    """The convolutions and matrix products of a parsed network: by ONNX node, the float type of what they read."""
    found = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if str(layer.type).rpartition(".")[2] in _KINDS and layer.num_inputs:
            origin = _ORIGIN.search(layer.metadata or "")
            kind = network_type(layer.get_input(0))
            if kind is not None:
                found[origin[1] if origin else layer.name] = kind
    return found


def plan_lines(plan: bytes, start: bytes) -> Iterator[bytes]:
    """Lines that begin so, behind two blanks, in the program that a TensorRT-RTX engine holds as text.

    Its form is not documented, so nothing depends on finding them.
    """
    mark = b"\n  " + start
    place = plan.find(mark)
    while place >= 0:
        end = plan.find(b"\n", place + 1)
        yield plan[place:end]
        place = plan.find(mark, place + 1)


def plan_type(line: bytes) -> str | None:
    """The float type of the tensor that a line of the plan declares, or None."""
    kind = re.search(rb" type=(\w+) ", line)
    return None if kind is None else _PLAN_TYPES.get(kind[1].decode())


def plan_products(plan: bytes) -> dict[str, set[str]]:
    """The ONNX nodes that a TensorRT-RTX engine's launches come from, with the float types of all that these read.

    Launches of convolutions and matrix products come first; of a node that is in none of them, all launches count.
    """
    types = {}
    for start in (b"tensor={ ", b"sub_tensor={ "):
        for line in plan_lines(plan, start):
            name, kind = re.search(rb' name="([^"]*)"', line), plan_type(line)
            if name is not None and kind is not None:
                types[name[1]] = kind
    found: dict[str, set[str]] = {}
    for starts in (_PRODUCTS, _OTHERS):
        read: dict[str, set[str]] = {}
        for line in (line for start in starts for line in plan_lines(plan, start)):
            inputs = re.search(rb" input(?:_args)?={([^}]*)}", line)
            names = re.findall(rb'"([^"]*)"', inputs[1]) if inputs else []
            kinds = {types[name] for name in names if name in types}
            for origin in _ORIGIN.findall(line.decode(errors="replace")):
                read.setdefault(origin, set()).update(kinds)
        found = {**read, **found}
    return found


def inspected_products(information: str) -> dict[str, set[str]]:
    """The same from the engine inspector's JSON; layers without inputs tell by their outputs."""
    found: dict[str, set[str]] = {}
    layers = json.loads(information)["Layers"]
    for layer in layers:
        kinds = set(_kinds(layer.get("Inputs") or [])) or set(_kinds(layer.get("Outputs") or []))
        for origin in {layer.get("Name", ""), *_ORIGIN.findall(str(layer.get("Metadata", "")))}:
            found.setdefault(origin, set()).update(kinds)
    return found


def _kinds(tensors: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for tensor in tensors:
        kind = inspector_type(str(tensor.get("Format/Datatype") or tensor.get("Datatype") or ""))
        if kind is not None:
            yield kind


def check_products(graph: Mapping[str, str], engine: Mapping[str, set[str]], where: str) -> dict[str, int]:
    """Check that an engine computes each 16-bit convolution and matrix product of its graph in 16 bits.

    Args:
        graph: by ONNX node, the float type of the product.
        engine: by ONNX node, the float types that its launches read.
        where: how the engine was read, for the message.

    Returns:
        For the manifest: `of_graph`, how many 16-bit products the graph has, and `in_engine`, how many of them were
        found in the engine, all of them in 16 bits.

    Raises:
        EngineError: if one is found that is not; the first ones are named.
    """
    wanted = {name: kind for name, kind in graph.items() if kind != "float32"}
    read = {name: kind for name, kind in wanted.items() if engine.get(name)}
    lost = [name for name, kind in read.items() if kind not in engine[name]]
    if lost:
        shown = ", ".join(lost[:_SHOWN]) + (f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else "")
        kinds = " and ".join(sorted(set(wanted.values())))
        raise EngineError(
            f"{len(lost)} of the graph's {len(wanted)} convolutions and matrix products in {kinds} are not so in the "
            f"engine: {shown} ({where}); TensorRT did not keep the types, please report this"
        )
    return {"of_graph": len(wanted), "in_engine": len(read)}
