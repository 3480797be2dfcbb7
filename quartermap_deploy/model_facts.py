"""What a bundle says about its model and how it is run, as far as those ask who stand below `bundle`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.targets import Session
from quartermap_deploy.targets.execution import ON_CPU, Execution
from quartermap_deploy.tensor_info import TensorInfo


class ModelFacts(Protocol):
    """A bundle; `bundle.Bundle` says what each of these is."""

    @property
    def path(self) -> Path:
        """Its folder."""
        ...

    @property
    def manifest(self) -> dict[str, Any]:
        """What its manifest holds."""
        ...

    @property
    def model_path(self) -> Path:
        """The portable model."""
        ...

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """What the model takes."""
        ...

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """What it gives."""
        ...

    @property
    def task(self) -> str:
        """What its outputs are."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of its classes."""
        ...

    @property
    def num_classes(self) -> int | None:
        """How many classes it tells apart."""
        ...

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How an image becomes its input."""
        ...

    def target(self, name: str | None) -> str:
        """The name of one of its targets."""
        ...

    def session(self, target: str | None = None, *, execution: Execution = ON_CPU) -> Session:
        """A session that is ready to run."""
        ...
