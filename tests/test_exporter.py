"""From PyTorch to ONNX: exported models, pruned and not, against PyTorch and against the public code's outputs."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Sequence

import onnx
import onnxruntime
import pytest
import torch
from helpers import (
    REPOSITORY,
    error,
    images_for,
    main_graph,
    onnx_outputs,
    output_errors,
    reference,
    run,
    run_session,
    session,
    shortened,
    torch_outputs,
    traced,
    traced_with_open_sizes,
    with_outputs,
)
from reference_models import CONFIGS, tiny
from torch import nn

from quartermap_deploy.architectures.vmamba import VMamba, VMambaConfig
from quartermap_deploy.errors import ExportError, InputError, PlanError
from quartermap_deploy.exporting.export import export, export_onnx
from quartermap_deploy.frontend.exporter import INPUT, OUTPUT, trace
from quartermap_deploy.frontend.node_names import block_output, scan_name
from quartermap_deploy.lowering.operator import DOMAIN, SELECTIVE_SCAN_2D
from quartermap_deploy.passes import CANONICAL, OPTIMIZED, GraphPass, Selection, lower, run_passes
from quartermap_deploy.pruning import QuarterMap, Subsample, prune
from quartermap_deploy.sources import architectures
from quartermap_deploy.sources.architectures import architecture_source

TOLERANCE = 1e-5
REFERENCES = sorted(CONFIGS)


@functools.cache
def lowered(name: str) -> onnx.ModelProto:
    """Return a reference as ONNX, not pruned; shared, so it must not be changed."""
    return lower(traced(name))


def pruned(
    model: onnx.ModelProto, depths: Sequence[int], plan: QuarterMap, passes: Sequence[GraphPass] = OPTIMIZED
) -> onnx.ModelProto:
    """Return a traced model with a plan carried out and bodies attached."""
    changed, _ = run_passes(model, Selection(plan.select(depths), plan.subsample), passes)
    return lower(changed)


# Not pruned ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFERENCES)
def test_outputs_equal_the_public_code(name: str) -> None:
    public = reference(name)
    logits = run(lowered(name), {INPUT: public.input})[OUTPUT]
    assert error(logits, public.output) <= TOLERANCE


@pytest.mark.parametrize("name", REFERENCES)
def test_every_block_equals_pytorch_at_any_batch(name: str) -> None:
    model = reference(name).model
    names = [*map(block_output, range(1, sum(model.depths) + 1)), OUTPUT]
    ready = session(with_outputs(lowered(name), names))
    for batch in (1, 3):
        images = images_for(name, batch)
        expected = torch_outputs(model, images)
        assert list(expected) == names
        errors = output_errors(run_session(ready, {INPUT: images}), expected)
        assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("name", REFERENCES)
def test_the_file_is_valid_and_plain(name: str) -> None:
    model = lowered(name)
    onnx.checker.check_model(model, full_check=True)
    assert {item.domain: item.version for item in model.opset_import} == {"": 20, DOMAIN: 1}
    assert model.ir_version == 9
    assert Counter(node.domain for node in model.graph.node) == {
        "": len(model.graph.node) - len(reference(name).model.blocks()),
        DOMAIN: len(reference(name).model.blocks()),
    }
    assert [(function.domain, function.name) for function in model.functions] == [(DOMAIN, SELECTIVE_SCAN_2D)]
    types = {tensor.data_type for tensor in model.graph.initializer}
    assert types <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    assert not any(tensor.external_data for tensor in model.graph.initializer)


@pytest.mark.parametrize("name", REFERENCES)
def test_inputs_outputs_and_scans_have_their_names(name: str) -> None:
    graph = traced(name).graph
    (given,), (logits,) = graph.input, graph.output
    _, *image = reference(name).input.shape

    def axes(value: onnx.ValueInfoProto) -> list[int | str]:
        return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]

    assert (given.name, axes(given)) == (INPUT, ["batch", *image])
    assert (logits.name, axes(logits)) == (OUTPUT, ["batch", reference(name).output.shape[1]])
    scans = [node.name for node in graph.node if node.op_type == SELECTIVE_SCAN_2D]
    assert scans == [scan_name(index) for index in range(1, len(scans) + 1)]
    open_graph = traced_with_open_sizes(name).graph
    assert axes(open_graph.input[0]) == ["batch", 3, "height", "width"]
    assert axes(open_graph.output[0]) == ["batch", 3]


@pytest.mark.parametrize("name", REFERENCES)
def test_the_file_says_nothing_of_the_machine_that_made_it(name: str) -> None:
    model, _ = run_passes(traced(name), Selection((2,), Subsample()))
    stored = lower(model).SerializeToString()
    for path in (REPOSITORY, onnxruntime.__file__, onnx.__file__, torch.__file__):
        for part in (str(path), "site-packages", "quartermap_deploy/", "Traceback", '.py"'):
            assert part.encode() not in stored, part
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    assert not any(node.doc_string or node.metadata_props for node in nodes)
    assert not model.metadata_props and not model.graph.metadata_props
    assert (model.producer_name, model.producer_version, model.doc_string) == ("quartermap-deploy", "", "")


def test_exporting_twice_gives_the_same_file_and_leaves_the_model_alone() -> None:
    name = "vmamba_s2_channel_first"
    model = copy.deepcopy(shortened(name)).train()
    again = trace(model, (2, 3, 64, 96), dynamic_size=True)
    assert main_graph(again) == main_graph(traced_with_open_sizes(name))
    before = shortened(name).state_dict()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert not onnx.defs.has(SELECTIVE_SCAN_2D, DOMAIN)


# Pruned -------------------------------------------------------------------------------------------------------------

PLANS = {
    "default": QuarterMap(),
    "all": QuarterMap(every=1, exclude_stages=()),
    "blocks": QuarterMap(blocks=(1, 4, 8)),
    "stride_3": QuarterMap(every=2, stride=3),
    "keep_2": QuarterMap(every=2, stride=3, keep=2),
    "bilinear": QuarterMap(every=2, upsample="bilinear"),
    "bicubic": QuarterMap(every=3, upsample="bicubic", exclude_stages=()),
}


def cases() -> list[tuple[str, str]]:
    """Return models with plans: two plans for each model, and each plan for some model."""
    return [
        ("vmamba_s2_channel_first", "default"),
        ("vmamba_s2_channel_first", "stride_3"),
        ("vmamba_s1_channel_last", "all"),
        ("vmamba_s1_channel_last", "bilinear"),
        ("vmamba_v0_gated", "blocks"),
        ("vmamba_v0_gated", "bicubic"),
        ("medmamba", "keep_2"),
        ("medmamba", "default"),
    ]


@pytest.mark.parametrize(("name", "plan"), cases())
def test_a_pruned_model_equals_pytorch_block_by_block(name: str, plan: str) -> None:
    model, images = reference(name).model, images_for(name, 3)
    expected = torch_outputs(prune(model, PLANS[plan]), images)
    outputs = {}
    for form, passes in (("canonical", CANONICAL), ("optimized", OPTIMIZED)):
        graph = pruned(traced(name), model.depths, PLANS[plan], passes)
        outputs[form] = onnx_outputs(graph, images)
        errors = output_errors(outputs[form], expected)
        assert max(errors.values()) <= TOLERANCE, (form, errors)
    # Hoisting and sinking leave the output as it was.
    assert max(output_errors(outputs["optimized"], outputs["canonical"]).values()) <= 1e-6
    # What was compared is not what the model computes without the plan.
    assert error(torch_outputs(model, images)[OUTPUT], expected[OUTPUT]) > 1e-3


@pytest.mark.parametrize(("name", "plan"), cases())
def test_the_canonical_form_prunes_exactly_the_selected_blocks(name: str, plan: str) -> None:
    depths, chosen = reference(name).model.depths, PLANS[plan]
    selected = chosen.select(depths)
    model, (report,) = run_passes(traced(name), Selection(selected, chosen.subsample), CANONICAL)
    assert [line.split(":")[0] for line in report.changed] == [f"block {index}" for index in selected]
    block = 1
    keeping, restoring, scanning = [], [], []
    for node in model.graph.node:
        if node.op_type == SELECTIVE_SCAN_2D:
            scanning.append(block)
        if node.op_type == "Slice" or (node.op_type == "Gather" and "/keep" in node.name):
            keeping.append(block)
        if node.op_type == "Resize" or (node.op_type == "Gather" and "/restore" in node.name):
            restoring.append(block)
        if block_output(block) in node.output:
            block += 1
    assert block == sum(depths) + 1 and scanning == list(range(1, block))
    assert tuple(dict.fromkeys(keeping)) == tuple(dict.fromkeys(restoring)) == selected
    if chosen.stride == 2:
        counts = Counter(node.op_type for node in model.graph.node)
        assert counts["Slice"] == counts["Resize"] == len(selected)


@pytest.mark.parametrize("name", REFERENCES)
def test_the_optimized_form_has_no_slice_and_restores_narrow_maps(name: str) -> None:
    depths = reference(name).model.depths
    plan = QuarterMap(every=1, exclude_stages=())
    model, reports = run_passes(traced(name), Selection(plan.select(depths), plan.subsample))
    assert [len(report.changed) for report in reports] == [sum(depths)] * 3
    before, after = (Counter(node.op_type for node in m.graph.node) for m in (traced(name), model))
    assert after["Slice"] == before["Slice"] and after["Resize"] == sum(depths)
    passed = {line.split("after ")[1] for line in reports[2].changed}
    gated = name in ("vmamba_v0_gated", "medmamba")
    layers = {True: "LayerNormalization", False: "LayerNormalization, MatMul"}
    assert passed == {"LayerNormalization, Conv" if name == "vmamba_s2_channel_first" else layers[gated]}
    again, repeated = run_passes(model, Selection(plan.select(depths), plan.subsample), OPTIMIZED[1:])
    assert not any(report.changed for report in repeated) and main_graph(again) == main_graph(model)


# Open sizes -----------------------------------------------------------------------------------------------------------

SIZES = [(1, 64, 96), (3, 96, 64), (2, 64, 64), (1, 75, 130), (2, 41, 47), (1, 16, 17)]
"""(batch, height, width): as traced, turned, square, and several that are odd somewhere on the way."""


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(
    "plan",
    [
        None,
        QuarterMap(blocks=(2,)),
        QuarterMap(blocks=(1, 2), stride=3),
        QuarterMap(blocks=(1,), stride=3, keep=2),
        QuarterMap(blocks=(1, 2), upsample="bicubic"),
    ],
)
def test_one_file_takes_every_size(name: str, plan: QuarterMap | None) -> None:
    model, graph = shortened(name), traced_with_open_sizes(name)
    if plan is not None:
        model, graph = prune(model, plan), pruned(graph, model.depths, plan)
    else:
        graph = lower(graph)
    onnx.checker.check_model(graph, full_check=True)
    ready = session(graph)
    for batch, height, width in SIZES:
        images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height))
        with torch.inference_mode():
            expected = model(images)
        assert error(run_session(ready, {INPUT: images})[OUTPUT], expected) <= TOLERANCE, (height, width)


def test_open_sizes_stay_open_when_traced_with_a_small_image() -> None:
    model = tiny("medmamba")
    graph = lower(trace(model, (1, 3, 8, 8), dynamic_size=True))
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(images)
    try:
        found = run(graph, {INPUT: images})[OUTPUT]
    except Exception as failure:
        pytest.fail(f"the graph takes no other size: {failure}")
    assert error(found, expected) <= TOLERANCE


def smallest() -> VMamba:
    """Return a model of one block, which is quick to trace."""
    return VMamba(VMambaConfig(depths=(1,), dims=(16,), num_classes=3)).eval()


def test_a_fixed_batch_stays_fixed() -> None:
    model = smallest()
    graph = trace(model, (1, 3, 32, 48), dynamic_batch=False)
    sizes = [size.dim_value for size in graph.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == [1, 3, 32, 48]
    images = torch.randn(1, 3, 32, 48)
    with torch.inference_mode():
        assert error(run(lower(graph), {INPUT: images})[OUTPUT], model(images)) <= TOLERANCE


def test_a_model_that_is_pruned_in_pytorch_is_exported_as_it_is() -> None:
    """The reference's own indices, in the graph: a second way to the same numbers as the passes."""
    model = shortened("vmamba_s2_channel_first")
    plan = QuarterMap(blocks=(1, 2), stride=3, keep=2)
    traced_directly = lower(trace(prune(model, plan), (2, 3, 64, 96)))
    by_passes = pruned(traced_with_open_sizes("vmamba_s2_channel_first"), model.depths, plan)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    assert (
        error(run(traced_directly, {INPUT: images})[OUTPUT], run(by_passes, {INPUT: images})[OUTPUT]) <= 1e-6
    )


