"""A comparison is worth what it catches: faults planted in the ONNX graph must show, at the block that has them.

They must show whatever the weights: those of the trained digits model, the random ones of the public references, and
new ones, with which leaving out every flip moves the logits of MedMamba by a millionth. So each scan and each block is
compared, from the input that it has in the target.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import (
    Array,
    digits,
    reference,
    shortened,
    traced,
    traced_digits,
    traced_with_open_sizes,
)
from onnx import helper, numpy_helper
from torch import Tensor

from quartermap_deploy.architectures import load_card
from quartermap_deploy.architectures.base import VisualStateSpaceModel
from quartermap_deploy.architectures.factory import build
from quartermap_deploy.frontend.exporter import INPUT, OUTPUT, trace
from quartermap_deploy.frontend.node_names import block_output, scan_name
from quartermap_deploy.lowering.operator import INPUTS_2D, SELECTIVE_SCAN_2D
from quartermap_deploy.passes import CANONICAL, OPTIMIZED, GraphPass, Selection, lower, run_passes
from quartermap_deploy.pruning import QuarterMap, prune
from quartermap_deploy.sources.architectures import architecture_reference
from quartermap_deploy.targets.onnxruntime.opening import inference_session
from quartermap_deploy.validation.comparison import OutputComparison, block_of
from quartermap_deploy.validation.parity import ParityReport, check_parity
from quartermap_deploy.validation.runners import TorchRunner, onnxruntime_runner, with_block_outputs
from quartermap_deploy.validation.tolerances import Tolerance, tolerance_for

pytestmark = pytest.mark.usefixtures("small_models")

TOLERANCE = tolerance_for("float32")

Fault = Callable[[onnx.ModelProto, Sequence[onnx.NodeProto]], None]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTERMAP_THREADS", "1")


# What is compared -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A model, its graph before any pass, and images."""

    model: VisualStateSpaceModel
    graph: onnx.ModelProto
    images: Tensor


SUBJECTS = {
    "digits": 5,
    "vmamba_s1_channel_last": 4,
    "medmamba": 4,
    "short vmamba_s2_channel_first": 2,
    "short vmamba_v0_gated": 2,
    "new vmamba_tiny_s1l8": 2,
    "new vmamba_tiny_v0": 2,
    "new medmamba_t": 2,
}
"""The subjects, and the block that gets a fault where only one does: one in the middle, or the last of two."""


@functools.cache
def subject(name: str) -> Subject:
    """Return a subject; shared, so it must not be changed."""
    if name == "digits":
        return Subject(digits()[0], traced_digits(), digits()[1])
    kind, _, rest = name.partition(" ")
    random = torch.Generator().manual_seed(0)
    if kind == "new":
        model = newly_initialised(rest)
        images = torch.randn(2, 3, 56, 72, generator=random)
        return Subject(model, trace(model, tuple(images.shape)), images)
    if kind == "short":
        # Maps of 11×14 and 6×7, or, where patches round down, of 10×13 and 5×7 or 5×6: odd sizes are in it.
        images = torch.randn(2, 3, 43, 53, generator=random)
        return Subject(shortened(rest), traced_with_open_sizes(rest), images)
    return Subject(reference(name).model, traced(name), reference(name).input)


