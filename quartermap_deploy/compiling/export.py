"""The export of a recipe, and what the report says about the types of its graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from quartermap_deploy.compiling.cases import validation_cases
from quartermap_deploy.progress import Progress
from quartermap_deploy.recipe import Recipe

if TYPE_CHECKING:
    from quartermap_deploy.exporting.export import Export
    from quartermap_deploy.sources.source_model import SourceModel, Traced

CALIBRATION_IMAGES = 8
"""How many images the range scan of float16 looks at."""


def export_model(
    recipe: Recipe, source: SourceModel, progress: Progress, traced: Traced | None = None
) -> Export:
    """Export the model and run the passes; in float16, images tell which values come near its limit.

    `traced` is that of an earlier export of the same model, or None.
    """
    from quartermap_deploy.exporting.export import export

    calibration: Mapping[str, NDArray[Any]] | None = None
    if recipe.precision == "float16":
        cases = validation_cases(recipe, source, CALIBRATION_IMAGES)
        calibration = cases.get("images") or cases["example"]
    if traced is None:
        with progress.step("exporting to ONNX"):
            traced = source.trace()
    with progress.step("running the passes"):
        return export(
            source,
            recipe.quartermap,
            precision=recipe.precision,
            io=recipe.io,
            keep_float32=recipe.keep_float32,
            blocks_float32=recipe.blocks_float32,
            calibration=calibration,
            optimize=recipe.optimize,
            inline=recipe.inline,
            opset=recipe.opset,
            traced=traced,
        )


def precision_entry(exported: Export) -> dict[str, Any]:
    """What the report says about 16-bit types: what stayed float32, and the ranges that decided it."""
    cast = exported.cast
    if cast is None:
        return {}
    return {
        "precision": {
            "type": cast.precision,
            "operators": cast.operators,
            "casts": cast.casts,
            "kept_float32": cast.kept,
            "subnormal_weights": cast.subnormal,
            "ranges": None if exported.ranges is None else exported.ranges.to_dict(),
        }
    }