# export_onnx ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def traced_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `export_onnx` take the trace that the other tests made."""

    def give(
        model: object, shape: Sequence[int], *, dynamic_batch: bool, dynamic_size: bool
    ) -> onnx.ModelProto:
        assert model is reference("vmamba_v0_gated").model and (dynamic_batch, dynamic_size) == (True, False)
        return traced("vmamba_v0_gated")

    monkeypatch.setattr(architectures, "trace", give)


@pytest.mark.usefixtures("traced_before")
@pytest.mark.parametrize("optimize", [True, False])
def test_export_traces_prunes_and_lowers(optimize: bool) -> None:
    model, plan = reference("vmamba_v0_gated").model, QuarterMap()
    source = architecture_source(model, (1, 3, 64, 64))
    exported = export(source, plan, optimize=optimize)
    expected = pruned(traced("vmamba_v0_gated"), model.depths, plan, OPTIMIZED if optimize else CANONICAL)
    assert main_graph(exported.model) == main_graph(expected)
    assert exported.pruned_blocks == plan.select(model.depths) == (3, 6)
    names = ["insert_quartermap", "hoist_slice", "sink_resize"]
    assert [report.name for report in exported.passes] == (names if optimize else names[:1])


@pytest.mark.usefixtures("traced_before")
def test_export_without_a_plan_only_lowers() -> None:
    exported = export_onnx(reference("vmamba_v0_gated").model, (1, 3, 64, 64))
    assert main_graph(exported) == main_graph(lowered("vmamba_v0_gated"))


