"""How an engine is built: options shared by TensorRT and TensorRT for RTX."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartermap_deploy.errors import InputError
from quartermap_deploy.plain_text import printable

Range = tuple[int, int, int]
LARGEST_TENSOR = 2**31 - 1
"""Elements, by TensorRT's documentation of `Dims`."""
SCANS = ("auto", "plugin", "tree")
HARDWARE = ("none", "ampere_plus", "same_compute_capability")
RANGES = ("batch", "height", "width")
"""The open axes that a profile has ranges for."""
IMAGE_AXES = 4
"""Axes of an input that holds images."""
_NEVER_IN_A_FILE = {
    "plugin": "a library is code that would run, so it is loaded only from where you put it; take the line out, and "
    "name the library with --plugin (in Python: plugin=) or in the environment variable QUARTERMAP_PLUGIN",
    "cache": "TensorRT believes what lies there, so caches are in a folder of yours; take the line out",
}
"""Options that no file decides, each with what to do instead."""

ModelShapes = Mapping[str, Sequence[int | str]]
"""For each input of a model, its shape; an open axis is a string."""


@dataclass(frozen=True)
class Profile:
    """One optimisation profile: the sizes that an engine takes, and the one that it is tuned for.

    A range holds for the open axes of its name, whichever input has them; the other axes have the model's sizes.

    Attributes:
        batch: (smallest, tuned for, largest) number of images, or of whatever the inputs hold.
        height: likewise, in pixels, where the model leaves heights open; else None.
        width: likewise.
    """

    batch: Range = (1, 8, 32)
    height: Range | None = None
    width: Range | None = None

    def __post_init__(self) -> None:
        for name in RANGES:
            values = getattr(self, name)
            if values is None and name != "batch":
                continue
            whole = isinstance(values, (tuple, list)) and all(type(value) is int for value in values)
            if not whole or len(values) != 3 or not 1 <= values[0] <= values[1] <= values[2]:
                raise InputError(
                    f"the profile's {name} = {values!r}; expected three whole numbers, smallest ≤ tuned for ≤ largest"
                )
            object.__setattr__(self, name, tuple(values))

    def shapes(self, inputs: ModelShapes) -> dict[str, tuple[tuple[int, ...], ...]]:
        """The smallest, tuned-for and largest shape of each input.

        Args:
            inputs: the shape of each input, as the graph has it; a string is an open axis.

        Raises:
            InputError: if the profile contradicts a fixed size, has no range for an open axis, or takes inputs too
                large for TensorRT.
        """
        self._check_fixed(inputs)
        found: dict[str, tuple[tuple[int, ...], ...]] = {}
        for name, shape in inputs.items():
            ranges = [
                (size,) * 3 if isinstance(size, int) else self._range(size, name, shape) for size in shape
            ]
            smallest, tuned, largest = (tuple(sizes[place] for sizes in ranges) for place in range(3))
            if math.prod(largest) > LARGEST_TENSOR:
                raise InputError(
                    f"the profile's largest input {name} {largest} has more than {LARGEST_TENSOR:,} elements, the most "
                    "that a tensor of TensorRT has; narrow the profile"
                )
            found[name] = (smallest, tuned, largest)
        return found

    def takes(self, shapes: Mapping[str, Sequence[int]], inputs: ModelShapes) -> bool:
        """Whether an engine with this profile takes inputs of these shapes, all of them together."""
        return all(
            name in shapes
            and len(shapes[name]) == len(low)
            and all(a <= size <= b for a, size, b in zip(low, shapes[name], high, strict=True))
            for name, (low, _, high) in self.shapes(inputs).items()
        )

    def _range(self, axis: str, name: str, shape: Sequence[int | str]) -> Range:
        """The range of an open axis."""
        if axis not in RANGES:
            raise InputError(
                f"the input {name} {_shown(shape)} leaves the axis {axis} open, and a profile has ranges for "
                f"{', '.join(RANGES)} alone; export the model with that size fixed"
            )
        wanted: Range | None = getattr(self, axis)
        if wanted is None:
            raise InputError(
                f"the model leaves its {axis} open (input {name} {_shown(shape)}), so the profile needs {axis} = "
                "(smallest, tuned for, largest)"
            )
        return wanted

    def _check_fixed(self, inputs: ModelShapes) -> None:
        """Check that ranges which no open axis has do not contradict the sizes that the model has instead."""
        opened = {axis for shape in inputs.values() for axis in shape if isinstance(axis, str)}
        for axis, place in (("height", 2), ("width", 3)):
            wanted = getattr(self, axis)
            sizes = sorted({shape[place] for shape in inputs.values() if len(shape) == IMAGE_AXES}, key=str)
            if wanted is not None and axis not in opened and [(size,) * 3 for size in sizes] != [wanted]:
                found = " and ".join(map(str, sizes)) or "no such axis"
                raise InputError(
                    f"the profile has {axis} {wanted}, the model has {found}; leave it out of the profile"
                )
        first = next(iter(inputs.values()), ())
        size = first[0] if first else 1
        if "batch" not in opened and isinstance(size, int) and not self.batch[0] <= size <= self.batch[2]:
            raise InputError(
                f"the profile has batch {self.batch}, the model has {size}; compile with dynamic_batch = true, or give "
                f"the profile batch = ({size}, {size}, {size})"
            )


def taken_shapes(options: EngineOptions, inputs: ModelShapes) -> str:
    """What the profiles take, for messages.

    Args:
        options: with the profiles.
        inputs: the shape of each input of the model.
    """
    taken = []
    for profile in options.profiles:
        ranges = {name: f"{low} to {high}" for name, (low, _, high) in profile.shapes(inputs).items()}
        taken.append(named_shapes(ranges))
    return " or ".join(taken)


