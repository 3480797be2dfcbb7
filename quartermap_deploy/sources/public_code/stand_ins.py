"""What stands in for which module of mamba-ssm, causal-conv1d and the CUDA extensions of the selective scan.

`contents(name)` gives the names that a module holds. Two kinds of scan kernels exist in public code: mamba-ssm's has a
gate, `fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus)`; VMamba's and all made from it have none, and numbers
that tune them or choose the type of the result at the end.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quartermap_deploy.scan.definition import DIRECTIONS, cross_merge, cross_scan
from quartermap_deploy.sources.public_code import scans
from quartermap_deploy.sources.public_code.layers import Mamba, RMSNorm, layer_norm, rms_norm

PACKAGES = ("mamba_ssm", "causal_conv1d", "causal_conv1d_cuda", "selective_scan")
"""The packages that are replaced or redirected wherever they are installed; the extensions come in addition."""

_EXTENSION = re.compile(r"(.*\.)?(selective_scan_cuda\w*)")
_SCAN_PACKAGE = re.compile(r"selective_scan(_\w+)?")


def is_extension(name: str) -> bool:
    """Return whether a module is a CUDA extension that scans, by its name; some packages hold one."""
    return _EXTENSION.fullmatch(name) is not None or name == "causal_conv1d_cuda"


@functools.lru_cache(maxsize=16_384)  # asked of every loaded module at the start of every block
def of_scan_package(name: str) -> bool:
    """Return whether a module belongs to one of the packages whose functions we know, or is an extension."""
    return name.split(".")[0] in PACKAGES or is_extension(name)


# Kernels --------------------------------------------------------------------------------------------------------


def _unset(u: Tensor, A: Tensor) -> Tensor:
    """What a kernel returns beside its result: states, which nothing here may read, hence not a number."""
    return u.new_full((u.shape[0], u.shape[1], 1, 2 * A.shape[-1]), float("nan"))


def kernel_with_gate(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """mamba-ssm's kernel → [y, states] or, with a gate, [y, states, gated y]."""
    y = scans.selective_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    return [y, _unset(u, A)] if z is None else [y, _unset(u, A), y * functional.silu(z)]


def kernel_without_gate(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    nrows: int = 1,
    out_float: bool = False,
    *rest: Any,
) -> list[Tensor]:
    """VMamba's kernels → [y, states]; `out_float` gives float32 for input in 16 bits."""
    if rest:
        scans.refuse(f"the fwd of a CUDA extension with {10 + len(rest)} arguments", "10 of them are known")
    y = scans.selective_scan(
        u, delta, A, B, C, D, None, delta_bias, delta_softplus, float_output=bool(out_float)
    )
    return [y, _unset(u, A)]


def kernel_without_states(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any, **keywords: Any
) -> list[Tensor]:
    """VMamba's kernel for one state, whose A is (channels) and B and C (batch, K, L)."""
    if A.dim() == 1:
        A, B, C = A.unsqueeze(1), B.unsqueeze(2), C.unsqueeze(2)
    return kernel_without_gate(u, delta, A, B, C, *rest, **keywords)


