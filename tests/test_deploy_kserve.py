"""`quartermap deploy kserve`: the InferenceService by KServe's schema and rules, and the repository that it serves."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from command_line import call
from deploy_bundles import MODEL, contents, dynamic_bundle, static_bundle, with_engine, write_plugin
from helpers import REPOSITORY
from triton_repositories import models, read_config

from quartermap_deploy.deploy import kserve
from quartermap_deploy.deploy.kserve import KServeOptions, deploy_kserve, service_name, to_yaml
from quartermap_deploy.deploy.triton import TritonOptions
from quartermap_deploy.errors import DeployError

SCHEMA = jsonschema.Draft202012Validator(
    json.loads((REPOSITORY / "tests" / "data" / "kserve_inferenceservice.json").read_text())
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with wide tables and no plugin library of this machine."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("QUARTERMAP_PLUGIN", raising=False)
    return folder


def deployed(bundle: Path, options: KServeOptions | None = None, triton: TritonOptions | None = None) -> Any:
    """Deploy to service.yaml and return the InferenceService, checked against the schema."""
    deploy_kserve(bundle, "service.yaml", options, triton, force=True)
    return checked(Path("service.yaml"))


def checked(path: Path) -> Any:
    """Read an InferenceService and check it by the schema, and by what KServe's webhook asks of scaling."""
    service = yaml.safe_load(path.read_text(encoding="utf-8"))
    SCHEMA.validate(service)
    predictor, annotations = service["spec"]["predictor"], service["metadata"]["annotations"]
    assert predictor["minReplicas"] <= predictor["maxReplicas"]
    metric, target = predictor["scaleMetric"], predictor["scaleTarget"]
    if annotations["serving.kserve.io/deploymentMode"] == "Knative":
        assert metric in ("concurrency", "rps") and target >= 1
        assert "serving.kserve.io/autoscalerClass" not in annotations
    else:
        assert annotations["serving.kserve.io/autoscalerClass"] == "hpa"
        assert metric == "cpu" and 1 <= target <= 100 and predictor["minReplicas"] >= 1
    return service


def test_the_schema_finds_mistakes() -> None:
    deployed(dynamic_bundle())
    text = Path("service.yaml").read_text()
    for right, wrong in (
        ("scaleMetric:", "scaleMetrics:"),
        ("scaleMetric: cpu", "scaleMetric: cpus"),
        ("scaleTarget: 80", "scaleTarget: '80'"),
        ("name: vmamba-digits", "name: vmamba_digits"),
        ("memory: 4Gi", "memory: much"),
        ("name: triton", "named: triton"),
        ("v1beta1", "v1"),
    ):
        assert right in text
        assert not SCHEMA.is_valid(yaml.safe_load(text.replace(right, wrong)))


def test_a_bundle_on_cpus() -> None:
    service = deployed(dynamic_bundle())
    assert service["metadata"]["name"] == "vmamba-digits"
    predictor = service["spec"]["predictor"]
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (1, 3)
    assert (predictor["scaleMetric"], predictor["scaleTarget"]) == ("cpu", 80)
    model = predictor["model"]
    assert model["modelFormat"] == {"name": "triton", "version": "2"} and model["protocolVersion"] == "v2"
    assert (model["runtime"], model["runtimeVersion"]) == ("kserve-tritonserver", "26.01-py3")
    assert model["storageUri"] == "pvc://models/vmamba-digits"
    assert "args" not in model and "image" not in model
    amounts = {"cpu": "2", "memory": "4Gi"}
    assert model["resources"] == {"requests": amounts, "limits": amounts}
    assert model["readinessProbe"]["httpGet"] == {"path": "/v2/health/ready", "port": 8080}
    # Beside it lies what belongs into the storage: the model alone, as the runtime's image has no Pillow, with as many
    # threads as the container has CPUs, since ONNX Runtime would take as many as the machine has.
    assert models(Path("service-repository")) == [MODEL]
    assert (
        read_config(Path("service-repository"), MODEL).parameters["intra_op_thread_count"].string_value == "2"
    )


