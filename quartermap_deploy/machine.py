"""The machine that results were measured on, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """Return system, processor, cores and GPU; None for what the system does not tell, or what is not there."""
    from quartermap_deploy.targets.gpu import find_gpu

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
