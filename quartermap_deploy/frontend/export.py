"""`export_onnx`: one model, pruned or not, as one portable ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quartermap_deploy.errors import ExportError
from quartermap_deploy.pruning.plan import QuarterMap

if TYPE_CHECKING:
    import onnx

    from quartermap_deploy.architectures.base import VisualStateSpaceModel
    from quartermap_deploy.passes.base import PassReport

PRECISIONS = ("float32",)


@dataclass(frozen=True)
class Export:
    """An exported model and how it came about.

    Attributes:
        model: the portable model: opset 20, scans as `quartermap.SelectiveScan2D` with their body.
        traced: the same model before any pass, without bodies.
        pruned_blocks: numbers of the pruned blocks.
        passes: what each pass did.
    """

    model: onnx.ModelProto
    traced: onnx.ModelProto
    pruned_blocks: tuple[int, ...]
    passes: tuple[PassReport, ...]


def export_onnx(
    model: VisualStateSpaceModel,
    input_shape: Sequence[int],
    quartermap: QuarterMap | None = None,
    *,
    precision: str = "float32",
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    optimize: bool = True,
) -> onnx.ModelProto:
    """Export a model to ONNX: opset 20, valid for `onnx.checker`, runs in plain ONNX Runtime.

    Args:
        model: a model of `create_model`, not pruned by `prune`: the plan is carried out in the graph.
        input_shape: (batch, channels, height, width) to trace with.
        quartermap: the plan, or None to prune nothing.
        precision: element type of weights and activations: "float32".
        dynamic_batch: leave the batch size open.
        dynamic_size: leave height and width open.
        optimize: subsample before the convolution and restore after the projection where that changes no number;
            False keeps the paper's canonical form, a Slice before and a Resize after the scan.

    Returns:
        The model, with input `images` (batch, channels, height, width) and output `logits` (batch, num_classes).

    Raises:
        InputError: if the model cannot take the size.
        PlanError: if the plan does not fit the model.
        ExportError: if the model cannot be exported.
        PassError: if a pass does not find what the plan names.
    """
    return export(
        model,
        input_shape,
        quartermap,
        precision=precision,
        dynamic_batch=dynamic_batch,
        dynamic_size=dynamic_size,
        optimize=optimize,
    ).model


def export(
    model: VisualStateSpaceModel,
    input_shape: Sequence[int],
    quartermap: QuarterMap | None = None,
    *,
    precision: str = "float32",
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    optimize: bool = True,
) -> Export:
    """`export_onnx` that also returns the traced model and what the passes did."""
    import onnx

    from quartermap_deploy.frontend.exporter import trace
    from quartermap_deploy.passes import CANONICAL, OPTIMIZED, Selection, infer_shapes, lower, run_passes

    if precision not in PRECISIONS:
        raise ExportError(
            f"precision {precision!r} is not available; expected one of {', '.join(PRECISIONS)}"
        )
    if not hasattr(model, "blocks") or not hasattr(model, "depths"):
        raise ExportError(f"cannot export a {type(model).__name__}; expected a model from create_model")
    if any(block.mixer.subsample is not None for block in model.blocks()):
        raise ExportError(
            "the model is pruned in PyTorch already; export the unpruned model and give the plan here"
        )
    pruned = () if quartermap is None else quartermap.select(model.depths)
    traced = trace(model, input_shape, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size)
    reports: list[PassReport] = []
    if quartermap is None:
        shaped = infer_shapes(traced)
    else:
        selection = Selection(pruned, quartermap.subsample)
        shaped, reports = run_passes(traced, selection, OPTIMIZED if optimize else CANONICAL)
    lowered = lower(shaped)
    onnx.checker.check_model(lowered, full_check=True)
    return Export(lowered, traced, pruned, tuple(reports))
