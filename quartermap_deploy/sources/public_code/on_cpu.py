"""Code that asks for CUDA gets the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class OnCPU(TorchFunctionMode):
    """`x.cuda()` is x, and a device named "cuda" is the CPU, in the thread that opened this.

    Networks are written for one machine: `torch.empty(…).cuda()` stands in the middle of a forward pass.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch with its devices changed."""
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


class Device(torch.cuda.device):
    """`torch.cuda.device` that does nothing for what is on no GPU: public code names that of its input."""

    def __init__(self, device: Any) -> None:
        kind = device.type if isinstance(device, torch.device) else device
        self._real = torch.cuda.is_available() and kind not in (None, "cpu")
        if self._real:
            super().__init__(device)

    def __enter__(self) -> None:
        if self._real:
            super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        if self._real:
            super().__exit__(*error)
