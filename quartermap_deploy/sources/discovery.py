"""One run of a module, watched: which of its modules call scans, how often, and what comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quartermap_deploy.errors import ExportError, InputError, UnsupportedScanError
from quartermap_deploy.frontend.exporter import ModuleCall
from quartermap_deploy.frontend.node_names import scan_name
from quartermap_deploy.sources.description import SourceBlock
from quartermap_deploy.sources.signature import Signature

FLOAT32_ERROR = 1e-2
"""Largest difference of a module in float64 from itself in float32, as a share of the largest value, that may be
rounding."""


@dataclass(frozen=True)
class ScanSite:
    """One call of a scan in a run of a module.

    Attributes:
        name: as the graph names it: its block, the call of the block, and its place in that.
        block: number of its block.
        length: steps L of the sequence.
        groups: directions K, or groups of channels with a B and C of their own.
        channels: of all groups, K·d.
        d_state: size N of the state of each channel.
    """

    name: str
    block: int
    length: int
    groups: int
    channels: int
    d_state: int


@dataclass(frozen=True, eq=False)
class Discovery:
    """What one run of a module showed.

    Attributes:
        blocks: the modules that call scans.
        calls: their calls, in the order of the run.
        sites: the scans, in the order of the run.
        outputs: what came out, by name.
        deterministic: whether a second run gave the same.
        random: an operator that draws random numbers, or None.
        float64: whether it computes the same in float64, so that its own rounding can be kept out of comparisons.
    """

    blocks: tuple[SourceBlock, ...]
    calls: tuple[ModuleCall, ...]
    sites: tuple[ScanSite, ...]
    outputs: Mapping[str, Tensor]
    deterministic: bool
    random: str | None
    float64: bool


def discover(
    module: nn.Module,
    feeds: Mapping[str, Tensor],
    signature: Signature,
    running: Callable[[], AbstractContextManager[Any]],
    stages: tuple[int, ...] | None = None,
) -> Discovery:
    """Run a module on its example inputs, and watch it.

    A block is the innermost module with parameters that calls a scan. Its stage is the number of the run of blocks of
    about one length of sequence, unless `stages` says how many blocks each stage has.

    Raises:
        ExportError: if the module raises on its example inputs, changes them, or makes no scan.
        InputError: if it returns something else than tensors, floating-point numbers that are not float32 or not
            finite, or `stages` does not fit.
    """
    watch = _Watch(module)
    before = {name: value.clone() for name, value in feeds.items()}
    try:
        with torch.no_grad(), running(), watch:
            outputs = signature.call(module, feeds)
        with torch.no_grad(), running():
            again = signature.call(module, feeds)
    except (InputError, UnsupportedScanError):
        raise
    except Exception as error:
        shapes = ", ".join(f"{name} {tuple(value.shape)} {value.dtype}" for name, value in feeds.items())
        raise ExportError(
            f"the module {type(module).__name__} fails on its example inputs ({shapes}): "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; give inputs of the shapes that it takes "
            "(--example 1x3x224x224, or several as name=1x3x64x64)"
        ) from error
    changed = [name for name, value in feeds.items() if not _equal(value, before[name])]
    if changed:
        raise ExportError(
            f"the module {type(module).__name__} changes its input {changed[0]!r} in place, which a graph cannot; let "
            f"its forward begin with a copy, {changed[0]} = {changed[0]}.clone()"
        )
    for name, value in outputs.items():
        if value.is_complex() or (value.is_floating_point() and value.dtype != torch.float32):
            raise InputError(
                f"the module returns {name!r} in {str(value.dtype).removeprefix('torch.')}; expected float32 for what "
                "is no whole number, as the graph is in float32: return it with .float() from a small module around it"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(
                f"the module returns {name!r} with NaN or infinite values on its example inputs, so nothing can be "
                "compared; give inputs and weights for which its outputs are numbers"
            )
    if not watch.found:
        raise ExportError(
            f"the module {type(module).__name__} makes no selective scan that is known here. If it has one, name it: "
            'scans={"package.module:function": adapter} (docs/your-own-model.md); if it has none, torch.onnx.export '
            "is all that it needs"
        )
    same = outputs.keys() == again.keys() and all(_equal(outputs[name], again[name]) for name in outputs)
    float64 = same and _computes_in_float64(module, feeds, signature, running, outputs)
    return _described(module, watch, outputs, same, float64, stages)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same; NaN is like NaN."""
    return torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


