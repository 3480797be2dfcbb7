"""Loading checkpoints: every public spelling fits, and nothing else gets through."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_models import CONFIGS, TINY, build, load, tiny
from safetensors.torch import save_file
from small_cards import small_card, small_cards  # noqa: F401  (fixture)
from torch import Tensor

from quartermap_deploy.architectures import create_model, factory, list_models, load_card
from quartermap_deploy.architectures.checkpoint import (
    canonical_state_dict,
    load_checkpoint,
    read_checkpoint,
)
from quartermap_deploy.architectures.factory import Weights, create_with_weights
from quartermap_deploy.errors import CheckpointError, InputError
from quartermap_deploy.weights import EMA_WRAPPERS, WRAPPERS, without_prefix

State = dict[str, Tensor]


LEGACY = (
    ("patch_embed.0.", "patch_embed.proj."),
    ("patch_embed.2.", "patch_embed.norm."),
    (".norm.", ".ln_1."),
    (".op.", ".self_attention."),
    ("classifier.", ""),
)


def respell(state: State, name: str, spelling: dict[str, Any]) -> State:
    """Return the same weights as another version of the public code would have stored them."""
    respelled = {}
    for key, tensor in state.items():
        if key.endswith("x_proj_weight"):
            directions, rows, columns = tensor.shape
            if spelling["x_proj"] == "flattened":
                tensor = tensor.reshape(directions * rows, columns)
            elif spelling["x_proj"] == "convolution":
                tensor = tensor.reshape(directions * rows, columns, 1)
            if spelling["x_proj"] != "stacked":
                key = key.replace("x_proj_weight", "x_proj.weight")
        elif key.endswith("dt_projs_weight"):
            if spelling["dt_projs"] != "stacked":
                tensor = tensor.flatten(0, 1)
                key = key.replace("dt_projs_weight", "dt_projs.weight")
        elif key.endswith("dt_projs_bias"):
            if spelling["dt_bias"] != "stacked":
                tensor = tensor.flatten()
                key = key.replace("dt_projs_bias", "dt_projs.bias")
        elif spelling["four_axes"] and key.endswith(
            ("_proj.weight", "fc1.weight", "fc2.weight", "reduction.weight")
        ):
            tensor = tensor[:, :, None, None]
        if name == "v0" and spelling["numbered_merging"]:
            key = key.replace("downsample.norm.", "downsample.1.").replace(
                "downsample.reduction.", "downsample.2."
            )
        # In v2 the stem has more steps than the legacy names can tell apart.
        if spelling["legacy"] and name == "v0" and "downsample" not in key:
            for new, old in LEGACY:
                if not (new == ".norm." and "blocks" not in key):
                    key = key.replace(new, old)
        respelled[spelling["prefix"] + key] = tensor
    return respelled


spellings = st.fixed_dictionaries(
    {
        "x_proj": st.sampled_from(["stacked", "flattened", "convolution"]),
        "dt_projs": st.sampled_from(["stacked", "flattened"]),
        "dt_bias": st.sampled_from(["stacked", "flattened"]),
        "four_axes": st.booleans(),
        "numbered_merging": st.booleans(),
        "legacy": st.booleans(),
        "prefix": st.sampled_from(["", "module.", "_orig_mod.module.", "model.", "net.", "model.backbone."]),
    }
)
wrappers = st.lists(st.sampled_from([*WRAPPERS, *EMA_WRAPPERS]), max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(TINY)), spellings, wrappers, st.sampled_from([".pth", ".safetensors"]))
def test_every_spelling_loads(
    tmp_path: Path, name: str, spelling: dict[str, Any], wrapping: list[str], suffix: str
) -> None:
    trained = tiny(name)
    content: Any = respell(trained.state_dict(), name, spelling)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file({key: tensor.contiguous().clone() for key, tensor in content.items()}, path)
    else:
        for key in wrapping:
            content = {"epoch": 3, key: content, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
        torch.save(content, path)
    model = tiny(name)
    load_checkpoint(model, path)
    loaded = model.state_dict()
    for key, tensor in trained.state_dict().items():
        assert torch.equal(loaded[key], tensor), key


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_public_keys_of_the_references_load(name: str, tmp_path: Path) -> None:
    reference = load(name)
    torch.save({"model": reference.state}, tmp_path / "public.pth")
    model = build(name)
    load_checkpoint(model, tmp_path / "public.pth")
    with torch.inference_mode():
        assert torch.equal(model(reference.input), reference.model(reference.input))


def test_renaming_is_pure_and_idempotent() -> None:
    model = tiny("v0")
    spelling = {
        "x_proj": "flattened",
        "dt_projs": "flattened",
        "dt_bias": "flattened",
        "four_axes": True,
        "numbered_merging": True,
        "legacy": True,
        "prefix": "",
    }
    state = respell(model.state_dict(), "v0", spelling)
    before = {key: tensor.shape for key, tensor in state.items()}
    canonical = canonical_state_dict(state, model)
    assert {key: tensor.shape for key, tensor in state.items()} == before
    assert canonical.keys() == model.state_dict().keys() != state.keys()
    again = canonical_state_dict(canonical, model)
    assert all(torch.equal(again[key], canonical[key]) for key in canonical)


def test_the_moving_average_is_preferred_unless_asked_otherwise(tmp_path: Path) -> None:
    weights, average = tiny("v2").state_dict(), tiny("v2").state_dict()
    path = tmp_path / "both.pth"
    torch.save({"model": weights, "model_ema": average}, path)
    key = "classifier.head.weight"
    assert torch.equal(read_checkpoint(path).state[key], average[key])
    assert torch.equal(read_checkpoint(path, prefer_ema=False).state[key], weights[key])
    torch.save({"model": weights, "model_ema": None}, path)
    assert torch.equal(read_checkpoint(path).state[key], weights[key])


def test_settings_kept_beside_the_weights_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class CfgNode(dict):  # type: ignore[type-arg]
        """As in yacs, which VMamba's training script stores: a dict with attributes."""

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    stand_in = types.ModuleType("yacs.config")
    stand_in.CfgNode = CfgNode  # type: ignore[attr-defined]
    config = CfgNode(MODEL=CfgNode(TYPE="vssm"))
    config.frozen = True
    state = tiny("v2").state_dict()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", stand_in)
        torch.save(
            {"model": state, "config": config, "args": argparse.Namespace(lr=0.1)}, tmp_path / "full.pth"
        )
    assert read_checkpoint(tmp_path / "full.pth").state.keys() == state.keys()


