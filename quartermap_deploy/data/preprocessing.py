"""How an image becomes a model's input, as a value: in cards, recipes, manifests and command lines.

Nothing is imported here but what checks the values; `data/images.py` does what they say.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quartermap_deploy.errors import InputError, UnknownNameError

Fit = Literal["cover", "stretch"]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Color = Literal["rgb", "bgr", "grey", "rgba"]

FITS: tuple[Fit, ...] = ("cover", "stretch")
INTERPOLATIONS: tuple[Interpolation, ...] = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
CHANNELS: dict[Color, int] = {"rgb": 3, "bgr": 3, "grey": 1, "rgba": 4}
"""How many channels an image has, by their names."""

LARGEST_SIDE = 8192
"""Pixels; beyond it a feature map of the first stage alone takes tens of gigabytes, and a size is a typing error."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input: (pixel · scale - mean) / std, after resize and crop.

    Attributes:
        resize: (height, width) to resize to.
        fit: "stretch" resizes to exactly `resize`; "cover" keeps the proportions and covers `resize`, so that
            for a square it sets the shorter side.
        crop: (height, width) cut from the centre afterwards: the size of the model's input.
        interpolation: filter of the resize, one of Pillow's.
        mean: for each channel, in the order of `color`.
        std: for each channel, in the order of `color`.
        color: the model's channels and their order: "rgb", "bgr", "grey" (luminance) or "rgba".
        scale: what a pixel is multiplied by before mean and std. 1/255 makes of 255 a 1; 1 leaves 0…255.

    Raises:
        InputError: if a value has another type, is out of range, or does not fit another one.
    """

    resize: tuple[int, int]
    fit: Fit
    crop: tuple[int, int]
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    color: Color = "rgb"
    scale: float = 1 / 255

    def __post_init__(self) -> None:
        for name, choices in (("fit", FITS), ("interpolation", INTERPOLATIONS), ("color", tuple(CHANNELS))):
            _check_choice(name, getattr(self, name), choices)
        for name in ("resize", "crop"):
            object.__setattr__(self, name, _size(name, getattr(self, name)))
        for name in ("mean", "std"):
            object.__setattr__(self, name, _per_channel(name, getattr(self, name), self.color))
        if not all(value > 0 for value in self.std):
            raise InputError(f"std = {list(self.std)} must be positive in each channel")
        if not _is_number(self.scale) or self.scale <= 0:
            raise InputError(
                f"scale = {self.scale!r} is no positive number; it is what a pixel is multiplied by, such as 1/255"
            )
        object.__setattr__(self, "scale", float(self.scale))
        if max(self.crop) > LARGEST_SIDE:
            raise InputError(
                f"crop = {_sides(self.crop)} is too large; height and width may be {LARGEST_SIDE} pixels at most"
            )
        if any(small < large for small, large in zip(self.resize, self.crop, strict=True)):
            raise InputError(
                f"crop = {_sides(self.crop)} does not lie in resize = {_sides(self.resize)}; make the crop smaller "
                "or resize to more"
            )

    @property
    def channels(self) -> int:
        """How many channels the model's input has."""
        return CHANNELS[self.color]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (channels, height, width) of one image."""
        return (self.channels, *self.crop)

    def with_size(self, height: int, width: int) -> Preprocessing:
        """Return the same preprocessing for another input size, with the cropped margin in proportion."""
        resize = (
            round(height * self.resize[0] / self.crop[0]),
            round(width * self.resize[1] / self.crop[1]),
        )
        return dataclasses.replace(self, resize=resize, crop=(height, width))

    def with_channels(self, channels: int) -> Preprocessing:
        """Return the same preprocessing for a model with another number of channels: 1 is grey, 4 is RGB and alpha.

        Raises:
            InputError: if an image has no such number of channels, or mean or std differ between the channels, so that
                nobody can tell what they are in others.
        """
        if channels == self.channels:
            return self
        color = next((color for color, count in CHANNELS.items() if count == channels), None)
        if color is None:
            raise InputError(
                f"the model's input has {channels} channels, and an image has 1, 3 or 4; give it arrays instead"
            )
        if len(set(self.mean)) > 1 or len(set(self.std)) > 1:
            raise InputError(
                f"the model's input has {channels} {_plural('channel', channels)}, and mean = {list(self.mean)} and "
                f"std = {list(self.std)} are for {self.channels}; give color, mean and std of [preprocessing] for "
                f"this model, such as color = {color!r}"
            )
        return dataclasses.replace(
            self, color=color, mean=self.mean[:1] * channels, std=self.std[:1] * channels
        )

    def replace(self, overrides: Mapping[str, Any]) -> Preprocessing:
        """Return this preprocessing with some of its values replaced.

        A crop alone keeps the margin in proportion, as `with_size` does.

        Args:
            overrides: any of this class's attributes by name, as TOML, JSON or `parse_overrides` give them.

        Raises:
            InputError: if a name is unknown, or a value is wrong or does not fit the others.
        """
        check_keys(overrides)
        kept = self
        if "crop" in overrides and "resize" not in overrides:
            kept = self.with_size(*_size("crop", overrides["crop"]))
        return dataclasses.replace(kept, **overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], size: tuple[int, int] | None = None) -> Preprocessing:
        """Build it from plain values, as TOML and JSON hold them.

        Mean and std have to be given, as a wrong guess would spoil every answer in silence. Left out, `crop` is `size`,
        `resize` is `crop`, `fit` is "cover", `interpolation` is "bilinear", `color` is "rgb" and `scale` is 1/255.

        Args:
            values: the class's attributes by name.
            size: (height, width) of the model's input, where it is known otherwise.

        Raises:
            InputError: if a name is unknown or missing, or a value is wrong or does not fit the others.
        """
        check_keys(values)
        given = dict(values)
        if size is not None:
            given.setdefault("crop", size)
        if missing := [name for name in ("crop", "mean", "std") if name not in given]:
            raise InputError(
                f"the preprocessing has no {' and no '.join(missing)}; give {', '.join(missing)}"
            )
        return cls(**{"resize": given["crop"], "fit": "cover", "interpolation": "bilinear", **given})

    def to_dict(self) -> dict[str, Any]:
        """Return all values as TOML and JSON hold them; `from_dict` reads them back to the last bit."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }


