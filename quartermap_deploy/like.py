"""Files that another tool changed, run as the bundles that they come from.

    model.onnx → a simplifier, a converter, a tool that quantises → changed.onnx → eval, bench, serve --like the bundle

Such a file says neither how images are prepared for it nor what its classes are, and nothing is proved of it.
`load_like` makes a `Bundle` in memory, in which the file stands in the place of the model and all else is the bundle's.
So whatever takes a bundle takes the file, and nothing is written.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.bundle import Bundle, describe_file, load_bundle, operators
from quartermap_deploy.errors import BundleError, InputError
from quartermap_deploy.onnx_bounds import check_model
from quartermap_deploy.plain_text import printable
from quartermap_deploy.targets import DEFAULT, load_target
from quartermap_deploy.tensor_info import TensorInfo

if TYPE_CHECKING:
    import onnx

FLOATS = ("float16", "float32", "float64")
"""Types of inputs and outputs that may take each other's place: values are converted on their way in and out."""
_KEEP = "have the tool write ONNX's own operators, and the weights into the file itself"


def load_like(file: str | os.PathLike[str], bundle: Bundle | str | os.PathLike[str]) -> Bundle:
    """Open an ONNX file that another tool made of a bundle's model, with all else as in the bundle.

    Args:
        file: the ONNX file. Its inputs and outputs have the names of the bundle's, in their order, the same number of
            axes, and the same sizes where both have a fixed one. A type of `FLOATS` may be another of them.
        bundle: the bundle, or its folder.

    Returns:
        A bundle in memory: preprocessing, classes, task and golden inputs are the bundle's; inputs, outputs and types
        are the file's. It runs by ONNX Runtime alone. Its report and plan are still those of the bundle's own model.

    Raises:
        BundleError: if the bundle cannot be opened, or the file is no ONNX model, or holds what no file of a bundle may
            hold (see `onnx_bounds`).
        InputError: if its inputs or outputs are others than the bundle's.
    """
    own = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    path = Path(file)
    if path.is_dir():
        raise BundleError(
            f"{path} is a folder; expected an ONNX file that another tool made of the model.onnx of a bundle (a bundle "
            "itself is named without --like)"
        )
    check_model(path, _KEEP)
    model = _loaded(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    # Old tools name the weights among the inputs.
    inputs = [TensorInfo.of_value(value) for value in model.graph.input if value.name not in weights]
    outputs = [TensorInfo.of_value(value) for value in model.graph.output]
    _require_same(path, own, "takes", inputs, own.inputs)
    _require_same(path, own, "gives", outputs, own.outputs)
    manifest: dict[str, Any] = {
        **own.manifest,
        "inputs": [item.to_dict() for item in inputs],
        "outputs": [item.to_dict() for item in outputs],
        "graph": {**own.manifest["graph"], **operators(model)},
        "files": {**own.manifest["files"], path.name: describe_file(path)},
        "targets": {DEFAULT: load_target(DEFAULT).build(path, path.parent)},
    }
    return dataclasses.replace(own, manifest=manifest, changed=path)


def _loaded(path: Path) -> onnx.ModelProto:
    import onnx

    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf has several kinds
        reason = " ".join(str(error).split())[:400]
        raise BundleError(
            f"{path} is no ONNX model ({reason}); expected one that another tool wrote"
        ) from error


def _require_same(
    path: Path, bundle: Bundle, verb: str, found: Sequence[TensorInfo], expected: Sequence[TensorInfo]
) -> None:
    """Check that the inputs, or the outputs, of a file can be those of a bundle.

    Raises:
        InputError: if they cannot.
    """
    if len(found) != len(expected) or not all(map(_fits, found, expected)):
        raise InputError(
            f"{path} {verb} {_listed(found)}; expected {_listed(expected)}, as {bundle}. Name the bundle that the file "
            "was made from, or have the tool keep the names, the order, the types and the sizes of inputs and outputs"
        )


def _fits(found: TensorInfo, expected: TensorInfo) -> bool:
    same_type = found.type == expected.type or (found.type in FLOATS and expected.type in FLOATS)
    return (
        found.name == expected.name
        and same_type
        and len(found.shape) == len(expected.shape)
        and all(
            isinstance(size, str) or isinstance(own, str) or size == own
            for size, own in zip(found.shape, expected.shape, strict=True)
        )
    )


def _listed(items: Sequence[TensorInfo]) -> str:
    return printable(
        ", ".join(f"{item.name} ({', '.join(map(str, item.shape))}) of {item.type}" for item in items)
        or "nothing",
        1000,
    )
