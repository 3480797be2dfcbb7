"""Localising a fault of precision: the block that is planted is the block that is named."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import CHANNEL_FIRST, Array, block_weights, chained, image, run_session, session, text_model
from onnx import numpy_helper
from polygraphy.backend.onnxrt import OnnxrtRunner
from reference_models import tiny

from quartermap_deploy.errors import PassError
from quartermap_deploy.exporting.export import export
from quartermap_deploy.exporting.ranges import scan_ranges
from quartermap_deploy.frontend.exporter import INPUT
from quartermap_deploy.passes import infer_shapes, lower
from quartermap_deploy.passes.cast_precision import cast_precision
from quartermap_deploy.sources.architectures import architecture_reference, architecture_source
from quartermap_deploy.validation import localise as localise_module
from quartermap_deploy.validation.comparison import OutputComparison
from quartermap_deploy.validation.golden import golden_runner
from quartermap_deploy.validation.localise import LocaliseReport, localise
from quartermap_deploy.validation.parity import ParityReport, check_parity
from quartermap_deploy.validation.rounding import rounded_in_float32
from quartermap_deploy.validation.runners import TorchRunner, onnxruntime_runner, with_block_outputs
from quartermap_deploy.validation.tolerances import Tolerance

pytestmark = pytest.mark.usefixtures("small_models")

BLOCKS = 3
TOLERANCE = Tolerance("float16", 5e-3, "as at block level")


def network(faulty: Sequence[int] = (), scale: float = 4e4, after: str = "") -> onnx.ModelProto:
    """Return three blocks; in the faulty ones a value grows beyond float16 and is brought back at once.

    The weights themselves stay within its range.
    """
    weights = block_weights()
    text = chained(CHANNEL_FIRST, BLOCKS)
    own: dict[str, Array] = {"x_proj": weights["x_proj"] / 6}
    for index in range(1, BLOCKS + 1):
        value = "y" if index == BLOCKS else f"y_{index}"
        text = text.replace(f"    {value} = ", f"    block_{index} = ")
        text = text.replace(f"({value},", f"(block_{index},").replace(f"({value})", f"(block_{index})")
        own[f"in_{index}"] = weights["in_proj"].copy()
        own[f"conv_{index}"] = weights["conv"].copy()
        if index in faulty:
            own[f"in_{index}"] *= np.float32(scale)
            own[f"conv_{index}"] /= np.float32(scale)
        source = "x" if index == 1 else f"block_{index - 1}"
        text = text.replace(f"({source}, in_proj)", f"({source}, in_{index})")
        text = text.replace(f"(projected_{index}, conv)", f"(projected_{index}, conv_{index})")
    return infer_shapes(text_model(text + (after or f"\n    y = Relu (block_{BLOCKS})\n"), weights=own))


def found(model: onnx.ModelProto, precision: str = "float16", **options: object) -> LocaliseReport:
    return localise(model, precision, in_float32(model), cases(), TOLERANCE, **options)  # type: ignore[arg-type]


def in_float32(model: onnx.ModelProto) -> OnnxrtRunner:
    """Return a runner whose session is loaded once for many comparisons."""
    return OnnxrtRunner(session(with_block_outputs(lower(model))), name="float32")


def cases() -> Mapping[str, Mapping[str, Array]]:
    return {"images": {"x": image(6, 7)}, "zeros": {"x": np.zeros((2, 4, 6, 7), np.float32)}}


def passes_with(model: onnx.ModelProto, blocks: Sequence[int]) -> bool:
    typed, _ = cast_precision(model, "float16", blocks_float32=blocks)
    target = onnxruntime_runner(rounded_in_float32(lower(typed)))
    return check_parity(in_float32(model), target, cases(), TOLERANCE).passed


def test_a_model_that_is_right_has_nothing_to_localise() -> None:
    report = found(network())
    assert report.passed
    assert report.runs == 1
    assert 1e-5 < report.error <= TOLERANCE.relative
    assert "nothing to localise" in report.describe()


@pytest.mark.parametrize("block", range(1, BLOCKS + 1))
def test_the_faulty_block_is_named(block: int) -> None:
    report = found(network([block]))
    assert not report.passed
    assert report.restoring == (block,)
    assert report.names == (f"block_{block}",)
    assert [part for part, (passed, _) in report.alone.items() if passed] == [block]
    assert report.error == float("inf")
    assert report.remaining <= TOLERANCE.relative
    assert f"block_{block} in float32 restores parity in float16" in report.describe()
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert written["restoring"] == [f"block_{block}"]
    assert written["relative_error"] is None
    assert written["alone"][f"block_{block}"]["passed"]


@pytest.mark.parametrize("blocks", [(1, 3), (1, 2, 3)])
def test_a_smallest_set_is_found_where_no_block_alone_is_enough(blocks: tuple[int, ...]) -> None:
    model = network(blocks)
    report = found(model)
    assert report.restoring == blocks
    assert not any(passed for passed, _ in report.alone.values())
    assert "together" in report.describe()
    assert passes_with(model, blocks)
    for left_out in blocks:
        assert not passes_with(model, [block for block in blocks if block != left_out])


def test_a_fault_behind_the_last_block_is_told_apart() -> None:
    after = f"""
    large = Mul (block_{BLOCKS}, up)
    y = Mul (large, down)
