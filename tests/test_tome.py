"""ToMe: matching, merging and unmerging against a loop over tokens, and the exported model against PyTorch."""

from __future__ import annotations

import functools

import onnx
import pytest
import torch
from helpers import digits, error, run
from hypothesis import given
from hypothesis import strategies as st
from reference_models import tiny
from torch import Tensor

from quartermap_deploy.architectures.base import VisualStateSpaceModel
from quartermap_deploy.complexity import measure
from quartermap_deploy.errors import InputError, PlanError
from quartermap_deploy.evaluation.tome import (
    Merge,
    MergingSS2D,
    Unmerge,
    bipartite_soft_matching,
    matching_flops,
    merge,
    merge_tokens,
    rounds,
    unmerge,
)
from quartermap_deploy.exporting.merging import export_merging
from quartermap_deploy.pruning import QuarterMap, Subsample, prune
from quartermap_deploy.validation.tolerances import tolerance_for

TOLERANCE = 1e-5
"""Of merged models in ONNX Runtime, as a share of the largest logit."""


def tokens_of(batch: int, length: int, channels: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, channels, generator=generator, dtype=torch.float64)


def naive_merge(tokens: Tensor, sizes: Tensor, r: int) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """Merge the tokens (L, channels) of one image as the paper says it, one token after the other.

    Returns the merged tokens, their sizes, the place of every token and the position of every merged token.
    """
    length = len(tokens)
    sources, destinations = range(0, length, 2), range(1, length, 2)
    pairs = []
    for source in sources:
        cosines = [
            float(torch.nn.functional.cosine_similarity(tokens[source], tokens[other], dim=0))
            for other in destinations
        ]
        best = max(range(len(cosines)), key=cosines.__getitem__) if cosines else None
        if best is not None:
            pairs.append((-cosines[best], source, destinations[best]))
    into = {source: destination for _, source, destination in sorted(pairs)[:r]}
    position = [token for token in range(length) if token not in into]
    place = [position.index(into.get(token, token)) for token in range(length)]
    merged, merged_sizes = [], []
    for index in range(len(position)):
        own = [token for token in range(length) if place[token] == index]
        merged_sizes.append(sum(sizes[token] for token in own))
        merged.append(sum(sizes[token] * tokens[token] for token in own) / merged_sizes[-1])
    return torch.stack(merged), torch.stack(merged_sizes), place, position


class TestRounds:
    @given(st.integers(1, 4000), st.data())
    def test_ends_at_the_wanted_number_and_takes_half_at_most(self, tokens: int, data: st.DataObject) -> None:
        kept = data.draw(st.integers(1, tokens))
        left = tokens
        for r in rounds(tokens, kept):
            assert 1 <= r <= left // 2
            left -= r
        assert left == kept

    def test_a_quarter_takes_two(self) -> None:
        assert rounds(784, 196) == (392, 196)
        assert rounds(49, 16) == (24, 9)
        assert rounds(9, 9) == ()


