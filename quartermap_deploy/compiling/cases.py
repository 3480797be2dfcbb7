"""The inputs that a model is proved on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.recipe import Recipe

if TYPE_CHECKING:
    from quartermap_deploy.sources.description import Feeds
    from quartermap_deploy.sources.source_model import SourceModel

Cases = Mapping[str, "Feeds"]
"""Inputs by the name of their case."""


def validation_cases(recipe: Recipe, source: SourceModel, count: int | None = None) -> dict[str, Feeds]:
    """The inputs that parity is checked on, by name; `count` images instead of the usual number."""
    from quartermap_deploy.validation.inputs import COUNT, real_images

    digits = source.name == "vmamba_digits"

    def pictures(preprocessing: Preprocessing) -> NDArray[np.float32]:
        return real_images(preprocessing, recipe.path("images"), count or COUNT, digits=digits)

    return source.cases(pictures)