def test_options_arrive_in_the_service() -> None:
    options = KServeOptions(
        name="digits",
        storage_uri="s3://bucket/digits",
        runtime="my-triton",
        container="registry.example/triton-with-pillow:1",
        min_replicas=0,
        max_replicas=20,
        scale_metric="rps",
        scale_target=150,
        cpus=6,
        memory="512Mi",
    )
    service = deployed(dynamic_bundle(), options, TritonOptions(instances=2, max_batch=16))
    assert service["metadata"] == {
        "name": "digits",
        "annotations": {"serving.kserve.io/deploymentMode": "Knative"},
    }
    predictor = service["spec"]["predictor"]
    assert {key: value for key, value in predictor.items() if key != "model"} == {
        "minReplicas": 0,
        "maxReplicas": 20,
        "scaleMetric": "rps",
        "scaleTarget": 150,
    }
    model = predictor["model"]
    assert model["runtime"] == "my-triton" and model["storageUri"] == "s3://bucket/digits"
    assert model["image"] == "registry.example/triton-with-pillow:1" and "runtimeVersion" not in model
    assert model["resources"]["limits"] == {"cpu": "6", "memory": "512Mi"}
    config = read_config(Path("service-repository"), MODEL)
    assert config.parameters["intra_op_thread_count"].string_value == "3" and config.max_batch_size == 16
    assert f"{MODEL}_image" in models(Path("service-repository"))


