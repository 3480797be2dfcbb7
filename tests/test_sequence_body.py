"""The `scan` body of the one-dimensional SelectiveScan: against the definition in float64, and from PyTorch to ONNX."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from helpers import Array, error, run
from hypothesis import example, given
from hypothesis import strategies as st
from onnx import helper
from test_operators import STEPS
from torch import Tensor, nn

from quartermap_deploy.errors import ExportError
from quartermap_deploy.frontend.exporter import to_onnx
from quartermap_deploy.lowering.operator import DOMAIN, INPUTS_1D, SELECTIVE_SCAN, VERSION
from quartermap_deploy.passes import infer_shapes, lower
from quartermap_deploy.scan.definition import selective_scan_definition
from quartermap_deploy.scan.operators import selective_scan

TOLERANCE = 1e-6


def arguments(
    batch: int, groups: int, channels: int, length: int, d_state: int, steps: tuple[float, float], seed: int
) -> list[Tensor]:
    """u, delta, A, B, C, D and delta_bias in float64; with softplus the time steps lie between `steps`."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    wide = groups * channels
    low, high = steps
    time_steps = low + (high - low) * torch.rand(batch, wide, length, generator=random, dtype=torch.float64)
    bias = 0.1 * normal(wide)
    delta = torch.log(torch.expm1(time_steps)) - bias[:, None]
    A = -torch.rand(wide, d_state, generator=random, dtype=torch.float64) - 0.5
    maps = normal(batch, groups, d_state, length), normal(batch, groups, d_state, length)
    return [normal(batch, wide, length), delta, A, *maps, normal(wide), bias]


def model(
    tensors: list[Tensor | None], softplus: bool, body: str = "scan", sized: bool = False
) -> onnx.ModelProto:
    """A model of one SelectiveScan; tensors that are None are left out.

    Args:
        tensors: its inputs, for their ranks.
        softplus: whether softplus is applied to the time step.
        body: a key of `BODIES`.
        sized: whether the graph knows the shapes of the inputs.
    """
    names = [name if tensor is not None else "" for name, tensor in zip(INPUTS_1D, tensors, strict=True)]
    while not names[-1]:
        names.pop()
    node = helper.make_node(
        SELECTIVE_SCAN, names, ["y"], domain=DOMAIN, delta_softplus=int(softplus), name="scan"
    )
    inputs = [
        helper.make_tensor_value_info(
            name, onnx.TensorProto.FLOAT, tensor.shape if sized else [None] * tensor.ndim
        )
        for name, tensor in zip(INPUTS_1D, tensors, strict=True)
        if tensor is not None
    ]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None] * 3)]
    graph = helper.make_graph([node], "sequence", inputs, outputs)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    made = lower(helper.make_model(graph, opset_imports=imports, ir_version=10), body)
    onnx.checker.check_model(made, full_check=True)
    return made


def scan(tensors: list[Tensor | None], softplus: bool, body: str = "scan", sized: bool = False) -> Array:
    """Run a body in float32."""
    feeds = {name: t.float() for name, t in zip(INPUTS_1D, tensors, strict=True) if t is not None}
    return run(model(tensors, softplus, body, sized), feeds)["y"]


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 4),
    channels=st.integers(1, 3),
    length=st.integers(1, 40),
    d_state=st.sampled_from([1, 2, 16]),
    softplus=st.booleans(),
    skip=st.booleans(),
    bias=st.booleans(),
    steps=st.sampled_from(STEPS),
    seed=st.integers(0, 1000),
)
@example(1, 1, 1, 1, 1, True, False, True, STEPS[0], 0)
@example(2, 4, 3, 40, 16, False, True, False, STEPS[0], 0)
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
    seed: int,
) -> None:
    exact = arguments(batch, groups, channels, length, d_state, steps, seed)
    if not softplus:
        # Steps without softplus are those of a model, above 0: negative ones let states and rounding errors grow.
        exact[1], exact[6] = exact[1].exp(), exact[6].abs()
    given_: list[Tensor | None] = [*exact[:5], exact[5] if skip else None, exact[6] if bias else None]
    rounded = [None if tensor is None else tensor.float().double() for tensor in given_]
    y = scan(given_, softplus)
    assert y.dtype == np.float32
    assert error(y, selective_scan_definition(*rounded, delta_softplus=softplus)) <= TOLERANCE  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", STEPS)
def test_steps_of_every_size_are_exact_over_a_long_sequence(steps: tuple[float, float]) -> None:
    exact = arguments(1, 2, 2, 3136, 1, steps, 0)
    rounded = [tensor.float().double() for tensor in exact]
    assert error(scan([*exact], True), selective_scan_definition(*rounded, delta_softplus=True)) <= TOLERANCE


class Sequence(nn.Module):
    """A one-dimensional layer as Mamba has it: projections of the input decide the scan."""

    def __init__(self, channels: int = 6, d_state: int = 4, skip: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Conv1d(channels, channels + 2 * d_state, 1)
        self.A = nn.Parameter(-torch.rand(channels, d_state) - 0.1)
        self.D = nn.Parameter(torch.randn(channels)) if skip else None
        self.bias = nn.Parameter(torch.randn(channels) - 2)
        self.sizes = [channels, d_state, d_state]

    def forward(self, u: Tensor) -> Tensor:
        delta, B, C = self.project(u).split(self.sizes, dim=1)
        return selective_scan(u, delta, self.A, B[:, None], C[:, None], self.D, self.bias, True)


@pytest.mark.parametrize("skip", [True, False])
def test_a_module_becomes_one_node_and_runs_at_other_sizes(skip: bool) -> None:
    module = Sequence(skip=skip).eval()
    axes = ({0: torch.export.Dim("batch"), 2: torch.export.Dim("length", min=2)},)
    traced = to_onnx(
        module, (torch.randn(2, 6, 11),), dynamic_shapes=axes, input_names=["u"], output_names=["y"]
    )
    assert [node.op_type for node in traced.graph.node].count(SELECTIVE_SCAN) == 1
    exported = lower(infer_shapes(traced))
    onnx.checker.check_model(exported, full_check=True)
    for shape in ((2, 6, 11), (1, 6, 40), (3, 6, 2)):
        u = torch.randn(*shape)
        with torch.no_grad():
            assert error(run(exported, {"u": u})["y"], module(u)) <= 1e-5


def test_variants_in_one_model_keep_to_their_own_function() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Sequence(skip=True), Sequence(skip=False)

        def forward(self, u: Tensor) -> Tensor:
            return self.second(self.first(u))  # type: ignore[no-any-return]

    module, u = Two().eval(), torch.randn(2, 6, 9)
    exported = lower(to_onnx(module, (u,), input_names=["u"], output_names=["y"]))
    assert sorted(function.overload for function in exported.functions) == ["", "variant_1"]
    with torch.no_grad():
        assert error(run(exported, {"u": u})["y"], module(u)) <= 1e-5


def test_a_module_that_cannot_be_exported_says_why() -> None:
    class Impossible(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            return u if u.sum() > 0 else -u

    with pytest.raises(ExportError, match="Impossible"):
        to_onnx(Impossible(), (torch.randn(1, 2, 3),))
