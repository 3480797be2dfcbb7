"""The `tree` body of SelectiveScan2D, run by ONNX Runtime, against the definition in float64."""

from __future__ import annotations

import functools
import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import (
    CHANNEL_FIRST,
    CHANNELS,
    Array,
    ScanCase,
    digits,
    error,
    image,
    onnx_outputs,
    output_errors,
    run,
    run_session,
    scan_case,
    scan_feeds,
    scan_model,
    session,
    text_model,
    torch_outputs,
    traced_digits,
)
from hypothesis import example, given
from hypothesis import strategies as st
from onnx import helper
from test_operators import STEPS
from test_scan_body import DIRECTION_LISTS

from quartermap_deploy.errors import PassError
from quartermap_deploy.lowering.operator import DOMAIN, SELECTIVE_SCAN_2D, ScanVariant
from quartermap_deploy.lowering.softplus_series import write_softplus_series
from quartermap_deploy.lowering.tree_body import TreeVariant, tree_body
from quartermap_deploy.lowering.tree_scan import LONG, lines
from quartermap_deploy.lowering.writer import Writer
from quartermap_deploy.passes.inline_scans import inline_scans
from quartermap_deploy.passes.lower import lower
from quartermap_deploy.passes.shapes import infer_shapes
from quartermap_deploy.scan.definition import DIRECTIONS

TOLERANCE = 1e-6
Size = tuple[int, int]


def tree_model(case: ScanCase, size: Size | None, dtype: torch.dtype = torch.float32) -> onnx.ModelProto:
    """Return a model with one scan and its `tree` body, for one size of the maps or for all."""
    model = scan_model([case.variant], dtype)
    del model.functions[:]
    model.functions.append(tree_body(TreeVariant(**vars(case.variant), size=size)))
    return model


@functools.cache
def open_session(variant: ScanVariant) -> onnxruntime.InferenceSession:
    model = scan_model([variant])
    del model.functions[:]
    model.functions.append(tree_body(variant))
    return session(model)


def size_of(case: ScanCase) -> Size:
    height, width = case.tensors[0].shape[2:]
    return height, width


def scan(case: ScanCase) -> Array:
    """Run a case in float32 with the body for its size."""
    return run(tree_model(case, size_of(case)), scan_feeds(case))["0/y"]


@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    d_state=st.sampled_from([1, 2, 4, 16]),
    rank=st.sampled_from([None, 1, 2, 3]),
    directions=st.sampled_from(DIRECTION_LISTS),
    softplus=st.booleans(),
    steps=st.sampled_from(STEPS),
    known=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(1, 1, 1, 1, 1, DIRECTIONS, True, STEPS[0], True, 0)