"""
    model = network(after=after)
    for name, value in (("up", 6e4), ("down", 1 / 6e4)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    report = found(model)
    assert report.names == ("the part after the last block",)


def test_a_fault_that_is_not_one_of_precision_is_not_blamed_on_a_block() -> None:
    model = network()
    other = network([1], scale=2.0)
    for tensor in other.graph.initializer:
        if tensor.name == "conv_1":
            tensor.CopyFrom(numpy_helper.from_array(block_weights()["conv"], "conv_1"))
    report = localise(model, "float16", in_float32(other), cases(), TOLERANCE)
    assert report.restoring is None
    assert report.names == ()
    assert "not one of precision" in report.describe()
    assert report.to_dict()["restoring"] is None


def test_what_is_kept_anyway_counts() -> None:
    assert found(network([2]), keep_float32=["projected_2"]).passed


def test_blocks_that_are_kept_anyway_count() -> None:
    assert not found(network([2]), blocks_float32=[1]).passed
    assert found(network([2]), blocks_float32=[2]).passed
    # Two faults, one of which is kept anyway: the other is the one that is named, and tried with the first.
    report = found(network([1, 3]), blocks_float32=[3])
    assert report.restoring == (1,) and list(report.alone)[:2] == [1, 2]


def test_of_several_blocks_that_mend_the_best_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors that are left are given here, by the block that is in float32; real ones seldom are so near."""
    left = {1: 4e-3, 2: 1e-3, 3: 3e-3, 0: 9e-3}

    def compared(*arguments: object) -> ParityReport:
        (block,) = float32 or (None,)
        return judged(8e-3 if block is None else left[block])

    def typed(model: onnx.ModelProto, precision: str, **kept: Any) -> tuple[onnx.ModelProto, None]:
        float32[:] = kept["blocks_float32"]
        if not float32 and kept["keep_float32"]:
            float32[:] = [0]
        return model, None

    float32: list[int] = []
    monkeypatch.setattr(localise_module, "cast_precision", typed)
    monkeypatch.setattr(localise_module, "check_parity", compared)
    report = found(network())
    assert [part for part, (passed, _) in report.alone.items() if passed] == [1, 2, 3]
    assert (report.restoring, report.remaining, report.error) == ((2,), 1e-3, 8e-3)


