"""Every kind of repository of `quartermap deploy triton`, served by a real Triton; see `real_triton`.

One server has them all. Its ONNX Runtime backend is stood in for; everything else is Triton's.
"""

from __future__ import annotations

import io
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import real_triton
import toy_bundles
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from deploy_bundles import MODEL, dynamic_bundle, static_bundle
from google.protobuf import text_format
from helpers import Array, error
from PIL import Image
from png_files import chunk
from real_triton import Triton, running
from served import digits, file_of, files, prepared, tensor
from task_bundles import judge_bundle, pooled_bundle, restorer_bundle, segmenter_bundle, words_bundle
from triton_repositories import read_config
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

import quartermap_deploy as qm
from quartermap_deploy.data.images import prepare, sample_photographs
from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.deploy.triton import TritonOptions, deploy_triton
from quartermap_deploy.serving.images import ImageFile
from quartermap_deploy.serving.refusal import Refusal
from quartermap_deploy.validation.golden import read_golden

PHOTOGRAPHS = list(sample_photographs().values())
NAMES = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
PREPROCESSING = {
    **{name: qm.load_card(name).preprocessing for name in (MODEL, "vmamba_tiny_s1l8", "medmamba_t")},
    "nearest": Preprocessing((40, 70), "cover", (33, 60), "nearest", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    "grey": Preprocessing((40, 40), "cover", (32, 32), "hamming", (0.4,), (0.3,), "grey"),
    "bgr": Preprocessing(
        (40, 40), "stretch", (32, 32), "lanczos", (103.0, 116.0, 123.0), (57.0, 58.0, 59.0), "bgr", 1.0
    ),
    "alpha": Preprocessing((40, 40), "cover", (32, 32), "box", (0.5,) * 4, (0.5,) * 4, "rgba", 1 / 127.5),
    "half": qm.load_card("vmamba_tiny_s1l8").preprocessing,
}
HALF = "digits_half"
PLAIN = {
    MODEL: dynamic_bundle,
    HALF: static_bundle,
    "words": words_bundle,
    "Change": toy_bundles.change,
    "pooled": pooled_bundle,
    "restorer": restorer_bundle,
    "segmenter": segmenter_bundle,
    "judge": judge_bundle,
}
"""The bundle of each model; its golden outputs have to come back."""
SEVERAL = "digits.v2"
MOVED = "moved"
SIGMOID = "sigmoids"
VARIANTS = "variants"
PROTOCOLS = ["http", "http json", "grpc"]


def deploy(folder: Path) -> list[Path]:
    """Write the repositories into an empty folder."""
    (folder / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    options = {
        # Wait for more, so that requests are joined on a machine that is busy, too.
        MODEL: TritonOptions(labels=folder / "names.txt", max_delay_us=20_000),
        HALF: TritonOptions(name=HALF, image_workers=1),
    }
    for name, bundle in PLAIN.items():
        deploy_triton(bundle(), folder / name, options.get(name, TritonOptions(image_workers=1)))
    several = TritonOptions(name=SEVERAL, version=7, instances=2, threads=1, max_batch=4, images=False)
    deploy_triton(dynamic_bundle(), folder / SEVERAL, several)
    deploy_triton(dynamic_bundle(), folder / MOVED, TritonOptions(name=MOVED, images=False))
    for name, preprocessing in PREPROCESSING.items():
        write_preprocessor(folder, name, preprocessing)
    config = read_config(folder / MODEL, f"{MODEL}_probabilities")
    config.name, config.parameters["activation"].string_value = SIGMOID, "sigmoid"
    write_variant(folder, f"{MODEL}_probabilities", config)
    return [*(folder / name for name in (*PLAIN, SEVERAL, MOVED)), folder / VARIANTS]


def write_variant(folder: Path, model: str, config: Any) -> None:
    """Write a model of the digits' repository with another configuration."""
    shutil.copytree(folder / MODEL / model, folder / VARIANTS / config.name)
    (folder / VARIANTS / config.name / "config.pbtxt").write_text(text_format.MessageToString(config))


def write_preprocessor(folder: Path, name: str, preprocessing: Preprocessing) -> None:
    """Write a model that prepares images with settings that none of the bundles has."""
    config = read_config(folder / MODEL, f"{MODEL}_preprocess")
    settings = json.loads(config.parameters["preprocessing"].string_value) | preprocessing.to_dict()
    del config.output[0].dims[:], config.instance_group[:]
    config.output[0].dims.extend(preprocessing.input_shape)
    config.name = f"prepare_{name}"
    if name == "half":
        settings["type"], config.output[0].data_type = "float16", model_config_pb2.TYPE_FP16
    config.parameters["preprocessing"].string_value = json.dumps(settings)
    write_variant(folder, f"{MODEL}_preprocess", config)


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """One server of all repositories, which looks for changed ones every second."""
    real_triton.require()
    folder = tmp_path_factory.mktemp("repositories")
    polling = ("--model-control-mode=poll", "--repository-poll-secs=1", "--log-verbose=1")
    with running(deploy(folder), tmp_path_factory.mktemp("triton"), *polling) as server:
        server.folder = folder
        yield server
        # Nothing but what a test replaced was loaded a second time.
        loaded = Counter(
            line.split("'")[1] for line in server.log.splitlines() if '"successfully loaded' in line
        )
        assert loaded.pop(MOVED) <= 2 and set(loaded.values()) == {1}, loaded
        assert not list(folder.rglob("*.pyc"))


def client(triton: Triton, protocol: str) -> tuple[ModuleType, Any]:
    """Triton's own client for a protocol."""
    if protocol == "grpc":
        return over_grpc, over_grpc.InferenceServerClient(triton.grpc)
    return over_http, over_http.InferenceServerClient(triton.http, network_timeout=120)


def ask(
    triton: Triton,
    protocol: str,
    model: str,
    inputs: dict[str, Array],
    *,
    classes: dict[str, int] | None = None,
) -> Any:
    """Send a request; `classes` asks for so many classes of an output."""
    module, sender = client(triton, protocol)
    binary = {"binary_data": protocol == "http"} if module is over_http else {}
    with sender:
        return sender.infer(
            model,
            [tensor(module, name, values, **binary) for name, values in inputs.items()],
            outputs=[
                module.InferRequestedOutput(name, class_count=count)
                for name, count in (classes or {}).items()
            ]
            or None,
        )


def sent(name: str, bundle: qm.Bundle) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
    """The golden cases of a bundle that one request holds: inputs in the types of the model, and outputs."""
    cases, outputs = read_golden(bundle.path, bundle.manifest["golden"])
    for case, expected in zip(cases.values(), outputs, strict=True):
        inputs = {item.name: case[item.name].astype(item.type) for item in bundle.inputs}
        if len(next(iter(inputs.values()))) <= (1 if name == HALF else 8):
            yield inputs, expected


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_golden_outputs_come_back(triton: Triton, protocol: str) -> None:
    for name, bundle in PLAIN.items():
        if name == HALF and protocol == "http json":
            continue  # JSON has no float16, says Triton's client
        tolerance = 2e-2 if name == HALF else 1e-5
        cases = list(sent(name, qm.load_bundle(bundle())))
        assert cases
        for inputs, outputs in cases:
            answer = ask(triton, protocol, name, inputs)
            for output, expected in outputs.items():
                # An output that has no axis but the batch gets one of 1 in Triton.
                shape = {"best": (-1, 1), "total": (1,)}.get(output, expected.shape)
                assert error(answer.as_numpy(output), expected.reshape(shape)) <= tolerance, (name, output)


def test_sizes_that_are_open_stay_so(triton: Triton) -> None:
    images = np.random.default_rng(0).random((2, 1, 36, 44), np.float32)
    answer = ask(triton, "grpc", "restorer", {"x": images})
    expected = qm.load_bundle(restorer_bundle()).run(images)
    assert error(answer.as_numpy(qm.load_bundle(restorer_bundle()).outputs[0].name), expected) <= 1e-5


def test_golden_inputs_warm_every_instance_up(triton: Triton) -> None:
    log = triton.log
    wanted = 0
    for repository in (*PLAIN, SEVERAL):
        config = read_config(triton.folder / repository, repository)
        for instance in range(config.instance_group[0].count):
            for sample in config.model_warmup:
                where = f"model '{repository}' instance {repository}_0_{instance} is running warmup sample"
                assert f"{where} '{sample.name}'" in log
                wanted += 1
    assert wanted > 20 and "failed to run warmup" not in log


def test_models_are_described_as_their_bundles(triton: Triton) -> None:
    _, sender = client(triton, "http")
    with sender:
        for name, bundle in PLAIN.items():
            found, loaded = sender.get_model_metadata(name), qm.load_bundle(bundle())
            for tensors, items in ((found["inputs"], loaded.inputs), (found["outputs"], loaded.outputs)):
                assert [one["name"] for one in tensors] == [item.name for item in items]
                for one, item in zip(tensors, items, strict=True):
                    sizes = [size if isinstance(size, int) else -1 for size in item.shape]
                    # Triton has no shape without axes beside the batch.
                    wanted = {"best": [-1, 1], "total": [1]}.get(item.name, sizes)
                    assert one["shape"] == wanted, item
                    numbers = {"float32": "FP32", "float16": "FP16", "int64": "INT64", "bool": "BOOL"}
                    assert one["datatype"] == numbers[item.type]
        assert sender.get_model_metadata(SEVERAL)["versions"] == ["7"]
        index = {entry["name"]: entry["state"] for entry in sender.get_model_repository_index()}
    there = {path.parent.name for path in triton.folder.glob("*/*/config.pbtxt")}
    assert index == dict.fromkeys(there, "READY") and len(there) > 30


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_sixteen_clients_are_answered_in_batches(triton: Triton, protocol: str) -> None:
    images = prepared(digits(64)[0])
    bundle = qm.load_bundle(dynamic_bundle())
    logits = np.concatenate([bundle.run(images[place : place + 8]) for place in range(0, 64, 8)])
    _, sender = client(triton, "http")

    def counted(name: str) -> int:
        return int(sender.get_inference_statistics(MODEL)["model_stats"][0][name])

    before = [counted(name) for name in ("inference_count", "execution_count")]

    def one(number: int) -> int:
        module, own = client(triton, protocol)
        order = np.random.default_rng(number)
        count = 0
        with own:
            for _ in range(8):
                chosen = order.choice(64, order.integers(1, 5), replace=False)
                answer = own.infer(MODEL, [tensor(module, "images", images[chosen])])
                assert error(answer.as_numpy("logits"), logits[chosen]) <= 1e-5
                count += len(chosen)
        return count

    with ThreadPoolExecutor(16) as pool:
        asked = sum(pool.map(one, range(16)))
    # Triton counts a moment after it answers.
    triton.until(lambda: counted("inference_count") == before[0] + asked, "counted", 20)
    assert counted("execution_count") - before[1] < 16 * 8
    with sender:
        batches = sender.get_inference_statistics(MODEL)["model_stats"][0]["batch_stats"]
    assert max(int(batch["batch_size"]) for batch in batches) <= 8


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_instances_share_the_work(triton: Triton, protocol: str) -> None:
    images = prepared(digits(4)[0])
    expected = qm.load_bundle(dynamic_bundle()).run(images)
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda _: ask(triton, protocol, SEVERAL, {"images": images}), range(8))
        assert all(error(answer.as_numpy("logits"), expected) <= 1e-5 for answer in answers)
    with pytest.raises(InferenceServerException, match="must be <= 4"):
        ask(triton, protocol, SEVERAL, {"images": prepared(digits(5)[0])})


# Image models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_image_files_are_classified_as_by_the_bundle(triton: Triton, protocol: str) -> None:
    pictures, _ = digits(4)
    contents = [file_of(picture) for picture in pictures]
    bundle = qm.load_bundle(dynamic_bundle())
    logits = bundle.run(prepared(pictures)).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    # As JSON, Triton takes text alone.
    protocol = "http" if protocol == "http json" else protocol
    answer = ask(triton, protocol, f"{MODEL}_image", {"image": files(*contents)})
    found = answer.as_numpy("probabilities")
    assert found.dtype == np.float32 and error(found, expected) <= 1e-5
    for content, picture in zip(contents, pictures, strict=True):
        one = np.array([content], dtype=np.object_)
        (probabilities,) = ask(triton, protocol, f"{HALF}_image", {"image": one}).as_numpy("probabilities")
        assert probabilities.argmax() == qm.load_bundle(static_bundle()).predict(picture)[0].best.index


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_classes_come_with_their_names(triton: Triton, protocol: str) -> None:
    (picture,), (label,) = digits(1)
    inputs: dict[str, dict[str, Array]] = {
        MODEL: {"images": prepared(picture[None])},
        f"{MODEL}_image": {"image": files(file_of(picture))},
        f"{MODEL}_probabilities": {"logits": np.eye(10, dtype=np.float32)[[label]]},
    }
    for model, given in inputs.items():
        output = "logits" if model == MODEL else "probabilities"
        best, _ = ask(triton, protocol, model, given, classes={output: 2}).as_numpy(output).reshape(-1)
        value, index, name = best.decode().split(":")
        assert (int(index), name) == (label, NAMES[label]) and float(value) > 0.2


def test_images_of_other_tasks_give_what_the_model_gives(triton: Triton) -> None:
    for name, bundle in (("restorer", restorer_bundle), ("segmenter", segmenter_bundle)):
        loaded = qm.load_bundle(bundle())
        # A tensor of the model may be called image already.
        (file,) = read_config(triton.folder / name, f"{name}_image").input
        assert file.name == ("image_2" if name == "restorer" else "image")
        contents = files(*map(file_of, PHOTOGRAPHS))
        answer = ask(triton, "grpc", f"{name}_image", {file.name: contents})
        assert loaded.preprocessing is not None
        expected = loaded.run(prepare(PHOTOGRAPHS, loaded.preprocessing))
        assert error(answer.as_numpy(loaded.outputs[0].name), expected) <= 1e-5
    # Probabilities that the model gives itself: a second softmax would make them nearly equal.
    picture = np.dstack([PHOTOGRAPHS[0], PHOTOGRAPHS[0][..., :1]])
    (found,) = ask(triton, "grpc", "judge_image", {"image": files(file_of(picture))}).as_numpy(
        "probabilities"
    )
    (one,) = qm.load_bundle(judge_bundle()).predict(picture)
    assert found.argmax() == one.best.index and abs(found.max() - one.best.probability) <= 1e-5


def test_probabilities_of_large_logits_are_finite(triton: Triton) -> None:
    logits = np.array([[6e4, -6e4, 0, 0, 0, 0, 0, 0, 0, 0]], dtype=np.float16)
    for model, values in (
        (f"{MODEL}_probabilities", logits.astype(np.float32)),
        (f"{HALF}_probabilities", logits),
    ):
        found = ask(triton, "grpc", model, {"logits": values}).as_numpy("probabilities")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, [[1, *[0] * 9]])
    found = ask(triton, "grpc", SIGMOID, {"logits": logits.astype(np.float32)}).as_numpy("probabilities")
    np.testing.assert_array_equal(found, [[1, 0, *[0.5] * 8]])


