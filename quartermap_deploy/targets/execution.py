"""Where ONNX Runtime is to run a model: its execution providers, in order of preference, with their options.

A device is a short word for such an order: `cpu` is the CPU provider, `cuda` is CUDA and nothing else, and `auto` is
CUDA where it really starts, or else the CPU. A provider that cannot start is an error unless the CPU provider is named
behind it: that is how falling back is allowed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from quartermap_deploy.errors import InputError, UnknownNameError

SUFFIX = "ExecutionProvider"
CPU = f"CPU{SUFFIX}"
CUDA = f"CUDA{SUFFIX}"
OPENVINO = f"OpenVINO{SUFFIX}"
TENSORRT = f"Tensorrt{SUFFIX}"

KNOWN = (
    *(CPU, CUDA, TENSORRT, OPENVINO),
    *(f"{name}{SUFFIX}" for name in ("NvTensorRTRTX", "Dml", "CoreML", "MIGraphX", "ROCM", "QNN", "VitisAI")),
    *(f"{name}{SUFFIX}" for name in ("CANN", "Dnnl", "XNNPACK", "WebGpu", "ACL", "Azure")),
)
"""Providers that may be named without their ending, in any case; ONNX Runtime may have others."""
_ALIASES = {"directml": f"Dml{SUFFIX}"}

DEVICES = ("cpu", "cuda", "auto")
_IN_HOST_MEMORY = {CPU, OPENVINO, *(f"{name}{SUFFIX}" for name in ("Dnnl", "XNNPACK", "ACL", "Azure"))}
_OWN_DEVICES = ("CPU", "CPU_FP32", "CPU_FP16")
"""Values of OpenVINO's `device_type` that mean the CPU and no other device beside it."""

FAITHFUL = {CUDA: {"use_tf32": "0"}, OPENVINO: {"precision": "ACCURACY"}}
"""Options without which a provider computes in less than the types of the model: CUDA multiplies float32 in TF32, and
OpenVINO takes the type that is fastest on the device. The user's own options go before them."""

_NAME = re.compile(r"\w{1,100}")
_KEY = re.compile(r"[A-Za-z_][\w.]*")
_NEXT_OPTION = re.compile(r",(?=[A-Za-z_][\w.]*=)")


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime, and its options.

    Attributes:
        name: as ONNX Runtime spells it, such as "CUDAExecutionProvider".
        options: names and values, which ONNX Runtime itself checks.
    """

    name: str
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Provider:
        """Read `NAME` or `NAME:key=value,key=value`; a value may hold commas that no `key=` follows.

        Raises:
            UnknownNameError: if there is no such provider.
            InputError: if the options cannot be read.
        """
        name, colon, rest = text.partition(":")
        options: dict[str, str] = {}
        for part in _NEXT_OPTION.split(rest) if colon else ():
            key, equals, value = part.partition("=")
            if not equals or not _KEY.fullmatch(key) or not value:
                raise InputError(
                    f"the provider {text!r} has the option {part!r}; expected NAME:key=value,key=value, such as "
                    "CUDA:device_id=1,gpu_mem_limit=4294967296"
                )
            if key in options:
                raise InputError(f"the provider {text!r} has the option {key} twice; leave one out")
            options[key] = value
        return cls(_full_name(name), tuple(options.items()))

    @property
    def in_host_memory(self) -> bool:
        """Whether it computes on the CPU's own memory, so that operators of the CPU library may work beside it."""
        return self.name in _IN_HOST_MEMORY and dict(self.options).get("device_type", "CPU") in _OWN_DEVICES

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{short_names([self.name])}{f':{options}' if options else ''}"

    def settings(self) -> dict[str, str]:
        """Its options, with those that make it compute in the types of the model."""
        return {**FAITHFUL.get(self.name, {}), **dict(self.options)}


