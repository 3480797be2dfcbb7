"""docs/json.md: the fields that it names are those that the commands print."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from command_line import call
from deploy_bundles import dynamic_bundle
from quick_results import quick_results

from quartermap_deploy.deploy.web import Site
from quartermap_deploy.native.check import PluginReport
from quartermap_deploy.validation.localise import LocaliseReport

PAGE = Path(__file__).resolve().parents[1] / "docs/json.md"


def documented(command: str, head: str = "field") -> dict[str, str]:
    """The fields that the page names for a command, with what it says of each."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (section,) = (text for text in sections if f"`{command}`" in text.partition("\n")[0])
    (table,) = (text for text in section.split("\n\n") if text.startswith(f"| {head} |"))
    return dict(re.findall(r"^\| `([^`]+)` \| [^|]+ \| (.+) \|$", table, flags=re.MULTILINE))


def part(value: Any, path: str) -> list[Any]:
    """Every value at a place such as `cases[].outputs[]`; a list stands for its entries."""
    found = [value]
    for name in path.split(".") if path else []:
        key = name.removesuffix("[]")
        found = [entry[key] if key else entry for entry in found]
        if key != name:
            found = [one for entry in found for one in entry]
    return found


def check(command: str, printed: Any, head: str = "field") -> None:
    """Compare the fields of every object whose fields the page lists, with what was printed."""
    fields = documented(command, head)
    assert fields
    places: dict[str, set[str]] = {}
    for field in fields:
        names = field.split(".")
        for depth, name in enumerate(names):
            places.setdefault(".".join(names[:depth]), set()).add(name.removesuffix("[]"))
    for place, names in places.items():
        if names == {""}:
            assert isinstance(printed, list)
            continue
        optional = {
            name for name in names if fields.get(f"{place}.{name}" if place else name, "").startswith("only ")
        }
        for entry in part(printed, place):
            if entry is None:
                continue
            assert names - optional <= entry.keys() <= names, f"{command}, in {place or 'the value'}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle and images in it."""
    folder = tmp_path_factory.mktemp("json")
    shutil.copytree(dynamic_bundle(), folder / "bundle")
    check("images", call("images", "-o", folder / "images", "--limit", 3, "--json").json)
    return folder


COMMANDS: dict[str, tuple[str, ...]] = {
    "models": ("models",),
    "doctor": ("doctor",),
    "native list": ("native", "list"),
    "plugin list": ("plugin", "list"),
    "inspect": ("inspect", "BUNDLE"),
    "validate": ("validate", "BUNDLE"),
    "predict": ("predict", "BUNDLE", "PLACE/images"),
    "bench": ("bench", "BUNDLE", "--repeats", "1"),
    "eval": ("eval", "BUNDLE", "--limit", "5"),
    "report": ("report", "BUNDLE", "--no-maps", "-o", "PLACE/page.html"),
    "deploy triton": ("deploy", "triton", "BUNDLE", "-o", "PLACE/triton"),
    "deploy kserve": (
        "deploy",
        "kserve",
        "BUNDLE",
        "-o",
        "PLACE/kserve.yaml",
        "--storage-uri",
        "s3://bucket/model",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_fields_are_those_that_a_command_prints(command: str, place: Path) -> None:
    words = [
        word.replace("BUNDLE", f"{place}/bundle").replace("PLACE", str(place)) for word in COMMANDS[command]
    ]
    check(command, call(*words, "--json").json)


def test_fields_of_one_card_are_those_of_the_list_and_its_labels() -> None:
    (card,) = call("models", "vmamba_digit*", "--json").json
    assert call("models", "vmamba_digits", "--json").json.keys() == {*card, "labels"}


def test_fields_of_keys_and_signatures(place: Path) -> None:
    key = place / "release.pem"
    check("sign", call("sign", "--new-key", key, "--json").json, "field of `--new-key`")
    signed = shutil.copytree(place / "bundle", place / "signed")
    check("sign", call("sign", signed, "--key", key, "--json").json)


@pytest.mark.parametrize("command", ["compare", "ablate", "tune"])
def test_fields_of_measurements(command: str) -> None:
    check(command, json.loads(quick_results()[command].read_text(encoding="utf-8")))


def test_the_cpu_library(cpu_library: Path) -> None:
    check("native check", call("native", "check", cpu_library, "--json").json)


def names(kind: type) -> Iterable[str]:
    """The fields of a dataclass that a command prints as they are."""
    return {field.name for field in dataclasses.fields(kind)}


def test_fields_of_what_takes_long() -> None:
    assert documented("deploy web").keys() == names(Site)
    assert documented("plugin check").keys() == names(PluginReport)


def test_fields_of_a_localisation() -> None:
    found = LocaliseReport("float16", True).to_dict()
    check("validate", found, "field of `--localise`")
