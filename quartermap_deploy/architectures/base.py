"""What every architecture offers to the rest of the compiler: its blocks, their mixers, its input sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from quartermap_deploy.architectures.ss2d import SS2D
from quartermap_deploy.data.preprocessing import LARGEST_SIDE
from quartermap_deploy.errors import InputError


@dataclass(frozen=True)
class Block:
    """One block of a model.

    Attributes:
        index: number of the block, from 1 over the whole network.
        stage: number of its stage, from 1.
        path: module path of the block, as "layers.0.blocks.1".
        mixer_path: module path of its SS2D.
        module: the block.
        mixer: its SS2D.
    """

    index: int
    stage: int
    path: str
    mixer_path: str
    module: nn.Module
    mixer: SS2D


class Stage(nn.Module):
    """Blocks at one resolution, and the step to the next stage."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Return the map for the next stage."""
        out: Tensor = self.downsample(self.blocks(x))
        return out


class VisualStateSpaceModel(nn.Module):
    """An image model whose token mixers are SS2D modules: a classifier, or its backbone.

    The input is (batch, channels, H, W), float32. A classifier's output is (batch, num_classes), logits; it builds
    `patch_embed`, `layers` (one `Stage` each) and what `classify` needs, and says where its last layer and its mixers
    are. A `Backbone` made of it returns the maps of its stages instead.
    """

    head_path: str
    """Module path of the last linear layer; empty without one."""
    mixer_name: str
    """Attribute of a block that holds its SS2D."""
    backbone_norms: bool
    """Whether the public code normalises each map that leaves its backbone."""
    task: str = "classification"
    output_names: tuple[str, ...] = ("logits",)
    """Names of what `forward` returns, in order."""

    patch_embed: nn.Module
    layers: nn.ModuleList
    num_classes: int
    """Size of a classifier's output; 0 of a backbone."""
    in_channels: int
    dims: tuple[int, ...]
    """Channels per stage."""
    channel_first: bool
    """Whether maps between the layers are (batch, channels, H, W), or else (batch, H, W, channels)."""
    minimum_side: int
    """Smallest height and width that leave at least one position in every stage."""

    def stem(self, x: Tensor) -> Tensor:
        """Return the map that the first stage takes, for images (batch, channels, H, W)."""
        embedded: Tensor = self.patch_embed(x)
        return embedded

    def classify(self, x: Tensor) -> Tensor:
        """Return logits, (batch, num_classes), for the map of the last stage; of classifiers alone."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return what `output_names` names, for images (batch, channels, H, W)."""
        x = self.stem(x)
        for stage in self.layers:
            x = stage(x)
        return self.classify(x)

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks per stage."""
        return tuple(len(stage.blocks) for stage in self.stages())

    def stages(self) -> Iterator[Stage]:
        """Yield the stages in order."""
        for stage in self.layers:
            assert isinstance(stage, Stage)
            yield stage

    def blocks(self) -> list[Block]:
        """Return every block, in the order in which an image passes them."""
        found: list[Block] = []
        for stage_index, stage in enumerate(self.stages()):
            for block_index, module in enumerate(stage.blocks):
                path = f"layers.{stage_index}.blocks.{block_index}"
                mixer = getattr(module, self.mixer_name)
                found.append(
                    Block(
                        index=len(found) + 1,
                        stage=stage_index + 1,
                        path=path,
                        mixer_path=f"{path}.{self.mixer_name}",
                        module=module,
                        mixer=mixer,
                    )
                )
        return found

    def freeze(self) -> None:
        """Hold the constants of every scan as buffers, for export; see `SS2D.freeze`."""
        for block in self.blocks():
            block.mixer.freeze()

    def unfreeze(self) -> None:
        """End `freeze`."""
        for block in self.blocks():
            block.mixer.unfreeze()

    def check_input_shape(self, shape: Sequence[int]) -> None:
        """Check the shape of an input; `forward` itself checks nothing, so that it exports.

        Args:
            shape: (batch, channels, H, W).

        Raises:
            InputError: if it does not.
        """
        expected = f"expected (batch, {self.in_channels}, height, width)"
        sizes = tuple(shape)
        if len(sizes) != 4:
            raise InputError(f"an input of shape {sizes} has {len(sizes)} axes; {expected}")
        batch, channels, height, width = sizes
        if channels != self.in_channels:
            hint = ", which looks like (batch, height, width, channels)" if width == self.in_channels else ""
            raise InputError(f"an input of shape {sizes} has {channels} channels{hint}; {expected}")
        if batch < 1:
            raise InputError(f"an input of shape {sizes} is empty; {expected} with a batch of at least 1")
        if max(height, width) > LARGEST_SIDE:
            raise InputError(
                f"an image of {height}×{width} is too large; height and width may be {LARGEST_SIDE} pixels at most"
            )
        if min(height, width) < self.minimum_side:
            raise InputError(
                f"an image of {height}x{width} is too small for this model; height and width must be at "
                f"least {self.minimum_side}, so that every stage has a position left"
            )
