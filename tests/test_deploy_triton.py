"""`quartermap deploy triton`: what is written, read by Triton's own protobuf, and run as Triton would run it."""

from __future__ import annotations

import errno
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from command_line import call
from deploy_bundles import (
    ENGINE,
    MODEL,
    change_manifest,
    contents,
    dynamic_bundle,
    static_bundle,
    with_engine,
    write_plugin,
)
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from triton_repositories import TYPES, models, read_config, warmup_batch
from tritonclient.grpc import model_config_pb2

import quartermap_deploy as qm
from quartermap_deploy.bundle import describe_file
from quartermap_deploy.deploy import triton
from quartermap_deploy.deploy.textproto import textproto
from quartermap_deploy.deploy.triton import TritonOptions, deploy_triton
from quartermap_deploy.deploy.triton_source import batch_limit
from quartermap_deploy.errors import DeployError
from quartermap_deploy.targets.tensorrt.options import Profile
from quartermap_deploy.validation.golden import read_golden

Array = np.ndarray[Any, Any]
IMAGE_MODELS = [f"{MODEL}_image", f"{MODEL}_preprocess", f"{MODEL}_probabilities"]


@pytest.fixture(scope="session")
def dynamic() -> Path:
    """A bundle in float32 that takes any batch; not to be changed."""
    return dynamic_bundle()


@pytest.fixture(scope="session")
def static() -> Path:
    """A bundle that takes one image at a time, in float16; not to be changed."""
    return static_bundle()


