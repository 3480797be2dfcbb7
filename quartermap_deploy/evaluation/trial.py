"""Images that pruned forms of a model are tried on, prepared once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.errors import InputError
from quartermap_deploy.evaluation.batches import prepare_all
from quartermap_deploy.evaluation.datasets import Dataset
from quartermap_deploy.evaluation.fidelity import Fidelity, Form, fidelity
from quartermap_deploy.evaluation.search import Candidate
from quartermap_deploy.progress import SILENT, Progress

if TYPE_CHECKING:
    from quartermap_deploy.architectures.base import VisualStateSpaceModel


class Trial:
    """A model and images to try pruned forms of it on.

    Attributes:
        dataset: the images.
        images: (n, 3, H, W), those of them that can be read, prepared.
        broken: (name, reason) of each of the others.
        unpruned: how the unpruned model does on them.
    """

    def __init__(
        self,
        model: VisualStateSpaceModel,
        dataset: Dataset,
        preprocessing: Preprocessing,
        *,
        labels: bool,
        known: Fidelity | None = None,
        progress: Progress = SILENT,
    ) -> None:
        """Prepare the images and run the unpruned model.

        Args:
            model: the model, unpruned.
            dataset: the images.
            preprocessing: how they are prepared.
            labels: measure accuracies too.
            known: how the unpruned model does on these images, if that was measured before; it is not run then.
            progress: shows the images.

        Raises:
            InputError: if none of the images can be read, or the unpruned model's logits have NaN or infinite values.
        """
        batch = prepare_all(dataset, preprocessing, progress=progress)
        if not len(batch.labels):
            name, reason = batch.broken[0]
            raise InputError(f"none of the images of {dataset.name} can be read; the first, {name}: {reason}")
        self.dataset, self.images, self.broken = dataset, batch.images, batch.broken
        self._model, self._labels = model, batch.labels if labels else None
        self._blocks = sum(model.depths)
        if known is None:
            title = f"running the unpruned model on {dataset.name}"
            forms = [(None,) * self._blocks]
            (known,) = fidelity(model, self.images, forms, self._labels, progress=progress, title=title)
        self.unpruned = known
        if self.unpruned.agreement < 1:
            raise InputError(
                f"the logits of the unpruned model on {dataset.name} have NaN or infinite values; it must be right "
                "before it is pruned"
            )

    def run(self, candidates: Sequence[Candidate]) -> dict[Candidate, Fidelity]:
        """Run candidates."""
        found = self._fidelity([candidate.form(self._blocks) for candidate in candidates])
        return dict(zip(candidates, found, strict=True))

    def _fidelity(self, forms: Sequence[Form]) -> list[Fidelity]:
        return fidelity(self._model, self.images, forms, self._labels)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "name": self.dataset.name,
            "fingerprint": self.dataset.fingerprint,
            "images": len(self.images),
            "broken": [{"image": name, "reason": reason} for name, reason in self.broken],
            "unpruned_accuracy": self.unpruned.accuracy,
        }
