"""`quartermap serve` as its clients see it: Triton's own clients, Prometheus, curl and kubelet."""

from __future__ import annotations

import base64
import io
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy_bundles import change_manifest, dynamic_bundle, static_bundle
from PIL import Image
from served import (
    IMAGE_MODEL,
    MODEL,
    Served,
    ask,
    close,
    digits,
    file_of,
    files,
    form,
    prepared,
    serving,
    tensor,
)

import quartermap_deploy as qm
from quartermap_deploy.data.images import sample_photographs

grpc = pytest.importorskip("grpc", reason="the extra serve is not installed")
tritonhttp = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
tritongrpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
from tritonclient.utils import InferenceServerException  # noqa: E402


@pytest.fixture(scope="module")
def bundle() -> qm.Bundle:
    return qm.load_bundle(dynamic_bundle())


@pytest.fixture(scope="module")
def server(bundle: qm.Bundle) -> Iterator[Served]:
    with serving(bundle.path) as running:
        yield running


@pytest.fixture(scope="module")
def over_http(server: Served) -> Iterator[Any]:
    with tritonhttp.InferenceServerClient(server.http) as client:
        yield client


@pytest.fixture(scope="module")
def over_grpc(server: Served) -> Iterator[Any]:
    with tritongrpc.InferenceServerClient(server.grpc) as client:
        yield client


@pytest.fixture(params=["http", "grpc"])
def triton(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Triton's module for a protocol, and a client of it."""
    if request.param == "http":
        return tritonhttp, request.getfixturevalue("over_http")
    return tritongrpc, request.getfixturevalue("over_grpc")


# The model itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_http_takes_and_gives_json_and_binary_tensors(
    over_http: Any, bundle: qm.Bundle, binary_in: bool, binary_out: bool
) -> None:
    images = prepared(digits(3)[0])
    output = tritonhttp.InferRequestedOutput("logits", binary_data=binary_out)
    inputs = [tensor(tritonhttp, "images", images, binary_data=binary_in)]
    answer = over_http.infer(MODEL, inputs, outputs=[output], request_id="17")
    assert close(answer.as_numpy("logits"), bundle.run(images))
    response = answer.get_response()
    assert (response["model_name"], response["model_version"], response["id"]) == (MODEL, "1", "17")
    assert ("data" in response["outputs"][0]) != binary_out


def test_http_gives_all_outputs_in_binary_if_the_request_says_so(server: Served, bundle: qm.Bundle) -> None:
    images = prepared(digits(1)[0])
    entry = {
        "name": "images",
        "shape": [1, 3, 64, 64],
        "datatype": "FP32",
        "data": images.reshape(-1).tolist(),
    }
    request = {"inputs": [entry], "parameters": {"binary_data_output": True}}
    path = f"/v2/models/{MODEL}/versions/1/infer"
    status, headers, body = ask(server, "POST", path, json.dumps(request).encode())
    assert status == 200 and headers["content-type"] == "application/octet-stream"
    length = int(headers["inference-header-content-length"])
    (output,) = json.loads(body[:length])["outputs"]
    assert output["parameters"] == {"binary_data_size": 40} and len(body) == length + 40
    assert close(np.frombuffer(body[length:], "<f4").reshape(1, 10), bundle.run(images))


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_http_takes_and_gives_compressed_bodies(over_http: Any, bundle: qm.Bundle, algorithm: str) -> None:
    images = prepared(digits(2)[0])
    inputs = [tensor(tritonhttp, "images", images)]
    compression = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
    answer = over_http.infer(MODEL, inputs, **compression)
    assert close(answer.as_numpy("logits"), bundle.run(images))


def test_grpc_takes_and_gives_raw_tensors(over_grpc: Any, bundle: qm.Bundle) -> None:
    images = prepared(digits(3)[0])
    answer = over_grpc.infer(MODEL, [tensor(tritongrpc, "images", images)], request_id="17")
    assert close(answer.as_numpy("logits"), bundle.run(images))
    assert (answer.get_response().id, answer.get_response().model_version) == ("17", "1")


