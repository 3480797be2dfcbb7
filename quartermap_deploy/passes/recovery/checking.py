"""The last check before a replacement is accepted: the old nodes against the new ones, on random values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from quartermap_deploy.errors import PassError
from quartermap_deploy.lowering.operator import DOMAIN, VERSION
from quartermap_deploy.lowering.writer import OPSET
from quartermap_deploy.passes.lower import lower
from quartermap_deploy.passes.recovery.concrete import Concrete
from quartermap_deploy.passes.recovery.programs import nodes_between, run_once
from quartermap_deploy.passes.recovery.refusal import Refused
from quartermap_deploy.passes.recovery.writing import Replacement

TOLERANCE = 1e-5
"""How far new nodes may depart from old ones, of the largest value: scans of thousands of steps in float32, added up in
another order, differ by up to 2e-6, and a misread direction by 1e-1. What is finer than that was compared in float64
when the parts were read."""


def check_replacement(concrete: Concrete, source: str, replacement: Replacement, seed: int) -> None:
    """Compare a replacement with the nodes that it stands for, at the sizes of `concrete`.

    Args:
        concrete: the graph at the sizes to compare at.
        source: the map that both read.
        replacement: the new nodes.
        seed: of the random map.

    Raises:
        Refused: if the two differ, or either does not run.
    """
    x = np.random.default_rng(seed).standard_normal(concrete.shape(source)).astype(np.float32)
    old, initializers = _old_nodes(concrete, source, replacement.targets)
    outputs = list(replacement.targets)
    expected = _run(old, initializers, source, x, outputs)
    above, further = _old_nodes(concrete, source, _kept_values(replacement, source))
    nodes = [*above, *replacement.nodes]
    found = _run(nodes, [*further, *replacement.initializers], source, x, outputs)
    for name, new, wanted in zip(outputs, found, expected, strict=True):
        if new.shape != wanted.shape:
            raise Refused(f"{name} would become {new.shape} instead of {wanted.shape}")
        error, largest = np.abs(new - wanted).max(), np.abs(wanted).max()
        if not error <= TOLERANCE * largest or not np.isfinite(largest):
            raise Refused(
                f"SelectiveScan2D would make {name} differ from what it is now by {error / largest:.1e} of its largest "
                f"value; {TOLERANCE:.0e} is allowed"
            )


def _kept_values(replacement: Replacement, source: str) -> list[str]:
    """What the new nodes read besides the map and what they make themselves, such as a sequence as it is unrolled."""
    own = {name for node in replacement.nodes for name in node.output}
    own |= {source, *(tensor.name for tensor in replacement.initializers)}
    return sorted({name for node in replacement.nodes for name in node.input if name not in own})


def _old_nodes(
    concrete: Concrete, source: str, targets: Sequence[str]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    places = nodes_between(concrete, [source], targets, most=2000)
    nodes = [concrete.index.nodes[place] for place in places]
    fixed = {name for node in nodes for name in node.input if name and concrete.is_fixed(name)}
    return nodes, [numpy_helper.from_array(np.asarray(concrete.array(name)), name) for name in sorted(fixed)]


def _run(
    nodes: Sequence[onnx.NodeProto],
    initializers: Sequence[onnx.TensorProto],
    source: str,
    x: NDArray[np.float32],
    outputs: Sequence[str],
) -> list[NDArray[Any]]:
    graph = helper.make_graph(
        nodes,
        "part",
        [helper.make_tensor_value_info(source, TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        initializers,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    try:
        model = lower(helper.make_model(graph, ir_version=10, opset_imports=opsets))
    except PassError as error:
        raise Refused(str(error)) from error
    return run_once(model, {source: x}, outputs)