def newly_initialised(name: str) -> VisualStateSpaceModel:
    """Return one block for each of the first two stages of a public model, with new weights."""
    card = load_card(name)
    fewer = {"depths": [1, 1], "dims": card.architecture["dims"][:2], "num_classes": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(dataclasses.replace(card, architecture={**card.architecture, **fewer})).eval()


def compared(
    name: str, graph: onnx.ModelProto, plan: QuarterMap | None = None, tolerance: Tolerance = TOLERANCE
) -> ParityReport:
    """Return the parity of a graph without bodies with PyTorch, which prunes by a plan."""
    given = subject(name)
    model = given.model if plan is None else prune(given.model, plan)
    runners = TorchRunner(architecture_reference(model)), onnxruntime_runner(lower(graph))
    return check_parity(*runners, {"images": {INPUT: given.images.numpy()}}, tolerance)


def errors(report: ParityReport) -> dict[str, OutputComparison]:
    """Return the comparisons of a report's one case by name, in the order of the network."""
    (outputs,) = report.cases.values()
    return {output.name: output for output in outputs}


def departing(report: ParityReport) -> list[str]:
    """Return the outputs that do not pass, in the order of the network."""
    return [name for name, output in errors(report).items() if not output]


def departing_blocks(report: ParityReport) -> set[int | None]:
    """Return the blocks of which a scan or an output does not pass."""
    return {block_of(name) for name in departing(report)} - {None}


# The faults -----------------------------------------------------------------------------------------------------------


def scans(model: onnx.ModelProto, blocks: Sequence[int] | None = None) -> list[onnx.NodeProto]:
    """Return the scans of some blocks, or of all."""
    found = [node for node in model.graph.node if node.op_type == SELECTIVE_SCAN_2D]
    return found if blocks is None else [found[block - 1] for block in blocks]


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    (attribute,) = (item for item in node.attribute if item.name == name)
    return attribute


def _replace_input(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], name: str, change: Callable[[Array], Array]
) -> None:
    """Give nodes a changed copy of a parameter; blocks that share it keep theirs."""
    position = INPUTS_2D.index(name)
    for node in nodes:
        arrays = {tensor.name: tensor for tensor in model.graph.initializer}
        changed = change(numpy_helper.to_array(arrays[node.input[position]])).astype(np.float32)
        node.input[position] = f"{node.name}/{name}_{len(arrays)}"
        model.graph.initializer.append(numpy_helper.from_array(changed, node.input[position]))


