"""The two TensorRTs, and how they differ."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from dataclasses import dataclass
from typing import Any

from quartermap_deploy.errors import MissingDependencyError
from quartermap_deploy.targets.tensorrt.cuda_runtime import runtime_version


@dataclass(frozen=True)
class Flavour:
    """One of the two.

    Attributes:
        target: name of the target.
        title: name for people.
        module: its Python module.
        install: the command that brings it.
        distributions: its packages, of which one is installed, with `{}` for the version of CUDA.
        oldest: the first version that is supported.
        newest: the first version that is not.
        engine_file: name of the engine in a bundle.
        portable: whether engines are compiled for a list of compute capabilities and without a GPU.
    """

    target: str
    title: str
    module: str
    install: str
    distributions: tuple[str, ...]
    oldest: tuple[int, ...]
    newest: tuple[int, ...]
    engine_file: str
    portable: bool

    def load(self) -> Any:
        """Import the module.

        Raises:
            MissingDependencyError: if it is absent, its libraries are, or its version is not supported.
        """
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            # The bindings import the package of the libraries, which may be absent too.
            raise MissingDependencyError(
                f"{self.title} is not installed (no module {error.name}); {self.install}"
            ) from error
        except (ImportError, OSError) as error:
            raise MissingDependencyError(
                f"{self.title} is installed, but its libraries cannot be loaded ({error}); {self.install}"
            ) from error
        version = getattr(module, "__version__", None)
        if version is None or not self.oldest <= version_numbers(version) < self.newest:
            raise MissingDependencyError(
                f"{self.title} {version} is not supported; expected {'.'.join(map(str, self.oldest))} or later, before "
                f"{'.'.join(map(str, self.newest))}; {self.install}"
            )
        return module

    def cuda(self) -> str | None:
        """The version of CUDA that this TensorRT works with, or None where that is not known.

        That is the version of the CUDA runtime library here, such as "12.6". Where the installed package of TensorRT is
        for another CUDA than that, or there is no such library, it is the package's, a major version such as "13". The
        Debian packages of TensorRT and JetPack leave no package that Python knows of, so there only the library tells.
        """
        package, library = self._cuda_of_package(), runtime_version()
        if library is not None and package in (None, library.partition(".")[0]):
            return library
        return package

    def _cuda_of_package(self) -> str | None:
        for version in ("13", "12"):
            for name in self.distributions:
                try:
                    importlib.metadata.distribution(name.format(version))
                except importlib.metadata.PackageNotFoundError:
                    continue
                return version
        return None


def version_numbers(version: str) -> tuple[int, ...]:
    """(10, 13, 0) of "10.13.0.post1"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:4])


TENSORRT = Flavour(
    target="tensorrt",
    title="TensorRT",
    module="tensorrt",
    install="pip install 'quartermap-deploy[tensorrt]' (its libraries come from NVIDIA; tensorrt-cu12 for CUDA 12, "
    "JetPack on Jetson)",
    distributions=("tensorrt-cu{}", "tensorrt-cu{}-bindings"),
    oldest=(10, 7),
    newest=(12,),
    engine_file="model.tensorrt.engine",
    portable=False,
)
TENSORRT_RTX = Flavour(
    target="tensorrt-rtx",
    title="TensorRT for RTX",
    module="tensorrt_rtx",
    install="pip install 'quartermap-deploy[tensorrt-rtx]'",
    distributions=("tensorrt-rtx-cu{}",),
    oldest=(1, 4),
    newest=(2,),
    engine_file="model.tensorrt_rtx.engine",
    portable=True,
)