def test_export_refuses_what_it_would_do_wrongly() -> None:
    model = reference("medmamba").model
    with pytest.raises(ExportError, match=r"'float8'.*float32, float16"):
        export_onnx(model, (1, 3, 64, 64), precision="float8")
    with pytest.raises(ExportError, match=r"io 'half'.*float32, same"):
        export_onnx(model, (1, 3, 64, 64), precision="float16", io="half")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="pruned in PyTorch already"):
        export_onnx(prune(model, QuarterMap()), (1, 3, 64, 64))
    with pytest.raises(PlanError, match="block 9"):
        export_onnx(model, (1, 3, 64, 64), QuarterMap(blocks=(9,)))


# What exporting refuses ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (0, 3, 64, 64), (1, 3, 4, 64)])
def test_a_shape_that_the_model_cannot_take_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError):
        trace(tiny("medmamba"), shape)


class Broken(nn.Module):
    """A layer that cannot be exported."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Branch on a value."""
        if x.sum() > 0:
            return x
        return -x


def test_a_model_that_cannot_be_exported_is_an_export_error_with_its_cause() -> None:
    model = smallest()
    model.layers[0].downsample = Broken()
    with pytest.raises(ExportError, match=r"VMamba, traced with input \(2, 3, 32, 32\)") as caught:
        trace(model, (1, 3, 32, 32))
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)
    assert not onnx.defs.has(SELECTIVE_SCAN_2D, DOMAIN)


class Doubled(nn.Module):
    """In training other than in use, as dropout and stochastic depth are, but always in the same way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x if self.training else x


def test_a_model_in_training_mode_is_exported_as_it_is_in_eval_mode() -> None:
    """Batch norms would take the statistics of the batch, and stochastic depth would leave blocks out."""
    model = tiny("medmamba")
    model.head = nn.Sequential(model.head, Doubled()).eval()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    generator = torch.Generator().manual_seed(0)
    for norm in norms:
        norm.running_mean.normal_(generator=generator)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2, generator=generator)  # type: ignore[union-attr]
    images = torch.randn(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        expected = model(images)
    model.train()
    graph = lower(trace(model, tuple(images.shape)))
    assert model.training and all(norm.training for norm in norms)
    assert error(run(graph, {INPUT: images.numpy()})[OUTPUT], expected) <= TOLERANCE
    with torch.no_grad():
        assert error(model(images).numpy(), expected) > 1e-2