@pytest.fixture(scope="session")
def repositories(dynamic: Path, static: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The repositories of both; not to be changed."""
    folder = tmp_path_factory.mktemp("repositories")
    for name, bundle in (("dynamic", dynamic), ("static", static)):
        deploy_triton(bundle, folder / name)
    return {name: folder / name for name in ("dynamic", "static")}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as wide as in a pipe, and no plugin library of this machine."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("QUARTERMAP_PLUGIN", raising=False)


def golden_of(bundle: Path) -> Any:
    """The golden inputs and outputs of a bundle."""
    return read_golden(bundle, qm.load_bundle(bundle).manifest["golden"])


def onnx_session(repository: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = repository / MODEL / "1" / "model.onnx"
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# The configuration ----------------------------------------------------------------------------------------------


def test_triton_reads_the_configuration_of_a_bundle_of_any_batch(repositories: dict[str, Path]) -> None:
    config = read_config(repositories["dynamic"], MODEL)
    assert (config.name, config.platform, config.backend) == (MODEL, "onnxruntime_onnx", "onnxruntime")
    assert config.default_model_filename == "model.onnx" and not config.cc_model_filenames
    assert config.max_batch_size == 8
    (images,), (logits,) = config.input, config.output
    assert (images.name, images.data_type, list(images.dims)) == (
        "images",
        model_config_pb2.TYPE_FP32,
        [3, 64, 64],
    )
    assert (logits.name, logits.data_type, list(logits.dims)) == ("logits", model_config_pb2.TYPE_FP32, [10])
    assert logits.label_filename == "labels.txt"
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000
    assert not config.dynamic_batching.preferred_batch_size
    assert config.parameters["intra_op_thread_count"].string_value == "0"
    assert [(sample.name, sample.batch_size) for sample in config.model_warmup] == [
        ("sample 1", 1),
        ("sample 2", 1),
        ("batch of 8", 8),
    ]


def test_a_static_batch_is_part_of_the_shapes_and_nothing_is_batched(repositories: dict[str, Path]) -> None:
    config = read_config(repositories["static"], MODEL)
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    (images,), (logits,) = config.input, config.output
    half = model_config_pb2.TYPE_FP16
    assert (images.data_type, list(images.dims)) == (half, [1, 3, 64, 64])
    assert (logits.data_type, list(logits.dims)) == (half, [1, 10])
    # Triton leaves a sample of batch 0 out, and takes no more than 1 from a model that does not batch.
    assert {sample.batch_size for sample in config.model_warmup} == {1}


def test_open_sizes_stay_open_but_for_images_and_warm_up(dynamic: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "open"
    shutil.copytree(dynamic, bundle)
    (images,) = json.loads((bundle / "manifest.json").read_text())["inputs"]
    change_manifest(bundle, inputs=[images | {"shape": ["batch", 3, "height", "width"]}])
    made = deploy_triton(bundle, tmp_path / "repository")
    config = read_config(made.path, MODEL)
    assert list(config.input[0].dims) == [3, -1, -1]
    # Triton makes no request of a size that it does not know.
    assert all(list(sample.inputs["images"].dims) == [3, 64, 64] for sample in config.model_warmup)
    assert list(read_config(made.path, f"{MODEL}_preprocess").output[0].dims) == [3, 64, 64]


def test_options_arrive_in_the_configuration(dynamic: Path, tmp_path: Path) -> None:
    options = TritonOptions(
        name="digits.v2", version=7, max_batch=16, max_delay_us=500, device="cuda", instances=3, images=False
    )
    made = deploy_triton(dynamic, tmp_path / "repository", options)
    config = read_config(made.path, "digits.v2")
    assert (config.max_batch_size, config.dynamic_batching.max_queue_delay_microseconds) == (16, 500)
    (group,) = config.instance_group
    assert (group.count, group.kind) == (3, model_config_pb2.ModelInstanceGroup.KIND_GPU)
    # Threads are a setting of CPUs.
    assert not config.parameters
    assert models(made.path) == ["digits.v2"] and (made.path / "digits.v2" / "7" / "model.onnx").is_file()
    threads = deploy_triton(dynamic, tmp_path / "threads", TritonOptions(threads=2, max_batch=1))
    config = read_config(threads.path, MODEL)
    assert config.parameters["intra_op_thread_count"].string_value == "2"
    assert config.max_batch_size == 1 and not config.HasField("dynamic_batching")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_text_format(text: str) -> None:
    written = textproto({"name": text, "parameters": [{"key": text, "value": {"string_value": text}}]})
    config = text_format.Parse(written, model_config_pb2.ModelConfig())
    assert config.name == text and config.parameters[text].string_value == text


# The folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_repository_holds_what_it_lists_and_models_alone(
    kind: str, repositories: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    repository, bundle = repositories[kind], request.getfixturevalue(kind)
    listed = json.loads((repository / "quartermap.json").read_text())
    found = {
        str(path.relative_to(repository)): describe_file(path)
        for path in repository.rglob("*")
        if path.is_file() and path.name != "quartermap.json"
    }
    assert found == listed["files"]
    assert models(repository) == sorted(listed["models"]) == sorted([MODEL, *IMAGE_MODELS])
    assert [path.name for path in repository.iterdir() if path.is_file()] == ["quartermap.json"]
    assert (repository / MODEL / "1" / "model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()
    assert listed["bundle"]["model"] == qm.load_bundle(bundle).manifest["model"]
    for model in models(repository):
        folders = {path.name for path in (repository / model).iterdir() if path.is_dir()}
        assert folders <= {"1", "warmup"} and any((repository / model / "1").iterdir())
        assert read_config(repository, model).name == model


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_labels_are_there_for_every_output_that_names_them(kind: str, repositories: dict[str, Path]) -> None:
    named = 0
    for model in models(repositories[kind]):
        for output in read_config(repositories[kind], model).output:
            if output.label_filename:
                labels = (repositories[kind] / model / output.label_filename).read_text().splitlines()
                assert labels == [str(digit) for digit in range(10)]
                named += 1
    assert named == 3


def test_labels_of_ones_own(dynamic: Path, tmp_path: Path) -> None:
    names = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
    (tmp_path / "names.txt").write_text("\n".join(names), encoding="utf-8")
    made = deploy_triton(dynamic, tmp_path / "repository", TritonOptions(labels=tmp_path / "names.txt"))
    for model in (MODEL, f"{MODEL}_image"):
        assert (made.path / model / "labels.txt").read_text(encoding="utf-8").splitlines() == names


def test_torch_is_not_needed(dynamic: Path, tmp_path: Path) -> None:
    # Polygraphy, which reads the golden inputs, imports torch where it is there; so here it is not.
    script = """
import sys

class WithoutTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, WithoutTorch())
from quartermap_deploy.deploy.triton import deploy_triton
deploy_triton(*sys.argv[1:])
"""
    command = [sys.executable, "-c", script, str(dynamic), str(tmp_path / "repository")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "repository" / "quartermap.json").is_file()


# What a server needs; test_real_triton.py runs it -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_warm_up_requests_are_the_golden_inputs(
    kind: str, repositories: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    repository = repositories[kind]
    inputs, (outputs, *_) = golden_of(request.getfixturevalue(kind))
    golden, expected = inputs["images"]["images"], outputs["logits"]
    config, session = read_config(repository, MODEL), onnx_session(repository)
    wanted = TYPES[model_config_pb2.DataType.Name(config.input[0].data_type)]
    for sample in config.model_warmup:
        batch = warmup_batch(repository, MODEL, sample, "images")
        index = (
            int(sample.inputs["images"].input_data_file.removeprefix("sample").removesuffix("_input1")) - 1
        )
        assert np.array_equal(batch, np.repeat(golden[index : index + 1], len(batch), axis=0).astype(wanted))
        (logits,) = session.run(["logits"], {"images": batch})
        tolerance = 1e-4 if wanted == np.float32 else 2e-2
        limit = tolerance * np.abs(expected).max()
        assert np.abs(logits.astype(np.float64) - expected[index : index + 1]).max() < limit
    assert len({sample.inputs["images"].input_data_file for sample in config.model_warmup}) == len(golden)


def test_the_models_stand_alone(repositories: dict[str, Path]) -> None:
    """What they share with this package is in their own text, as the package is not there where they run."""
    for model in IMAGE_MODELS[1:]:
        text = (repositories["dynamic"] / model / "1" / "model.py").read_text()
        assert "import quartermap_deploy" not in text and "from quartermap_deploy" not in text
        # A folder of this name would be a change to Triton, which then loads the model again.
        assert (repositories["dynamic"] / model / "1" / "__pycache__").is_file()
    text = (repositories["dynamic"] / IMAGE_MODELS[1] / "1" / "model.py").read_text()
    assert "def cropped(" in text and "def with_mode(" in text


# Engines --------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(dynamic: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A bundle with an engine, and the plugin library that it was built with."""
    plugin = write_plugin(tmp_path)
    return with_engine(dynamic, tmp_path / "engine", plugin=plugin), plugin


