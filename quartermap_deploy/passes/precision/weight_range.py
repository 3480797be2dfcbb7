"""Whether a 16-bit type can hold a weight."""

from __future__ import annotations

import numpy as np

from quartermap_deploy.lowering.element_types import ElementType


def unfit(
    values: np.ndarray[tuple[int, ...], np.dtype[np.float32]], kind: ElementType
) -> tuple[str | None, float]:
    """Why a weight cannot have a type, or None, and the share of its elements that are too small for all bits."""
    size = np.abs(values.astype(np.float64))
    if not size.size:
        return None, 0.0
    rounded = kind.rounded(values).astype(np.float64)
    if not np.isfinite(rounded).all():
        return f"its largest value is {size.max():.3g}, {kind.name} ends at {kind.largest:.4g}", 0.0
    subnormal = float(((size > 0) & (size < kind.smallest_normal)).mean())
    norm = float(np.linalg.norm(size))
    lost = float(np.linalg.norm(rounded - values)) / norm if norm > 0 else 0.0
    if lost > 2.0 ** (1 - kind.digits):
        return f"{lost:.1e} of it would be lost: its values are too small for {kind.name}", subnormal
    return None, subnormal
