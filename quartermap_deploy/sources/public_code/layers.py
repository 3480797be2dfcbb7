"""The layers of mamba-ssm that vision models build on: its norms, and the Mamba block with Vision Mamba's two variants.

Parameters have the names of the originals, so that checkpoints load; the code is written from the papers (arXiv
2312.00752, 2401.09417) and from the interfaces.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quartermap_deploy.sources.public_code import scans


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Normalise the last axis after adding a residual, with the arguments of mamba-ssm's `layer_norm_fn`.

    The original has kept neither order nor number of the arguments after `residual`, so they go by name alone.

    Returns:
        The normalised tensor in the type of x; with `prenorm` also what was normalised, as the next residual.

    Raises:
        UnsupportedScanError: if one of the arguments that only training has is given.
    """
    only_training = (x1, weight1, bias1, rowscale, out, residual_out)
    if any(item is not None for item in only_training) or dropout_p or return_dropout_mask:
        scans.refuse("layer_norm_fn with dropout or a second input", "only a plain residual is known")
    own = x.dtype
    if residual is not None:
        x = x + residual.to(x.dtype) if not residual_in_fp32 else x.float() + residual.float()
    kept = x.float() if residual_in_fp32 else x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = weight.to(wide.dtype) + 1 if zero_centered_weight else weight.to(wide.dtype)
    shift = None if bias is None else bias.to(wide.dtype)
    if is_rms_norm:
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * scale
        y = y if shift is None else y + shift
    else:
        y = functional.layer_norm(wide, wide.shape[-1:], scale, shift, eps)
    y = y.to(out_dtype or own)
    return (y, kept) if prenorm else y


def rms_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, **rest: Any
) -> Any:
    """`layer_norm` by the root of the mean square alone (arXiv 1910.07467): mamba-ssm's `rms_norm_fn`."""
    return layer_norm(x, weight, bias, residual, **{**rest, "is_rms_norm": True})


rms_norm.__signature__ = inspect.signature(layer_norm)  # type: ignore[attr-defined]


class RMSNorm(nn.Module):
    """mamba-ssm's RMSNorm: parameter `weight`, and the residual of `layer_norm`."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.dropout_p = eps, dropout_p
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """Normalise (..., hidden_size); with `prenorm` the next residual comes along."""
        return rms_norm(
            x,
            self.weight,
            None,
            residual,
            eps=self.eps,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            dropout_p=self.dropout_p if self.training else 0.0,
        )


class Mamba(nn.Module):
    """The Mamba block of mamba-ssm, (batch, L, d_model) → the same; `bimamba_type` adds Vision Mamba's way back.

    Vision Mamba's variants are "v1", which scans the same projections backwards with a state matrix of its own, and
    "v2", which has a convolution, projections and a scan of its own for the reversed sequence.
    """

    A_log: Tensor
    A_b_log: Tensor
    gamma: Tensor

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        bimamba_type: str | None = "none",
        if_divide_out: bool = False,
        if_devide_out: bool = False,
        init_layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        if bimamba_type not in (None, "none", "v1", "v2"):
            scans.refuse(f"Mamba(bimamba_type={bimamba_type!r})", 'expected "none", "v1" or "v2"')
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.layer_idx, self.bimamba_type = layer_idx, bimamba_type
        self.divide_out = if_divide_out or if_devide_out
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model))
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        steps = _initial_steps(self.d_inner, dt_min, dt_max, dt_init_floor)
        for suffix in ("", "_b") if bimamba_type == "v2" else ("",):
            self._add_branch(suffix, conv_bias, factory)
            projection = getattr(self, f"dt_proj{suffix}")
            bound = self.dt_rank**-0.5 * dt_scale
            if dt_init == "constant":
                nn.init.constant_(projection.weight, bound)
            else:
                nn.init.uniform_(projection.weight, -bound, bound)
            with torch.no_grad():
                projection.bias.copy_(steps)
        if bimamba_type == "v1":
            self.A_b_log = nn.Parameter(self.A_log.detach().clone())
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def _add_branch(self, suffix: str, conv_bias: bool, factory: dict[str, Any]) -> None:
        inner = self.d_inner
        convolution = nn.Conv1d(
            inner,
            inner,
            self.d_conv,
            groups=inner,
            padding=self.d_conv - 1,
            bias=conv_bias,
            **factory,
        )
        states = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=factory["device"])
        layers = {
            "conv1d": convolution,
            "x_proj": nn.Linear(inner, self.dt_rank + 2 * self.d_state, bias=False, **factory),
            "dt_proj": nn.Linear(self.dt_rank, inner, **factory),
        }
        for name, layer in layers.items():
            self.add_module(f"{name}{suffix}", layer)
        self.register_parameter(f"A{suffix}_log", nn.Parameter(states.log().repeat(inner, 1)))
        self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(inner, device=factory["device"])))

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """Mix the tokens of hidden_states, (batch, L, d_model)."""
        if inference_params is not None:
            scans.refuse("Mamba with inference_params", "a compiled model keeps no state between its calls")
        xz = self.in_proj(hidden_states).transpose(1, 2)
        out: Tensor
        if self.bimamba_type == "v1":
            weights = self._weights("")
            weights["A_b"] = -self.A_b_log.float().exp()
            weights["out_proj_weight"], weights["out_proj_bias"] = self.out_proj.weight, self.out_proj.bias
            out = scans.bimamba_inner(xz, **weights)
        else:
            y = self._branch(xz, "")
            if self.bimamba_type == "v2":
                y = y + self._branch(xz.flip(-1), "_b").flip(-1)
                y = y / 2 if self.divide_out else y
            out = self.out_proj(y.transpose(1, 2))
        return out * self.gamma if hasattr(self, "gamma") else out

    def _branch(self, xz: Tensor, suffix: str) -> Tensor:
        return scans.mamba_inner_no_projection(xz, **self._weights(suffix))

    def _weights(self, suffix: str) -> dict[str, Any]:
        """The weights of one way along the sequence, as `mamba_inner_no_projection` names them."""

        def own(name: str) -> Any:
            return getattr(self, name)

        convolution, steps = own(f"conv1d{suffix}"), own(f"dt_proj{suffix}")
        return {
            "conv1d_weight": convolution.weight,
            "conv1d_bias": convolution.bias,
            "x_proj_weight": own(f"x_proj{suffix}").weight,
            "delta_proj_weight": steps.weight,
            "A": -own(f"A{suffix}_log").float().exp(),
            "D": own(f"D{suffix}").float(),
            "delta_bias": steps.bias.float(),
        }


def _initial_steps(channels: int, smallest: float, largest: float, floor: float) -> Tensor:
    """Biases whose softplus is spread evenly over the orders of magnitude between smallest and largest."""
    low, high = math.log(smallest), math.log(largest)
    steps = torch.exp(low + (high - low) * torch.rand(channels)).clamp(min=floor)
    return steps + torch.log(-torch.expm1(-steps))
