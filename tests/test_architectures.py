"""The models against the public code's outputs, and what they offer to the compiler."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_models import CONFIGS, DATA, build, load, relative_error, tiny
from torch import nn
from torch.export import Dim

from quartermap_deploy.architectures import create_model, list_models, load_card
from quartermap_deploy.architectures import factory as factory_module
from quartermap_deploy.architectures.cards import read_card
from quartermap_deploy.architectures.layers import Linear2d, PatchMerging
from quartermap_deploy.architectures.medmamba import MedMambaConfig
from quartermap_deploy.architectures.ss2d import SS2D
from quartermap_deploy.architectures.vmamba import VMambaConfig
from quartermap_deploy.complexity import measure
from quartermap_deploy.errors import InputError, QuartermapError, UnknownNameError

TOLERANCE = 1e-5
REFERENCES = sorted(CONFIGS)

PUBLIC_MODELS = {
    "vmamba_tiny_s1l8",
    "vmamba_tiny_s2l5",
    "vmamba_small_s2l15",
    "vmamba_base_s2l15",
    "vmamba_small_s1l20",
    "vmamba_base_s1l20",
    "vmamba_tiny_v0",
    "vmamba_small_v0",
    "vmamba_base_v0",
    "medmamba_t",
    "medmamba_s",
    "medmamba_b",
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", REFERENCES)
@torch.inference_mode()
def test_outputs_equal_the_public_code(name: str, frozen: bool) -> None:
    reference = load(name)
    if frozen:
        reference.model.freeze()
    assert relative_error(reference.model(reference.input), reference.output) <= TOLERANCE
    assert reference.mixers
    for path, (given_map, expected) in reference.mixers.items():
        assert relative_error(reference.model.get_submodule(path)(given_map), expected) <= TOLERANCE


@pytest.mark.parametrize("name", REFERENCES)
@torch.inference_mode()
def test_exchanging_two_directions_fails_the_comparison(name: str) -> None:
    # The weights of the references are close to a new model's, so this fault moves the logits by
    # only 2e-5 to 6e-4 of the largest. `test_digits_model.py` asks the same of a trained model.
    reference = load(name)
    for block in reference.model.blocks():
        for parameter in (block.mixer.x_proj_weight, block.mixer.dt_projs_weight, block.mixer.dt_projs_bias):
            parameter.copy_(parameter[[1, 0, 2, 3]].clone())
    assert relative_error(reference.model(reference.input), reference.output) > TOLERANCE
    for path, (given_map, expected) in reference.mixers.items():
        assert relative_error(reference.model.get_submodule(path)(given_map), expected) > TOLERANCE


@pytest.mark.parametrize("name", REFERENCES)
def test_freezing_changes_neither_state_nor_output_and_follows_the_weights(name: str) -> None:
    model = build(name)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
        keys = list(model.state_dict())
        model.freeze()
        assert list(model.state_dict()) == keys
        torch.testing.assert_close(model(image), expected, rtol=0, atol=0)
        torch.testing.assert_close(copy.deepcopy(model)(image), expected, rtol=0, atol=0)

        other = build(name)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(image), other(image), rtol=0, atol=0)
        model.freeze()
        model.train()
        for block in model.blocks():
            block.mixer.A_logs.fill_(2.0)
            torch.testing.assert_close(
                block.mixer.scan_constants().A, torch.full_like(block.mixer.A_logs, -torch.tensor(2.0).exp())
            )


@pytest.mark.parametrize("name", ["v2", "v0", "medmamba"])
@torch.no_grad()
def test_exports_with_dynamic_batch_height_and_width(name: str) -> None:
    model = tiny(name)
    model.freeze()
    dynamic = dict.fromkeys((0, 2, 3), Dim.DYNAMIC)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(dynamic,))
    for shape in [(3, 3, 75, 130), (2, 3, 41, 47)]:
        image = torch.randn(shape)
        torch.testing.assert_close(program.module()(image), model(image), rtol=0, atol=0)
    # Frozen constants are constants of the graph: nothing is left to compute from the parameters.
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "quartermap.selective_scan_2d.default" in operators
    assert not operators & {"aten.exp.default", "aten.neg.default"}


@pytest.mark.parametrize("name", REFERENCES)
def test_blocks_are_numbered_over_the_whole_network(name: str) -> None:
    model = build(name)
    blocks = model.blocks()
    assert model.depths == CONFIGS[name].depths
    assert [block.index for block in blocks] == list(range(1, sum(model.depths) + 1))
    assert [len(list(group)) for _, group in itertools.groupby(block.stage for block in blocks)] == list(
        model.depths
    )
    for block in blocks:
        assert model.get_submodule(block.path) is block.module
        assert model.get_submodule(block.mixer_path) is block.mixer
        assert isinstance(block.mixer, SS2D)


@pytest.mark.parametrize("name", REFERENCES)
@torch.no_grad()
def test_the_smallest_image_passes_and_a_smaller_one_is_refused(name: str) -> None:
    model = build(name)
    side = model.minimum_side
    model.check_input_shape((1, 3, side, side))
    assert torch.isfinite(model(torch.randn(2, 3, side, side))).all()
    for shape in [(1, 3, side - 1, side), (1, 3, side, side - 1)]:
        with pytest.raises(InputError, match="at least"):
            model.check_input_shape(shape)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), "3 axes"),
        ((1, 1, 64, 64), "1 channels"),
        ((1, 64, 64, 3), "height, width, channels"),
        ((0, 3, 64, 64), "empty"),
    ],
)
def test_an_impossible_input_shape_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build("medmamba").check_input_shape(shape)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.sampled_from(["pad", "crop"]))
def test_patch_merging_stacks_patches_and_mends_odd_sides(
    batch: int, height: int, width: int, odd_sides: str
) -> None:
    merging = PatchMerging(3, 5, odd_sides=odd_sides)  # type: ignore[arg-type]
    x = torch.randn(batch, height, width, 3)
    if odd_sides == "pad":
        padded = torch.zeros(batch, height + height % 2, width + width % 2, 3)
        padded[:, :height, :width] = x
    else:
        padded = x[:, : height - height % 2, : width - width % 2]
    corners = [padded[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    expected = merging.reduction(merging.norm(torch.cat(corners, dim=-1)))
    torch.testing.assert_close(merging(x), expected)


def test_medmamba_crops_maps_of_odd_sides_as_the_public_code_does() -> None:
    """Stages of 25×27, 12×13, 6×6 and 3×3: with padding they would be 13×14, 7×7 and 4×4."""
    model = load("medmamba").model
    images = torch.from_numpy(np.random.default_rng(20).standard_normal((2, 3, 100, 108)).astype(np.float32))
    with np.load(DATA / "medmamba_odd.npz") as file:
        expected = torch.from_numpy(file["output"])
    with torch.no_grad():
        assert relative_error(model(images), expected) <= 1e-5
    sizes = [block.map_size for block in measure(model, (100, 108)).blocks]
    assert sizes[::2] == [(25, 27), (12, 13), (6, 6), (3, 3)]


def test_initialisation_is_that_of_the_public_code() -> None:
    torch.manual_seed(0)
    mixer = SS2D(96, d_state=16, channel_first=True)
    assert mixer.dt_rank == 6 and mixer.d_inner == 192
    constants = mixer.scan_constants()
    torch.testing.assert_close(constants.A, -torch.arange(1.0, 17.0).expand(4 * 192, 16))
    torch.testing.assert_close(constants.D, torch.ones(4 * 192))
    steps = nn.functional.softplus(constants.dt_bias)
    assert 1e-3 * 0.999 <= steps.min() < 2e-3 and 0.05 < steps.max() <= 0.1 * 1.001
    assert mixer.dt_projs_weight.abs().max() <= 6**-0.5
    linears = [module for module in build("medmamba").modules() if isinstance(module, nn.Linear)]
    linears += [
        module for module in build("vmamba_s2_channel_first").modules() if isinstance(module, Linear2d)
    ]
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.25)
        assert linear.bias is None or not linear.bias.any()


def test_every_model_of_the_issue_is_there() -> None:
    assert set(list_models()) == PUBLIC_MODELS | {"vmamba_digits"}


@pytest.mark.parametrize("name", sorted(PUBLIC_MODELS | {"vmamba_digits"}))
def test_cards_describe_their_models(name: str) -> None:
    card = load_card(name)
    with torch.device("meta"):
        model = factory_module.build(card)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == card.sizes.parameters
    if card.sizes.published_parameters_millions is not None:
        assert round(parameters / 1e6) == card.sizes.published_parameters_millions
    assert model.num_classes == card.num_classes
    model.check_input_shape((1, *card.input_shape))
    assert len(card.preprocessing.mean) == len(card.preprocessing.std) == card.input_shape[0]
    assert all(1 < accuracy.top1 < 100 for accuracy in card.accuracy)
    assert (card.weights is not None) == (name == "vmamba_digits")


def test_create_model_returns_a_model_in_eval_mode() -> None:
    model = create_model("medmamba_t")
    assert not any(module.training for module in model.modules())
    assert model.num_classes == 6
    assert create_model("medmamba_t", num_classes=9).head.out_features == 9


def test_an_unknown_model_is_refused_with_near_names() -> None:
    with pytest.raises(UnknownNameError, match="vmamba_tiny"):
        create_model("vmamba_tinny_s1l8")
    with pytest.raises(UnknownNameError):
        load_card("../models/vmamba_digits")
    with pytest.raises(UnknownNameError, match="unknown model"):
        create_model(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, "a", 2.0, True])
def test_a_class_count_that_is_none_is_refused(count: object) -> None:
    with pytest.raises(InputError, match=f"num_classes = {count!r} is not a whole number"):
        create_model("medmamba_t", num_classes=count)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "replacement"),
    [
        ("family =", "familie ="),
        ("[sizes]", "[size]"),
        ('name = "vmamba_digits"', 'name = "other"'),
        ("[source]", "[source"),
    ],
)
def test_a_damaged_card_is_refused(tmp_path_factory, line: str, replacement: str) -> None:  # type: ignore[no-untyped-def]
    card = load_card("vmamba_digits")
    text = (card.weights_path.parent / "vmamba_digits.toml").read_text(encoding="utf-8")
    damaged = tmp_path_factory.mktemp("cards") / "vmamba_digits.toml"
    damaged.write_text(text.replace(line, replacement, 1), encoding="utf-8")
    assert damaged.read_text(encoding="utf-8") != text
    with pytest.raises(QuartermapError, match="model card"):
        read_card(damaged)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="one entry per stage"):
        VMambaConfig((1, 1), (8, 16, 32))
    with pytest.raises(ValueError, match="channel-last"):
        VMambaConfig((1, 1), (8, 16), downsample_version="v1")
    with pytest.raises(ValueError, match="norm_layer"):
        VMambaConfig((1, 1), (8, 16), norm_layer="bn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="odd"):
        MedMambaConfig((1, 1), (8, 15))


def test_cards_and_plans_are_read_without_torch() -> None:
    program = (
        "import sys; from quartermap_deploy.architectures import list_models, load_card; "
        "from quartermap_deploy.pruning import QuarterMap; "
        "load_card(list_models()[0]); QuarterMap().select((2, 2, 8, 2)); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
