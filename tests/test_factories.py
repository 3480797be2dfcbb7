"""Modules by the name of what makes them: what is found, and what every mistake is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from quartermap_deploy.cli.module_options import parse_input
from quartermap_deploy.errors import InputError, RecipeError
from quartermap_deploy.sources.factories import UserModule, build_module, find_scans, parse_example

MODEL = """
from torch import nn
from beside import WIDTH

class Net(nn.Linear):
    def __init__(self, width=WIDTH):
        super().__init__(width, 1)

class Outer:
    Inner = Net

def build(width, fail=None):
    if fail:
        raise RuntimeError(fail)
    return Net(width)

def count():
    return 3

made = Net(5)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 7\n")
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "needs.py").write_text("import no_such_package_at_all\n")
    return tmp_path / "model.py"


def made(factory: object, **arguments: Any) -> Any:
    return build_module(UserModule(str(factory), {"x": (1, 5)}, arguments))


def test_a_file_is_imported_with_its_folder_first(file: Path) -> None:
    before = list(sys.path)
    assert made(f"{file}:Net").in_features == 7
    assert made(f"{file}:Net", width=3).in_features == 3
    assert made(f"{file}:build", width=4).in_features == 4
    assert made(f"{file}:Outer.Inner").in_features == 7
    assert made(f"{file}:made").in_features == 5
    assert sys.path == before


def test_a_package_is_imported_from_the_current_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = file.parent / "package_of_the_user"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text("from torch import nn\nNet = nn.Identity\n")
    monkeypatch.chdir(file.parent)
    assert type(made("package_of_the_user.nets:Net")).__name__ == "Identity"
    with pytest.raises(InputError, match=r"nets has no 'Nat'; did you mean Net"):
        made("package_of_the_user.nets:Nat")
    with pytest.raises(InputError, match=r"there is no module .package_of_the_user\.netz. to import"):
        made("package_of_the_user.netz:Net")


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        ("missing.py:Net", {}, "there is no file .*missing.py"),
        ("model.py:Nett", {}, "has no 'Nett'; did you mean Net"),
        ("model.py:build", {"width": 2, "fail": "no weights"}, "raised RuntimeError: no weights"),
        ("model.py:build", {}, r"raised TypeError: .*width.*; it takes \(width, fail=None\)"),
        ("model.py:Net", {"depth": 2}, r"raised TypeError: .*depth.*--arg name=value"),
        ("model.py:count", {}, "made an object of type int; expected a torch.nn.Module"),
        ("broken.py:Net", {}, "importing .*broken.py raised ZeroDivisionError"),
        ("needs.py:Net", {}, "needs the package 'no_such_package_at_all'"),
    ],
)
def test_every_mistake_is_told(file: Path, factory: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        made(file.parent / factory, **arguments)


def test_a_failed_import_leaves_no_half_module(file: Path) -> None:
    before = set(sys.modules)
    for name in ("broken.py", "needs.py"):
        with pytest.raises(InputError):
            made(f"{file.parent / name}:Net")
    assert not [name for name in set(sys.modules) - before if name.startswith("quartermap_user_")]


def test_adapters_of_scans_are_found(file: Path) -> None:
    module = UserModule("a:B", {"x": (1,)}, scans={"package.ops:scan": f"{file}:build"})
    scans = find_scans(module)
    assert scans is not None and scans["package.ops:scan"].__name__ == "build"
    assert find_scans(UserModule("a:B", {"x": (1,)})) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"factory": "model", "example": [1, 3]}, "names no factory"),
        ({"factory": "model:", "example": [1, 3]}, "names no factory"),
        ({"factory": "model:not a name", "example": [1, 3]}, "names no factory"),
        ({"factory": "a:B"}, "has no example"),
        ({"example": [1]}, "has no factory"),
        ({"factory": "a:B", "example": {}}, "no example input"),
        ({"factory": "a:B", "example": [1, 0]}, "shape"),
        ({"factory": "a:B", "example": ["x"]}, "shape"),
        ({"factory": "a:B", "example": [1 << 20, 1 << 20]}, "too large"),
        ({"factory": "a:B", "example": [1], "arguments": [1]}, "arguments"),
        ({"factory": "a:B", "example": [1], "strict_weights": 1}, "strict_weights"),
        ({"factory": "a:B", "example": [1], "stages": [0]}, "stages"),
        ({"factory": "a:B", "example": [1], "scans": {"a": "b"}}, "scans"),
        ({"factory": "a:B", "example": [1], "exampel": [1]}, "Did you mean 'example'"),
    ],
)
def test_wrong_tables_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        UserModule.from_dict(values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1x3x224x224", ("images", (1, 3, 224, 224))),
        ("pre=1x3x64x96", ("pre", (1, 3, 64, 96))),
        ("5", ("images", (5,))),
    ],
)
def test_examples_of_the_command_line(text: str, expected: tuple[str, tuple[int, ...]]) -> None:
    assert parse_example(text) == expected


@pytest.mark.parametrize("text", ["", "x", "1x", "1x-3", "0x3", "=1x3", "a b=1x3", "1x3=4", "9" * 30])
def test_what_is_no_example_is_told(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_example(text)


def test_element_types_of_examples() -> None:
    assert parse_input("ids=1x5:int64") == ("ids", ((1, 5), "int64"))
    assert parse_input("1x3x8x8") == ("images", ((1, 3, 8, 8), "float32"))
    module = UserModule("a:B", {"x": (1, 3), "ids": (1, 5)}, types={"x": "float32", "ids": "int64"})
    assert module.types == {"ids": "int64"}
    assert UserModule.from_dict(module.to_dict()) == module
    assert "types" not in UserModule("a:B", {"x": (1, 3)}).to_dict()


@pytest.mark.parametrize(
    "text", ["ids=1x5:", "ids=1x5:float64", "1x5:int64:int64", ":int64", "ids:int64=1x5"]
)
def test_what_is_no_typed_example_is_told(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_input(text)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"ids": "int65"}, r"'ids' has the element type 'int65'; expected one of float32, int64"),
        ({"ids": 64}, "'ids' has the element type 64"),
        ({"other": "int64"}, "types names 'other', which is no example input; those are ids"),
        ("int64", "is no table of element types"),
    ],
)
def test_wrong_element_types_are_refused(types: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        UserModule("a:B", {"ids": (1, 5)}, types=types)


def test_plain_values_say_nothing_of_the_folder() -> None:
    module = UserModule("/home/somebody/model.py:Net", {"x": (1, 2)}, {"width": 3}, stages=(1, 2))
    values = module.to_dict()
    assert values["factory"] == "model.py:Net"
    assert UserModule.from_dict(values) == UserModule(
        "model.py:Net", {"x": (1, 2)}, {"width": 3}, stages=(1, 2)
    )
