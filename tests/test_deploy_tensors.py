"""`quartermap deploy` for bundles of other tasks: several inputs and outputs, other types and colours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import toy_bundles
from command_line import call
from task_bundles import (
    judge_bundle,
    pooled_bundle,
    restorer_bundle,
    words_bundle,
)
from triton_repositories import models, read_config, warmup_batch
from tritonclient.grpc import model_config_pb2

import quartermap_deploy as qm
from quartermap_deploy.data.images import sample_photographs
from quartermap_deploy.deploy.triton import TritonOptions, deploy_triton
from quartermap_deploy.errors import QuartermapError
from quartermap_deploy.validation.golden import read_golden

Array = np.ndarray[Any, Any]
PHOTOGRAPHS = list(sample_photographs().values())


def tensors(values: Any) -> list[tuple[str, str, list[int]]]:
    """Names, types and shapes of the inputs or outputs of a configuration."""
    return [(one.name, model_config_pb2.DataType.Name(one.data_type), list(one.dims)) for one in values]


def run(repository: Path, name: str, feeds: dict[str, Array]) -> dict[str, Array]:
    """Run a model of a repository in ONNX Runtime, as Triton's backend does."""
    path = repository / name / "1" / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = [value.name for value in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, feeds), strict=True))


def test_a_model_of_several_inputs_is_there_alone(tmp_path: Path) -> None:
    made = deploy_triton(toy_bundles.change(), tmp_path / "repository")
    assert models(made.path) == ["Change"] and made.models == {
        "Change": "onnxruntime: first, second → change, score"
    }
    assert any("there are no image models: the model takes first" in note for note in made.notes)
    config = read_config(made.path, "Change")
    assert config.max_batch_size == 8 and config.HasField("dynamic_batching")
    assert tensors(config.input) == [(name, "TYPE_FP32", [3, 32, 48]) for name in ("first", "second")]
    assert tensors(config.output) == [("change", "TYPE_FP32", [1, 8, 12]), ("score", "TYPE_FP32", [1])]
    assert not any(output.label_filename for output in config.output)
    assert not (made.path / "Change" / "labels.txt").exists()


@pytest.mark.parametrize("bundle", [toy_bundles.change, words_bundle, pooled_bundle, restorer_bundle])
def test_warm_up_requests_are_golden_inputs_of_all_inputs(bundle: Any, tmp_path: Path) -> None:
    made = deploy_triton(bundle(), tmp_path / "repository", TritonOptions(images=False))
    loaded = qm.load_bundle(bundle())
    cases, outputs = read_golden(loaded.path, loaded.manifest["golden"])
    case = "images" if "images" in cases else "example"
    golden, expected = cases[case], outputs[list(cases).index(case)]
    (name,) = made.models
    config = read_config(made.path, name)
    for place, sample in enumerate(config.model_warmup):
        assert set(sample.inputs) == {item.name for item in loaded.inputs}
        feeds = {item.name: warmup_batch(made.path, name, sample, item.name) for item in loaded.inputs}
        first = 0 if sample.batch_size > 1 else place
        for item in loaded.inputs:
            wanted = golden[item.name]
            if config.max_batch_size:
                wanted = np.repeat(wanted[first : first + 1], sample.batch_size, axis=0)
            assert feeds[item.name].dtype == item.type and np.array_equal(feeds[item.name], wanted)
        found = run(made.path, name, feeds)
        for key, values in expected.items():
            wanted = values
            if config.max_batch_size:
                wanted = np.repeat(values[first : first + 1], sample.batch_size, axis=0)
            np.testing.assert_allclose(found[key], wanted, atol=1e-4 * np.abs(wanted).max())


def test_types_and_outputs_of_one_axis(tmp_path: Path) -> None:
    made = deploy_triton(words_bundle(), tmp_path / "repository")
    config = read_config(made.path, "words")
    assert tensors(config.input) == [("tokens", "TYPE_INT64", [12]), ("keep", "TYPE_BOOL", [12])]
    # Triton has no shape without axes, so it is told of one that it leaves out.
    scores, best = config.output
    assert (best.name, list(best.dims)) == ("best", [1]) and best.HasField("reshape")
    assert list(best.reshape.shape) == [] and not scores.HasField("reshape")


def test_requests_of_a_model_without_a_batch_are_never_put_together(tmp_path: Path) -> None:
    made = deploy_triton(pooled_bundle(), tmp_path / "repository")
    config = read_config(made.path, "pooled")
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching") and made.max_batch == 0
    assert tensors(config.input) == [("x", "TYPE_FP32", [-1, 3, 32, 32])]
    assert tensors(config.output) == [("features", "TYPE_FP32", [-1, 6, 8, 8]), ("total", "TYPE_FP32", [1])]
    # An empty shape to reshape to, Triton takes with a batch alone.
    assert not config.output[1].HasField("reshape")
    assert any("do not belong to single images" in note for note in made.notes)
    with pytest.raises(QuartermapError, match="one request at a time"):
        deploy_triton(pooled_bundle(), tmp_path / "other", TritonOptions(max_batch=4))


def test_labels_and_preprocessing_of_ones_own_arrive(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("a\nb\nc\n")
    arguments = ["--preprocessing", "mean=0,0,0,0", "std=1,1,1,1", "--labels", tmp_path / "labels"]
    done = call("deploy", "triton", judge_bundle(), "-o", tmp_path / "repository", "--json", *arguments)
    assert done.code == 0 and len(done.json["models"]) == 4
    repository = tmp_path / "repository"
    assert (repository / "judge_image" / "labels.txt").read_text() == "a\nb\nc\n"
    config = read_config(repository, "judge_preprocess")
    settings = json.loads(config.parameters["preprocessing"].string_value)
    assert (settings["mean"], settings["std"], settings["color"]) == ([0.0] * 4, [1.0] * 4, "rgba")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    for bundle, arguments, message in (
        (toy_bundles.change(), ["--preprocessing", "mean=0.5"], "an image file is one input alone"),
        (pooled_bundle(), ["--preprocessing", "mean=0.5"], "a preprocessing is for image files"),
        (judge_bundle(), ["--preprocessing", "crop=8x8"], "makes images of"),
        (words_bundle(), ["--labels", "digits"], "tells none apart"),
    ):
        done = call("deploy", "triton", bundle, "-o", tmp_path / "repository", "--quiet", *arguments)
        assert done.code == 2 and message in done.err and not (tmp_path / "repository").exists()


def test_an_inference_service_of_several_inputs(tmp_path: Path) -> None:
    done = call("deploy", "kserve", toy_bundles.change(), "-o", tmp_path / "change.yaml", "--json")
    assert done.code == 0 and done.json["name"] == "change"
    assert list(done.json["repository"]["models"]) == ["Change"]
    assert tensors(read_config(tmp_path / "change-repository", "Change").input)[1][0] == "second"
