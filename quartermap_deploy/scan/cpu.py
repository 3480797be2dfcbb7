"""The kernels for CPUs behind the torch operators, where a library of them is built: forward, in 16 and 32 bits.

The library is called with the addresses of the tensors, so it need not be built against torch. Each function returns
None where the kernels do not fit or are not there; the vectorised form then computes the same, or says what is wrong
with the shapes.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from quartermap_deploy.native.cpu_kernels import CpuKernels, Sizes, make_scan
from quartermap_deploy.native.cpu_library import find_cpu_library
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.scan.definition import DIRECTIONS

TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
"""Element types of x that the kernels take as they are; float64 has to be computed in float64."""

Shapes = Mapping[str, tuple[int, ...]]
_allowed = contextvars.ContextVar("_allowed", default=True)


@functools.cache
def kernels() -> CpuKernels | None:
    """Return the kernels of the library that this process uses, or None where there is none; looked for once."""
    found = find_cpu_library().library
    return None if found is None else CpuKernels.load(found.path)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """While open, the torch operators compute by PyTorch's own means.

    What the kernels are compared with must not be computed by them.
    """
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def native_scan_2d(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    directions: Sequence[str],
    softplus: bool,
) -> Tensor | None:
    """Compute `scan.operators.selective_scan_2d`, whose arguments these are, with the kernels for CPUs."""
    if x.ndim != 4 or A.ndim != 2 or (dt_weight is not None and dt_weight.ndim != 2):
        return None
    batch, d_inner, height, width = x.shape
    states, rank = A.shape[1], 0 if dt_weight is None else dt_weight.shape[1]
    wide = len(directions) * d_inner
    narrow = (batch, len(directions) * states, height, width)
    shapes = {
        "x": tuple(x.shape),
        "dt": (batch, wide if dt_weight is None else len(directions) * rank, height, width),
        "B": narrow,
        "C": narrow,
        "A": (wide, states),
        "D": (wide,),
        "dt_bias": (wide,),
        "dt_weight": (wide, rank),
    }
    given = {"x": x, "dt": dt, "B": B, "C": C, "A": A, "D": D, "dt_bias": dt_bias, "dt_weight": dt_weight}
    sizes = Sizes(batch, 1, d_inner, height, width, states, rank)
    if dt_weight is not None and rank == 0:
        return None
    return _scan(sizes, given, shapes, directions, softplus)


def native_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor | None:
    """Compute `scan.operators.selective_scan`, whose arguments these are, with the kernels for CPUs."""
    if u.ndim != 3 or A.ndim != 2 or B.ndim != 4 or not B.shape[1] or u.shape[1] % B.shape[1]:
        return None
    batch, channels, length = u.shape
    groups, states = B.shape[1], A.shape[1]
    narrow = (batch, groups, states, length)
    shapes = {
        "x": tuple(u.shape),
        "dt": tuple(u.shape),
        "B": narrow,
        "C": narrow,
        "A": (channels, states),
        "D": (channels,),
        "dt_bias": (channels,),
    }
    given = {"x": u, "dt": delta, "B": B, "C": C, "A": A, "D": D, "dt_bias": delta_bias}
    sizes = Sizes(batch, groups, channels // groups, 1, length, states)
    return _scan(sizes, given, shapes, DIRECTIONS[:1], delta_softplus)


def _scan(
    sizes: Sizes,
    given: Mapping[str, Tensor | None],
    shapes: Shapes,
    directions: Sequence[str],
    softplus: bool,
) -> Tensor | None:
    """Scan tensors of these names, where all of them are as the kernels need them."""
    present = {name: tensor for name, tensor in given.items() if tensor is not None}
    x = present["x"]
    found = kernels() if _allowed.get() and x.dtype in TYPES else None
    if found is None or any(
        tensor.device.type != "cpu" or tuple(tensor.shape) != shapes[name] for name, tensor in present.items()
    ):
        return None
    maps = [tensor for name, tensor in present.items() if name not in ("A", "D", "dt_bias")]
    # Where maps are of several types, nothing may be rounded on the way in.
    dtype = x.dtype if all(tensor.dtype == x.dtype for tensor in maps) else torch.float32
    ready = {
        name: tensor.to(torch.float32 if name in ("A", "D", "dt_bias") else dtype).contiguous()
        for name, tensor in present.items()
    }
    y = torch.empty_like(ready["x"])
    addresses = {name: tensor.data_ptr() for name, tensor in ready.items()} | {"y": y.data_ptr()}
    scan = make_scan(sizes, directions, softplus, TYPES[dtype], torch.get_num_threads())
    try:
        found.scan(scan, addresses)
    except PluginError:  # too large, or no memory for it
        return None
    return y.to(x.dtype)
