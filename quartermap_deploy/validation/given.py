"""Golden tensors that the user saved where the module runs in its own environment.

PyTorch on this machine computes a foreign scan by our operator, so comparing a graph with it says nothing about our
reading of the scan. Tensors that the module's own kernels made say it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.arrays import ArrayError, opened_arrays
from quartermap_deploy.errors import InputError, ParityError
from quartermap_deploy.validation.comparison import compare_output
from quartermap_deploy.validation.tolerances import GIVEN

if TYPE_CHECKING:
    from quartermap_deploy.sources.modules import ModuleSource


@dataclass(frozen=True, eq=False)
class GivenReference:
    """What the user saved.

    Attributes:
        inputs: arrays by the name of the input.
        outputs: arrays by the name of the output.
    """

    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, NDArray[Any]]

    def check(self, model: bytes) -> dict[str, Any]:
        """Run an unpruned portable model on the inputs, and compare its outputs; returns plain values for the report.

        Raises:
            ParityError: if one departs by more than the tolerance.
        """
        from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession

        session = OnnxRuntimeSession(model)
        found = session.infer(
            {item.name: self.inputs[item.name].astype(item.type, copy=False) for item in session.inputs}
        )
        compared = [
            compare_output(name, expected, found.get(name), GIVEN.relative)
            for name, expected in self.outputs.items()
        ]
        for output in compared:
            if not output.passed:
                raise ParityError(
                    f"the unpruned graph departs from the given reference at {output.name!r}: {output.detail}. Nothing "
                    "was written; the graph agrees with PyTorch on this machine, so either the reference was made with "
                    "other weights, inputs or in another mode (.eval(), no autocast), or a scan of the module means "
                    "something else than this package reads in it: name it with scans={…}"
                )
        return {
            "passed": True,
            "tolerance": GIVEN.to_dict(),
            "outputs": [output.to_dict() for output in compared],
        }


def as_reference(source: ModuleSource, reference: Any) -> GivenReference:
    """What the user saved, as `compile_module` takes it: (inputs, outputs), or an .npz file.

    Raises:
        InputError: if it is neither, or does not fit the module.
    """
    if isinstance(reference, (str, os.PathLike)):
        return read_reference(source, Path(reference))
    if not isinstance(reference, (tuple, list)) or len(reference) != 2:
        found = (
            f"{len(reference)} values"
            if isinstance(reference, (tuple, list))
            else f"a {type(reference).__name__}"
        )
        raise InputError(f"the reference is {found}; expected (inputs, outputs), or the path of an .npz file")
    return given_reference(source, *reference)


def given_reference(source: ModuleSource, inputs: Any, outputs: Any) -> GivenReference:
    """Name what the user saved as the module's inputs and outputs are named.

    Args:
        source: the module.
        inputs: a tensor or array, a sequence of them in the order of the inputs, or a dictionary.
        outputs: what the module returned, as it returned it, or a dictionary by the names of the outputs.

    Raises:
        InputError: if something is missing, unknown, or holds NaN or infinite values.
    """
    names = list(source.signature.inputs)
    fed = _by_name(inputs, names, "inputs")
    wanted = list(source.discovery.outputs)
    if isinstance(outputs, (dict, list, tuple)) and not outputs:
        raise InputError(f"the reference has no outputs; expected one at least of {', '.join(wanted)}")
    returned = {name: _array(value) for name, value in source.signature.named(_tensors(outputs)).items()}
    if unknown := [name for name in returned if name not in wanted]:
        raise InputError(
            f"the reference has the output {unknown[0]!r}; the module has {', '.join(wanted)}, in this order"
        )
    reference = GivenReference(fed, {name: _float32(array) for name, array in returned.items()})
    for name, array in {**reference.inputs, **reference.outputs}.items():
        if not np.isfinite(array).all():
            raise InputError(
                f"the reference has NaN or infinite values in {name!r}, with which nothing can be compared; save it "
                "from a run that gives numbers"
            )
    return reference


def read_reference(source: ModuleSource, path: Path) -> GivenReference:
    """Read an .npz file that holds the module's inputs and outputs by their names.

    Raises:
        InputError: if it cannot be read, holds pickled objects, or something is missing or unknown.
    """
    try:
        with opened_arrays(path) as archive:
            named = archive.names
            arrays = {name: archive.read(name) for name in named if name in _wanted(source)}
    except (OSError, ArrayError) as error:
        raise InputError(
            f"the reference {path} cannot be read: {' '.join(str(error).split())[:200]}; expected an .npz file with an "
            f"array for each of {', '.join(_wanted(source))}"
        ) from error
    unknown = [name for name in named if name not in _wanted(source)]
    absent = [name for name in source.signature.inputs if name not in arrays]
    if unknown or absent or len(arrays) == len(source.signature.inputs):
        outputs = ", ".join(source.discovery.outputs)
        raise InputError(
            f"the reference {path} holds {', '.join(sorted(named))}; expected the inputs "
            f"{', '.join(source.signature.inputs)}, and one at least of the outputs {outputs}"
        )
    inputs = {name: arrays.pop(name) for name in source.signature.inputs}
    return given_reference(source, inputs, arrays)


def _wanted(source: ModuleSource) -> list[str]:
    return [*source.signature.inputs, *source.discovery.outputs]


def _by_name(values: Any, names: list[str], what: str) -> dict[str, NDArray[Any]]:
    if isinstance(values, dict):
        given = values
    else:
        sequence = list(values) if isinstance(values, (list, tuple)) else [values]
        if len(sequence) != len(names):
            raise InputError(
                f"the reference has {len(sequence)} {what}, the module takes {len(names)}: {', '.join(names)}"
            )
        given = dict(zip(names, sequence, strict=True))
    if set(given) != set(names):
        raise InputError(
            f"the reference has the {what} {', '.join(sorted(map(str, given)))}; expected {', '.join(names)}"
        )
    return {name: _float32(_array(given[name])) for name in names}


def _array(value: Any) -> NDArray[Any]:
    """A tensor or an array of numbers as an array; NumPy has no bfloat16, so that becomes float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise InputError(f"the reference has an array of {array.dtype}; expected numbers")
    return array


def _tensors(value: Any) -> Any:
    """The same nest of lists and dictionaries with arrays as tensors."""
    import torch

    if isinstance(value, dict):
        return {key: _tensors(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tensors(item) for item in value]
    return torch.as_tensor(_array(value)) if isinstance(value, np.ndarray) else value


def _float32(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float32, copy=False) if np.issubdtype(array.dtype, np.floating) else array
