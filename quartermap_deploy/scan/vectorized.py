"""The selective scan in PyTorch without a loop over positions.

The recurrence h_t = a_t·h_{t-1} + b_t is solved in chunks of `RADIX` positions: all chunks advance side by side, then
the last states of the chunks, a sequence `RADIX` times shorter, are solved the same way, and every chunk is corrected
by the state it should have started from, times the decay up to there, the exponential of a sum. So the number of
torch calls grows with log(L) and the work with L. No quotient of decays is ever formed, so the result stays exact when
dt·|A| is large and decays underflow to zero: then the state they multiply is truly forgotten. Nor is a product: where
steps are small and the map is even, every decay is rounded the same way, and a product over the sequence would gather
that error once for every position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

RADIX = 8
"""Positions in a chunk: fewer means more levels, more means more calls per level; 8 measured best on a CPU."""


def linear_recurrence_(exponent: Tensor, drive: Tensor) -> Tensor:
    """Solve h_t = exp(exponent_t)·h_{t-1} + drive_t along the first axis, with h_{-1} = 0, in place.

    The first axis is cut into whole chunks and a rest of less than `RADIX` positions, which is advanced last.

    Args:
        exponent: logarithm of the decay, (L, ...), floating point; overwritten.
        drive: b, of the same shape and type; overwritten with h.

    Returns:
        `drive`, which now holds h.
    """
    length = exponent.shape[0]
    chunks = length // RADIX
    decay = exponent.exp()
    if chunks < 2:
        for t in range(1, length):
            drive[t].addcmul_(decay[t], drive[t - 1])
        return drive
    whole = chunks * RADIX
    a, b = decay[:whole].unflatten(0, (chunks, RADIX)), drive[:whole].unflatten(0, (chunks, RADIX))
    sums = exponent[:whole].unflatten(0, (chunks, RADIX))
    for t in range(1, RADIX):
        b[:, t].addcmul_(a[:, t], b[:, t - 1])
        sums[:, t].add_(sums[:, t - 1])
    final = linear_recurrence_(sums[:, -1].contiguous(), b[:, -1].contiguous())
    b[1:].addcmul_(sums[1:].exp_(), final[:-1, None])
    for t in range(whole, length):
        drive[t].addcmul_(decay[t], drive[t - 1])
    return drive


def _scan(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor) -> Tensor:
    """Scan in sequence-major layout: x, dt (L, batch, K, d); B, C (L, batch, K, N); A (K, d, N) → (L, batch, K, d)."""
    weighted = dt * x
    y = torch.zeros_like(x)
    # One state at a time: the largest tensor is a map, not a map times d_state.
    for n in range(A.shape[-1]):
        states = linear_recurrence_(dt * A[..., n], weighted * B[..., n, None])
        y.addcmul_(states, C[..., n, None])
    return y


def _scan_gradients(
    grad: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `_scan` for x, dt, B, C and A, given that of y.

    The adjoint state g_t = C_t·dy_t + a_{t+1}·g_{t+1} is the same recurrence, run backwards.
    """
    weighted = dt * x
    grad_weighted, grad_dt = torch.zeros_like(x), torch.zeros_like(dt)
    grad_B, grad_C, grad_A = torch.empty_like(B), torch.empty_like(C), torch.empty_like(A)
    for n in range(A.shape[-1]):
        exponents = dt * A[..., n]
        states = linear_recurrence_(exponents.clone(), weighted * B[..., n, None])
        # The first has no state before it, so that its decay says nothing.
        following = torch.cat([torch.zeros_like(exponents[:1]), exponents[1:].flip(0)])
        adjoint = linear_recurrence_(following, (grad * C[..., n, None]).flip(0)).flip(0)
        grad_C[..., n] = (grad * states).sum(-1)
        grad_B[..., n] = (adjoint * weighted).sum(-1)
        grad_weighted.addcmul_(adjoint, B[..., n, None])
        grad_exponent = exponents[1:].exp_() * adjoint[1:] * states[:-1]
        grad_dt[1:].addcmul_(grad_exponent, A[..., n].expand_as(grad_exponent))
        grad_A[..., n] = (grad_exponent * dt[1:]).sum((0, 1))
    return grad_weighted * dt, grad_dt.addcmul_(grad_weighted, x), grad_B, grad_C, grad_A


