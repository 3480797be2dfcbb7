"""QuarterMap: the plan, and its reference in PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quartermap_deploy.pruning.plan import UPSAMPLE_MODES, QuarterMap, Subsample

if TYPE_CHECKING:
    from quartermap_deploy.pruning.reference import prune

__all__ = ["UPSAMPLE_MODES", "QuarterMap", "Subsample", "prune"]


def __getattr__(name: str) -> Any:
    # A plan is read by commands that never touch torch, so the reference is imported when it is first asked
    # for.
    if name == "prune":
        from quartermap_deploy.pruning.reference import prune

        return prune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
