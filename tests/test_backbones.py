"""Backbones: the maps of all stages, against the public code's and against our own classifiers'."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_models import DATA, TINY, relative_error, tiny
from small_cards import small_card, small_cards  # noqa: F401  (fixture)
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from quartermap_deploy.architectures import create_model, factory, list_models, load_card
from quartermap_deploy.architectures.backbone import Backbone
from quartermap_deploy.architectures.cards import ModelCard
from quartermap_deploy.architectures.factory import create_with_weights
from quartermap_deploy.errors import CheckpointError, InputError, PlanError
from quartermap_deploy.pruning.plan import QuarterMap
from quartermap_deploy.pruning.reference import prune

TOLERANCE = 1e-5

Maps = list[Tensor]


def of_tiny(name: str) -> tuple[Backbone, Any]:
    """A very small backbone, and a classifier with the same weights."""
    classifier = tiny(name)
    backbone = factory.as_backbone(copy.deepcopy(classifier)).eval()
    generator = torch.Generator().manual_seed(0)
    for key, value in backbone.named_parameters():
        if key.startswith("outnorm"):
            value.data.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return backbone, classifier


def stage_maps(classifier: Any, images: Tensor) -> Maps:
    """What leaves the blocks of each stage of a classifier, channel-first."""
    maps: Maps = []
    handles = [
        stage.blocks.register_forward_hook(lambda module, inputs, output: maps.append(output))
        for stage in classifier.stages()
    ]
    classifier(images)
    for handle in handles:
        handle.remove()
    return maps if classifier.channel_first else [x.permute(0, 3, 1, 2) for x in maps]


# The public code's maps ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Public:
    """A segmenter that the public code made: its backbone's maps, and all its weights under the public keys."""

    state: dict[str, Tensor]
    input: Tensor
    maps: Maps


