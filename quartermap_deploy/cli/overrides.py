"""The options by which a command says otherwise than a bundle, a card or a recipe: class names and preprocessing."""

from __future__ import annotations

import argparse
from typing import Any


def add_labels_option(group: argparse._ActionsContainer) -> None:
    """Add --labels, to a parser or a group of one."""
    group.add_argument(
        "--labels",
        metavar="FILE|SET",
        help="names of the classes: a file with one a line, or a set that comes with the package, such as imagenet "
        "(default: those of the bundle, the recipe or the model's card)",
    )


def add_preprocessing_option(group: argparse._ActionsContainer) -> None:
    """Add --preprocessing, to a parser or a group of one."""
    group.add_argument(
        "--preprocessing",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="prepare images otherwise in these respects, such as mean=0.5,0.5,0.5 std=0.25,0.25,0.25 color=bgr "
        "scale=1/255 resize=256 crop=224x224 fit=cover interpolation=bicubic (default: as the bundle, the recipe or "
        "the model's card says)",
    )


def preprocessing_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the preprocessing that were named.

    Raises:
        InputError: if one is none.
    """
    from quartermap_deploy.data.preprocessing import parse_overrides

    return parse_overrides(options.preprocessing)
