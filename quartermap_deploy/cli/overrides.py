"""The options by which a command says otherwise than a bundle, a card or a recipe: class names and preprocessing."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from quartermap_deploy.data.labels import label_sets


def add_labels_option(
    group: argparse._ActionsContainer, otherwise: str = "the bundle's, or numbers from 0", default: Any = None
) -> None:
    """Add --labels, to a parser or a group of one.

    Args:
        group: where to.
        otherwise: what the names are without it, in words.
        default: its value without it.
    """
    group.add_argument(
        "--labels",
        metavar="FILE|SET",
        default=default,
        help="names of the classes: a file with one on each line, or a set that comes with this package: "
        f"{', '.join(label_sets())} (default: {otherwise})",
    )


def add_preprocessing_option(
    group: argparse._ActionsContainer, otherwise: str = "as the bundle says", default: Any = ()
) -> None:
    """Add --preprocessing, to a parser or a group of one.

    Args:
        group: where to.
        otherwise: how images are prepared without it, in words.
        default: its value without it.
    """
    group.add_argument(
        "--preprocessing",
        nargs="+",
        action="extend",
        default=default if isinstance(default, str) else list(default),
        metavar="NAME=VALUE",
        help="prepare images otherwise in these respects, such as mean=0.5,0.5,0.5 std=0.25,0.25,0.25 color=bgr "
        f"scale=1/255 resize=256 crop=224x224 fit=cover interpolation=bicubic (default: {otherwise})",
    )


def preprocessing_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the preprocessing that were named.

    Raises:
        InputError: if one is none.
    """
    return read_preprocessing(options.preprocessing)


def read_preprocessing(settings: Iterable[str]) -> dict[str, Any]:
    """Return the values that settings such as "mean=0.5,0.5,0.5" name.

    Raises:
        InputError: if one is none.
    """
    from quartermap_deploy.data.preprocessing import parse_overrides

    return parse_overrides(settings)