def test_grpc_takes_and_gives_values_in_the_message(server: Served, bundle: qm.Bundle) -> None:
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    images = prepared(digits(2)[0])
    request = service_pb2.ModelInferRequest(model_name=MODEL)
    given = request.inputs.add(name="images", datatype="FP32", shape=images.shape)
    given.contents.fp32_contents.extend(images.reshape(-1).tolist())
    with grpc.insecure_channel(server.grpc) as channel:
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert not answer.raw_output_contents
    logits = np.array(answer.outputs[0].contents.fp32_contents, np.float32)
    assert close(logits.reshape(2, 10), bundle.run(images))


def test_concurrent_calls_get_their_own_answers(
    server: Served, triton: tuple[Any, Any], bundle: qm.Bundle
) -> None:
    module, client = triton
    images = prepared(digits(24)[0])
    expected = bundle.run(images)
    if module is tritonhttp:
        with tritonhttp.InferenceServerClient(server.http, concurrency=8) as many:
            calls = [many.async_infer(MODEL, [tensor(module, "images", image[None])]) for image in images]
            answers = [call.get_result() for call in calls]
    else:
        import queue

        done: queue.Queue[Any] = queue.Queue()
        for place, image in enumerate(images):
            inputs = [tensor(module, "images", image[None])]
            client.async_infer(
                MODEL, inputs, lambda result, error, place=place: done.put((place, result, error))
            )
        by_place = dict(
            (place, (result, error)) for place, result, error in (done.get(timeout=60) for _ in images)
        )
        assert not any(error for _, error in by_place.values())
        answers = [by_place[place][0] for place in range(len(images))]
    for answer, logits in zip(answers, expected, strict=True):
        assert close(answer.as_numpy("logits"), logits[None])


def test_classes_in_the_place_of_values(triton: tuple[Any, Any], bundle: qm.Bundle) -> None:
    module, client = triton
    images, labels = digits(4)
    outputs = [module.InferRequestedOutput("logits", class_count=3)]
    answer = client.infer(MODEL, [tensor(module, "images", prepared(images))], outputs=outputs)
    logits = bundle.run(prepared(images))
    found = answer.as_numpy("logits")
    assert found.shape == (4, 3)
    for row, values, label in zip(found, logits, labels, strict=True):
        parts = [cell.decode().split(":") for cell in row]
        assert [int(index) for _, index, _ in parts] == np.argsort(-values)[:3].tolist()
        assert parts[0][1] == parts[0][2] == str(label)
        assert float(parts[0][0]) == pytest.approx(float(values.max()), abs=1e-4)


# Images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_image_files_are_prepared_as_the_card_says(
    triton: tuple[Any, Any], bundle: qm.Bundle, kind: str
) -> None:
    module, client = triton
    images, labels = digits(5)
    contents = [file_of(image, kind) for image in images]
    answer = client.infer(IMAGE_MODEL, [tensor(module, "image", files(*contents))])
    found = answer.as_numpy("probabilities")
    logits = bundle.run(prepared([Image.open(io.BytesIO(data)) for data in contents])).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-5
    assert found.argmax(axis=1).tolist() == labels.tolist()


def test_image_files_as_base64_in_json(server: Served) -> None:
    images, labels = digits(2)
    data = [base64.b64encode(file_of(image)).decode() for image in images]
    request = {"inputs": [{"name": "image", "shape": [2], "datatype": "BYTES", "data": data}]}
    status, _, body = ask(server, "POST", f"/v2/models/{IMAGE_MODEL}/infer", json.dumps(request).encode())
    (output,) = json.loads(body)["outputs"]
    assert status == 200 and output["shape"] == [2, 10]
    assert np.reshape(output["data"], (2, 10)).argmax(axis=1).tolist() == labels.tolist()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK"])