def named_shapes(shapes: Mapping[str, object]) -> str:
    """Shapes for messages, with the names of the inputs where there are several."""
    if len(shapes) == 1:
        return str(*shapes.values())
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _shown(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))})"


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built.

    Attributes:
        profiles: one or several optimisation profiles; an input is run by the first that takes it.
        compute_capabilities: the GPUs that a TensorRT-RTX engine is for, such as "8.9"; TensorRT builds for the GPU at
            hand. One text or a list is taken as well.
        optimization_level: 0 to 5, how long the builder searches; None for the builder's own default.
        hardware_compatibility: "none" for the model of GPU at hand, or "ampere_plus" or, from TensorRT 10.9 on,
            "same_compute_capability" for others too; TensorRT only.
        version_compatible: let later versions of TensorRT with the same major number run the engine, which then carries
            code that runs in the process that opens it; TensorRT only.
        refit: keep the engine's weights exchangeable, at the cost of some speed.
        tf32: let float32 products round their factors to 10 bits of mantissa. Off, because float32 engines are held to
            float32 tolerances.
        workspace: most bytes of scratch memory on the GPU; None for all of it.
        scan: what scans become: "plugin", or "tree" for standard operators, which TensorRT for RTX alone has; "auto" is
            the plugin for TensorRT and, until a GPU has run such an engine, the tree for TensorRT for RTX.
        plugin: the plugin library; None looks where `plugin.find_library` does. It is said in Python or on the command
            line, never in a file.
        cache: folder of timing caches, which must be this user's alone; None for this user's cache. Likewise.
    """

    profiles: tuple[Profile, ...] = (Profile(),)
    compute_capabilities: tuple[str, ...] = ("8.0", "8.6", "8.9", "12.0")
    optimization_level: int | None = None
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    refit: bool = False
    tf32: bool = False
    workspace: int | None = None
    scan: str = "auto"
    plugin: Path | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("version_compatible", "refit", "tf32"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} = {getattr(self, name)!r}; expected true or false")
        if self.workspace is not None and not (type(self.workspace) is int and self.workspace > 0):
            raise InputError(f"workspace = {self.workspace!r}; expected a number of bytes")
        object.__setattr__(self, "compute_capabilities", _capabilities(self.compute_capabilities))
        if not self.profiles:
            raise InputError("there are no profiles; leave them out for the default, batches of 1 to 32")
        if not self.compute_capabilities:
            raise InputError('there are no compute capabilities; expected some such as "8.9"')
        if self.hardware_compatibility not in HARDWARE:
            raise InputError(
                f"hardware_compatibility = {self.hardware_compatibility!r}; expected one of {', '.join(HARDWARE)}"
            )
        if self.scan not in SCANS:
            raise InputError(f"scan = {self.scan!r}; expected one of {', '.join(SCANS)}")
        level = self.optimization_level
        if level is not None and not (type(level) is int and 0 <= level <= 5):
            raise InputError(f"optimization_level = {level!r}; expected 0 to 5")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: everything that changes the engine, so neither the cache nor a path."""
        values = dataclasses.asdict(self)
        del values["cache"], values["plugin"]
        values["profiles"] = [
            {key: list(value) for key, value in profile.items() if value is not None}
            for profile in values["profiles"]
        ]
        values["compute_capabilities"] = list(self.compute_capabilities)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineOptions:
        """Return options from plain values, as a recipe or a manifest has them.

        Raises:
            InputError: if a key is unknown or a value is wrong, or if they name the plugin or a cache: whatever code
                runs and wherever is written to, a file does not say.
        """
        for key, instead in _NEVER_IN_A_FILE.items():
            if values.get(key) is not None:
                raise InputError(f"{key} = {printable(values[key])!r} does not belong in a file: {instead}")
        known = [field.name for field in dataclasses.fields(cls) if field.name not in _NEVER_IN_A_FILE]
        for key in values:
            if key not in (*known, *_NEVER_IN_A_FILE):
                near = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else f" Expected one of {', '.join(known)}."
                raise InputError(f"unknown engine option {key!r}.{hint}")
        fields = dict(values)
        try:
            if "profiles" in fields:
                fields["profiles"] = tuple(map(_profile, fields["profiles"]))
        except TypeError as error:
            raise InputError(f"engine options {dict(values)!r} are wrong: {error}") from error
        return cls(**fields)


def _capabilities(found: object) -> tuple[str, ...]:
    """Compute capabilities as a tuple.

    Raises:
        InputError: if they are none.
    """
    texts = (found,) if isinstance(found, str) else found
    if not isinstance(texts, (tuple, list)):
        raise InputError(
            f'compute_capabilities = {found!r}, a {type(found).__name__}; expected texts such as ("8.6", "8.9")'
        )
    wrong = [item for item in texts if not (isinstance(item, str) and re.fullmatch(r"\d+\.\d", item))]
    if wrong:
        raise InputError(
            f'compute_capabilities has {wrong[0]!r}, a {type(wrong[0]).__name__}; expected texts such as "8.9"'
        )
    if len(set(texts)) != len(texts):
        raise InputError(f"compute_capabilities = {list(texts)!r} names one twice; leave it out")
    return tuple(texts)


def _profile(values: object) -> Profile:
    """A profile from plain values.

    Raises:
        InputError: if a key is unknown or a value is wrong.
    """
    keys = [field.name for field in dataclasses.fields(Profile)]
    if not isinstance(values, Mapping) or not set(values) <= set(keys):
        raise InputError(
            f"the profile {values!r} is wrong; expected some of {', '.join(keys)}, each with three numbers"
        )
    return Profile(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    )