@example(2, 1, 17, 2, None, DIRECTIONS, True, STEPS[0], True, 0)
@example(2, 17, 1, 1, 2, DIRECTIONS, False, STEPS[0], False, 0)
@example(1, 17, 19, 1, 2, DIRECTIONS, True, STEPS[0], True, 0)
def test_the_body_equals_the_definition(
    batch: int,
    height: int,
    width: int,
    d_state: int,
    rank: int | None,
    directions: tuple[str, ...],
    softplus: bool,
    steps: tuple[float, float],
    known: bool,
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
    y = scan(case) if known else run_session(open_session(case.variant), scan_feeds(case))["0/y"]
    assert y.dtype == np.float32
    assert error(y, case.expected(torch.float32)) <= TOLERANCE


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("decay", [1.0, 16.0])
@pytest.mark.parametrize("steps", [*STEPS, (0.01, 20.0), (0.01, 0.02)])
def test_steps_of_every_size_are_exact_over_a_long_map(
    steps: tuple[float, float], decay: float, skip: bool
) -> None:
    for d_state, rank in ((1, 2), (2, None)):
        case = scan_case(1, 2, 56, 56, d_state=d_state, rank=rank, steps=steps, decay=decay, skip=skip)
        assert error(scan(case), case.expected(torch.float32)) <= TOLERANCE


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("step", [1e-4, 1e-3, 1e-2])
def test_small_steps_do_not_gather_rounding_errors(step: float, even: bool) -> None:
    # On an even map every decay is rounded the same way, and nothing averages out.
    for d_state, rank in ((1, 2), (2, None)):
        steps = (step, 1.01 * step)
        case = scan_case(1, 2, 56, 56, d_state=d_state, rank=rank, steps=steps, skip=False, even=even)
        assert error(scan(case), case.expected(torch.float32)) <= TOLERANCE


@pytest.mark.parametrize("size", [(16, 16), (257, 1), (1, 263), (17, 19), (37, 41), (64, 64), (128, 3)])
def test_lengths_around_the_limits(size: Size) -> None:
    case = scan_case(1, 2, *size, steps=(0.01, 1.0), skip=False)
    assert error(scan(case), case.expected(torch.float32)) <= TOLERANCE


@given(length=st.integers(1, 70_000))
def test_lines_hold_a_sequence_without_an_empty_line(length: int) -> None:
    count, size = lines(length)
    assert (count - 1) * size < length <= count * size
    if length > LONG:
        assert size <= math.isqrt(length - 1) + 1 and size > math.isqrt(length) // 2


def test_a_map_that_is_too_large_for_an_open_body_fails() -> None:
    case = scan_case(1, 1, 257, 256, rank=1, directions=("row",))
    with pytest.raises(Exception, match="65536 by 65792"):
        run_session(open_session(case.variant), scan_feeds(case))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("d_state", [1, 4])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_body_is_valid_standard_and_has_no_loop(
    known: bool, d_state: int, rank: int | None, dtype: torch.dtype
) -> None:
    case = scan_case(1, 3, 6, 7, d_state=d_state, rank=rank)
    model = tree_model(case, (6, 7) if known else None, dtype)
    onnx.checker.check_model(model, full_check=True)
    (function,) = model.functions
    assert (function.domain, function.name) == (DOMAIN, SELECTIVE_SCAN_2D)
    assert [(item.domain, item.version) for item in function.opset_import] == [("", 20)]
    assert {node.domain for node in function.node} == {""}
    assert not {"Scan", "Loop", "If", "CumSum", "Log"} & {node.op_type for node in function.node}
    assert not any(attribute.HasField("g") for node in function.node for attribute in node.attribute)


@pytest.mark.parametrize("length", [49, 196, 784, 3136, 12544])
def test_the_depth_is_logarithmic(length: int) -> None:
    side = math.isqrt(length)
    variant = ScanVariant(DIRECTIONS, True, 1, True)
    function = tree_body(TreeVariant(**vars(variant), size=(side, side)))
    depths: dict[str, int] = {}
    for node in function.node:
        depth = 1 + max((depths.get(name, 0) for name in node.input), default=0)
        depths |= dict.fromkeys(node.output, depth)
    assert depths[function.output[0]] < 55 + 4 * math.ceil(math.log2(length))


@pytest.mark.parametrize(("d_state", "rank"), [(1, 2), (4, None)])
def test_float16_maps(d_state: int, rank: int | None) -> None:
    case = scan_case(2, 3, 9, 14, d_state=d_state, rank=rank)
    y = run(tree_model(case, (9, 14), torch.float16), scan_feeds(case, torch.float16))["0/y"]
    assert y.dtype == np.float16
    assert error(y, case.expected(torch.float16)) <= torch.finfo(torch.float16).eps / 2 + TOLERANCE


def test_zeros_and_large_values() -> None:
    case = scan_case(1, 3, 6, 6)
    x, *others = case.tensors
    nothing = ScanCase((torch.zeros_like(x), *others), case.directions, case.softplus)
    assert not scan(nothing).any()
    large = ScanCase((x * 1e30, *others), case.directions, case.softplus)
    assert error(scan(large), large.expected(torch.float32)) <= TOLERANCE
    forgetting = ScanCase((x, others[0] * 1e4, *others[1:]), case.directions, case.softplus)
    assert error(scan(forgetting), forgetting.expected(torch.float32)) <= TOLERANCE


@pytest.mark.parametrize("name", ["x", "dt", "B", "C"])
def test_a_nan_is_not_hidden(name: str) -> None:
    case = scan_case(1, 2, 4, 5)
    feeds = scan_feeds(case)
    feeds[f"0/{name}"] = feeds[f"0/{name}"].copy()
    feeds[f"0/{name}"][0, 0, 2, 3] = np.nan
    assert np.isnan(run(tree_model(case, (4, 5)), feeds)["0/y"]).any()


def test_an_unknown_direction_is_refused() -> None:
    with pytest.raises(PassError, match=r"'rows'.*row_reverse"):
        tree_body(ScanVariant(("row", "rows"), True, 1, True))


def test_softplus_without_a_logarithm() -> None:
    write = Writer()
    z = helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [None])
    name = write_softplus_series(write, "z")
    graph = helper.make_graph(write.nodes, "softplus", [z], [helper.make_tensor_value_info(name, 1, [None])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    values = np.concatenate([np.linspace(-80, 80, 20_001), [-1e4, 0.0, 1e4]]).astype(np.float32)
    found = run(model, {"z": values})[name]
    expected = np.logaddexp(0, values.astype(np.float64))
    normal = expected > np.finfo(np.float32).tiny
    assert np.abs(found[normal] / expected[normal] - 1).max() < 5e-7
    assert (np.abs(found - expected)[~normal] <= np.finfo(np.float32).tiny).all()


# In whole models ------------------------------------------------------------------------------------------------


def test_a_model_has_a_body_for_each_size_and_equals_pytorch() -> None:
    model, images = digits()
    lowered = lower(infer_shapes(traced_digits()), "tree")
    onnx.checker.check_model(lowered, full_check=True)
    assert len(lowered.functions) == len({function.overload for function in lowered.functions}) > 1
    inlined = inline_scans(lowered)
    onnx.checker.check_model(inlined, full_check=True)
    assert not inlined.functions and DOMAIN not in {node.domain for node in inlined.graph.node}
    names = [node.name for node in inlined.graph.node]
    assert any(name.startswith("block_1/scan/") for name in names)
    expected = torch_outputs(model, images)
    for candidate in (lowered, inlined):
        errors = output_errors(onnx_outputs(candidate, images), expected)
        assert max(errors.values()) < 1e-4


def test_open_sizes_take_steps_for_the_largest_map_alone() -> None:
    def steps(model: onnx.ModelProto) -> int:
        return sum(node.op_type == "Exp" for function in model.functions for node in function.node)

    model = infer_shapes(text_model(CHANNEL_FIRST))
    at = [{"x": (1, CHANNELS, 4, 5)}, {"x": (2, CHANNELS, 9, 11)}]
    limited = lower(model, "tree", at)
    # Softplus takes one exponential; 2^6 < 99 ≤ 2^7, and 65,536 is 2^16.
    assert (steps(limited), steps(lower(model, "tree"))) == (1 + 7, 1 + 16)
    for height, width in ((4, 5), (9, 11), (3, 33), (1, 1)):
        x = image(height, width)
        assert error(run(limited, {"x": x})["y"], run(lower(model), {"x": x})["y"]) <= 1e-5
    with pytest.raises(Exception, match="99 by 100"):
        run(limited, {"x": image(10, 10)})
    fixed = lower(model, "tree", [{"x": (1, CHANNELS, 4, 5)}, {"x": (8, CHANNELS, 4, 5)}])
    assert fixed.functions == lower(infer_shapes(text_model(CHANNEL_FIRST, 4, 5)), "tree").functions
    with pytest.raises(PassError, match=r"the graph does not fit inputs of x \(1, 5, 4, 5\)"):
        lower(model, "tree", [{"x": (1, CHANNELS + 1, 4, 5)}])


def test_inlining_needs_a_body() -> None:
    with pytest.raises(PassError, match="no function body"):
        inline_scans(traced_digits())
