"""PyTorch → ONNX, by `torch.onnx.export` (dynamo): the graph as the model is, before any pass.

`to_onnx` exports any module whose scans are our torch operators; `trace` exports a model of `architectures`. There each
selective scan becomes one node `quartermap.SelectiveScan2D` named `block_<i>/scan`, still without a body, and the
output of block i is a value named `block_<i>`, which every later pass keeps, so that parity can be checked block by
block. The other nodes are named after their module, as `block_<i>/op.in_proj/node_Conv_393`.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quartermap_deploy.errors import ExportError
from quartermap_deploy.frontend.node_names import (
    SCOPES,
    block_output,
    place,
    read_name,
    read_scopes,
    scan_name,
)
from quartermap_deploy.lowering.operator import (
    DOMAIN,
    INPUTS_1D,
    INPUTS_2D,
    SELECTIVE_SCAN,
    SELECTIVE_SCAN_2D,
    VERSION,
)
from quartermap_deploy.lowering.versions import stamp_ir_version

if TYPE_CHECKING:
    import onnx
    import torch

    from quartermap_deploy.architectures.base import VisualStateSpaceModel

OPSET = 20
INPUT, OUTPUT = "images", "logits"
_MARK = "BlockOutput"
_SITE = "site"


@dataclass(frozen=True)
class ModuleCall:
    """One call of a block's module in a run of a model, in the order of the run.

    Attributes:
        index: number of the block, from 1.
        path: path of its module; empty for the model itself, whose output keeps its own name.
        module: the module.
        call: which call of it this is, from 1.
        scans: how many scans it makes.
    """

    index: int
    path: str
    module: torch.nn.Module
    call: int = 1
    scans: int = 1


@dataclass(frozen=True)
class TracedGraph:
    """A model as torch exports it.

    Attributes:
        model: opset 20, float32, with named scans and block outputs, without bodies.
        rules: what the exporter took for granted about the sizes of the inputs, as expressions over `name[axis]`.
    """

    model: onnx.ModelProto
    rules: tuple[str, ...]


def trace(
    model: VisualStateSpaceModel,
    input_shape: Sequence[int],
    *,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
) -> onnx.ModelProto:
    """Export a model of `architectures` in float32, opset 20, without the bodies of its scans.

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
    names: dict[int, str] = {0: "batch"} if dynamic_batch else {}
    if dynamic_size:
        names |= {2: "height", 3: "width"}
    calls = [ModuleCall(block.index, block.path, block.module) for block in prepared.blocks()]
    example = {INPUT: torch.zeros(batch, channels, height, width)}
    return trace_module(prepared, example, {INPUT: names}, prepared.output_names, calls).model


def trace_module(
    module: torch.nn.Module,
    example: Mapping[str, torch.Tensor],
    open_axes: Mapping[str, Mapping[int, str]],
    output_names: Sequence[str],
    calls: Sequence[ModuleCall],
    *,
    by_keyword: bool = False,
) -> TracedGraph:
    """Export any module whose scans are the torch operators of this package, and name its nodes after its blocks.

    Args:
        module: in eval mode, in float32, on the CPU; its forward is run with hooks on the modules of its blocks.
        example: the inputs to trace with, by name, in the order of its forward.
        open_axes: for each input, the names of the axes that are left open.
        output_names: names of its outputs, in the order in which they are flattened.
        calls: the calls of its blocks' modules, in the order of a run.
        by_keyword: whether the inputs are given by keyword.

    Raises:
        ExportError: if torch cannot export the module, fixes a size that was to be open, or exports another number of
            scans than the calls say; the cause is chained.
    """
    import torch

    # From 2 on, as torch takes a size of 1 for a special one.
    batch, side = torch.export.Dim("batch", min=2), torch.export.Dim.DYNAMIC(min=2)
    axes: dict[str, dict[int, Any]] = {
        name: {axis: batch if axis == 0 else side for axis in open_axes.get(name, {})} for name in example
    }
    args = () if by_keyword else tuple(example.values())
    kwargs = dict(example) if by_keyword else {}
    shapes: Any = axes if by_keyword else tuple(axes.values())
    with _operators(), _quiet(), _any_size(), _marked_blocks(module, calls):
        program = _program(module, args, kwargs, shapes if any(axes.values()) else None)
        found = _exported(program, module, list(example), list(output_names))
    # Read after the export: taking operators apart decides by sizes, too.
    rules = _rules(found.exported_program, open_axes)
    return TracedGraph(_tidy(found.model, calls, open_axes), rules)


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

    with _operators(), _quiet():
        program = _program(module, arguments, {}, dynamic_shapes)
        exported = _exported(program, module, input_names, output_names).model
    _fold(exported)
    for node in exported.graph:
        if node.domain == DOMAIN:
            node.attributes.pop(_SITE, None)
    model: onnx.ModelProto = onnx_ir.to_proto(exported)
    stamp_ir_version(model)
    return model


