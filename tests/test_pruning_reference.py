"""QuarterMap plans and their reference in PyTorch."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
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


def test_blocks_may_be_numpy_numbers() -> None:
    assert QuarterMap(blocks=np.array([6, 3])).blocks == (3, 6)  # type: ignore[arg-type]


class TestPlan:
    """Which blocks a plan selects, and what it refuses."""

    @pytest.mark.parametrize(
        ("plan", "depths", "selected"),
        [
            (QuarterMap(), (2, 2, 8, 2), (3, 6, 9, 12)),
            (QuarterMap(), (2, 2, 15, 2), (3, 6, 9, 12, 15, 18, 21)),
            (QuarterMap(every=2), (2, 2, 4, 2), (4, 6, 8, 10)),
            (QuarterMap(every=1), (2, 2, 4, 2), (3, 4, 5, 6, 7, 8, 9, 10)),
            (QuarterMap(every=1, exclude_stages=()), (2, 2), (1, 2, 3, 4)),
            (QuarterMap(every=2, exclude_stages=(2, 3)), (2, 2, 2, 2), (2, 8)),
            (QuarterMap(blocks=(7, 1)), (2, 2, 4, 2), (1, 7)),
        ],
    )
    def test_known_selections(
        self, plan: QuarterMap, depths: tuple[int, ...], selected: tuple[int, ...]
    ) -> None:
        assert plan.select(depths) == selected

    @given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 12), st.data())
    def test_selection_follows_its_definition(
        self, depths: list[int], every: int, data: st.DataObject
    ) -> None:
        excluded = data.draw(st.sets(st.integers(1, len(depths))))
        first = 1
        expected = []
        for stage, depth in enumerate(depths, start=1):
            expected += [i for i in range(first, first + depth) if stage not in excluded and i % every == 0]
            first += depth
        plan = QuarterMap(every=every, exclude_stages=tuple(excluded))
        if expected:
            assert plan.select(depths) == tuple(expected)
        else:
            with pytest.raises(PlanError, match="prunes nothing"):
                plan.select(depths)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"every": 0}, "every = 0 must be at least 1"),
            ({"every": 2.0}, "not a whole number"),
            ({"every": True}, "not a whole number"),
            ({"stride": 1}, "stride = 1 must be at least 2"),
            ({"keep": 0}, "keep = 0 must be at least 1"),
            ({"keep": 2}, "keep must be 1$"),
            ({"stride": 4, "keep": 5}, "keep must be 1 to 3"),
            ({"upsample": "nearst"}, "Did you mean 'nearest'"),
            ({"upsample": None}, "unknown upsample"),
            ({"blocks": ()}, "prunes nothing"),
            ({"blocks": (3, 5, 3)}, "names 3 more than once"),
            ({"blocks": (0,)}, "numbered from 1"),
            ({"blocks": "3"}, "not a list"),
            ({"blocks": 3}, "not a list"),
            ({"exclude_stages": (1, 1)}, "more than once"),
        ],
    )
    def test_a_wrong_value_is_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(PlanError, match=message):
            QuarterMap(**settings)

    def test_blocks_and_stages_that_do_not_exist_are_refused_with_the_range(self) -> None:
        with pytest.raises(PlanError, match="blocks 11, 12, but the model has blocks 1 to 10"):
            QuarterMap(blocks=(3, 11, 12)).select((2, 2, 4, 2))
        with pytest.raises(PlanError, match="stage 5, but the model has stages 1 to 4"):
            QuarterMap(exclude_stages=(1, 5)).select((2, 2, 4, 2))
        with pytest.raises(PlanError, match=r"prunes nothing.*every = 11"):
            QuarterMap(every=11).select((2, 2, 4, 2))

    @given(
        st.integers(1, 9),
        st.none() | st.sets(st.integers(1, 40), min_size=1).map(tuple),
        st.sets(st.integers(1, 4)).map(tuple),
        st.sampled_from(STRIDES),
        st.sampled_from(UPSAMPLE_MODES),
    )
    def test_json_round_trip(
        self,
        every: int,
        blocks: tuple[int, ...] | None,
        excluded: tuple[int, ...],
        strides: tuple[int, int],
        upsample: Any,
    ) -> None:
        plan = QuarterMap(None if blocks else every, blocks, excluded, *strides, upsample)
        values = json.loads(json.dumps(plan.to_dict()))
        assert None not in values.values()
        assert QuarterMap.from_dict(values) == plan

    def test_two_ways_of_choosing_blocks_contradict(self) -> None:
        with pytest.raises(PlanError, match=r"every = 3 and blocks = \[1\] both say which blocks are pruned"):
            QuarterMap(every=3, blocks=[1])  # type: ignore[arg-type]
        assert QuarterMap(blocks=(1,)).every is None and QuarterMap().every == 3
        # As manifests have both.
        assert QuarterMap.from_dict({"every": 3, "blocks": [1]}) == QuarterMap(blocks=(1,))

    def test_defaults_and_unknown_keys_of_a_table(self) -> None:
        assert QuarterMap.from_dict({}) == QuarterMap(3, None, (1,), 2, 1, "nearest")
        with pytest.raises(PlanError, match="Did you mean every"):
            QuarterMap.from_dict({"evry": 2})


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
