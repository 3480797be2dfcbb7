"""The PyTorch side of every comparison: a model that runs on named inputs, is pruned by a plan, and shows its parts.

Its parts are the outputs of its blocks, `block_<i>`, and what its scans return, `block_<i>/scan`, in the form in which
the graph has them: a scan whose directions the graph sums on the map is summed here as well, by the orders that were
read off the graph.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quartermap_deploy.frontend.node_names import block_output, scan_name
from quartermap_deploy.pruning.scan_call import PrunedScans
from quartermap_deploy.scan.cpu import without_kernels
from quartermap_deploy.sources.description import SourceBlock
from quartermap_deploy.sources.signature import Signature, as_tensors
from quartermap_deploy.tensor_info import TensorInfo

Keep = Callable[[str, Tensor], None]
"""Takes the name of a part and what it returned."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A model in PyTorch, as a plan prunes it.

    Attributes:
        module: the module, in eval mode. Modules whose scans know plans are pruned themselves.
        inputs: what it takes.
        blocks: its blocks.
        signature: how it is called.
        running: a context in which its forward runs.
        scans: how calls of one-dimensional scans are pruned and shown; None for modules that have none.
        float64: whether it can be computed in float64; else its scans alone are.
    """

    module: nn.Module
    inputs: tuple[TensorInfo, ...]
    blocks: tuple[SourceBlock, ...]
    signature: Signature
    running: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    scans: PrunedScans | None = None
    float64: bool = True
    _wide: list[nn.Module] = field(default_factory=list, repr=False)

    def run(self, feeds: Mapping[str, NDArray[Any]], *, double: bool = False) -> dict[str, NDArray[Any]]:
        """Run the model; returns its outputs by name, floating-point ones in float32.

        Args:
            feeds: inputs by name.
            double: compute in float64 where that is possible.
        """
        return self._run(feeds, double, lambda name, value: None, {})

    def run_parts(
        self,
        feeds: Mapping[str, NDArray[Any]],
        followed: Mapping[str, NDArray[Any]] | None = None,
        *,
        double: bool = False,
    ) -> dict[str, NDArray[Any]]:
        """Run the model; returns what its scans and blocks return, by name, in the order of the network.

        Args:
            feeds: inputs by name.
            double: compute in float64 where that is possible, also where nothing is followed.
            followed: what a target returned for the same inputs. Each block then gets what the target's blocks before
                it made, in float64 where that is possible, so that it is judged by itself. An output that is absent,
                has another shape or is not finite is not followed.
        """
        found: dict[str, NDArray[Any]] = {}

        def keep(name: str, value: Tensor) -> None:
            found[name] = value.float().numpy()

        self._run(feeds, double or followed is not None, keep, followed or {})
        return found

    def _run(
        self,
        feeds: Mapping[str, NDArray[Any]],
        double: bool,
        keep: Keep,
        followed: Mapping[str, NDArray[Any]],
    ) -> dict[str, NDArray[Any]]:
        tensors = as_tensors(feeds)
        module = self.module
        if double and self.float64:
            module = self._in_float64()
            tensors = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
        scans = None if self.scans is None else self.scans.at({k: tuple(v.shape) for k, v in tensors.items()})
        with (
            torch.no_grad(),
            without_kernels(),
            self.running(),
            _Parts(self, scans, module, keep, followed, double),
        ):
            outputs = self.signature.call(module, tensors)
        return {
            name: (value.float() if value.is_floating_point() else value).cpu().numpy()
            for name, value in outputs.items()
        }

    def _in_float64(self) -> nn.Module:
        if not self._wide:
            self._wide.append(copy.deepcopy(self.module).double())
        return self._wide[0]


class _Parts(TorchDispatchMode):
    """While open, what scans and blocks return is kept, blocks hand on what is followed, and scans are pruned.

    Blocks are seen by forward hooks. A scan is a call of a torch operator in the middle of its block, so it is seen
    where torch dispatches operators.
    """

    def __init__(
        self,
        reference: Reference,
        scans: PrunedScans | None,
        module: nn.Module,
        keep: Keep,
        followed: Mapping[str, NDArray[Any]],
        double: bool,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._keep, self._followed, self._double = keep, followed, double
        self._scans = scans
        self._running: list[_Call] = []
        self._sums: dict[str, Tensor] = {}
        self._calls: dict[int, int] = {}
        self._handles: list[Any] = []
        modules = dict(module.named_modules(remove_duplicate=False))
        for block in reference.blocks:
            own = modules[block.path]
            self._handles += [
                own.register_forward_pre_hook(self._enter(block.index)),
                own.register_forward_hook(self._leave(marked=bool(block.path))),
            ]

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _enter(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._calls[index] = self._calls.get(index, 0) + 1
            self._running.append(_Call(index, self._calls[index]))

        return hook

    def _leave(self, marked: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
            call = self._running.pop()
            if not marked or not isinstance(output, Tensor) or not output.is_floating_point():
                return None
            name = block_output(call.index, call.number)
            self._keep(name, output)
            other = self._followed.get(name)
            if other is None or other.shape != tuple(output.shape) or not np.isfinite(other).all():
                return None
            return torch.tensor(other, dtype=output.dtype)

        return hook

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.quartermap.selective_scan_2d.default and self._running:
            result = function(*args, **(kwargs or {}))
            self._keep(self._next_name(), result)
            return result
        if function is torch.ops.quartermap.selective_scan.default and self._running:
            name = self._next_name()
            # The scan is the part that is proved, so it is computed in float64 though the model may be float32.
            wide = [v.double() if isinstance(v, Tensor) and self._double else v for v in args]
            if self._scans is None:
                result = function(*wide)
                self._keep(name, result)
            else:
                result, parts = self._scans.run(name, function, wide, self._followed)
                for part, value in parts.items():
                    # Several scans of a module may be one of the graph.
                    self._sums[part] = self._sums[part] + value if part in self._sums else value
                    self._keep(part, self._sums[part])
            return result.to(args[0].dtype)
        return function(*args, **(kwargs or {}))

    def _next_name(self) -> str:
        call = self._running[-1]
        call.scans += 1
        return scan_name(call.index, call.number, call.scans)


@dataclass
class _Call:
    """One call of a block's module, and how many scans it has made so far."""

    index: int
    number: int
    scans: int = 0
