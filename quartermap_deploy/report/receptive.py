"""Effective receptive fields (Luo et al. 2016, arXiv 1701.04128): which pixels one position of the last map depends on.

As the VMamba paper (arXiv 2401.10166) shows them: the gradient of the position in the centre of the last feature map,
summed over its channels, with respect to the input; its size, summed over the colours and averaged over images. A map
of an even number of rows or columns has two positions in its centre, and both are taken, so that the middle of the
map is that of the image.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.errors import InputError
from quartermap_deploy.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quartermap_deploy.architectures.base import VisualStateSpaceModel

SHARES = (0.5, 0.75, 0.95)
"""Shares of the whole gradient for which the reach is stated."""


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """The effective receptive field of one model.

    Attributes:
        field: (H, W), share of every pixel in the whole gradient; adds up to 1.
        images: over how many images it was averaged.
    """

    field: NDArray[np.float64]
    images: int

    def reach(self, share: float) -> int:
        """Return the side, in pixels, of the smallest square around the centre that holds this share of the gradient.

        In an image that is no square, it may stand out of the short sides.
        """
        height, width = self.field.shape
        rows, columns = np.indices(self.field.shape)
        # In half pixels from the middle, which in an image of an even side lies between two of them; of two ways to
        # hold the middle of an odd and an even side, the larger one.
        distance = np.maximum(np.abs(2 * rows + 1 - height), np.abs(2 * columns + 1 - width)).ravel()
        held = np.cumsum(np.bincount(distance, weights=self.field.ravel()))
        # Rounding may leave the whole sum a little below 1.
        return int(np.searchsorted(held, min(share, held[-1]) * (1 - 1e-12))) + 1


def receptive_field(
    model: VisualStateSpaceModel, images: NDArray[np.float32], progress: Progress = SILENT
) -> ReceptiveField:
    """Return the effective receptive field of a model, pruned or not.

    Args:
        model: a model in eval mode; its parameters are left without gradients.
        images: (n, channels, H, W); one after the other, as a gradient takes much memory.
        progress: shows the images.

    Raises:
        InputError: if the gradient is zero or not finite, so that there is no field.
    """
    import torch

    total = np.zeros(images.shape[2:], dtype=np.float64)
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with progress.step("effective receptive field", total=len(images)) as advance:
        try:
            _require_gradients(frozen, False)
            for image in images:
                x = torch.from_numpy(image[None]).requires_grad_()
                last = _last_map(model, x)
                rows, columns = (slice((side - 1) // 2, side // 2 + 1) for side in last.shape[2:])
                (gradient,) = torch.autograd.grad(last[0, :, rows, columns].sum(), x)
                total += gradient[0].abs().sum(dim=0).double().numpy()
                advance(1)
        finally:
            _require_gradients(frozen, True)
    whole = float(total.sum())
    if not np.isfinite(whole) or whole <= 0:
        raise InputError(
            f"the gradient of the last feature map adds up to {whole:g} over {len(images)} images, so there is no "
            "receptive field"
        )
    return ReceptiveField(total / whole, len(images))


def _require_gradients(parameters: Iterable[nn.Parameter], required: bool) -> None:
    """Only the image needs a gradient; those of all weights would cost as much again."""
    for parameter in parameters:
        parameter.requires_grad_(required)


def _last_map(model: VisualStateSpaceModel, x: Tensor) -> Tensor:
    """Return what leaves the last stage, channel-first, (1, channels, H, W)."""
    outputs: list[Tensor] = []
    *_, last = model.stages()
    handle = last.blocks.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        model(x)
    finally:
        handle.remove()
    return outputs[0] if model.channel_first else outputs[0].permute(0, 3, 1, 2)
