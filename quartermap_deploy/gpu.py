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
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
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
