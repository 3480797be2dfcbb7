"""ToMe in PyTorch: token merging by bipartite soft matching, the method that QuarterMap is compared with.

ToMe (Bolya et al., arXiv 2210.09461) averages similar tokens. Here it stands where QuarterMap stands, so that the two
can be compared: in the same blocks, after the convolution and its activation, the positions of the map are merged to
as many tokens as QuarterMap would keep; those are projected and scanned; afterwards every position takes the output of
the token that it is part of (unmerging), because out_norm, out_proj and the next block's convolution want a full map.

A round of matching is that of the ToMe paper, section 3: tokens are split by turns into sources (the first, third, …)
and destinations; every source finds the destination that is most like it by cosine; the r most similar pairs are
joined, each to the average of its tokens weighted by how many positions they stand for. A round takes away half of the
tokens at most, so a quarter needs two rounds; the last one takes away just as many as are left over, and the number of
scanned tokens is QuarterMap's exactly, for every size, stride and keep. ToMe compares the keys of an attention; a scan
has none, so the features that it scans are compared.

How merged tokens are scanned in four directions, the ToMe paper cannot say, and the QuarterMap paper (arXiv
2507.09514) says only that tokens are merged before and unmerged after the scan. Here a merged token stands at the
position of its destination, and every direction visits the tokens that are left in the order in which it meets their
positions, along rows or along columns: what a scan of the map would do that skips the others. On the digits the
accuracy is the same when the tokens are laid out in raster order as a smaller map instead, whose columns join what was
far apart.

Two calls of the operator do it, one for the directions along rows and one for those along columns. Each gets its
tokens as a map of QuarterMap's size, filled row by row in the order of the scan, and walks it along rows: a map that
is walked so is a sequence, whatever its width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from quartermap_deploy.architectures.base import VisualStateSpaceModel
from quartermap_deploy.architectures.ss2d import SS2D, ScanConstants
from quartermap_deploy.errors import PlanError
from quartermap_deploy.lowering.operator import ORIENTATIONS, Direction
from quartermap_deploy.pruning.plan import QuarterMap, Subsample

Model = TypeVar("Model", bound=VisualStateSpaceModel)


class Matching(NamedTuple):
    """Which tokens are merged.

    Attributes:
        place: (batch, L), int64: the merged token that each token becomes part of.
        position: (batch, L - r), int64, ascending: the token whose position each merged token takes.
    """

    place: Tensor
    position: Tensor


class MergedMap(NamedTuple):
    """A feature map whose positions are merged.

    Attributes:
        by_rows: (batch, channels, h, w): the tokens in the order of their rows, laid out row by row.
        by_columns: the same in the order of their columns.
        back: (batch, h·w), int64: where each token of `by_rows` is in `by_columns`.
        place: (batch, H·W), int64: the token of `by_rows` that each position of the full map is part of.
    """

    by_rows: Tensor
    by_columns: Tensor
    back: Tensor
    place: Tensor


def merge_tokens(model: Model, plan: QuarterMap) -> Model:
    """Return a deep copy of `model` that merges tokens in the blocks that `plan` would prune.

    Every such block scans as many tokens as QuarterMap would keep in it. The weights are unchanged and `model` is left
    as it was. The plan's `upsample` has no meaning here.

    Raises:
        PlanError: if the plan does not fit the model's blocks, or the model is pruned already.
    """
    if not hasattr(model, "blocks") or not hasattr(model, "depths"):
        raise PlanError(
            f"cannot merge tokens in a {type(model).__name__}; expected a model from create_model"
        )
    if any(block.mixer.subsample is not None for block in model.blocks()):
        raise PlanError("the model is pruned already; merge the tokens of the unpruned model")
    selected = plan.select(model.depths)
    merged = copy.deepcopy(model)
    for block in merged.blocks():
        if block.index in selected:
            MergingSS2D.convert(block.mixer, plan.subsample)
    return merged


def rounds(tokens: int, kept: int) -> tuple[int, ...]:
    """Return how many tokens each round of matching takes away until `kept` are left; half of them at most.

    Args:
        tokens: tokens before the first round, at least 1.
        kept: tokens after the last one, from 1 to `tokens`.
    """
    found = []
    while tokens > kept:
        found.append(min(tokens - kept, tokens // 2))
        tokens -= found[-1]
    return tuple(found)


def matching_flops(tokens: int, kept: int, channels: int) -> int:
    """Return the multiply-accumulates of all similarities that merging `tokens` tokens to `kept` compares."""
    total = 0
    for r in rounds(tokens, kept):
        total += (tokens - tokens // 2) * (tokens // 2) * channels
        tokens -= r
    return total


def bipartite_soft_matching(metric: Tensor, r: int) -> Matching:
    """Match tokens in two halves and merge the r most similar pairs.

    Args:
        metric: (batch, L, channels); tokens are compared by the cosine of these.
        r: how many tokens to take away, at most L // 2.

    Returns:
        The matching. Of equal similarities the earlier destination wins, and of equal pairs the earlier source.

    Raises:
        ValueError: if r is negative or more than half.
    """
    batch, length = metric.shape[:2]
    sources, destinations = length - length // 2, length // 2
    if not 0 <= r <= destinations:
        raise ValueError(f"r = {r} of {length} tokens; expected 0 to {destinations}, as half stay at least")
    positions = torch.arange(length, device=metric.device).expand(batch, -1)
    if r == 0:
        return Matching(positions, positions)
    metric = functional.normalize(metric, dim=2)
    similarity, nearest = (metric[:, 0::2] @ metric[:, 1::2].transpose(1, 2)).max(dim=2)
    if r == sources:
        # Every source goes: the destinations are what is left, in their order, and nothing has to be sorted.
        own = torch.arange(destinations, device=metric.device).expand(batch, -1)
        return Matching(torch.stack([nearest, own], dim=2).flatten(1), positions[:, 1::2])
    order = torch.sort(similarity, dim=1, descending=True, stable=True).indices
    stays = torch.ones_like(nearest).scatter(1, order[:, :r], 0)
    kept = torch.stack([stays, torch.ones_like(stays)], dim=2).flatten(1)[:, :length]
    place = kept.cumsum(dim=1) - 1
    # The destination of every token; those of destinations themselves are not read.
    joined = place.gather(1, 2 * nearest + 1)
    joined = torch.stack([joined, joined], dim=2).flatten(1)[:, :length]
    # Tokens that go write their position to a slot behind the last, which is cut off.
    slot = torch.where(kept == 1, place, length - r)
    position = positions.new_zeros(1).expand(batch, length - r + 1).scatter(1, slot, positions)
    return Matching(torch.where(kept == 1, place, joined), position[:, : length - r])


def merge(tokens: Tensor, sizes: Tensor | None, matching: Matching) -> tuple[Tensor, Tensor]:
    """Average the tokens that a matching joins, weighted by their sizes.

    Args:
        tokens: (batch, L, channels).
        sizes: (batch, L, 1): how many positions each stands for; None for one each.
        matching: of these tokens.

    Returns:
        The merged tokens, (batch, L', channels), and their sizes, (batch, L', 1).
    """
    count = matching.position.shape[1]
    weighted = tokens if sizes is None else tokens * sizes
    if sizes is None:
        sizes = tokens.new_ones(1).expand(*tokens.shape[:2], 1)
    total = _add_rows(sizes, matching.place, count)
    return _add_rows(weighted, matching.place, count) / total, total


def unmerge(tokens: Tensor, place: Tensor) -> Tensor:
    """Give every position the token that it is part of, (batch, L', channels) → (batch, L, channels)."""
    return _take_rows(tokens, place)


def _take_rows(values: Tensor, index: Tensor) -> Tensor:
    """For each image the rows of values (batch, L, channels) that index (batch, n) names."""
    # Of one long table, and not by torch.gather: that wants an index for every channel, and moves single numbers.
    starts = torch.arange(values.shape[0], device=values.device).unsqueeze(1) * values.shape[1]
    taken = values.flatten(0, 1).index_select(0, (starts + index).flatten())
    return torch.unflatten(taken, 0, (-1, index.shape[1]))


def _add_rows(values: Tensor, index: Tensor, count: int) -> Tensor:
    """For each image, (batch, count, channels): the sums of those rows of values that have the same index."""
    batch, _, channels = values.shape
    starts = torch.arange(batch, device=values.device).unsqueeze(1) * count
    sums = values.new_zeros(batch * count, channels)
    summed = sums.index_add(0, (starts + index).flatten(), values.flatten(0, 1))
    return torch.unflatten(summed, 0, (-1, count))


class Merge(nn.Module):
    """Merges the positions of a map to as many tokens as QuarterMap would keep. It has no parameters."""

    def __init__(self, subsample: Subsample) -> None:
        super().__init__()
        self.subsample = subsample

    def forward(self, x: Tensor) -> MergedMap:
        """Merge x, (batch, channels, H, W)."""
        height, width = x.shape[2:]
        small = (self.subsample.kept_size(height), self.subsample.kept_size(width))
        tokens, sizes = x.flatten(2).transpose(1, 2), None
        place = position = torch.arange(height * width, device=x.device).expand(x.shape[0], -1)
        for r in rounds(height * width, small[0] * small[1]):
            matching = bipartite_soft_matching(tokens, r)
            tokens, sizes = merge(tokens, sizes, matching)
            place = matching.place.gather(1, place)
            position = position.gather(1, matching.position)
        # The place of every raster position in an order by columns.
        by_column = torch.arange(height * width, device=x.device).view(width, height).t().flatten()
        order = torch.sort(by_column[position], dim=1).indices
        ranks = torch.arange(order.shape[1], device=x.device).expand(x.shape[0], -1)
        back = torch.zeros_like(order).scatter(1, order, ranks)
        return MergedMap(_as_map(tokens, small), _as_map(_take_rows(tokens, order), small), back, place)


class Unmerge(nn.Module):
    """Adds what the directions found and brings it back to the full map. It has no parameters."""

    def forward(self, by_rows: Tensor, by_columns: Tensor, merged: MergedMap, size: Sequence[int]) -> Tensor:
        """Return (batch, channels, H, W) for the scans of `merged` along rows and columns, and size (H, W)."""
        rows, columns = (y.flatten(2).transpose(1, 2) for y in (by_rows, by_columns))
        y = unmerge(rows + _take_rows(columns, merged.back), merged.place)
        return _as_map(y, size)


def _as_map(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """Lay tokens (batch, h·w, channels) out row by row, to (batch, channels, h, w)."""
    return torch.unflatten(tokens.transpose(1, 2), 2, tuple(size))


class MergingSS2D(SS2D):
    """An SS2D that merges tokens before its scan and unmerges them after it.

    Made from an `SS2D` by `convert`, whose parameters it keeps. Its `subsample` says how many tokens are scanned; no
    row or column is dropped.
    """

    merge: Merge
    unmerge: Unmerge

    @classmethod
    def convert(cls, mixer: SS2D, subsample: Subsample) -> None:
        """Make a mixer merge tokens, in place: to as many as `subsample` would keep positions."""
        mixer.__class__ = cls
        mixer.subsample = subsample
        mixer.merge, mixer.unmerge = Merge(subsample), Unmerge()

    def scan(self, x: Tensor) -> Tensor:
        """Merge, project and scan, and unmerge a channel-first map (batch, d_inner, H, W)."""
        merged: MergedMap = self.merge(x)
        rows, columns = (
            self._scan_along(tokens, orientation)
            for tokens, orientation in zip((merged.by_rows, merged.by_columns), ORIENTATIONS, strict=True)
        )
        y: Tensor = self.unmerge(rows, columns, merged, x.shape[2:])
        return y

    def _scan_along(self, tokens: Tensor, orientation: str) -> Tensor:
        """Scan tokens (batch, d_inner, h, w), laid out in the order of an orientation, in its directions."""
        # The tokens lie in that order already, so that every direction is that of rows.
        directions = ["row_reverse" if own.reverse else "row" for _, own in self._along(orientation)]
        return self._project_and_scan(tokens, self._constants_along(orientation), directions)

    def _along(self, orientation: str) -> list[tuple[int, Direction]]:
        """The directions of an orientation, with their numbers."""
        parsed = enumerate(Direction.parse(name) for name in self.directions)
        return [(index, direction) for index, direction in parsed if direction.orientation == orientation]

    def _constants_along(self, orientation: str) -> ScanConstants:
        """The scan's constants for the directions of an orientation."""
        if self._frozen:
            return ScanConstants(*(self.get_buffer(name) for name in self._names(orientation)))
        constants, count = self.scan_constants(), len(self.directions)

        def part(value: Tensor) -> Tensor:
            groups = value.unflatten(0, (count, -1))
            return torch.cat([groups[index] for index, _ in self._along(orientation)])

        ranks = [count * self.dt_rank, count * self.d_state, count * self.d_state]
        by_kind = torch.split(constants.projection_weight, ranks)
        return ScanConstants(
            projection_weight=torch.cat([part(rows) for rows in by_kind]),
            A=part(constants.A),
            D=part(constants.D),
            dt_bias=part(constants.dt_bias),
            dt_weight=part(constants.dt_weight),
        )

    def freeze(self) -> None:
        """Hold the scan's constants as buffers, for export; see `SS2D.freeze`."""
        self.unfreeze()
        constants = {orientation: self._constants_along(orientation) for orientation in ORIENTATIONS}
        for orientation, values in constants.items():
            for name, value in zip(self._names(orientation), values, strict=True):
                self.register_buffer(name, value.detach().clone(), persistent=False)
        super().freeze()

    def unfreeze(self) -> None:
        """End `freeze`."""
        if self._frozen:
            for orientation in ORIENTATIONS:
                for name in self._names(orientation):
                    delattr(self, name)
        super().unfreeze()

    @staticmethod
    def _names(orientation: str) -> list[str]:
        return [f"_{orientation}_{name}" for name in ScanConstants._fields]
