"""What `tune` writes about a search: the recipe with a word on where it comes from, and all that was tried."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.evaluation.choice import Chooser
from quartermap_deploy.evaluation.fidelity import Fidelity
from quartermap_deploy.evaluation.search import Candidate, Goal, count_sets
from quartermap_deploy.recipe import Recipe

if TYPE_CHECKING:
    from quartermap_deploy.architectures.base import VisualStateSpaceModel
    from quartermap_deploy.evaluation.tune_options import TuneOptions


def report(
    recipe: Recipe,
    model: VisualStateSpaceModel,
    goal: Goal,
    options: TuneOptions,
    chosen: Candidate | None,
    chooser: Chooser,
    tried: Mapping[Candidate, Fidelity],
    fixed: Mapping[int, Candidate],
) -> dict[str, Any]:
    """Return plain values for JSON about a search that came to its end.

    Args:
        recipe: what was to be pruned.
        model: its model.
        goal: what was wanted.
        options: how it was searched for.
        chosen: the plan, or None if the goal cannot be met.
        chooser: what was chosen from.
        tried: everything that was ever run, also for other goals.
        fixed: the plans "every k-th block", by k.
    """
    savings = chooser.judge.savings
    stages = {block.index: block.stage for block in model.blocks()}
    known = {c: found for c, found in tried.items() if c.stride in options.strides}
    blocks = [block for block, stage in stages.items() if stage not in options.exclude_stages]

    def entry(candidate: Candidate) -> dict[str, Any]:
        return _entry(candidate, chooser, tried)

    return {
        "complete": True,
        "model": recipe.model,
        "goal": {"budget": goal.budget, "speedup": goal.speedup},
        "judged_by": "agreement" if chooser.judge.accuracy is None else "accuracy",
        "measure": savings.measure,
        "measure_note": savings.note,
        "exhaustive": count_sets(blocks, options.strides) <= options.evaluations,
        "sensitivity": [
            {
                "block": block,
                "stage": stages[block],
                "stride": stride,
                "saving": savings.shares[block, stride],
                "saving_error": savings.errors.get((block, stride)),
                **_found(tried[Candidate((block,), stride)], chooser),
            }
            for stride in options.strides
            for block in blocks
        ],
        "front": [entry(candidate) for candidate in chooser.judge.front(known)],
        "fixed": [
            {"every": every, "fixed": entry(candidate), "tuned": entry(chooser.beside(candidate))}
            for every, candidate in fixed.items()
            if candidate in tried
        ],
        "chosen": None if chosen is None else entry(chosen),
    }


def _entry(candidate: Candidate, chooser: Chooser, tried: Mapping[Candidate, Fidelity]) -> dict[str, Any]:
    verified = chooser.verified.get(candidate)
    return {
        "blocks": list(candidate.blocks),
        "stride": candidate.stride,
        "speed": chooser.judge.speed(candidate),
        "calibration": _found(tried[candidate], chooser),
        "verification": None
        if verified is None
        else {**verified.to_dict(), "drop": chooser.verifier.drop(verified)},
        "measured": chooser.measured.get(candidate),
    }


def _found(found: Fidelity, chooser: Chooser) -> dict[str, Any]:
    return {**found.to_dict(), "drop": chooser.judge.drop(found)}


def speed_text(chosen: Mapping[str, Any], measure: str) -> str:
    """How fast the plan is: as it was timed, or else by the sum of what its blocks save."""
    times, summed = (
        chosen["measured"],
        f"{chosen['speed']:.3f} times as fast as the unpruned model by {measure}",
    )
    if times is None:
        return f"{summed}."
    low, high = times["quartiles"]
    return (
        f"timed by itself {times['speed']:.3f} times as fast as the unpruned model, in half of the rounds {low:.3f} to "
        f"{high:.3f} times ({chosen['speed']:.3f} by the sum of what its blocks save)."
    )


def recipe_text(recipe: Recipe, out: Path, values: Mapping[str, Any]) -> str:
    """Return the text of the recipe file, with the numbers that speak for its plan in comments."""
    chosen = values["chosen"]
    found, images = chosen["verification"], values["verification"]
    accuracy = (
        ""
        if found["accuracy"] is None
        else f", accuracy {found['accuracy']:.2%} (unpruned {images['unpruned_accuracy']:.2%})"
    )
    lines = [
        f"Found by `quartermap tune` on {values['calibration']['images']} images of {values['calibration']['name']}:",
        speed_text(chosen, values["measure"]),
        f"On {images['images']} other images of {images['name']}: agreement with the unpruned model "
        f"{found['agreement']:.2%}{accuracy}.",
        f"All that was tried is in {out.with_suffix('.json').name}.",
    ]
    # A name of a folder may hold anything, but a comment ends with its line.
    comments = "".join(f"# {' '.join(line.split())}\n" for line in lines)
    return f"{comments}\n{recipe.to_toml(out.parent)}"
