"""Golden files: inputs and the reference's outputs in polygraphy's own format, kept in the bundle.

They let any machine check a bundle without PyTorch:

    polygraphy run model.onnx --onnxrt --load-inputs inputs.json --load-outputs golden_outputs.json
"""

from __future__ import annotations

import base64
import io
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.errors import BundleError
from quartermap_deploy.frontend.exporter import INPUT, OUTPUT
from quartermap_deploy.validation.parity import quiet_polygraphy

if TYPE_CHECKING:
    from polygraphy.backend.base import BaseRunner

    from quartermap_deploy.architectures.base import VisualStateSpaceModel

INPUTS_FILE, OUTPUTS_FILE = "inputs.json", "golden_outputs.json"
CASES = ("images", "single image", "zeros")
"""Cases whose logits have an ordinary scale, so that polygraphy's own tolerances, 1e-5, fit them."""


def write_golden(
    directory: Path, model: VisualStateSpaceModel, cases: Mapping[str, NDArray[np.float32]]
) -> None:
    """Write both files. The outputs are computed by PyTorch in float64, so that they are nobody's rounding.

    Args:
        directory: where to.
        model: the reference, pruned as the plan says.
        cases: input batches by name; those named in `CASES` are kept.
    """
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    from quartermap_deploy.validation.runners import TorchRunner

    feeds = [{INPUT: cases[name]} for name in CASES]
    with quiet_polygraphy():
        with TorchRunner(model, blocks=False, double=True) as runner:
            outputs = [runner.infer(feed) for feed in feeds]
        results = RunResults()
        results.add(outputs, runner_name="pytorch-float64")
        save_json(feeds, str(directory / INPUTS_FILE))
        results.save(str(directory / OUTPUTS_FILE))


def read_golden(directory: Path) -> tuple[dict[str, NDArray[np.float32]], list[dict[str, NDArray[Any]]]]:
    """Read both files: inputs by case, and the outputs in the same order.

    Not by polygraphy, whose reader imports torch where it is installed.

    Raises:
        BundleError: if they cannot be read.
    """
    try:
        feeds, results = (
            json.loads((directory / name).read_text(encoding="utf-8")) for name in (INPUTS_FILE, OUTPUTS_FILE)
        )
        ((_, iterations),) = results["lst"]
        outputs = [{OUTPUT: _array(iteration["outputs"][OUTPUT])} for iteration in iterations]
        return {name: _array(feed[INPUT]) for name, feed in zip(CASES, feeds, strict=True)}, outputs
    except Exception as error:
        raise BundleError(
            f"the golden files in {directory} cannot be read: {' '.join(str(error).split())}"
        ) from error


def golden_runner(outputs: list[dict[str, NDArray[Any]]]) -> BaseRunner:
    """A polygraphy runner that plays back recorded outputs, one batch after the other."""
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class Golden(BaseRunner):  # type: ignore[misc]
        def get_input_metadata_impl(self) -> Any:
            return TensorMetadata()

        def infer_impl(self, feed_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
            self.inference_time = 0.0
            return OrderedDict(next(self._recorded))

        def activate_impl(self) -> None:
            self._recorded = iter(outputs)

        def infer(self, feed_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            return self.infer_impl(feed_dict)

    return Golden(name="golden outputs")


def _array(value: dict[str, Any]) -> NDArray[Any]:
    """Read an array as polygraphy writes it: a .npy file in base64, which may have a wrapper for lazy arrays."""
    value = value.get("values", value)
    array: NDArray[Any] = np.load(io.BytesIO(base64.b64decode(value["array"])), allow_pickle=False)
    return array