def _program(
    module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], shapes: Any
) -> Any:
    """The module as `torch.export` gives it: every call of an operator, without Python's control flow."""
    import torch

    try:
        with torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        sizes = ", ".join(str(tuple(item.shape)) for item in (*args, *kwargs.values()))
        fixed = re.findall(r"L\['(\w+)'\]\.size\(\)\[(\d+)\] as dynamic .*? constant \((\d+)\)", str(error))
        if fixed:
            axes = ", ".join(f"{name}[{axis}] at {size}" for name, axis, size in fixed)
            raise ExportError(
                f"the module {type(module).__name__} fixes what was to be open: {axes}. It compares the size with "
                "another one, as that of a table of positions, or makes a Python number of it; give an example of "
                "another size, or fix the size with dynamic_size=False, the batch with dynamic_batch=False"
            ) from error
        raise ExportError(
            f"torch.export failed on {type(module).__name__}, traced with input {sizes}: {_innermost(error)}"
        ) from error


def _exported(
    program: Any,
    module: torch.nn.Module,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> Any:
    """A program as `torch.onnx.export` gives it: an `ONNXProgram`, with the program in operators that ONNX has."""
    import torch

    try:
        found = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=_translations(),
            input_names=input_names,
            output_names=output_names,
            verbose=False,
        )
    except Exception as error:
        raise ExportError(
            f"torch.onnx.export failed on {type(module).__name__}{_where(program, error)}: {_innermost(error)}. If "
            "ONNX has no such operator, write that part of the module in others, or leave it out of what is compiled"
        ) from error
    assert found is not None
    return found


def _where(program: Any, error: BaseException) -> str:
    """The module that holds an operator which ONNX lacks, in words, where the message names the operator's node."""
    text = " ".join(str(item) for item in _chain(error))
    for node in program.graph.nodes:
        if node.op == "call_function" and (f"node '{node.name}'" in text or f"%{node.name} " in text):
            stack = list(node.meta.get("nn_module_stack", {}).values())
            if stack and stack[-1][0]:
                return f", at {node.target} in the module {stack[-1][0]}"
            return f", at {node.target}"
    return ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _rules(program: Any, open_axes: Mapping[str, Mapping[int, str]]) -> tuple[str, ...]:
    """What the program takes for granted about sizes; torch keeps it as Python over `L['x'].size()[2]`."""
    # Sizes from 2 on were traced, and nothing notes where a size of 1 would have gone another way. A batch of one is
    # compared with the module at every export instead, so a rule that only it breaks does not count.
    found = [
        f"{name}[{axis}] > 1" for name, axes in open_axes.items() for axis in axes if axes[axis] != "batch"
    ]
    for code in getattr(program, "_guards_code", None) or ():
        # A container of arguments comes before the name where the inputs are given by keyword.
        rule = re.sub(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]", r"\1[\2]", code)
        for name, axes in open_axes.items():
            if axes.get(0) == "batch":
                rule = re.sub(rf"\b{name}\[0\]", f"max(2, {name}[0])", rule)
        if "L[" not in rule and rule not in found:
            found.append(rule)
    return tuple(found)


