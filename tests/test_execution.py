"""Which providers of ONNX Runtime are wanted: how it is said, in a recipe, in a manifest and to the command line."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import toy_bundles
from command_line import call

import quartermap_deploy as qm
from quartermap_deploy.bundle import load_bundle
from quartermap_deploy.errors import BundleError, InputError, RecipeError, UnknownNameError
from quartermap_deploy.targets import refuse_providers
from quartermap_deploy.targets.execution import ON_CPU, Execution, Provider
from quartermap_deploy.targets.onnxruntime.packages import change_to, installed_packages, mixture
from quartermap_deploy.targets.placement import Placement

CPU, CUDA, OPENVINO = "CPUExecutionProvider", "CUDAExecutionProvider", "OpenVINOExecutionProvider"
WITHOUT_CUDA = pytest.mark.skipif(
    CUDA in onnxruntime.get_available_providers(), reason="this package of ONNX Runtime has CUDA"
)


@pytest.fixture(scope="module")
def bundle() -> Path:
    return toy_bundles.classifier()


# How it is said ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("cuda", CUDA, {}),
        (CUDA, CUDA, {}),
        ("DirectML", "DmlExecutionProvider", {}),
        ("tensorrt:device_id=1,x=0", "TensorrtExecutionProvider", {"device_id": "1", "x": "0"}),
        ("OpenVINO:device_type=HETERO:GPU,CPU,x=2", OPENVINO, {"device_type": "HETERO:GPU,CPU", "x": "2"}),
        ("NewExecutionProvider:a=b=c", "NewExecutionProvider", {"a": "b=c"}),
    ],
)  # fmt: skip
def test_a_provider_is_read(text: str, name: str, options: dict[str, str]) -> None:
    found = Provider.parse(text)
    assert (found.name, dict(found.options)) == (name, options)


@pytest.mark.parametrize("text", ["CUDA:", "CUDA:device_id", "CUDA:=1", "CUDA:device_id=", "CUDA:1a=2"])
def test_options_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected NAME:key=value"):
        Provider.parse(text)


def test_wrong_lists_of_providers_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean OpenVINO"):
        Provider.parse("opnvino")
    with pytest.raises(UnknownNameError, match="unknown provider 'x'"):
        Provider.parse("x")
    with pytest.raises(InputError, match="a twice"):
        Provider.parse("CUDA:a=1,a=2")
    with pytest.raises(InputError, match="named twice"):
        Execution.of(None, ["cuda", CUDA])
    with pytest.raises(InputError, match="takes every node"):
        Execution.of(None, ["cpu", "cuda"])
    with pytest.raises(InputError, match="leave one out"):
        Execution.of("cuda", ["cpu"])
    for wrong in ("gpu", "tpu", "", 1):
        with pytest.raises(UnknownNameError, match=r"unknown device .*; expected cpu, cuda .*, or auto"):
            Execution.of(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one"):
        Execution(())


def test_devices_stand_for_providers() -> None:
    assert Execution.of() == Execution.of("cpu") == ON_CPU and ON_CPU.on_cpu
    cuda, auto = Execution.of("cuda"), Execution.of("auto")
    assert cuda.names == (CUDA,) and not cuda.may_fall_back and not cuda.on_cpu
    assert auto.names == (CUDA, CPU) and auto.may_fall_back
    assert auto == Execution.of(None, ["CUDA", "CPU"]) and str(auto) == "CUDA, CPU"


def test_providers_compute_in_the_types_of_the_model_unless_told_otherwise() -> None:
    assert Provider(CUDA).settings() == {"use_tf32": "0"}
    assert Provider.parse("CUDA:use_tf32=1,device_id=2").settings() == {"use_tf32": "1", "device_id": "2"}
    assert Provider(OPENVINO).settings() == {"precision": "ACCURACY"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("CPU", True), ("OpenVINO", True), ("OpenVINO:device_type=CPU", True), ("OpenVINO:device_type=GPU", False),
     ("OpenVINO:device_type=AUTO:CPU", False), ("CUDA", False), ("Dml", False)],
)  # fmt: skip
def test_where_operators_for_the_memory_of_the_cpu_work(text: str, expected: bool) -> None:
    assert Provider.parse(text).in_host_memory is expected


def test_a_report_has_options_and_of_paths_the_last_part_alone() -> None:
    execution = Execution.of(
        None, ["OpenVINO:cache_dir=/home/me/cache,device_type=GPU", r"Tensorrt:x=C:\me\engines"]
    )
    assert execution.described() == {
        OPENVINO: {"precision": "ACCURACY", "cache_dir": "cache", "device_type": "GPU"},
        "TensorrtExecutionProvider": {"x": "engines"},
    }


def test_a_device_a_provider_or_a_list_stands_for_an_execution(bundle: Path) -> None:
    assert Execution.read("cuda") == Execution.of("cuda") and Execution.read(ON_CPU) is ON_CPU
    assert Execution.read("CPU") == Execution.read(["CPU"]) == Execution.of(None, "CPU") == ON_CPU
    assert Execution.read(("openvino:x=1", "CPU")).names == (OPENVINO, CPU)
    for wrong, kind in (
        (None, "NoneType"),
        (1, "int"),
        ({"a": 1}, "dict"),
        ([None], "NoneType"),
        ([1], "int"),
    ):
        with pytest.raises(InputError, match=f"a {kind}; expected"):
            load_bundle(bundle).session(execution=wrong)  # type: ignore[arg-type]
    for wrong_list in ([None], 7, [b"CPU"]):
        with pytest.raises(InputError, match=r"a (NoneType|int|bytes); expected"):
            Execution.of(providers=wrong_list)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one"):
        Execution.read([])


def test_the_cpu_provider_takes_no_options() -> None:
    with pytest.raises(InputError, match="takes no options"):
        Execution.of(None, ["CPU:foo=1"])
    with pytest.raises(InputError, match="takes no options"):
        Execution.of(None, ["CUDA:device_id=1", "CPU:foo=1"])


# What a session says -------------------------------------------------------------------------------------------------


def test_what_falls_back_to_the_cpu_is_said() -> None:
    placement = Placement((CUDA, CPU), {CUDA: 90, CPU: 10}, {"Shape": 5, "Scan": 2, "A": 1, "B": 1, "C": 1})
    assert placement.notes() == [
        "10 of 100 nodes are not taken by CUDA and run on the CPU: 5 Shape, 2 Scan, 1 A, 1 B, 1 more kinds"
    ]
    assert str(placement) == "CUDA (90 nodes), CPU (10 nodes)"
    assert Placement((CUDA, CPU), {CUDA: 100}).notes() == []
    assert "from version 1.24 on" in Placement((CUDA, CPU)).notes()[0]
    left_out = Placement((CPU,), left_out={CUDA: "no driver"})
    assert left_out.notes() == ["CUDA is left out, so the model runs on CPU: no driver"]
    assert Placement((CPU,)).notes() == [] and str(Placement((CPU,))) == "CPU"


# Packages ------------------------------------------------------------------------------------------------------------


def test_which_package_is_installed() -> None:
    packages = installed_packages()
    assert len(packages) == 1 and next(iter(packages)).startswith("onnxruntime")
    assert packages[next(iter(packages))].split("+")[0] == onnxruntime.__version__.split("+")[0]
    assert mixture(packages) is None


def test_packages_exclude_each_other() -> None:
    both = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in str(mixture(both))
    text = change_to("onnxruntime-gpu", {"onnxruntime": "1.31.1"})
    assert "exclude each other" in text and "pip uninstall -y onnxruntime," in text
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in text


# Recipes and manifests -----------------------------------------------------------------------------------------------


def recipe(folder: Path, targets: str) -> qm.Recipe:
    path = folder / "recipe.toml"
    path.write_text(f'[model]\nname = "vmamba_digits"\n[targets]\n{targets}\n', encoding="utf-8")
    return qm.Recipe.load(path)


def test_a_recipe_names_a_device_or_providers(tmp_path: Path) -> None:
    assert recipe(tmp_path, "").execution == ON_CPU
    assert recipe(tmp_path, 'device = "auto"').execution == Execution.of("auto")
    found = recipe(tmp_path, 'providers = ["OpenVINO", "CPU"]')
    assert found.execution.names == (OPENVINO, CPU)
    (tmp_path / "again.toml").write_text(found.to_toml(tmp_path), encoding="utf-8")
    assert qm.Recipe.load(tmp_path / "again.toml") == found
    assert found.to_dict()["providers"] == [OPENVINO, CPU]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ('device = "gpu"', "gpu"),
        ("device = 1", "no device"),
        ('device = "cuda"\nproviders = ["CPU"]', "both device and providers"),
        ('providers = "CUDA"', "no list of names"),
        ("providers = []", "no provider is named"),
        ('providers = ["Tensorrt:trt_extra_plugin_lib_paths=/tmp/evil.so"]', "a file gives no options"),
        ('providers = ["nonsense"]', "unknown provider"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, targets: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, targets)


def test_providers_need_the_target_that_has_them() -> None:
    from quartermap_deploy.compiling.targets import load_targets

    with pytest.raises(InputError, match="takes none"):
        refuse_providers("tensorrt", Execution.of("cuda"))
    refuse_providers("tensorrt", ON_CPU)
    with pytest.raises(RecipeError, match="onnxruntime is no target"):
        load_targets(qm.Recipe("vmamba_digits", targets=("tensorrt",), execution=Execution.of("cuda")))


def test_a_manifest_gives_no_options(bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(bundle, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["recipe"]["providers"] == [CPU]
    assert manifest["targets"]["onnxruntime"]["providers"] == [CPU]
    manifest["recipe"]["providers"] = ["CUDAExecutionProvider:device_id=1"]
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BundleError, match="providers"):
        load_bundle(copy)
    # And what it names is not what runs it.
    manifest["recipe"]["providers"] = [CUDA]
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    placement = load_bundle(copy).session().placement
    assert placement is not None and placement.providers == (CPU,)


def test_a_bundle_from_before_there_were_providers_is_read(bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(bundle, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    del manifest["recipe"]["providers"]
    manifest["targets"]["onnxruntime"] = {"file": "model.onnx", "provider": CPU}
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert load_bundle(copy).recipe().execution == ON_CPU


# The command line ----------------------------------------------------------------------------------------------------


@WITHOUT_CUDA
@pytest.mark.parametrize("command", ["validate", "bench", "serve", "eval"])
def test_cuda_with_a_package_that_has_none_is_refused(bundle: Path, command: str) -> None:
    more = {"serve": ["--port", 0, "--grpc-port", 0], "eval": ["--format", "digits"]}.get(command, [])
    outcome = call(command, bundle, "--device", "cuda", *more)
    assert outcome.code == 2 and outcome.out == ""
    said = outcome.messages[-1]
    name, version = next(iter(installed_packages().items()))
    assert f"{name} {version}" in said and "onnxruntime-gpu" in said and f"pip uninstall -y {name}" in said
    assert "exclude each other" in said


@WITHOUT_CUDA
def test_cuda_is_refused_before_a_model_is_compiled(tmp_path: Path) -> None:
    outcome = call("compile", "vmamba_digits", "--device", "cuda", "--out", tmp_path / "x")
    assert outcome.code == 2 and "onnxruntime-gpu" in outcome.err and not (tmp_path / "x").exists()


@WITHOUT_CUDA
@pytest.mark.parametrize("command", ["tune", "eval"])
def test_cuda_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def loaded(*arguments: object, **options: object) -> None:
        pytest.fail("the model was loaded first")

    monkeypatch.setattr("quartermap_deploy.evaluation.tune.load_subject", loaded)
    monkeypatch.setattr("quartermap_deploy.compiling.source.load_source", loaded)
    more = ["--budget", "1%", "--out", tmp_path / "t.toml"] if command == "tune" else []
    outcome = call(command, "vmamba_digits", "--device", "cuda", *more)
    assert outcome.code == 2 and "onnxruntime-gpu" in outcome.err and not list(tmp_path.iterdir())


def taking_nothing() -> list[str]:
    """Name a provider that takes no node; skip where the package has none that is known for it."""
    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this package of ONNX Runtime has no provider that takes nothing")
    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip("this ONNX Runtime does not tell which provider has which node")
    return ["Azure"]


def test_a_provider_that_takes_nothing_is_an_error_unless_the_cpu_is_named(
    bundle: Path,
) -> None:
    names = taking_nothing()
    loaded = load_bundle(bundle)
    with pytest.raises(
        BundleError, match=r"Azure would leave the whole model to the CPU: of the model's .* none.*"
    ):
        loaded.session(execution=names)
    session = loaded.session(execution=[*names, "CPU"])
    assert session.placement is not None and session.placement.providers == (CPU,)
    [note] = [text for text in session.placement.notes() if "Azure" in text]
    assert note.startswith("Azure is left out, so the model runs on CPU: of the model's")
    assert str(session.scans) == str(loaded.session().scans)


@WITHOUT_CUDA
def test_auto_goes_to_the_cpu_with_a_word(bundle: Path) -> None:
    outcome = call("validate", bundle, "--device", "auto", "--json")
    assert outcome.code == 0 and outcome.json["passed"]
    found = outcome.json["execution"]
    assert found["wanted"] == [CUDA, CPU] and found["providers"] == [CPU] and found["left_out"] == [CUDA]
    assert any("CUDA is left out, so the model runs on CPU" in line for line in outcome.messages)
    benched = call("bench", bundle, "--device", "auto", "--repeats", 1, "--json")
    assert benched.json["bundles"][0]["providers"] == "CPU"
    assert any("onnxruntime-gpu" in line for line in benched.messages)


def test_wrong_options_end_with_one_message(bundle: Path) -> None:
    both = call("validate", bundle, "--device", "cuda", "--provider", "CPU")
    assert both.code == 2 and "leave one out" in both.messages[-1]
    localise = call("validate", bundle, "--localise", "--device", "auto")
    assert localise.code == 2 and "--localise" in localise.messages[-1]
    unknown = call("predict", bundle, "x.png", "--provider", "CUDAA")
    assert unknown.code == 2 and "did you mean CUDA" in unknown.messages[-1]
