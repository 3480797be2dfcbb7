"""The scan of a feature map as public code computes it: unrolled copies of the map around a scan of sequences.

The scan of sequences is a function with the arguments of mamba-ssm's `selective_scan_fn`. Tests give it this package's
`selective_scan`, which has the same meaning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from quartermap_deploy.architectures.ss2d import SS2D

Scan = Callable[..., Tensor]


def find_public_scan() -> Scan | None:
    """Return mamba-ssm's `selective_scan_fn`, or None where it is not installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    scan: Scan = selective_scan_fn
    return scan


def cross_scan(x: Tensor) -> Tensor:
    """Unroll a map along the four directions, (batch, channels, H, W) → (batch, 4, channels, H·W)."""
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    return torch.stack([rows, columns, rows.flip(-1), columns.flip(-1)], dim=1)


def cross_merge(ys: Tensor, height: int, width: int) -> Tensor:
    """Add up what the four directions give, (batch, 4, channels, H·W) → (batch, channels, H, W)."""
    rows = ys[:, 0] + ys[:, 2].flip(-1)
    columns = ys[:, 1] + ys[:, 3].flip(-1)
    return rows.unflatten(-1, (height, width)) + columns.unflatten(-1, (width, height)).transpose(2, 3)


def scan_map(mixer: SS2D, x: Tensor, scan: Scan) -> Tensor:
    """Project and scan a map as the public code does, with the parameters of one of our mixers.

    Args:
        mixer: with four directions.
        x: (batch, d_inner, H, W).
        scan: the scan of sequences.

    Returns:
        y, (batch, d_inner, H, W).
    """
    batch, d_inner, height, width = x.shape
    constants = mixer.scan_constants()
    sequences = cross_scan(x)
    narrow = torch.einsum("bkdl,kcd->bkcl", sequences, mixer.x_proj_weight)
    steps, B, C = narrow.split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=2)
    steps = torch.einsum("bkrl,kdr->bkdl", steps, mixer.dt_projs_weight)
    ys = scan(
        sequences.flatten(1, 2),
        steps.flatten(1, 2),
        constants.A,
        B,
        C,
        constants.D,
        delta_bias=constants.dt_bias,
        delta_softplus=True,
    )
    return cross_merge(ys.view(batch, len(mixer.directions), d_inner, -1), height, width)


@contextlib.contextmanager
def public_models(scan: Scan) -> Iterator[None]:
    """While open, every model scans its maps as the public code does."""
    original = SS2D._scan_map

    def replacement(self: SS2D, x: Tensor) -> Tensor:
        return scan_map(self, x, scan)

    SS2D._scan_map = replacement  # type: ignore[method-assign]
    try:
        yield
    finally:
        SS2D._scan_map = original  # type: ignore[method-assign]


def with_public_scan(function: Callable[[], Any], scan: Scan) -> Callable[[], Any]:
    """Return a call that runs models as the public code does."""

    def call() -> Any:
        with public_models(scan):
            return function()

    return call
