"""The C interface of the kernels for CPUs, `quartermap/cpu_scan.h`, by ctypes: addresses go in, statuses come out."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from quartermap_deploy.lowering.operator import DIRECTIONS
from quartermap_deploy.native.errors import PluginError

ELEMENT_TYPES = ("float32", "float16", "bfloat16", "float64")
"""In the order of `QuartermapCpuElementType`."""

_SIZES = ("batch", "groups", "channels", "height", "width", "d_state", "dt_rank")
_TENSORS = ("x", "dt", "B", "C", "A", "D", "dt_bias", "dt_weight", "y")


class Scan(ctypes.Structure):
    """`QuartermapCpuScan`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        ("directions", ctypes.POINTER(ctypes.c_int32)),
        *((name, ctypes.c_int32) for name in ("direction_count", "softplus", "element_type", "threads")),
    )


class Tensors(ctypes.Structure):
    """`QuartermapCpuTensors`."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in _TENSORS)


Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
"""`QuartermapCpuTask`."""

Parallel = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, Task, ctypes.c_void_p, ctypes.c_size_t)
"""`QuartermapCpuParallel`."""


class Team(ctypes.Structure):
    """`QuartermapCpuTeam`."""

    _fields_ = (("start", ctypes.c_void_p), ("threads", ctypes.c_uint32))


@functools.cache
def team_start() -> int | None:
    """Address of the GOMP_parallel of the OpenMP runtime that this process computes with; None where it has none."""
    try:
        found = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # not there; no such call on Windows
        return None
    return ctypes.cast(found, ctypes.c_void_p).value


@dataclass(frozen=True)
class Sizes:
    """Sizes of a scan.

    Attributes:
        batch: images, or sequences.
        groups: G, of channels that have B and C of their own; 1 for a map.
        channels: d, of one group.
        height: H; 1 for a sequence.
        width: W.
        d_state: N.
        dt_rank: R, or 0 where dt is the full time-step map.
    """

    batch: int
    groups: int
    channels: int
    height: int
    width: int
    d_state: int
    dt_rank: int = 0


def make_scan(
    sizes: Sizes, directions: Sequence[str], softplus: bool, element_type: str, threads: int = 0
) -> Scan:
    """Return the C structure of a scan.

    Args:
        sizes: its sizes.
        directions: names of the K scan orders.
        softplus: whether softplus is applied to the time step.
        element_type: of the maps, out of `ELEMENT_TYPES`.
        threads: tasks that may run at once; 0 for as many as there are cores.
    """
    numbers = (ctypes.c_int32 * len(directions))(*map(DIRECTIONS.index, directions))
    kind = ELEMENT_TYPES.index(element_type)
    return Scan(*astuple(sizes), numbers, len(directions), int(softplus), kind, threads)


class CpuKernels:
    """The functions of a loaded library.

    Args:
        library: one that `native.cpu_library` found to fit, loaded.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("message", "contract", "instruction_set"):
            getattr(library, f"quartermap_cpu_{name}").restype = ctypes.c_char_p
        library.quartermap_cpu_message.argtypes = (ctypes.c_int32,)
        library.quartermap_cpu_version.restype = ctypes.c_uint32
        library.quartermap_cpu_choose.argtypes = (ctypes.c_char_p,)
        pointer = ctypes.POINTER
        library.quartermap_cpu_scan.argtypes = (pointer(Scan), pointer(Tensors), Parallel, ctypes.c_void_p)

    @classmethod
    def load(cls, path: Path) -> CpuKernels:
        """Load a library, of which the caller knows that it is ours and fits."""
        return cls(ctypes.CDLL(str(path.resolve())))

    @property
    def version(self) -> int:
        """Of the interface."""
        return int(self._library.quartermap_cpu_version())

    @property
    def instruction_set(self) -> str:
        """The instruction set that scans use, or "none"."""
        name: bytes = self._library.quartermap_cpu_instruction_set()
        return name.decode()

    def choose(self, name: str | None) -> bool:
        """Choose the instruction set of scans from now on, or the widest for None; False if it cannot be had."""
        return bool(self._library.quartermap_cpu_choose(None if name is None else name.encode()) == 0)

    def message(self, status: int) -> str:
        """Return the library's words for a status."""
        text: bytes = self._library.quartermap_cpu_message(status)
        return text.decode()

    def status(
        self,
        scan: Scan | None,
        tensors: Tensors | None,
        parallel: Any = None,
        pool: int | None = None,
    ) -> int:
        """Scan, and return the status of `QuartermapCpuStatus`.

        Args:
            scan: what is computed, or None for a null pointer.
            tensors: where everything lies; the memory has to be there for as long as the scan takes.
            parallel: a `Parallel` that runs the tasks, or None for threads that end with the call.
            pool: what `parallel` is given.
        """
        own = Parallel() if parallel is None else parallel
        return int(self._library.quartermap_cpu_scan(scan, tensors, own, pool))

    def scan(self, scan: Scan, addresses: Mapping[str, int | None]) -> None:
        """Scan, on the threads of this process's OpenMP runtime where it has one, or on some that end with the call.

        PyTorch computes with such a runtime, whose threads wait for more without sleeping; further ones would take
        turns with them.

        Args:
            scan: what is computed.
            addresses: of the contiguous tensors x, dt, B, C, A and y, and of D, dt_bias and dt_weight where they are
                there. Their sizes must be those of `scan`: nothing checks them.

        Raises:
            PluginError: with the library's words, if it refuses.
        """
        tensors = Tensors(*(addresses.get(name) for name in _TENSORS))
        start = team_start() if scan.threads > 1 else None
        if start is None:
            status = self.status(scan, tensors)
        else:
            by_team = ctypes.cast(self._library.quartermap_cpu_by_team, Parallel)
            team = Team(start, scan.threads)
            status = self.status(scan, tensors, by_team, ctypes.addressof(team))
        if status != 0:
            raise PluginError(f"selective scan: {self.message(status)}")
