"""What a compiler must know of a model, wherever the model comes from: a card, a module of the user's, later a folder.

Everything after it in the pipeline (export, passes, targets, parity, golden files, manifest, serving) asks a
`SourceModel`, and never who made it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.pruning.orders import ScanOrder
from quartermap_deploy.pruning.plan import QuarterMap
from quartermap_deploy.sources.description import Feeds, Pictures, SourceBlock, WeightsOrigin
from quartermap_deploy.sources.reference import Reference
from quartermap_deploy.tensor_info import TensorInfo

if TYPE_CHECKING:
    import onnx
    import torch

    from quartermap_deploy.passes.base import PassReport


@dataclass(frozen=True, eq=False)
class Traced:
    """A model as ONNX, before any pass that a plan asks for.

    Attributes:
        model: opset 20, float32, scans without bodies, named after their blocks.
        outputs: its outputs, in order.
        rules: what sizes must fulfil, as expressions over `name[axis]`; see `sizes`.
        orders: in which order each scan, by its name, visits the positions of its map, where that is known.
        nodes: for scans of the module that are one node of the graph together, the name of that.
        orders_at: where sizes are open, gives the orders at other shapes of the inputs, by name.
        reports: what `recover_2d` did, or nothing for models whose scans are two-dimensional from the start.
    """

    model: onnx.ModelProto
    outputs: tuple[TensorInfo, ...]
    rules: tuple[str, ...] = ()
    orders: Mapping[str, ScanOrder] = field(default_factory=dict)
    nodes: Mapping[str, str] = field(default_factory=dict)
    reports: tuple[PassReport, ...] = ()
    orders_at: Callable[[Mapping[str, Sequence[int]]], Mapping[str, ScanOrder]] | None = None


@dataclass(frozen=True, eq=False)
class SourceModel(abc.ABC):
    """A PyTorch model in eval mode, and all that a compiler must know of it.

    Attributes:
        name: how it is called in files and messages.
        title: how it is called for people.
        module: the PyTorch module, unpruned.
        inputs: what it takes, with open axes as strings, in the order of its forward.
        task: one of `TASKS`.
        preprocessing: how an image becomes an input, or None if nobody said.
        labels: names of the classes, or nothing.
        weights: where its weights come from.
    """

    name: str
    title: str
    module: torch.nn.Module
    inputs: tuple[TensorInfo, ...]
    task: str
    preprocessing: Preprocessing | None
    labels: tuple[str, ...]
    weights: WeightsOrigin

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """Where it comes from: "card", "architecture" or "module"."""

    @property
    @abc.abstractmethod
    def blocks(self) -> tuple[SourceBlock, ...]:
        """Its blocks, in the order of the network."""

    @abc.abstractmethod
    def trace(self) -> Traced:
        """Export it to ONNX as it is, with its scans as operators of this package.

        Raises:
            ExportError: if it cannot be exported; the message names the module where that is known.
        """

    @abc.abstractmethod
    def reference(self, plan: QuarterMap | None, traced: Traced | None = None) -> Reference:
        """What the graph is compared with: the model in PyTorch, pruned by a plan.

        Args:
            plan: the plan, or None to prune nothing.
            traced: what `trace` returned; needed where only the graph tells the orders of the scans.

        Raises:
            PlanError: if the plan does not fit the model.
        """

    @abc.abstractmethod
    def cases(self, pictures: Pictures | None) -> dict[str, Feeds]:
        """The inputs that parity is checked on, by the name of the case and of the input.

        Args:
            pictures: gives real images; None takes what the model came with.
        """

    def further_cases(self, traced: Traced) -> dict[str, Feeds]:
        """Inputs that parity is checked on beside `cases`, which stay out of golden files and engines.

        Args:
            traced: what `trace` returned.

        Raises:
            ExportError: if axes that were to be open are not.
        """
        return {}

    def image_preprocessing(self, item: TensorInfo) -> Preprocessing:
        """How a picture becomes this input: as the model says, or else scaled to about -2…2.

        Args:
            item: an input that can hold images.
        """
        channels = int(item.shape[1])
        height, width = self.example_shapes[item.name][2:]
        if self.preprocessing is not None and self.preprocessing.channels == channels:
            return self.preprocessing.with_size(height, width)
        color: Any = {1: "grey", 3: "rgb", 4: "rgba"}[channels]
        size = (height, width)
        return Preprocessing(
            size, "stretch", size, "bilinear", (0.5,) * channels, (0.25,) * channels, color=color
        )

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks per stage."""
        stages = [block.stage for block in self.blocks]
        return tuple(stages.count(stage) for stage in range(1, max(stages, default=0) + 1))

    @property
    def dynamic_batch(self) -> bool:
        """Whether the batch of its first input is open."""
        return isinstance(self.inputs[0].shape[0], str)

    @property
    def example_shapes(self) -> dict[str, tuple[int, ...]]:
        """For each input, sizes that fit; overridden where open axes have an example."""
        return {item.name: tuple(2 if isinstance(s, str) else s for s in item.shape) for item in self.inputs}

    def selected(self, plan: QuarterMap | None) -> tuple[int, ...]:
        """The blocks that a plan prunes.

        Raises:
            PlanError: if the plan does not fit the model.
        """
        return () if plan is None else plan.select(self.depths)
