"""TensorRT's first objects, a builder and a runtime: where a driver that does not answer is found out."""

from __future__ import annotations

import re
from typing import Any

from quartermap_deploy import gpu as devices
from quartermap_deploy.errors import EngineError
from quartermap_deploy.gpu import Gpu
from quartermap_deploy.targets.tensorrt.flavour import Flavour

NO_GPU = re.compile(
    r"cudaError 35|cudaError 100|driver version is insufficient|no CUDA-capable", re.IGNORECASE
)
"""Errors that there is no driver. TensorRT for RTX adds one to every other error where there is none."""


def make_builder(trt: Any, flavour: Flavour, logger: Any) -> Any:
    """A builder.

    Raises:
        EngineError: if TensorRT cannot make one.
    """
    if not flavour.portable:
        require_driver(flavour)
    return _made(trt.Builder, flavour, logger)


def make_runtime(trt: Any, flavour: Flavour, logger: Any, *, host_code: bool = False) -> Any:
    """A runtime.

    Args:
        trt: the module.
        flavour: which TensorRT.
        logger: as `make_logger` returns it.
        host_code: whether engines may bring code that runs in this process, as version-compatible ones do.

    Raises:
        EngineError: if TensorRT cannot make one.
    """
    if not flavour.portable or devices.driver_cuda() is not None:
        require_driver(flavour)
    runtime = _made(trt.Runtime, flavour, logger)
    if host_code:
        runtime.engine_host_code_allowed = True
    return runtime


def require_driver(flavour: Flavour) -> None:
    """Check that the driver knows the CUDA that this TensorRT was made with.

    Asked before anything else: without such a driver some releases return an object that is none, and the first use of
    it ends the process.

    Raises:
        EngineError: if there is no driver, or it is too old.
    """
    if (lack := driver_lack(flavour)) is not None:
        raise EngineError(
            f"{flavour.title} cannot be started: {lack}; `nvidia-smi` tells which driver is there"
        )


def driver_lack(flavour: Flavour) -> str | None:
    """What the driver lacks for this TensorRT, or None if it lacks nothing.

    A driver that knows some CUDA 13 runs what any other CUDA 13 made, so major versions are compared.
    """
    found, cuda = devices.driver_cuda(), flavour.cuda()
    needed = "an NVIDIA driver" if cuda is None else f"an NVIDIA driver that knows CUDA {cuda}"
    if found is None:
        return f"it needs {needed}, and no driver answers"
    if cuda is not None and found[0] < int(cuda.partition(".")[0]):
        return (
            f"it needs {needed}, and the one here knows CUDA up to {found[0]}.{found[1]}; install a newer driver, or "
            f"{flavour.title} for CUDA {found[0]}"
        )
    return None


def _made(kind: Any, flavour: Flavour, logger: Any) -> Any:
    try:
        return kind(logger)
    except TypeError as error:
        # What pybind11 makes of the null pointer that TensorRT returns where CUDA cannot be started.
        cuda = flavour.cuda()
        driver = "NVIDIA's driver" if cuda is None else f"an NVIDIA driver that knows CUDA {cuda}"
        raise EngineError(
            f"{flavour.title} cannot be started: {last_error(logger)}; it needs {driver}, and `nvidia-smi` tells which "
            "is there"
        ) from error


def require_gpu(flavour: Flavour, gpu: Gpu | None) -> None:
    """Check that there is a GPU, where one is needed to build.

    Raises:
        EngineError: if there is none.
    """
    if gpu is None and not flavour.portable:
        raise EngineError(
            f"{flavour.title} builds engines for the GPU at hand, and there is none (no NVIDIA driver answers); "
            "compile on the machine that will run the engine, or for the target tensorrt-rtx, which builds without one"
        )


def last_error(logger: Any) -> str:
    """The last error that TensorRT told, if it told any; one about the driver only where there is no other."""
    telling = [error for error in logger.errors if not NO_GPU.search(error)] or list(logger.errors)
    return telling[-1] if telling else "no reason given"
