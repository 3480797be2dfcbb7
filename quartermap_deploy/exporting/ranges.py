"""The range scan: how large does every value of a model become on calibration images?

float16 ends at 65504. A value that comes within a factor of 8 of it on a few images is kept in float32, because other
images may bring it over. bfloat16 reaches as far as float32, so that its limit names nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from quartermap_deploy.errors import InputError
from quartermap_deploy.lowering.element_types import FLOAT, element_type, types_of_values
from quartermap_deploy.progress import SILENT, Progress

FACTOR = 8.0
"""A value is kept in float32 from this factor below the limit on."""

GROUP_BYTES = 256 * 2**20
"""Values that are looked at in one run take about this much memory."""


@dataclass(frozen=True)
class RangeReport:
    """The largest absolute value of every float32 value of a model's main graph.

    Attributes:
        precision: the 16-bit type that the limit belongs to.
        limit: the type's largest value.
        factor: values from limit / factor on are kept in float32.
        images: how many images were run.
        largest: by name, in graph order; infinite where a value was infinite or NaN.
    """

    precision: str
    limit: float
    factor: float
    images: int
    largest: dict[str, float]

    @property
    def keep_float32(self) -> tuple[str, ...]:
        """Names of the values that come too near the limit, in graph order."""
        return tuple(name for name, value in self.largest.items() if not value < self.limit / self.factor)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: the values that are kept, and the ten largest of the others."""
        kept = set(self.keep_float32)
        others = sorted(
            (name for name in self.largest if name not in kept), key=lambda name: -self.largest[name]
        )
        return {
            "precision": self.precision,
            "limit": self.limit,
            "factor": self.factor,
            "images": self.images,
            "values": len(self.largest),
            "kept_float32": {name: _plain(self.largest[name]) for name in self.keep_float32},
            "largest_others": {name: _plain(self.largest[name]) for name in others[:10]},
        }


def scan_ranges(
    model: onnx.ModelProto,
    calibration: Mapping[str, NDArray[Any]],
    precision: str = "float16",
    *,
    factor: float = FACTOR,
    batch: int = 4,
    progress: Progress = SILENT,
) -> RangeReport:
    """Run a float32 model over images and note the largest absolute value of every value of its main graph.

    What happens inside the scans is not looked at; it is float32 in every precision, but for the CUDA kernels on tensor
    cores, where the time step times x and the states are rounded to the 16-bit type, and computed again in float32
    where they leave it (docs/adr/0019).

    Args:
        model: float32, with the bodies of its scans and the types of its values.
        calibration: for each input, by name, N entries on its first axis.
        precision: the 16-bit type whose limit counts.
        factor: how far below the limit values are named.
        batch: images in one run, where the model leaves the batch size open.
        progress: told about the steps.

    Raises:
        InputError: if there is nothing to calibrate on.
        UnknownNameError: if there is no such precision.
    """
    from quartermap_deploy.targets.onnxruntime.opening import inference_session

    kind = element_type(precision)
    inputs = [value.name for value in model.graph.input if value.name in calibration]
    count = min((len(calibration[name]) for name in inputs), default=0)
    if count == 0:
        raise InputError("the range scan needs at least one image")
    first = model.graph.input[0].type.tensor_type.shape.dim[0]
    size = first.dim_value or min(batch, count)
    # A last batch that is too small is filled up with what was seen.
    batches = [
        {
            name: np.resize(array[start : start + size], (size, *array.shape[1:]))
            if array.ndim and len(array) == count
            else array
            for name, array in calibration.items()
        }
        for start in range(0, count, size)
    ]
    names = _float_values(model)
    largest = dict.fromkeys([*inputs, *names], 0.0)
    for name in inputs:
        largest[name] = _largest(np.asarray(calibration[name], np.float32))
    groups = list(_groups(model, names, batches[0][inputs[0]].shape))
    with progress.step("looking at the range of every value", len(groups) * len(batches)) as advance:
        for group in groups:
            session = inference_session(_with_outputs(model, group).SerializeToString())
            for part in batches:
                for name, value in zip(group, session.run(list(group), part), strict=True):
                    largest[name] = max(largest[name], _largest(value))
                advance(1)
    return RangeReport(precision, kind.largest, factor, count, largest)


def _largest(value: NDArray[np.float32]) -> float:
    if not value.size:
        return 0.0
    found = float(np.abs(value).max())
    return found if np.isfinite(found) else float("inf")


def _plain(value: float) -> float | None:
    """JSON has no infinity."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _float_values(model: onnx.ModelProto) -> list[str]:
    """The float32 values that operators of the main graph make, in graph order."""
    types = types_of_values(model.graph)
    return [name for node in model.graph.node for name in node.output if types.get(name) == FLOAT]


def _groups(model: onnx.ModelProto, names: Sequence[str], shape: tuple[int, ...]) -> Iterator[list[str]]:
    """Cut values into groups that fit the memory at once."""
    sizes = _bytes(model, shape)
    group: list[str] = []
    room = GROUP_BYTES
    for name in names:
        if group and sizes.get(name, GROUP_BYTES // 16) > room:
            yield group
            group, room = [], GROUP_BYTES
        group.append(name)
        room -= sizes.get(name, GROUP_BYTES // 16)
    if group:
        yield group


def _bytes(model: onnx.ModelProto, shape: tuple[int, ...]) -> dict[str, int]:
    """The bytes of each value, as far as its shape is known when the input has the given one."""
    known = dict(
        zip((d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim), shape, strict=True)
    )
    sizes = {}
    for info in (*model.graph.value_info, *model.graph.output):
        # The batch has lost its name behind a Resize.
        sides = [
            d.dim_value or known.get(d.dim_param, 0 if axis else shape[0])
            for axis, d in enumerate(info.type.tensor_type.shape.dim)
        ]
        if sides and all(sides):
            sizes[info.name] = 4 * int(np.prod(sides))
    return sizes


def _with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The model with these values as its outputs."""
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    del marked.graph.output[:]
    marked.graph.output.extend(onnx.helper.make_tensor_value_info(name, FLOAT, None) for name in names)
    return marked
