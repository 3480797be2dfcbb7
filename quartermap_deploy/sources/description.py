"""What is said of a model: its inputs and outputs, its blocks, where its weights come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.data.preprocessing import Preprocessing

Feeds: TypeAlias = "dict[str, NDArray[Any]]"
"""One batch: arrays by the name of the input."""
Pictures: TypeAlias = "Callable[[Preprocessing], NDArray[np.float32]]"
"""Gives real images, prepared as it is told."""

Task = Literal["classification", "segmentation", "features", "image", "other"]
TASKS: tuple[str, ...] = get_args(Task)
"""What the outputs of a model are: logits of classes, logits of classes at every position, feature maps, an image, or
something else."""


@dataclass(frozen=True)
class SourceBlock:
    """A block: what a QuarterMap plan selects as one.

    Attributes:
        index: its number, from 1 over the whole network.
        stage: number of its stage, from 1.
        path: path of its module; empty if that is the model itself.
        mixer_path: path of the module in it that calls the scan.
        calls: how often one run of the model calls it.
    """

    index: int
    stage: int
    path: str
    mixer_path: str
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
