"""The `tree` body of the one-dimensional SelectiveScan, run by ONNX Runtime, against the definition in float64."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from helpers import error, run
from hypothesis import example, given
from hypothesis import strategies as st
from test_operators import STEPS
from test_sequence_body import Sequence, arguments, model, scan
from torch import Tensor, nn

from quartermap_deploy.frontend.exporter import to_onnx
from quartermap_deploy.lowering.operator import DOMAIN, INPUTS_1D, SELECTIVE_SCAN, SequenceVariant
from quartermap_deploy.lowering.sequence_tree_body import sequence_tree_body
from quartermap_deploy.lowering.tree_scan import OPEN_LENGTH
from quartermap_deploy.passes import infer_shapes, lower
from quartermap_deploy.passes.inline_scans import inline_scans
from quartermap_deploy.scan.definition import selective_scan_definition

TOLERANCE = 1e-6


def departure(tensors: list[Tensor | None], softplus: bool, *, known: bool = True) -> float:
    """The error of the body in float32, for sequences whose length the graph knows or not."""
    rounded = [None if tensor is None else tensor.float().double() for tensor in tensors]
    y = scan(tensors, softplus, "tree", known)
    assert y.dtype == np.float32
    return error(y, selective_scan_definition(*rounded, delta_softplus=softplus))  # type: ignore[arg-type]


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 4),
    channels=st.integers(1, 3),
    length=st.integers(1, 300),
    d_state=st.sampled_from([1, 2, 16]),
    softplus=st.booleans(),
    skip=st.booleans(),
    bias=st.booleans(),
    steps=st.sampled_from(STEPS),
    known=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(1, 1, 1, 1, 1, True, False, True, STEPS[0], True, 0)
@example(2, 4, 3, 257, 16, False, True, False, STEPS[0], True, 0)
@example(2, 4, 3, 40, 2, True, True, True, STEPS[0], False, 0)
@example(1, 3, 3, 120, 1, False, False, True, (0.01, 0.0101), False, 3)
def test_the_body_equals_the_definition(
    batch: int,
    groups: int,
    channels: int,
    length: int,
    d_state: int,
    softplus: bool,
    skip: bool,
    bias: bool,
    steps: tuple[float, float],
    known: bool,
    seed: int,
) -> None:
    exact = arguments(batch, groups, channels, length, d_state, steps, seed)
    if not softplus:
        # Steps without softplus are those of a model, above 0: negative ones let states and rounding errors grow.
        exact[1], exact[6] = exact[1].exp(), exact[6].abs()
    given_: list[Tensor | None] = [*exact[:5], exact[5] if skip else None, exact[6] if bias else None]
    assert departure(given_, softplus, known=known) <= TOLERANCE


@pytest.mark.parametrize("length", [256, 257, 263, 289, 1000, 3136, 4096])
def test_lengths_around_the_limits(length: int) -> None:
    assert departure([*arguments(1, 2, 1, length, 1, (0.01, 1.0), 0)], True) <= TOLERANCE


@pytest.mark.parametrize("steps", [*STEPS, (0.01, 20.0)])
def test_steps_of_every_size_are_exact_over_a_long_sequence(steps: tuple[float, float]) -> None:
    for d_state in (1, 4):
        assert departure([*arguments(1, 2, 2, 3136, d_state, steps, 0)], True) <= TOLERANCE


@pytest.mark.parametrize("step", [1e-4, 1e-3, 1e-2])
def test_small_steps_over_an_even_sequence_do_not_gather_rounding_errors(step: float) -> None:
    tensors = arguments(1, 1, 2, 3136, 2, (step, 1.01 * step), 0)
    # Every decay is rounded the same way.
    for place in (0, 1, 3, 4):
        tensors[place] = tensors[place][..., :1].expand_as(tensors[place]).clone()
    assert departure([*tensors[:5], None, tensors[6]], True) <= TOLERANCE


def test_the_body_is_valid_standard_and_has_no_loop() -> None:
    for known in (True, False):
        made = model([*arguments(1, 2, 3, 40, 2, (0.1, 1.0), 0)], True, "tree", known)
        (function,) = made.functions
        assert (function.domain, function.name) == (DOMAIN, SELECTIVE_SCAN)
        assert [(item.domain, item.version) for item in function.opset_import] == [("", 20)]
        assert {node.domain for node in function.node} == {""}
        assert not {"Scan", "Loop", "If", "CumSum", "Log"} & {node.op_type for node in function.node}
        assert not any(attribute.HasField("g") for node in function.node for attribute in node.attribute)


def test_a_sequence_that_is_too_long_for_an_open_body_fails() -> None:
    tensors = arguments(1, 1, 1, OPEN_LENGTH + 1, 1, (0.1, 1.0), 0)
    with pytest.raises(Exception, match="65536 by 65537"):
        scan([*tensors], True, "tree")


def test_open_lengths_take_steps_for_the_longest_sequence_alone() -> None:
    tensors: list[Tensor | None] = [*arguments(1, 2, 2, 40, 2, (0.1, 1.0), 0)]
    bare = model(tensors, True)
    at = [
        {name: tensor.shape for name, tensor in zip(INPUTS_1D, tensors, strict=True) if tensor is not None},
        {value.name: shape for value, shape in zip(bare.graph.input, shapes_of(50), strict=True)},
    ]
    limited = lower(bare, "tree", at)
    (function,) = limited.functions
    assert sum(node.op_type == "Exp" for node in function.node) == 1 + 6
    feeds = {name: t.float() for name, t in zip(INPUTS_1D, tensors, strict=True) if t is not None}
    rounded = [tensor.float().double() for tensor in tensors if tensor is not None]
    expected = selective_scan_definition(*rounded, delta_softplus=True)
    assert error(run(limited, feeds)["y"], expected) <= TOLERANCE


def shapes_of(length: int) -> list[tuple[int, ...]]:
    """Shapes of the inputs of a scan."""
    return [tuple(tensor.shape) for tensor in arguments(1, 2, 2, length, 2, (0.1, 1.0), 0)]


def test_a_nan_is_not_hidden() -> None:
    for place in (0, 1, 3, 4):
        tensors = arguments(1, 1, 2, 20, 2, (0.1, 1.0), 0)
        tensors[place][..., 5] = torch.nan
        assert np.isnan(scan([*tensors], True, "tree", True)).any()


def test_halves_stay_halves_outside() -> None:
    tensors = arguments(2, 2, 2, 40, 2, (0.1, 1.0), 0)
    single, halves = (
        model([*tensors], True, "tree"),
        [t.half() if i in (0, 1, 3, 4) else t.float() for i, t in enumerate(tensors)],
    )
    for value, tensor in zip(single.graph.input, halves, strict=True):
        if tensor.dtype == torch.float16:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    single.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    y = run(single, {value.name: tensor for value, tensor in zip(single.graph.input, halves, strict=True)})[
        "y"
    ]
    expected = selective_scan_definition(*(half.double() for half in halves), delta_softplus=True)
    assert y.dtype == np.float16
    assert error(y, expected) <= torch.finfo(torch.float16).eps / 2 + TOLERANCE


def test_the_depth_is_logarithmic() -> None:
    from quartermap_deploy.lowering.sequence_tree_body import SequenceTreeVariant

    for length in (49, 196, 3136, 12544):
        function = sequence_tree_body(SequenceTreeVariant(True, True, True, length))
        depths: dict[str, int] = {}
        for node in function.node:
            depth = 1 + max((depths.get(name, 0) for name in node.input), default=0)
            depths |= dict.fromkeys(node.output, depth)
        assert depths[function.output[0]] < 55 + 4 * np.ceil(np.log2(length))
    assert len(sequence_tree_body(SequenceVariant(True, True, True)).node) > len(function.node)


def test_a_module_has_a_body_for_each_length_and_equals_pytorch() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Sequence(skip=True), Sequence(skip=False)

        def forward(self, u: Tensor) -> Tensor:
            return self.second(self.first(self.second(u))[..., ::2])  # type: ignore[no-any-return]

    module, u = Halved().eval(), torch.randn(2, 6, 300)
    axes = ({0: torch.export.Dim("batch")},)
    traced = to_onnx(module, (u,), dynamic_shapes=axes, input_names=["u"], output_names=["y"])
    lowered = lower(infer_shapes(traced), "tree")
    onnx.checker.check_model(lowered, full_check=True)
    assert sorted(function.overload for function in lowered.functions) == ["", "variant_1", "variant_2"]
    inlined = inline_scans(lowered)
    onnx.checker.check_model(inlined, full_check=True)
    assert not inlined.functions and DOMAIN not in {node.domain for node in inlined.graph.node}
    with torch.no_grad():
        expected = module(u)
    for candidate in (lowered, inlined):
        assert error(run(candidate, {"u": u})["y"], expected) <= 1e-5
