"""Each step of the compiler is told what the recipe and the caller said, and by what it returns the next one goes on.

The steps themselves have tests of their own; here each is a function that keeps what it was told.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import CHANNEL_FIRST, text_model
from toy_bundles import PREPROCESSING
from toy_modules import Classifier

import quartermap_deploy as qm
from quartermap_deploy import compiler, compiling
from quartermap_deploy.bundle import MANIFEST, MODEL, REPORT, Bundle
from quartermap_deploy.data.labels import label_sets
from quartermap_deploy.errors import BundleError, ParityError, RecipeError
from quartermap_deploy.passes import infer_shapes, lower
from quartermap_deploy.progress import SILENT, Silent
from quartermap_deploy.sources import architectures, modules, user_modules
from quartermap_deploy.sources.factories import UserModule
from quartermap_deploy.targets.execution import ON_CPU
from quartermap_deploy.targets.tensorrt import builder
from quartermap_deploy.targets.tensorrt.options import EngineOptions, Profile
from quartermap_deploy.tensor_info import TensorInfo
from quartermap_deploy.validation import engines, given, golden, inputs, localise, parity
from quartermap_deploy.validation.runners import NATIVE, TorchRunner
from quartermap_deploy.validation.tolerances import tolerance_for

PLAN = qm.QuarterMap(blocks=(2,))
OPTIONS = EngineOptions(profiles=(Profile((1, 2, 4)),))
PROGRESS = Silent()
MODULE = UserModule("toy_modules:Classifier", {"images": (2, 3, 32, 32)})
Told = dict[str, Any]
Keep = Callable[..., Told]


@pytest.fixture
def keep(monkeypatch: pytest.MonkeyPatch) -> Keep:
    """Puts a function in the place of another that keeps what it is told, by the names of the other's parameters."""

    def put(place: Any, name: str, answer: Any = None) -> Told:
        signature = inspect.signature(getattr(place, name))
        told: Told = {}

        def stand_in(*arguments: Any, **settings: Any) -> Any:
            bound = signature.bind(*arguments, **settings)
            bound.apply_defaults()
            told.update(bound.arguments)
            return answer

        monkeypatch.setattr(place, name, stand_in)
        return told

    return put


def recipe(**settings: Any) -> qm.Recipe:
    return qm.Recipe("Classifier", **{"quartermap": PLAN, **settings})


class Described:
    """A source that says whom it was asked for."""

    blocks = (SimpleNamespace(index=1, path="layers.0"), SimpleNamespace(index=2, path="layers.1"))
    inputs = (TensorInfo("images", ("batch", 3, 32, 32), "float32"),)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def selected(self, plan: Any) -> None:
        assert plan is PLAN

    def reference(self, plan: Any, traced: Any = None) -> Any:
        return SimpleNamespace(plan=plan, traced=traced)

    def further_cases(self, traced: Any) -> dict[str, Any]:
        return {"further": {"of": traced}}


SOURCE: Any = Described("module")


# From the outside -------------------------------------------------------------------------------------------------


def test_a_recipe_is_one_or_a_file_or_the_name_of_a_model(tmp_path: Path) -> None:
    own = recipe()
    assert compiler.as_recipe(own) is own
    assert compiler.as_recipe("vmamba_digits") == qm.Recipe("vmamba_digits")
    path = tmp_path / "own.toml"
    path.write_text(recipe(module=MODULE).to_toml(tmp_path))
    for place in (path, str(path)):
        loaded = compiler.as_recipe(place)
        assert loaded == recipe(module=MODULE)
        assert loaded.module is not None and loaded.module.named_by == path
        agreed = compiler.as_recipe(place, run_module=True)
        assert agreed.module is not None and agreed.module.named_by is None


COMPILED = Bundle(Path("draft"), {"loaded": 1}, {})
"""What takes the place of a bundle that was compiled into a draft."""


def is_draft(folder: Path, out: Path) -> bool:
    return folder.parent == out.parent and folder.name.startswith(f".{out.name}.") and not folder.exists()