KEYS = tuple(field.name for field in dataclasses.fields(Preprocessing))
"""Names of all values, in order."""


def check_keys(values: object) -> None:
    """Check that these are values of a preprocessing by name, without a look at the values.

    Raises:
        InputError: if they are not; the message names near ones.
    """
    if not isinstance(values, Mapping):
        raise InputError(
            f"preprocessing = {values!r} is no table; expected {', '.join(KEYS)} with their values"
        )
    for name in values:
        if name not in KEYS:
            raise InputError(str(UnknownNameError.for_choice("key of the preprocessing", name, KEYS)))


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """Read values for `Preprocessing.replace` from a command line.

    Args:
        assignments: such as "mean=0.5,0.5,0.5", "crop=224x224", "resize=256" (a square), "color=bgr", "scale=1/255".

    Raises:
        InputError: if one is no assignment, has an unknown name or no value of its kind, or a name comes twice.
    """
    found: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals or not text:
            raise InputError(f"{assignment!r} is no setting of the preprocessing; expected NAME=VALUE")
        check_keys({name: text})
        if name in found:
            raise InputError(f"the preprocessing has two values for {name}; leave one out")
        found[name] = _parsed(name, text)
    return found


def _parsed(name: str, text: str) -> Any:
    """The value that a text means."""
    try:
        if name in ("resize", "crop"):
            return [int(side) for side in text.lower().replace("×", "x").split("x")]
        if name in ("mean", "std"):
            return [_number(part) for part in text.strip("[]").split(",")]
        if name == "scale":
            return _number(text)
    except (ValueError, ZeroDivisionError):
        expected = {"resize": "HEIGHTxWIDTH", "crop": "HEIGHTxWIDTH", "scale": "a number, such as 1/255"}
        raise InputError(
            f"{name} = {text!r} cannot be read; expected {expected.get(name, 'numbers with commas between them')}"
        ) from None
    return text


def _number(text: str) -> float:
    """A number, or a fraction as 1/255."""
    above, line, below = text.partition("/")
    return float(above) / float(below) if line else float(text)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise InputError(str(UnknownNameError.for_choice(name, value, choices)))  # type: ignore[arg-type]


def _size(name: str, value: object) -> tuple[int, int]:
    """(height, width); a single number is a square's."""
    sides: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    sides = [*sides, *sides] if len(sides) == 1 else sides
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise InputError(f"{name} = {value!r} is not [height, width] in pixels, both above 0")
    height, width = sides
    return height, width


def _per_channel(name: str, value: object, color: Color) -> tuple[float, ...]:
    numbers = value if isinstance(value, (list, tuple)) else None
    if numbers is None or not all(map(_is_number, numbers)):
        raise InputError(f"{name} = {value!r} is no list of finite numbers, one for each channel")
    expected = CHANNELS[color]
    if len(numbers) != expected:
        others = [other for other, count in CHANNELS.items() if count == len(numbers)]
        hint = f", or say color = {' or '.join(map(repr, others))}" if others else ""
        raise InputError(
            f"{name} = {list(numbers)} has {len(numbers)} {_plural('number', len(numbers))}; expected {expected}, "
            f"one for each channel of color = {color!r}{hint}"
        )
    return tuple(map(float, numbers))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
