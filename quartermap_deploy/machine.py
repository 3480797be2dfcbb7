"""The machine: in words, where results were measured on it, and the cores that this process may use."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """Return system, processor, cores and GPU; None for what the system does not tell, or what is not there."""
    from quartermap_deploy.gpu import find_gpu

    gpu = find_gpu()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "gpu": None if gpu is None else gpu.name,
    }


def processor() -> str | None:
    """Return the processor's name, or None where the system does not tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


SYSTEM = Path("/")
"""Where Linux has its files."""

_NOTABLE = re.compile(r"sse4_2|f16c|fma|avx\w*|amx_\w+|neon|asimd\w*|sve\w*|i8mm|bf16")


def instruction_sets(system: Path = SYSTEM) -> list[str]:
    """Return the processor's instruction sets for vectors, as Linux names them; empty where the system tells none.

    Args:
        system: the root of the file system that has `proc`.
    """
    try:
        lines = (system / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    flags = (line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features")))
    return sorted(flag for flag in next(flags, []) if _NOTABLE.fullmatch(flag))


def memory(system: Path = SYSTEM) -> dict[str, int | None]:
    """Return the bytes of memory, in all and available; None for what the system does not tell.

    Args:
        system: the root of the file system that has `proc`.
    """
    found: dict[str, int | None] = {"total": None, "available": None}
    try:
        lines = (system / "proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            found["total"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return found
    for name, key in (("MemTotal:", "total"), ("MemAvailable:", "available")):
        sizes = (line.split()[1] for line in lines if line.startswith(name))
        if (size := next(sizes, "")).isdecimal():
            found[key] = int(size) * 1024
    return found


def usable_cores(system: Path = SYSTEM) -> int:
    """Return how many cores this process has for itself, 1 at least.

    Two hardware threads of one core count once, as in ONNX Runtime: they share its arithmetic. What the process was
    bound to (`taskset`) and the quota of its control group (the limit of a container) count too. Only Linux tells
    these; elsewhere it is the number of processors.

    Args:
        system: the root of the file system that has `proc` and `sys`.
    """
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    quotas = [math.ceil(quota) for quota in _quotas(system)]
    return max(1, min([_cores(system, processors), *quotas]))


def all_cores(system: Path = SYSTEM) -> int:
    """Return how many cores the machine has, whoever may use them; two hardware threads of one count once."""
    return _cores(system, range(os.cpu_count() or 1))


def _cores(system: Path, processors: Iterable[int]) -> int:
    return len({_siblings(system, processor) for processor in processors})


def _siblings(system: Path, processor: int) -> str:
    """Name the core of a processor."""
    try:
        return (system / f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list").read_text(
            "ascii", "replace"
        )
    except OSError:
        return str(processor)


def _quotas(system: Path) -> list[float]:
    """Return the processors that the control groups of this process may use, each of them and those above it."""
    try:
        lines = (system / "proc/self/cgroup").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # The second version has one tree; the first has one for each controller, under the name that it is mounted by.
        top = system / "sys/fs/cgroup" / controllers
        place = top / group.lstrip("/")
        # In a container the path may be that of the host, whose folders are not there; the top is the container then.
        while place.is_relative_to(top):
            found.append(_quota(place))
            if place == top:
                break
            place = place.parent
    return [quota for quota in found if quota is not None]


def _quota(group: Path) -> float | None:
    """Return the processors that a control group may use; None where there is no limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text("ascii", "replace").split()
        else:
            quota, period = (
                (group / name).read_text("ascii", "replace").strip()
                for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            )
        return int(quota) / int(period) if int(quota) > 0 < int(period) else None
    except (OSError, ValueError):
        # "max" and -1 say that there is none.
        return None
