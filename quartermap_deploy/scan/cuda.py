"""The CUDA kernels as the CUDA implementation of the torch operator `quartermap::selective_scan_2d`.

    enable_cuda_kernels("build/libquartermap_kernels.so")
    y = selective_scan_2d(x, ...)                                # tensors on a GPU: the kernel; on the CPU: as before

The library is called through its C interface with the addresses of the tensors and torch's current stream, so it need
not be built against torch, and neither mamba-ssm nor a compiler is needed where it runs. Gradients come from the
vectorised PyTorch code, as before.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.native.contract import CONTRACT, ELEMENT_TYPES, KERNELS
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.native.library import describe, load

if TYPE_CHECKING:
    from torch import Tensor

MOST_DIRECTIONS = 8
ALIGNMENT = 16
"""Bytes; the kernels read and write as much at once."""

GENERAL, RESIDENT, SPLIT, STREAMED = range(4)
"""`QuartermapKernels` of selective_scan.h: which kernels carry a plan out."""


class Scan(ctypes.Structure):
    """`QuartermapScan` of selective_scan.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "d_inner", "height", "width", "d_state", "dt_rank")),
        ("direction_count", ctypes.c_int32),
        ("directions", ctypes.c_int32 * MOST_DIRECTIONS),
        ("softplus", ctypes.c_int32),
        ("element_type", ctypes.c_int32),
    )


class Plan(ctypes.Structure):
    """`QuartermapScanPlan` of selective_scan.h."""

    _fields_ = (
        ("scan", Scan),
        ("blocks", ctypes.c_int64),
        *(
            (name, ctypes.c_int32)
            for name in ("threads", "channels", "chunk", "shared_bytes", "resident", "kernels")
        ),
        ("layout", ctypes.c_int32 * 32),
        ("workspace_bytes", ctypes.c_uint64),
    )


TENSORS = ("x", "dt", "B", "C", "A", "D", "dt_bias", "dt_weight", "y", "workspace")


class Tensors(ctypes.Structure):
    """`QuartermapScanTensors` of selective_scan.h."""

    _fields_ = (*((name, ctypes.c_void_p) for name in TENSORS), ("workspace_bytes", ctypes.c_uint64))


