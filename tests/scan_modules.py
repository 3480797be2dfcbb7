"""Small modules that scan maps as public models do, in different spellings.

Each is one token mixer on a map: a depthwise convolution and SiLU, unrolling, projections, one or more calls of
`selective_scan`, a merge. Parameters are random, so that every direction and term shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from quartermap_deploy.scan.operators import selective_scan

CHANNELS, STATE, RANK, DIRECTIONS = 6, 2, 1, 4


class Mixer(nn.Module):
    """Parameters that all spellings share; `forward` is convolution, SiLU, and `mix`, on channel-first maps.

    Args:
        seed: of the parameters.
        bias: whether the projections of the map have a bias.
        rank: of the time step.
    """

    channels = CHANNELS

    def __init__(self, seed: int = 0, bias: bool = False, rank: int = RANK) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(*shape, generator=random))

        self.rank, channels = rank, self.channels
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.conv.weight = normal(*self.conv.weight.shape, scale=0.3)
        self.x_weight = normal(
            DIRECTIONS, rank + 2 * STATE, channels, scale=0.5 * (CHANNELS / channels) ** 0.5
        )
        self.x_bias = normal(DIRECTIONS, rank + 2 * STATE) if bias else None
        self.dt_weight = normal(DIRECTIONS, channels, rank)
        self.dt_bias = normal(DIRECTIONS * channels)
        self.A_log = normal(DIRECTIONS * channels, STATE, scale=0.3)
        self.D = normal(DIRECTIONS * channels)
        self.norm = nn.LayerNorm(channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, H, W) → the same."""
        y = self.mix(functional.silu(self.conv(x)))
        return x + self.out(self.norm(y)).permute(0, 3, 1, 2)

    def mix(self, x: Tensor) -> Tensor:
        """(batch, CHANNELS, H, W) → (batch, H, W, CHANNELS)."""
        raise NotImplementedError

    def scan(self, sequences: Tensor, projected: Tensor, directions: slice = slice(None)) -> Tensor:
        """Scan sequences (batch, K, CHANNELS, L) whose projections are (batch, K, rank + 2·STATE, L)."""
        steps, B, C = projected.split([self.rank, STATE, STATE], dim=2)
        delta = torch.einsum("bkrl,kdr->bkdl", steps, self.dt_weight[directions])
        return self.scan_of(sequences, delta, B, C, directions)

    def scan_of(
        self, sequences: Tensor, delta: Tensor, B: Tensor, C: Tensor, directions: slice = slice(None)
    ) -> Tensor:
        """Scan sequences (batch, K, CHANNELS, L) with their time steps, of the same shape."""

        def rows(parameter: Tensor) -> Tensor:
            return parameter.unflatten(0, (DIRECTIONS, self.channels))[directions].flatten(0, 1)

        y = selective_scan(
            sequences.flatten(1, 2),
            delta.flatten(1, 2).contiguous(),
            -torch.exp(rows(self.A_log)),
            B.contiguous(),
            C.contiguous(),
            rows(self.D),
            rows(self.dt_bias),
            True,
        )
        return y.unflatten(1, sequences.shape[1:3])

    def project(self, sequences: Tensor) -> Tensor:
        """(batch, K, CHANNELS, L) → (batch, K, rank + 2·STATE, L)."""
        projected = torch.einsum("bkdl,kcd->bkcl", sequences, self.x_weight)
        return projected if self.x_bias is None else projected + self.x_bias[..., None]


def unrolled(x: Tensor) -> Tensor:
    """(batch, c, H, W) → (batch, 4, c, H·W): rows, columns, and both from the end."""
    both = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], dim=1)
    return torch.cat([both, both.flip(-1)], dim=1)


def merged(y: Tensor, height: int, width: int) -> Tensor:
    """(batch, 4, c, H·W) → (batch, c, H·W), the inverse of `unrolled`, summed."""
    both = y[:, :2] + y[:, 2:].flip(-1)
    columns = both[:, 1].unflatten(-1, (width, height)).transpose(2, 3).flatten(2)
    return both[:, 0] + columns


