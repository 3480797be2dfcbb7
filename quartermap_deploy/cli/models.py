"""`quartermap models`: what can be compiled."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

from quartermap_deploy.architectures.cards import ModelCard, list_models, load_card
from quartermap_deploy.cli.options import add_output_options
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.results import print_json, show
from quartermap_deploy.errors import UnknownNameError
from quartermap_deploy.tables.layout import facts, table
from quartermap_deploy.tables.words import count_text, names_text, size_text

if TYPE_CHECKING:
    from quartermap_deploy.cli.parsing import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "models",
        run,
        summary="list the models, or show the card of one",
        description="""
            List the models that can be compiled, or those whose names fit a pattern; with a name, show everything that
            is known about one.

            The weights of a model marked * come with this package. The public checkpoint of every other one is
            described on the page that its card names; give the file to `quartermap compile --checkpoint`.
            """,
        examples="""
            quartermap models
            quartermap models 'vmamba_tiny*'
            quartermap models vmamba_tiny_s1l8
            quartermap models --json
            """,
    )
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="model to show, or a pattern of names to list, with *, ? and [] (default: list all of them)",
    )
    add_output_options(parser, quiet=False)


def run(options: argparse.Namespace) -> None:
    """Print the list or the card."""
    pattern = options.name if options.name is not None and set("*?[") & set(options.name) else None
    if options.name is not None and pattern is None:
        card = load_card(options.name)
        if options.json:
            print_json({**as_dict(card), "labels": list(card.labels)})
        else:
            show(*describe(card))
        return
    cards = [load_card(name) for name in list_models(pattern)]
    if not cards:
        raise UnknownNameError(f"no model fits {pattern}; the models are {', '.join(list_models())}")
    if options.json:
        print_json([as_dict(card) for card in cards])
        return
    headings = ["name", "family", "depths", ">params", ">GFLOPs", "input", ">top-1 %"]
    show(
        table(None, headings, [row(card) for card in cards]),
        "",
        "params as built here; GFLOPs (multiply-accumulates) and top-1 as the authors published them,",
        "which `quartermap models NAME` lists. * trained weights come with this package.",
    )


def row(card: ModelCard) -> list[object]:
    """Return the line of a card in the list."""
    return [
        f"{card.name} *" if card.weights else card.name,
        card.family,
        ",".join(map(str, card.architecture["depths"])),
        count_text(card.sizes.parameters),
        card.sizes.published_gflops,
        size_text(card.input_shape[1:]),
        published_top1(card),
    ]


def published_top1(card: ModelCard) -> str | None:
    """Return the published accuracy, or how many there are where it was published of several data sets."""
    if not card.accuracy:
        return None
    if len({entry.dataset for entry in card.accuracy}) == 1:
        return f"{card.accuracy[0].top1:.1f}"
    return f"of {len(card.accuracy)} sets"


def as_dict(card: ModelCard) -> dict[str, Any]:
    """Return a card as plain values, with what follows from it."""
    return {
        **dataclasses.asdict(card),
        "num_classes": card.num_classes,
        "input_shape": list(card.input_shape),
        "blocks": sum(card.architecture["depths"]),
        "weights_included": card.weights is not None,
    }


def describe(card: ModelCard) -> list[Any]:
    """Return the tables of one card."""
    depths = card.architecture["depths"]
    ends = list(itertools.accumulate(depths))
    stages = (
        f"stage {stage}: {end - depth + 1}–{end}"
        for stage, (depth, end) in enumerate(zip(depths, ends, strict=True), start=1)
    )
    prepared = card.preprocessing
    parts: list[Any] = [
        facts(
            f"{card.name}: {card.title}",
            {
                "family": card.family,
                "blocks": f"{ends[-1]} ({', '.join(stages)})",
                "parameters": f"{card.sizes.parameters:,} with {card.num_classes} classes",
                "parameters published": _with_unit(card.sizes.published_parameters_millions, "M"),
                "GFLOPs published": card.sizes.published_gflops,
                "classes": _classes(card),
                "weights": "included" if card.weights else "not included; give --checkpoint",
            },
        ),
        "",
        facts("architecture", {key: _value(value) for key, value in card.architecture.items()}),
        "",
        facts(
            "input",
            {
                "shape": size_text(("N", *card.input_shape)),
                "resize": f"{size_text(prepared.resize)}, {prepared.fit}, {prepared.interpolation}",
                "crop": size_text(prepared.crop),
                "color": prepared.color,
                "scale": f"{prepared.scale:.6g}",
                "mean": _value(prepared.mean),
                "std": _value(prepared.std),
            },
        ),
        "",
        facts(
            "source",
            {
                "paper": card.source.paper,
                "code": card.source.repository,
                "licence": card.source.licence,
                "checkpoint": card.source.checkpoint_file,
                "described at": card.source.checkpoint_page,
            },
        ),
    ]
    if card.accuracy:
        rows = [(entry.dataset, f"{entry.top1:.2f} %", entry.source) for entry in card.accuracy]
        parts += ["", table("top-1 accuracy, published", ["data set", ">top-1", "who says so"], rows)]
    return parts


def _classes(card: ModelCard) -> str:
    """How many classes there are, and the names of the first."""
    if not card.labels:
        return f"{card.num_classes:,}, named by numbers"
    return f"{card.num_classes:,}: {names_text(card.labels)}"


def _with_unit(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{value:g} {unit}"


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