def test_an_engine_is_served_on_its_own_gpus_with_its_plugin(
    engine: tuple[Path, Path], tmp_path: Path
) -> None:
    bundle, plugin = engine
    made = deploy_triton(bundle, tmp_path / "my repository", TritonOptions(plugin=plugin))
    config = read_config(made.path, MODEL)
    assert (config.platform, config.backend) == ("tensorrt_plan", "tensorrt")
    # Without a default name, a GPU that has no engine finds no file, instead of one that it cannot load.
    assert dict(config.cc_model_filenames) == {"8.9": "model.sm89.plan"} and not config.default_model_filename
    assert [path.name for path in (made.path / MODEL / "1").iterdir()] == ["model.sm89.plan"]
    assert (made.path / MODEL / "1" / "model.sm89.plan").read_bytes() == (
        bundle / "model.tensorrt.engine"
    ).read_bytes()
    assert config.max_batch_size == 32 and not config.dynamic_batching.preferred_batch_size
    (group,) = config.instance_group
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU and not group.profile
    assert [(sample.name, sample.batch_size) for sample in config.model_warmup] == [
        ("sample 1", 1),
        ("sample 2", 1),
        ("batch of 8", 8),
        ("batch of 32", 32),
    ]
    library = made.path / "libquartermap_plugin.so"
    assert library.read_bytes() == plugin.read_bytes()
    assert shlex.split(made.command) == [
        "tritonserver",
        f"--model-repository={made.path}",
        f"--backend-config=tensorrt,plugins={library}",
    ]
    assert any("TensorRT 10.13.3.9 and no other version" in note and "8.9" in note for note in made.notes)