def test_an_engine_on_gpus(tmp_path: Path) -> None:
    plugin = write_plugin(tmp_path)
    bundle = with_engine(dynamic_bundle(), tmp_path / "engine", plugin=plugin)
    service = deployed(bundle, KServeOptions(runtime_version="25.12-py3"), TritonOptions(plugin=plugin))
    predictor = service["spec"]["predictor"]
    # No CPU shows how busy a GPU is, so requests are counted, which Knative does.
    assert (predictor["scaleMetric"], predictor["scaleTarget"]) == ("concurrency", 32)
    assert service["metadata"]["annotations"] == {"serving.kserve.io/deploymentMode": "Knative"}
    model = predictor["model"]
    assert model["runtimeVersion"] == "25.12-py3"
    assert model["args"] == ["--backend-config=tensorrt,plugins=/mnt/models/libquartermap_plugin.so"]
    assert (Path("service-repository") / "libquartermap_plugin.so").read_bytes() == plugin.read_bytes()
    assert model["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in model["resources"]["requests"]


def test_onnx_runtime_on_gpus_and_a_static_batch() -> None:
    service = deployed(dynamic_bundle(), KServeOptions(gpus=2), TritonOptions(device="gpu"))
    predictor = service["spec"]["predictor"]
    assert predictor["model"]["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert (predictor["scaleMetric"], predictor["scaleTarget"]) == ("concurrency", 32)
    service = deployed(static_bundle(), KServeOptions(scale_metric="concurrency"))
    assert service["spec"]["predictor"]["scaleTarget"] == 1


@pytest.mark.parametrize(
    ("model", "service"),
    [
        ("vmamba_tiny_s1l8", "vmamba-tiny-s1l8"),
        ("Digits.v2_", "digits-v2"),
        ("3d", "model-3d"),
        ("_", "model"),
    ],
)
def test_names_for_kubernetes(model: str, service: str) -> None:
    assert service_name(model) == service


def test_values_are_written_out_and_read_back() -> None:
    amounts = {"cpu": "2", "on": "yes", "port": 8080, "empty": [], "ä": None, "number": "1e3"}
    values = {"requests": amounts, "limits": amounts}
    text = to_yaml(values)
    assert yaml.safe_load(text) == values
    assert "&" not in text and "*" not in text


# Refusals -------------------------------------------------------------------------------------------------------


def refused(*arguments: object) -> str:
    """Run a command that must be refused: exit code 2, one message, and nothing written."""
    before = contents(Path.cwd())
    code, out, err = call("deploy", "kserve", *arguments, "--quiet")
    assert code == 2, err
    assert out == "" and err.startswith("quartermap: error: ") and err.count("\n") == 1, err
    assert contents(Path.cwd()) == before
    return err


def test_options_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    bundle = dynamic_bundle()

    def wrong(*arguments: object) -> str:
        return refused(bundle, "-o", "service.yaml", *arguments)

    assert "more than max_replicas" in wrong("--min-replicas", 4)
    assert "concurrency or rps" in wrong("--min-replicas", 0)
    assert "unknown scale_metric" in wrong("--scale-metric", "memory")
    assert "needs a scale_target" in wrong("--scale-metric", "rps")
    assert "in percent" in wrong("--scale-target", 101)
    assert "needs no GPUs" in wrong("--gpus", 1)
    assert "such as 4Gi" in wrong("--memory", "4 GB")
    for amount in ("0", "0Gi", "0.0", "-1Gi", "4gi", "٤Gi", ""):
        assert "above 0, such as 4Gi" in wrong(f"--memory={amount}")
    for image in ("a b c", "host/Upper", "image:", "image:a b", "-x/y", "registry:port/x", "image@sha256:12"):
        assert "expected an image" in wrong(f"--container={image}"), image
    for tag in ("26:01 x", "-py3", "ä", "a" * 129):
        assert "a tag of an image" in wrong(f"--runtime-version={tag}")
    for runtime in ("Bad Name", "a_b", "-a", "a..b", "a" * 254, ""):
        assert "as Kubernetes names things" in wrong(f"--runtime={runtime}")
    for uri in ("ftp://place", "models/digits", "s3://", "s3:/bucket", "s3://a b", "s3://ü"):
        assert "begins with gs://" in wrong("--storage-uri", uri)
    for name in ("Digits", "digits_k3", "3d", "a" * 54, "digits-", ""):
        assert "cannot be named" in wrong("--service-name", name)
    for folder in ("service.yaml", ".", "service.yaml/in/it"):
        assert "need places beside each other" in wrong("--repository", folder)
    assert "there is no folder" in refused(bundle, "-o", "nowhere/service.yaml")
    assert "leave it out" in wrong("--container", "image", "--runtime-version", "26.01-py3")
    assert "--max-replicas" in wrong("--max-replicas", 0)
    assert "below 2^31" in wrong("--max-replicas", 99999999999)
    engine = with_engine(bundle, tmp_path / "engine")
    message = refused(engine, "-o", "service.yaml")
    assert "TensorRT 10.13.3.9" in message and "--runtime-version" in message
    assert "there is no bundle" in refused("nothing", "-o", "service.yaml")
    assert "not for tensorrt" in refused(bundle, "-o", "service.yaml", "--backend", "tensorrt")


def test_names_that_kubernetes_takes_are_taken() -> None:
    for image in (
        "triton",
        "nvcr.io/nvidia/tritonserver:26.01-py3",
        "localhost:5000/a/b__c:tag",
        "registry.example.org/team/triton-pillow@sha256:" + "0" * 64,
        "Registry.Example.org:443/a",
    ):
        assert KServeOptions(container=image).container == image
    for memory in ("1", "0.5Gi", "512Mi", "4G"):
        assert KServeOptions(memory=memory).memory == memory
    assert KServeOptions(runtime="my-runtime.v2", runtime_version="26.01_py3.x").runtime == "my-runtime.v2"
    assert KServeOptions(storage_uri="s3://bucket/a%20b?x=1").storage_uri


def test_nothing_is_written_into_the_bundle(place: Path) -> None:
    bundle = Path(shutil.copytree(dynamic_bundle(), place / "bundle"))
    before = contents(bundle)
    link = place / "link"
    link.symlink_to(bundle)
    (place / "above").symlink_to(place)
    for out in (bundle / "x.yaml", link / "x.yaml", place / "above" / "bundle" / "x.yaml"):
        assert "in the bundle" in refused(bundle, "-o", out)
    assert "in the bundle" in refused(bundle, "-o", "x.yaml", "--repository", link / "repository")
    for out in (bundle / "inside", bundle / "not" / "yet", link / "inside", bundle):
        code, _, err = call("deploy", "triton", bundle, "-o", out)
        assert code == 2 and "in the bundle" in err
    code, _, err = call("deploy", "triton", dynamic_bundle(), "-o", bundle / "x", "--engines-from", bundle)
    assert code == 2 and "in the bundle" in err
    assert contents(bundle) == before


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="only Linux has /proc, where nothing can be written"
)
def test_a_place_that_cannot_be_written_is_a_message() -> None:
    assert "cannot write /proc/x.yaml" in refused(
        dynamic_bundle(), "-o", "/proc/x.yaml", "--repository", "repository"
    )


def test_only_files_of_ours_are_replaced(place: Path) -> None:
    bundle = dynamic_bundle()
    assert call("deploy", "kserve", bundle, "-o", "service.yaml", "--quiet")[0] == 0
    assert "replace it with --force" in refused(bundle, "-o", "service.yaml")
    assert "service-repository exists already" in refused(
        bundle, "-o", "other.yaml", "--repository", "service-repository"
    )
    Path("theirs.yaml").write_text("kind: InferenceService\n")
    assert "choose another file" in refused(bundle, "-o", "theirs.yaml")
    assert "--force does not replace it" in refused(bundle, "-o", "theirs.yaml", "--force")
    assert "there is no folder" in refused(bundle, "-o", "missing/service.yaml")
    (place / "precious").mkdir()
    (place / "precious" / "data").write_text("data")
    message = refused(bundle, "-o", "service.yaml", "--repository", "precious", "--force")
    assert "--force does not replace it" in message
    code, _, _ = call("deploy", "kserve", bundle, "-o", "service.yaml", "--force", "--quiet", "--cpus", 1)
    assert (
        code == 0
        and checked(Path("service.yaml"))["spec"]["predictor"]["model"]["resources"]["limits"]["cpu"] == "1"
    )


def test_the_file_and_the_folder_are_written_together_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = dynamic_bundle()

    def fail(*arguments: object) -> None:
        raise DeployError("nothing goes")

    monkeypatch.setattr(kserve, "write_repository", fail)
    assert "nothing goes" in refused(bundle, "-o", "service.yaml")
    assert "nothing goes" in refused(bundle, "-o", "service.yaml", "--repository", "new/folder")
    assert os.listdir() == []


# What the command says ------------------------------------------------------------------------------------------


def test_the_command_says_what_was_written_and_what_is_left_to_do() -> None:
    arguments = ("deploy", "kserve", dynamic_bundle(), "--storage-uri", "s3://bucket/digits")
    code, out, err = call(*arguments, "-o", "digits.yaml")
    assert code == 0 and "writing the model repository" in err
    assert [line.strip() for line in out.splitlines()[-2:]] == [
        "copy what is in digits-repository to s3://bucket/digits",
        "kubectl apply -f digits.yaml",
    ]
    assert "1 to 3 replicas, by cpu, target 80" in out
    code, out, _ = call(*arguments, "-o", "again.yaml", "--repository", "models", "--json")
    made = json.loads(out)
    assert code == 0 and made["path"] == "again.yaml" and made["name"] == "vmamba-digits"
    assert made["repository"]["path"] == "models" and models(Path("models")) == [MODEL]
    assert made["repository"]["command"] == "tritonserver --model-repository=/mnt/models"
    assert made["steps"] == ["copy what is in models to s3://bucket/digits", "kubectl apply -f again.yaml"]
    code, out, err = call(*arguments, "-o", "quiet.yaml", "--quiet")
    assert (code, out, err) == (0, "", "") and checked(Path("quiet.yaml"))
