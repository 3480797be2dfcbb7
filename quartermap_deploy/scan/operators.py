"""The torch operators `quartermap::selective_scan` and `quartermap::selective_scan_2d`.

They are opaque to `torch.export`, so that one scan becomes one node (`quartermap.SelectiveScan2D` in ONNX) instead of
an unrolled graph, and differentiable, so that a pruned model can be fine-tuned. Forward they run on the native kernels
where those are there and fit, else vectorised; gradients come from the vectorised form, which needs the inputs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quartermap_deploy.scan.cpu import native_scan, native_scan_2d
from quartermap_deploy.scan.definition import DIRECTIONS
from quartermap_deploy.scan.vectorized import (
    selective_scan_2d_gradients,
    selective_scan_2d_vectorized,
    selective_scan_gradients,
    selective_scan_vectorized,
)

NAMESPACE = "quartermap"


@torch.library.custom_op(f"{NAMESPACE}::selective_scan", mutates_args=())
def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    y = native_scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
    if y is None:
        y = selective_scan_vectorized(u, delta, A, B, C, D, delta_bias, delta_softplus).contiguous()
    return y


@_selective_scan.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    tensors = (u, delta, A, B, C, D, delta_bias)
    return _present(selective_scan_gradients(grad, *tensors, delta_softplus), tensors)


@_selective_scan_backward.register_fake
def _(grad: Tensor, *arguments: Any) -> list[Tensor]:
    return [
        torch.empty_like(a, memory_format=torch.contiguous_format) for a in arguments if isinstance(a, Tensor)
    ]


@torch.library.custom_op(f"{NAMESPACE}::selective_scan_2d", mutates_args=())
def _selective_scan_2d(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_weight: Tensor | None,
    directions: str,
    softplus: bool,
) -> Tensor:
    arguments = (x, dt, B, C, A, D, dt_bias, dt_weight, directions.split(","), softplus)
    y = native_scan_2d(*arguments)
    return selective_scan_2d_vectorized(*arguments).contiguous() if y is None else y


@_selective_scan_2d.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::selective_scan_2d_backward", mutates_args=())
def _selective_scan_2d_backward(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_weight: Tensor | None,
    directions: str,
    softplus: bool,
) -> list[Tensor]:
    tensors = (x, dt, B, C, A, D, dt_bias, dt_weight)
    return _present(selective_scan_2d_gradients(grad, *tensors, directions.split(","), softplus), tensors)


@_selective_scan_2d_backward.register_fake
def _(grad: Tensor, *arguments: Any) -> list[Tensor]:
    return [
        torch.empty_like(a, memory_format=torch.contiguous_format) for a in arguments if isinstance(a, Tensor)
    ]


def _present(gradients: Sequence[Tensor | None], tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Keep the gradients of the tensors that were given, in their element types."""
    return [
        gradient.to(tensor.dtype).contiguous()
        for gradient, tensor in zip(gradients, tensors, strict=True)
        if gradient is not None and tensor is not None
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.present = [isinstance(value, Tensor) for value in inputs]
    ctx.options = [None if isinstance(value, Tensor) else value for value in inputs]


def _differentiate(backward: Any) -> Any:
    def gradient(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(context.saved_tensors)
        inputs = [
            next(saved) if present else value
            for present, value in zip(context.present, context.options, strict=True)
        ]
        gradients = iter(backward(grad.contiguous(), *inputs))
        return tuple(next(gradients) if present else None for present in context.present)

    return gradient


_selective_scan.register_autograd(_differentiate(_selective_scan_backward), setup_context=_save)
_selective_scan_2d.register_autograd(_differentiate(_selective_scan_2d_backward), setup_context=_save)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Selective scan over a sequence, with the shapes of mamba-ssm's `selective_scan_fn`.

    Args:
        u: input, (batch, K·d, L).
        delta: time step before bias and softplus, (batch, K·d, L).
        A: state matrix, (K·d, N), negative, float32.
        B: input matrix, (batch, K, N, L).
        C: output matrix, (batch, K, N, L).
        D: skip weight, (K·d), float32, or None.
        delta_bias: added to delta, (K·d), float32, or None.
        delta_softplus: whether softplus is applied to delta after the bias.

    Returns:
        y, (batch, K·d, L), in the element type of u, accumulated in float32 (float64 for float64 input).
    """
    return _selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus)  # type: ignore[no-any-return]


def selective_scan_2d(
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
    """Selective scan of a feature map in K directions, summed (VMamba, arXiv 2401.10166, SS2D).

    Every tensor is in raster order: projections act on one position at a time, so they commute with every scan order,
    and no unrolled copy of the map is needed outside the operator.

    Args:
        x: feature map, (batch, d_inner, H, W).
        dt: time step before bias and softplus: (batch, K·R, H, W) when `dt_weight` is given, else
            (batch, K·d_inner, H, W).
        B: input matrix, (batch, K·N, H, W).
        C: output matrix, (batch, K·N, H, W).
        A: state matrix, (K·d_inner, N), negative, float32.
        D: skip weight, (K·d_inner), float32.
        dt_bias: added to the projected time step, (K·d_inner), float32.
        dt_weight: projection of the low-rank time step, (K·d_inner, R), or None.
        directions: K names out of `DIRECTIONS`.
        softplus: whether softplus is applied to the time step after the bias.

    Returns:
        y, (batch, d_inner, H, W), in the element type of x, accumulated in float32 (float64 for float64 input).

    Raises:
        ValueError: if a direction is unknown.
    """
    if unknown := [name for name in directions if name not in DIRECTIONS]:
        raise ValueError(f"unknown scan directions {unknown}; expected names out of {DIRECTIONS}")
    joined = ",".join(directions)
    return _selective_scan_2d(x, dt, B, C, A, D, dt_bias, dt_weight, joined, softplus)  # type: ignore[no-any-return]
