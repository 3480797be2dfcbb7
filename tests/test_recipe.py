"""Recipes: what they mean, and what is wrong with a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

import quartermap_deploy as qm
from quartermap_deploy.errors import RecipeError

REPOSITORY = Path(__file__).parent.parent

FULL = """
[model]
name = "vmamba_digits"
checkpoint = "weights/digits.safetensors"
num_classes = 7
seed = 3

[quartermap]
blocks = [3, 6]
stride = 3
keep = 2
upsample = "bilinear"

[input]
size = [48, 64]
dynamic_batch = false
dynamic_size = true

[export]
precision = "float32"
optimize = false

[targets]
names = ["onnxruntime"]

[validation]
images = "pictures"
"""


def test_every_key_is_read(tmp_path: Path) -> None:
    path = tmp_path / "full.toml"
    path.write_text(FULL)
    assert qm.Recipe.load(path) == qm.Recipe(
        model="vmamba_digits",
        checkpoint=tmp_path / "weights/digits.safetensors",
        num_classes=7,
        input_size=(48, 64),
        dynamic_batch=False,
        dynamic_size=True,
        quartermap=qm.QuarterMap(blocks=(3, 6), stride=3, keep=2, upsample="bilinear"),
        optimize=False,
        images=tmp_path / "pictures",
        seed=3,
    )


def test_no_path_of_this_machine_stands_in_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "full.toml"
    path.write_text(FULL)
    values = qm.Recipe.load(path).to_dict()
    assert str(tmp_path) not in repr(values)
    assert values["checkpoint"] == "digits.safetensors"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model", "no valid TOML"),
        ("", "names no model"),
        ('[model]\nnam = "x"', "Did you mean 'name'"),
        ('[modell]\nname = "x"', "Did you mean 'model'"),
        ('model = "x"', "must be a table"),
        ('[model]\nname = "x"\n[input]\nsize = 224', r"not \[height, width\]"),
        ('[model]\nname = "x"\n[input]\nsize = [224, 0]', r"not \[height, width\]"),
        ('[model]\nname = "x"\n[input]\ndynamic_batch = "yes"', "not of type bool"),
        ('[model]\nname = "x"\n[model.extra]\na = 1', "unknown key"),
        ('[model]\nname = "x"\n[targets]\nnames = "onnxruntime"', "not a list of targets"),
        ('[model]\nname = "x"\n[quartermap]\nevry = 3', "Did you mean every"),
        ('[model]\nname = "x"\n[quartermap]\nkeep = 2', "drops nothing"),
        ('[model]\nname = "x"\n[quartermap]\nevery = 3\nblocks = [3]', "both every and blocks"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        qm.Recipe.load(path)
    assert "wrong.toml" in str(caught.value)


def test_missing_and_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no recipe"):
        qm.Recipe.load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        qm.Recipe.load(tmp_path / "binary.toml")


def test_there_is_a_recipe_for_every_model() -> None:
    recipes = [qm.Recipe.load(path) for path in sorted((REPOSITORY / "export").glob("*.toml"))]
    assert sorted({recipe.model for recipe in recipes}) == sorted(qm.list_models())
