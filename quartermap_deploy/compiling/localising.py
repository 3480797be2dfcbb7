"""The blocks at fault where 16 bits are too few: in the portable graph, or in an engine."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quartermap_deploy.compiling.cases import Cases
from quartermap_deploy.progress import Progress
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.targets import load_target

if TYPE_CHECKING:
    from quartermap_deploy.exporting.export import Export
    from quartermap_deploy.sources.source_model import SourceModel
    from quartermap_deploy.validation.localise import LocaliseReport


def localise_precision(
    recipe: Recipe,
    source: SourceModel,
    cases: Cases,
    exported: Export,
    progress: Progress,
) -> LocaliseReport:
    """Find the blocks whose return to float32 brings a 16-bit model back within its tolerance."""
    from quartermap_deploy.validation.localise import localise
    from quartermap_deploy.validation.runners import TorchRunner
    from quartermap_deploy.validation.tolerances import tolerance_for

    return localise(
        exported.float32,
        recipe.precision,
        TorchRunner(source.reference(recipe.quartermap, exported.traced)),
        cases,
        tolerance_for(recipe.precision),
        keep_float32=_kept(recipe, exported),
        blocks_float32=recipe.blocks_float32,
        progress=progress,
    )


def localise_engine(
    recipe: Recipe, exported: Export, name: str, bundle: Path, golden: Sequence[str], progress: Progress
) -> LocaliseReport:
    """Find the blocks whose return to float32 brings a target's engine back within the tolerance.

    For every try an engine is built and run on the golden inputs of a bundle, which takes a GPU, and time.
    """
    from quartermap_deploy.validation.engines import engine_runner
    from quartermap_deploy.validation.golden import golden_runner, read_golden
    from quartermap_deploy.validation.localise import localise
    from quartermap_deploy.validation.tolerances import tolerance_for

    cases, outputs = read_golden(bundle, golden)
    with tempfile.TemporaryDirectory(prefix="quartermap-localise-") as temporary:
        folder = Path(temporary) / "engine"
        folder.mkdir()
        return localise(
            exported.float32,
            recipe.precision,
            golden_runner(outputs),
            cases,
            tolerance_for(recipe.precision),
            keep_float32=_kept(recipe, exported),
            blocks_float32=recipe.blocks_float32,
            # Each engine has caches of its own, which nobody asks for again.
            runner=engine_runner(
                name,
                load_target(name),
                folder,
                dataclasses.replace(recipe.engine, cache=Path(temporary) / "cache"),
            ),
            progress=progress,
        )


def _kept(recipe: Recipe, exported: Export) -> tuple[str, ...]:
    """What stays float32 in every try: what the recipe names, and what the range scan found."""
    ranges = () if exported.ranges is None else exported.ranges.keep_float32
    return (*recipe.keep_float32, *ranges)