def test_every_kind_of_image_is_taken(server: Served, mode: str) -> None:
    photograph = Image.fromarray(sample_photographs()["china.jpg"]).convert(mode)
    file = io.BytesIO()
    photograph.save(file, "JPEG" if mode == "CMYK" else "PNG")
    status, _, body = ask(server, "POST", "/classify", file.getvalue(), Content_Type="image/png")
    assert status == 200, body


def test_classify_takes_a_form_with_files(server: Served) -> None:
    images, labels = digits(3)
    body, kind = form(*((f"{place}.png", file_of(image)) for place, image in enumerate(images)))
    status, _, answer = ask(server, "POST", "/classify?top=2", body, Content_Type=kind)
    found = json.loads(answer)
    assert status == 200 and found["model"] == IMAGE_MODEL
    assert [image["file"] for image in found["images"]] == ["0.png", "1.png", "2.png"]
    for image, label in zip(found["images"], labels, strict=True):
        first, second = image["classes"]
        assert first["class"] == label and first["label"] == str(label)
        assert 1 >= first["probability"] >= second["probability"] >= 0


def test_classify_takes_one_file_as_the_body(server: Served) -> None:
    images, labels = digits(1)
    status, _, answer = ask(
        server, "POST", "/classify", file_of(images[0], "JPEG"), Content_Type="image/jpeg"
    )
    classes = json.loads(answer)["images"][0]["classes"]
    assert status == 200 and len(classes) == 5 and classes[0]["class"] == labels[0]


# What else clients ask ------------------------------------------------------------------------------------------


def test_health(triton: tuple[Any, Any]) -> None:
    _, client = triton
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready(MODEL) and client.is_model_ready(IMAGE_MODEL, "1")
    assert not client.is_model_ready("nobody") and not client.is_model_ready(MODEL, "2")


