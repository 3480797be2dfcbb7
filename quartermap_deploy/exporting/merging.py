"""ToMe → ONNX: a model that merges tokens, as one portable file beside the unpruned and the pruned one.

QuarterMap is carried out in the graph, by passes; ToMe is exported as PyTorch computes it. The nodes that it adds are
named after their block, `block_3/merge/…` and `block_3/unmerge/…`, and its two scans `block_3/scan/row` and
`block_3/scan/column`, so that a profile can tell them apart. A block that merges nothing has the one scan that it has
in every other export, `block_4/scan`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from quartermap_deploy.errors import ExportError
from quartermap_deploy.frontend.exporter import INPUT, OUTPUT, to_onnx
from quartermap_deploy.frontend.node_names import SCOPES, block_output, read_scopes, scan_name
from quartermap_deploy.lowering.operator import DOMAIN, ORIENTATIONS, SELECTIVE_SCAN_2D

if TYPE_CHECKING:
    import onnx

    from quartermap_deploy.architectures.base import Block, VisualStateSpaceModel

STEPS = ("merge", "unmerge")
"""Submodules of a `MergingSS2D`."""


def export_merging(model: VisualStateSpaceModel, input_shape: Sequence[int]) -> onnx.ModelProto:
    """Export a model of `evaluation.tome.merge_tokens` to ONNX: opset 20, runs in plain ONNX Runtime.

    Args:
        model: it is not changed.
        input_shape: (batch, channels, height, width); the batch is left open, height and width are fixed, because how
            many tokens are merged depends on them.

    Returns:
        The model, with input `images` and output `logits`.

    Raises:
        InputError: if the model cannot take the size.
        ExportError: if the model cannot be exported.
    """
    import onnx
    import torch

    from quartermap_deploy.passes import lower
    from quartermap_deploy.passes.shapes import infer_shapes

    model.check_input_shape(input_shape)
    prepared = copy.deepcopy(model).float().eval()
    prepared.freeze()
    # A batch of one would be burnt into the graph as a constant.
    example = torch.zeros(2, *input_shape[1:])
    exported = to_onnx(
        prepared,
        (example,),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[INPUT],
        output_names=[OUTPUT],
    )
    _name_nodes(exported, model.blocks())
    _forget_the_build(exported)
    lowered = lower(infer_shapes(exported))
    onnx.checker.check_model(lowered, full_check=True)
    return lowered


def _name_nodes(model: onnx.ModelProto, blocks: Iterable[Block]) -> None:
    """Name the nodes of merging and scanning after the block that they are in."""
    prefixes = {
        f"{block.mixer_path}.{step}": f"{block_output(block.index)}/{step}"
        for block in blocks
        for step in STEPS
    }
    names = _scan_names(blocks)
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type == SELECTIVE_SCAN_2D:
            if not names:
                raise ExportError("the model has more scans than its blocks; please report this")
            node.name = names.pop(0)
            continue
        scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), None)
        for scope in read_scopes(scopes):
            if scope in prefixes:
                node.name = f"{prefixes[scope]}/{node.name}"
                break


def _scan_names(blocks: Iterable[Block]) -> list[str]:
    """The names of the scans, in the order in which an image passes them."""
    found = []
    for block in blocks:
        merging = hasattr(block.mixer, STEPS[0])
        own = scan_name(block.index)
        found += [f"{own}/{orientation}" for orientation in ORIENTATIONS] if merging else [own]
    return found


def _forget_the_build(model: onnx.ModelProto) -> None:
    """Drop what tells about the machine that exported, and call the model's maker by its name."""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
        *model.graph.initializer,
    ):
        del value.metadata_props[:]
    model.producer_name, model.producer_version, model.doc_string = "quartermap-deploy", "", ""
    model.graph.name = "quartermap"
