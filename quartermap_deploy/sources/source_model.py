"""What a compiler must know of a model, wherever the model comes from: a card, a module of the user's, later a folder.

Everything after it in the pipeline (export, passes, targets, parity, golden files, manifest, serving) asks a
`SourceModel`, and never who made it.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch
    from numpy.typing import NDArray

    from quartermap_deploy.data.preprocessing import Preprocessing
    from quartermap_deploy.passes.base import PassReport
    from quartermap_deploy.pruning.orders import ScanOrder
    from quartermap_deploy.pruning.plan import QuarterMap
    from quartermap_deploy.sources.reference import Reference

Task = Literal["classification", "segmentation", "features", "image", "other"]
TASKS: tuple[str, ...] = get_args(Task)
"""What the outputs of a model are: logits of classes, logits of classes at every position, feature maps, an image, or
something else."""


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a model.

    Attributes:
        name: by which it is fed or read.
        shape: size of each axis; an open axis is a string, such as "batch".
        type: element type, by NumPy's name.
    """

    name: str
    shape: tuple[int | str, ...]
    type: str = "float32"

    @property
    def is_image(self) -> bool:
        """Whether it can hold images: (batch, 1, 3 or 4 channels, height, width) of floating-point numbers."""
        return len(self.shape) == 4 and self.shape[1] in (1, 3, 4) and self.type.startswith("float")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"name": self.name, "shape": list(self.shape), "type": self.type}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TensorInfo:
        """Read what `to_dict` wrote."""
        return cls(str(values["name"]), tuple(values["shape"]), str(values["type"]))


@dataclass(frozen=True)
class SourceBlock:
    """A block: what a QuarterMap plan selects as one.

    Attributes:
        index: its number, from 1 over the whole network.
        stage: number of its stage, from 1.
        path: path of its module; empty if that is the model itself.
        calls: how often one run of the model calls it.
    """

    index: int
    stage: int
    path: str
    calls: int = 1

    @property
    def title(self) -> str:
        """For messages: number and module path."""
        return f"block {self.index} ({self.path})" if self.path else f"block {self.index}"


@dataclass(frozen=True)
class WeightsOrigin:
    """Where the weights of a model come from.

    Attributes:
        source: "checkpoint" for a file that was given, "included" for the one that comes with the package, "new" for
            newly initialised ones, "given" for those that the user's module had.
        new_head: whether the last layer is newly initialised.
        file: name of the file, or None.
        sha256: its hash, or None.
        notes: what has to be said about loading it, such as keys that were left out.
    """

    source: Literal["checkpoint", "included", "new", "given"]
    new_head: bool = False
    file: str | None = None
    sha256: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def trained(self) -> bool:
        """Whether all weights are trained, as far as this package can know."""
        return self.source != "new" and not self.new_head


@dataclass(frozen=True, eq=False)
class Traced:
    """A model as ONNX, before any pass that a plan asks for.

    Attributes:
        model: opset 20, float32, scans without bodies, named after their blocks.
        outputs: its outputs, in order.
        rules: what sizes must fulfil, as expressions over `name[axis]`; see `sizes`.
        orders: in which order each scan, by its name, visits the positions of its map, where that is known.
        reports: what `recover_2d` did, or nothing for models whose scans are two-dimensional from the start.
    """

    model: onnx.ModelProto
    outputs: tuple[TensorInfo, ...]
    rules: tuple[str, ...] = ()
    orders: Mapping[str, ScanOrder] = field(default_factory=dict)
    reports: tuple[PassReport, ...] = ()


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
    def cases(self, images: NDArray[np.float32] | None) -> dict[str, dict[str, NDArray[Any]]]:
        """The inputs that parity is checked on, by the name of the case and of the input.

        Args:
            images: real images, prepared; None takes what the model came with.
        """

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

    def replace(self, **changes: Any) -> SourceModel:
        """Return the same model with other attributes."""
        return dataclasses.replace(self, **changes)

    def selected(self, plan: QuarterMap | None) -> tuple[int, ...]:
        """The blocks that a plan prunes.

        Raises:
            PlanError: if the plan does not fit the model.
        """
        return () if plan is None else plan.select(self.depths)


def find_block(blocks: Sequence[SourceBlock], index: int) -> SourceBlock:
    """The block of a number."""
    return next(block for block in blocks if block.index == index)
