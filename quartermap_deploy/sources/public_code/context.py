"""`public_code()`: public models import, run and export here as they are, without CUDA and without mamba-ssm.

    with qm.public_code():
        from models.vmamba import VSSM      # imports selective_scan_cuda_oflex, triton, mamba_ssm, …
        model = VSSM().eval()
    with qm.public_code(model):
        logits = model(images)              # every scan is torch.ops.quartermap.selective_scan

Packages that are missing are stood in for, and those that are there are redirected, both inside the block alone.
Afterwards `sys.modules`, `sys.meta_path`, all functions and all globals are what they were, also after an exception.
Code that was imported in a block keeps what it imported.

Blocks may be nested, and opened again. What they change belongs to the process: while any thread has a block open, all
threads see redirected scans, and the last block to close takes it back. Only that CUDA becomes the CPU holds for one
thread: the one that opened the block.
"""

from __future__ import annotations

import builtins
import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn

from quartermap_deploy.sources.public_code import imports, redirect, stand_ins
from quartermap_deploy.sources.public_code.on_cpu import Device, OnCPU
from quartermap_deploy.sources.public_code.patches import Item, Patches


@dataclass(eq=False)
class PublicCode:
    """What an open `public_code` block did.

    Attributes:
        redirected: functions and kernels that lead to our operator in the block, by their full names.
        supplied: modules that were missing or could not be loaded, and that the block has imported, by name.
    """

    redirected: list[str] = field(default_factory=list)
    supplied: list[str] = field(default_factory=list)


class _State:
    """What all open blocks share."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.patches = Patches()
        self.open: list[PublicCode] = []
        self.supplier = imports.Supplier(self.supplied)
        self.watcher = imports.Watcher(self.loaded, self.supplied)
        # Modules that were imported in a block: their functions are redirected in later blocks, too.
        self.seen: weakref.WeakValueDictionary[str, ModuleType] = weakref.WeakValueDictionary()

    def install(self) -> None:
        """Open the first block."""
        sys.meta_path.insert(0, self.watcher)
        sys.meta_path.append(self.supplier)
        if (importer := imports.triton_importer(builtins.__import__)) is not None:
            self.patches.put(self, Item(vars(builtins), "__import__"), importer)
        self.patches.put(self, Item(vars(torch.cuda), "device"), Device)

    def uninstall(self) -> None:
        """Close the last block."""
        for finder in (self.watcher, self.supplier):
            with contextlib.suppress(ValueError):
                sys.meta_path.remove(finder)
        self.patches.release(self)
        imports.forget_stand_ins()

    def supplied(self, name: str) -> None:
        """Note that a module that is missing was asked for."""
        for block in list(self.open):
            if name not in block.supplied:
                block.supplied.append(name)

    def loaded(self, module: ModuleType) -> None:
        """Look through a module that has just been imported."""
        with self.lock:
            self.seen[module.__name__] = module
            if self.open:
                self.look_through(self, module, self.open[-1].redirected)

    def look_through(self, owner: object, module: ModuleType, found: list[str]) -> None:
        """Redirect what a module holds."""
        if imports.is_stand_in(module):
            return
        if stand_ins.is_extension(module.__name__):
            redirect.redirect_extension(self.patches, owner, module, found)
        else:
            redirect.redirect_namespace(self.patches, owner, vars(module), found)


_state = _State()


@contextlib.contextmanager
def public_code(
    model: nn.Module | None = None, scans: Mapping[str, Callable[..., Any]] | None = None
) -> Iterator[PublicCode]:
    """Let public code import and run on this machine, with its selective scans as our operator.

    Without a model, what is imported in a block is redirected as it is loaded, in this block and in later ones, and so
    are mamba-ssm and its like where they are loaded. With one, all code that the model is made of is redirected: every
    function that takes (u, delta, A, B, C, …), and names that a failed import left undefined are supplied.

    Args:
        model: the model that will run in the block, made in this block, an earlier one or none.
        scans: for scans that we do not know, `{"package.module:function": adapter}`. The adapter takes the arguments of
            the function and returns the tensor that it would, made by `quartermap_deploy.selective_scan`. A class that
            derives from `torch.autograd.Function` may be named as well; its adapter does not get the context.

    Yields:
        What was redirected and supplied; more is added as the block imports.

    Raises:
        UnknownNameError: if `scans` names a module or function that is not there.
        UnsupportedScanError: inside the block, when the model asks for what the operator cannot express.
    """
    owner, block = object(), PublicCode()
    with _state.lock:
        if not _state.open:
            _state.install()
        _state.open.append(block)
    try:
        named = [(redirect.find_scan(path, adapter), adapter) for path, adapter in (scans or {}).items()]
        with _state.lock:
            _enter(owner, block, model)
            for scan, adapter in named:
                redirect.redirect_named(_state.patches, owner, scan, adapter, block.redirected)
        with OnCPU():
            yield block
    finally:
        with _state.lock:
            _state.patches.release(owner)
            _state.open.remove(block)
            if not _state.open:
                _state.uninstall()


def _enter(owner: object, block: PublicCode, model: nn.Module | None) -> None:
    known = {
        name: module
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and stand_ins.of_scan_package(name)
    }
    for module in {**known, **_state.seen}.values():
        _state.look_through(owner, module, block.redirected)
    if model is not None:
        for space in redirect.own_namespaces(model):
            redirect.redirect_namespace(_state.patches, owner, space, block.redirected)
            redirect.supply_globals(_state.patches, owner, space, block.redirected)
