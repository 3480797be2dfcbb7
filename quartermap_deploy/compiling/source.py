"""The model of a recipe, and what its user saved of it elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quartermap_deploy.recipe import Recipe

if TYPE_CHECKING:
    from quartermap_deploy.sources.source_model import SourceModel
    from quartermap_deploy.validation.given import GivenReference


def load_source(recipe: Recipe) -> SourceModel:
    """The model of a recipe, unpruned: from its card, or made by the user's factory.

    Raises:
        UnknownNameError: if there is no such card.
        QuartermapError: of the kind that fits, if it cannot be made, or its weights or preprocessing do not fit.
    """
    if recipe.module is not None:
        from quartermap_deploy.sources.user_modules import user_module_source

        source: SourceModel = user_module_source(
            recipe.module,
            name=recipe.model,
            weights=recipe.path("checkpoint"),
            task=recipe.task,
            preprocessing=recipe.preprocessing,
            labels=recipe.labels,
            dynamic_batch=recipe.dynamic_batch,
            dynamic_size=recipe.dynamic_size,
            seed=recipe.seed,
        )
    else:
        from quartermap_deploy.sources.architectures import card_source

        source = card_source(
            recipe.model,
            num_classes=recipe.num_classes,
            in_chans=recipe.in_chans,
            features_only=recipe.features_only,
            checkpoint=recipe.path("checkpoint"),
            input_size=recipe.input_size,
            dynamic_batch=recipe.dynamic_batch,
            dynamic_size=recipe.dynamic_size,
            preprocessing=recipe.preprocessing,
            labels=recipe.labels,
            seed=recipe.seed,
        )
    source.selected(recipe.quartermap)
    return source


def load_reference(recipe: Recipe, source: SourceModel) -> GivenReference | None:
    """What the user saved of a module where it runs in its own environment, or None.

    Raises:
        InputError: if the file cannot be read, or does not fit the module.
    """
    if (path := recipe.path("reference")) is None:
        return None
    from quartermap_deploy.sources.modules import ModuleSource
    from quartermap_deploy.validation.given import read_reference

    assert isinstance(source, ModuleSource)
    return read_reference(source, path)
