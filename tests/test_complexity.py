"""Operations and tokens against the public figures, and against torch's own counter."""

from __future__ import annotations

import math

import pytest
import torch
from reference_models import CONFIGS, build
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from quartermap_deploy.architectures import factory as factory_module
from quartermap_deploy.architectures import list_models, load_card
from quartermap_deploy.complexity import measure, scan_flops
from quartermap_deploy.errors import InputError
from quartermap_deploy.pruning import QuarterMap, prune

PUBLISHED = [name for name in list_models() if load_card(name).sizes.published_gflops is not None]


def on_meta(name: str) -> nn.Module:
    """Return a model of a card without memory for its weights."""
    with torch.device("meta"):
        return factory_module.build(load_card(name)).eval()


def test_nine_models_have_public_figures() -> None:
    assert len(PUBLISHED) == 9


@pytest.mark.parametrize("name", PUBLISHED)
def test_operations_are_the_published_ones(name: str) -> None:
    card = load_card(name)
    complexity = measure(on_meta(name), (224, 224))
    assert round(complexity.flops / 1e9, 1) == card.sizes.published_gflops
    assert complexity.parameters == card.sizes.parameters


@pytest.mark.parametrize("plan", [None, QuarterMap(every=2, stride=3, keep=2)])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_operations_agree_with_the_counter_of_torch(name: str, plan: QuarterMap | None) -> None:
    model = build(name)
    if plan is not None:
        model = prune(model, plan)
    size = (70, 90)
    complexity = measure(model, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, *size))
    # That counter counts convolutions and linear layers, two operations for each multiply-accumulate. It does
    # not look into a scan, which projects the time step to full rank itself, and leaves normalisations out.
    counted = counter.get_total_flops() // 2
    inside_scans = sum(
        entry.scan_flops + entry.tokens * block.mixer.dt_rank * block.mixer.d_inner
        for entry, block in zip(complexity.blocks, model.blocks(), strict=True)
    )
    assert complexity.flops == counted + inside_scans + normalisation_flops(model, size)


def normalisation_flops(model: nn.Module, size: tuple[int, int]) -> int:
    """Return five operations per element of a layer normalisation and two of a batch normalisation."""
    total = 0

    def count(module: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * (5 if isinstance(module, nn.LayerNorm) else 2)

    handles = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d))
    ]
    with torch.no_grad():
        model(torch.randn(1, 3, *size))
    for handle in handles:
        handle.remove()
    return total


def test_tokens_of_vmamba_tiny_by_hand() -> None:
    model = on_meta("vmamba_tiny_s1l8")
    whole = measure(model, (224, 224))
    assert [block.map_size for block in whole.blocks] == [
        (side, side) for side, depth in zip((56, 28, 14, 7), (2, 2, 8, 2), strict=True) for _ in range(depth)
    ]
    assert whole.tokens == 4 * (2 * 56**2 + 2 * 28**2 + 8 * 14**2 + 2 * 7**2)

    pruned = measure(prune(model, QuarterMap()), (224, 224))
    assert [block.index for block in pruned.blocks if block.pruned] == [3, 6, 9, 12]
    saved = 4 * ((28**2 - 14**2) + 3 * (14**2 - 7**2))
    assert whole.tokens - pruned.tokens == saved
    # Seven rows and columns keep four.
    last_stage = measure(prune(model, QuarterMap(blocks=(14,))), (224, 224))
    assert last_stage.blocks[13].scanned_size == (4, 4)
    assert pruned.flops < whole.flops


def test_scan_operations_by_hand() -> None:
    mixer = on_meta("vmamba_tiny_v0").blocks()[0].mixer
    assert scan_flops(mixer, 100) == 9 * 100 * (4 * 192) * 16 + 100 * (4 * 192)


def test_totals_and_plain_values() -> None:
    complexity = measure(build("medmamba"), (64, 96))
    values = complexity.to_dict()
    assert values["flops"] == sum(block["flops"] for block in values["blocks"]) + values["other_flops"]
    assert values["tokens"] == sum(block["tokens"] for block in values["blocks"])
    assert all(block["tokens"] == 4 * math.prod(block["scanned_size"]) for block in values["blocks"])
    assert all(0 < block["scan_flops"] < block["flops"] for block in values["blocks"])


def test_a_size_that_the_model_cannot_take_is_refused() -> None:
    with pytest.raises(InputError, match="at least 32"):
        measure(build("medmamba"), (64, 31))


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = build("vmamba_v0_gated")
    measure(model, (64, 64))
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
