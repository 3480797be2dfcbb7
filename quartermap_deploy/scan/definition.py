"""The selective scan as it is defined: one position after the other.

This is the reference that every faster form, in PyTorch, ONNX or CUDA, is compared with, in float64. It is slow on
purpose and shares no code with the fast forms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from quartermap_deploy.lowering.operator import DIRECTIONS

__all__ = ["DIRECTIONS", "selective_scan_2d_definition", "selective_scan_definition"]


def selective_scan_definition(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Selective scan over a sequence (Mamba, arXiv 2312.00752, equation 2 with the zero-order hold of A).

    With a = exp(delta·A) after bias and softplus: h_t = a_t·h_{t-1} + delta_t·B_t·u_t, y_t = C_t·h_t + D·u_t, h_0 = 0.

    Args:
        u: input, (batch, K·d, L), floating point.
        delta: time step before bias and softplus, (batch, K·d, L).
        A: state matrix, (K·d, N), negative.
        B: input matrix, (batch, K, N, L); one of the K groups serves d neighbouring channels.
        C: output matrix, (batch, K, N, L).
        D: skip weight, (K·d), or None.
        delta_bias: added to delta, (K·d), or None.
        delta_softplus: whether softplus is applied to delta after the bias.

    Returns:
        y, (batch, K·d, L), in the element type of u; computed in that type.
    """
    groups, length = B.shape[1], u.shape[-1]
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        # The threshold at which torch turns softplus into the identity is raised so that float64 stays exact.
        delta = functional.softplus(delta, threshold=40.0)
    B = B.repeat_interleave(u.shape[1] // groups, dim=1)
    C = C.repeat_interleave(u.shape[1] // groups, dim=1)
    state = u.new_zeros(*u.shape[:2], A.shape[1])
    outputs = []
    for t in range(length):
        step = delta[:, :, t, None]
        state = torch.exp(step * A) * state + step * B[..., t] * u[:, :, t, None]
        outputs.append((state * C[..., t]).sum(-1))
    y = torch.stack(outputs, dim=-1)
    return y if D is None else y + D[:, None] * u


def cross_scan(x: Tensor, directions: Sequence[str] = DIRECTIONS) -> Tensor:
    """Unroll a feature map along every direction (VMamba, arXiv 2401.10166, section 4.2).

    Args:
        x: feature map, (batch, channels, H, W).
        directions: names out of `DIRECTIONS`.

    Returns:
        Sequences, (batch, K, channels, H·W).
    """
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    orders = {
        "row": rows,
        "column": columns,
        "row_reverse": rows.flip(-1),
        "column_reverse": columns.flip(-1),
    }
    return torch.stack([orders[name] for name in directions], dim=1)


def cross_merge(y: Tensor, height: int, width: int, directions: Sequence[str] = DIRECTIONS) -> Tensor:
    """Put sequences back into raster order and add them up: the adjoint of `cross_scan`.

    Args:
        y: sequences, (batch, K, channels, H·W).
        height: H of the feature map, positions.
        width: W of the feature map, positions.
        directions: names out of `DIRECTIONS`, K of them.

    Returns:
        Feature map, (batch, channels, H, W).
    """
    total = y.new_zeros(*y[:, 0].shape[:-1], height, width)
    for k, name in enumerate(directions):
        sequence = y[:, k].flip(-1) if name.endswith("_reverse") else y[:, k]
        if name.startswith("column"):
            total = total + sequence.unflatten(-1, (width, height)).transpose(-1, -2)
        else:
            total = total + sequence.unflatten(-1, (height, width))
    return total


def selective_scan_2d_definition(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_weight: Tensor | None = None,
    directions: Sequence[str] = DIRECTIONS,
    softplus: bool = True,
) -> Tensor:
    """Selective scan of a feature map in several directions, by `cross_scan`, the scan and `cross_merge`.

    The arguments are those of `quartermap_deploy.scan.operators.selective_scan_2d`.
    """
    batch, d_inner, height, width = x.shape
    count = len(directions)

    def sequences(map_: Tensor) -> Tensor:
        """(batch, K·c, H, W), each direction with maps of its own → (batch, K, c, L), each in its own order."""
        per_direction = map_.unflatten(1, (count, -1))
        return torch.stack(
            [cross_scan(per_direction[:, k], (name,))[:, 0] for k, name in enumerate(directions)], dim=1
        )

    if dt_weight is not None:
        weight = dt_weight.unflatten(0, (count, d_inner))
        dt = torch.einsum("bkrhw,kdr->bkdhw", dt.unflatten(1, (count, -1)), weight).flatten(1, 2)
    y = selective_scan_definition(
        cross_scan(x, directions).flatten(1, 2),
        sequences(dt).flatten(1, 2),
        A,
        sequences(B),
        sequences(C),
        D,
        dt_bias,
        softplus,
    )
    return cross_merge(y.view(batch, count, d_inner, height * width), height, width, directions)
