"""The `scan` body of SelectiveScan2D, run by ONNX Runtime, against the definition in float64."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import (
    Array,
    ScanCase,
    error,
    run,
    run_session,
    scan_case,
    scan_feeds,
    scan_model,
    session,
)
from hypothesis import example, given
from hypothesis import strategies as st
from onnx import helper
from test_operators import STEPS

from quartermap_deploy.errors import PassError
from quartermap_deploy.lowering import scan_body as scan_body_module
from quartermap_deploy.lowering.operator import DOMAIN, SELECTIVE_SCAN_2D, ScanVariant
from quartermap_deploy.lowering.scan_body import scan_body
from quartermap_deploy.lowering.writer import Value, Writer
from quartermap_deploy.scan.definition import DIRECTIONS

TOLERANCE = 1e-6


@functools.cache
def ready(variant: ScanVariant) -> onnxruntime.InferenceSession:
    """Return a session for one scan, all of whose sizes are open, so that many cases share it."""
    return session(scan_model([variant]))


def scan(case: ScanCase) -> Array:
    """Run a case in float32."""
    return run_session(ready(case.variant), scan_feeds(case))["0/y"]


DIRECTION_LISTS = [
    DIRECTIONS,
    ("row",),
    ("column_reverse",),
    ("column", "row"),
    ("row_reverse", "row"),
    ("row", "row"),
    ("column_reverse", "row", "column"),
]


@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    d_state=st.sampled_from([1, 2, 4, 16]),
    rank=st.sampled_from([None, 1, 2, 3]),
    directions=st.sampled_from(DIRECTION_LISTS),
    softplus=st.booleans(),
    steps=st.sampled_from(STEPS),
    seed=st.integers(0, 1000),
)
@example(1, 1, 1, 1, 1, DIRECTIONS, True, STEPS[0], 0)
@example(2, 1, 17, 2, None, DIRECTIONS, True, STEPS[0], 0)
@example(2, 17, 1, 1, 2, DIRECTIONS, False, STEPS[0], 0)
def test_the_body_equals_the_definition(
    batch: int,
    height: int,
    width: int,
    d_state: int,
    rank: int | None,
    directions: tuple[str, ...],
    softplus: bool,
    steps: tuple[float, float],
    seed: int,
) -> None:
    case = scan_case(
        batch,
        3,
        height,
        width,
        d_state=d_state,
        rank=rank,
        directions=directions,
        softplus=softplus,
        steps=steps,
        seed=seed,
    )
    y = scan(case)
    assert y.dtype == np.float32
    assert error(y, case.expected(torch.float32)) <= TOLERANCE


@pytest.mark.parametrize("directions", DIRECTION_LISTS)
@pytest.mark.parametrize("d_state", [1, 2])
def test_any_list_of_directions(directions: tuple[str, ...], d_state: int) -> None:
    case = scan_case(2, 3, 4, 6, d_state=d_state, directions=directions)
    assert error(scan(case), case.expected(torch.float32)) <= TOLERANCE
    # The comparison is not blind to the order: the same parameters in another order give another result.
    if len(set(directions)) > 1:
        exchanged = ScanCase(case.tensors, directions[::-1], case.softplus)
        assert error(scan(exchanged), case.expected(torch.float32)) > 0.01


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("decay", [1.0, 16.0])
@pytest.mark.parametrize("steps", STEPS)
def test_steps_of_every_size_are_exact_over_a_long_map(
    steps: tuple[float, float], decay: float, skip: bool
) -> None:
    for d_state, rank in ((1, 2), (2, None)):
        case = scan_case(1, 2, 56, 56, d_state=d_state, rank=rank, steps=steps, decay=decay, skip=skip)
        assert error(scan(case), case.expected(torch.float32)) <= TOLERANCE


@pytest.mark.parametrize("step", [1e-5, 1e-4])
def test_small_steps_do_not_gather_rounding_errors_across_lines(step: float) -> None:
    # On an even map every decay is rounded the same way. A product of decays would be off by 1.3e-4 here, their sum in
    # the exponent by 5e-6.
    case = scan_case(1, 2, 112, 112, d_state=1, rank=2, steps=(step, 1.01 * step), skip=False, even=True)
    assert error(scan(case), case.expected(torch.float32)) <= 1e-5


@pytest.mark.parametrize(("d_state", "rank"), [(1, 2), (4, None)])
def test_one_session_takes_every_size(d_state: int, rank: int | None) -> None:
    sizes = [(1, 7, 7), (3, 2, 9), (1, 1, 1), (2, 13, 5), (1, 7, 7), (4, 1, 6), (1, 28, 28)]
    for d_inner, (batch, height, width) in enumerate(sizes, start=1):
        case = scan_case(batch, d_inner, height, width, d_state=d_state, rank=rank)
        assert error(scan(case), case.expected(torch.float32)) <= TOLERANCE


def test_two_variants_live_in_one_model() -> None:
    cases = [
        scan_case(1, 3, 4, 5, d_state=1, rank=2),
        scan_case(2, 2, 6, 3, d_state=4, rank=None, directions=("column", "row_reverse"), softplus=False),
    ]
    model = scan_model([case.variant for case in cases])
    onnx.checker.check_model(model, full_check=True)
    assert [function.overload for function in model.functions] == ["", "variant_1"]
    outputs = run(model, scan_feeds(cases[0], index=0) | scan_feeds(cases[1], index=1))
    for index, case in enumerate(cases):
        assert error(outputs[f"{index}/y"], case.expected(torch.float32)) <= TOLERANCE


@pytest.mark.parametrize("d_state", [1, 4])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_body_is_valid_and_standard(d_state: int, rank: int | None, dtype: torch.dtype) -> None:
    variant = ScanVariant(DIRECTIONS, True, d_state, rank is not None)
    onnx.checker.check_model(scan_model([variant], dtype), full_check=True)
    function = scan_body(variant, "some_overload")
    assert (function.domain, function.name, function.overload) == (
        DOMAIN,
        SELECTIVE_SCAN_2D,
        "some_overload",
    )
    assert [(item.domain, item.version) for item in function.opset_import] == [("", 20)]
    assert {node.domain for node in function.node} == {""}
    assert set(function.attribute) == {"directions", "softplus", "order"}


def test_writing_a_body_twice_gives_the_same_bytes() -> None:
    variant = ScanVariant(DIRECTIONS, True, 4, True)
    first, second = (scan_body(variant).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("d_state", "rank"), [(1, 2), (4, None)])
def test_float16_maps(d_state: int, rank: int | None) -> None:
    case = scan_case(2, 3, 9, 14, d_state=d_state, rank=rank)
    y = run(scan_model([case.variant], torch.float16), scan_feeds(case, torch.float16))["0/y"]
    assert y.dtype == np.float16
    assert error(y, case.expected(torch.float16)) <= torch.finfo(torch.float16).eps / 2 + TOLERANCE


def test_bfloat16_maps() -> None:
    # NumPy has no bfloat16, so the model casts on its way in and out.
    dtype = torch.bfloat16
    case = scan_case(2, 3, 9, 14, d_state=2)
    model = scan_model([case.variant], dtype)
    names = {value.name for value in model.graph.input if value.type.tensor_type.elem_type == 16}
    assert len(names) == 5
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    node = model.graph.node[0]
    for index, name in enumerate(list(node.input)):
        if name in names:
            node.input[index] = f"{name}_bfloat16"
            model.graph.node.insert(
                0, helper.make_node("Cast", [name], [f"{name}_bfloat16"], to=onnx.TensorProto.BFLOAT16)
            )
    scan_node = model.graph.node[-1]
    scan_node.output[0] = "y_bfloat16"
    model.graph.node.append(helper.make_node("Cast", ["y_bfloat16"], ["0/y"], to=onnx.TensorProto.FLOAT))
    feeds = {
        f"0/{name}": tensor.float().numpy()
        for name, tensor in zip(
            [value.split("/")[1].removesuffix("_bfloat16") for value in scan_node.input],
            case.converted(dtype),
            strict=True,
        )
    }
    y = run(model, feeds)["0/y"]
    assert error(y, case.expected(dtype)) <= torch.finfo(dtype).eps / 2 + TOLERANCE
    assert np.array_equal(y, torch.from_numpy(y).bfloat16().float().numpy())


def test_plain_softplus_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for `lowering.softplus`: small time steps, with no skip that would hide their error."""

    def plain(write: Writer, z: Value) -> Value:
        return write("Log", write("Add", write("Exp", z), np.array(1, dtype=np.float32)))

    for decay in (1.0, 16.0):
        case = scan_case(1, 3, 14, 14, steps=(0.01, 0.0101), decay=decay, skip=False)
        expected = case.expected(torch.float32)
        assert error(scan(case), expected) <= TOLERANCE
        with monkeypatch.context() as patched:
            patched.setattr(scan_body_module, "write_softplus", plain)
            y = run(scan_model([case.variant]), scan_feeds(case))["0/y"]
        assert error(y, expected) > 2 * TOLERANCE


