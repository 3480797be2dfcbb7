"""PyTorch → ONNX, by `torch.onnx.export` (dynamo): the graph as the model is, before any pass.

`to_onnx` exports any module whose scans are our torch operators; `trace` exports a model of `architectures`. There each
selective scan becomes one node `quartermap.SelectiveScan2D` named `block_<i>/scan`, still without a body, and the
output of block i is a value named `block_<i>`, which every later pass keeps, so that parity can be checked block by
block. The other nodes are named after their module, as `block_<i>/op.in_proj/node_Conv_393`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from quartermap_deploy.errors import ExportError
from quartermap_deploy.frontend.node_names import SCOPES, block_output, place, read_scopes, scan_name
from quartermap_deploy.lowering.operator import (
    DOMAIN,
    INPUTS_1D,
    INPUTS_2D,
    SELECTIVE_SCAN,
    SELECTIVE_SCAN_2D,
    VERSION,
)

if TYPE_CHECKING:
    import onnx
    import torch

    from quartermap_deploy.architectures.base import Block, VisualStateSpaceModel

OPSET = 20
IR_VERSION = 10
INPUT, OUTPUT = "images", "logits"
_MARK = "BlockOutput"


def trace(
    model: VisualStateSpaceModel,
    input_shape: Sequence[int],
    *,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
) -> onnx.ModelProto:
    """Export a model in float32, opset 20, without the bodies of its scans.

    Args:
        model: any model of `architectures`; it is not changed.
        input_shape: (batch, channels, height, width) to trace with.
        dynamic_batch: leave the batch size open.
        dynamic_size: leave height and width open.

    Raises:
        InputError: if the model cannot take the size.
        ExportError: if torch cannot export the model; the cause is chained.
    """
    import torch

    model.check_input_shape(input_shape)
    prepared = copy.deepcopy(model).float().eval()
    prepared.freeze()
    # A batch of one would be burnt into the graph as a constant.
    batch, channels, height, width = input_shape
    if dynamic_batch:
        batch = max(2, batch)
    if dynamic_size:
        # So would be any side of a map that is one position long; with these, every stage has two at least.
        height, width = max(96, height), max(128, width)
    example = torch.zeros(batch, channels, height, width)
    axes: dict[int, Any] = {0: torch.export.Dim("batch")} if dynamic_batch else {}
    if dynamic_size:
        axes |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with _marked_blocks(prepared):
        exported = _exported(prepared, (example,), (axes,) if axes else None, [INPUT], [OUTPUT])
    return _tidy(exported, prepared.blocks(), dynamic_size)


def to_onnx(
    module: torch.nn.Module,
    arguments: tuple[torch.Tensor, ...],
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> onnx.ModelProto:
    """Export a module of your own, one- or two-dimensional, without the bodies of its scans.

    Its scans must be `selective_scan` or `selective_scan_2d` of `scan.operators`; `passes.lower` attaches the
    bodies.

    Args:
        module: in eval mode.
        arguments: example inputs.
        dynamic_shapes: open axes, as for `torch.export.export`.
        input_names: names of the inputs.
        output_names: names of the outputs.

    Returns:
        The model, opset 20, float32.

    Raises:
        ExportError: if torch cannot export the module; the cause is chained.
    """
    import onnx_ir

    exported = _exported(module, arguments, dynamic_shapes, input_names, output_names)
    _fold(exported)
    exported.ir_version = IR_VERSION
    model: onnx.ModelProto = onnx_ir.to_proto(exported)
    return model


def _exported(
    module: torch.nn.Module,
    arguments: tuple[torch.Tensor, ...],
    dynamic_shapes: Any,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> Any:
    """The module as `torch.onnx.export` gives it, an onnx_ir.Model."""
    import torch

    with _operators(), _quiet():
        try:
            program = torch.onnx.export(
                module,
                arguments,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=dynamic_shapes,
                custom_translation_table=_translations(),
                input_names=input_names,
                output_names=output_names,
                verbose=False,
            )
        except Exception as error:
            sizes = ", ".join(str(tuple(item.shape)) for item in arguments)
            raise ExportError(
                f"torch.onnx.export failed on {type(module).__name__}, traced with input {sizes}: {_innermost(error)}. "
                "This is a defect of the exporter or of the model; please report it with the traceback."
            ) from error
    assert program is not None
    return program.model


def _innermost(error: BaseException) -> str:
    """The message at the root of a chain of errors, on one line: torch wraps it in a page of general advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:400]


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    import onnxscript
    import torch

    import quartermap_deploy.scan.operators as operators  # noqa: F401  (registers the torch operators)

    _define_mark()
    ours = onnxscript.values.Opset(DOMAIN, VERSION)

    def scan(
        x: Any,
        dt: Any,
        B: Any,
        C: Any,
        A: Any,
        D: Any,
        dt_bias: Any,
        dt_weight: Any,
        directions: str,
        softplus: bool,
    ) -> Any:
        inputs = [x, dt, B, C, A, D, dt_bias] + ([] if dt_weight is None else [dt_weight])
        return ours.SelectiveScan2D(*inputs, directions=directions.split(","), softplus=int(softplus))

    def sequence_scan(
        u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, delta_bias: Any, delta_softplus: bool
    ) -> Any:
        return ours.SelectiveScan(u, delta, A, B, C, D, delta_bias, delta_softplus=int(delta_softplus))

    def mark(x: Any, block: int) -> Any:
        return ours.BlockOutput(x, block=block)

    def stable_sort(x: Any, *, stable: bool | None = True, dim: int = -1, descending: bool = False) -> Any:
        # torch translates only the sort that leaves equal values in any order; TopK takes them as they come.
        dim %= len(x.shape)
        standard = onnxscript.values.Opset("", OPSET)
        return standard.TopK(x, standard.Shape(x, start=dim, end=dim + 1), axis=dim, largest=int(descending))

    return {
        torch.ops.aten.sort.stable: stable_sort,
        torch.ops.quartermap.selective_scan_2d.default: scan,
        torch.ops.quartermap.selective_scan.default: sequence_scan,
        torch.ops.quartermap.block_output.default: mark,
    }


