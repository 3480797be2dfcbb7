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

Range = tuple[int, int, int]
CACHE_FOLDER = ".quartermap-cache"
"""Where caches lie beside a bundle."""
LARGEST_TENSOR = 2**31 - 1
"""Elements, by TensorRT's documentation of `Dims`."""
HARDWARE = ("none", "ampere_plus", "same_compute_capability")


@dataclass(frozen=True)
class Profile:
    """One optimisation profile: the sizes that an engine takes, and the one that it is tuned for.

    Attributes:
        batch: (smallest, tuned for, largest) number of images.
        height: likewise, in pixels, where the graph leaves it open; else None.
        width: likewise.
    """

    batch: Range = (1, 8, 32)
    height: Range | None = None
    width: Range | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "height", "width"):
            values = getattr(self, name)
            if values is None and name != "batch":
                continue
            whole = isinstance(values, (tuple, list)) and all(type(value) is int for value in values)
            if not whole or len(values) != 3 or not 1 <= values[0] <= values[1] <= values[2]:
                raise InputError(
                    f"the profile's {name} = {values!r}; expected three whole numbers, smallest ≤ tuned for ≤ largest"
                )
            object.__setattr__(self, name, tuple(values))

    def shapes(self, shape: Sequence[int | str]) -> tuple[tuple[int, ...], ...]:
        """The smallest, tuned-for and largest shape of an input (batch, channels, height, width).

        Args:
            shape: as the graph has it; a string is an open size.

        Raises:
            InputError: if the profile contradicts a fixed size, has no range for an open one, or takes inputs too large
                for TensorRT.
        """
        names = ("batch", "channels", "height", "width")
        ranges: list[Range] = []
        for name, size in zip(names, shape, strict=True):
            wanted: Range | None = getattr(self, name, None)
            if isinstance(size, int):
                if name != "batch" and wanted not in (None, (size,) * 3):
                    raise InputError(
                        f"the profile has {name} {wanted}, the model has {size}; leave it out of the profile"
                    )
                if name == "batch" and wanted is not None and not wanted[0] <= size <= wanted[2]:
                    raise InputError(
                        f"the profile has batch {wanted}, the model has {size}; compile with dynamic_batch = true"
                    )
                ranges.append((size,) * 3)
            elif wanted is None:
                raise InputError(
                    f"the model leaves its {name} open, so the profile needs {name} = (smallest, tuned for, largest)"
                )
            else:
                ranges.append(wanted)
        if math.prod(high for _, _, high in ranges) > LARGEST_TENSOR:
            raise InputError(
                f"the profile's largest input {tuple(high for _, _, high in ranges)} has more than {LARGEST_TENSOR:,} "
                "elements, the most that a tensor of TensorRT has; narrow the profile"
            )
        return tuple(zip(*ranges, strict=True))

    def takes(self, shape: Sequence[int], model_shape: Sequence[int | str]) -> bool:
        """Whether an engine with this profile takes an input of a shape."""
        low, _, high = self.shapes(model_shape)
        return len(shape) == len(low) and all(
            a <= size <= b for a, size, b in zip(low, shape, high, strict=True)
        )


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built.

    Attributes:
        profiles: one or several optimisation profiles; an input is run by the first that takes it.
        compute_capabilities: the GPUs that a TensorRT-RTX engine is for, such as "8.9"; TensorRT builds for the GPU at
            hand.
        optimization_level: 0 to 5, how long the builder searches; None for the builder's own default.
        hardware_compatibility: "none" for the model of GPU at hand, or "ampere_plus" or, from TensorRT 10.9 on,
            "same_compute_capability" for others too; TensorRT only.
        version_compatible: let later versions of TensorRT with the same major number run the engine, which then carries
            code that runs in the process that opens it; TensorRT only.
        refit: keep the engine's weights exchangeable, at the cost of some speed.
        tf32: let float32 products round their factors to 10 bits of mantissa. Off, because float32 engines are held to
            float32 tolerances.
        workspace: most bytes of scratch memory on the GPU; None for all of it.
        plugin: the plugin library; None looks where `quartermap plugin build` puts it. TensorRT only.
        cache: folder of timing and runtime caches; None for `.quartermap-cache` beside the bundle.
    """

    profiles: tuple[Profile, ...] = (Profile(),)
    compute_capabilities: tuple[str, ...] = ("8.0", "8.6", "8.9", "12.0")
    optimization_level: int | None = None
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    refit: bool = False
    tf32: bool = False
    workspace: int | None = None
    plugin: Path | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("version_compatible", "refit", "tf32"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} = {getattr(self, name)!r}; expected true or false")
        if self.workspace is not None and not (type(self.workspace) is int and self.workspace > 0):
            raise InputError(f"workspace = {self.workspace!r}; expected a number of bytes")
        capabilities = self.compute_capabilities
        proper = isinstance(capabilities, tuple) and all(
            isinstance(item, str) and re.fullmatch(r"\d+\.\d", item) for item in capabilities
        )
        if not proper or len(set(capabilities)) != len(capabilities):
            raise InputError(
                f'compute_capabilities = {list(capabilities)!r}; expected different strings such as "8.9"'
            )
        if not self.profiles:
            raise InputError("there are no profiles; leave them out for the default, batches of 1 to 32")
        if not self.compute_capabilities:
            raise InputError('there are no compute capabilities; expected some such as "8.9"')
        if self.hardware_compatibility not in HARDWARE:
            raise InputError(
                f"hardware_compatibility = {self.hardware_compatibility!r}; expected one of {', '.join(HARDWARE)}"
            )
        level = self.optimization_level
        if level is not None and not (type(level) is int and 0 <= level <= 5):
            raise InputError(f"optimization_level = {level!r}; expected 0 to 5")

    def with_cache_beside(self, bundle: Path) -> EngineOptions:
        """Return the options with their cache beside a bundle, unless they name a folder for it."""
        return dataclasses.replace(self, cache=self.cache or bundle.absolute().parent / CACHE_FOLDER)

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
        """Return options from plain values.

        Raises:
            InputError: if a key is unknown or a value is wrong.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else f" Expected one of {', '.join(known)}."
                raise InputError(f"unknown engine option {key!r}.{hint}")
        fields = dict(values)
        try:
            if "profiles" in fields:
                fields["profiles"] = tuple(map(_profile, fields["profiles"]))
            if "compute_capabilities" in fields:
                found = fields["compute_capabilities"]
                fields["compute_capabilities"] = tuple([found] if isinstance(found, str) else found)
            for name in ("plugin", "cache"):
                if fields.get(name) is not None:
                    fields[name] = Path(fields[name])
        except TypeError as error:
            raise InputError(f"engine options {dict(values)!r} are wrong: {error}") from error
        return cls(**fields)


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
