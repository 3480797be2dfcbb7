"""What GPU is there, asked of NVIDIA's driver alone: no CUDA toolkit, no torch."""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


@dataclass(frozen=True)
class Gpu:
    """The first GPU that the driver shows.

    Attributes:
        name: as the driver names it.
        compute_capability: such as "8.9".
    """

    name: str
    compute_capability: str


@functools.cache
def find_gpu() -> Gpu | None:
    """Return the first GPU, or None where there is no driver or no GPU."""
    if (cuda := _driver()) is None:
        return None
    device, value, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    parts = []
    for attribute in (_MAJOR, _MINOR):
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            return None
        parts.append(str(value.value))
    cuda.cuDeviceGetName(name, len(name), device)
    return Gpu(name.value.decode(errors="replace"), ".".join(parts))


@functools.cache
def driver_cuda() -> tuple[int, int] | None:
    """The newest version of CUDA that the driver knows, such as (13, 0), or None where there is no driver."""
    cuda, version = _driver(), ctypes.c_int()
    if cuda is None or cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