def with_directions(change: Callable[[list[str]], list[str]]) -> Fault:
    """Return a fault of the scan orders."""

    def plant(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
        for node in nodes:
            attribute = _attribute(node, "directions")
            names = [name.decode() for name in attribute.strings]
            assert names != change(names)
            attribute.strings[:] = [name.encode() for name in change(names)]

    return plant


def with_parameter(name: str, change: Callable[[Array], Array]) -> Fault:
    """Return a fault of a parameter."""
    return lambda model, nodes: _replace_input(model, nodes, name, change)


def without_softplus(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Apply no softplus to the time step."""
    for node in nodes:
        _attribute(node, "softplus").i = 0


def with_turned_maps(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Take height for width in the scan: turn all maps before it and its result back."""
    for node in nodes:
        place = next(i for i, item in enumerate(model.graph.node) if item.name == node.name)
        turned = []
        for position in range(4):
            name = f"{node.name}/turned_{position}"
            turned.append(helper.make_node("Transpose", [node.input[position]], [name], perm=[0, 1, 3, 2]))
            node.input[position] = name
        back = helper.make_node("Transpose", [f"{node.name}/turned"], [node.output[0]], perm=[0, 1, 3, 2])
        node.output[0] = f"{node.name}/turned"
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        del model.graph.node[place]
        for offset, item in enumerate([*turned, copied, back]):
            model.graph.node.insert(place + offset, item)


def exchanged(first: int, second: int) -> Callable[[list[str]], list[str]]:
    """Return a change that exchanges two directions."""

    def change(names: list[str]) -> list[str]:
        names = list(names)
        names[first], names[second] = names[second], names[first]
        return names

    return change


FAULTS: dict[str, Fault] = {
    "no flip": with_directions(lambda names: [name.removesuffix("_reverse") for name in names]),
    "no flip of rows": with_directions(lambda names: ["row" if n == "row_reverse" else n for n in names]),
    "no flip of columns": with_directions(
        lambda names: ["column" if n == "column_reverse" else n for n in names]
    ),
    "height and width swapped": with_turned_maps,
    "row and column exchanged": with_directions(exchanged(0, 1)),
    "row and its reverse exchanged": with_directions(exchanged(0, 2)),
    "reverses exchanged": with_directions(exchanged(2, 3)),
    "dt_bias dropped": with_parameter("dt_bias", np.zeros_like),
    "softplus dropped": without_softplus,
    "D dropped": with_parameter("D", np.zeros_like),
    # The normalisation behind the scan divides it out again where the skip is most of what the scan returns.
    "D scaled": with_parameter("D", lambda D: D / 2),
    "sign of A": with_parameter("A", np.negative),
}


def planted(name: str, fault: str, blocks: Sequence[int] | None = None) -> onnx.ModelProto:
    """Return the graph of a subject with a fault in the scans of some blocks, or of all."""
    model = onnx.ModelProto()
    model.CopyFrom(subject(name).graph)
    FAULTS[fault](model, scans(model, blocks))
    return model


EVERY_FAULT = ("digits", "short vmamba_s2_channel_first", "short vmamba_v0_gated")
"""Subjects that get every fault in `make test`: both layouts, one state and many, with a gate and without."""
OFTEN = ("no flip", "D scaled")
REPEATED = ("new vmamba_tiny_s1l8", "new vmamba_tiny_v0")
"""Subjects whose structure another one has, with other weights."""


def subjects() -> list[Any]:
    """The subjects; those are marked whose structure another one has."""
    return [pytest.param(name, marks=pytest.mark.exhaustive if name in REPEATED else ()) for name in SUBJECTS]


def faults() -> list[Any]:
    """Every fault of every subject; those are marked that show what the same fault shows in another subject."""
    return [
        pytest.param(
            name,
            fault,
            marks=()
            if name in EVERY_FAULT or (fault in OFTEN and name not in REPEATED)
            else pytest.mark.exhaustive,
        )
        for name in SUBJECTS
        for fault in FAULTS
    ]


@pytest.mark.parametrize("name", subjects())
def test_a_graph_without_faults_passes(name: str) -> None:
    # Passing is no matter of luck: it passes at a fifth of the tolerance too.
    strict = dataclasses.replace(TOLERANCE, relative=TOLERANCE.of_block / 5, block=TOLERANCE.of_block / 5)
    report = compared(name, subject(name).graph, tolerance=strict)
    assert report.passed, report.describe_failure()
    blocks = range(1, sum(subject(name).model.depths) + 1)
    names = [*(part(block) for block in blocks for part in (scan_name, block_output)), OUTPUT]
    assert list(errors(report)) == names


@functools.cache
def departing_with(name: str, fault: str) -> tuple[str, ...]:
    """The outputs of a subject that do not pass when all its blocks have a fault."""
    return tuple(departing(compared(name, planted(name, fault))))


@pytest.mark.parametrize(("name", "fault"), faults())
def test_a_fault_in_every_block_shows_in_every_scan(name: str, fault: str) -> None:
    found = departing_with(name, fault)
    # Not one hides behind another: each block is compared from the input that it has in the target.
    assert set(found) >= {scan_name(block + 1) for block in range(sum(subject(name).model.depths))}, found


@pytest.mark.parametrize("fault", OFTEN)
@pytest.mark.parametrize("name", subjects())
def test_a_fault_in_one_block_shows_in_that_block_only(name: str, fault: str) -> None:
    block = SUBJECTS[name]
    report = compared(name, planted(name, fault, [block]))
    assert departing_blocks(report) == {block}
    assert departing(report)[0] == scan_name(block)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_every_block_shows_in_the_logits_of_the_digits_model(fault: str) -> None:
    assert OUTPUT in departing_with("digits", fault)


def test_the_logits_of_a_new_model_do_not_show_what_its_scans_show() -> None:
    """Why scans are compared: this is how a public export came to lack two directions."""
    found = errors(compared("new medmamba_t", planted("new medmamba_t", "no flip")))
    assert found[OUTPUT].relative_error < TOLERANCE.relative / 10
    assert found[scan_name(1)].relative_error > TOLERANCE.of_block * 10


def test_the_report_names_the_block_that_has_a_fault() -> None:
    name, block = "medmamba", 4
    given = subject(name)
    cases = {"first": {INPUT: given.images[:1].numpy()}, "both": {INPUT: given.images.numpy()}}

    def report(model: onnx.ModelProto) -> ParityReport:
        runners = TorchRunner(architecture_reference(given.model)), onnxruntime_runner(lower(model))
        return check_parity(*runners, cases, TOLERANCE, {4: "layers.1.blocks.1"})

    right = report(given.graph)
    assert right.passed and right.first_departing_block is None
    failed = report(planted(name, "no flip", [block]))
    assert not failed.passed and failed.first_departing_block == block
    place = f"block {block} (layers.1.blocks.1) is the first that departs, in or before its scan"
    assert place in failed.describe_failure()


# Faults of pruning ----------------------------------------------------------------------------------------------------

PLANS = {
    "digits": QuarterMap(),
    "short vmamba_s2_channel_first": QuarterMap(blocks=(2,)),
    "short medmamba": QuarterMap(blocks=(1, 2), stride=3),
}


def pruned(name: str, plan: QuarterMap, passes: Sequence[GraphPass]) -> onnx.ModelProto:
    """Return the graph of a subject with a plan carried out, without bodies."""
    given = subject(name)
    selected = plan.select(given.model.depths)
    model, _ = run_passes(given.graph, Selection(selected, plan.subsample), passes)
    return model


def changed_constant(
    model: onnx.ModelProto, node: onnx.NodeProto, position: int, change: Callable[[Array], Array]
) -> None:
    """Give a node a changed copy of a constant input."""
    (tensor,) = (item for item in model.graph.initializer if item.name == node.input[position])
    array = change(numpy_helper.to_array(tensor))
    node.input[position] = f"{node.name}/changed_{position}"
    model.graph.initializer.append(numpy_helper.from_array(array, node.input[position]))


def restoring_one_too_far(model: onnx.ModelProto) -> None:
    """Restore each position from the kept position behind the right one."""
    for place, node in reversed(list(enumerate(model.graph.node))):
        if node.op_type == "Resize":
            _attribute(node, "nearest_mode").s = b"ceil"
        elif node.op_type == "Gather" and "/restore" in node.name:
            sources, moved = node.input[1], f"{node.name}/moved"
            one = numpy_helper.from_array(np.array(1), f"{node.name}/one")
            model.graph.initializer.append(one)
            node.input[1] = moved
            for added in (
                helper.make_node("Min", [f"{moved}_all", f"{moved}_last"], [moved]),
                helper.make_node("ReduceMax", [sources], [f"{moved}_last"], keepdims=0),
                helper.make_node("Add", [sources, one.name], [f"{moved}_all"]),
            ):
                model.graph.node.insert(place, added)


def keeping_one_too_far(model: onnx.ModelProto) -> None:
    """Keep the second position of each group instead of the first."""
    for node in model.graph.node:
        if node.op_type == "Slice" and "/keep" in node.name:
            changed_constant(model, node, 1, lambda starts: starts + 1)


def losing_the_last_position(model: onnx.ModelProto) -> None:
    """Round the number of kept positions down instead of up at odd sizes."""
    for node in model.graph.node:
        if node.op_type == "Slice" and "/keep" in node.name:
            changed_constant(model, node, 2, lambda ends: np.full_like(ends, -1))


def moving_the_hoisted_convolution(model: onnx.ModelProto) -> None:
    """Compute the second position of each group in the convolution with a stride."""
    for node in model.graph.node:
        strides = [item.ints for item in node.attribute if item.name == "strides"]
        group = [item.i for item in node.attribute if item.name == "group"]
        if node.op_type == "Conv" and strides and max(strides[0]) > 1 and group and group[0] > 1:
            _attribute(node, "pads").ints[:] = [0, 0, 2, 2]


@pytest.mark.parametrize("passes", [CANONICAL, OPTIMIZED])
@pytest.mark.parametrize("name", PLANS)
def test_a_pruned_graph_without_faults_passes(name: str, passes: Sequence[GraphPass]) -> None:
    report = compared(name, pruned(name, PLANS[name], passes), PLANS[name])
    assert report.passed, report.describe_failure()


@pytest.mark.parametrize(
    ("name", "fault", "passes"),
    [
        ("digits", restoring_one_too_far, CANONICAL),
        ("digits", restoring_one_too_far, OPTIMIZED),
        ("digits", keeping_one_too_far, CANONICAL),
        ("digits", moving_the_hoisted_convolution, OPTIMIZED),
        ("short vmamba_s2_channel_first", restoring_one_too_far, OPTIMIZED),
        ("short vmamba_s2_channel_first", keeping_one_too_far, CANONICAL),
        ("short vmamba_s2_channel_first", losing_the_last_position, CANONICAL),
        ("short vmamba_s2_channel_first", moving_the_hoisted_convolution, OPTIMIZED),
        ("short medmamba", restoring_one_too_far, CANONICAL),
        ("short medmamba", restoring_one_too_far, OPTIMIZED),
        ("short medmamba", keeping_one_too_far, CANONICAL),
    ],
)
def test_a_resize_off_by_one_shows_in_the_pruned_blocks_only(
    name: str, fault: Callable[[onnx.ModelProto], None], passes: Sequence[GraphPass]
) -> None:
    plan = PLANS[name]
    model = pruned(name, plan, passes)
    fault(model)
    report = compared(name, model, plan)
    selected = plan.select(subject(name).model.depths)
    assert departing_blocks(report) <= set(selected)
    # Restoring comes after the scan, keeping before it.
    part = block_output if fault is restoring_one_too_far else scan_name
    assert departing(report)[0] == part(selected[0])


@pytest.mark.parametrize("passes", [CANONICAL, OPTIMIZED])
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        # Instead of 3, 6 and 9: one too early, one too late, one too few, one too many.
        ("digits", QuarterMap(blocks=(2, 6, 9))),
        ("digits", QuarterMap(blocks=(4, 6, 9))),
        ("digits", QuarterMap(blocks=(3, 6))),
        ("digits", QuarterMap(blocks=(3, 6, 7, 9))),
        ("short vmamba_s2_channel_first", QuarterMap(blocks=(1,))),
    ],
)
def test_the_wrong_block_pruned_shows_in_that_block(
    name: str, plan: QuarterMap, passes: Sequence[GraphPass]
) -> None:
    report = compared(name, pruned(name, plan, passes), PLANS[name])
    depths = subject(name).model.depths
    assert departing_blocks(report) == set(plan.select(depths)) ^ set(PLANS[name].select(depths))