def test_compiling_a_recipe_hands_on_what_was_said(tmp_path: Path, keep: Keep) -> None:
    loaded = keep(compiler, "load_source", "source")
    reference = keep(compiler, "load_reference", "given")
    asked = keep(compiler, "load_targets", {"tensorrt": "target"})
    told = keep(compiler, "_compile", COMPILED)
    own, out = recipe(engine=OPTIONS, targets=("tensorrt",)), tmp_path / "out"
    assert compiler.compile(own, str(out)) == dataclasses.replace(COMPILED, path=out)
    assert is_draft(told.pop("folder"), out)
    expected = {
        "recipe": own,
        "source": "source",
        "targets": {"tensorrt": "target"},
        "given": "given",
        "progress": SILENT,
    }
    assert told == expected
    assert loaded == asked == {"recipe": own} and reference == {"recipe": own, "source": "source"}
    compiler.compile(own, out, plugin="plugin.so", force=True, progress=PROGRESS)
    assert is_draft(told.pop("folder"), out)
    named = dataclasses.replace(own, engine=dataclasses.replace(OPTIONS, plugin=Path("plugin.so")))
    assert told == {**expected, "recipe": named, "progress": PROGRESS}
    assert loaded == asked == {"recipe": named}, "targets are checked with the plugin"


@pytest.mark.parametrize("run_module", [False, True])
def test_a_module_that_a_file_names_is_run_by_agreement_alone(
    run_module: bool, tmp_path: Path, keep: Keep
) -> None:
    loaded = keep(compiler, "load_source")
    keep(compiler, "load_reference")
    keep(compiler, "_compile", COMPILED)
    path = tmp_path / "own.toml"
    path.write_text(recipe(module=MODULE).to_toml(tmp_path))
    more = {"run_module": True} if run_module else {}
    compiler.compile(path, tmp_path / "out", **more)
    assert loaded["recipe"].module.named_by == (None if run_module else path)


def test_a_place_that_is_taken_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*arguments: Any, **settings: Any) -> Any:
        raise AssertionError("the work began")

    monkeypatch.setattr(compiler, "load_source", too_late)
    monkeypatch.setattr(modules, "module_source", too_late)
    with pytest.raises(BundleError, match="exists already"):
        compiler.compile(recipe(), tmp_path)
    with pytest.raises(BundleError, match="exists already"):
        compiler.compile_module(Classifier(), None, tmp_path)
    with pytest.raises(RecipeError, match="no target that has one"):
        compiler.compile(recipe(engine=OPTIONS), tmp_path / "out")


def test_compiling_a_module_hands_on_what_was_said(tmp_path: Path, keep: Keep) -> None:
    described = keep(modules, "module_source", "source")
    reference = keep(given, "as_reference", "given")
    asked = keep(compiler, "load_targets", {"tensorrt": "target"})
    told = keep(compiler, "_compile", COMPILED)
    model, scans = Classifier(), {"a.b:c": len}
    bundle = compiler.compile_module(
        model,
        "example",
        str(tmp_path / "out"),
        quartermap=PLAN,
        task="image",
        preprocessing=PREPROCESSING,
        labels=["cat"],
        dynamic_batch=False,
        dynamic_size=True,
        precision="float16",
        targets=["tensorrt"],
        reference="saved",
        scans=scans,
        name="own",
        stages=(1, 1),
        images=str(tmp_path),
        engine=OPTIONS,
        optimize=False,
        force=True,
        progress=PROGRESS,
    )
    assert bundle == dataclasses.replace(COMPILED, path=tmp_path / "out")
    assert is_draft(told.pop("folder"), tmp_path / "out")
    own = qm.Recipe(
        "own",
        quartermap=PLAN,
        precision="float16",
        targets=("tensorrt",),
        dynamic_batch=False,
        dynamic_size=True,
        images=tmp_path,
        engine=OPTIONS,
        optimize=False,
    )
    assert told == {
        "recipe": own,
        "source": "source",
        "targets": {"tensorrt": "target"},
        "given": "given",
        "progress": PROGRESS,
    }
    assert asked == {"recipe": own} and reference == {"source": "source", "reference": "saved"}
    assert described == {
        "model": model,
        "example_inputs": "example",
        "name": "own",
        "task": "image",
        "preprocessing": PREPROCESSING,
        "labels": ["cat"],
        "dynamic_batch": False,
        "dynamic_size": True,
        "stages": (1, 1),
        "scans": scans,
        "weights": None,
    }