class Kernels:
    """The C interface of a loaded library.

    Args:
        path: a library that `quartermap plugin build` made, with or without `--kernels-only`.

    Raises:
        PluginError: if it cannot be loaded, or its interface is of another version.
    """

    def __init__(self, path: Path) -> None:
        library = load(path)
        found = describe(library, path)
        if found.get("kernels") != KERNELS:
            raise PluginError(
                f"the kernels of {path} have interface version {found.get('kernels')}, this package needs {KERNELS}; "
                "build them anew: quartermap plugin build"
            )
        self.emulated = found.get("build", {}).get("cuda") is None
        self._library = library
        library.quartermap_selective_scan_message.restype = ctypes.c_char_p
        library.quartermap_selective_scan_message.argtypes = (ctypes.c_int32,)
        library.quartermap_selective_scan_workspace.restype = ctypes.c_uint64
        pointer = ctypes.POINTER
        library.quartermap_selective_scan_workspace.argtypes = (pointer(Scan),)
        library.quartermap_selective_scan_validate.argtypes = (pointer(Scan),)
        library.quartermap_selective_scan_plan.argtypes = (pointer(Scan), pointer(Plan))
        library.quartermap_selective_scan_plan_for.argtypes = (
            pointer(Scan),
            ctypes.c_int32,
            ctypes.c_int64,
            ctypes.c_int64,
            pointer(Plan),
        )
        library.quartermap_selective_scan_prepare.argtypes = (pointer(Plan),)
        library.quartermap_selective_scan_launch.argtypes = (pointer(Plan), pointer(Tensors), ctypes.c_void_p)
        # Planning is a search; a model asks for the same few shapes at every call. The device is part of the key.
        self._plan = functools.lru_cache(maxsize=256)(self._make_plan)

    def message(self, status: int) -> str:
        """Return the library's words for a status."""
        text: bytes = self._library.quartermap_selective_scan_message(status)
        return text.decode()

    def check(self, status: int) -> None:
        """Raise if a status is no success.

        Raises:
            PluginError: with the library's words.
        """
        if status != 0:
            raise PluginError(f"selective scan: {self.message(status)}")

    def plan(
        self,
        sizes: Sequence[int],
        directions: Sequence[str],
        softplus: bool,
        element_type: str,
        device: int = -1,
    ) -> Plan:
        """Divide a scan for the current device, and make the device ready for its launches; done once for each scan.

        The first call for a scan may allocate memory on the device and wait for it, so make it outside the capture of a
        CUDA graph.

        Args:
            sizes: batch, d_inner, H, W, N and R.
            directions: names of the K scan orders.
            softplus: whether softplus is applied to the time step.
            element_type: of the feature maps.
            device: number of the current device; a plan is kept for each.

        Raises:
            PluginError: if the library refuses the sizes, there is no device, or the library holds no code for it.
        """
        return self._plan(tuple(sizes), tuple(directions), softplus, element_type, device)

    def _make_plan(
        self,
        sizes: tuple[int, ...],
        directions: tuple[str, ...],
        softplus: bool,
        element_type: str,
        device: int,
    ) -> Plan:
        plan = Plan()
        scan = make_scan(sizes, directions, softplus, element_type)
        self.check(self._library.quartermap_selective_scan_plan(scan, plan))
        self.prepare(plan)
        return plan

    def plan_for(
        self, scan: Scan, multiprocessors: int, shared_per_block: int, shared_per_multiprocessor: int
    ) -> Plan:
        """Divide a scan for a device with these properties; needs none. `prepare` the plan before its first launch.

        Raises:
            PluginError: if the scan is refused.
        """
        plan = Plan()
        self.check(
            self._library.quartermap_selective_scan_plan_for(
                scan, multiprocessors, shared_per_block, shared_per_multiprocessor, plan
            )
        )
        return plan

    def prepare(self, plan: Plan) -> None:
        """Load the kernel of a plan onto the current device.

        Raises:
            PluginError: if there is no device, or the library holds no code for it.
        """
        self.check(self._library.quartermap_selective_scan_prepare(plan))

    def launch(self, plan: Plan, tensors: Tensors, stream: int | None) -> None:
        """Put the kernels of a prepared plan on a stream.

        Raises:
            PluginError: if it could not be launched.
        """
        self.check(self._library.quartermap_selective_scan_launch(plan, tensors, stream))

    def scan_2d(
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
        plan: Plan | None = None,
    ) -> Tensor:
        """Compute `scan.operators.selective_scan_2d` with the kernel, on the current stream of x's device.

        Args:
            x: (batch, d_inner, H, W), and the others as there.
            dt: the time-step map.
            B: the input matrix.
            C: the output matrix.
            A: the state matrix.
            D: the skip weight.
            dt_bias: the bias of the time step.
            dt_weight: the projection of the time step, or None.
            directions: names of the K scan orders.
            softplus: whether softplus is applied to the time step.
            plan: how the launch is divided, prepared, for tests; None lets the library decide.

        Returns:
            y, (batch, d_inner, H, W), of x's element type; empty, without a launch, if x is.

        Raises:
            PluginError: if the element type, the sizes or the devices of the tensors do not fit.
        """
        import torch

        element_type = str(x.dtype).removeprefix("torch.")
        if element_type not in ELEMENT_TYPES:
            raise PluginError(
                f"selective scan: the kernels take {', '.join(ELEMENT_TYPES)}, not {element_type}"
            )
        maps = [_placed(tensor, x.dtype) for tensor in (x, dt, B, C)]
        parameters = [_placed(tensor, torch.float32) for tensor in (A, D, dt_bias)]
        weight = None if dt_weight is None else _placed(dt_weight, x.dtype)
        tensors = [*maps, *parameters, *([] if weight is None else [weight])]
        if any(tensor.device != x.device for tensor in tensors):
            raise PluginError(f"selective scan: all tensors have to lie on {x.device}, where x lies")
        rank = 0 if weight is None else weight.shape[1]
        _check_shapes(tensors, directions, rank)
        y = torch.empty_like(maps[0])
        if y.numel() == 0:
            return y
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            sizes = (*x.shape, A.shape[1], rank)
            number = x.device.index if x.is_cuda else -1
            plan = plan or self.plan(sizes, directions, softplus, element_type, number)
            workspace = torch.empty(int(plan.workspace_bytes), dtype=torch.uint8, device=x.device)
            values = [*maps, *parameters, weight, y, workspace]
            pointers = [None if tensor is None else tensor.data_ptr() for tensor in values]
            stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
            self.launch(plan, Tensors(*pointers, plan.workspace_bytes), stream)
        return y