def test_training_counters_may_be_missing_or_left_over(tmp_path: Path) -> None:
    trained, model = tiny("medmamba"), tiny("medmamba")
    state = {key: value for key, value in trained.state_dict().items() if "num_batches_tracked" not in key}
    assert len(state) < len(trained.state_dict())
    # The profiler thop leaves these two in every module.
    state |= {"total_ops": torch.zeros(1), "layers.0.blocks.0.total_params": torch.zeros(1)}
    torch.save(state, tmp_path / "weights.pth")
    load_checkpoint(model, tmp_path / "weights.pth")
    assert torch.equal(model.head.weight, trained.head.weight)


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    trained, model = tiny("v2").half(), tiny("v2")
    save_file(trained.state_dict(), tmp_path / "half.safetensors")
    load_checkpoint(model, tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.classifier.head.weight, trained.classifier.head.weight.float())


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "weights.pth"
    torch.save({"model": tiny("v2").state_dict(), "extra": Payload(f"touch {trace}")}, path)
    with pytest.raises(CheckpointError, match=r"system, which could run code"):
        read_checkpoint(path)
    assert not trace.exists()
    # The file would have run the command: the test is able to fail.
    torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_plain_pickle_is_refused_as_such_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    trace, path = tmp_path / "trace", tmp_path / "weights.pth"
    whole = pickle.dumps({"model": Payload(f"touch {trace}")}, protocol)
    for content in (whole, whole[:-1]) if protocol else (whole,):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="could run code"):
            read_checkpoint(path)
    assert not trace.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(tiny("v2"), tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match=r"VMamba, which could run code"):
        read_checkpoint(tmp_path / "module.pth")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the bytes of an undamaged checkpoint in both formats."""
    directory = tmp_path_factory.mktemp("files")
    state = tiny("medmamba").state_dict()
    torch.save(state, directory / "weights.pth")
    save_file(state, directory / "weights.safetensors")
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["weights.pth", "weights.safetensors"]), st.floats(0, 0.9999))
def test_a_truncated_file_is_refused(
    files: dict[str, bytes], tmp_path: Path, name: str, share: float
) -> None:
    whole = files[name]
    path = tmp_path / name
    path.write_bytes(whole)
    read_checkpoint(path)
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"empty|damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1",
        b"<!DOCTYPE html>",
        b"PK\x03\x04 not a zip",
        pickle.dumps({"epoch": 3}),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        read_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content", [{}, {"epoch": 3}, [torch.zeros(2)], {"model": {"epoch": 3}}, torch.zeros(2)]
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no state dict"):
        read_checkpoint(tmp_path / "other.pth")


def test_only_the_first_keys_of_such_a_file_are_named(tmp_path: Path) -> None:
    torch.save({f"key {number}": number for number in range(12)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"found key 0, key 1, key 2, key 3, key 4 and 7 more$"):
        read_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path, value: float) -> None:
    state = tiny("v2").state_dict()
    state["layers.1.blocks.0.op.A_logs"][3, 0] = value
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError, match=r"NaN or infinite values in layers\.1\.blocks\.0\.op\.A_logs$"):
        read_checkpoint(tmp_path / "broken.safetensors")


def test_weights_that_are_whole_numbers_are_refused_by_name(tmp_path: Path) -> None:
    state = tiny("v2").state_dict()
    for key, dtype in (("layers.0.blocks.0.op.Ds", torch.int64), ("classifier.head.weight", torch.int8)):
        state[key] = state[key].to(dtype)
    save_file(state, tmp_path / "whole.safetensors")
    with pytest.raises(CheckpointError, match=r"\.Ds \(int64\), classifier\.head\.weight \(int8\)\. Give"):
        read_checkpoint(tmp_path / "whole.safetensors")


def test_what_does_not_fit_is_named_and_counted(tmp_path: Path) -> None:
    state = tiny("v2").state_dict()
    del state["classifier.norm.weight"]
    state["surplus.weight"] = torch.zeros(2)
    state["layers.0.blocks.0.op.Ds"] = torch.zeros(7)
    for index in range(9):
        state[f"surplus.{index}"] = torch.zeros(2)
    save_file(state, tmp_path / "other.safetensors")
    model = tiny("v2")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, tmp_path / "other.safetensors")
    message = str(caught.value)
    assert "1 missing: classifier.norm.weight;" in message
    assert "10 unexpected: surplus.0," in message and "and 5 more" in message
    assert "1 of another shape: layers.0.blocks.0.op.Ds (7,) instead of (128,)" in message
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_a_transposed_projection_is_not_reshaped_into_place(tmp_path: Path) -> None:
    state = tiny("v2").state_dict()
    key = "layers.0.blocks.0.op.x_proj_weight"
    state[key] = state[key].transpose(1, 2).contiguous()
    save_file(state, tmp_path / "transposed.safetensors")
    with pytest.raises(CheckpointError, match=r"x_proj_weight \(4, 32, 3\) instead of \(4, 3, 32\)"):
        load_checkpoint(tiny("v2"), tmp_path / "transposed.safetensors")


def test_two_spellings_of_one_tensor_are_refused() -> None:
    model = tiny("v2")
    state = OrderedDict(model.state_dict())
    state["layers.0.blocks.0.op.x_proj.weight"] = state["layers.0.blocks.0.op.x_proj_weight"]
    with pytest.raises(CheckpointError, match=r"twice, as .*x_proj_weight and as .*x_proj\.weight"):
        canonical_state_dict(state, model)


def test_prefixes_are_taken_off_the_front_only() -> None:
    state, prefix = without_prefix({"module.a.module.b": torch.zeros(1)}, "a.module.b".__eq__)
    assert state.keys() == {"a.module.b"} and prefix == "module."


class TestClassCount:
    """The class count comes from the argument, else from the checkpoint, else from the card."""

    @pytest.fixture
    def seven(self, tmp_path: Path) -> Path:
        """Return a checkpoint of the digits model with seven classes."""
        model = create_model("vmamba_digits", num_classes=7)
        torch.save(model.state_dict(), tmp_path / "seven.pth")
        return tmp_path / "seven.pth"

    def test_from_the_checkpoint(self, seven: Path) -> None:
        model = create_model("vmamba_digits", checkpoint=seven)
        assert model.num_classes == 7
        assert torch.equal(model.classifier.head.weight, torch.load(seven)["classifier.head.weight"])

    def test_the_argument_starts_the_last_layer_anew(self, seven: Path) -> None:
        model = create_model("vmamba_digits", num_classes=10, checkpoint=seven)
        stored = torch.load(seven)
        for key, tensor in model.state_dict().items():
            if "head" in key:
                assert tensor.shape[0] == 10
            else:
                assert torch.equal(tensor, stored[key])
        assert not model.classifier.head.bias.any()

    def test_an_argument_that_agrees_changes_nothing(self, seven: Path) -> None:
        model = create_model("vmamba_digits", num_classes=7, checkpoint=seven)
        assert torch.equal(model.classifier.head.weight, torch.load(seven)["classifier.head.weight"])

    def test_from_the_card(self) -> None:
        assert create_model("vmamba_digits").num_classes == load_card("vmamba_digits").num_classes == 10

    def test_what_became_of_the_last_layer_is_told(self, seven: Path) -> None:
        for count, new_head in ((None, False), (7, False), (10, True)):
            weights = create_with_weights("vmamba_digits", num_classes=count, checkpoint=seven)[1]
            assert weights == Weights("checkpoint", new_head)
        assert create_with_weights("vmamba_digits")[1] == Weights("included", new_head=False)
        assert create_with_weights("vmamba_digits", num_classes=7)[1] == Weights("included", new_head=True)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save(tiny("medmamba").state_dict(), tmp_path / "medmamba.pth")
    with pytest.raises(CheckpointError, match="Choose the model"):
        create_model("vmamba_digits", checkpoint=tmp_path / "medmamba.pth")


class TestChannels:
    """The channels of the image come from the checkpoint, or else from the argument, or else from the card."""

    @pytest.fixture
    def grey(self, tmp_path: Path) -> Path:
        """Return a checkpoint of the digits model for images of one channel."""
        torch.save(create_model("vmamba_digits", in_chans=1).state_dict(), tmp_path / "grey.pth")
        return tmp_path / "grey.pth"

    @pytest.mark.parametrize("in_chans", [1, 2, 4, 13])
    @pytest.mark.parametrize("name", ["vmamba_digits", "medmamba_t"])
    def test_new_weights_take_any_number(
        self, name: str, in_chans: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(factory, "load_card", small_card)
        model = create_model(name, in_chans=in_chans)
        assert model.in_channels == in_chans
        model.check_input_shape((1, in_chans, 64, 64))
        with torch.inference_mode():
            assert torch.isfinite(model(torch.randn(1, in_chans, 64, 64))).all()

    def test_from_the_checkpoint(self, grey: Path) -> None:
        for wanted in (None, 1):
            model = create_model("vmamba_digits", in_chans=wanted, checkpoint=grey)
            assert model.in_channels == 1
            assert torch.equal(
                model.state_dict()["patch_embed.0.weight"], torch.load(grey)["patch_embed.0.weight"]
            )

    def test_another_number_than_the_checkpoint_s_is_told(self, grey: Path) -> None:
        with pytest.raises(
            CheckpointError,
            match=r"grey\.pth takes 1 channel, expected 3; say in_chans = 1 \(--in-chans 1\), or leave it out",
        ):
            create_model("vmamba_digits", in_chans=3, checkpoint=grey)

    def test_the_weights_that_are_included_are_for_the_card_s_alone(self) -> None:
        assert create_with_weights("vmamba_digits", in_chans=3)[1].source == "included"
        assert create_with_weights("vmamba_digits", in_chans=4)[1] == Weights("new", new_head=True)

    @pytest.mark.parametrize("value", [0, -1, "3", 3.0, True])
    def test_what_is_no_number_of_channels_is_refused(self, value: Any) -> None:
        with pytest.raises(InputError, match=f"in_chans = {value!r} is not a whole number of at least 1"):
            create_model("vmamba_digits", in_chans=value)


MODELS = list_models()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("small_cards")
def test_a_checkpoint_given_as_another_model_is_told_by_its_name(name: str, tmp_path: Path) -> None:
    """With other classes and channels than the cards', so that these do not tell the models apart."""
    trained = create_model(name, num_classes=7, in_chans=2)
    torch.save(
        {"model": {f"module.{key}": tensor for key, tensor in trained.state_dict().items()}},
        tmp_path / "a.pth",
    )
    assert create_model(name, checkpoint=tmp_path / "a.pth").num_classes == 7
    other = MODELS[MODELS.index(name) - 1]
    with pytest.raises(
        CheckpointError, match=rf"does not fit this model .*\. It fits {name}: give that as the model$"
    ):
        create_model(other, checkpoint=tmp_path / "a.pth")


@pytest.mark.usefixtures("small_cards")
def test_a_checkpoint_of_no_model_is_told_as_such(tmp_path: Path) -> None:
    state = create_model("medmamba_s").state_dict()
    state["layers.0.blocks.0.self_attention.Ds"] = torch.zeros(3)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"Choose the model that the checkpoint was trained as$"):
        create_model("medmamba_s", checkpoint=tmp_path / "a.pth")