@contextlib.contextmanager
def _any_size() -> Iterator[None]:
    """Let torch go the way that is right at any size where it goes another one at some, as its ONNX exporter does.

    Else it takes for granted how tensors lie in memory, which is nothing to a graph, and many sizes would be refused.
    """
    from torch.fx.experimental import _config

    with _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        yield


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
    # Each scan gets a number, in the order of the program: it tells which scan it is, and keeps the exporter from
    # making one of two that read the same values.
    numbers = itertools.count()

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
        return ours.SelectiveScan2D(
            *inputs, directions=directions.split(","), softplus=int(softplus), site=next(numbers)
        )

    def sequence_scan(
        u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, delta_bias: Any, delta_softplus: bool
    ) -> Any:
        inputs = (u, delta, A, B, C, D, delta_bias)
        return ours.SelectiveScan(*inputs, delta_softplus=int(delta_softplus), site=next(numbers))

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
        _schema(
            SELECTIVE_SCAN_2D,
            INPUTS_2D,
            7,
            {"directions": kinds.STRINGS, "softplus": kinds.INT, _SITE: kinds.INT},
        ),
        _schema(SELECTIVE_SCAN, INPUTS_1D, 5, {"delta_softplus": kinds.INT, _SITE: kinds.INT}),
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
def _marked_blocks(model: torch.nn.Module, calls: Sequence[ModuleCall]) -> Iterator[None]:
    """Mark the output of every call of a block with an operator that survives the export, by forward hooks."""
    import torch

    _define_mark()
    numbers = {(id(call.module), call.call): place for place, call in enumerate(calls) if call.path}
    seen: dict[int, int] = {}

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        seen[id(module)] = seen.get(id(module), 0) + 1
        place = numbers.get((id(module), seen[id(module)]))
        if place is None or not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return None
        return torch.ops.quartermap.block_output(output, place)

    # A run begins anew: torch may run a module more than once.
    handles = [model.register_forward_pre_hook(lambda module, inputs: seen.clear())]
    handles += [
        module.register_forward_hook(hook) for module in {id(c.module): c.module for c in calls}.values()
    ]
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


def _tidy(
    model: Any, calls: Sequence[ModuleCall], open_axes: Mapping[str, Mapping[int, str]]
) -> onnx.ModelProto:
    """Fold constants, name nodes and block outputs, and drop what tells about the build machine."""
    import onnx_ir

    _fold(model)

    taken = {value.name for node in model.graph for value in node.outputs} | set(model.graph.initializers)
    for name in sorted(name for name in taken if read_name(str(name)) is not None):
        raise ExportError(
            f"the graph already has a value named {name!r}, which block outputs are named after"
        )
    scans = [scan_name(call.index, call.call, place) for call in calls for place in range(1, call.scans + 1)]
    found = 0
    outputs = {id(value) for value in model.graph.outputs}
    for node in list(model.graph):
        node.name = f"{_place(node, calls)}{node.name}"
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
        if node.domain != DOMAIN:
            continue
        if node.op_type == _MARK:
            source, call = node.inputs[0], calls[node.attributes["block"].as_int()]
            name = block_output(call.index, call.call)
            if id(node.outputs[0]) in outputs or id(source) in outputs or read_name(source.name) is not None:
                # The output of the model, or of a block within a block, keeps the name that it has.
                node.op_type, node.domain = "Identity", ""
                node.attributes.clear()
                if id(node.outputs[0]) not in outputs:
                    node.outputs[0].name = name
                continue
            source.name = name
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
        else:
            found += 1
            site = node.attributes.pop(_SITE).as_int()
            node.name = scans[site] if site < len(scans) else node.name
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    if found != len(scans):
        raise ExportError(f"the model makes {len(scans)} scans, but {found} were exported")
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "quartermap-deploy", "", ""
    model.graph.name = "quartermap"
    _name_axes(model, open_axes)
    exported: onnx.ModelProto = onnx_ir.to_proto(model)
    stamp_ir_version(exported)
    return exported


def _place(node: Any, calls: Sequence[ModuleCall]) -> str:
    """How the node's name begins; folding leaves nodes that tell nothing, which belong to what they read."""
    scopes = node.metadata_props.get(SCOPES)
    if scopes is None:
        makers = [value.producer() for value in node.inputs if value is not None]
        named = next((maker.name for maker in makers if maker is not None), "")
        return str(named[: named.rfind("/") + 1])
    return place(read_scopes(scopes), calls)


def _name_axes(model: Any, open_axes: Mapping[str, Mapping[int, str]]) -> None:
    """Give the open axes of inputs and outputs their plain names; torch invents symbols such as s77.

    An axis of an output that is no axis of an input has no name: it may be a quarter of one.
    """
    import onnx_ir

    plain: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, label in open_axes.get(value.name, {}).items():
            size = value.shape[axis]
            if isinstance(size, onnx_ir.SymbolicDim):
                plain.setdefault(str(size.value), label)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = onnx_ir.Shape(
            [size if isinstance(size, int) else plain.get(str(size.value)) for size in value.shape or []]
        )