def test_compiling_a_module_has_plain_defaults(tmp_path: Path, keep: Keep) -> None:
    described = keep(modules, "module_source", "source")
    told = keep(compiler, "_compile", COMPILED)
    model = Classifier()
    compiler.compile_module(model, "example", tmp_path / "out")
    assert told["recipe"] == qm.Recipe("Classifier") and list(told["targets"]) == ["onnxruntime"]
    assert (told["given"], told["progress"]) == (None, SILENT)
    assert described == {
        "model": model,
        "example_inputs": "example",
        "name": "Classifier",
        "task": None,
        "preprocessing": None,
        "labels": (),
        "dynamic_batch": True,
        "dynamic_size": False,
        "stages": None,
        "scans": None,
        "weights": None,
    }


# Where models come from -------------------------------------------------------------------------------------------


class Selecting:
    """A source that keeps the plan that it is asked about."""

    def __init__(self) -> None:
        self.plans: list[Any] = []

    def selected(self, plan: Any) -> None:
        self.plans.append(plan)


def test_a_model_of_a_card_is_made_as_the_recipe_says(keep: Keep) -> None:
    found = Selecting()
    told = keep(architectures, "card_source", found)
    own = qm.Recipe(
        "vmamba_tiny_v0",
        checkpoint=Path("weights.pth"),
        num_classes=7,
        in_chans=4,
        features_only=True,
        labels=label_sets()[0],
        preprocessing={"mean": [0.5, 0.5, 0.5]},
        input_size=(64, 96),
        dynamic_batch=False,
        dynamic_size=True,
        quartermap=PLAN,
        seed=3,
    )
    assert compiling.source.load_source(own) is found  # type: ignore[comparison-overlap]
    assert told == {
        "name": "vmamba_tiny_v0",
        "num_classes": 7,
        "in_chans": 4,
        "features_only": True,
        "checkpoint": Path("weights.pth"),
        "input_size": (64, 96),
        "dynamic_batch": False,
        "dynamic_size": True,
        "preprocessing": {"mean": [0.5, 0.5, 0.5]},
        "labels": own.labels,
        "seed": 3,
    }
    assert found.plans == [PLAN], "a plan that does not fit is refused as soon as the blocks are known"


def test_a_module_of_the_users_is_made_as_the_recipe_says(keep: Keep) -> None:
    found = Selecting()
    told = keep(user_modules, "user_module_source", found)
    own = recipe(
        module=MODULE,
        checkpoint=Path("weights.pth"),
        task="other",
        preprocessing={"mean": [0.5, 0.5, 0.5]},
        labels=("a", "b"),
        dynamic_batch=False,
        dynamic_size=True,
        seed=3,
    )
    assert compiling.source.load_source(own) is found  # type: ignore[comparison-overlap]
    assert told == {
        "wanted": MODULE,
        "name": "Classifier",
        "weights": Path("weights.pth"),
        "task": "other",
        "preprocessing": {"mean": [0.5, 0.5, 0.5]},
        "labels": ("a", "b"),
        "dynamic_batch": False,
        "dynamic_size": True,
        "seed": 3,
    }
    assert found.plans == [PLAN]


def test_a_reference_is_read_where_the_recipe_names_one(keep: Keep) -> None:
    told = keep(given, "read_reference", "given")
    assert compiling.source.load_reference(recipe(), SOURCE) is None and told == {}
    named = recipe(module=MODULE, reference=Path("saved.npz"))
    own = object.__new__(modules.ModuleSource)
    assert compiling.source.load_reference(named, own) == "given"  # type: ignore[comparison-overlap]
    assert told["source"] is own and told["path"] == Path("saved.npz")


# What is checked before the export --------------------------------------------------------------------------------


def engine_target(precisions: tuple[str, ...] = ("float32", "float16")) -> Any:
    """A target that keeps the recipes that it is asked about."""
    asked: list[Any] = []
    return SimpleNamespace(PRECISIONS=precisions, check=asked.append, asked=asked)