@dataclass(frozen=True)
class Execution:
    """The providers that are to run a model, in order of preference.

    Attributes:
        providers: at least one; what none of them takes, the CPU provider runs.
    """

    providers: tuple[Provider, ...] = field(default=(Provider(CPU),))

    def __post_init__(self) -> None:
        names = self.names
        if not names:
            raise InputError("no provider is named; expected at least one, such as CPU")
        if repeated := [name for place, name in enumerate(names) if name in names[:place]]:
            raise InputError(f"the provider {repeated[0]} is named twice; leave one out")
        if any(provider.name == CPU and provider.options for provider in self.providers):
            raise InputError(
                f"{CPU} takes no options, and ONNX Runtime would pass over them in silence; leave them out (threads "
                "are set by --threads, or QUARTERMAP_THREADS)"
            )
        if CPU in names[:-1]:
            raise InputError(f"{CPU} takes every node, so nothing is left for {names[-1]}; name it last")

    @classmethod
    def of_device(cls, device: str) -> Execution:
        """The providers of a device: "cpu", "cuda", or "auto".

        Raises:
            UnknownNameError: if there is no such device.
        """
        return cls(
            {
                "cpu": (Provider(CPU),),
                "cuda": (Provider(CUDA),),
                "auto": (Provider(CUDA), Provider(CPU)),
            }[require_device(device)]
        )

    @classmethod
    def read(cls, value: object) -> Execution:
        """Read what a caller gives: an execution, the name of a device, a provider, or a list of providers.

        Raises:
            InputError: if it is none of these, or a provider cannot be read.
            UnknownNameError: if there is no such provider.
        """
        if isinstance(value, Execution):
            return value
        if isinstance(value, str):
            return cls.of_device(value) if value in DEVICES else cls.of(None, [value])
        if isinstance(value, (list, tuple)):
            return cls.of(None, value) if value else cls(())
        raise InputError(
            f"execution is {value!r}, a {type(value).__name__}; expected quartermap_deploy.Execution.of(...), or in "
            'short "cuda", "OpenVINO", or a list of providers such as ["CUDA", "CPU"]'
        )

    @classmethod
    def of(cls, device: str | None = None, providers: str | Iterable[str] = ()) -> Execution:
        """Read a device, or one or several providers as `Provider.parse` reads them; the CPU where neither is given.

        Raises:
            InputError: if both are given, or a provider cannot be read or is no text.
            UnknownNameError: if there is no such device or provider.
        """
        texts = (providers,) if isinstance(providers, str) else _texts(providers)
        if device is not None and texts:
            raise InputError(
                f"the device {device} stands for providers, and the provider {texts[0]} is named as well; leave one out"
            )
        if texts:
            return cls(tuple(map(Provider.parse, texts)))
        return cls.of_device("cpu" if device is None else device)

    @classmethod
    def from_names(cls, names: Any) -> Execution:
        """Read what a file says, which has names of providers alone.

        An option may name a library that the provider loads, or a file that it writes, so no file has any.

        Raises:
            InputError: if it is no list of names.
            UnknownNameError: if there is no such provider.
        """
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise InputError(f'providers = {names!r} is no list of names, such as ["CUDA", "CPU"]')
        if with_options := [name for name in names if ":" in name]:
            raise InputError(
                f"providers has {with_options[0]!r}; a file gives no options, as they may name libraries to load: give "
                "them with --provider (in Python: execution=)"
            )
        return cls.of(None, names) if names else cls(())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the providers, in order."""
        return tuple(provider.name for provider in self.providers)

    def described(self) -> dict[str, dict[str, str]]:
        """The options of each provider that has some, for a report; of a path the file's name alone, as ever."""
        return {
            provider.name: {
                key: re.split(r"[/\\\\]", value)[-1] for key, value in provider.settings().items()
            }
            for provider in self.providers
            if provider.settings()
        }

    @property
    def on_cpu(self) -> bool:
        """Whether it is the CPU provider alone."""
        return self.names == (CPU,)

    @property
    def may_fall_back(self) -> bool:
        """Whether a provider that cannot start may be left out."""
        return CPU in self.names

    def __str__(self) -> str:
        return ", ".join(map(str, self.providers))


ON_CPU = Execution()
"""What is taken where nothing is said."""

Where = Execution | str | Sequence[str]
"""What `Execution.read` takes."""


def require_device(name: str) -> str:
    """Return the name of a device.

    Raises:
        UnknownNameError: if there is no such device.
    """
    if name not in DEVICES:
        raise UnknownNameError(
            f"unknown device {name!r}; expected cpu, cuda (an NVIDIA GPU), or auto; other GPUs are named by their "
            "providers, such as OpenVINO or DirectML"
        )
    return name


def _texts(providers: object) -> tuple[str, ...]:
    """Providers as a tuple.

    Raises:
        InputError: if they are no texts.
    """
    if isinstance(providers, Iterable):
        found = tuple(providers)
        wrong = [item for item in found if not isinstance(item, str)]
        if not wrong:
            return found
        raise InputError(
            f'the provider {wrong[0]!r} is a {type(wrong[0]).__name__}; expected a text such as "CUDA:device_id=1"'
        )
    raise InputError(
        f'providers is {providers!r}, a {type(providers).__name__}; expected texts, such as ["CUDA", "CPU"]'
    )


def short_names(names: Sequence[str]) -> str:
    """Names of providers for people: `CUDA, CPU`."""
    return ", ".join(name.removesuffix(SUFFIX) for name in names)


def _full_name(text: str) -> str:
    """The name of a provider, as ONNX Runtime spells it."""
    by_short = {name.removesuffix(SUFFIX).lower(): name for name in KNOWN} | _ALIASES
    short = text.lower().removesuffix(SUFFIX.lower())
    if short in by_short:
        return by_short[short]
    # Others than those that are known here are taken as they are spelled in full.
    if _NAME.fullmatch(text) and text.endswith(SUFFIX) and text != SUFFIX:
        return text
    if near := difflib.get_close_matches(short, by_short, n=1):
        raise UnknownNameError(
            f"unknown provider {text!r}; did you mean {by_short[near[0]].removesuffix(SUFFIX)}?"
        )
    raise UnknownNameError(
        f"unknown provider {text!r}; expected one of ONNX Runtime's, such as CUDA, TensorRT, OpenVINO or Dml, or the "
        f"full name of another, which ends in {SUFFIX}"
    )