@pytest.fixture(scope="module")
def public() -> Public:
    with np.load(DATA / "vmamba_backbone.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    state = {key.removeprefix("state/"): value for key, value in arrays.items() if key.startswith("state/")}
    return Public(state, arrays["input"], [arrays[f"act/backbone/out{index}"] for index in range(4)])


def card_of_the_segmenter(norm_layer: str = "ln2d") -> ModelCard:
    card = load_card("vmamba_tiny_s1l8")
    settings = {"depths": [2, 2, 3, 2], "dims": [8, 16, 32, 64], "norm_layer": norm_layer}
    return dataclasses.replace(card, architecture={**card.architecture, **settings})


@pytest.fixture
def checkpoint(public: Public, tmp_path: Path) -> Path:
    """The segmenter as mmengine stores it."""
    torch.save({"meta": {"epoch": 3}, "state_dict": public.state}, tmp_path / "segmenter.pth")
    return tmp_path / "segmenter.pth"


@pytest.mark.parametrize("norm_layer", ["ln2d", "ln"])
@torch.inference_mode()
def test_maps_equal_the_public_code(
    public: Public, checkpoint: Path, norm_layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory, "load_card", lambda name: card_of_the_segmenter(norm_layer))
    backbone, weights = create_with_weights("segmenter", checkpoint=checkpoint, features_only=True)
    maps = backbone(public.input)
    assert [relative_error(*pair) <= TOLERANCE for pair in zip(maps, public.maps, strict=True)] == [True] * 4
    assert weights.source == "checkpoint" and not weights.new_head
    assert weights.notes[0] == "'backbone.' was taken off the keys"
    assert "left out: 62 of decode_head, 7 of auxiliary_head" in weights.notes[1] and len(weights.notes) == 2


@torch.inference_mode()
def test_faults_show_in_the_comparison(
    public: Public, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory, "load_card", lambda name: card_of_the_segmenter())
    backbone = create_model("segmenter", checkpoint=checkpoint, features_only=True)

    def agrees(model: nn.Module) -> list[bool]:
        return [
            relative_error(*pair) <= TOLERANCE for pair in zip(model(public.input), public.maps, strict=True)
        ]

    assert agrees(backbone) == [True] * 4
    for index in range(4):
        faulty = copy.deepcopy(backbone)
        setattr(faulty, f"outnorm{index}", nn.Identity())
        assert agrees(faulty) == [place != index for place in range(4)]
    faulty = copy.deepcopy(backbone)
    # The norm of the first map on the path to the second one.
    faulty.layers[0].blocks.append(copy.deepcopy(faulty.outnorm0))  # type: ignore[union-attr, operator]
    assert agrees(faulty)[1:] == [False] * 3


def test_a_segmenter_as_a_classifier_says_what_it_is(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory, "load_card", lambda name: card_of_the_segmenter())
    with pytest.raises(
        CheckpointError,
        match=r"4 missing: classifier\.norm.*holds a backbone and no classifier.*features_only",
    ):
        create_model("segmenter", checkpoint=checkpoint)


# Our own classifiers' maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 64, 64), (1, 75, 50), (3, 33, 97)])
@pytest.mark.parametrize("name", sorted(TINY))
@torch.inference_mode()
def test_maps_are_those_of_the_classifier(name: str, shape: tuple[int, int, int]) -> None:
    backbone, classifier = of_tiny(name)
    images = torch.randn(shape[0], 3, *shape[1:])
    expected = stage_maps(classifier, images)
    maps = backbone(images)
    assert isinstance(maps, list) and len(maps) == len(backbone.output_names) == len(expected)
    for index, (found, plain) in enumerate(zip(maps, expected, strict=True)):
        if backbone.backbone_norms:
            norm = backbone.get_submodule(f"outnorm{index}")
            plain = functional.layer_norm(
                plain.permute(0, 2, 3, 1), plain.shape[1:2], norm.weight, norm.bias
            ).permute(0, 3, 1, 2)
        torch.testing.assert_close(found, plain, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", sorted(TINY))
@torch.inference_mode()
def test_what_a_backbone_says_of_itself_is_so(name: str) -> None:
    backbone, classifier = of_tiny(name)
    maps = backbone(torch.randn(1, 3, 64, 128))
    info = backbone.feature_info
    assert [tuple(x.shape) for x in maps] == [
        (1, channels, 64 // reduction, 128 // reduction)
        for channels, reduction in zip(info.channels(), info.reduction(), strict=True)
    ]
    assert info.channels() == [16, 32] and info.reduction() == [4, 8]
    for path in info.module_name():
        backbone.get_submodule(path)
    assert backbone.task == "features" and backbone.output_names == ("features_0", "features_1")
    assert classifier.task == "classification" and classifier.output_names == ("logits",)
    assert backbone.depths == classifier.depths and backbone.num_classes == 0
    assert [block.path for block in backbone.blocks()] == [block.path for block in classifier.blocks()]
    for block in backbone.blocks():
        assert backbone.get_submodule(block.mixer_path) is block.mixer
    backbone.check_input_shape((1, 3, backbone.minimum_side, backbone.minimum_side))
    with pytest.raises(InputError, match="4 channels"):
        backbone.check_input_shape((1, 4, 64, 64))
    assert {key.split(".")[0] for key in backbone.state_dict()} == {"patch_embed", "layers"} | (
        {"outnorm0", "outnorm1"} if backbone.backbone_norms else set()
    )


@pytest.mark.parametrize("name", ["v2", "v0", "medmamba"])
@torch.inference_mode()
def test_a_pruned_backbone_has_the_maps_of_a_pruned_classifier(name: str) -> None:
    backbone, classifier = of_tiny(name)
    for block in (*backbone.blocks(), *classifier.blocks()):
        block.mixer.out_proj.weight.mul_(20)  # so that scans matter
    images, plan = torch.randn(1, 3, 60, 64), QuarterMap(blocks=(2,))
    pruned = prune(backbone, plan)
    plain, found = backbone(images), pruned(images)
    torch.testing.assert_close(found[0], plain[0], rtol=0, atol=0)
    assert relative_error(found[1], plain[1]) > 1e-3
    (_, expected) = stage_maps(prune(classifier, plan), images)
    if backbone.backbone_norms:
        norm = backbone.get_submodule("outnorm1")
        expected = functional.layer_norm(
            expected.permute(0, 2, 3, 1), expected.shape[1:2], norm.weight, norm.bias
        ).permute(0, 3, 1, 2)
    torch.testing.assert_close(found[1], expected, rtol=0, atol=2e-5)
    with pytest.raises(PlanError):
        prune(backbone, QuarterMap(blocks=(3,)))


@pytest.mark.parametrize("name", ["v2", "v0", "medmamba"])
@torch.no_grad()
def test_it_exports_with_dynamic_batch_height_and_width(name: str) -> None:
    backbone, _ = of_tiny(name)
    backbone.freeze()
    dynamic = dict.fromkeys((0, 2, 3), Dim.DYNAMIC)
    program = torch.export.export(backbone, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(dynamic,))
    for shape in [(3, 3, 75, 130), (2, 3, 41, 47)]:
        images = torch.randn(shape)
        for found, expected in zip(program.module()(images), backbone(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "quartermap.selective_scan_2d.default" in operators and "aten.exp.default" not in operators


@pytest.mark.parametrize("out_indices", [(0,), (1, 2), (0, 2), (3,), (0, 1, 2, 3)])
@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vmamba_tiny_v0", "medmamba_t"])
@torch.inference_mode()
def test_maps_of_some_stages(
    name: str, out_indices: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory, "load_card", small_card)
    whole = create_model(name, features_only=True)
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    some = create_model(name, features_only=True, out_indices=out_indices, checkpoint=tmp_path / "whole.pth")
    assert isinstance(some, Backbone) and some.out_indices == out_indices
    images = torch.randn(1, 3, 64, 64)
    maps, expected = some(images), whole(images)
    assert some.output_names == tuple(f"features_{place}" for place in range(len(out_indices)))
    for found, index in zip(maps, out_indices, strict=True):
        torch.testing.assert_close(found, expected[index], rtol=0, atol=0)
    # What comes after the last map is neither kept nor run.
    assert len(some.depths) == out_indices[-1] + 1
    assert some.feature_info.channels() == [whole.feature_info.channels()[i] for i in out_indices]  # type: ignore[union-attr, operator]


# Checkpoints ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_the_weights_that_are_included_make_a_backbone() -> None:
    backbone, weights = create_with_weights("vmamba_digits", features_only=True)
    assert weights.source == "included"
    assert weights.notes == (
        "tensors that are no part of the backbone were left out: 4 of classifier",
        "the checkpoint has no outnorm0, outnorm1, outnorm2, outnorm3, so these normalise with scale 1 and shift 0",
    )
    images = torch.randn(1, 3, 64, 64)
    expected = stage_maps(create_model("vmamba_digits"), images)
    for found, plain in zip(backbone(images), expected, strict=True):
        normalised = functional.layer_norm(plain.permute(0, 2, 3, 1), plain.shape[1:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(found, normalised, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list_models())
@pytest.mark.usefixtures("small_cards")
def test_every_classifier_s_checkpoint_makes_its_backbone(name: str, tmp_path: Path) -> None:
    classifier = create_model(name, in_chans=1)
    torch.save({"model": classifier.state_dict()}, tmp_path / "classifier.pth")
    backbone, weights = create_with_weights(name, features_only=True, checkpoint=tmp_path / "classifier.pth")
    assert backbone.in_channels == 1 and not any(module.training for module in backbone.modules())
    own = backbone.state_dict()
    for key, tensor in classifier.state_dict().items():
        if key in own:
            assert torch.equal(own[key], tensor)
    assert len(weights.notes) == (2 if backbone.backbone_norms else 1)
    # Another model's is refused by its name here too.
    other = list_models()[list_models().index(name) - 1]
    with pytest.raises(CheckpointError, match=rf"It fits {name}: give that as the model$"):
        create_model(other, features_only=True, checkpoint=tmp_path / "classifier.pth")


@pytest.mark.usefixtures("small_cards")
def test_a_damaged_backbone_is_refused(tmp_path: Path) -> None:
    state = {
        f"backbone.{k}": v for k, v in create_model("medmamba_t", features_only=True).state_dict().items()
    }
    del state["backbone.layers.3.blocks.1.ln_1.weight"]
    state["backbone.layers.3.blocks.7.ln_1.weight"] = torch.zeros(48)
    torch.save({"state_dict": state}, tmp_path / "backbone.pth")
    with pytest.raises(CheckpointError) as caught:
        create_model("medmamba_t", features_only=True, checkpoint=tmp_path / "backbone.pth")
    message = str(caught.value)
    assert "1 missing: layers.3.blocks.1.ln_1.weight; 1 unexpected: layers.3.blocks.7.ln_1.weight" in message


# Wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_indices", [(), (4,), (-1,), (1, 0), (1, 1), (0.0,), (True,)])
def test_what_are_no_stages_is_refused(out_indices: Any) -> None:
    with pytest.raises(InputError, match="expected numbers of stages from 0 to 3, in ascending order"):
        create_model("vmamba_digits", features_only=True, out_indices=out_indices)


def test_arguments_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InputError, match="a backbone has no classes; leave num_classes = 7"):
        create_model("vmamba_digits", features_only=True, num_classes=7)
    with pytest.raises(InputError, match="are for features_only = True"):
        create_model("vmamba_digits", out_indices=(1,))