def test_every_target_is_asked_and_none_gets_what_it_does_not_take() -> None:
    wanted = recipe(precision="float16")
    target = engine_target()
    compiling.targets.check_target(wanted, "tensorrt", target)
    assert target.asked == [wanted]
    with pytest.raises(RecipeError, match=r"tensorrt does not take bfloat16; expected float32 or float16"):
        compiling.targets.check_target(recipe(precision="bfloat16"), "tensorrt", target)
    assert target.asked == [wanted]


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_engines_take_and_give_float32(name: str) -> None:
    same = recipe(precision="float16", io="same")
    with pytest.raises(RecipeError, match=f'the target {name} takes io = "float32" only'):
        compiling.targets.check_target(same, name, engine_target())
    compiling.targets.check_target(same, "onnxruntime", engine_target())
    compiling.targets.check_target(recipe(precision="float16"), name, engine_target())


def test_all_targets_of_a_recipe_are_loaded_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: engine_target() for name in ("onnxruntime", "tensorrt", "tensorrt-rtx")}
    monkeypatch.setattr(compiling.targets, "load_target", made.__getitem__)
    for names in (("onnxruntime",), ("tensorrt", "onnxruntime"), ("tensorrt-rtx",)):
        found = compiling.targets.load_targets(recipe(targets=names))
        assert list(found) == list(names)
        assert all(found[name] is made[name] for name in names)
        assert all(made[name].asked.pop().targets == names for name in names)
    for name in ("tensorrt", "tensorrt-rtx"):
        assert list(compiling.targets.load_targets(recipe(targets=(name,), engine=OPTIONS))) == [name]
    with pytest.raises(RecipeError, match=r"no target that has one; add one to the targets: tensorrt or ten"):
        compiling.targets.load_targets(recipe(engine=OPTIONS))


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_profiles_are_compared_with_what_is_run(name: str, keep: Keep) -> None:
    told = keep(builder, "check_examples")
    cases = {"images": {"images": np.zeros((2, 3, 32, 32))}, "one": {"images": np.zeros((1, 3, 32, 32))}}
    compiling.settings.check_settings(recipe(), SOURCE, cases)
    assert told == {}
    compiling.settings.check_settings(recipe(targets=("onnxruntime", name), engine=OPTIONS), SOURCE, cases)
    assert list(told.values()) == [
        OPTIONS,
        {"images": ("batch", 3, 32, 32)},
        [{"images": (2, 3, 32, 32)}, {"images": (1, 3, 32, 32)}],
    ]


# Cases, and the comparison ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "digits"), [("vmamba_digits", True), ("Classifier", False)])
def test_pictures_are_those_of_the_recipe(name: str, digits: bool, keep: Keep, tmp_path: Path) -> None:
    told = keep(inputs, "real_images", "pictures")
    model: Any = SimpleNamespace(name=name, cases=lambda pictures: {"images": pictures(PREPROCESSING)})
    assert compiling.cases.validation_cases(recipe(images=tmp_path), model) == {"images": "pictures"}
    assert told == {
        "preprocessing": PREPROCESSING,
        "folder": tmp_path,
        "count": inputs.COUNT,
        "digits": digits,
    }
    compiling.cases.validation_cases(recipe(), model, 5)
    assert told == {"preprocessing": PREPROCESSING, "folder": None, "count": 5, "digits": digits}


