"""The maps of a model's stages instead of its logits: what detectors, segmenters and other heads are built on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from quartermap_deploy.architectures.base import Stage, VisualStateSpaceModel
from quartermap_deploy.architectures.layers import layer_norm
from quartermap_deploy.errors import InputError

FIRST_REDUCTION = 4
"""Pixels of the image a side for each position of the first stage; each further stage doubles it."""


@dataclass(frozen=True)
class FeatureInfo:
    """What a backbone returns, with the methods that code for timm's backbones asks.

    Attributes:
        dims: channels of each map.
        reductions: pixels of the image a side for each position.
        paths: module path of the stage that each comes from.
    """

    dims: tuple[int, ...]
    reductions: tuple[int, ...]
    paths: tuple[str, ...]

    def channels(self) -> list[int]:
        """Return the channels of each map."""
        return list(self.dims)

    def reduction(self) -> list[int]:
        """Return the pixels of the image a side for each position of each map."""
        return list(self.reductions)

    def module_name(self) -> list[str]:
        """Return the module path of the stage that each map comes from."""
        return list(self.paths)


class Backbone(VisualStateSpaceModel):
    """The stages of a classifier: images (batch, in_channels, H, W) to a list of maps (batch, C_i, H_i, W_i), float32.

    Each map is what leaves the blocks of a stage, before the step to the next one. VMamba's detectors and segmenters
    normalise each, by `outnorm<stage>`; the path to the next stage goes on without. Parameters carry the names of
    these checkpoints, without the `backbone.` before them.

    Args:
        classifier: the model whose stages these are; they are shared, not copied.
        out_indices: stages whose maps are returned, from 0, in ascending order. Stages after the last are not kept.

    Attributes:
        out_indices: as given.
        feature_info: channels and reduction of each map.

    Raises:
        InputError: if `out_indices` are no stages, or not in ascending order.
    """

    head_path = ""
    task = "features"

    def __init__(self, classifier: VisualStateSpaceModel, out_indices: Sequence[int] = (0, 1, 2, 3)) -> None:
        super().__init__()
        self.out_indices = _checked(out_indices, len(classifier.layers))
        stages = self.out_indices[-1] + 1
        self.mixer_name, self.backbone_norms = classifier.mixer_name, classifier.backbone_norms
        self.num_classes, self.in_channels = 0, classifier.in_channels
        self.dims, self.channel_first = classifier.dims[:stages], classifier.channel_first
        self.minimum_side = classifier.minimum_side
        self.output_names = tuple(f"features_{place}" for place in range(len(self.out_indices)))
        self.feature_info = FeatureInfo(
            tuple(self.dims[index] for index in self.out_indices),
            tuple(FIRST_REDUCTION * 2**index for index in self.out_indices),
            tuple(f"layers.{index}" for index in self.out_indices),
        )

        self.patch_embed = classifier.patch_embed
        *before, last = list(classifier.stages())[:stages]
        self.layers = nn.ModuleList([*before, Stage(list(last.blocks), nn.Identity())])
        for index in self.out_indices if self.backbone_norms else ():
            self.add_module(norm_name(index), layer_norm(self.dims[index], channel_first=self.channel_first))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps of the stages, channel-first, for images (batch, channels, H, W)."""
        x = self.stem(x)
        maps: list[Tensor] = []
        for index, stage in enumerate(self.stages()):
            x = stage.blocks(x)
            if index in self.out_indices:
                maps.append(self._outgoing(x, index))
            x = stage.downsample(x)
        return maps

    def _outgoing(self, x: Tensor, index: int) -> Tensor:
        if self.backbone_norms:
            x = self.get_submodule(norm_name(index))(x)
        return x if self.channel_first else x.permute(0, 3, 1, 2)


def norm_name(index: int) -> str:
    """Return the name of the normalisation of a stage's map, as checkpoints have it."""
    return f"outnorm{index}"


def _checked(out_indices: Sequence[int], stages: int) -> tuple[int, ...]:
    found = tuple(out_indices)
    whole = all(type(index) is int and 0 <= index < stages for index in found)
    if not found or not whole or list(found) != sorted(set(found)):
        raise InputError(
            f"out_indices = {out_indices!r}; expected numbers of stages from 0 to {stages - 1}, in ascending order"
        )
    return found
