"""The demo model, its data and the script that trained it."""

from __future__ import annotations

import importlib.util
import types

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from quartermap_deploy.architectures import create_model, load_card
from quartermap_deploy.architectures.base import VisualStateSpaceModel
from quartermap_deploy.architectures.factory import build
from quartermap_deploy.data.digits import load_digits
from quartermap_deploy.data.images import prepare
from quartermap_deploy.data.shipped import models_directory
from quartermap_deploy.pruning import QuarterMap, prune

CARD = load_card("vmamba_digits")


@pytest.fixture(scope="module")
def held_out() -> tuple[Tensor, Tensor]:
    """Return the held-out digits as the model takes them, and their labels."""
    digits = load_digits().held_out
    return torch.from_numpy(prepare(list(digits.images), CARD.preprocessing)), torch.from_numpy(digits.labels)


@torch.inference_mode()
def top1(model: torch.nn.Module, digits: tuple[Tensor, Tensor]) -> float:
    """Return the accuracy of a model."""
    images, labels = digits
    return (model(images).argmax(dim=1) == labels).double().mean().item()


def metadata() -> dict[str, str]:
    """Return what the training script wrote beside the weights."""
    with safe_open(CARD.weights_path, framework="pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def script() -> types.ModuleType:
    """Return the training script as a module."""
    path = models_directory() / "train_digits.py"
    if not path.exists():
        pytest.skip("the training script is only in the repository")
    spec = importlib.util.spec_from_file_location("train_digits", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_split_is_fixed_stratified_and_disjoint() -> None:
    split = load_digits()
    assert split.fingerprint == "d11884c5874f47dd"
    assert len(split.training) == 1347 and len(split.held_out) == 450
    assert np.bincount(split.held_out.labels).tolist() == [45] * 10
    assert split.held_out.images.dtype == np.uint8 and split.held_out.images.max() == 255
    # Every scan is in exactly one part: together they are the whole data set.
    from sklearn.datasets import load_digits as load_all

    whole, _ = load_all(return_X_y=True)
    both = np.concatenate([split.training.images, split.held_out.images]).reshape(-1, 64).astype(np.float64)
    ordered = [rows[np.lexsort(rows.T)] for rows in (np.rint(both * 16 / 255), whole)]
    np.testing.assert_array_equal(*ordered)


def test_the_weights_are_small_and_know_their_split() -> None:
    path = CARD.weights_path
    assert path is not None and path.stat().st_size < 3_000_000
    written = metadata()
    assert written["model"] == "vmamba_digits"
    assert written["held_out_fingerprint"] == load_digits().fingerprint
    assert {"seed", "epochs", "held_out_top1"} <= written.keys()


def test_the_trained_model_reads_held_out_digits(held_out: tuple[Tensor, Tensor]) -> None:
    accuracy = top1(create_model("vmamba_digits"), held_out)
    assert accuracy >= 0.97
    # Another rounding may move a digit on the border of two classes.
    assert accuracy == pytest.approx(float(metadata()["held_out_top1"]), abs=1.5 / len(held_out[1]))


@pytest.mark.parametrize(("every", "least"), [(3, 0.97), (2, 0.94), (1, 0.6)])
def test_pruned_models_still_read_digits(held_out: tuple[Tensor, Tensor], every: int, least: float) -> None:
    model = create_model("vmamba_digits")
    assert top1(prune(model, QuarterMap(every=every)), held_out) >= least


def silence(model: VisualStateSpaceModel, directions: list[int]) -> None:
    """Make the scans of some directions return nothing, in every block."""
    with torch.no_grad():
        for block in model.blocks():
            mixer = block.mixer
            mixer.x_proj_weight[directions, -mixer.d_state :] = 0  # C
            mixer.Ds.view(len(mixer.directions), -1)[directions] = 0


@pytest.mark.parametrize(
    ("directions", "least"), [([2, 3], 0.1), ([0], 0.03), ([1], 0.03), ([2], 0.03), ([3], 0.03)]
)
@torch.no_grad()
def test_every_direction_of_the_scan_matters(
    held_out: tuple[Tensor, Tensor], directions: list[int], least: float
) -> None:
    images = held_out[0][:64]
    model = create_model("vmamba_digits")
    expected = model(images)
    silence(model, directions)
    assert (model(images) - expected).abs().max() / expected.abs().max() > least


@torch.no_grad()
def test_exchanged_directions_are_noticed(held_out: tuple[Tensor, Tensor]) -> None:
    images = held_out[0][:64]
    model = create_model("vmamba_digits")
    expected = model(images)
    for block in model.blocks():
        for parameter in (block.mixer.x_proj_weight, block.mixer.dt_projs_weight, block.mixer.dt_projs_bias):
            parameter.copy_(parameter[[1, 0, 2, 3]].clone())
    assert (model(images) - expected).abs().max() / expected.abs().max() > 0.02


def test_training_is_repeatable(script: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "BATCH_SIZE", 16)
    images, labels = script.as_tensors(load_digits().training, "vmamba_digits")

    def train() -> VisualStateSpaceModel:
        torch.manual_seed(1)
        model = build(CARD)
        script.train(model, images[:32], labels[:32], epochs=2)
        return model

    first, second = train().state_dict(), train().state_dict()
    torch.manual_seed(1)
    untrained = build(CARD).state_dict()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key
        assert not torch.equal(tensor, untrained[key]), key


def test_training_leaves_no_dropping_behind(script: types.ModuleType) -> None:
    model = build(CARD)
    image = torch.randn(2, *CARD.input_shape)
    plain = model(image)
    handles = script.drop_paths(model)
    assert not torch.equal(model(image), plain)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(image), plain)


def test_decay_spares_what_it_must_not_pull_to_zero(script: types.ModuleType) -> None:
    model = build(CARD)
    decayed, spared = script.parameter_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert decayed["weight_decay"] > 0 == spared["weight_decay"]
    ends = ("bias", "A_logs", "Ds", "norm.weight", "norm2.weight", "2.weight", "7.weight", "3.weight")
    for parameter in spared["params"]:
        assert names[id(parameter)].endswith(ends), names[id(parameter)]
    for parameter in decayed["params"]:
        assert parameter.ndim > 1
