"""How much a model computes: tokens that its scans walk, and multiply-accumulates, per block and in total.

Counted as the public VMamba figures are: with fvcore's rules, one multiply-accumulate of a convolution or
linear layer counts once, a layer normalisation five operations per element and a batch normalisation two,
activations, additions and the final mean nothing; a scan counts 9·L·(K·d_inner)·N + L·K·d_inner operations
(github.com/state-spaces/mamba, issue 110). All counts are for one image.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from quartermap_deploy.architectures.base import Block, VisualStateSpaceModel
from quartermap_deploy.architectures.ss2d import SS2D


@dataclass(frozen=True)
class BlockComplexity:
    """What one block computes for one image.

    Attributes:
        index: number of the block, from 1.
        stage: number of its stage, from 1.
        path: its module path.
        pruned: whether a QuarterMap plan subsamples it.
        map_size: (height, width) of its feature map.
        scanned_size: (height, width) of the map that its scan walks.
        directions: scans over that map.
        flops: operations of the whole block.
        scan_flops: operations of its scan alone.
    """

    index: int
    stage: int
    path: str
    pruned: bool
    map_size: tuple[int, int]
    scanned_size: tuple[int, int]
    directions: int
    flops: int
    scan_flops: int

    @property
    def tokens(self) -> int:
        """Positions that the scan walks, over all directions."""
        return self.directions * math.prod(self.scanned_size)


@dataclass(frozen=True)
class Complexity:
    """What a model computes for one image.

    Attributes:
        input_size: (height, width) of the image.
        parameters: parameters of the model.
        blocks: its blocks in order.
        other_flops: operations outside the blocks: stem, steps between the stages, classifier.
    """

    input_size: tuple[int, int]
    parameters: int
    blocks: tuple[BlockComplexity, ...]
    other_flops: int

    @property
    def flops(self) -> int:
        """Operations of the whole model."""
        return self.other_flops + sum(block.flops for block in self.blocks)

    @property
    def tokens(self) -> int:
        """Positions that all scans walk, over all directions and blocks."""
        return sum(block.tokens for block in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the totals."""
        values = dataclasses.asdict(self)
        for entry, block in zip(values["blocks"], self.blocks, strict=True):
            entry["tokens"] = block.tokens
        return {**values, "flops": self.flops, "tokens": self.tokens}


def measure(model: VisualStateSpaceModel, input_size: tuple[int, int]) -> Complexity:
    """Count what a model, pruned or not, computes for one image of (height, width).

    A pruned block is counted in its canonical form: convolution, normalisation and output projection on the
    full map, projections and scan on the subsampled one. The graph passes may save more than that.

    Raises:
        InputError: if the model does not take images of this size.
    """
    shape = (1, model.in_channels, *input_size)
    model.check_input_shape(shape)
    flops: dict[str, int] = {}
    maps: dict[str, tuple[int, int]] = {}
    with _counting(model, flops, maps):
        _run_without_data(model, shape)
    blocks = tuple(_block_complexity(block, flops, maps[block.mixer_path]) for block in model.blocks())
    return Complexity(
        input_size=input_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        blocks=blocks,
        other_flops=sum(flops.values()) - sum(block.flops for block in blocks),
    )


def _block_complexity(block: Block, flops: dict[str, int], map_size: tuple[int, int]) -> BlockComplexity:
    scanned = _scanned_size(block.mixer, map_size)
    return BlockComplexity(
        index=block.index,
        stage=block.stage,
        path=block.path,
        pruned=block.mixer.subsample is not None,
        map_size=map_size,
        scanned_size=scanned,
        directions=len(block.mixer.directions),
        flops=sum(count for path, count in flops.items() if path.startswith(f"{block.path}.")),
        scan_flops=scan_flops(block.mixer, math.prod(scanned)),
    )


def scan_flops(mixer: SS2D, length: int) -> int:
    """Return the operations of a selective scan of `length` positions in every direction."""
    channels = len(mixer.directions) * mixer.d_inner
    return 9 * length * channels * mixer.d_state + length * channels


def _projection_flops(mixer: SS2D, length: int) -> int:
    """Return the multiply-accumulates of the projections to dt, B and C, and of dt to its full rank."""
    per_direction = (mixer.dt_rank + 2 * mixer.d_state) * mixer.d_inner + mixer.dt_rank * mixer.d_inner
    return length * len(mixer.directions) * per_direction


def _scanned_size(mixer: SS2D, map_size: tuple[int, int]) -> tuple[int, int]:
    if mixer.subsample is None:
        return map_size
    height, width = (mixer.subsample.kept_size(side) for side in map_size)
    return height, width


@contextmanager
def _counting(model: nn.Module, flops: dict[str, int], maps: dict[str, tuple[int, int]]) -> Iterator[None]:
    """While open, a run of the model fills in operations by module path, and the map size of every SS2D."""
    handles = []

    def hook(path: str) -> Any:
        def count(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, SS2D):
                maps[path] = _map_size(module, arguments[0])
                length = math.prod(_scanned_size(module, maps[path]))
                # in_proj, conv2d, out_norm and out_proj are modules of their own and counted there.
                flops[path] = _projection_flops(module, length) + scan_flops(module, length)
            else:
                flops[path] = _layer_flops(module, arguments[0], output)

        return count

    for path, module in model.named_modules():
        if isinstance(module, (SS2D, nn.Conv2d, nn.Linear, nn.LayerNorm, nn.BatchNorm2d)):
            handles.append(module.register_forward_hook(hook(path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _map_size(mixer: SS2D, x: Tensor) -> tuple[int, int]:
    return (x.shape[2], x.shape[3]) if mixer.channel_first else (x.shape[1], x.shape[2])


def _layer_flops(module: nn.Module, input: Tensor, output: Tensor) -> int:
    if isinstance(module, nn.Conv2d):
        return output.numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    return input.numel() * (5 if isinstance(module, nn.LayerNorm) else 2)


def _run_without_data(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Run a model on tensors that have a shape but no data."""
    state = {
        name: torch.empty_like(tensor, device="meta")
        for tensors in (model.named_parameters(), model.named_buffers())
        for name, tensor in tensors
    }
    with torch.no_grad(), _Shapes():
        torch.func.functional_call(model, state, torch.empty(shape, device="meta"))


class _Shapes(TorchFunctionMode):
    """While open, what keeps a shape returns its input: torch takes a normalisation apart to find it out."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func in _SHAPES else func(*args, **(kwargs or {}))


_SHAPES = frozenset({functional.layer_norm, functional.batch_norm, functional.silu, functional.gelu})