def pictures() -> dict[str, bytes]:
    """Files of every kind of JPEG and PNG."""
    photograph = Image.fromarray(PHOTOGRAPHS[0])
    grey = photograph.convert("L")
    alpha = photograph.copy()
    alpha.putalpha(grey)
    images = {
        "photograph": photograph,
        "upright": photograph.crop((100, 0, 201, 427)),
        "one pixel": photograph.crop((5, 5, 6, 6)),
        "a line": photograph.crop((0, 9, 640, 10)),
        "grey": grey,
        "two colours": photograph.convert("1"),
        "alpha": alpha,
        "grey and alpha": alpha.convert("LA"),
        "palette": photograph.quantize(32),
        "16 bits": Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16),
        "a ribbon": Image.new("L", (3, 900), 77),
    }
    found = {kind: encoded(image) for kind, image in images.items()}
    return found | {
        f"{mode}, JPEG": encoded(photograph.convert(mode), "JPEG") for mode in ("RGB", "L", "CMYK")
    }


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


@pytest.mark.parametrize("name", PREPROCESSING)
def test_images_are_prepared_as_by_this_package(name: str, triton: Triton) -> None:
    found = pictures()
    kinds = list(found)
    for chosen in (kinds[:8], kinds[8:]):
        answer = ask(triton, "grpc", f"prepare_{name}", {"image": files(*(found[kind] for kind in chosen))})
        values = answer.as_numpy("images")
        for kind, one in zip(chosen, values, strict=True):
            (expected,) = prepare([Image.open(io.BytesIO(found[kind]))], PREPROCESSING[name])
            # Half precision is rounded once.
            wanted = expected.astype(np.float16) if name == "half" else expected
            assert one.dtype == wanted.dtype and np.array_equal(one, wanted), kind