def test_a_model_without_images_has_its_ranges_from_the_example(
    keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quartermap_deploy.exporting import export

    told = keep(export, "export", "exported")
    example = {"tokens": np.ones((2, 3))}
    monkeypatch.setattr(
        compiling.export, "validation_cases", lambda *arguments: {"zeros": {}, "example": example}
    )
    model: Any = SimpleNamespace(trace=lambda: "traced")
    assert compiling.export.export_model(recipe(precision="float16"), model, SILENT) == "exported"  # type: ignore[comparison-overlap]
    assert told["calibration"] is example and told["traced"] == "traced"
    compiling.export.export_model(recipe(precision="float16"), model, SILENT, "earlier")  # type: ignore[arg-type]
    assert told["traced"] == "earlier"


@pytest.mark.parametrize("kind", ["card", "module"])
def test_parity_is_of_the_pruned_model_on_every_case(kind: str, keep: Keep) -> None:
    told = keep(parity, "check_parity", "report")
    data = text_model(CHANNEL_FIRST).SerializeToString()
    cases: Any = {"images": {"x": 1}}
    found = compiling.parity.parity_of(recipe(precision="float16"), Described(kind), cases, data, "traced")  # type: ignore[arg-type]
    assert found == "report"  # type: ignore[comparison-overlap]
    reference = told["reference"]
    assert isinstance(reference, TorchRunner) and reference._double is (kind == "module")
    assert (reference._reference.plan, reference._reference.traced) == (PLAN, "traced")
    assert told["cases"] == {**cases, "further": {"of": "traced"}}
    assert told["tolerance"] == tolerance_for("float16")
    assert told["paths"] == {1: "layers.0", 2: "layers.1"}
    assert told["target"].name == "onnxruntime"
    compiling.parity.parity_of(recipe(), Described(kind), cases, data, native=True)  # type: ignore[arg-type]
    assert told["cases"] == cases and told["tolerance"] == tolerance_for("float32")
    assert told["target"].name == NATIVE and told["reference"]._reference.traced is None


def exported(**more: Any) -> Any:
    values = {"traced": "traced", "float32": "float32 model", "ranges": None, "cast": None, **more}
    return SimpleNamespace(**values)


def judged(passed: bool) -> Any:
    return SimpleNamespace(passed=passed, describe_failure=lambda: "it departs", to_dict=lambda: {"worst": 3})


LOCALISED = SimpleNamespace(describe=lambda: "block_2 restores it", advice=lambda: "keep it")


def test_golden_files_are_written_when_parity_holds(tmp_path: Path, keep: Keep) -> None:
    (tmp_path / MODEL).write_bytes(b"model")
    report = judged(True)
    asked = keep(compiling.parity, "parity_of", report)
    written = keep(golden, "write_golden")
    cases: Any = {"images": "feeds"}
    found = compiling.parity.validate(recipe(), SOURCE, cases, exported(), tmp_path, PROGRESS)
    assert found is report
    assert asked == {
        "recipe": recipe(),
        "source": SOURCE,
        "cases": cases,
        "onnx_bytes": b"model",
        "traced": "traced",
        "progress": PROGRESS,
        "native": False,
        "execution": ON_CPU,
    }
    reference = written.pop("reference")
    assert (reference.plan, reference.traced) == (PLAN, "traced")
    assert written == {"directory": tmp_path, "cases": cases}


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_failure_of_parity_says_what_to_do(precision: str, tmp_path: Path, keep: Keep) -> None:
    (tmp_path / MODEL).write_bytes(b"model")
    keep(compiling.parity, "parity_of", judged(False))
    tried = keep(compiling.parity, "localise_precision", LOCALISED)
    written = keep(golden, "write_golden")
    own = recipe(precision=precision)
    words = "please report this with the recipe" if precision == "float32" else "block_2 restores it. keep it"
    cases: Any = {"images": "feeds"}
    typed = exported()
    with pytest.raises(ParityError) as refused:
        compiling.parity.validate(own, SOURCE, cases, typed, tmp_path, PROGRESS)
    assert str(refused.value) == f"it departs. Nothing was written; {words}."
    assert written == {}
    half = {"recipe": own, "source": SOURCE, "cases": cases, "exported": typed, "progress": PROGRESS}
    assert tried == ({} if precision == "float32" else half)


def test_a_given_reference_is_compared_with_the_unpruned_graph() -> None:
    traced = SimpleNamespace(model=text_model(CHANNEL_FIRST))
    seen: list[bytes] = []

    def check(data: bytes) -> dict[str, bool]:
        seen.append(data)
        return {"passed": True}

    own: Any = SimpleNamespace(check=check)
    assert compiling.parity.check_given(None, exported(traced=traced), SILENT) is None
    assert compiling.parity.check_given(own, exported(traced=traced), SILENT) == {"passed": True}
    (data,) = seen
    model = onnx.load_from_string(data)
    assert model == lower(infer_shapes(traced.model)) and model.functions


# Faults of precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scanned", [False, True])
def test_localising_keeps_in_float32_what_was_kept(scanned: bool, keep: Keep) -> None:
    told = keep(localise, "localise", "report")
    own = recipe(precision="bfloat16", keep_float32=("Conv_1",), blocks_float32=(2,))
    typed = exported(ranges=SimpleNamespace(keep_float32=("Exp_3",)) if scanned else None)
    cases: Any = {"images": "feeds"}
    found = compiling.localising.localise_precision(own, SOURCE, cases, typed, PROGRESS)
    assert found == "report"  # type: ignore[comparison-overlap]
    reference = told.pop("reference")
    assert isinstance(reference, TorchRunner)
    assert (reference._reference.plan, reference._reference.traced) == (PLAN, "traced")
    assert told == {
        "model": "float32 model",
        "precision": "bfloat16",
        "cases": cases,
        "tolerance": tolerance_for("bfloat16"),
        "keep_float32": ("Conv_1", "Exp_3") if scanned else ("Conv_1",),
        "blocks_float32": (2,),
        "runner": None,
        "progress": PROGRESS,
    }


@pytest.mark.parametrize("scanned", [False, True])
def test_localising_in_an_engine_builds_each_in_a_folder_of_its_own(
    scanned: bool, keep: Keep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = keep(golden, "read_golden", ({"images": "feeds"}, ["outputs"]))
    keep(golden, "golden_runner", "golden")
    target = object()
    monkeypatch.setattr(compiling.localising, "load_target", {"tensorrt": target}.__getitem__)
    told, folders = keep(localise, "localise", "report"), []

    def engine_runner(name: str, target: Any, folder: Path, options: EngineOptions) -> Any:
        assert folder.is_dir() and options.cache is not None and options.cache.parent == folder.parent
        folders.append(folder)
        return name, target, dataclasses.replace(options, cache=None)

    monkeypatch.setattr(engines, "engine_runner", engine_runner)
    own = recipe(precision="float16", engine=OPTIONS, keep_float32=("Conv_1",), blocks_float32=(2,))
    typed = exported(ranges=SimpleNamespace(keep_float32=("Exp_3",)) if scanned else None)
    found = compiling.localising.localise_engine(own, typed, "tensorrt", tmp_path, ("images",), PROGRESS)
    assert found == "report"  # type: ignore[comparison-overlap]
    assert read == {"directory": tmp_path, "names": ("images",)}
    assert told == {
        "model": "float32 model",
        "precision": "float16",
        "reference": "golden",
        "cases": {"images": "feeds"},
        "tolerance": tolerance_for("float16"),
        "keep_float32": ("Conv_1", "Exp_3") if scanned else ("Conv_1",),
        "blocks_float32": (2,),
        "runner": ("tensorrt", target, OPTIONS),
        "progress": PROGRESS,
    }
    (folder,) = folders
    assert not folder.parent.exists() and folder.parent.name.startswith("quartermap-localise-")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_engine_is_proved_with_the_plugin_and_advice(precision: str, keep: Keep, tmp_path: Path) -> None:
    told = keep(engines, "prove_engine", {"run": True})
    tried = keep(compiling.engines, "localise_engine", LOCALISED)
    own = recipe(precision=precision, engine=EngineOptions(plugin=tmp_path / "plugin.so"))
    target: Any = object()
    typed, names = exported(), ("images",)
    settings = (own, typed, "tensorrt", target, tmp_path, {"file": "engine"}, names, PROGRESS)
    assert compiling.engines.prove(*settings) == {"run": True}
    advice = told.pop("advice")
    assert told == {
        "name": "tensorrt",
        "target": target,
        "folder": tmp_path,
        "entry": {"file": "engine"},
        "precision": precision,
        "golden": names,
        "plugin": tmp_path / "plugin.so",
        "progress": PROGRESS,
    }
    if precision == "float32":
        assert advice() == "please report this with the recipe." and tried == {}
        return
    assert advice() == "block_2 restores it. keep it."
    assert tried == {
        "recipe": own,
        "exported": typed,
        "name": "tensorrt",
        "bundle": tmp_path,
        "golden": names,
        "progress": PROGRESS,
    }


# The line that all of it stands in --------------------------------------------------------------------------------


@pytest.mark.parametrize("default", [True, False])
def test_everything_that_was_found_is_in_the_bundle(
    default: bool, tmp_path: Path, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [*(["onnxruntime"] if default else []), "tensorrt-rtx", "tensorrt"]
    own, model = recipe(engine=OPTIONS, targets=tuple(names)), SOURCE
    cases = {"images": {"images": np.zeros((2, 3, 4, 4))}, "large values": {"images": np.zeros((1, 3, 4, 4))}}
    typed = exported(model=text_model(CHANNEL_FIRST))
    built: list[Any] = []

    def target(name: str) -> Any:
        def build(path: Path, folder: Path, options: EngineOptions, **more: Any) -> dict[str, str]:
            assert path == folder / MODEL and path.read_bytes() == typed.model.SerializeToString()
            built.append((name, options, more))
            return {"file": name}

        return SimpleNamespace(build=build)

    targets: Any = {name: target(name) for name in names}
    proved: list[Any] = []

    def prove(*arguments: Any) -> dict[str, str]:
        proved.append((*arguments[:4], *arguments[5:]))
        return {"proof": f"of {arguments[2]}"}

    monkeypatch.setattr(compiler, "prove", prove)
    checked = keep(compiler, "check_settings")
    keep(compiler, "validation_cases", cases)
    exporting = keep(compiler, "export_model", typed)
    validated = keep(compiler, "validate", judged(True))
    compared = keep(compiler, "check_given", "given entry")
    native = keep(compiler, "prove_native", "native entry")
    described = keep(compiler, "make_manifest", {"manifest": 1})
    monkeypatch.setattr(compiler, "load_bundle", lambda folder: Bundle(folder, {"loaded": 1}, {}))
    out = tmp_path / "out"
    out.mkdir()
    bundle = compiler._compile(own, model, targets, out, "given", PROGRESS)  # type: ignore[arg-type]
    assert (bundle.path, bundle.manifest) == (out, {"loaded": 1})
    entries = {
        name: {"file": name, **({} if name == "onnxruntime" else {"proof": f"of {name}"})} for name in names
    }
    assert described == {
        "recipe": own,
        "source": model,
        "exported": typed,
        "golden": ["images"],
        "folder": out,
        "targets": entries,
    }
    assert checked == {"recipe": own, "source": model, "cases": cases}
    assert exporting == {"recipe": own, "source": model, "progress": PROGRESS, "traced": None}
    assert validated == {
        "recipe": own,
        "source": model,
        "cases": cases,
        "exported": typed,
        "folder": out,
        "progress": PROGRESS,
    }
    assert compared == {"given": "given", "exported": typed, "progress": PROGRESS}
    examples = [{"images": (2, 3, 4, 4)}, {"images": (1, 3, 4, 4)}]
    assert built == [(name, OPTIONS, {"examples": examples, "progress": PROGRESS}) for name in names]
    engines_in_order = sorted(set(names) - {"onnxruntime"})
    assert proved == [
        (own, typed, name, targets[name], entries[name], ["images"], PROGRESS) for name in engines_in_order
    ]
    asked = {
        "folder": out,
        "model": MODEL,
        "golden": ["images"],
        "precision": "float32",
        "progress": PROGRESS,
    }
    assert native == (asked if default else {})
    assert json.loads((out / REPORT).read_text()) == {
        "worst": 3,
        "native": "native entry" if default else None,
        "execution": None,
        "given_reference": "given entry",
    }
    assert json.loads((out / MANIFEST).read_text()) == {"manifest": 1}
    compiler._compile(own, model, targets, out, None, PROGRESS)
    assert compared["given"] is None


def test_the_destination_is_held_from_the_start(
    tmp_path: Path, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two into one folder, the second is told before its model is loaded."""
    out, worked = tmp_path / "out", []
    monkeypatch.setattr(compiler, "load_targets", lambda recipe: {})
    monkeypatch.setattr(compiler, "load_reference", lambda recipe, source: None)

    def loading(recipe: qm.Recipe) -> Any:
        worked.append(1)
        if len(worked) == 1:
            with pytest.raises(BundleError, match=r"another process is writing .*out now"):
                qm.compile(own, out)
        return SOURCE

    own = recipe()
    monkeypatch.setattr(compiler, "load_source", loading)
    finished = Bundle(tmp_path / "draft", {}, {})
    monkeypatch.setattr(compiler, "_compile", lambda *arguments: finished)
    assert qm.compile(own, out).path == out
    assert worked == [1] and [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(BundleError, match="exists already"):
        qm.compile(own, out)
