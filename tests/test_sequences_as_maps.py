"""sequences_as_maps: scans of sequences as scans of maps with one row, with the same numbers."""

from __future__ import annotations

import onnx
import pytest
from helpers import error, run
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from test_operators import STEPS
from test_sequence_body import arguments, model
from torch import Tensor

from quartermap_deploy.errors import PassError
from quartermap_deploy.lowering.operator import DOMAIN, INPUTS_1D, SELECTIVE_SCAN_2D
from quartermap_deploy.passes.lower import lower
from quartermap_deploy.passes.sequences_as_maps import sequences_as_maps
from quartermap_deploy.scan.definition import selective_scan_definition


def with_weights(tensors: list[Tensor | None], softplus: bool) -> onnx.ModelProto:
    """A model of one scan whose parameters are weights, without bodies."""
    made = model(tensors, softplus, sized=True)
    del made.functions[:]
    for name, tensor in zip(INPUTS_1D, tensors, strict=True):
        if name in ("A", "D", "delta_bias") and tensor is not None:
            made.graph.initializer.append(numpy_helper.from_array(tensor.float().numpy(), name))
    kept = [value for value in made.graph.input if value.name not in ("A", "D", "delta_bias")]
    del made.graph.input[:]
    made.graph.input.extend(kept)
    return made


@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 4),
    channels=st.integers(1, 3),
    length=st.integers(1, 20),
    d_state=st.sampled_from([1, 2, 16]),
    softplus=st.booleans(),
    skip=st.booleans(),
    bias=st.booleans(),
)
def test_the_numbers_stay(
    batch: int,
    groups: int,
    channels: int,
    length: int,
    d_state: int,
    softplus: bool,
    skip: bool,
    bias: bool,
) -> None:
    exact = arguments(batch, groups, channels, length, d_state, STEPS[0], 0)
    if not softplus:
        exact[1] = exact[1].exp()
    tensors: list[Tensor | None] = [*exact[:5], exact[5] if skip else None, exact[6] if bias else None]
    as_maps = sequences_as_maps(with_weights(tensors, softplus))
    scans = [node for node in as_maps.graph.node if node.domain == DOMAIN]
    assert [node.op_type for node in scans] == [SELECTIVE_SCAN_2D] * groups
    names = ["scan"] if groups == 1 else [f"scan/group_{group}" for group in range(1, groups + 1)]
    assert [node.name for node in scans] == names
    lowered = lower(as_maps)
    onnx.checker.check_model(lowered, full_check=True)
    feeds = {name: exact[INPUTS_1D.index(name)].float() for name in ("u", "delta", "B", "C")}
    rounded = [None if tensor is None else tensor.float().double() for tensor in tensors]
    expected = selective_scan_definition(*rounded, delta_softplus=softplus)  # type: ignore[arg-type]
    assert error(run(lowered, feeds)["y"], expected) <= 1e-6


def test_nothing_is_done_without_such_scans() -> None:
    tensors: list[Tensor | None] = [*arguments(1, 2, 2, 5, 1, STEPS[0], 0)]
    once = sequences_as_maps(with_weights(tensors, True))
    assert sequences_as_maps(once) == once
    others = with_weights(tensors, True)
    for node in others.graph.node:
        node.domain = "other"
    assert sequences_as_maps(others) == others


def test_computed_parameters_are_split_in_the_graph() -> None:
    as_maps = sequences_as_maps(model([*arguments(1, 2, 2, 5, 1, STEPS[0], 0)], True, sized=True))
    split = [node for node in as_maps.graph.node if node.op_type == "Split"]
    assert [node.input[0] for node in split] == ["u", "delta", "B", "C", "A", "D", "delta_bias"]
    onnx.checker.check_model(as_maps)


def test_unknown_groups_are_refused() -> None:
    tensors: list[Tensor | None] = [*arguments(1, 2, 2, 5, 1, STEPS[0], 0)]
    with pytest.raises(PassError, match=r"axis 1 of B of the scan scan is not known.*tensorrt-rtx"):
        sequences_as_maps(model(tensors, True))
    made = model(tensors, True, sized=True)
    (A,) = (value for value in made.graph.input if value.name == "A")
    A.type.tensor_type.ClearField("shape")
    with pytest.raises(PassError, match="axis 0 of A of the scan scan is not known"):
        sequences_as_maps(made)
