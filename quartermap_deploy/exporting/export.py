"""`export_onnx`: one model, pruned or not, as one portable ONNX file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quartermap_deploy.errors import ExportError
from quartermap_deploy.pruning.plan import QuarterMap

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    from quartermap_deploy.architectures.base import VisualStateSpaceModel
    from quartermap_deploy.exporting.ranges import RangeReport
    from quartermap_deploy.passes.base import PassReport
    from quartermap_deploy.passes.cast_precision import CastReport

PRECISIONS = ("float32", "float16", "bfloat16")
IO_TYPES = ("float32", "same")


@dataclass(frozen=True)
class Export:
    """An exported model and how it came about.

    Attributes:
        model: the portable model: opset 20 (22 in bfloat16), scans as `quartermap.SelectiveScan2D` with their body.
        traced: the same model before any pass, without bodies.
        float32: the model after the passes that prune, in float32 and without bodies: what other precisions and other
            bodies are made from.
        pruned_blocks: numbers of the pruned blocks.
        passes: what each pass did.
        ranges: the range of every value on the calibration images, for float16.
    """

    model: onnx.ModelProto
    traced: onnx.ModelProto
    float32: onnx.ModelProto
    pruned_blocks: tuple[int, ...]
    passes: tuple[PassReport, ...]
    ranges: RangeReport | None = None

    @property
    def cast(self) -> CastReport | None:
        """What `cast_precision` did, or None in float32."""
        from quartermap_deploy.passes.cast_precision import CastReport

        return next((report for report in self.passes if isinstance(report, CastReport)), None)


def export_onnx(
    model: VisualStateSpaceModel,
    input_shape: Sequence[int],
    quartermap: QuarterMap | None = None,
    *,
    precision: str = "float32",
    io: Literal["float32", "same"] = "float32",
    keep_float32: Iterable[str] = (),
    blocks_float32: Iterable[int] = (),
    calibration: NDArray[np.float32] | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    optimize: bool = True,
) -> onnx.ModelProto:
    """Export a model to ONNX: opset 20, valid for `onnx.checker`, runs in plain ONNX Runtime.

    Args:
        model: a model of `create_model`, not pruned by `prune`: the plan is carried out in the graph.
        input_shape: (batch, channels, height, width) to trace with.
        quartermap: the plan, or None to prune nothing.
        precision: element type of weights and activations: "float32", "float16" or "bfloat16".
        io: type of input and output in 16 bits: "float32", or "same" for that of `precision`.
        keep_float32: operators to compute and values to hold in float32 though `precision` has 16 bits, by name.
        blocks_float32: blocks, from 1, to compute in float32 though `precision` has 16 bits.
        calibration: images (N, channels, height, width) for the range scan in float16: values that come within a
            factor of 8 of its limit stay float32. None does without the scan.
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
        io=io,
        keep_float32=keep_float32,
        blocks_float32=blocks_float32,
        calibration=calibration,
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
    io: Literal["float32", "same"] = "float32",
    keep_float32: Iterable[str] = (),
    blocks_float32: Iterable[int] = (),
    calibration: NDArray[np.float32] | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    optimize: bool = True,
    traced: onnx.ModelProto | None = None,
) -> Export:
    """`export_onnx` that also returns the traced model and what the passes did.

    Tracing takes most of the time. Who exports a model with several plans gives the `traced` of the first export to the
    others; it has to be of the same model, input shape and open axes.
    """
    import onnx

    from quartermap_deploy.frontend.exporter import trace
    from quartermap_deploy.passes import CANONICAL, OPTIMIZED, Selection, infer_shapes, lower, run_passes

    if precision not in PRECISIONS:
        raise ExportError(
            f"precision {precision!r} is not available; expected one of {', '.join(PRECISIONS)}"
        )
    if io not in IO_TYPES:
        raise ExportError(f"io {io!r} is not available; expected one of {', '.join(IO_TYPES)}")
    if not hasattr(model, "blocks") or not hasattr(model, "depths"):
        raise ExportError(f"cannot export a {type(model).__name__}; expected a model from create_model")
    if any(block.mixer.subsample is not None for block in model.blocks()):
        raise ExportError(
            "the model is pruned in PyTorch already; export the unpruned model and give the plan here"
        )
    pruned = () if quartermap is None else quartermap.select(model.depths)
    if traced is None:
        traced = trace(model, input_shape, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size)
    reports: list[PassReport] = []
    if quartermap is None:
        shaped = infer_shapes(traced)
    else:
        selection = Selection(pruned, quartermap.subsample)
        shaped, reports = run_passes(traced, selection, OPTIMIZED if optimize else CANONICAL)
    typed, kept, ranges = shaped, tuple(keep_float32), None
    if precision == "float16" and calibration is not None:
        from quartermap_deploy.exporting.ranges import scan_ranges

        ranges = scan_ranges(lower(shaped), calibration, precision)
        kept += ranges.keep_float32
    if precision != "float32":
        from quartermap_deploy.passes.cast_precision import cast_precision

        typed, report = cast_precision(
            shaped, precision, keep_float32=kept, io=io, blocks_float32=blocks_float32
        )
        reports.append(report)
    lowered = lower(typed)
    onnx.checker.check_model(lowered, full_check=True)
    return Export(lowered, traced, shaped, pruned, tuple(reports), ranges)
