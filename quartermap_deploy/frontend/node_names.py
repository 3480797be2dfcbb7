"""Names of nodes that say where in the model a node comes from: its block, and its module by the checkpoint's name.

The output of block 3 is a value named `block_3`, its scan a node named `block_3/scan`. A module that one run calls
twice is one block: what it makes the second time is `block_3/call_2`, and its scan `block_3/call_2/scan`. A block with
several scans has `block_3/scan`, `block_3/scan_2` and so on. A scan that a pass took apart by directions has their
numbers behind its name, as `block_3/scan/1`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

PART = "part"
"""Behind the name of a scan, the name of the node that takes the part of a map that it is of."""

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter writes a node's modules, from the outermost to the innermost, and then the node's own name."""

_NAME = re.compile(
    r"block_(?P<block>[1-9]\d*)(/call_(?P<call>\d+))?(?P<scan>/scan(_\d+)?(?P<direction>/\d+)?)?"
)


class Located(Protocol):
    """What has a number and a module path: a block."""

    @property
    def index(self) -> int:
        """Number of the block, from 1."""
        ...

    @property
    def path(self) -> str:
        """Path of its module."""
        ...


@dataclass(frozen=True)
class BlockName:
    """What the name of a block's output, or of its scan, says.

    Attributes:
        block: number of the block.
        call: which call of the block's module in one run of the model, from 1.
        scan: whether it is a scan.
    """

    block: int
    call: int
    scan: bool


def block_output(index: int, call: int = 1) -> str:
    """Name of the value that leaves block `index` when its module is called for the `call`-th time."""
    return f"block_{index}" if call == 1 else f"block_{index}/call_{call}"


def scan_name(index: int, call: int = 1, place: int = 1) -> str:
    """Name of the `place`-th scan in one call of block `index`."""
    return f"{block_output(index, call)}/scan" + ("" if place == 1 else f"_{place}")


def without_direction(name: str) -> str:
    """The name of the scan that a scan of one direction was taken from; every other name as it is."""
    match = _NAME.fullmatch(name)
    return name if match is None else name.removesuffix(match["direction"] or "")


def read_name(name: str) -> BlockName | None:
    """What a name says that `block_output` or `scan_name` made; None for every other name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    return BlockName(int(match["block"]), int(match["call"] or 1), match["scan"] is not None)


def names_scan(name: str) -> bool:
    """Whether a name is that of a scan, as its node has it, or the last of its nodes where it is written out."""
    own = read_name(name)
    return own is not None and own.scan


def read_scopes(text: str | None) -> tuple[str, ...]:
    """The paths of the modules that a node is in, outermost first, as "layers.0.blocks.1"; empty if none is told."""
    scopes = ast.literal_eval(text) if text else []
    return tuple(scope for scope in scopes[:-1] if scope)


def place(scopes: Sequence[str], blocks: Iterable[Located]) -> str:
    """Where a node is, as its name begins: `block_3/op.in_proj/`, `patch_embed.0/`, or nothing for the model itself.

    Args:
        scopes: the modules that it is in, outermost first.
        blocks: of the model.
    """
    if not scopes:
        return ""
    innermost = scopes[-1]
    for block in blocks:
        if innermost == block.path:
            return f"{block_output(block.index)}/"
        if block.path and innermost.startswith(f"{block.path}."):
            return f"{block_output(block.index)}/{innermost[len(block.path) + 1 :]}/"
    return f"{innermost}/"