class Stacked(Mixer):
    """Stack, transpose and flip; einsum; the parts added one after the other."""

    def mix(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        sequences = self.unroll(x)
        y = self.scan(sequences, self.project(self.seen(sequences)))
        return self.merge(y, height, width).transpose(1, 2).unflatten(1, (height, width))

    def unroll(self, x: Tensor) -> Tensor:
        return unrolled(x)

    def seen(self, sequences: Tensor) -> Tensor:
        """What the projections read."""
        return sequences

    def merge(self, y: Tensor, height: int, width: int) -> Tensor:
        return merged(y, height, width)


class Assigned(Mixer):
    """Slice assignments into new tensors; a grouped Conv1d; the sum over an axis of directions."""

    def mix(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        sequences = x.new_empty(batch, 4, channels, height * width)
        sequences[:, 0] = x.flatten(2)
        sequences[:, 1] = x.transpose(2, 3).flatten(2)
        sequences[:, 2:4] = torch.flip(sequences[:, 0:2], dims=[-1])
        sequences = self.unroll(sequences)
        weight = self.x_weight.flatten(0, 1)[:, :, None]
        bias = None if self.x_bias is None else self.x_bias.flatten()
        projected = functional.conv1d(self.seen(sequences).flatten(1, 2), weight, bias, groups=4)
        y = self.merge(self.scan(sequences, projected.unflatten(1, (4, -1))))
        placed = torch.zeros_like(y)
        placed[:, 0] = y[:, 0]
        placed[:, 1] = y[:, 1].unflatten(-1, (width, height)).transpose(2, 3).flatten(2)
        placed[:, 2] = y[:, 2].flip(-1)
        placed[:, 3] = y[:, 3].flip(-1).unflatten(-1, (width, height)).transpose(2, 3).flatten(2)
        return placed.sum(1).transpose(1, 2).unflatten(1, (height, width))

    def unroll(self, sequences: Tensor) -> Tensor:
        return sequences

    def seen(self, sequences: Tensor) -> Tensor:
        """What the projections read."""
        return sequences

    def merge(self, y: Tensor) -> Tensor:
        return y


class _Moved(torch.autograd.Function):
    """Unrolling with a backward of its own, channel-last, as kernels of public models are wrapped."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        rows = x.flatten(1, 2)
        columns = x.transpose(1, 2).flatten(1, 2)
        return torch.stack([rows, columns, rows.flip(1), columns.flip(1)], dim=2)


class ChannelLast(Mixer):
    """An autograd function on channel-last maps; matrix products; the output normalised as a flat sequence."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        y = self.mix(functional.silu(self.conv(x)).permute(0, 2, 3, 1).contiguous())
        mixed = self.out(self.norm(y)).unflatten(1, (height, width))
        return x + mixed.permute(0, 3, 1, 2)

    def mix(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        sequences = _Moved.apply(x)  # (batch, L, 4, channels)
        projected = (sequences[..., None, :] @ self.x_weight.transpose(1, 2)).squeeze(-2)
        if self.x_bias is not None:
            projected = projected + self.x_bias
        y = self.scan(sequences.permute(0, 2, 3, 1), projected.permute(0, 2, 3, 1))
        first, second, third, fourth = y.permute(1, 0, 3, 2)
        rows = first + third.flip(1)
        columns = second + fourth.flip(1)
        return rows + columns.unflatten(1, (width, height)).transpose(1, 2).flatten(1, 2)


class FourCalls(Mixer):
    """One scan for each direction, with linear layers of its own, added up at the end."""

    def mix(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        for k in range(4):
            map_ = x if k % 2 == 0 else x.transpose(2, 3)
            sequence = map_.flatten(2)
            if k >= 2:
                sequence = sequence.flip(-1)
            bias = None if self.x_bias is None else self.x_bias[k]
            projected = functional.linear(sequence.transpose(1, 2), self.x_weight[k], bias).transpose(1, 2)
            y = self.scan(sequence[:, None], projected[:, None], slice(k, k + 1))[:, 0]
            if k >= 2:
                y = y.flip(-1)
            y = y.unflatten(-1, tuple(map_.shape[2:]))
            y = y if k % 2 == 0 else y.transpose(2, 3)
            total = y if total is None else total + y
        assert total is not None
        return total.permute(0, 2, 3, 1)


class FromZeros(Mixer):
    """Directions that are added, one after the other, to a map of zeros."""

    def mix(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        sequences = unrolled(x)
        y = self.scan(sequences, self.project(sequences))
        total = torch.zeros_like(x).flatten(2)
        for k in range(4):
            one = y[:, k] if k < 2 else y[:, k].flip(-1)
            if k % 2:
                one = one.unflatten(-1, (width, height)).transpose(2, 3).flatten(2)
            total = total + one
        return total.unflatten(-1, (height, width)).permute(0, 2, 3, 1)


class TwoCalls(Mixer):
    """Two scans of two directions each: forwards and backwards; a mean instead of a sum."""

    def mix(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        sequences = unrolled(x)
        projected = self.project(sequences)
        halves = [
            self.scan(sequences[:, part], projected[:, part], part) for part in (slice(0, 2), slice(2, 4))
        ]
        both = torch.stack([halves[0], halves[1].flip(-1)], dim=1).mean(dim=1)
        columns = both[:, 1].unflatten(-1, (width, height)).transpose(2, 3)
        rows = both[:, 0].unflatten(-1, (height, width))
        return (rows + columns).permute(0, 2, 3, 1)


class FullRank(Stacked):
    """A time step that is projected in one piece, and scans without D and bias."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        random = torch.Generator().manual_seed(seed + 1)
        self.step = nn.Parameter(0.3 * torch.randn(DIRECTIONS, CHANNELS, CHANNELS, generator=random))

    def mix(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        sequences = unrolled(x)
        _, B, C = self.project(sequences).split([self.rank, STATE, STATE], dim=2)
        delta = torch.einsum("bkdl,kcd->bkcl", sequences, self.step)
        y = selective_scan(
            sequences.flatten(1, 2),
            delta.flatten(1, 2),
            -torch.exp(self.A_log),
            B.contiguous(),
            C.contiguous(),
            None,
            None,
            True,
        )
        summed = merged(y.unflatten(1, (4, -1)), height, width)
        return summed.transpose(1, 2).unflatten(1, (height, width))


class Apart(Mixer):
    """Directions that are no whole map summed in place."""

    channels = 8

    def mix(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        sequences = self.unroll(x)
        y = self.scan(sequences, self.project(sequences))
        return self.merge(y, height, width).transpose(1, 2).unflatten(1, (height, width))

    def unroll(self, x: Tensor) -> Tensor:
        """(batch, c, H, W) → (batch, 4, c, L)."""
        raise NotImplementedError

    def merge(self, y: Tensor, height: int, width: int) -> Tensor:
        """(batch, 4, c, L) → (batch, c, H·W)."""
        raise NotImplementedError


class Quarters(Apart):
    """Each direction scans every second row and column, from another position on, and fills its quarter of the map."""

    def unroll(self, x: Tensor) -> Tensor:
        turned = x.transpose(2, 3)
        parts = (x[:, :, ::2, ::2], turned[:, :, ::2, 1::2], x[:, :, ::2, 1::2], turned[:, :, 1::2, 1::2])
        return torch.stack([part.flatten(2) for part in parts], dim=1)

    def merge(self, y: Tensor, height: int, width: int) -> Tensor:
        sides = (height // 2, width // 2)
        whole = y.new_zeros(y.shape[0], y.shape[2], height, width)
        whole[:, :, ::2, ::2] = y[:, 0].unflatten(-1, sides)
        whole[:, :, 1::2, ::2] = y[:, 1].unflatten(-1, sides[::-1]).transpose(2, 3)
        whole[:, :, ::2, 1::2] = y[:, 2].unflatten(-1, sides)
        whole[:, :, 1::2, 1::2] = y[:, 3].unflatten(-1, sides[::-1]).transpose(2, 3)
        return whole.flatten(2)


class QuarterCalls(Quarters):
    """The same with one call of the scan for each quarter."""

    def scan(self, sequences: Tensor, projected: Tensor, directions: slice = slice(None)) -> Tensor:
        calls = [slice(k, k + 1) for k in range(4)]
        return torch.cat(
            [super(Quarters, self).scan(sequences[:, k], projected[:, k], k) for k in calls], dim=1
        )


def gate(y: Tensor) -> Tensor:
    """Weigh the channels of a direction (batch, c, L) by what they are on average."""
    return y * torch.sigmoid(y.mean(-1, keepdim=True))


class Gates(Apart):
    """Four directions of the whole map, each with a gate before they are added up."""

    def unroll(self, x: Tensor) -> Tensor:
        return unrolled(x)

    def merge(self, y: Tensor, height: int, width: int) -> Tensor:
        return merged(torch.stack([gate(y[:, k]) for k in range(4)], dim=1), height, width)


class Windows(Apart):
    """Rows beside windows of 2×2, forwards and backwards, with gates."""

    def unroll(self, x: Tensor) -> Tensor:
        windows = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(2)
        both = torch.stack([x.flatten(2), windows], dim=1)
        return torch.cat([both, both.flip(-1)], dim=1)

    def merge(self, y: Tensor, height: int, width: int) -> Tensor:
        both = gate(y[:, 0]) + gate(y[:, 2].flip(-1)), gate(y[:, 1]) + gate(y[:, 3].flip(-1))
        windows = both[1].unflatten(-1, (height // 2, width // 2, 2, 2)).transpose(3, 4)
        return both[0] + windows.flatten(2)


SPELLINGS: dict[str, Callable[[int, bool], Mixer]] = {
    "stacked": Stacked,
    "assigned": Assigned,
    "channel_last": ChannelLast,
    "four_calls": FourCalls,
    "two_calls": TwoCalls,
    "from_zeros": FromZeros,
}
"""Legal spellings; each takes a seed and whether the projections have a bias."""


APART: dict[str, Callable[[int, bool], Mixer]] = {"quarters": Quarters, "gates": Gates, "windows": Windows}
"""Directions that become one scan each, where they are wide enough."""


class Together(nn.Module):
    """Several mixers on one map, side by side, so that one export serves many of them."""

    def __init__(self, mixers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(mixers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """One output for each mixer."""
        return tuple(mixer(x) for mixer in self.mixers)