def test_the_onnx_model_of_a_bundle_with_an_engine(engine: tuple[Path, Path], tmp_path: Path) -> None:
    made = deploy_triton(engine[0], tmp_path / "repository", TritonOptions(backend="onnxruntime"))
    assert read_config(made.path, MODEL).backend == "onnxruntime"
    assert shlex.split(made.command) == ["tritonserver", f"--model-repository={made.path}"]
    assert not (made.path / "libquartermap_plugin.so").exists()


def test_engines_for_several_gpus_are_one_model(dynamic: Path, tmp_path: Path) -> None:
    plugin = write_plugin(tmp_path)
    files = {"8.9": "model.sm89.plan", "9.0": "model.sm90.plan", "10.0": "model.sm100.plan"}
    bundles = [
        with_engine(dynamic, tmp_path / name, capability=capability, plugin=plugin)
        for capability, name in files.items()
    ]
    options = TritonOptions(plugin=plugin, engines_from=tuple(bundles[1:]))
    made = deploy_triton(bundles[0], tmp_path / "repository", options)
    assert dict(read_config(made.path, MODEL).cc_model_filenames) == files
    for capability, name in files.items():
        assert (made.path / MODEL / "1" / name).read_bytes() == ENGINE + capability.encode()


def test_an_engine_for_every_gpu_is_the_default(dynamic: Path, tmp_path: Path) -> None:
    everywhere = with_engine(
        dynamic,
        tmp_path / "ampere",
        capability="8.0",
        hardware_compatibility="ampere_plus",
        version_compatible=True,
    )
    made = deploy_triton(everywhere, tmp_path / "repository")
    config = read_config(made.path, MODEL)
    assert config.default_model_filename == "model.plan" and not config.cc_model_filenames
    assert (made.path / MODEL / "1" / "model.plan").is_file()
    assert "--backend-config=tensorrt,version-compatible=true" in shlex.split(made.command)
    exact = with_engine(dynamic, tmp_path / "l4", capability="8.9", version_compatible=True)
    both = deploy_triton(everywhere, tmp_path / "both", TritonOptions(engines_from=(exact,)))
    config = read_config(both.path, MODEL)
    assert (config.default_model_filename, dict(config.cc_model_filenames)) == (
        "model.plan",
        {"8.9": "model.sm89.plan"},
    )


def test_several_profiles_are_all_named_and_waited_for(dynamic: Path, tmp_path: Path) -> None:
    profiles = (Profile((1, 1, 1)), Profile((2, 4, 8)), Profile((9, 16, 24)))
    bundle = with_engine(dynamic, tmp_path / "engine", profiles=profiles)
    config = read_config(deploy_triton(bundle, tmp_path / "repository").path, MODEL)
    assert config.max_batch_size == 24
    assert list(config.instance_group[0].profile) == ["0", "1", "2"]
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 16, 24]
    assert [sample.batch_size for sample in config.model_warmup] == [1, 1, 4, 16, 24]


@pytest.mark.parametrize(
    ("batches", "limit"),
    [
        ([(1, 8, 32)], 32),
        ([(1, 1, 1), (2, 8, 32)], 32),
        ([(4, 8, 32), (1, 1, 4)], 32),
        ([(1, 1, 1), (8, 8, 32)], 1),
        ([(1, 2, 3), (5, 6, 7)], 3),
        ([(2, 2, 64), (1, 1, 1), (65, 65, 65)], 65),
    ],
)
def test_batches_reach_as_far_as_profiles_leave_no_gap(
    batches: list[tuple[int, int, int]], limit: int
) -> None:
    assert batch_limit([Profile(batch) for batch in batches], Path("bundle")) == limit


def test_profiles_of_several_sizes_all_have_to_take_a_batch() -> None:
    small, large = (Profile((1, 1, most), height=(side,) * 3) for most, side in ((32, 224), (4, 448)))
    assert batch_limit([small, large], Path("bundle")) == 4
    with pytest.raises(DeployError, match="single image"):
        batch_limit([small, Profile((2, 2, 8), height=(448,) * 3)], Path("bundle"))


# Refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def refused(place: Path, *arguments: object) -> str:
    """Run a command that must be refused: exit code 2, one message, and nothing written."""
    before = contents(place)
    code, out, err = call("deploy", "triton", *arguments, "--quiet")
    assert code == 2, err
    assert out == "" and err.startswith("quartermap: error: ") and err.count("\n") == 1, err
    assert contents(place) == before
    return err


def test_what_is_no_bundle_is_refused(dynamic: Path, place: Path) -> None:
    assert "there is no bundle" in refused(place, "nothing", "-o", "repository")
    (place / "folder").mkdir()
    assert "is no bundle" in refused(place, "folder", "-o", "repository")
    shutil.copytree(dynamic, place / "damaged")
    model = place / "damaged" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    assert "does not match its manifest" in refused(place, "damaged", "-o", "repository")
    shutil.copytree(dynamic, place / "without")
    (place / "without" / "inputs.json").write_text("[]")
    change_manifest(place / "without")
    assert "golden files" in refused(place, "without", "-o", "repository")
    shutil.copytree(dynamic, place / "mute")
    change_manifest(place / "mute", inputs={})
    assert "inputs is {}, expected array" in refused(place, "mute", "-o", "repository")


def test_targets_that_the_bundle_lacks_are_refused(dynamic: Path, place: Path) -> None:
    message = refused(place, dynamic, "-o", "repository", "--backend", "tensorrt")
    assert "built for onnxruntime, not for tensorrt" in message and "quartermap rebuild" in message
    assert "no backend 'torch'" in refused(place, dynamic, "-o", "repository", "--backend", "torch")
    with_engine(dynamic, place / "rtx")
    entry = json.loads((place / "rtx" / "manifest.json").read_text())["targets"]["tensorrt"]
    change_manifest(place / "rtx", targets={"tensorrt-rtx": entry})
    assert "Triton has no backend for that" in refused(place, "rtx", "-o", "repository")
    message = refused(place, "rtx", "-o", "repository", "--backend", "onnxruntime")
    assert "built for tensorrt-rtx, not for onnxruntime" in message


def test_a_missing_or_another_plugin_is_refused(
    engine: tuple[Path, Path], dynamic: Path, place: Path
) -> None:
    bundle, plugin = engine
    assert "name it with --plugin" in refused(place, bundle, "-o", "repository")
    assert "no plugin library" in refused(place, bundle, "-o", "repository", "--plugin", place / "lost.so")
    (place / "other.so").write_bytes(b"another one")
    message = refused(place, bundle, "-o", "repository", "--plugin", place / "other.so")
    assert "found another library" in message
    plain = with_engine(dynamic, place / "plain")
    assert "needs no plugin" in refused(place, plain, "-o", "repository", "--plugin", plugin)
    message = refused(place, dynamic, "-o", "repository", "--plugin", plugin)
    assert "takes no engines" in message
    message = refused(place, bundle, "-o", "a;b", "--plugin", plugin)
    assert "semicolons" in message


def test_engines_that_do_not_belong_together_are_refused(dynamic: Path, static: Path, place: Path) -> None:
    first = with_engine(dynamic, place / "first")

    def together(other: Path) -> str:
        return refused(place, first, "-o", "repository", "--engines-from", other)

    assert "compute capability 8.9" in together(with_engine(dynamic, place / "same"))
    assert "model.onnx" in together(with_engine(static, place / "other_model", capability="9.0"))
    assert "version of TensorRT" in together(
        with_engine(dynamic, place / "version", capability="9.0", version="10.14.1.48")
    )
    assert "profiles" in together(
        with_engine(dynamic, place / "profiles", capability="9.0", profiles=(Profile((1, 2, 4)),))
    )
    assert "not for tensorrt" in together(dynamic)
    assert "there is no bundle" in together(place / "nowhere")
    message = refused(place, dynamic, "-o", "repository", "--backend", "onnxruntime", "--engines-from", first)
    assert "takes no engines" in message


