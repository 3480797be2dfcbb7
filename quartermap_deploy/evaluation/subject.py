"""The model that plans are measured on: a classifier of a card, whose blocks are ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quartermap_deploy.errors import RecipeError
from quartermap_deploy.progress import Progress
from quartermap_deploy.recipe import Recipe

if TYPE_CHECKING:
    from quartermap_deploy.sources.architectures import ArchitectureSource


CARDS_ALONE = (
    "compare, ablate and tune change the blocks of models of cards (`quartermap models`) in ways that they know of "
    "those alone; compile it without a plan and with some, and measure the bundles with `quartermap bench` and "
    "`quartermap eval`"
)
"""What is said where a module of the user's is named."""


def require_card(recipe: Recipe) -> None:
    """Check that a recipe is of a classifier of a card, before anything is loaded.

    Raises:
        RecipeError: if it is of a module of the user's, or of a backbone.
    """
    if recipe.module is not None:
        raise RecipeError(f"{recipe.model} is a module of yours ({recipe.module.factory}), and {CARDS_ALONE}")
    if recipe.features_only:
        raise RecipeError(
            f"the recipe asks for the backbone of {recipe.model}, and compare, ablate and tune are for classifiers, "
            "whose logits they judge by: leave features_only out, or compile it without a plan and with some, and time "
            "the bundles with `quartermap bench`"
        )


def load_subject(recipe: Recipe, progress: Progress) -> ArchitectureSource:
    """Load the classifier of a recipe, unpruned.

    Raises:
        RecipeError: if it is none of a card.
        QuartermapError: of the kind that fits, if it cannot be loaded.
    """
    from quartermap_deploy.compiling.source import load_source
    from quartermap_deploy.sources.architectures import ArchitectureSource

    require_card(recipe)
    with progress.step(f"loading {recipe.model}"):
        source = load_source(recipe)
    assert isinstance(source, ArchitectureSource)
    return source
