"""Options of commands that take a module of the user's."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Mapping
from typing import Any

from quartermap_deploy.cli.values import numbers
from quartermap_deploy.errors import QuartermapError, RecipeError
from quartermap_deploy.sources.description import TASKS
from quartermap_deploy.sources.factories import EXAMPLE_TYPES, FLOAT32, UserModule, check_type, parse_example

_FLAGS = {
    "module_example": "--example",
    "module_arguments": "--arg",
    "module_strict_weights": "--strict-weights",
    "module_stages": "--stages",
    "module_scans": "--scan-function",
    "task": "--task",
    "reference": "--reference",
}


def add_module_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a module of the user's is made and called."""
    group = parser.add_argument_group("a module of your own (docs/your-own-model.md)")
    group.add_argument(
        "--example",
        dest="module_example",
        type=_told(parse_input),
        action="append",
        metavar="[NAME=]1x3x224x224[:TYPE]",
        default=argparse.SUPPRESS,
        help=f"shape of an input, and its type, one of {', '.join(EXAMPLE_TYPES)}, if it is not the first, such as "
        "ids=1x5:int64 (whole numbers are 0 or 1); give it again, with the names of forward's parameters, "
        "for several (default: none; a module needs one)",
    )
    group.add_argument(
        "--arg",
        dest="module_arguments",
        type=_told(parse_argument),
        action="append",
        metavar="NAME=VALUE",
        default=argparse.SUPPRESS,
        help="keyword argument of the factory, a Python literal such as depths=[2,2,9,2], or else a text "
        "(default: none)",
    )
    group.add_argument(
        "--strict-weights",
        dest="module_strict_weights",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="refuse weights whose keys are not exactly the module's; common prefixes and wrappers are taken off first "
        "(default: refuse)",
    )
    group.add_argument(
        "--stages",
        dest="module_stages",
        type=numbers,
        metavar="2,2,9,2",
        default=argparse.SUPPRESS,
        help="how many blocks each stage has (default: told apart by the length of their scans)",
    )
    group.add_argument(
        "--scan-function",
        dest="module_scans",
        type=_told(parse_scan),
        action="append",
        metavar="MODULE:FUNCTION=MODULE:ADAPTER",
        default=argparse.SUPPRESS,
        help="a scan that is not known here, and what calls quartermap_deploy.selective_scan in its place (default: "
        "none)",
    )
    group.add_argument(
        "--task",
        choices=TASKS,
        default=argparse.SUPPRESS,
        help="what the outputs are (default: told from their shapes)",
    )
    group.add_argument(
        "--name", metavar="NAME", help="what the model is called (default: the factory's name)"
    )


def module_options_of(given: Mapping[str, Any]) -> list[str]:
    """The options of modules that were given, as a user writes them."""
    return [flag for name, flag in _FLAGS.items() if name in given and name != "reference"]


def user_module(factory: str, given: Mapping[str, Any]) -> UserModule:
    """What the options say about a module.

    Raises:
        RecipeError: if there is no example input, two of one name, or a value is wrong.
    """
    if "module_example" not in given:
        raise RecipeError(
            f"there is no example input for {factory}; say its shape, as --example 1x3x224x224, or --example "
            "name=1x3x224x224 for each of several"
        )
    optional = {
        name: given[f"module_{name}"] for name in ("strict_weights", "stages") if f"module_{name}" in given
    }
    inputs = _once("--example", given["module_example"])
    return UserModule(
        factory,
        {name: shape for name, (shape, _) in inputs.items()},
        _once("--arg", given.get("module_arguments", [])),
        types={name: kind for name, (_, kind) in inputs.items()},
        scans=_once("--scan-function", given.get("module_scans", [])),
        **optional,
    )


def parse_input(text: str) -> tuple[str, tuple[tuple[int, ...], str]]:
    """Read an example input: its shape, its name if it has one, and its element type if it is not float32.

    Raises:
        RecipeError: if it is something else than such as `1x3x224x224` or `ids=1x5:int64`.
    """
    sizes, colon, kind = text.partition(":")
    name, shape = parse_example(sizes)
    kind = kind if colon else FLOAT32
    check_type(name, kind)
    return name, (shape, kind)


def parse_argument(text: str) -> tuple[str, Any]:
    """Read a keyword argument: a Python literal, or else a text.

    Raises:
        RecipeError: if it is no assignment.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise RecipeError(f"{text!r} is no argument; expected NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return name, value


def parse_scan(text: str) -> tuple[str, str]:
    """Read a scan and its adapter.

    Raises:
        RecipeError: if it is no pair of them.
    """
    scan, equals, adapter = text.partition("=")
    if not equals or ":" not in scan or ":" not in adapter:
        raise RecipeError(f"{text!r} names no scan and adapter; expected package.ops:scan=my_adapters:scan")
    return scan, adapter


def _once(flag: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise RecipeError(f"{flag} names {name!r} twice; leave one out")
        found[name] = value
    return found


def _told(parse: Any) -> Any:
    """A parser of an option whose errors argparse shows."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except QuartermapError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed
