"""The functions of mamba-ssm and causal-conv1d, in their own signatures, on the operator `quartermap::selective_scan`.

They are what `public_code` puts in the place of kernels that need CUDA, and what a `scans=` adapter calls. Written from
the papers and from the interfaces; arguments have the names and shapes that public code gives them.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from quartermap_deploy.errors import UnsupportedScanError
from quartermap_deploy.scan import operators


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    float_output: bool = False,
) -> Tensor:
    """Selective scan over a sequence, with the arguments of mamba-ssm's `selective_scan_fn`.

    It is computed in float32, or in float64 for float64 input, whatever the types of the arguments are.

    Args:
        u: input, (batch, channels, L).
        delta: time step before bias and softplus, (batch, channels, L).
        A: state matrix, (channels, N), real and negative.
        B: input matrix: (batch, K, N, L) where each of the K groups serves channels/K neighbouring channels,
            (batch, N, L) for one group, or (channels, N) for one that does not depend on the input.
        C: output matrix, in one of the same shapes; it need not be that of B.
        D: skip weight, (channels), or None.
        z: gate, (batch, channels, L), or None: the result is multiplied by SiLU(z).
        delta_bias: added to delta, (channels), or None.
        delta_softplus: whether softplus is applied to delta after the bias.
        return_last_state: must be False; here so that calls of the original reach us, and are refused by name.
        float_output: return the result as it was computed, instead of in the element type of u.

    Returns:
        y, (batch, channels, L).

    Raises:
        UnsupportedScanError: if the last state is asked for, a matrix is complex, or the shapes do not fit.
    """
    if return_last_state:
        refuse("selective_scan_fn(return_last_state=True)", "the last state is no output of the operator")
    _check(u, delta, A)
    groups_B, groups_C = _grouped("B", B, u, A), _grouped("C", C, u, A)
    most = max(groups_B.shape[1], groups_C.shape[1])
    wide = torch.promote_types(u.dtype, torch.float32)
    # Looked up at each call, so that whoever counts or prunes scans can stand between.
    y = operators.selective_scan(
        u.to(wide),
        delta.to(wide),
        A.to(wide),
        _repeated("B", groups_B, most).to(wide),
        _repeated("C", groups_C, most).to(wide),
        None if D is None else D.to(wide),
        None if delta_bias is None else delta_bias.to(wide),
        bool(delta_softplus),
    )
    if z is not None:
        y = y * functional.silu(z.to(wide))
    return y if bool(float_output) else y.to(u.dtype)


def refuse(what: str, why: str) -> NoReturn:
    """Raise the error for a part of public code that has no counterpart here."""
    raise UnsupportedScanError(
        f"the model calls {what}, which cannot be compiled: {why}. Change that call in the model, or name an adapter "
        'for the function around it with scans={"package.module:function": adapter}'
    )


def _check(u: Tensor, delta: Tensor, A: Tensor) -> None:
    if A.is_complex():
        refuse("a selective scan with a complex A", "the operator is real")
    if u.dim() != 3 or delta.dim() != 3 or A.dim() != 2:
        refuse(
            f"a selective scan with u {_size(u)}, delta {_size(delta)} and A {_size(A)}",
            "expected u and delta (batch, channels, L) and A (channels, N)",
        )
    if u.shape[1] != A.shape[0] or delta.shape[1] != A.shape[0]:
        refuse(
            f"a selective scan with {u.shape[1]} channels in u, {delta.shape[1]} in delta and {A.shape[0]} in A",
            "expected the same number of each",
        )


def _grouped(name: str, matrix: Tensor, u: Tensor, A: Tensor) -> Tensor:
    """B or C in any of the shapes that mamba-ssm takes → (batch, K, N, L)."""
    channels, states = A.shape
    if matrix.is_complex():
        refuse(f"a selective scan with a complex {name}", "the operator is real")
    if matrix.dim() == 2 and tuple(matrix.shape) == (channels, states):
        return matrix[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[-1])
    if matrix.dim() == 3 and matrix.shape[1] == states:
        return matrix.unsqueeze(1)
    if matrix.dim() == 4 and matrix.shape[2] == states and channels % matrix.shape[1] == 0:
        return matrix
    return refuse(
        f"a selective scan with {name} {_size(matrix)} and A {_size(A)}",
        f"expected {name} as (batch, K, N, L) with K a divisor of the channels, (batch, N, L), or (channels, N)",
    )


def _repeated(name: str, matrix: Tensor, groups: int) -> Tensor:
    """(batch, K, N, L) → (batch, groups, N, L), each group repeated for its neighbours."""
    own = matrix.shape[1]
    if own == groups:
        return matrix
    if groups % own:
        refuse(
            f"a selective scan with {own} and {groups} groups", f"those of {name} do not divide the others"
        )
    return matrix.unsqueeze(2).expand(-1, -1, groups // own, -1, -1).flatten(1, 2)


def _size(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def selective_scan_grouped(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    nrows: int = 1,
) -> Tensor:
    """`selective_scan` with the arguments of the package `selective_scan`, which has no gate; nrows tunes a kernel."""
    return selective_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | str | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Depthwise convolution that sees no later position, with the arguments of causal-conv1d's `causal_conv1d_fn`.

    Args:
        x: input, (batch, channels, L).
        weight: (channels, width).
        bias: (channels), or None.
        seq_idx: must be None; the first versions have the activation in this place.
        initial_states: must be None.
        return_final_states: must be False.
        final_states_out: must be None.
        activation: "silu" or "swish", or None.

    Returns:
        (batch, channels, L).

    Raises:
        UnsupportedScanError: if states or several sequences in one are asked for.
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    if seq_idx is not None or initial_states is not None or return_final_states:
        refuse("causal_conv1d_fn with seq_idx or states", "a compiled model keeps nothing between its calls")
    padded = functional.pad(x, (weight.shape[1] - 1, 0))
    y = functional.conv1d(
        padded, weight.unsqueeze(1).to(x.dtype), None if bias is None else bias.to(x.dtype), groups=x.shape[1]
    )
    return functional.silu(y) if activation in ("silu", "swish") else y


def causal_conv1d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    final_states_out: Tensor | None = None,
    silu_activation: bool = False,
) -> Tensor:
    """`causal_conv1d` with the arguments of causal-conv1d's `causal_conv1d_fwd_function`."""
    if final_states_out is not None:
        refuse("causal_conv1d_fwd_function with states", "a compiled model keeps nothing between its calls")
    activation = "silu" if silu_activation else None
    return causal_conv1d(x, weight, bias, seq_idx, initial_states, activation=activation)