@pytest.mark.parametrize(
    "plan", [QuarterMap(stride=3), QuarterMap(stride=3, keep=2), QuarterMap(upsample="bilinear")]
)
def test_another_subsampling_shows_in_the_pruned_blocks(plan: QuarterMap) -> None:
    report = compared("digits", pruned("digits", plan, OPTIMIZED), PLANS["digits"])
    # Of the 2×2 positions of block 9, strides 2 and 3 keep the same one, and all of its copies are the same.
    assert departing_blocks(report) - {9} == {3, 6}


# Following the target -------------------------------------------------------------------------------------------------


def test_a_value_that_cannot_be_followed_is_replaced_by_the_right_one() -> None:
    name = "new vmamba_tiny_s1l8"
    given = subject(name)
    feed = {INPUT: given.images.numpy()}
    runner = TorchRunner(architecture_reference(given.model), double=True)
    with runner:
        right = runner.infer(feed)
        shape = right[block_output(1)].shape
        runner.follow(
            [{}, {block_output(1): np.full(shape, np.nan, np.float32)}, {block_output(1): right[OUTPUT]}]
        )
        for _ in range(3):
            for output, value in runner.infer(feed).items():
                np.testing.assert_array_equal(value, right[output], err_msg=output)
        runner.follow([{block_output(1): np.zeros(shape, np.float32)}])
        followed = runner.infer(feed)
    assert np.abs(followed[block_output(2)] - right[block_output(2)]).max() > 0.1
    # What block 1 returns, and the logits, are the model's own.
    np.testing.assert_array_equal(followed[block_output(1)], right[block_output(1)])
    np.testing.assert_array_equal(followed[OUTPUT], right[OUTPUT])


def test_a_scan_that_is_an_output_of_the_model_is_shown_as_a_scan_too() -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(lower(subject("medmamba").graph))
    scan = next(node for node in graph.graph.node if node.name == scan_name(1))
    graph.graph.output.append(
        onnx.helper.make_tensor_value_info(scan.output[0], onnx.TensorProto.FLOAT, None)
    )
    marked = with_block_outputs(graph)
    names = [value.name for value in inference_session(marked.SerializeToString()).get_outputs()]
    assert (
        scan_name(1) in names and scan.output[0] in names and names.index(scan_name(1)) < names.index(OUTPUT)
    )
