"""The proof of an engine that was just built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.compiling.localising import localise_engine
from quartermap_deploy.progress import Progress
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.targets import Target

if TYPE_CHECKING:
    from quartermap_deploy.exporting.export import Export


def prove(
    recipe: Recipe,
    exported: Export,
    name: str,
    target: Target,
    folder: Path,
    entry: Mapping[str, Any],
    golden: Sequence[str],
    progress: Progress,
) -> dict[str, Any]:
    """Run an engine that was just built, where that is possible; returns what the manifest says about it.

    Raises:
        ParityError: if it departs by more than the tolerance; in 16 bits with the block that has to stay in float32.
    """
    from quartermap_deploy.validation.engines import prove_engine

    def advice() -> str:
        if recipe.precision == "float32":
            return "please report this with the recipe."
        found = localise_engine(recipe, exported, name, folder, golden, progress)
        return f"{found.describe()}. {found.advice()}."

    plugin = recipe.engine.plugin
    return prove_engine(
        name, target, folder, entry, recipe.precision, golden, advice=advice, plugin=plugin, progress=progress
    )