def test_zeros_and_large_values() -> None:
    case = scan_case(1, 3, 6, 6)
    x, *others = case.tensors
    nothing = ScanCase((torch.zeros_like(x), *others), case.directions, case.softplus)
    assert not scan(nothing).any()
    large = ScanCase((x * 1e30, *others), case.directions, case.softplus)
    assert error(scan(large), large.expected(torch.float32)) <= TOLERANCE
    # A time step so large that every state is forgotten at once: exp underflows, and nothing overflows.
    forgetting = ScanCase((x, others[0] * 1e4, *others[1:]), case.directions, case.softplus)
    assert error(scan(forgetting), forgetting.expected(torch.float32)) <= TOLERANCE


@pytest.mark.parametrize("d_state", [1, 2])
def test_a_nan_is_not_hidden(d_state: int) -> None:
    case = scan_case(1, 2, 4, 5, d_state=d_state)
    for name in ("0/x", "0/dt", "0/B", "0/C"):
        feeds = scan_feeds(case)
        feeds[name] = feeds[name].copy()
        feeds[name][0, 0, 2, 3] = np.nan
        assert np.isnan(run_session(ready(case.variant), feeds)["0/y"]).any(), name


def test_an_unknown_direction_is_refused() -> None:
    with pytest.raises(PassError, match=r"'rows'.*row_reverse"):
        scan_body(ScanVariant(("row", "rows"), True, 1, True))


def _products_of_states(graph: onnx.GraphProto | onnx.FunctionProto) -> list[onnx.NodeProto]:
    """The products in the bodies of loops that have the state, the first value that a body takes."""
    found = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                state = attribute.g.input[0].name
                found += [n for n in attribute.g.node if n.op_type == "Mul" and state in n.input]
    return found


@pytest.mark.parametrize(("d_state", "rank"), [(1, 2), (4, None)])
def test_the_state_is_the_first_factor_and_the_order_changes_no_bit(d_state: int, rank: int | None) -> None:
    """OpenVINO's own reader of ONNX computes something else where the state is the second factor."""
    case = scan_case(2, 3, 5, 7, d_state=d_state, rank=rank)
    model = scan_model([case.variant])
    (function,) = model.functions
    products = _products_of_states(function)
    assert len(products) == (3 if d_state == 1 else 1)
    for node in products:
        assert node.input[0] in ("state", "carry"), node
        node.input[:] = list(reversed(node.input))
    exchanged = run_session(session(model), scan_feeds(case))["0/y"]
    np.testing.assert_array_equal(exchanged, scan(case))
