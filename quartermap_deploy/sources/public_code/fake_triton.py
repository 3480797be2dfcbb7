"""A `triton` under which code that defines kernels imports; a kernel that is launched is refused by its name.

Nobody finds it by looking for the package: `imports` hands it to public code alone, so that torch, which asks
for triton itself and would then use it, never sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from quartermap_deploy.sources.public_code.scans import refuse

VERSION = "3.0.0"


class Kernel:
    """A function that was given to `triton.jit`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.fn = function
        self.__name__ = getattr(function, "__name__", "kernel")

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        """Return the launch of the kernel on a grid."""
        return self.run

    def run(self, *arguments: Any, **keywords: Any) -> Any:
        """Refuse to run."""
        where = getattr(self.fn, "__module__", "?")
        refuse(f"the Triton kernel {where}.{self.__name__}", "it runs on a GPU alone")

    __call__ = run


class Config:
    """`triton.Config`: some repositories choose among theirs when they are imported."""

    def __init__(self, kwargs: dict[str, Any], **options: Any) -> None:
        self.kwargs = kwargs
        vars(self).update({"num_warps": 4, "num_stages": 2, **options})


class Anything:
    """Whatever else is named: a type, a device, a decorator with arguments; no comparison with it holds."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(f"{self.__name__}.{name}")

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Return the function that is decorated as a kernel, and anything else as something new."""
        if len(arguments) == 1 and not keywords and callable(arguments[0]):
            found = arguments[0]
            return found if isinstance(found, (Kernel, Anything)) else Kernel(found)
        return Anything(self.__name__)

    def __getitem__(self, item: Any) -> Anything:
        return self

    def __lt__(self, other: Any) -> bool:
        return False

    __le__ = __gt__ = __ge__ = __lt__

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (object,)


def _ceiling(x: int, y: int) -> int:
    return -(-x // y)


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


class FakeTriton(ModuleType):
    """The package or one of its modules."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        if name == "triton":
            self.__version__ = VERSION
            self.cdiv, self.next_power_of_2, self.Config = _ceiling, _next_power_of_2, Config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return module(f"{self.__name__}.{name}") if name in _MODULES else Anything(f"{self.__name__}.{name}")


_MODULES = ("language", "runtime", "testing", "tools", "compiler", "backends", "ops", "extra", "math")
_KNOWN: dict[str, FakeTriton] = {}


def module(name: str) -> FakeTriton:
    """Return the module of a dotted name, always the same."""
    if name not in _KNOWN:
        _KNOWN[name] = FakeTriton(name)
    return _KNOWN[name]
