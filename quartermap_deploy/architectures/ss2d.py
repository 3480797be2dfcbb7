"""SS2D, the token mixer of VMamba (arXiv 2401.10166, 4.2): a four-direction selective scan of a feature map.

    in_proj → depthwise convolution → SiLU → projections and scan → out_norm → (gate) → out_proj

Every tensor outside the scan stays in raster order. The projections act on one position at a time, so they
commute with every scan order: one 1x1 convolution on the map serves all directions, and no unrolled or
flipped copy is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from quartermap_deploy.architectures.layers import layer_norm, linear
from quartermap_deploy.pruning.plan import Subsample
from quartermap_deploy.pruning.positions import keep_positions, restore_positions
from quartermap_deploy.scan.definition import DIRECTIONS
from quartermap_deploy.scan.operators import selective_scan_2d

SMALLEST_STEP, LARGEST_STEP = 1e-3, 0.1
"""Range of the time step softplus(dt_bias) of a new model (Mamba, arXiv 2312.00752, 3.6)."""


class ScanConstants(NamedTuple):
    """What the scan takes besides feature maps, derived from the parameters as checkpoints store them.

    Attributes:
        projection_weight: (K·(R + 2·N), d_inner, 1, 1), with the rows of dt of all directions first, then B,
            then C.
        A: (K·d_inner, N), negative.
        D: (K·d_inner).
        dt_bias: (K·d_inner).
        dt_weight: (K·d_inner, R).
    """

    projection_weight: Tensor
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    dt_weight: Tensor


class SS2D(nn.Module):
    """Four-direction selective scan of a feature map.

    Parameters carry the names and shapes of the released VMamba checkpoints: `x_proj_weight` (K, R + 2·N,
    d_inner), `dt_projs_weight` (K, d_inner, R), `dt_projs_bias` (K, d_inner), `A_logs` (K·d_inner, N) and
    `Ds` (K·d_inner).

    Args:
        d_model: channels of the input and output.
        d_state: size N of the state of each channel.
        ssm_ratio: d_inner / d_model.
        conv_bias: whether the depthwise convolution has a bias.
        gated: whether in_proj also makes a gate z, and silu(z) multiplies the normalised scan.
        channel_first: layout of input and output, (batch, d_model, H, W) if true, else (batch, H, W,
            d_model).

    Attributes:
        dt_rank: rank R of the time step, d_model / 16 rounded up.
        directions: names of the K scan orders, in the order of the parameters.
        subsample: how a QuarterMap plan subsamples this block, or None if it is not pruned.
    """

    _CONSTANTS = tuple(f"_{name}" for name in ScanConstants._fields)

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int,
        ssm_ratio: float = 2.0,
        conv_bias: bool = True,
        gated: bool = False,
        channel_first: bool = False,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.d_state = d_state
        self.d_inner = int(ssm_ratio * d_model)
        self.dt_rank = math.ceil(d_model / 16)
        self.directions: tuple[str, ...] = DIRECTIONS
        self.gated = gated
        self.channel_first = channel_first
        self.subsample: Subsample | None = None
        self._frozen = False

        groups = len(self.directions)
        self.in_proj = linear(
            d_model, self.d_inner * (2 if gated else 1), bias=False, channel_first=channel_first
        )
        self.conv2d = nn.Conv2d(
            self.d_inner, self.d_inner, kernel_size=3, padding=1, groups=self.d_inner, bias=conv_bias
        )
        self.x_proj_weight = nn.Parameter(torch.empty(groups, self.dt_rank + 2 * d_state, self.d_inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(groups, self.d_inner, self.dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(groups, self.d_inner))
        self.A_logs = nn.Parameter(torch.empty(groups * self.d_inner, d_state))
        self.Ds = nn.Parameter(torch.empty(groups * self.d_inner))
        self.out_norm = layer_norm(self.d_inner, channel_first=channel_first)
        self.out_proj = linear(self.d_inner, d_model, bias=False, channel_first=channel_first)
        self._initialise_scan()

    def _initialise_scan(self) -> None:
        """Initialise what only a scan has, as Mamba and VMamba do."""
        if self.Ds.is_meta:
            # Without values there is nothing to initialise; on the meta device it would import torch's compiler.
            return
        nn.init.uniform_(self.x_proj_weight, -(self.d_inner**-0.5), self.d_inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            # Steps are spread evenly on a logarithmic scale; step + log(1 - exp(-step)) is the inverse of
            # softplus.
            logarithms = torch.empty_like(self.dt_projs_bias)
            step = logarithms.uniform_(math.log(SMALLEST_STEP), math.log(LARGEST_STEP)).exp()
            self.dt_projs_bias.copy_(step + torch.log(-torch.expm1(-step)))
            # S4D-Real (arXiv 2206.11893): A = -(1, 2, …, N) for every channel.
            self.A_logs.copy_(torch.arange(1, self.d_state + 1).log().expand_as(self.A_logs))
        nn.init.ones_(self.Ds)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the positions of x; the output has its shape."""
        x = self.in_proj(x)
        gate: Tensor | None = None
        if self.gated:
            x, gate = x.chunk(2, dim=1 if self.channel_first else -1)
        if not self.channel_first:
            x = x.permute(0, 3, 1, 2)
        y = self.scan(functional.silu(self.conv2d(x)))
        if not self.channel_first:
            y = y.permute(0, 2, 3, 1)
        y = self.out_norm(y)
        if gate is not None:
            y = y * functional.silu(gate)
        out: Tensor = self.out_proj(y)
        return out

    def scan(self, x: Tensor) -> Tensor:
        """Project and scan a channel-first map (batch, d_inner, H, W), pruned if a plan says so."""
        if self.subsample is None:
            return self._scan_map(x)
        height, width = x.shape[2:]
        y = self._scan_map(keep_positions(x, self.subsample))
        return restore_positions(y, (height, width), self.subsample)

    def _scan_map(self, x: Tensor) -> Tensor:
        return self._project_and_scan(x, self.scan_constants(), self.directions)

    def _project_and_scan(self, x: Tensor, constants: ScanConstants, directions: Sequence[str]) -> Tensor:
        """Project and scan a map in some directions, whose constants these are."""
        groups = len(directions)
        dt, B, C = torch.split(
            functional.conv2d(x, constants.projection_weight),
            [groups * self.dt_rank, groups * self.d_state, groups * self.d_state],
            dim=1,
        )
        return selective_scan_2d(
            x,
            dt,
            B,
            C,
            constants.A,
            constants.D,
            constants.dt_bias,
            dt_weight=constants.dt_weight,
            directions=directions,
        )

    def scan_constants(self) -> ScanConstants:
        """Return the tensors that the scan takes besides feature maps, in the operator's shapes."""
        if self._frozen:
            return ScanConstants(*(self.get_buffer(name) for name in self._CONSTANTS))
        by_kind = torch.split(self.x_proj_weight, [self.dt_rank, self.d_state, self.d_state], dim=1)
        return ScanConstants(
            projection_weight=torch.cat([rows.flatten(0, 1) for rows in by_kind])[:, :, None, None],
            A=-_at_least_float32(self.A_logs).exp(),
            D=_at_least_float32(self.Ds),
            dt_bias=_at_least_float32(self.dt_projs_bias).flatten(),
            dt_weight=self.dt_projs_weight.flatten(0, 1),
        )

    def freeze(self) -> None:
        """Hold the scan's constants as buffers, so that an exported graph has them as plain constants.

        The state dict does not change. Loading a state dict or switching to training mode ends it, since
        either makes the parameters differ from what was frozen.
        """
        self.unfreeze()
        for name, constant in zip(self._CONSTANTS, self.scan_constants(), strict=True):
            self.register_buffer(name, constant.detach().clone(), persistent=False)
        self._frozen = True

    def unfreeze(self) -> None:
        """Derive the scan's constants from the parameters at every call again."""
        if self._frozen:
            self._frozen = False
            for name in self._CONSTANTS:
                delattr(self, name)

    def train(self, mode: bool = True) -> SS2D:
        """Set the mode; training ends `freeze`."""
        if mode:
            self.unfreeze()
        return super().train(mode)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        self.unfreeze()
        super()._load_from_state_dict(*args, **kwargs)


def _at_least_float32(x: Tensor) -> Tensor:
    """Raise half-precision parameters to float32, as the operator takes its state matrix, skip and bias."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