class Counting:
    """Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int | None]] = []
        self.units = 0

    @contextlib.contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        self.steps.append((title, total))
        yield self.advance

    def advance(self, units: int) -> None:
        self.units += units


def judged(error: float) -> ParityReport:
    """A comparison whose worst error this is."""
    outcome = OutputComparison("y", error, error, 1.0, TOLERANCE.relative, error <= TOLERANCE.relative)
    return ParityReport("float32", "float16", TOLERANCE, {"images": [outcome]})


def test_each_block_is_tried_with_what_is_kept_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def typed(model: onnx.ModelProto, precision: str, **kept: Any) -> tuple[onnx.ModelProto, None]:
        tried.append((precision, kept["keep_float32"], kept["blocks_float32"]))
        return model, None

    errors = iter([0.5, 0.25, np.inf, 0.125, 0.0625])
    monkeypatch.setattr(localise_module, "cast_precision", typed)
    monkeypatch.setattr(localise_module, "check_parity", lambda *arguments: judged(next(errors)))
    model = network(after=f"\n    rest = Relu (block_{BLOCKS})\n    y = Abs (rest)\n")
    model.graph.node[-1].name = ""
    progress = Counting()
    report = found(model, keep_float32=iter(["Exp_1"]), blocks_float32=iter([2]), progress=progress)
    assert progress.steps == [("flipping casts block by block", 4)] and progress.units == 4
    names, after = ("Exp_1",), ("Exp_1", "rest")
    assert tried == [
        ("float16", names, {2}),
        ("float16", names, {1, 2}),
        ("float16", names, {2, 3}),
        ("float16", after, {2}),
        ("float16", after, {1, 2, 3}),
    ]
    alone = {1: (False, 0.25), 3: (False, np.inf), 0: (False, 0.125)}
    assert report == LocaliseReport("float16", False, alone, None, 0.5, 0.0625, runs=5)


@pytest.mark.parametrize(
    ("needed", "alone", "tries"),
    [
        (
            {2, 5},
            {1: 0.6, 2: 0.1, 3: 0.5, 4: 0.4, 5: 0.2, 6: 0.3},
            # Those that help least go first, half of them at a time, and what is left one by one.
            [[1, 2, 3, 4, 5, 6], [2, 5, 6], None, [2, 5], [2], [5]],
        ),
        (
            {1, 8},
            {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.6, 5: 0.5, 6: 0.4, 7: 0.3, 8: 0.2},
            [
                [1, 2, 3, 4, 5, 6, 7, 8],
                [5, 6, 7, 8],
                [3, 4, 5, 6, 7, 8],
                [2, 3, 4, 5, 6, 7, 8],
                [1, 3, 4, 5, 6, 7, 8],
                [1, 4, 5, 6, 7, 8],
                [1, 5, 6, 7, 8],
                [1, 6, 7, 8],
                [1, 7, 8],
                [1, 8],
                [1],
            ],
        ),
        ({1, 9}, {1: 0.9, 2: 0.8}, [[1, 2]]),
    ],
    ids=["two of six", "first and last", "elsewhere"],
)
def test_the_smallest_set_is_found_from_the_least_helpful_on(
    needed: set[int], alone: dict[int, float], tries: list[list[int] | None]
) -> None:
    tried: list[list[int]] = []
    progress = Counting()

    def compare(blocks: Iterable[int]) -> ParityReport:
        tried.append(sorted(blocks))
        return judged(len(tried) * 1e-4 if needed <= set(tried[-1]) else 1.0)

    kept, left = localise_module._smallest_set(
        compare, list(alone), {part: (False, error) for part, error in alone.items()}, progress
    )
    assert tried == [blocks for blocks in tries if blocks is not None]
    if needed <= set(alone):
        assert kept == tuple(sorted(needed))
        # The error is that of the set itself, not of one that was tried after it.
        assert left == (tried.index(sorted(needed)) + 1) * 1e-4
        assert progress.steps == [("finding the smallest set of blocks", None)]
        assert progress.units == len(tries) - 1
    else:
        assert (kept, left) == (None, 1.0) and progress.steps == []


def test_a_runner_of_ones_own_may_have_the_result_alone() -> None:
    """As an engine has: each form is built by the caller, and judged by its result."""
    model, forms = network([2]), []

    def runner(typed: onnx.ModelProto) -> OnnxrtRunner:
        forms.append(typed)
        return OnnxrtRunner(session(rounded_in_float32(typed)), name="engine")

    results = [run_session(session(lower(model)), feeds) for feeds in cases().values()]
    report = localise(model, "float16", golden_runner(results), cases(), TOLERANCE, runner=runner)
    assert report.names == ("block_2",)
    assert len(forms) == report.runs == BLOCKS + 2
    types = [{tensor.data_type for tensor in form.graph.initializer} for form in forms]
    assert all(onnx.TensorProto.FLOAT16 in found for found in types)


@pytest.mark.parametrize(
    ("report", "said", "advice", "names"),
    [
        (
            LocaliseReport("float16", True, error=1e-3, remaining=1e-3),
            "nothing to localise",
            "report this",
            [],
        ),
        (LocaliseReport("float16", False, restoring=None), "not one of precision", "report this", None),
        (
            LocaliseReport("float16", False, restoring=(2,), error=0.25, remaining=1e-3, runs=5),
            "block_2 in float32 restores parity in float16: the largest relative error falls from 2.50e-01 to 1.00e-03",
            "keep it in float32: --float32-blocks 2, in a recipe blocks_float32",
            ["block_2"],
        ),
        (
            LocaliseReport("bfloat16", False, restoring=(0,), error=np.inf, remaining=1e-3),
            "the part after the last block in float32 restores parity in bfloat16",
            "report this",
            ["the part after the last block"],
        ),
        (
            LocaliseReport("float16", False, restoring=(3, 5, 0), error=0.5, remaining=2e-3),
            "no block alone restores parity in float16; block_3 and block_5 and the part after the last block together",
            "keep it in float32: --float32-blocks 3,5, in a recipe blocks_float32",
            ["block_3", "block_5", "the part after the last block"],
        ),
    ],
    ids=["right", "no precision", "one", "after", "several"],
)
def test_what_is_said_about_each_outcome(
    report: LocaliseReport, said: str, advice: str, names: list[str] | None
) -> None:
    assert said in report.describe()
    assert advice in report.advice()
    assert report.to_dict()["restoring"] == names and list(report.names) == (names or [])


def test_the_report_is_plain_and_whole() -> None:
    alone = {1: (False, np.inf), 2: (True, 1e-3), 0: (False, 0.5)}
    report = LocaliseReport("float16", False, alone, (2,), np.inf, 1e-3, runs=4)
    assert report.to_dict() == {
        "precision": "float16",
        "passed": False,
        "restoring": ["block_2"],
        "relative_error": None,
        "remaining_relative_error": 1e-3,
        "alone": {
            "block_1": {"passed": False, "relative_error": None},
            "block_2": {"passed": True, "relative_error": 1e-3},
            "the part after the last block": {"passed": False, "relative_error": 0.5},
        },
        "models_compared": 4,
    }


def test_progress_is_told() -> None:
    progress = Counting()
    found(network([1]), progress=progress)
    ((_, total),) = progress.steps
    assert total == progress.units == BLOCKS + 2


def test_a_graph_without_blocks_is_refused() -> None:
    model = infer_shapes(text_model(CHANNEL_FIRST))
    with pytest.raises(PassError, match="block_1"):
        found(model)


def test_an_overflow_in_a_block_of_a_model_is_found_and_the_range_scan_prevents_it() -> None:
    model = tiny("v2")
    block = model.layers[1].blocks[0]  # type: ignore[union-attr, index]
    with torch.no_grad():
        block.norm2.weight.mul_(1e3)  # type: ignore[union-attr, operator]
        block.mlp.fc1.weight.mul_(300)  # type: ignore[union-attr, operator]
        block.mlp.fc2.weight.mul_(1e-3)  # type: ignore[union-attr, operator]
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    graph = export(architecture_source(model, images.shape)).float32
    cases = {"images": {INPUT: images}}
    runner = TorchRunner(architecture_reference(model))
    report = localise(graph, "float16", runner, cases, TOLERANCE)
    assert report.names == ("block_2",)

    ranges = scan_ranges(lower(graph), {INPUT: images})
    assert any(name.startswith("gelu") for name in ranges.keep_float32)
    kept = localise(graph, "float16", runner, cases, TOLERANCE, keep_float32=ranges.keep_float32)
    assert kept.passed