@contextlib.contextmanager
def _operators() -> Iterator[None]:
    """Make our ONNX operators known to the exporter, which builds only nodes that have a schema."""
    from onnx import defs

    kinds = defs.OpSchema.AttrType
    schemas = [
        _schema(SELECTIVE_SCAN_2D, INPUTS_2D, 7, {"directions": kinds.STRINGS, "softplus": kinds.INT}),
        _schema(SELECTIVE_SCAN, INPUTS_1D, 5, {"delta_softplus": kinds.INT}),
        _schema(_MARK, ("x",), 1, {"block": kinds.INT}),
    ]
    for item in schemas:
        defs.register_schema(item)
    try:
        yield
    finally:
        for item in schemas:
            defs.deregister_schema(item.name, VERSION, DOMAIN)


def _schema(name: str, inputs: Sequence[str], required: int, attributes: dict[str, Any]) -> Any:
    """The schema of one of our operators with one output y; inputs after the required ones are optional."""
    from onnx.defs import OpSchema

    optional, single = OpSchema.FormalParameterOption.Optional, OpSchema.FormalParameterOption.Single
    return OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[
            OpSchema.FormalParameter(item, "T", param_option=single if place < required else optional)
            for place, item in enumerate(inputs)
        ],
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[OpSchema.Attribute(item, kind, "") for item, kind in attributes.items()],
    )


@contextlib.contextmanager
def _marked_blocks(model: VisualStateSpaceModel) -> Iterator[None]:
    """Mark the output of every block with an operator that survives the export, by forward hooks."""
    import torch

    _define_mark()

    def hook(index: int) -> Callable[..., Any]:
        return lambda module, inputs, output: torch.ops.quartermap.block_output(output, index)

    handles = [block.module.register_forward_hook(hook(block.index)) for block in model.blocks()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _define_mark() -> None:
    import torch

    if hasattr(torch.ops.quartermap, "block_output"):
        return

    # The annotations must be objects, not strings, for torch to infer the operator's schema in a local scope.
    def mark(x, block):  # type: ignore[no-untyped-def]
        return x.clone()

    mark.__annotations__ = {"x": torch.Tensor, "block": int, "return": torch.Tensor}
    operator = torch.library.custom_op("quartermap::block_output", mark, mutates_args=())
    operator.register_fake(lambda x, block: torch.empty_like(x))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch says about packages that this export does not need, such as torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _fold(model: Any) -> None:
    """Fold constants."""
    import onnxscript.optimizer

    # Weights may be folded whatever their size: what is folded replaces what it came from.
    no_limit = 1 << 40
    onnxscript.optimizer.fold_constants(model, input_size_limit=no_limit, output_size_limit=no_limit)
    onnxscript.optimizer.remove_unused_nodes(model)


def _tidy(model: Any, blocks: Sequence[Block], dynamic_size: bool) -> onnx.ModelProto:
    """Fold constants, name nodes and block outputs, and drop what tells about the build machine."""
    import onnx_ir

    _fold(model)

    taken = {value.name for node in model.graph for value in node.outputs} | set(model.graph.initializers)
    for name in taken & {block_output(index) for index in range(1, len(blocks) + 1)}:
        raise ExportError(
            f"the graph already has a value named {name!r}, which block outputs are named after"
        )
    scans = 0
    for node in list(model.graph):
        node.name = f"{_place(node, blocks)}{node.name}"
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
        if node.domain != DOMAIN:
            continue
        if node.op_type == _MARK:
            source = node.inputs[0]
            source.name = block_output(node.attributes["block"].as_int())
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
        else:
            scans += 1
            node.name = scan_name(scans)
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    if scans != len(blocks):
        raise ExportError(f"the model has {len(blocks)} blocks, but {scans} scans were exported")
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "quartermap-deploy", "", ""
    model.graph.name = "quartermap"
    model.ir_version = IR_VERSION
    _name_axes(model, dynamic_size)
    exported: onnx.ModelProto = onnx_ir.to_proto(model)
    return exported


def _place(node: Any, blocks: Sequence[Block]) -> str:
    """How the node's name begins; folding leaves nodes that tell nothing, which belong to what they read."""
    scopes = node.metadata_props.get(SCOPES)
    if scopes is None:
        makers = [value.producer() for value in node.inputs if value is not None]
        named = next((maker.name for maker in makers if maker is not None), "")
        return str(named[: named.rfind("/") + 1])
    return place(read_scopes(scopes), blocks)


def _name_axes(model: Any, dynamic_size: bool) -> None:
    """Give the open axes of inputs and outputs their plain names; torch invents symbols such as s77."""
    import onnx_ir

    for value in (*model.graph.inputs, *model.graph.outputs):
        names = ["batch", None, "height", "width"]
        value.shape = onnx_ir.Shape(
            [
                size if isinstance(size, int) else names[axis] if axis < len(names) else None
                for axis, size in enumerate(value.shape or [])
            ]
        )
