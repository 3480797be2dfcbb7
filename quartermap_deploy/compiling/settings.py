"""Settings of a recipe that do not fit its model, refused before the export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quartermap_deploy.compiling.cases import Cases
from quartermap_deploy.compiling.targets import ENGINES
from quartermap_deploy.errors import RecipeError
from quartermap_deploy.recipe import Recipe

if TYPE_CHECKING:
    from quartermap_deploy.sources.source_model import SourceModel


def check_settings(recipe: Recipe, source: SourceModel, cases: Cases) -> None:
    """Refuse, before the export, settings that would be refused after it.

    Raises:
        PlanError: if the plan does not fit the model.
        RecipeError: if a block that is to stay float32 does not exist.
        InputError: if the profiles of engines do not fit the model, or exclude what it is validated on.
    """
    source.selected(recipe.quartermap)
    blocks = len(source.blocks)
    if absent := [block for block in recipe.blocks_float32 if block > blocks]:
        raise RecipeError(f"blocks_float32 names block {absent[0]}, but {recipe.model} has {blocks} blocks")
    if ENGINES.isdisjoint(recipe.targets):
        return
    from quartermap_deploy.targets.tensorrt.builder import check_examples

    check_examples(
        recipe.engine,
        {item.name: item.shape for item in source.inputs},
        [{name: array.shape for name, array in feeds.items()} for feeds in cases.values()],
    )