class TestMatching:
    @given(st.integers(1, 3), st.integers(1, 24), st.integers(0, 10_000), st.data())
    def test_equals_the_loop(self, batch: int, length: int, seed: int, data: st.DataObject) -> None:
        r = data.draw(st.integers(0, length // 2))
        tokens = tokens_of(batch, length, seed=seed)
        sizes = torch.randint(
            1, 5, (batch, length, 1), generator=torch.Generator().manual_seed(seed)
        ).double()
        matching = bipartite_soft_matching(tokens, r)
        merged, merged_sizes = merge(tokens, sizes, matching)
        for image in range(batch):
            expected = naive_merge(tokens[image], sizes[image], r)
            assert matching.place[image].tolist() == expected[2]
            assert matching.position[image].tolist() == expected[3]
            torch.testing.assert_close(merged[image], expected[0])
            torch.testing.assert_close(merged_sizes[image], expected[1])

    def test_r_of_0_changes_nothing(self) -> None:
        tokens = tokens_of(2, 7)
        matching = bipartite_soft_matching(tokens, 0)
        merged, sizes = merge(tokens, None, matching)
        assert torch.equal(merged, tokens)
        assert torch.equal(sizes, torch.ones(2, 7, 1, dtype=torch.float64))
        assert torch.equal(unmerge(merged, matching.place), tokens)

    @pytest.mark.parametrize("r", [-1, 4])
    def test_more_than_half_is_refused(self, r: int) -> None:
        with pytest.raises(ValueError, match="expected 0 to 3"):
            bipartite_soft_matching(tokens_of(1, 7), r)

    @given(st.integers(2, 30), st.data())
    def test_equal_tokens_go_to_the_first(self, length: int, data: st.DataObject) -> None:
        r = data.draw(st.integers(1, length // 2))
        matching = bipartite_soft_matching(torch.ones(1, length, 3), r)
        # All cosines are one, up to rounding that is the same for all: the first r sources join token 1.
        gone = [2 * index for index in range(r)]
        assert matching.position[0].tolist() == [token for token in range(length) if token not in gone]

    def test_tokens_of_zeros_give_no_nan(self) -> None:
        tokens = torch.zeros(1, 6, 3)
        merged, _ = merge(tokens, None, bipartite_soft_matching(tokens, 2))
        assert torch.equal(merged, torch.zeros(1, 4, 3))

    @given(st.integers(2, 40), st.integers(0, 10_000))
    def test_merging_keeps_the_mean(self, length: int, seed: int) -> None:
        tokens = tokens_of(2, length, seed=seed)
        merged, sizes = merge(tokens, None, bipartite_soft_matching(tokens, length // 2))
        torch.testing.assert_close((merged * sizes).sum(1), tokens.sum(1))


class TestMap:
    @given(
        st.integers(1, 2),
        st.integers(1, 9),
        st.integers(1, 9),
        st.sampled_from([(2, 1), (3, 1), (3, 2), (4, 1)]),
        st.integers(0, 1000),
    )
    def test_merging_and_unmerging_keep_the_shape(
        self, batch: int, height: int, width: int, stride: tuple[int, int], seed: int
    ) -> None:
        subsample = Subsample(*stride)
        x = tokens_of(batch, height * width, 4, seed).transpose(1, 2).unflatten(2, (height, width))
        merged = Merge(subsample)(x)
        small = (subsample.kept_size(height), subsample.kept_size(width))
        assert merged.by_rows.shape == merged.by_columns.shape == (batch, 4, *small)
        # Half from each, and then back: every position has the average of the positions that it was merged with.
        y = Unmerge()(merged.by_rows / 2, merged.by_columns / 2, merged, (height, width))
        assert y.shape == x.shape
        for image in range(batch):
            flat, restored = x[image].flatten(1), y[image].flatten(1)
            for token in merged.place[image].unique():
                own = merged.place[image] == token
                torch.testing.assert_close(
                    restored[:, own], flat[:, own].mean(1, keepdim=True).expand(-1, int(own.sum()))
                )

    @given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
    def test_orders_are_those_of_the_positions_that_are_left(
        self, height: int, width: int, seed: int
    ) -> None:
        # One channel holds the raster position of a token that was merged with none; others are told by their place.
        x = tokens_of(1, height * width, 4, seed).transpose(1, 2).unflatten(2, (height, width))
        merged = Merge(Subsample())(x)
        rows, columns = merged.by_rows[0].flatten(1), merged.by_columns[0].flatten(1)
        assert torch.equal(rows, columns[:, merged.back[0]])
        tokens, sizes, position = x.flatten(2).transpose(1, 2), None, torch.arange(height * width)
        for r in rounds(height * width, rows.shape[1]):
            matching = bipartite_soft_matching(tokens, r)
            tokens, sizes = merge(tokens, sizes, matching)
            position = position[matching.position[0]]
        order = sorted(
            range(len(position)), key=lambda i: (int(position[i]) % width, int(position[i]) // width)
        )
        assert torch.equal(columns, rows[:, order])
        assert torch.equal(position, position.sort().values)


class TestModel:
    def test_scans_as_many_tokens_as_quartermap_keeps(self) -> None:
        model = digits()[0]
        for plan in (QuarterMap(every=3), QuarterMap(every=1, stride=3, keep=2)):
            merged, pruned = merge_tokens(model, plan), prune(model, plan)
            assert measure(merged, (64, 64)).tokens == measure(pruned, (64, 64)).tokens

    def test_only_selected_blocks_merge_and_the_model_stays(self) -> None:
        model, images = digits()
        with torch.no_grad():
            before = model(images)
            merged = merge_tokens(model, QuarterMap(blocks=(3, 7)))
            changed = merged(images)
            assert torch.equal(model(images), before)
        assert [block.index for block in merged.blocks() if isinstance(block.mixer, MergingSS2D)] == [3, 7]
        assert not any(isinstance(block.mixer, MergingSS2D) for block in model.blocks())
        assert error(changed, before) > 1e-3
        assert set(merged.state_dict()) == set(model.state_dict())

    def test_freezing_changes_nothing_and_ends_with_training(self) -> None:
        model, images = digits()
        merged = merge_tokens(model, QuarterMap())
        with torch.no_grad():
            before = merged(images)
            merged.freeze()
            assert torch.equal(merged(images), before)
            merged.freeze()
            merged.unfreeze()
            assert torch.equal(merged(images), before)
        assert dict(merged.named_buffers()).keys() == dict(model.named_buffers()).keys()

    def test_refuses_what_it_cannot_merge(self) -> None:
        with pytest.raises(PlanError, match="cannot merge tokens in a Linear"):
            merge_tokens(torch.nn.Linear(1, 1), QuarterMap())  # type: ignore[type-var]
        with pytest.raises(PlanError, match="pruned already"):
            merge_tokens(prune(digits()[0], QuarterMap()), QuarterMap())
        with pytest.raises(PlanError, match="names block 99"):
            merge_tokens(digits()[0], QuarterMap(blocks=(99,)))

    def test_counts_every_similarity(self) -> None:
        assert matching_flops(784, 196, 10) == (392 * 392 + 196 * 196) * 10
        assert matching_flops(49, 16, 1) == 25 * 24 + 13 * 12
        assert matching_flops(5, 5, 10) == 0


SIZES = {"v2": (72, 56), "v2_channel_last": (64, 64), "v0": (56, 40), "medmamba": (40, 56)}
"""Maps of 18x14 and 9x7, 16x16 and 8x8, 14x10 and 7x5, 10x14 and 5x7 positions: odd numbers of tokens among them."""


@functools.cache
def exported(name: str) -> tuple[VisualStateSpaceModel, onnx.ModelProto]:
    """A model of each kind that merges in both of its blocks, and its export."""
    merged = merge_tokens(tiny(name), QuarterMap(every=1, exclude_stages=()))
    return merged, export_merging(merged, (1, 3, *SIZES[name]))


class TestExport:
    # Both layouts, with and without a gate; the others combine them differently.
    @pytest.mark.parametrize(
        "name",
        [
            "v2",
            "medmamba",
            *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("v2_channel_last", "v0")),
        ],
    )
    @pytest.mark.parametrize("batch", [1, 3])
    def test_onnx_runtime_computes_the_same(self, name: str, batch: int) -> None:
        merged, model = exported(name)
        images = torch.randn(batch, 3, *SIZES[name], generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = merged(images)
        found = run(model, {"images": images})["logits"]
        assert tolerance_for("float32").relative > TOLERANCE
        assert error(found, expected) < TOLERANCE

    def test_digits_in_onnx_runtime(self) -> None:
        model, images = digits()
        merged = merge_tokens(model, QuarterMap())
        with torch.no_grad():
            expected = merged(images)
        assert (
            error(run(export_merging(merged, images.shape), {"images": images})["logits"], expected)
            < TOLERANCE
        )

    def test_nodes_tell_their_block_and_nothing_of_the_machine(self) -> None:
        _, model = exported("v2")
        names = [node.name for node in model.graph.node]
        for block in (1, 2):
            assert {f"block_{block}/scan/row", f"block_{block}/scan/column"} <= set(names)
            for step in ("merge", "unmerge"):
                assert any(name.startswith(f"block_{block}/{step}/") for name in names)
        assert len(set(names)) == len(names)
        assert not any(node.metadata_props for node in model.graph.node)
        assert b".py" not in model.SerializeToString()

    def test_a_size_that_the_model_cannot_take(self) -> None:
        with pytest.raises(InputError, match="too small"):
            export_merging(merge_tokens(digits()[0], QuarterMap()), (1, 3, 0, 64))
