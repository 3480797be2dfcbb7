"""The forms of a model that are compared: unpruned, pruned by QuarterMap in its several forms, and merged by ToMe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from quartermap_deploy.errors import RecipeError
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.pruning.plan import QuarterMap
from quartermap_deploy.recipe import Recipe

if TYPE_CHECKING:
    import onnx

    from quartermap_deploy.architectures.base import VisualStateSpaceModel
    from quartermap_deploy.sources.architectures import ArchitectureSource
    from quartermap_deploy.sources.source_model import Traced

Method = Literal["unpruned", "quartermap", "tome"]
FORMS: dict[str, tuple[str, ...]] = {
    "canonical": (),
    "hoisted": ("hoist_slice",),
    "sunk": ("sink_resize",),
    "hoisted and sunk": ("hoist_slice", "sink_resize"),
}
"""Passes behind `insert_quartermap`, by the form of the pruned graph that they give."""
OPTIMIZED = "hoisted and sunk"
"""The form that `compile` gives."""


@dataclass(frozen=True)
class Variant:
    """One form of a model.

    Attributes:
        name: for people and for results; no two in one comparison have the same.
        method: what is done to it.
        plan: its QuarterMap plan; for ToMe, the plan whose blocks merge, to as many tokens as it would keep; None for
            the unpruned model.
        form: of the pruned graph, a key of `FORMS`; it changes the speed and no number.
    """

    name: str
    method: Method
    plan: QuarterMap | None = None
    form: str = OPTIMIZED

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "name": self.name,
            "method": self.method,
            "plan": None if self.plan is None else self.plan.to_dict(),
            "form": self.form if self.method == "quartermap" else None,
        }

    def blocks(self, depths: Sequence[int]) -> tuple[int, ...]:
        """Return the numbers of the blocks that are changed, of a model with these blocks per stage.

        Raises:
            PlanError: if the plan does not fit, or changes nothing.
        """
        return () if self.plan is None else self.plan.select(depths)


UNPRUNED = Variant("unpruned", "unpruned")


@dataclass(frozen=True)
class Cost:
    """What a variant computes for one image, as `complexity` counts it.

    Attributes:
        tokens: positions that all scans walk, over all directions.
        flops: multiply-accumulates; of pruned blocks in the paper's form, and of ToMe with the similarities that it
            compares.
    """

    tokens: int
    flops: int


class Builder:
    """Makes the variants of one model, in PyTorch and in ONNX. The model is traced once for all but ToMe.

    Args:
        recipe: what the model is of; float32 and of fixed height and width.
        source: the model, unpruned, with an open batch.

    Raises:
        RecipeError: if the recipe asks for another precision or open sizes.
    """

    def __init__(self, recipe: Recipe, source: ArchitectureSource) -> None:
        check_comparable(recipe)
        self.recipe, self.source = recipe, source
        self._traced: Traced | None = None

    @property
    def model(self) -> VisualStateSpaceModel:
        """The model in PyTorch, unpruned."""
        return self.source.module

    def pytorch(self, variant: Variant) -> VisualStateSpaceModel:
        """Return a variant in PyTorch: what its ONNX form is compared with."""
        from quartermap_deploy.evaluation.tome import merge_tokens
        from quartermap_deploy.pruning.reference import prune

        if variant.plan is None:
            return self.model
        change = merge_tokens if variant.method == "tome" else prune
        return change(self.model, variant.plan)

    def graph(self, variant: Variant, progress: Progress = SILENT) -> onnx.ModelProto:
        """Return a variant in ONNX, with the bodies of its scans.

        Raises:
            QuartermapError: of the kind that fits, if it cannot be exported.
        """
        if variant.method == "tome":
            from quartermap_deploy.exporting.merging import export_merging

            with progress.step(f"exporting {variant.name}"):
                shape = (1, self.model.in_channels, *self.source.size)
                return export_merging(self.pytorch(variant), shape)
        if self._traced is None:
            with progress.step(f"exporting {self.source.name}"):
                self._traced = self.source.trace()
        with progress.step(f"making {variant.name}"):
            return self._from_trace(variant, self._traced.model)

    def _from_trace(self, variant: Variant, traced: onnx.ModelProto) -> onnx.ModelProto:
        import onnx

        from quartermap_deploy import passes

        if variant.plan is None:
            result = passes.infer_shapes(traced)
        else:
            selection = passes.Selection(variant.blocks(self.model.depths), variant.plan.subsample)
            chosen = [passes.insert_quartermap, *(getattr(passes, name) for name in FORMS[variant.form])]
            result, _ = passes.run_passes(traced, selection, chosen)
        lowered = passes.lower(result)
        onnx.checker.check_model(lowered, full_check=True)
        return lowered

    def cost(self, variant: Variant) -> Cost:
        """Count what a variant computes."""
        from quartermap_deploy.complexity import measure
        from quartermap_deploy.evaluation.tome import matching_flops

        counted = measure(self.pytorch(variant), self.source.size)
        flops = counted.flops
        if variant.method == "tome":
            channels = {block.index: block.mixer.d_inner for block in self.model.blocks()}
            flops += sum(
                matching_flops(
                    block.map_size[0] * block.map_size[1],
                    block.scanned_size[0] * block.scanned_size[1],
                    channels[block.index],
                )
                for block in counted.blocks
                if block.pruned
            )
        return Cost(counted.tokens, flops)


def check_comparable(recipe: Recipe) -> None:
    """Refuse a recipe whose variants would not be compared in the form that it asks for.

    Raises:
        RecipeError: if it asks for another precision than float32, for open sizes, or for a file for other tools.
    """
    asked = {
        f"precision {recipe.precision}": recipe.precision != "float32",
        "open height and width": recipe.dynamic_size,
        "scans that are written out": recipe.inline,
        f"opset {recipe.opset}": recipe.opset is not None,
    }
    if found := [what for what, is_asked in asked.items() if is_asked]:
        raise RecipeError(
            f"the recipe asks for {found[0]}; variants are compared in float32, at one size and in the usual form of "
            "their scans, so leave that out"
        )
