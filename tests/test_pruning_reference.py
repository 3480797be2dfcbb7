"""The reference of QuarterMap in PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_models import CONFIGS, build, load, relative_error, tiny
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from quartermap_deploy.architectures.ss2d import SS2D
from quartermap_deploy.errors import PlanError
from quartermap_deploy.pruning import UPSAMPLE_MODES, QuarterMap, Subsample, prune
from quartermap_deploy.pruning.positions import keep_positions, restore_positions
from quartermap_deploy.scan.definition import selective_scan_2d_definition

STRIDES = [(stride, keep) for stride in range(2, 9) for keep in range(1, stride)]
subsamples = st.sampled_from(STRIDES).map(lambda pair: Subsample(*pair))


@pytest.mark.parametrize(("stride", "keep"), STRIDES)
def test_nearest_is_exact_for_every_size_up_to_512(stride: int, keep: int) -> None:
    subsample = Subsample(stride, keep)
    for size in range(1, 513):
        kept = [i for i in range(size) if i % stride < keep]
        assert subsample.kept_size(size) == len(kept)
        positions = torch.arange(size).reshape(1, 1, size, 1)
        kept_positions = positions[:, :, kept]
        restored = restore_positions(kept_positions, (size, 1), subsample).flatten().tolist()
        assert restored == [kept[i * len(kept) // size] for i in range(size)]


@settings(max_examples=60, deadline=None)
@given(subsamples, st.integers(1, 30), st.integers(1, 30), st.integers(1, 3))
def test_rows_and_columns_are_kept_and_restored_alike(
    subsample: Subsample, height: int, width: int, batch: int
) -> None:
    x = torch.randn(batch, 2, height, width)
    rows = [i for i in range(height) if i % subsample.stride < subsample.keep]
    columns = [i for i in range(width) if i % subsample.stride < subsample.keep]
    assert subsample.kept_indices(height) == tuple(rows)
    small = keep_positions(x, subsample)
    assert torch.equal(small, x[:, :, rows][..., columns])
    restored = restore_positions(small, (height, width), subsample)
    for i, j in itertools.product(range(height), range(width)):
        assert torch.equal(
            restored[..., i, j], small[..., i * len(rows) // height, j * len(columns) // width]
        )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(UPSAMPLE_MODES))
def test_stride_two_agrees_with_torch_interpolate(height: int, width: int, upsample: Any) -> None:
    subsample = Subsample(upsample=upsample)
    small = keep_positions(torch.randn(1, 3, height, width), subsample)
    options = {} if upsample == "nearest" else {"align_corners": False}
    expected = functional.interpolate(small, size=(height, width), mode=upsample, **options)
    assert torch.equal(restore_positions(small, (height, width), subsample), expected)


def by_definition(mixer: SS2D, x: Tensor, subsample: Subsample) -> Tensor:
    """Return the canonical form of a pruned SS2D, written out in float64 with the scan's definition."""
    mixer = mixer.double()
    x = x.double()
    first = mixer.channel_first
    x = mixer.in_proj(x)
    x, gate = x.chunk(2, dim=1 if first else -1) if mixer.gated else (x, None)
    x = functional.silu(mixer.conv2d(x if first else x.permute(0, 3, 1, 2)))
    height, width = x.shape[2:]
    x = x[:, :, list(subsample.kept_indices(height))][..., list(subsample.kept_indices(width))]
    directions, state = len(mixer.directions), mixer.d_state
    projected = torch.einsum("bdhw,kcd->bkchw", x, mixer.x_proj_weight)
    rank = mixer.dt_rank
    dt = torch.einsum("bkrhw,kdr->bkdhw", projected[:, :, :rank], mixer.dt_projs_weight).flatten(1, 2)
    y = selective_scan_2d_definition(
        x,
        dt,
        projected[:, :, rank : rank + state].reshape(len(x), directions * state, *x.shape[2:]),
        projected[:, :, rank + state :].reshape(len(x), directions * state, *x.shape[2:]),
        -mixer.A_logs.exp(),
        mixer.Ds,
        mixer.dt_projs_bias.flatten(),
    )
    if subsample.upsample == "nearest":
        rows = [i * y.shape[2] // height for i in range(height)]
        columns = [i * y.shape[3] // width for i in range(width)]
        y = y[:, :, rows][..., columns]
    else:
        y = functional.interpolate(y, size=(height, width), mode=subsample.upsample, align_corners=False)
    y = mixer.out_norm(y if first else y.permute(0, 2, 3, 1))
    out: Tensor = mixer.out_proj(y if gate is None else y * functional.silu(gate))
    return out


@pytest.mark.parametrize("upsample", UPSAMPLE_MODES)
@pytest.mark.parametrize(("stride", "keep"), [(2, 1), (3, 2), (4, 1)])
@pytest.mark.parametrize("name", sorted(CONFIGS))
@torch.no_grad()
def test_a_pruned_block_is_the_canonical_form(name: str, stride: int, keep: int, upsample: Any) -> None:
    reference = load(name)
    plan = QuarterMap(every=1, exclude_stages=(), stride=stride, keep=keep, upsample=upsample)
    pruned = prune(reference.model, plan)
    for path, (given_map, unpruned_output) in reference.mixers.items():
        actual = pruned.get_submodule(path)(given_map)
        assert relative_error(actual, unpruned_output) > 1e-3
        expected = by_definition(reference.model.get_submodule(path), given_map, plan.subsample)
        assert relative_error(actual.double(), expected) <= 1e-6


@pytest.mark.parametrize("name", sorted(CONFIGS))
@torch.no_grad()
def test_pruning_copies_and_touches_only_the_selected_blocks(name: str) -> None:
    reference = load(name)
    plan = QuarterMap(blocks=(4, 6), upsample="bilinear")
    pruned = prune(reference.model, plan)
    assert relative_error(reference.model(reference.input), reference.output) <= 1e-5
    assert all(block.mixer.subsample is None for block in reference.model.blocks())
    for key, tensor in pruned.state_dict().items():
        own = reference.model.state_dict()[key]
        assert torch.equal(tensor, own) and (tensor.numel() == 0 or tensor.data_ptr() != own.data_ptr())

    def block_outputs(model: nn.Module) -> list[Tensor]:
        outputs: list[Tensor] = []
        handles = [
            block.module.register_forward_hook(lambda module, given, output: outputs.append(output))
            for block in model.blocks()
        ]
        model(reference.input)
        for handle in handles:
            handle.remove()
        return outputs

    differs = [
        not torch.equal(a, b)
        for a, b in zip(block_outputs(reference.model), block_outputs(pruned), strict=True)
    ]
    assert differs.index(True) == 3
    selected = [block.index for block in pruned.blocks() if block.mixer.subsample is not None]
    assert selected == [4, 6]

    # A plan describes the whole result, whatever was pruned before.
    replanned = prune(pruned, QuarterMap(blocks=(5,)))
    assert [block.index for block in replanned.blocks() if block.mixer.subsample is not None] == [5]


def test_a_frozen_model_stays_frozen_when_pruned() -> None:
    model = build("vmamba_s1_channel_last")
    model.freeze()
    pruned = prune(model, QuarterMap())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        frozen = pruned(image)
        pruned.unfreeze()
        assert torch.equal(pruned(image), frozen)


def test_plans_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(PlanError, match="blocks 1 to 8"):
        prune(build("medmamba"), QuarterMap(blocks=(9,)))
    with pytest.raises(PlanError, match="create_model"):
        prune(nn.Linear(1, 1), QuarterMap())  # type: ignore[type-var]


@torch.no_grad()
def test_a_pruned_model_exports_with_dynamic_sizes() -> None:
    model = prune(tiny("v0"), QuarterMap(blocks=(2,), stride=3, keep=2))
    dynamic = dict.fromkeys((0, 2, 3), Dim.DYNAMIC)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(dynamic,))
    image = torch.randn(3, 3, 75, 130)
    torch.testing.assert_close(program.module()(image), model(image), rtol=0, atol=0)