class _SequenceScan:
    """The scan over (batch, K·c, L) tensors: how they are brought into sequence-major layout and back."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
    ) -> None:
        self.groups, self.state_type = B.shape[1], torch.promote_types(u.dtype, torch.float32)
        self.x, self.raw = self.unrolled(u), self.unrolled(delta)
        self.B, self.C = self.unrolled(B.flatten(1, 2)), self.unrolled(C.flatten(1, 2))
        self.A = self.grouped(A)
        self.D = None if D is None else self.grouped(D)
        if delta_bias is not None:
            self.raw = self.raw + self.grouped(delta_bias)
        self.dt = functional.softplus(self.raw) if delta_softplus else self.raw
        self.softplus = delta_softplus

    def grouped(self, parameter: Tensor) -> Tensor:
        """(K·d, ...) → (K, d, ...)."""
        return torch.unflatten(parameter.to(self.state_type), 0, (self.groups, -1))

    def unrolled(self, tensor: Tensor) -> Tensor:
        """(batch, K·c, L) → (L, batch, K, c)."""
        return (
            torch.unflatten(tensor.to(self.state_type), 1, (self.groups, -1)).permute(3, 0, 1, 2).contiguous()
        )

    @staticmethod
    def rolled(tensor: Tensor) -> Tensor:
        """(L, batch, K, c) → (batch, K, c, L)."""
        return tensor.permute(1, 2, 3, 0)

    def forward(self) -> Tensor:
        y = _scan(self.x, self.dt, self.B, self.C, self.A)
        if self.D is not None:
            y.addcmul_(self.x, self.D.expand_as(self.x))
        return self.rolled(y).flatten(1, 2)

    def gradients(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy = self.unrolled(grad)
        grad_x, grad_dt, grad_B, grad_C, grad_A = _scan_gradients(dy, self.x, self.dt, self.B, self.C, self.A)
        if self.softplus:
            grad_dt = grad_dt * torch.sigmoid(self.raw)
        grad_D = None
        if self.D is not None:
            grad_x = grad_x + dy * self.D
            grad_D = (dy * self.x).sum((0, 1)).flatten()
        return (
            self.rolled(grad_x).flatten(1, 2),
            self.rolled(grad_dt).flatten(1, 2),
            grad_A.flatten(0, 1),
            self.rolled(grad_B),
            self.rolled(grad_C),
            grad_D,
            grad_dt.sum((0, 1)).flatten(),
        )


class _MapScan:
    """The scan over (batch, K·c, H, W) maps: how they are unrolled along the directions and put back.

    Low-rank time steps are unrolled before they are projected, so that the wide maps are written once, in the order
    of their scan.
    """

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        A: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        dt_weight: Tensor | None,
        directions: Sequence[str],
        softplus: bool,
    ) -> None:
        self.directions, self.softplus = tuple(directions), softplus
        self.state_type = torch.promote_types(x.dtype, torch.float32)
        self.map, self.height, self.width = x.to(self.state_type), x.shape[2], x.shape[3]
        self.x = torch.stack([self.unrolled(self.map, name) for name in self.directions], dim=2)
        self.B, self.C, self.steps = self.sequences(B), self.sequences(C), self.sequences(dt)
        self.A, self.D, bias = self.grouped(A), self.grouped(D), self.grouped(dt_bias)
        if dt_weight is None:
            self.weight = None
            self.raw = self.steps + bias
        else:
            self.weight = self.grouped(dt_weight)
            narrow = self.steps.flatten(0, 1).transpose(0, 1)
            wide = torch.baddbmm(bias[:, None], narrow, self.weight.transpose(1, 2))
            self.raw = wide.transpose(0, 1).unflatten(0, self.x.shape[:2])
        self.dt = functional.softplus(self.raw).contiguous() if softplus else self.raw.contiguous()

    def grouped(self, parameter: Tensor) -> Tensor:
        """(K·d, ...) → (K, d, ...)."""
        return torch.unflatten(parameter.to(self.state_type), 0, (len(self.directions), -1))

    @staticmethod
    def unrolled(map_: Tensor, name: str) -> Tensor:
        """(batch, c, H, W) → (L, batch, c), in the order of one direction."""
        order = (3, 2, 0, 1) if name.startswith("column") else (2, 3, 0, 1)
        sequence = map_.permute(order).flatten(0, 1)
        return sequence.flip(0) if name.endswith("_reverse") else sequence

    def rolled(self, sequence: Tensor, name: str) -> Tensor:
        """(L, batch, c), in the order of one direction → (batch, c, H, W)."""
        if name.endswith("_reverse"):
            sequence = sequence.flip(0)
        if name.startswith("column"):
            return torch.unflatten(sequence, 0, (self.width, self.height)).permute(2, 3, 1, 0)
        return torch.unflatten(sequence, 0, (self.height, self.width)).permute(2, 3, 0, 1)

    def sequences(self, maps: Tensor) -> Tensor:
        """(batch, K·c, H, W) → (L, batch, K, c), each direction in its own order."""
        split = maps.to(self.state_type).unflatten(1, (len(self.directions), -1)).unbind(1)
        return torch.stack(
            [self.unrolled(m, name) for m, name in zip(split, self.directions, strict=True)], dim=2
        )

    def maps(self, sequences: Tensor) -> Tensor:
        """(L, batch, K, c) → (batch, K·c, H, W): the adjoint of `sequences`."""
        return torch.cat([self.rolled(sequences[:, :, k], n) for k, n in enumerate(self.directions)], dim=1)

    def merged(self, sequences: Tensor) -> Tensor:
        """(L, batch, K, c) → (batch, c, H, W): the sum over the directions."""
        # Directions of one orientation are added as sequences, so that each orientation is transposed once.
        total: dict[str, Tensor] = {}
        for k, name in enumerate(self.directions):
            orientation = name.removesuffix("_reverse")
            sequence = sequences[:, :, k].flip(0) if name != orientation else sequences[:, :, k]
            total[orientation] = total[orientation] + sequence if orientation in total else sequence
        merged = [self.rolled(sequence, orientation) for orientation, sequence in total.items()]
        return merged[0] if len(merged) == 1 else merged[0] + merged[1]

    def forward(self) -> Tensor:
        y = self.merged(_scan(self.x, self.dt, self.B, self.C, self.A))
        return torch.addcmul(y, self.map, self.D.sum(0)[:, None, None])

    def gradients(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.to(self.state_type)
        dy = torch.stack([self.unrolled(grad, name) for name in self.directions], dim=2)
        grad_x, grad_dt, grad_B, grad_C, grad_A = _scan_gradients(dy, self.x, self.dt, self.B, self.C, self.A)
        if self.softplus:
            grad_dt = grad_dt * torch.sigmoid(self.raw)
        grad_bias, grad_weight, grad_steps = grad_dt.sum((0, 1)).flatten(), None, grad_dt
        if self.weight is not None:
            grad_weight = torch.einsum("lbkd,lbkr->kdr", grad_dt, self.steps).flatten(0, 1)
            grad_steps = torch.einsum("lbkd,kdr->lbkr", grad_dt, self.weight)
        return (
            torch.addcmul(self.merged(grad_x), grad, self.D.sum(0)[:, None, None]),
            self.maps(grad_steps),
            self.maps(grad_B),
            self.maps(grad_C),
            grad_A.flatten(0, 1),
            (grad * self.map).sum((0, 2, 3)).repeat(len(self.directions)),
            grad_bias,
            grad_weight,
        )


def selective_scan_vectorized(*arguments: Any) -> Tensor:
    """`selective_scan_definition` with the same arguments and result, vectorised; at least float32 inside."""
    return _SequenceScan(*arguments).forward().to(arguments[0].dtype)


def selective_scan_gradients(grad: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """Gradients for every tensor argument of `selective_scan_vectorized`, in their order, given that of y."""
    return _SequenceScan(*arguments).gradients(grad)


def selective_scan_2d_vectorized(*arguments: Any) -> Tensor:
    """`selective_scan_2d_definition` with the same arguments and result, vectorised; at least float32 inside."""
    return _MapScan(*arguments).forward().to(arguments[0].dtype)


def selective_scan_2d_gradients(grad: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """Gradients for every tensor argument of `selective_scan_2d_vectorized`, in their order, given that of y."""
    return _MapScan(*arguments).gradients(grad)