def convolution_kernel(x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
    """causal-conv1d's kernel: states come between bias and activation, more with every version."""
    if any(isinstance(item, Tensor) for item in rest):
        scans.refuse("causal_conv1d_fwd with states", "a compiled model keeps nothing between its calls")
    silu = any(item is True for item in rest)
    return scans.causal_conv1d(x, weight, bias, activation="silu" if silu else None)


def _refused(name: str, why: str) -> Callable[..., Any]:
    def refused(*arguments: Any, **keywords: Any) -> Any:
        scans.refuse(name, why)

    refused.__name__ = refused.__qualname__ = name.rpartition(".")[2]
    return refused


def no_gradients(what: str) -> Callable[..., Any]:
    """Return a function that refuses to compute gradients."""
    return _refused(what, _TRAINING)


_STATES = "a compiled model keeps no state between its calls"
_TRAINING = "it is for inference; train where the extensions are installed"


def _extension(name: str) -> dict[str, Any]:
    if name == "causal_conv1d_cuda":
        return {
            "causal_conv1d_fwd": convolution_kernel,
            "causal_conv1d_bwd": no_gradients("causal_conv1d_cuda.causal_conv1d_bwd"),
            "causal_conv1d_update": _refused("causal_conv1d_cuda.causal_conv1d_update", _STATES),
        }
    kernel: Callable[..., Any] = kernel_without_gate
    if name == "selective_scan_cuda":
        kernel = kernel_with_gate
    elif name.endswith("_ndstate"):
        kernel = kernel_without_states
    return {"fwd": kernel, "bwd": no_gradients(f"{name}.bwd")}


# Modules --------------------------------------------------------------------------------------------------------

_MAMBA2 = "Mamba-2 is another recurrence than the selective scan"

_SCANS: dict[str, Callable[..., Any]] = {
    "selective_scan_fn": scans.selective_scan,
    "selective_scan_ref": scans.selective_scan,
    "mamba_inner_fn": scans.mamba_inner,
    "mamba_inner_ref": scans.mamba_inner,
    "mamba_inner_fn_no_out_proj": scans.mamba_inner_no_projection,
    "bimamba_inner_fn": scans.bimamba_inner,
    "bimamba_inner_ref": scans.bimamba_inner,
}
_NORMS: dict[str, Callable[..., Any]] = {
    "layer_norm_fn": layer_norm,
    "layer_norm_ref": layer_norm,
    "rms_norm_fn": rms_norm,
    "rms_norm_ref": rms_norm,
}
_GROUPED = {
    "selective_scan_fn": scans.selective_scan_grouped,
    "selective_scan_ref": scans.selective_scan_grouped,
}
_MODULES: dict[str, Mapping[str, Any]] = {
    "mamba_ssm": {**_SCANS, "Mamba": Mamba, "Mamba2": _refused("mamba_ssm.Mamba2", _MAMBA2)},
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba_simple": {"Mamba": Mamba},
    "mamba_ssm.modules.mamba2": {"Mamba2": _refused("mamba_ssm.modules.mamba2.Mamba2", _MAMBA2)},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": _SCANS,
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layer_norm": {**_NORMS, "RMSNorm": RMSNorm},
    "mamba_ssm.ops.triton.layernorm": {**_NORMS, "RMSNorm": RMSNorm},
    "mamba_ssm.ops.triton.selective_state_update": {
        "selective_state_update": _refused("selective_state_update", _STATES)
    },
    "mamba_ssm.ops.triton.ssd_combined": {
        name: _refused(f"mamba_ssm.ops.triton.ssd_combined.{name}", _MAMBA2)
        for name in ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")
    },
    # Language models alone use these, but Vision Mamba imports them, and they want the package transformers.
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": {
        "GenerationMixin": type("GenerationMixin", (), {"__module__": "mamba_ssm.utils.generation"})
    },
    "mamba_ssm.utils.hf": {
        name: _refused(f"mamba_ssm.utils.hf.{name}", "it is for language models")
        for name in ("load_config_hf", "load_state_dict_hf")
    },
    "causal_conv1d": {
        "causal_conv1d_fn": scans.causal_conv1d,
        "causal_conv1d_update": _refused("causal_conv1d_update", _STATES),
    },
    "causal_conv1d.causal_conv1d_interface": {
        "causal_conv1d_fn": scans.causal_conv1d,
        "causal_conv1d_ref": scans.causal_conv1d,
        "causal_conv1d_update": _refused("causal_conv1d_update", _STATES),
    },
    "causal_conv1d.cpp_functions": {
        "causal_conv1d_fwd_function": scans.causal_conv1d_forward,
        "causal_conv1d_bwd_function": no_gradients("causal_conv1d_bwd_function"),
        "causal_conv1d_update_function": _refused("causal_conv1d_update_function", _STATES),
    },
}


def contents(name: str) -> Mapping[str, Any] | None:
    """Return what stands in a module's place, by name, or None if nothing stands in for it."""
    if name in _MODULES:
        return _MODULES[name]
    if is_extension(name):
        return _extension(name)
    return _GROUPED if _SCAN_PACKAGE.fullmatch(name) else None


def _scanned_each(maps: Tensor) -> Tensor:
    """(batch, 4, channels, H, W), a map for each direction → (batch, 4, channels, H·W)."""
    return torch.cat([cross_scan(maps[:, k], (name,)) for k, name in enumerate(DIRECTIONS)], dim=1)


def _merged(sequences: Tensor) -> Tensor:
    """(batch, 4, channels, H, W), where H and W only tell the size → (batch, channels, H·W)."""
    height, width = sequences.shape[3:]
    return cross_merge(sequences.flatten(3), height, width).flatten(2)


AUTOGRAD: Mapping[str, Callable[..., Tensor]] = {
    "CrossScanTriton": cross_scan,
    "CrossScanTriton1b1": _scanned_each,
    "CrossMergeTriton": _merged,
}
"""The autograd functions of VMamba and its forks that unroll and merge maps by Triton kernels, by name."""

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{name: value for name, value in (_SCANS | _NORMS).items() if not name.endswith("_ref")},
    "causal_conv1d_fn": scans.causal_conv1d,
    "causal_conv1d_fwd_function": scans.causal_conv1d_forward,
}
"""The functions that are redirected by their names where they are loaded; references run as they are, or are scans."""

GLOBALS: Mapping[str, Any] = {
    **_SCANS,
    **_NORMS,
    "RMSNorm": RMSNorm,
    "selective_scan_fn_v1": scans.selective_scan_grouped,
    "selective_scan_ref_v1": scans.selective_scan_grouped,
    "causal_conv1d_fn": scans.causal_conv1d,
    "Mamba": Mamba,
}
"""The names that public code uses for what failed to import; the extensions come in addition."""
