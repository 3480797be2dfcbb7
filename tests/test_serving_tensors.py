"""`quartermap serve` for bundles of other tasks: several inputs and outputs, other types, masks, images, size rules."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_bundles
from deploy_bundles import change_manifest, dynamic_bundle
from PIL import Image
from served import Served, ask, close, file_of, files, form, serving, tensor
from task_bundles import (
    SEGMENTS,
    judge_bundle,
    pooled_bundle,
    restorer_bundle,
    segmenter_bundle,
    words_bundle,
)

import quartermap_deploy as qm
from quartermap_deploy.data.images import prepare, sample_photographs
from quartermap_deploy.errors import QuartermapError, ServeError
from quartermap_deploy.serving.options import ServeOptions
from quartermap_deploy.serving.page import page_values
from quartermap_deploy.serving.startup import Plan, check_golden, make_plan, open_sessions

tritonhttp = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
tritongrpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
from tritonclient.utils import InferenceServerException  # noqa: E402

Array = np.ndarray[Any, Any]
PHOTOGRAPHS = list(sample_photographs().values())


def plan_of(bundle: Path, **options: Any) -> Plan:
    return make_plan(qm.load_bundle(bundle), ServeOptions(**options))


def client_of(module: Any, server: Served, **settings: Any) -> Any:
    return module.InferenceServerClient(server.http if module is tritonhttp else server.grpc, **settings)


# Several inputs and outputs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def change() -> Iterator[Served]:
    with serving(toy_bundles.change(), "--max-delay-ms", 50) as running:
        yield running


@pytest.mark.parametrize("module", [tritonhttp, tritongrpc], ids=["http", "grpc"])
def test_several_inputs_and_outputs_over_both_protocols(change: Served, module: Any) -> None:
    bundle = qm.load_bundle(toy_bundles.change())
    random = np.random.default_rng(0)
    given = {name: random.standard_normal((3, 3, 32, 48)).astype(np.float32) for name in ("first", "second")}
    expected = bundle.run(given)
    assert isinstance(expected, dict)
    with client_of(module, change) as client:
        # The order of a request's inputs is its own.
        inputs = [tensor(module, name, given[name]) for name in ("second", "first")]
        answer = client.infer("Change", inputs)
        for name, values in expected.items():
            assert close(answer.as_numpy(name), values)
        only = client.infer("Change", inputs, outputs=[module.InferRequestedOutput("score")])
        assert close(only.as_numpy("score"), expected["score"]) and only.as_numpy("change") is None
        with pytest.raises(InferenceServerException, match="expected 'first', 'second', each once"):
            client.infer("Change", inputs[:1])
        with pytest.raises(InferenceServerException, match="'first' is a batch of 2, and 'second' one of 3"):
            client.infer("Change", [inputs[0], tensor(module, "first", given["first"][:2])])


def test_requests_with_several_inputs_are_batched_together_and_get_their_own_answers(change: Served) -> None:
    bundle = qm.load_bundle(toy_bundles.change())
    random = np.random.default_rng(1)
    first, second = (random.standard_normal((6, 3, 32, 48)).astype(np.float32) for _ in range(2))
    expected = bundle.run({"first": first, "second": second})
    assert isinstance(expected, dict)
    with tritonhttp.InferenceServerClient(change.http, concurrency=6) as client:
        calls = [
            client.async_infer(
                "Change",
                [tensor(tritonhttp, "first", one[None]), tensor(tritonhttp, "second", other[None])],
            )
            for one, other in zip(first, second, strict=True)
        ]
        for place, call in enumerate(calls):
            answer = call.get_result()
            for name, values in expected.items():
                assert close(answer.as_numpy(name), values[place : place + 1])
        (found,) = client.get_inference_statistics("Change")["model_stats"]
    assert max(entry["batch_size"] for entry in found["batch_stats"]) > 1


def test_metadata_and_configuration_have_every_tensor(change: Served) -> None:
    with tritonhttp.InferenceServerClient(change.http) as client:
        metadata, config = client.get_model_metadata("Change"), client.get_model_config("Change")
        assert [entry["name"] for entry in client.get_model_repository_index()] == ["Change"]
    assert metadata["inputs"] == [
        {"name": name, "datatype": "FP32", "shape": [-1, 3, 32, 48]} for name in ("first", "second")
    ]
    assert [one["name"] for one in metadata["outputs"]] == ["change", "score"]
    assert config["max_batch_size"] == 8 and [one["dims"] for one in config["output"]] == [[1, 8, 12], [1]]
    with tritongrpc.InferenceServerClient(change.grpc) as client:
        message = client.get_model_metadata("Change")
        assert [list(one.shape) for one in message.outputs] == [[-1, 1, 8, 12], [-1, 1]]


def test_without_an_image_input_files_are_refused_and_the_page_says_why(change: Served) -> None:
    for path in ("/classify", "/picture"):
        status, _, body = ask(change, "POST", path, file_of(PHOTOGRAPHS[0]), Content_Type="image/png")
        message = json.loads(body)["error"]
        assert status == 404 and "the model takes first (batch, 3, 32, 48) and second" in message
    status, _, body = ask(change, "GET", "/")
    assert status == 200 and b"an image file is one input alone" in body


@pytest.mark.parametrize("module", [tritonhttp, tritongrpc], ids=["http", "grpc"])
def test_whole_numbers_and_truth_values(module: Any) -> None:
    bundle = qm.load_bundle(words_bundle())
    random = np.random.default_rng(0)
    tokens, keep = random.integers(0, 16, (2, 12)), random.random((2, 12)) < 0.5
    expected = bundle.run({"tokens": tokens, "keep": keep})
    assert isinstance(expected, dict)
    with serving(bundle.path) as server, client_of(module, server) as client:
        answer = client.infer("words", [tensor(module, "tokens", tokens), tensor(module, "keep", keep)])
        assert close(answer.as_numpy("scores"), expected["scores"])
        best = answer.as_numpy("best")
        assert best.dtype == np.int64 and best.tolist() == expected["best"].tolist()
        with pytest.raises(InferenceServerException, match="'INT32', the model takes INT64"):
            client.infer(
                "words", [tensor(module, "tokens", tokens.astype(np.int32)), tensor(module, "keep", keep)]
            )
        if module is tritonhttp:
            request = {
                "inputs": [
                    {"name": "tokens", "shape": [2, 12], "datatype": "INT64", "data": tokens.tolist()},
                    {"name": "keep", "shape": [2, 12], "datatype": "BOOL", "data": keep.tolist()},
                ]
            }
            body = json.dumps(request).encode()
            status, _, answer = ask(server, "POST", "/v2/models/words/infer", body)
            outputs = {one["name"]: one for one in json.loads(answer)["outputs"]}
            assert status == 200 and outputs["best"]["data"] == expected["best"].tolist()


def test_outputs_that_share_no_batch_are_computed_for_one_request_at_a_time() -> None:
    bundle = qm.load_bundle(pooled_bundle())
    assert plan_of(bundle.path).no_images == "its outputs do not belong to single images"
    images = np.random.default_rng(0).standard_normal((5, 3, 32, 32)).astype(np.float32)
    with (
        serving(bundle.path, "--max-delay-ms", 60_000) as server,
        tritonhttp.InferenceServerClient(server.http, concurrency=5) as client,
    ):
        assert client.get_model_config("pooled")["max_batch_size"] == 0
        # Nobody waits for others here, though a delay is allowed.
        calls = [client.async_infer("pooled", [tensor(tritonhttp, "x", image[None])]) for image in images]
        for image, call in zip(images, calls, strict=True):
            expected, answer = bundle.run({"x": image[None]}), call.get_result()
            assert isinstance(expected, dict) and answer.as_numpy("total").shape == ()
            assert all(close(answer.as_numpy(name), expected[name]) for name in expected)
        with pytest.raises(InferenceServerException, match="a batch of 9, at most 8"):
            client.infer("pooled", [tensor(tritonhttp, "x", np.repeat(images, 2, axis=0)[:9])])


# Sizes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def restorer() -> Iterator[Served]:
    with serving(restorer_bundle()) as running:
        yield running


@pytest.mark.parametrize("module", [tritonhttp, tritongrpc], ids=["http", "grpc"])
def test_sizes_that_the_module_does_not_take_are_refused_as_such(restorer: Served, module: Any) -> None:
    bundle = qm.load_bundle(restorer_bundle())
    with client_of(module, restorer) as client:
        for size in ((1, 1, 32, 32), (2, 1, 48, 64)):
            images = np.random.default_rng(0).random(size).astype(np.float32)
            found = client.infer("restorer", [tensor(module, "x", images)]).as_numpy("image")
            assert close(found, np.asarray(bundle.run(images)))
        with pytest.raises(
            InferenceServerException, match=r"exported for sizes with \(x\[2\] % 4\)"
        ) as caught:
            client.infer("restorer", [tensor(module, "x", np.zeros((1, 1, 30, 32), np.float32))])
        assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")


def test_an_image_for_an_image(restorer: Served) -> None:
    bundle = qm.load_bundle(restorer_bundle())
    grey = [np.asarray(Image.fromarray(image).convert("L")) for image in PHOTOGRAPHS]
    body, kind = form(("a.png", file_of(grey[0])), ("b.png", file_of(grey[1])))
    status, _, answer = ask(restorer, "POST", "/picture", body, Content_Type=kind)
    assert status == 200
    for entry, one in zip(json.loads(answer)["images"], bundle.predict(grey), strict=True):
        with Image.open(io.BytesIO(base64.b64decode(entry["picture"]))) as picture:
            # In other batches values are rounded otherwise.
            difference = np.asarray(picture).astype(int) - one.pixels
            assert picture.mode == "L" and entry["size"] == [32, 32] and np.abs(difference).max() <= 1
    # The same over the protocol, as the network returns it.
    with tritonhttp.InferenceServerClient(restorer.http) as client:
        metadata = client.get_model_metadata("restorer_image")
        # The model's own output is called image already.
        assert [one["name"] for one in metadata["inputs"]] == ["image_2"]
        found = client.infer("restorer_image", [tensor(tritonhttp, "image_2", files(file_of(grey[0])))])
    assert close(found.as_numpy("image")[0], bundle.predict(grey[0])[0].values)


# Masks, probabilities, overrides --------------------------------------------------------------------------------


def test_a_mask_for_an_image() -> None:
    bundle = qm.load_bundle(segmenter_bundle())
    with serving(bundle.path) as server:
        status, _, answer = ask(server, "POST", "/picture", file_of(PHOTOGRAPHS[0]), Content_Type="image/png")
        (entry,) = json.loads(answer)["images"]
        (one,) = bundle.predict(PHOTOGRAPHS[0])
        with Image.open(io.BytesIO(base64.b64decode(entry["picture"]))) as picture:
            assert status == 200 and picture.mode == "P"
            assert (np.asarray(picture) != one.mask).mean() < 0.01
            colors = picture.convert("RGB").getcolors()
        assert {part["label"] for part in entry["classes"]} == {SEGMENTS[index] for index in one.shares}
        assert {part["color"] for part in entry["classes"]} == {
            f"#{bytes(color).hex()}" for _, color in colors
        }
        assert sum(part["share"] for part in entry["classes"]) == pytest.approx(1)
        status, _, answer = ask(
            server, "POST", "/classify", file_of(PHOTOGRAPHS[0]), Content_Type="image/png"
        )
        assert status == 404 and "POST /picture" in json.loads(answer)["error"]
        with tritonhttp.InferenceServerClient(server.http) as client:
            given = [tensor(tritonhttp, "image", files(*map(file_of, PHOTOGRAPHS)))]
            logits = client.infer("segmenter_image", given).as_numpy("logits")
        expected = bundle.run(prepare(PHOTOGRAPHS, bundle.preprocessing))
        assert close(logits, np.asarray(expected))


def test_probabilities_of_a_model_that_gives_them_itself_with_labels_of_ones_own(tmp_path: Path) -> None:
    bundle = qm.load_bundle(judge_bundle())
    (tmp_path / "labels").write_text("guilty\nnot guilty\nundecided\n")
    expected = np.asarray(bundle.run(prepare(PHOTOGRAPHS[:1], bundle.preprocessing)))[0]
    with serving(bundle.path, "--labels", tmp_path / "labels", "--name", "judge") as server:
        status, _, answer = ask(
            server, "POST", "/classify?top=3", file_of(PHOTOGRAPHS[0]), Content_Type="image/png"
        )
        classes = json.loads(answer)["images"][0]["classes"]
    assert status == 200 and [one["class"] for one in classes] == np.argsort(-expected).tolist()
    names = ["guilty", "not guilty", "undecided"]
    for one in classes:
        assert one["label"] == names[one["class"]]
        assert one["probability"] == pytest.approx(float(expected[one["class"]]), abs=1e-6)


def test_a_preprocessing_of_ones_own_is_the_one_that_is_used() -> None:
    bundle = qm.load_bundle(judge_bundle())
    overrides = {"mean": [0.0] * 4, "std": [1.0] * 4}
    arguments = ["--preprocessing", "mean=0,0,0,0", "std=1,1,1,1"]
    with serving(bundle.path, *arguments) as server:
        _, _, answer = ask(server, "POST", "/classify", file_of(PHOTOGRAPHS[1]), Content_Type="image/png")
    found = {one["class"]: one["probability"] for one in json.loads(answer)["images"][0]["classes"]}
    (expected,) = bundle.predict(PHOTOGRAPHS[1], preprocessing=overrides)
    (plain,) = bundle.predict(PHOTOGRAPHS[1])
    for score in expected.scores:
        assert found[score.index] == pytest.approx(score.probability, abs=1e-6)
    without = {score.index: score.probability for score in plain.scores}
    assert max(abs(found[index] - without[index]) for index in found) > 1e-2


# Plans ----------------------------------------------------------------------------------------------------------


def test_plans_tell_what_there_is_to_see(tmp_path: Path) -> None:
    shown = {
        dynamic_bundle: "classes",
        judge_bundle: "classes",
        segmenter_bundle: "mask",
        restorer_bundle: "image",
        toy_bundles.change: None,
        words_bundle: None,
    }
    for bundle, shows in shown.items():
        plan = plan_of(bundle())
        assert (plan.images and plan.images.shows) == shows and bool(plan.no_images) == (shows is None)
        values = page_values(plan)
        assert values["shows"] == shows and json.dumps(values)
        assert values["inputs"] == plan.bundle.manifest["inputs"]
    bare = Path(shutil.copytree(dynamic_bundle(), tmp_path / "bare"))
    change_manifest(bare, preprocessing=None)
    plan = plan_of(bare)
    assert plan.images is None and "does not say how an image becomes its input" in plan.no_images
    plan = plan_of(bare, preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3})
    assert plan.images is not None and plan.images.interface.preprocessing.crop == (64, 64)
    # The scale of its values is unknown, so there is no image to show.
    plan = plan_of(restorer_bundle(), preprocessing={"mean": [0.5], "std": [0.5]})
    assert plan.images is not None and plan.images.shows == "tensors"


def test_all_golden_inputs_and_outputs_are_compared() -> None:
    plan = plan_of(words_bundle())
    sessions = open_sessions(plan).different()
    assert check_golden(plan, sessions) < 1e-5

    class Spoilt:
        inputs, outputs = sessions[0].inputs, sessions[0].outputs

        def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
            found = sessions[0].infer(feeds)
            return {**found, "best": found["best"] + 1}

    with pytest.raises(QuartermapError, match="departs from the golden outputs on 'single example', in best"):
        check_golden(plan, [Spoilt()])  # type: ignore[list-item]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(QuartermapError, match="an image file is one input alone"):
        plan_of(words_bundle(), preprocessing={"mean": [0.5]})
    with pytest.raises(QuartermapError, match="a preprocessing is for image files"):
        plan_of(pooled_bundle(), preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3})
    with pytest.raises(QuartermapError, match="makes images of"):
        plan_of(dynamic_bundle(), preprocessing={"crop": [8, 8]})
    with pytest.raises(QuartermapError, match="tells none apart"):
        plan_of(toy_bundles.change(), labels=Path("digits"))
    with pytest.raises(ServeError, match="holds no batch of 8"):
        plan_of(toy_bundles.change(), queue=4)


def test_the_room_in_memory_is_that_of_all_inputs() -> None:
    assert plan_of(toy_bundles.change()).image_bytes == 2 * 4 * 3 * 32 * 48
    assert plan_of(words_bundle()).image_bytes == 12 * 8 + 12
    assert plan_of(restorer_bundle()).image_bytes == 4 * 32 * 32