def huge_png(width: int, height: int) -> bytes:
    """A PNG file that says it has so many pixels, and has none."""
    header = chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_bad_image_is_refused_in_the_words_of_our_server(triton: Triton, protocol: str) -> None:
    good = encoded(Image.fromarray(PHOTOGRAPHS[0]))
    bad = {
        "empty": b"",
        "no image": b"these are words",
        "cut short": good[: len(good) // 2],
        "another format": encoded(Image.fromarray(PHOTOGRAPHS[0]), "GIF"),
        "a spoilt checksum": good[:40] + bytes([good[40] ^ 1]) + good[41:],
        "too large": huge_png(30_000, 30_000),
    }
    settings = PREPROCESSING[MODEL]
    for kind, data in bad.items():
        with pytest.raises(InferenceServerException) as raised:
            ask(triton, protocol, f"{MODEL}_image", {"image": files(good, data)})
        assert raised.value.status() == ("400" if protocol == "http" else "StatusCode.INVALID_ARGUMENT")
        with pytest.raises(Refusal) as refused:
            ImageFile(data, settings, 2).prepare()
        # Which part is damaged only our server says.
        expected = refused.value.message.partition(": it ")[0]
        assert raised.value.message().removeprefix("[400] ").endswith(expected), (kind, expected)
        assert "object at" not in raised.value.message()


def test_a_bad_image_spoils_its_own_request_alone(triton: Triton) -> None:
    good = files(file_of(digits(1)[0][0]))
    (expected,) = ask(triton, "grpc", f"{MODEL}_image", {"image": good}).as_numpy("probabilities")

    def one(number: int) -> bool:
        if number % 2:
            with pytest.raises(InferenceServerException, match="image 1 is empty"):
                ask(triton, "grpc", f"{MODEL}_image", {"image": files(b"")})
            return True
        answer = ask(triton, "grpc", f"{MODEL}_image", {"image": good})
        return bool(error(answer.as_numpy("probabilities"), expected[None]) <= 1e-5)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(16)))