def test_options_that_do_not_fit_the_bundle_are_refused(dynamic: Path, static: Path, place: Path) -> None:
    engine = with_engine(dynamic, place / "engine", profiles=(Profile((1, 2, 4)),))
    assert "batches of up to 4, 8 were asked for" in refused(place, engine, "-o", "r", "--max-batch", 8)
    assert "run on GPUs" in refused(place, engine, "-o", "r", "--device", "cpu")
    assert "one request at a time" in refused(place, static, "-o", "r", "--max-batch", 2)
    single = with_engine(dynamic, place / "narrow", profiles=(Profile((2, 2, 4)),))
    assert "no profile" in refused(place, single, "-o", "r")
    assert "unknown device" in refused(place, dynamic, "-o", "r", "--device", "tpu")
    for name in ("../out", "a/b", ".hidden", ""):
        assert "cannot be named" in refused(place, dynamic, "-o", "r", "--name", name), name
    assert "begins with /" in refused(place, dynamic, "-o", "r", "--mount", "models")
    (place / "labels").write_text("zero\none\n")
    assert "2 lines" in refused(place, dynamic, "-o", "r", "--labels", "labels")
    assert "cannot be read" in refused(place, dynamic, "-o", "r", "--labels", "no_labels")
    for option, value in (
        ("--max-batch", "0"),
        ("--max-delay-ms", "-1"),
        ("--threads", "x"),
        ("--instances", "0"),
        ("--instances", "99999999999"),
        ("--threads", "99999999999"),
        ("--model-version", "99999999999999999999"),
    ):
        assert option in refused(place, dynamic, "-o", "r", option, value)
    assert "-o/--out" in refused(place, dynamic)


def test_only_a_repository_of_ours_is_replaced(dynamic: Path, place: Path) -> None:
    deploy_triton(dynamic, place / "repository", TritonOptions(images=False))
    assert "replace it with --force" in refused(place, dynamic, "-o", "repository")
    (place / "files").mkdir()
    (place / "files" / "precious").write_text("data")
    assert "choose another folder" in refused(place, dynamic, "-o", "files")
    assert "--force does not replace it" in refused(place, dynamic, "-o", "files", "--force")
    (place / "file").write_text("data")
    assert "--force does not replace it" in refused(place, dynamic, "-o", "file", "--force")
    code, _, _ = call("deploy", "triton", dynamic, "-o", "repository", "--force", "--quiet")
    assert code == 0 and models(place / "repository") == sorted([MODEL, *IMAGE_MODELS])
    assert {path.name for path in place.iterdir()} == {"repository", "files", "file"}


def test_a_full_disk_leaves_what_was_there(
    dynamic: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy_triton(dynamic, place / "repository", TritonOptions(images=False))
    real = shutil.copyfile

    def copy(source: Path, to: Path) -> Path:
        if Path(to).name == "model.onnx":
            raise OSError(errno.ENOSPC, "No space left on device", str(to))
        return real(source, to)

    monkeypatch.setattr(triton.shutil, "copyfile", copy)
    assert "No space left" in refused(place, dynamic, "-o", "repository", "--force")
    assert "No space left" in refused(place, dynamic, "-o", "new/repository")


# What the command says ------------------------------------------------------------------------------------------


def test_the_command_says_what_was_written_and_how_to_start_triton(
    engine: tuple[Path, Path], place: Path
) -> None:
    bundle, plugin = engine
    arguments = ("deploy", "triton", bundle, "--plugin", plugin, "--mount", "/models/")
    code, out, err = call(*arguments, "-o", "repository")
    assert code == 0 and "writing the model repository" in err
    line = (
        "tritonserver --model-repository=/models "
        "--backend-config=tensorrt,plugins=/models/libquartermap_plugin.so"
    )
    assert out.splitlines()[-1].strip() == line
    assert all(model in out for model in (MODEL, *IMAGE_MODELS)) and "pip install pillow" in out
    code, out, err = call(*arguments, "-o", "again", "--json")
    made = json.loads(out)
    assert code == 0 and made["command"] == line and made["path"] == "again"
    assert made["backend"] == "tensorrt" and made["device"] == "cuda" and made["max_batch"] == 32
    files = {str(path.relative_to("again")) for path in Path("again").rglob("*") if path.is_file()}
    assert set(made["files"]) == files
    code, out, err = call(*arguments, "-o", "quiet", "--quiet", "--no-images")
    assert (code, out, err) == (0, "", "") and models(place / "quiet") == [MODEL]
