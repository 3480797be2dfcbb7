"""`export_onnx`: one model, pruned or not, as one portable ONNX file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from quartermap_deploy.errors import ExportError
from quartermap_deploy.exporting import inlining
from quartermap_deploy.pruning.plan import QuarterMap

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    from quartermap_deploy.architectures.base import VisualStateSpaceModel
    from quartermap_deploy.exporting.ranges import RangeReport
    from quartermap_deploy.passes.base import PassReport
    from quartermap_deploy.passes.cast_precision import CastReport
    from quartermap_deploy.sources.source_model import SourceModel, Traced

PRECISIONS = ("float32", "float16", "bfloat16")
IO_TYPES = ("float32", "same")


@dataclass(frozen=True)
class Export:
    """An exported model and how it came about.

    Attributes:
        model: the portable model: opset 20 (22 in bfloat16) or the one asked for, scans as `quartermap.SelectiveScan2D`
            with their body, or written out.
        traced: the same model before any pass, without bodies.
        float32: the model after the passes that prune, in float32 and without bodies: what other precisions and other
            bodies are made from.
        pruned_blocks: numbers of the pruned blocks.
        passes: what each pass did.
        ranges: the range of every value on the calibration images, for float16.
    """

    model: onnx.ModelProto
    traced: Traced
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
    inline: bool = False,
    opset: int | None = None,
) -> onnx.ModelProto:
    """Export a model to ONNX, valid for `onnx.checker`, runs in plain ONNX Runtime.

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
        inline: write the scans out in standard operators, without functions; see `inline`.
        opset: of the standard operators, 17 to 23; None takes 20, or 22 in bfloat16.

    Returns:
        The model, with input `images` (batch, channels, height, width) and outputs as the model's `output_names` says:
        `logits` (batch, num_classes), or the maps of a backbone.

    Raises:
        InputError: if the model cannot take the size.
        PlanError: if the plan does not fit the model.
        ExportError: if the model cannot be exported.
        PassError: if a pass does not find what the plan names, or an operator cannot be written in the opset.
    """
    from quartermap_deploy.sources.architectures import architecture_source

    source = architecture_source(model, input_shape, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size)
    return export(
        source,
        quartermap,
        precision=precision,
        io=io,
        keep_float32=keep_float32,
        blocks_float32=blocks_float32,
        calibration=None if calibration is None else {source.inputs[0].name: calibration},
        optimize=optimize,
        inline=inline,
        opset=opset,
    ).model


def export(
    source: SourceModel,
    quartermap: QuarterMap | None = None,
    *,
    precision: str = "float32",
    io: Literal["float32", "same"] = "float32",
    keep_float32: Iterable[str] = (),
    blocks_float32: Iterable[int] = (),
    calibration: Mapping[str, NDArray[Any]] | None = None,
    optimize: bool = True,
    inline: bool = False,
    opset: int | None = None,
    traced: Traced | None = None,
) -> Export:
    """Export any source model; the arguments that `export_onnx` has too mean the same.

    Tracing takes most of the time. Who exports a model with several plans gives the `traced` of the first export to the
    others; it has to be of the same source model.

    Args:
        source: the model, unpruned.
        quartermap: the plan, or None to prune nothing.
        precision: element type of weights and activations.
        io: type of inputs and outputs in 16 bits.
        keep_float32: what stays float32, by name.
        blocks_float32: blocks that stay float32.
        calibration: for the range scan in float16, a batch for each input, by name.
        optimize: whether passes that change no number run.
        inline: whether the scans are written out.
        opset: of the standard operators.
        traced: what `source.trace()` returned.
    """
    import onnx

    from quartermap_deploy.passes import (
        CANONICAL,
        OPTIMIZED,
        Selection,
        at_opset,
        infer_shapes,
        lower,
        run_passes,
        write_gelu,
    )

    if precision not in PRECISIONS:
        raise ExportError(
            f"precision {precision!r} is not available; expected one of {', '.join(PRECISIONS)}"
        )
    if io not in IO_TYPES:
        raise ExportError(f"io {io!r} is not available; expected one of {', '.join(IO_TYPES)}")
    pruned = source.selected(quartermap)
    traced = source.trace() if traced is None else traced
    reports: list[PassReport] = []
    if quartermap is None:
        shaped = infer_shapes(traced.model)
    else:
        paths = {block.index: block.path for block in source.blocks}
        selection = Selection(pruned, quartermap.subsample, traced.orders, paths)
        shaped, reports = run_passes(traced.model, selection, OPTIMIZED if optimize else CANONICAL)
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
        typed = write_gelu(typed)
    lowered = lower(typed)
    if inline:
        lowered = inlining.inline(lowered)
    if opset is not None:
        lowered = at_opset(lowered, opset)
    onnx.checker.check_model(lowered, full_check=True)
    return Export(lowered, traced, shaped, pruned, (*traced.reports, *reports), ranges)
