"""The targets of a recipe: loaded, and checked to be able to do what it wants."""

from __future__ import annotations

from quartermap_deploy.errors import RecipeError
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.targets import DEFAULT, Target, load_target
from quartermap_deploy.targets.tensorrt.options import EngineOptions

ENGINES = frozenset({"tensorrt", "tensorrt-rtx"})
"""The targets that build an engine."""


def load_targets(recipe: Recipe) -> dict[str, Target]:
    """The recipe's targets by name, each checked to be able to do what the recipe wants.

    Raises:
        UnknownNameError: if there is no such target.
        RecipeError: if a target does not take the recipe's precision, or the type of its input and output.
        QuartermapError: of the target, if it lacks something on this machine.
    """
    targets = {name: load_target(name) for name in recipe.targets}
    if not recipe.execution.on_cpu and DEFAULT not in targets:
        raise RecipeError(
            f"there are providers of ONNX Runtime ({recipe.execution}), but {DEFAULT} is no target; add it to the "
            "targets"
        )
    for name, target in targets.items():
        check_target(recipe, name, target)
    if recipe.engine != EngineOptions() and ENGINES.isdisjoint(targets):
        raise RecipeError(
            "there are options of engines, but no target that has one; add one to the targets: "
            f"{' or '.join(sorted(ENGINES))}"
        )
    return targets


def check_target(recipe: Recipe, name: str, target: Target) -> None:
    """Check that a target can do what a recipe wants; `load_targets` says what is raised."""
    if recipe.precision not in target.PRECISIONS:
        raise RecipeError(
            f"the target {name} does not take {recipe.precision}; expected {' or '.join(target.PRECISIONS)}, or "
            "another target"
        )
    target.check(recipe)
    if name in ENGINES and recipe.io == "same":
        raise RecipeError(f'the target {name} takes io = "float32" only; leave io out')
    if name in ENGINES and (recipe.inline or recipe.opset is not None):
        setting = "inline" if recipe.inline else "opset"
        raise RecipeError(
            f"the target {name} writes its own form of the scans, in an opset of its own; leave {setting} out, or "
            "compile a bundle for the engine and another one for other tools"
        )
