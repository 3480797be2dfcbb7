"""Recipes: what they mean, and what is wrong with a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

import quartermap_deploy as qm
from quartermap_deploy.errors import RecipeError
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.targets.tensorrt.options import EngineOptions, Profile

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
precision = "float16"
optimize = false
io = "same"
blocks_float32 = [2]
keep_float32 = ["logits"]

[targets]
names = ["onnxruntime"]

[engine]
profiles = [{ batch = [1, 4, 16], height = [48, 48, 96], width = [64, 64, 128] }]
compute_capabilities = ["8.9"]
optimization_level = 2

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
        precision="float16",
        optimize=False,
        io="same",
        blocks_float32=(2,),
        keep_float32=("logits",),
        engine=EngineOptions(
            profiles=(Profile((1, 4, 16), (48, 48, 96), (64, 64, 128)),),
            compute_capabilities=("8.9",),
            optimization_level=2,
        ),
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
    "text", [FULL, '[model]\nname = "vmamba_digits"\n', '[model]\nname = "x"\n[quartermap]\nevery = 2']
)
def test_a_recipe_that_was_written_reads_as_the_same(tmp_path: Path, text: str) -> None:
    (tmp_path / "first.toml").write_text(text)
    recipe = qm.Recipe.load(tmp_path / "first.toml")
    (tmp_path / "second.toml").write_text(recipe.to_toml(tmp_path))
    assert qm.Recipe.load(tmp_path / "second.toml") == recipe
    # What is a default is not written, so that a short recipe stays short.
    assert len(recipe.to_toml(tmp_path).split()) <= len(text.split()) + 12


def test_a_recipe_is_written_for_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths that were relative to the folder of the command lead to the same files from the folder of the recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "recipes").mkdir()
    name = 'a "strange" name\\ of\tweights\x7f é.pth'
    (tmp_path / "weights" / name).touch()
    recipe = qm.Recipe("vmamba_digits", checkpoint=Path("weights") / name)
    written = tmp_path / "recipes" / "tuned.toml"
    written.write_text(recipe.to_toml(written.parent), encoding="utf-8")
    assert str(tmp_path) not in written.read_text(encoding="utf-8")
    found = qm.Recipe.load(written).checkpoint
    assert found is not None and found.samefile(tmp_path / "weights" / name)


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[export]\nblocks_float32 = [0]", "count from 1"),
        ('[export]\nkeep_float32 = "logits"', "not a list of names"),
        ("[engine]\nprofile = []", "Did you mean 'profiles'"),
        ("[engine]\nprofiles = [{ batch = [4, 2, 8] }]", "smallest ≤ tuned for ≤ largest"),
        ("[engine]\noptimization_level = 9", "expected 0 to 5"),
    ],
)
def test_wrong_precision_and_engine_settings_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(f'[model]\nname = "vmamba_digits"\n{text}\n')
    with pytest.raises(RecipeError, match=message):
        qm.Recipe.load(path)


# All at once ------------------------------------------------------------------------------------------------------


def test_all_faults_of_a_recipe_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[model]\nname = 3\nseed = "x"\n[input]\nsise = [1, 2]\n[export]\nprecision = "int8"\n'
        "[quartermap]\nevery = 0\n[what]\n"
    )
    with pytest.raises(RecipeError) as found:
        Recipe.load(path)
    said = str(found.value)
    assert said.startswith(f"the recipe {path}: 6 things are wrong:\n- ")
    for text in (
        "model = 3 is not of type str",
        "seed = 'x' is not of type int",
        "unknown key in [input] 'sise'",
        "precision = 'int8' is unknown; expected float32 or float16 or bfloat16",
        "every = 0 must be at least 1",
        "unknown table 'what'",
    ):
        assert text in said


def test_faults_are_told_at_construction() -> None:
    with pytest.raises(RecipeError, match=r"^precision = 'int8' is unknown"):
        Recipe("vmamba_digits", precision="int8")
    with pytest.raises(RecipeError, match=r"2 things are wrong:\n- seed = .*\n- io = 'int4' is unknown"):
        Recipe("vmamba_digits", precision="float16", seed="x", io="int4")  # type: ignore[arg-type]


def test_paths_may_be_texts() -> None:
    recipe = Recipe("vmamba_digits", checkpoint="a/b.pth", images="folder")
    assert (recipe.path("checkpoint"), recipe.path("images")) == (Path("a/b.pth"), Path("folder"))
    assert recipe == Recipe("vmamba_digits", checkpoint=Path("a/b.pth"), images=Path("folder"))
    assert recipe.path("reference") is None
