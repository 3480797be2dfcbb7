"""Activation maps of pruned blocks: what goes into the scan, what of it is kept, and what comes out and is restored.

Computed by the PyTorch model on one image. Every map is the mean size of the values over the channels, so that it has
one number for each position.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from quartermap_deploy.architectures.base import Block, VisualStateSpaceModel
    from quartermap_deploy.architectures.ss2d import SS2D

Map = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class BlockActivations:
    """The maps of one pruned block.

    Attributes:
        block: its number.
        stage: its stage.
        before: (H, W), what goes into the scan: the map after the convolution and its activation.
        kept: (H', W'), the positions of it that are kept.
        scanned: (H', W'), what the scan returns for them.
        restored: (H, W), the same filled up to the full size.
        whole: (H, W), what the scan would return for the full map.
        difference: norm of the difference of the two after the normalisation that follows, as a share of the norm of
            whole. Before it they differ in size as well, since a shorter scan adds up fewer positions.
    """

    block: int
    stage: int
    before: Map
    kept: Map
    scanned: Map
    restored: Map
    whole: Map
    difference: float


def block_activations(model: VisualStateSpaceModel, image: NDArray[np.float32]) -> list[BlockActivations]:
    """Return the maps of every pruned block of a model, for one image.

    Args:
        model: a model in eval mode, pruned by `pruning.reference.prune`.
        image: (1, channels, H, W).
    """
    import torch

    found: list[BlockActivations] = []
    with torch.no_grad():
        with _inputs_of_scans(model) as inputs:
            model(torch.from_numpy(image))
        for block in model.blocks():
            if block.mixer.subsample is not None:
                found.append(_of_block(block, inputs[block.index]))
    return found


@contextmanager
def _inputs_of_scans(model: VisualStateSpaceModel) -> Iterator[dict[int, Tensor]]:
    """While open, a run of the model leaves here what goes into the scan of each pruned block, by its number."""
    from torch.nn import functional

    inputs: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: object, arguments: object, output: Tensor) -> None:
            inputs[index] = functional.silu(output)

        return hook

    handles = [
        block.mixer.conv2d.register_forward_hook(keep(block.index))
        for block in model.blocks()
        if block.mixer.subsample is not None
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _of_block(block: Block, x: Tensor) -> BlockActivations:
    from quartermap_deploy.pruning.positions import keep_positions, restore_positions

    mixer, subsample = block.mixer, block.mixer.subsample
    assert subsample is not None
    kept = keep_positions(x, subsample)
    mixer.subsample = None
    try:
        scanned, whole = mixer.scan(kept), mixer.scan(x)
    finally:
        mixer.subsample = subsample
    restored = restore_positions(scanned, (x.shape[2], x.shape[3]), subsample)
    wanted = _normalised(mixer, whole)
    norm = float(wanted.norm())
    return BlockActivations(
        block=block.index,
        stage=block.stage,
        before=_map(x),
        kept=_map(kept),
        scanned=_map(scanned),
        restored=_map(restored),
        whole=_map(whole),
        difference=float((_normalised(mixer, restored) - wanted).norm()) / norm if norm > 0 else 0.0,
    )


def _normalised(mixer: SS2D, y: Tensor) -> Tensor:
    """What the normalisation after the scan makes of its output, in the layout of the mixer."""
    out: Tensor = mixer.out_norm(y if mixer.channel_first else y.permute(0, 2, 3, 1))
    return out


def _map(x: Tensor) -> Map:
    """Mean size over the channels, (1, channels, H, W) → (H, W)."""
    values: Map = x[0].abs().mean(dim=0).float().numpy()
    return values