def _described(
    module: nn.Module,
    watch: _Watch,
    outputs: Mapping[str, Tensor],
    deterministic: bool,
    float64: bool,
    stages: tuple[int, ...] | None,
) -> Discovery:
    paths = list(dict.fromkeys(scan.path for scan in watch.found))
    lengths = [next(scan.length for scan in watch.found if scan.path == path) for path in paths]
    stage_of = _given_stages(stages, len(paths)) if stages is not None else _stages(lengths)
    modules = dict(module.named_modules(remove_duplicate=False))
    calls: list[ModuleCall] = []
    sites: list[ScanSite] = []
    for path, number in dict.fromkeys((scan.path, scan.call) for scan in watch.found):
        own = [scan for scan in watch.found if (scan.path, scan.call) == (path, number)]
        index = paths.index(path) + 1
        # Calls that make no scan are none of the block's; those that do are counted by themselves.
        count = sum(call.path == path for call in calls) + 1
        calls.append(ModuleCall(index, path, modules[path], count, len(own)))
        sites += [
            ScanSite(
                scan_name(index, count, place), index, scan.length, scan.groups, scan.channels, scan.d_state
            )
            for place, scan in enumerate(own, start=1)
        ]
    blocks = tuple(
        SourceBlock(index, stage, path, path, sum(call.path == path for call in calls))
        for index, (path, stage) in enumerate(zip(paths, stage_of, strict=True), start=1)
    )
    return Discovery(blocks, tuple(calls), tuple(sites), dict(outputs), deterministic, watch.random, float64)


def _computes_in_float64(
    module: nn.Module,
    feeds: Mapping[str, Tensor],
    signature: Signature,
    running: Callable[[], AbstractContextManager[Any]],
    outputs: Mapping[str, Tensor],
) -> bool:
    """Whether a module takes float64 throughout; code that calls `.float()` on the way to its next layer does not."""
    try:
        wide = copy.deepcopy(module).double()
        given = {
            name: value.double() if value.is_floating_point() else value for name, value in feeds.items()
        }
        with torch.no_grad(), running():
            found = signature.call(wide, given)
    except Exception:
        return False
    return all(
        found[name].shape == value.shape
        and (not value.is_floating_point() or found[name].dtype == torch.float64)
        and float((found[name].double() - value.double()).abs().max())
        <= FLOAT32_ERROR * float(value.double().abs().max())
        for name, value in outputs.items()
    )


def _stages(lengths: list[int]) -> list[int]:
    """A stage for each run of blocks whose sequences have about one length.

    Windows that are padded and class tokens change a length a little; going down or up to another map halves or doubles
    it at least.
    """
    found: list[int] = []
    stage, first = 0, 0
    for length in lengths:
        if stage == 0 or max(length, first) >= 2 * min(length, first):
            stage, first = stage + 1, length
        found.append(stage)
    return found


def _given_stages(stages: tuple[int, ...], blocks: int) -> list[int]:
    if sum(stages) != blocks:
        raise InputError(
            f"stages = {list(stages)} are for {sum(stages)} blocks, but the modules that call scans are {blocks}"
        )
    return [stage for stage, count in enumerate(stages, start=1) for _ in range(count)]


@dataclass(frozen=True)
class _Found:
    """A scan that was seen: its module, which call of it, and the sizes of the sequence."""

    path: str
    call: int
    length: int
    groups: int
    channels: int
    d_state: int


class _Watch(TorchDispatchMode):
    """While open, the scans that a module makes are noted with the module that makes them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[_Found] = []
        self.random: str | None = None
        self._running: list[tuple[str, int]] = []
        self._calls: dict[str, int] = {}
        self._handles: list[Any] = []
        for path, own in module.named_modules():
            # A module without parameters of its own only spells the scan; the block is what holds its parameters.
            if next(own.parameters(), None) is None and path:
                continue
            self._handles += [
                own.register_forward_pre_hook(self._enter(path)),
                own.register_forward_hook(self._leave),
            ]

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._calls[path] = self._calls.get(path, 0) + 1
            self._running.append((path, self._calls[path]))

        return hook

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.quartermap.selective_scan.default:
            path, call = self._running[-1]
            _, channels, length = args[0].shape
            self.found.append(_Found(path, call, length, args[3].shape[1], channels, args[2].shape[1]))
        elif torch.Tag.nondeterministic_seeded in getattr(function, "tags", ()):
            self.random = self.random or str(function)
        return function(*args, **(kwargs or {}))