def test_a_strip_that_the_resize_would_make_too_large_is_refused(triton: Triton) -> None:
    strip = encoded(Image.new("1", (1, 30_000)))
    with pytest.raises(InferenceServerException) as raised:
        ask(triton, "grpc", "prepare_vmamba_tiny_s1l8", {"image": files(strip)})
    assert "image 1 has 1 x 30000 pixels" in raised.value.message()
    assert "256 x 7680000" in raised.value.message()


# What the one who runs it meets ---------------------------------------------------------------------------------


def test_a_repository_that_is_written_again_is_loaded_again(triton: Triton) -> None:
    images = prepared(digits(2)[0])
    expected = qm.load_bundle(dynamic_bundle()).run(images)
    answer = ask(triton, "http", MOVED, {"images": images})
    assert answer.get_response()["model_version"] == "1"
    options = TritonOptions(name=MOVED, version=2, max_batch=2, images=False)
    deploy_triton(dynamic_bundle(), triton.folder / MOVED, options, force=True)
    _, sender = client(triton, "http")
    with sender:
        triton.until(lambda: sender.is_model_ready(MOVED, "2"), "version 2")
        answer = ask(triton, "http", MOVED, {"images": images})
        triton.until(lambda: not sender.is_model_ready(MOVED, "1"), "version 1 left")
    assert answer.get_response()["model_version"] == "2"
    assert error(answer.as_numpy("logits"), expected) <= 1e-5


def test_without_pillow_the_image_models_alone_refuse(tmp_path: Path) -> None:
    real_triton.require()
    deploy_triton(dynamic_bundle(), tmp_path / "repository")
    (tmp_path / "triton").mkdir()
    with running([tmp_path / "repository"], tmp_path / "triton", pillow=False) as triton:
        picture, (label,) = digits(1)
        for protocol, status in (("http", "503"), ("grpc", "StatusCode.UNAVAILABLE")):
            answer = ask(triton, protocol, MODEL, {"images": prepared(picture)})
            assert answer.as_numpy("logits").argmax() == label
            with pytest.raises(InferenceServerException, match="pip install pillow") as raised:
                ask(triton, protocol, f"{MODEL}_image", {"image": files(file_of(picture[0]))})
            assert raised.value.status() == status
        assert "images need Pillow" in triton.log
