"""What may stand in a bundle's manifest and report: `schemas/manifest.json` and `schemas/report.json`, and some rules.

A bundle may come from anybody. What is read here is data: every value has the type and the range that the rest of the
package relies on, names of models and files name nothing but themselves, and every file that a target runs is one that
the manifest lists with its hash.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from quartermap_deploy.errors import InputError
from quartermap_deploy.plain_text import printable

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator, ValidationError

_END = r"(?![\s\S])"
"""What patterns end in, as `$` alone allows a line to end behind it."""

SHOWN = 60
"""Letters of a wrong value that a message shows."""


def check_manifest(manifest: Any) -> None:
    """Check the types and values in a manifest, and that its targets run files that it lists.

    Raises:
        InputError: if something of it is missing or wrong; the message says where and what was expected.
    """
    _check("manifest", manifest)
    listed = manifest["files"]
    taken: dict[str, str] = {}
    for target, entry in manifest["targets"].items():
        file = entry["file"]
        if file not in listed:
            raise InputError(
                f"targets.{target}.file is {printable(file, SHOWN)!r}, which files does not list"
            )
        if file in taken and file != "model.onnx":
            raise InputError(f"targets.{target} and targets.{taken[file]} have the same file, {file!r}")
        taken[file] = target
    indices = [block["index"] for block in manifest["blocks"]]
    if indices != sorted(set(indices)):
        raise InputError("the numbers of its blocks do not ascend")


def check_report(report: Any) -> None:
    """Check the types and values in a parity report.

    Raises:
        InputError: if something of it is missing or wrong; the message says where and what was expected.
    """
    _check("report", report)


def _check(schema: str, value: Any) -> None:
    from jsonschema.exceptions import best_match

    error = best_match(_validator(schema).iter_errors(value))
    if error is not None:
        raise InputError(_described(error))


@functools.cache
def _validator(name: str) -> Draft202012Validator:
    from jsonschema import Draft202012Validator

    text = (files("quartermap_deploy") / "schemas" / f"{name}.json").read_text(encoding="utf-8")
    return Draft202012Validator(json.loads(text))


def _described(error: ValidationError) -> str:
    """Where a value is wrong, what was found and what was expected."""
    where = printable(".".join(map(str, error.absolute_path)) or "it")
    if error.validator == "required":
        missing = [key for key in error.validator_value if key not in error.instance]
        return f"{where} has no {', '.join(missing)}"
    if "propertyNames" in error.absolute_schema_path:
        where = f"a name in {where}"
    found = printable(_text(error.instance), SHOWN)
    return f"{where} is {found}, expected {_expected(error.validator, error.validator_value)}"


def _text(value: object) -> str:
    """A value as JSON writes it; of large ones only what they are."""
    if isinstance(value, (list, Mapping)) and value:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)} entries"
    return json.dumps(value)


def _expected(keyword: object, wanted: Any) -> str:
    match keyword:
        case "type":
            return " or ".join([wanted] if isinstance(wanted, str) else wanted)
        case "const":
            return json.dumps(wanted)
        case "enum":
            return f"one of {', '.join(map(str, wanted))}"
        case "pattern":
            return f"text of the form {wanted.removesuffix(_END)}"
        case _:
            return f"{keyword} {json.dumps(wanted)}"