def mamba_inner_no_projection(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """The inside of a Mamba block, from its input projection to its gate (arXiv 2312.00752, figure 3).

    Args:
        xz: both halves of the input projection, (batch, 2·channels, L).
        conv1d_weight: (channels, 1, width).
        conv1d_bias: (channels), or None.
        x_proj_weight: projection to dt, B and C, (R + 2·N, channels).
        delta_proj_weight: projection of the low-rank time step, (channels, R).
        A: state matrix, (channels, N).
        B: one that does not depend on the input, or None to project it.
        C: likewise.
        D: skip weight, (channels), or None.
        delta_bias: (channels), or None.
        B_proj_bias: added to the projected B, (N), or None.
        C_proj_bias: likewise.
        delta_softplus: whether softplus is applied to the time step.
        checkpoint_lvl: of training; ignored.

    Returns:
        (batch, channels, L).
    """
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d(x, conv1d_weight.flatten(1), conv1d_bias, activation="silu")
    delta, own_B, own_C = _projected(x, x_proj_weight, delta_proj_weight, A, B_proj_bias, C_proj_bias)
    B, C = own_B if B is None else B, own_C if C is None else C
    return selective_scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus)


def _projected(
    x: Tensor,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a Mamba block projects of x, (batch, channels, L) → dt, (batch, channels, L), and B and C, (batch, N, L)."""
    rank, states = delta_proj_weight.shape[1], A.shape[-1]
    narrow = functional.linear(x.transpose(1, 2), x_proj_weight)
    delta = functional.linear(narrow[..., :rank], delta_proj_weight).transpose(1, 2)
    B, C = narrow[..., rank : rank + states], narrow[..., -states:]
    B = (B if B_proj_bias is None else B + B_proj_bias).transpose(1, 2)
    C = (C if C_proj_bias is None else C + C_proj_bias).transpose(1, 2)
    return delta, B, C


def mamba_inner(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """`mamba_inner_no_projection` and the output projection → (batch, L, out_channels)."""
    if any(weight is not None for weight in (b_rms_weight, c_rms_weight, dt_rms_weight)):
        refuse("mamba_inner_fn with norms of dt, B and C", "language models alone have them")
    y = mamba_inner_no_projection(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
    )
    return functional.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def bimamba_inner(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """Vision Mamba's first block: one convolution and projection, scanned both ways with A and A_b, and summed.

    The arguments are those of `mamba_inner`. The gate belongs to its position, so it is applied to the sum.
    """
    if B is not None or C is not None:
        refuse("bimamba_inner_fn with constant B or C", "the original does not define what the way back does")
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d(x, conv1d_weight.flatten(1), conv1d_bias, activation="silu")
    delta, B, C = _projected(x, x_proj_weight, delta_proj_weight, A, B_proj_bias, C_proj_bias)
    there = selective_scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    x, delta, B, C, z = (tensor.flip(-1) for tensor in (x, delta, B, C, z))
    back = selective_scan(x, delta, A_b, B, C, D, z, delta_bias, delta_softplus)
    y = there + back.flip(-1)
    return functional.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)