def test_grpc_health_as_kubernetes_asks(server: Served) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"") == b"\x08\x01"
        with pytest.raises(grpc.RpcError) as caught:
            check(b"\x0a\x02no")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_metadata_tells_where_the_bundle_comes_from(
    over_http: Any, over_grpc: Any, bundle: qm.Bundle
) -> None:
    found = over_http.get_model_metadata(MODEL)
    assert (found["name"], found["versions"], found["platform"]) == (MODEL, ["1"], "onnxruntime_onnx")
    assert found["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 64, 64]}]
    assert found["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}]
    properties = found["properties"]
    assert properties["file_sha256"] == bundle.manifest["files"]["model.onnx"]["sha256"]
    assert properties["pruned_blocks"] == "3,6,9" and json.loads(properties["plan"])["every"] == 3
    assert properties["created"] == bundle.manifest["created"]
    message = over_grpc.get_model_metadata(MODEL)
    assert (message.name, list(message.versions)) == (MODEL, ["1"])
    assert list(message.inputs[0].shape) == [-1, 3, 64, 64] and message.outputs[0].datatype == "FP32"
    image = over_http.get_model_metadata(IMAGE_MODEL)
    assert image["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1, 1]}]
    assert image["outputs"] == [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}]


def test_grpc_metadata_has_the_properties_of_the_protocol(server: Served) -> None:
    from quartermap_deploy.serving.grpc_messages import messages

    kinds = messages()
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelMetadata")
        answer = kinds["ModelMetadataResponse"].FromString(
            call(kinds["ModelMetadataRequest"](name=MODEL).SerializeToString())
        )
    assert answer.properties["pruned_blocks"] == "3,6,9"


def test_server_metadata_and_configuration(triton: tuple[Any, Any]) -> None:
    module, client = triton
    metadata, config = client.get_server_metadata(), client.get_model_config(MODEL)
    if module is tritongrpc:
        assert metadata.name == "quartermap-deploy" and "statistics" in metadata.extensions
        assert config.config.max_batch_size == 8 and list(config.config.input[0].dims) == [3, 64, 64]
        assert config.config.dynamic_batching.max_queue_delay_microseconds == 1000
        assert config.config.parameters["pruned_blocks"].string_value == "3,6,9"
    else:
        assert metadata["name"] == "quartermap-deploy" and "statistics" in metadata["extensions"]
        assert config["max_batch_size"] == 8 and config["input"][0]["data_type"] == "TYPE_FP32"
        assert config["parameters"]["pruned_blocks"] == {"string_value": "3,6,9"}


def test_a_strip_is_refused_where_the_resize_would_blow_it_up() -> None:
    """138 bytes became 8.7 GB on their way to a model whose card resizes the shorter side, and then crops."""
    from quartermap_deploy.serving.images import ImageFile
    from quartermap_deploy.serving.refusal import Refusal

    file = io.BytesIO()
    Image.new("1", (1, 30_000)).save(file, "PNG")
    with pytest.raises(
        Refusal, match=r"image 1 has 1 x 30000 pixels.*256 x 7680000, at most 50,000,000"
    ) as caught:
        ImageFile(file.getvalue(), qm.load_card("vmamba_tiny_s1l8").preprocessing, 1)
    assert caught.value.status == 400


def test_greys_of_16_bits_are_classified_as_those_of_8(server: Served) -> None:
    image = digits(1)[0][0]
    file = io.BytesIO()
    Image.fromarray(image.astype(np.uint16) * 257).save(file, "PNG")
    answers = [
        json.loads(ask(server, "POST", "/classify", data, Content_Type="image/png")[2])["images"]
        for data in (file.getvalue(), file_of(image))
    ]
    assert answers[0] == answers[1]


def test_the_repository_lists_the_models(triton: tuple[Any, Any]) -> None:
    module, client = triton
    index = client.get_model_repository_index()
    entries = (
        index if module is tritonhttp else [{"name": one.name, "state": one.state} for one in index.models]
    )
    assert {entry["name"]: entry["state"] for entry in entries} == {MODEL: "READY", IMAGE_MODEL: "READY"}


def statistics(client: Any, name: str) -> dict[str, Any]:
    (found,) = client.get_inference_statistics(name)["model_stats"]
    return dict(found)


def metrics(server: Served) -> dict[tuple[str, str], float]:
    """The metrics by name and model."""
    status, headers, body = ask(server, "GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    lines = [line for line in body.decode().splitlines() if not line.startswith("#")]
    found = {}
    for line in lines:
        match = re.fullmatch(r'(\w+)\{model="([^"]+)",version="1"\} (\d+)', line)
        assert match, line
        found[match[1], match[2]] = float(match[3])
    return found


STATISTICS = ("success", "queue", "compute_input", "compute_infer", "compute_output")


def test_statistics_and_metrics_count_what_happened(server: Served, over_http: Any, over_grpc: Any) -> None:
    before, counted = statistics(over_http, MODEL), metrics(server)
    for count in (1, 2, 2):
        over_http.infer(MODEL, [tensor(tritonhttp, "images", prepared(digits(count)[0]))])
    with pytest.raises(InferenceServerException):
        over_http.infer(MODEL, [tensor(tritonhttp, "images", np.zeros((1, 3, 8, 8), np.float32))])
    over_http.infer(IMAGE_MODEL, [tensor(tritonhttp, "image", files(file_of(digits(1)[0][0])))])
    after, counted_after = statistics(over_http, MODEL), metrics(server)

    assert after["inference_count"] - before["inference_count"] == 6
    assert after["execution_count"] - before["execution_count"] == 4
    parts, earlier = after["inference_stats"], before["inference_stats"]
    for name in STATISTICS:
        assert parts[name]["count"] - earlier[name]["count"] == 4
        assert parts[name]["ns"] > earlier[name]["ns"]
    assert parts["fail"]["count"] - earlier["fail"]["count"] == 1
    spent = {name: parts[name]["ns"] - earlier[name]["ns"] for name in parts}
    inside = spent["queue"] + spent["compute_input"] + spent["compute_infer"] + spent["compute_output"]
    assert 0 < spent["compute_infer"] <= inside <= spent["success"]
    sizes = {entry["batch_size"]: entry["compute_infer"]["count"] for entry in after["batch_stats"]}
    sizes_before = {entry["batch_size"]: entry["compute_infer"]["count"] for entry in before["batch_stats"]}
    assert sizes[2] - sizes_before.get(2, 0) == 2 and sizes[1] - sizes_before.get(1, 0) == 2
    assert after["last_inference"] >= before["last_inference"] and after["last_inference"] > 1.7e12

    def more(name: str, model: str = MODEL) -> float:
        return counted_after[name, model] - counted[name, model]

    assert more("nv_inference_request_success") == 4 and more("nv_inference_request_failure") == 1
    assert more("nv_inference_count") == 6 and more("nv_inference_exec_count") == 4
    assert more("nv_inference_request_success", IMAGE_MODEL) == 1
    # The metrics are the statistics in whole microseconds.
    for name, metric in (("success", "request"), *((name, name) for name in STATISTICS if name != "success")):
        found = counted_after[f"nv_inference_{metric}_duration_us", MODEL]
        assert found == parts[name]["ns"] // 1000 > 0
    assert counted_after["nv_inference_pending_request_count", MODEL] == 0

    message = over_grpc.get_inference_statistics(MODEL).model_stats[0]
    assert message.inference_count == after["inference_count"]
    assert message.inference_stats.success.count == parts["success"]["count"]
    assert {one.batch_size for one in message.batch_stats} == set(sizes)


def test_statistics_of_all_models(over_http: Any, over_grpc: Any) -> None:
    names = [entry["name"] for entry in over_http.get_inference_statistics()["model_stats"]]
    assert names == [MODEL, IMAGE_MODEL]
    assert [one.name for one in over_grpc.get_inference_statistics().model_stats] == names


def test_status_for_the_page(server: Served, over_http: Any) -> None:
    over_http.infer(MODEL, [tensor(tritonhttp, "images", prepared(digits(2)[0]))])
    with urllib.request.urlopen(f"http://{server.http}/status", timeout=30) as answer:
        found = json.load(answer)
    model = found["models"][0]
    assert found["phase"] == "ready" and model["name"] == MODEL
    assert model["images_per_second"] > 0 and 0 < model["p50_ms"] <= model["p99_ms"]


# Other bundles and options --------------------------------------------------------------------------------------


def test_a_static_bundle_in_float16(tmp_path: Path) -> None:
    bundle = qm.load_bundle(static_bundle())
    (tmp_path / "labels.txt").write_text("\n".join(f"digit {number}" for number in range(10)))
    images, labels = digits(2)
    with (
        serving(bundle.path, "--name", "digits", "--labels", tmp_path / "labels.txt") as server,
        tritonhttp.InferenceServerClient(server.http) as client,
    ):
        half = prepared(images[:1]).astype(np.float16)
        answer = client.infer("digits", [tensor(tritonhttp, "images", half)])
        assert answer.as_numpy("logits").dtype == np.float16
        # The server's ONNX Runtime may be another (`make test-server`), whose kernels may round otherwise.
        np.testing.assert_allclose(answer.as_numpy("logits"), bundle.run(half), rtol=0, atol=2e-3)
        with pytest.raises(InferenceServerException, match=r"shape \[2, 3, 64, 64\]"):
            client.infer("digits", [tensor(tritonhttp, "images", np.repeat(half, 2, axis=0))])
        with pytest.raises(InferenceServerException, match="'FP32', the model takes FP16"):
            client.infer("digits", [tensor(tritonhttp, "images", prepared(images[:1]))])
        assert client.get_model_config("digits")["max_batch_size"] == 0
        best = tritonhttp.InferRequestedOutput("probabilities", class_count=1)
        for image, label in zip(images, labels, strict=True):
            contents = tensor(tritonhttp, "image", files(file_of(image)))
            answer = client.infer("digits_image", [contents], outputs=[best])
            assert answer.as_numpy("probabilities")[0, 0].decode().endswith(f":{label}:digit {label}")


def test_several_workers_answer_alike(bundle: qm.Bundle) -> None:
    images = prepared(digits(16)[0])
    with (
        serving(bundle.path, "--workers", 2, "--max-batch", 2, "--max-delay-ms", 0) as server,
        tritonhttp.InferenceServerClient(server.http, concurrency=8) as client,
    ):
        assert server.until("loaded")["workers"] == 2
        calls = [client.async_infer(MODEL, [tensor(tritonhttp, "images", image[None])]) for image in images]
        found = np.concatenate([call.get_result().as_numpy("logits") for call in calls])
        sizes = {entry["batch_size"] for entry in statistics(client, MODEL)["batch_stats"]}
    assert close(found, bundle.run(images)) and sizes <= {1, 2}


def test_sessions_fit_the_cores(bundle: qm.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from quartermap_deploy.serving.options import ServeOptions
    from quartermap_deploy.serving.startup import make_plan, open_sessions

    images = prepared(digits(2)[0])
    for cores, workers, expected, different in (
        (1, None, (1, 1, False), 1),
        (4, None, (4, 1, True), 2),
        (4, 1, (1, 4, False), 1),
        (4, 2, (2, 2, False), 2),
        (4, 3, (3, 1, False), 3),
    ):
        monkeypatch.setenv("QUARTERMAP_THREADS", str(cores))
        plan = make_plan(bundle, ServeOptions(workers=workers))
        assert (plan.workers, plan.threads, plan.wide) == expected
        sessions = open_sessions(plan)
        assert len(sessions.workers) == plan.workers and len(sessions.different()) == different
        assert all(close(session.run(images), bundle.run(images)) for session in sessions.different())


def test_an_engine_serves_float32_up_to_its_profile(bundle: qm.Bundle, tmp_path: Path) -> None:
    """As far as that goes without a GPU: the plan, and that such an engine is refused before there is a port."""
    from deploy_bundles import with_engine

    from quartermap_deploy.serving.options import ServeOptions
    from quartermap_deploy.serving.startup import make_plan

    engine = qm.load_bundle(with_engine(bundle.path, tmp_path / "engine"))
    plan = make_plan(engine, ServeOptions(target="tensorrt"))
    assert (plan.model.max_batch, plan.model.platform) == (32, "tensorrt_plan")
    assert (plan.workers, plan.wide) == (1, False)
    static = qm.load_bundle(with_engine(static_bundle(), tmp_path / "static"))
    assert make_plan(static, ServeOptions(target="tensorrt")).model.inputs[0].datatype == "FP32"


def test_labels_and_sizes_that_do_not_fit_are_refused(bundle: qm.Bundle, tmp_path: Path) -> None:
    from quartermap_deploy.errors import QuartermapError, ServeError
    from quartermap_deploy.serving.options import ServeOptions
    from quartermap_deploy.serving.startup import make_plan

    (tmp_path / "two").write_text("a\nb\n")
    for settings, message in (
        ({"labels": tmp_path / "two"}, "each of 10 classes"),
        ({"labels": tmp_path / "none"}, "cannot be read"),
        ({"target": "tensorrt"}, "has no engine for tensorrt"),
        ({"queue": 4}, "holds no batch of 8"),
        ({"name": 'a"b'}, "no name"),
    ):
        with pytest.raises(QuartermapError, match=message):
            make_plan(bundle, ServeOptions(**settings))
    with pytest.raises(ServeError, match="1 at most"):
        make_plan(qm.load_bundle(static_bundle()), ServeOptions(max_batch=4))
    for settings in ({"port": 70000}, {"port": 5, "grpc_port": 5}, {"workers": 0}, {"max_delay": -1.0}):
        with pytest.raises(ServeError):
            ServeOptions(**settings)


def test_a_bundle_without_weights_hash_has_plain_properties(bundle: qm.Bundle, tmp_path: Path) -> None:
    import shutil

    from quartermap_deploy.serving.startup import provenance

    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    change_manifest(copy, plan=None)
    found = provenance(qm.load_bundle(copy), "onnxruntime")
    assert found["plan"] == "" and all(isinstance(value, str) for value in found.values())
