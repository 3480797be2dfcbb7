"""Names of nodes that say where in the model a node comes from: its block, and its module by the checkpoint's name."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quartermap_deploy.architectures.base import Block

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter writes a node's modules, from the outermost to the innermost, and then the node's own name."""


def block_output(index: int) -> str:
    """Name of the value that leaves block `index`."""
    return f"block_{index}"


def scan_name(index: int) -> str:
    """Name of the scan node of block `index`."""
    return f"{block_output(index)}/scan"


def read_scopes(text: str | None) -> tuple[str, ...]:
    """The paths of the modules that a node is in, outermost first, as "layers.0.blocks.1"; empty if none is told."""
    scopes = ast.literal_eval(text) if text else []
    return tuple(scope for scope in scopes[:-1] if scope)


def place(scopes: Sequence[str], blocks: Iterable[Block]) -> str:
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
        if innermost.startswith(f"{block.path}."):
            return f"{block_output(block.index)}/{innermost[len(block.path) + 1 :]}/"
    return f"{innermost}/"
