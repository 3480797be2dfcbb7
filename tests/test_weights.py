"""Loading weights into any module: wrappers, prefixes, what does not fit, and files that are no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from quartermap_deploy.errors import CheckpointError
from quartermap_deploy.weights import (
    EMA_WRAPPERS,
    PREFIXES,
    WRAPPERS,
    LoadedWeights,
    load_weights,
    read_weights,
)


class Network(nn.Module):
    """A user's module, with counters, a mask that is infinite on purpose, and whole numbers."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, 2)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("index", torch.arange(4))


def equal(module: nn.Module, state: dict[str, Tensor]) -> bool:
    own = module.state_dict()
    return all(torch.equal(own[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize(
    "prefix", ["", *(f"{name}." for name in PREFIXES), "module.model.", "_orig_mod.net."]
)
@pytest.mark.parametrize("wrapper", ["", *WRAPPERS, *EMA_WRAPPERS, "state_dict.model"])
def test_wrappers_and_prefixes_are_taken_off(tmp_path: Path, wrapper: str, prefix: str) -> None:
    trained, module = Network(), Network()
    content: Any = {prefix + key: tensor for key, tensor in trained.state_dict().items()}
    for key in reversed(wrapper.split(".") if wrapper else []):
        content = {"epoch": 3, key: content}
    torch.save(content, tmp_path / "weights.pth")
    loaded = load_weights(module, tmp_path / "weights.pth")
    assert loaded == LoadedWeights(tmp_path / "weights.pth", prefix, wrapper, (), ())
    assert equal(module, trained.state_dict())


def test_a_prefix_that_the_module_has_itself_stays(tmp_path: Path) -> None:
    """Half of the keys begin with `backbone.`, as in the module."""
    torch.save(Network().state_dict(), tmp_path / "weights.pth")
    assert load_weights(Network(), tmp_path / "weights.pth").removed_prefix == ""


def test_the_moving_average_is_preferred_unless_asked_otherwise(tmp_path: Path) -> None:
    weights, average, module = Network(), Network(), Network()
    torch.save({"params": weights.state_dict(), "params_ema": average.state_dict()}, tmp_path / "both.pth")
    assert load_weights(module, tmp_path / "both.pth").wrapper == "params_ema"
    assert equal(module, average.state_dict())
    assert load_weights(module, tmp_path / "both.pth", prefer_ema=False).wrapper == "params"
    assert equal(module, weights.state_dict())


def test_safetensors_and_other_element_types(tmp_path: Path) -> None:
    trained, module = Network().half(), Network()
    save_file(trained.state_dict(), tmp_path / "half.safetensors")
    assert load_weights(module, tmp_path / "half.safetensors").missing == ()
    assert module.head.weight.dtype == torch.float32
    assert torch.equal(module.head.weight, trained.head.weight.float())


def test_a_parameter_with_two_names_is_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    trained, module = Tied(), Tied()
    save_model(trained, tmp_path / "tied.safetensors")
    assert len(read_weights(tmp_path / "tied.safetensors").state) == 1
    assert load_weights(module, tmp_path / "tied.safetensors").missing == ()
    assert torch.equal(module.embed.weight, trained.embed.weight)


def test_a_module_that_renames_older_keys_is_heard(tmp_path: Path) -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)
            self.register_load_state_dict_pre_hook(self._rename)

        @staticmethod
        def _rename(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
            for part in ("weight", "bias"):
                state[f"{prefix}head.{part}"] = state.pop(f"{prefix}old.{part}")

    old = nn.Linear(3, 2)
    extra = torch.zeros(1)
    torch.save({"old.weight": old.weight.data, "old.bias": old.bias.data}, tmp_path / "old.pth")
    module = Renamed()
    # None of the names is the module's, but all tensors found their places.
    loaded = load_weights(module, tmp_path / "old.pth")
    assert loaded.missing == loaded.unexpected == () and torch.equal(module.head.weight, old.weight)
    torch.save(
        {"old.weight": old.weight.data, "old.bias": old.bias.data, "more": extra}, tmp_path / "more.pth"
    )
    with pytest.raises(CheckpointError, match="1 unexpected: more"):
        load_weights(Renamed(), tmp_path / "more.pth")


def test_what_does_not_fit_is_named_and_counted(tmp_path: Path) -> None:
    state = {f"module.{key}": tensor for key, tensor in Network().state_dict().items()}
    del state["module.head.bias"], state["module.backbone.1.num_batches_tracked"]
    state |= {f"module.extra.{number}": torch.zeros(1) for number in range(7)}
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError) as caught:
        load_weights(Network(), tmp_path / "weights.pth")
    message = str(caught.value)
    assert "weights.pth (its state_dict) do not fit Network (11 tensors)" in message
    assert "after 'module.' was taken off its keys. 1 missing: head.bias; 7 unexpected: extra.0, " in message
    assert "extra.4 and 2 more. Build the module" in message

    module = Network()
    loaded = load_weights(module, tmp_path / "weights.pth", strict=False)
    assert loaded.missing == ("head.bias",) and len(loaded.unexpected) == 7
    assert torch.equal(module.head.weight, state["module.head.weight"])


@pytest.mark.parametrize("strict", [True, False])
def test_another_shape_is_refused_before_anything_is_loaded(tmp_path: Path, strict: bool) -> None:
    torch.save(Network(5).state_dict(), tmp_path / "wide.pth")
    module = Network()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"7 of another shape: backbone.0.weight \(5, 3, 3, 3\) instead of"
    ):
        load_weights(module, tmp_path / "wide.pth", strict=strict)
    assert equal(module, before)


def test_weights_of_something_else_are_refused_even_if_not_strict(tmp_path: Path) -> None:
    torch.save(nn.LSTM(2, 2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"none of its 4 tensors is one of the module's: weight_ih_l0"):
        load_weights(Network(), tmp_path / "other.pth", strict=False)


def test_values_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    state = Network().state_dict()
    for key, value, message in (
        ("head.weight", torch.full((2, 4), torch.nan), r"NaN or infinite values in head\.weight"),
        ("head.weight", torch.full((2, 4), torch.inf), r"NaN or infinite values in head\.weight"),
        ("backbone.1.running_var", torch.full((4,), torch.nan), "NaN or infinite values in backbone"),
        ("head.weight", torch.zeros(2, 4, dtype=torch.int8), r"head\.weight \(int8\)\. Give"),
        ("head.weight", torch.zeros(2, 4).to_sparse(), r"sparse tensors in head\.weight"),
    ):
        torch.save({**state, key: value}, tmp_path / "broken.pth")
        with pytest.raises(CheckpointError, match=message):
            load_weights(Network(), tmp_path / "broken.pth")


def test_a_key_with_and_without_the_prefix_is_refused(tmp_path: Path) -> None:
    state = {f"net.{key}": tensor for key, tensor in Network().state_dict().items()}
    torch.save({**state, "head.bias": torch.zeros(2)}, tmp_path / "twice.pth")
    with pytest.raises(CheckpointError, match=r"holds head\.bias twice, with and without 'net\.' before it"):
        load_weights(Network(), tmp_path / "twice.pth")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_is_told_as_one(tmp_path: Path) -> None:
    script = torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3))  # type: ignore[no-untyped-call]
    script.save(str(tmp_path / "model.pt"))
    with pytest.raises(
        CheckpointError, match=r"model\.pt is a TorchScript archive, not weights; give the checkpoint"
    ):
        load_weights(nn.Linear(3, 2), tmp_path / "model.pt")
    # What the message says works.
    torch.save(torch.jit.load(tmp_path / "model.pt").state_dict(), tmp_path / "weights.pt")  # type: ignore[no-untyped-call]
    assert load_weights(nn.Linear(3, 2), tmp_path / "weights.pt").missing == ()


def test_an_exported_program_is_told_as_one(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(3, 2), (torch.zeros(1, 3),))
    torch.export.save(program, tmp_path / "model.pt2")
    with pytest.raises(CheckpointError, match=r"is a program of torch\.export, not weights"):
        load_weights(nn.Linear(3, 2), tmp_path / "model.pt2")
    torch.save(torch.export.load(tmp_path / "model.pt2").module().state_dict(), tmp_path / "weights.pt")
    assert load_weights(nn.Linear(3, 2), tmp_path / "weights.pt").missing == ()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_what_was_not_fetched_is_told(tmp_path: Path, name: str) -> None:
    for content, message in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_weights(tmp_path / name)
