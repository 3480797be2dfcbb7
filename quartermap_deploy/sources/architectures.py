"""Source models from our own architectures: by a card, or from a model of `create_model` by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quartermap_deploy.architectures.base import VisualStateSpaceModel
from quartermap_deploy.data.labels import class_names
from quartermap_deploy.errors import ExportError, InputError
from quartermap_deploy.frontend.exporter import INPUT, trace
from quartermap_deploy.pruning.plan import QuarterMap
from quartermap_deploy.pruning.reference import prune
from quartermap_deploy.sources.cases import image_cases
from quartermap_deploy.sources.description import Feeds, Pictures, SourceBlock, WeightsOrigin
from quartermap_deploy.sources.graph_facts import output_infos
from quartermap_deploy.sources.reference import Reference
from quartermap_deploy.sources.signature import Signature
from quartermap_deploy.sources.source_model import SourceModel, Traced
from quartermap_deploy.tensor_info import TensorInfo

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quartermap_deploy.architectures.cards import ModelCard


@dataclass(frozen=True, eq=False)
class ArchitectureSource(SourceModel):
    """A model of `architectures`.

    Attributes:
        size: (height, width) to trace and validate with.
        card: its card, or None for a model without one.
    """

    module: VisualStateSpaceModel
    size: tuple[int, int] = field(kw_only=True)
    card: ModelCard | None = field(kw_only=True, default=None)

    @property
    def kind(self) -> str:
        """Where it comes from."""
        return "architecture" if self.card is None else "card"

    @property
    def blocks(self) -> tuple[SourceBlock, ...]:
        """Its blocks, in the order of the network."""
        return tuple(
            SourceBlock(block.index, block.stage, block.path, block.mixer_path)
            for block in self.module.blocks()
        )

    @property
    def example_shapes(self) -> dict[str, tuple[int, ...]]:
        """Sizes of a batch of one."""
        return {INPUT: (1, self.module.in_channels, *self.size)}

    def trace(self) -> Traced:
        """Export it to ONNX as it is."""
        if any(block.mixer.subsample is not None for block in self.module.blocks()):
            raise ExportError(
                "the model is pruned in PyTorch already; export the unpruned model and give the plan here"
            )
        graph = trace(
            self.module,
            self.example_shapes[INPUT],
            dynamic_batch=self.dynamic_batch,
            dynamic_size=isinstance(self.inputs[0].shape[2], str),
        )
        return Traced(graph, output_infos(graph))

    def reference(self, plan: QuarterMap | None, traced: Traced | None = None) -> Reference:
        """The model in PyTorch, pruned by a plan."""
        return architecture_reference(self.module if plan is None else prune(self.module, plan))

    def cases(self, pictures: Pictures | None) -> dict[str, Feeds]:
        """Images, a single one, zeros, and values far out of range."""
        if pictures is None:
            noise = np.random.default_rng(0).standard_normal((2, *self.example_shapes[INPUT][1:]))
            return image_cases(INPUT, noise.astype(np.float32), self.dynamic_batch)
        return image_cases(INPUT, pictures(self.image_preprocessing(self.inputs[0])), self.dynamic_batch)


def architecture_reference(model: VisualStateSpaceModel) -> Reference:
    """A model of `architectures`, pruned by `prune` or not, as what a graph is compared with."""
    blocks = tuple(
        SourceBlock(block.index, block.stage, block.path, block.mixer_path) for block in model.blocks()
    )
    image = TensorInfo(INPUT, ("batch", model.in_channels, "height", "width"))
    return Reference(model, (image,), blocks, _Signature((INPUT,), False, "", outputs=model.output_names))


@dataclass(frozen=True)
class _Signature(Signature):
    """Of a model that says itself what its outputs are called."""

    outputs: tuple[str, ...] = ()

    def named(self, outputs: Any) -> dict[str, Any]:
        """Name what the model returned."""
        values: Sequence[Any] = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        return dict(zip(self.outputs, values, strict=True))


def architecture_source(
    model: VisualStateSpaceModel,
    input_shape: Sequence[int],
    *,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
) -> ArchitectureSource:
    """A source model from a model of `create_model`.

    Args:
        model: in eval mode.
        input_shape: (batch, channels, height, width) to trace with.
        dynamic_batch: leave the batch size open.
        dynamic_size: leave height and width open.

    Raises:
        ExportError: if it is another kind of module.
        InputError: if the model cannot take the size.
    """
    if not hasattr(model, "blocks") or not hasattr(model, "depths"):
        raise ExportError(
            f"cannot export a {type(model).__name__}; expected a model from create_model. A module of your own is "
            "compiled by compile_module"
        )
    model.check_input_shape(input_shape)
    batch, channels, height, width = input_shape
    return ArchitectureSource(
        name=type(model).__name__.lower(),
        title=type(model).__name__,
        module=model,
        inputs=(_image_input(channels, (height, width), batch, dynamic_batch, dynamic_size),),
        task=model.task,
        preprocessing=None,
        labels=(),
        weights=WeightsOrigin("given"),
        size=(height, width),
    )


def card_source(
    name: str,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    features_only: bool = False,
    checkpoint: Path | None = None,
    input_size: tuple[int, int] | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    preprocessing: Mapping[str, Any] | None = None,
    labels: str | Path | Sequence[str] | None = None,
    seed: int = 0,
) -> ArchitectureSource:
    """A source model from a card.

    Args:
        name: of the card.
        num_classes: size of the output; None takes the checkpoint's or the card's.
        in_chans: channels of the input; None takes the checkpoint's or the card's.
        features_only: the backbone, whose outputs are the maps of its stages.
        checkpoint: file with its weights; None takes those that come with the package, or else new ones.
        input_size: (height, width) in pixels; None takes the card's.
        dynamic_batch: leave the batch size open.
        dynamic_size: leave height and width open.
        preprocessing: what is otherwise than the card says of the preparation of images.
        labels: names of the classes; None takes the card's, where the last layer is one of its classes.
        seed: seed of new weights, which does not touch torch's global generator.

    Raises:
        UnknownNameError: if there is no such card.
        CheckpointError: if the checkpoint does not fit.
        InputError: if the model cannot take the size or the channels, or the preprocessing makes another size.
    """
    import torch

    from quartermap_deploy.architectures.cards import load_card
    from quartermap_deploy.architectures.factory import create_with_weights
    from quartermap_deploy.files import file_hash

    card = load_card(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, weights = create_with_weights(
            name,
            num_classes=num_classes,
            in_chans=in_chans,
            checkpoint=checkpoint,
            features_only=features_only,
        )
    size = input_size or card.preprocessing.crop
    model.check_input_shape((1, model.in_channels, *size))
    prepared = card.preprocessing.with_size(*size)
    if preprocessing:
        prepared = prepared.replace(preprocessing)
    if prepared.crop != size and not dynamic_size:
        raise InputError(
            f"the preprocessing makes images of {_sides(prepared.crop)}, but the model is compiled for {_sides(size)}; "
            "give both the same size, or leave height and width open"
        )
    model.check_input_shape((1, model.in_channels, *prepared.crop))
    names = () if weights.new_head or features_only else card.labels
    return ArchitectureSource(
        name=card.name,
        title=card.title,
        module=model,
        inputs=(_image_input(model.in_channels, size, 1, dynamic_batch, dynamic_size),),
        task=model.task,
        preprocessing=prepared.with_channels(model.in_channels),
        labels=class_names(labels, model.num_classes, names),
        weights=WeightsOrigin(
            weights.source,
            weights.new_head,
            None if checkpoint is None else checkpoint.name,
            None if checkpoint is None else file_hash(checkpoint),
            notes=weights.notes,
        ),
        size=size,
        card=card,
    )


def _sides(size: tuple[int, int]) -> str:
    return "x".join(map(str, size))


def _image_input(
    channels: int, size: tuple[int, int], batch: int, dynamic_batch: bool, dynamic_size: bool
) -> TensorInfo:
    sides: tuple[int | str, ...] = ("height", "width") if dynamic_size else size
    return TensorInfo(INPUT, ("batch" if dynamic_batch else batch, channels, *sides))
