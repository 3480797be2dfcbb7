"""Steps of the compiler by themselves: what is refused before the export, what reaches the export, what is reported."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_parity_gate import source

import quartermap_deploy as qm
from quartermap_deploy import compiler, compiling
from quartermap_deploy.errors import PlanError, RecipeError
from quartermap_deploy.exporting import export as export_module
from quartermap_deploy.progress import SILENT

PLAN = qm.QuarterMap(blocks=(2,))


def recipe(**settings: Any) -> qm.Recipe:
    return qm.Recipe("Classifier", **{"quartermap": PLAN, **settings})


def test_settings_that_do_not_fit_are_refused_before_the_export(tmp_path: Any, monkeypatch: Any) -> None:
    def no_export(*arguments: Any) -> Any:
        raise AssertionError("exported, though the settings do not fit")

    monkeypatch.setattr(compiler, "export_model", no_export)
    wrong = [
        (
            recipe(precision="float16", blocks_float32=(1, 3)),
            RecipeError,
            "blocks_float32 names block 3, but Classifier has 2 blocks",
        ),
        (recipe(quartermap=qm.QuarterMap(blocks=(3,))), PlanError, "3"),
    ]
    cases = compiling.cases.validation_cases(recipe(), source())
    for found, kind, words in wrong:
        with pytest.raises(kind, match=words):
            compiling.settings.check_settings(found, source(), cases)
        with pytest.raises(kind, match=words):
            compiler._compile(found, source(), {}, tmp_path / "out", None, SILENT)
    compiling.settings.check_settings(recipe(precision="float16", blocks_float32=(1, 2)), source(), cases)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_the_export_is_told_what_the_recipe_says(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def export(model: Any, plan: Any, **settings: Any) -> str:
        told.update(settings, source=model, plan=plan)
        return "exported"

    monkeypatch.setattr(export_module, "export", export)
    half: dict[str, Any] = (
        {} if precision == "float32" else {"io": "same", "keep_float32": ("Conv_1",), "blocks_float32": (1,)}
    )
    wanted = recipe(precision=precision, optimize=False, **half)
    traced: Any = object()
    assert compiling.export.export_model(wanted, source(), SILENT, traced) == "exported"
    calibration = told.pop("calibration")
    assert told == {
        "source": source(),
        "plan": PLAN,
        "precision": precision,
        "inline": False,
        "opset": None,
        "io": half.get("io", "float32"),
        "keep_float32": half.get("keep_float32", ()),
        "blocks_float32": half.get("blocks_float32", ()),
        "optimize": False,
        "traced": traced,
    }
    if precision != "float16":
        assert calibration is None
        return
    cases = compiling.cases.validation_cases(wanted, source(), compiling.export.CALIBRATION_IMAGES)
    assert calibration.keys() == cases["images"].keys()
    for name, images in cases["images"].items():
        np.testing.assert_array_equal(calibration[name], images)
        assert len(images) == compiling.export.CALIBRATION_IMAGES > 2


def test_the_report_says_what_16_bits_did() -> None:
    cast = SimpleNamespace(precision="float16", operators=7, casts=2, kept={"Exp": 1}, subnormal=3)
    ranges = SimpleNamespace(to_dict=lambda: {"largest": 9})
    exported: Any = SimpleNamespace(cast=cast, ranges=ranges)
    expected = {
        "type": "float16",
        "operators": 7,
        "casts": 2,
        "kept_float32": {"Exp": 1},
        "subnormal_weights": 3,
        "ranges": {"largest": 9},
    }
    assert compiling.export.precision_entry(exported) == {"precision": expected}
    exported.ranges = None
    assert compiling.export.precision_entry(exported) == {"precision": {**expected, "ranges": None}}
    exported.cast = None
    assert compiling.export.precision_entry(exported) == {}
