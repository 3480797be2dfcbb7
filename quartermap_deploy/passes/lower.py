"""lower: give every scan the body that the target wants.

    SelectiveScan2D (no body)  →  SelectiveScan2D + local function `quartermap.SelectiveScan2D` in standard operators

With the function in the file, ONNX Runtime and every other runtime that knows ONNX functions runs the model as it is,
and TensorRT ≥ 10.7 still prefers a plugin of the same name when one is loaded.

Refuses: scans whose state matrix is no constant, because the body depends on the state size.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
from onnx import helper

from quartermap_deploy.errors import PassError
from quartermap_deploy.lowering.operator import DOMAIN, INPUTS_2D, SELECTIVE_SCAN_2D, VERSION, ScanVariant
from quartermap_deploy.lowering.scan_body import scan_body

Body = Callable[[ScanVariant, str], onnx.FunctionProto]
BODIES: dict[str, Body] = {"scan": scan_body}
NAME = "lower"


def lower(model: onnx.ModelProto, body: str = "scan") -> onnx.ModelProto:
    """Return the model with a function for each variant of its scans; functions that are there are replaced.

    Args:
        model: a model with SelectiveScan2D nodes; not changed.
        body: a key of `BODIES`.

    Raises:
        PassError: if the body is unknown, or a scan's state matrix is no constant.
    """
    if body not in BODIES:
        raise PassError(f"{NAME}: unknown body {body!r}; expected one of {', '.join(BODIES)}")
    result = onnx.ModelProto()
    result.CopyFrom(model)
    kept = [f for f in result.functions if (f.domain, f.name) != (DOMAIN, SELECTIVE_SCAN_2D)]
    del result.functions[:]
    result.functions.extend(kept)

    state_sizes = {
        tensor.name: tensor.dims[1] for tensor in result.graph.initializer if len(tensor.dims) == 2
    }
    overloads: dict[ScanVariant, str] = {}
    for node in result.graph.node:
        if node.domain != DOMAIN or node.op_type != SELECTIVE_SCAN_2D:
            continue
        A = node.input[INPUTS_2D.index("A")]
        if A not in state_sizes:
            raise PassError(f"{NAME}: the state matrix {A} of {node.name} is no constant (K·d_inner, N)")
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        variant = ScanVariant.of(len(node.input), attributes, state_sizes[A])
        # Runtimes match a plugin by name alone, so the plain name goes to the first, and mostly only, variant.
        node.overload = overloads.setdefault(variant, "" if not overloads else f"variant_{len(overloads)}")
    result.functions.extend(BODIES[body](variant, overload) for variant, overload in overloads.items())
    if overloads and DOMAIN not in {item.domain for item in result.opset_import}:
        result.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    return result
