"""Golden files: inputs and the reference's outputs in polygraphy's own format, kept in the bundle.

They let any machine check a bundle without PyTorch:

    polygraphy run model.onnx --onnxrt --load-inputs inputs.json --load-outputs golden_outputs.json
"""

from __future__ import annotations

import base64
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from quartermap_deploy.arrays import array_of
from quartermap_deploy.errors import BundleError
from quartermap_deploy.reading import read_json
from quartermap_deploy.validation.parity import quiet_polygraphy

if TYPE_CHECKING:
    from polygraphy.backend.base import BaseRunner

    from quartermap_deploy.sources.reference import Reference

LARGEST = 4 << 30
"""Bytes of a file. A mask of 19 classes of an image of 1024 x 2048 pixels has 0.4 GB."""
INPUTS_FILE, OUTPUTS_FILE = "inputs.json", "golden_outputs.json"
CASES = ("images", "single image", "example", "single example", "zeros")
"""Cases whose outputs have an ordinary scale, so that polygraphy's own tolerances, 1e-5, fit them."""


def golden_cases(cases: Mapping[str, Mapping[str, NDArray[Any]]]) -> dict[str, dict[str, NDArray[Any]]]:
    """The cases that golden files are made from: those named in `CASES`."""
    return {name: dict(feeds) for name, feeds in cases.items() if name in CASES}


def write_golden(
    directory: Path, reference: Reference, cases: Mapping[str, Mapping[str, NDArray[Any]]]
) -> None:
    """Write both files. The outputs are computed by PyTorch in float64, so that they are nobody's rounding.

    A module that is not ours is computed in float32, and its scans in float64.

    Args:
        directory: where to.
        reference: the model, pruned as the plan says.
        cases: for each case, by its name, an array for each input; those named in `CASES` are kept.
    """
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    from quartermap_deploy.validation.runners import TorchRunner

    feeds = list(golden_cases(cases).values())
    with quiet_polygraphy():
        with TorchRunner(reference, blocks=False, double=True) as runner:
            outputs = [runner.infer(feed) for feed in feeds]
        results = RunResults()
        results.add(outputs, runner_name="pytorch-float64")
        save_json(feeds, str(directory / INPUTS_FILE))
        results.save(str(directory / OUTPUTS_FILE))


def read_golden(
    directory: Path, names: Sequence[str]
) -> tuple[dict[str, dict[str, NDArray[Any]]], list[dict[str, NDArray[Any]]]]:
    """Read both files: inputs by case and name, and the outputs by name in the same order.

    Not by polygraphy, whose reader imports torch where it is installed.

    Args:
        directory: the bundle.
        names: of the cases, in order, as the manifest lists them.

    Raises:
        BundleError: if they cannot be read, or are of other cases.
    """
    try:
        feeds, results = (read_json(directory / name, LARGEST) for name in (INPUTS_FILE, OUTPUTS_FILE))
        ((_, iterations),) = results["lst"]
        inputs = {
            name: {key: _array(value) for key, value in feed.items()}
            for name, feed in zip(names, feeds, strict=True)
        }
        outputs = [
            {name: _array(value) for name, value in iteration["outputs"].items()} for iteration in iterations
        ]
        if len(outputs) != len(inputs):
            raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
        return inputs, outputs
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
    return array_of(base64.b64decode(value["array"]))