def _placed(tensor: Tensor, dtype: Any) -> Tensor:
    """Return a tensor of this type, contiguous, from a multiple of 16 bytes on: a copy where it is not."""
    found = tensor.to(dtype).contiguous()
    return found if found.data_ptr() % ALIGNMENT == 0 else found.clone()


def make_scan(sizes: Sequence[int], directions: Sequence[str], softplus: bool, element_type: str) -> Scan:
    """Return the C structure of a scan.

    Args:
        sizes: batch, d_inner, H, W, N and R.
        directions: names of the K scan orders.
        softplus: whether softplus is applied to the time step.
        element_type: of the feature maps.

    Raises:
        PluginError: if there are too many directions or one is unknown.
    """
    if len(directions) > MOST_DIRECTIONS or any(name not in CONTRACT.directions for name in directions):
        raise PluginError(
            f"selective scan: directions {list(directions)}; expected at most {MOST_DIRECTIONS} out of "
            f"{', '.join(CONTRACT.directions)}"
        )
    numbers = [CONTRACT.directions.index(name) for name in directions]
    return Scan(
        *sizes,
        len(numbers),
        (ctypes.c_int32 * MOST_DIRECTIONS)(*numbers),
        int(softplus),
        ELEMENT_TYPES.index(element_type),
    )


def _check_shapes(tensors: Sequence[Tensor], directions: Sequence[str], rank: int) -> None:
    """Compare every shape with x's: the kernel believes them, and would read past the end of a short tensor."""
    batch, d_inner, height, width = tensors[0].shape
    count, states = len(directions), tensors[4].shape[-1]
    wide = count * d_inner
    expected = [
        (batch, d_inner, height, width),
        (batch, count * rank if rank else wide, height, width),
        (batch, count * states, height, width),
        (batch, count * states, height, width),
        (wide, states),
        (wide,),
        (wide,),
        (wide, rank),
    ]
    for entry, tensor, shape in zip(CONTRACT.inputs, tensors, expected, strict=False):
        if tuple(tensor.shape) != shape:
            raise PluginError(f"selective scan: {entry.name} is {tuple(tensor.shape)}; expected {shape}")


_registered: list[Any] = []


def enable_cuda_kernels(path: str | Path) -> Kernels:
    """Make a library's kernels the CUDA implementation of `quartermap::selective_scan_2d` in this process.

    float64 tensors on a GPU go on through the PyTorch code.

    Args:
        path: a library that `quartermap plugin build` made.

    Returns:
        The library's C interface.

    Raises:
        PluginError: if it cannot be loaded, its interface is of another version, or PyTorch finds no GPU.
    """
    kernels = Kernels(Path(path))
    if kernels.emulated:
        raise PluginError(f"{path} holds kernels for tests on a CPU; build without emulation")
    import torch

    if not torch.cuda.is_available():
        raise PluginError(
            f"PyTorch {torch.__version__} finds no GPU, and the kernels run on nothing else; install a build for CUDA, "
            "and see whether `nvidia-smi` answers"
        )
    from quartermap_deploy.scan import operators
    from quartermap_deploy.scan.vectorized import selective_scan_2d_vectorized

    def cuda(
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
        tensors = (x, dt, B, C, A, D, dt_bias, dt_weight)
        names = directions.split(",")
        if str(x.dtype).removeprefix("torch.") not in ELEMENT_TYPES:
            return selective_scan_2d_vectorized(*tensors, names, softplus).contiguous()
        return kernels.scan_2d(*tensors, names, softplus)

    operators._selective_scan_2d.register_kernel("cuda")(cuda)
    _registered[:] = [kernels]
    return kernels
