"""The gate of compiling: a bundle is written below the tolerances, and none above them."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import toy_modules
from onnx import helper, numpy_helper
from toy_bundles import PREPROCESSING, _random

import quartermap_deploy as qm
from quartermap_deploy import compiler, compiling
from quartermap_deploy.bundle import new_bundle
from quartermap_deploy.errors import ParityError
from quartermap_deploy.exporting.export import Export
from quartermap_deploy.frontend.node_names import block_output, scan_name
from quartermap_deploy.lowering.operator import INPUTS_2D
from quartermap_deploy.progress import SILENT
from quartermap_deploy.sources.modules import module_source
from quartermap_deploy.validation.tolerances import tolerance_for

PLAN = qm.QuarterMap(blocks=(2,))
LIMIT = tolerance_for("float32")


@functools.cache
def source() -> Any:
    return module_source(
        toy_modules.Classifier().eval(), _random(2, 3, 32, 32), name="Classifier", preprocessing=PREPROCESSING
    )


@functools.cache
def right() -> Export:
    """The classifier as it is to be."""
    return compiling.export.export_model(qm.Recipe("Classifier", quartermap=PLAN), source(), SILENT)


def faulty(value: str, error: float) -> onnx.ModelProto:
    """Return the model with a value, or what the first scan adds of its input (D), off by a relative error."""
    if value != "scan":
        return scaled(value, error)
    return with_skip(error / (worst(with_skip(1e-3), scan_name(1)) / 1e-3))


def with_skip(by: float) -> onnx.ModelProto:
    """Return the model with D of the first scan this share too large. The error of the scan is in proportion."""
    changed = onnx.ModelProto()
    changed.CopyFrom(right().model)
    (scan,) = (node for node in changed.graph.node if node.name == scan_name(1))
    name = scan.input[INPUTS_2D.index("D")]
    (tensor,) = (item for item in changed.graph.initializer if item.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1 + by), name))
    return changed


def worst(model: onnx.ModelProto, output: str) -> float:
    """Return the largest error of an output, over all cases."""
    recipe = qm.Recipe("Classifier", quartermap=PLAN)
    cases = compiling.cases.validation_cases(recipe, source())
    report = compiling.parity.parity_of(recipe, source(), cases, model.SerializeToString(), right().traced)
    return max(o.relative_error for outputs in report.cases.values() for o in outputs if o.name == output)


def scaled(value: str, by: float) -> onnx.ModelProto:
    """Return the model with one value this share too large."""
    changed = onnx.ModelProto()
    changed.CopyFrom(right().model)
    nodes = list(changed.graph.node)
    (place,) = (place for place, node in enumerate(nodes) if value in node.output)
    nodes[place].output[list(nodes[place].output).index(value)] = "right"
    factor = numpy_helper.from_array(np.array(1 + by, np.float32), "factor")
    changed.graph.initializer.append(factor)
    changed.graph.node.insert(place + 1, helper.make_node("Mul", ["right", factor.name], [value]))
    return changed


def compile_with(model: onnx.ModelProto, out: Path, monkeypatch: pytest.MonkeyPatch) -> qm.Bundle:
    """Compile the classifier, with a model in the place of the right one."""
    exported = dataclasses.replace(right(), model=model)
    monkeypatch.setattr(compiler, "export_model", lambda *arguments: exported)
    recipe = qm.Recipe("Classifier", quartermap=PLAN)
    with new_bundle(out) as folder:
        bundle = compiler._compile(
            recipe, source(), compiling.targets.load_targets(qm.Recipe("Classifier")), folder, None, SILENT
        )
    return dataclasses.replace(bundle, path=out)


FAULTS = [
    ("logits", LIMIT.relative, "logits departs, though no block does by itself"),
    (block_output(2), LIMIT.of_block, r"block 2 \(.*\) is the first that departs, behind its scan"),
    ("scan", LIMIT.of_block, r"block 1 \(.*\) is the first that departs, in or before its scan"),
]
"""What departs, the tolerance that it has, and what is said about it."""


@pytest.mark.parametrize(("value", "tolerance", "words"), FAULTS, ids=["output", "block", "scan"])
def test_a_fault_just_above_its_tolerance_is_refused_and_one_just_below_is_not(
    value: str, tolerance: float, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    above = faulty(value, 1.3 * tolerance)
    with pytest.raises(ParityError, match=words):
        compile_with(above, tmp_path / "above", monkeypatch)
    assert list(tmp_path.iterdir()) == []
    below = compile_with(faulty(value, 0.7 * tolerance), tmp_path / "below", monkeypatch)
    errors = [
        output["relative_error"]
        for case in below.report["cases"]
        for output in case["outputs"]
        if output["name"] == (scan_name(1) if value == "scan" else value)
    ]
    assert below.report["passed"] and max(errors) == pytest.approx(0.7 * tolerance, rel=0.1)


def test_a_recipe_says_what_stays_in_float32() -> None:
    """Both settings reach the graph: a block by its number, and an operator by its name."""
    free = _export("float16")
    kept = _export("float16", blocks_float32=(1,))
    assert _scan_type(free, 1) == _scan_type(free, 2) == _scan_type(kept, 2) == onnx.TensorProto.FLOAT16
    assert _scan_type(kept, 1) == onnx.TensorProto.FLOAT
    first = next(node.name for node in free.graph.node if node.op_type == "Conv")
    named = _export("float16", keep_float32=(first,))
    assert _weight_type(free, first) == onnx.TensorProto.FLOAT16
    assert _weight_type(named, first) == onnx.TensorProto.FLOAT


def _export(precision: str, **settings: Any) -> onnx.ModelProto:
    recipe = qm.Recipe("Classifier", quartermap=PLAN, precision=precision, **settings)
    return compiling.export.export_model(recipe, source(), SILENT, right().traced).model


def _scan_type(model: onnx.ModelProto, block: int) -> int:
    types = {item.name: item.type.tensor_type.elem_type for item in model.graph.value_info}
    (scan,) = (node for node in model.graph.node if node.name == scan_name(block))
    return types[scan.input[0]]


def _weight_type(model: onnx.ModelProto, name: str) -> int:
    (node,) = (node for node in model.graph.node if node.name == name)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return types[node.input[1]]
