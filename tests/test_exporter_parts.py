"""What the exporter is made of, without an export: names of nodes, rules about sizes, and what is said of errors."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

from quartermap_deploy.errors import ExportError
from quartermap_deploy.frontend import exporter
from quartermap_deploy.frontend.node_names import (
    BlockName,
    block_output,
    place,
    read_name,
    read_scopes,
    scan_name,
    without_direction,
)
from quartermap_deploy.lowering.operator import (
    DOMAIN,
    INPUTS_1D,
    INPUTS_2D,
    SELECTIVE_SCAN,
    SELECTIVE_SCAN_2D,
)

# Names ------------------------------------------------------------------------------------------------------------


def test_names_of_blocks_and_scans() -> None:
    assert (block_output(3), block_output(3, 2)) == ("block_3", "block_3/call_2")
    assert (scan_name(3), scan_name(3, place=2)) == ("block_3/scan", "block_3/scan_2")
    assert (scan_name(3, 2), scan_name(3, 2, 4)) == ("block_3/call_2/scan", "block_3/call_2/scan_4")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("block_3", BlockName(3, 1, False)),
        ("block_12/call_2", BlockName(12, 2, False)),
        ("block_3/scan", BlockName(3, 1, True)),
        ("block_3/scan_2", BlockName(3, 1, True)),
        ("block_3/call_2/scan_4", BlockName(3, 2, True)),
        ("block_3/scan/1", BlockName(3, 1, True)),
        ("block_0", None),
        ("block_03", None),
        ("block_3/", None),
        ("block_3/scan/part", None),
        ("block_3/scanned", None),
        ("a/block_3", None),
        ("", None),
    ],
)
def test_names_are_read(name: str, expected: BlockName | None) -> None:
    assert read_name(name) == expected


def test_the_direction_is_taken_off_a_name() -> None:
    assert without_direction("block_3/scan/2") == "block_3/scan"
    assert without_direction("block_3/call_2/scan_4/1") == "block_3/call_2/scan_4"
    for name in ("block_3/scan", "block_3", "block_3/scan/part", "other/2"):
        assert without_direction(name) == name


@dataclass(frozen=True)
class At:
    index: int
    path: str


def test_places_are_told_by_the_innermost_module() -> None:
    blocks = [At(1, "layers.0"), At(2, "layers.1"), At(3, "")]
    assert place((), blocks) == ""
    assert place(("layers", "layers.0"), blocks) == "block_1/"
    assert place(("layers.1", "layers.1.op.in_proj"), blocks) == "block_2/op.in_proj/"
    # A name that begins alike is another module.
    assert place(("layers.10",), blocks) == "layers.10/"
    assert place(("patch_embed", "patch_embed.0"), blocks) == "patch_embed.0/"


def test_scopes_are_a_list_whose_last_entry_is_the_node() -> None:
    assert read_scopes("['', 'layers.0', 'layers.0.op', 'conv']") == ("layers.0", "layers.0.op")
    assert read_scopes(None) == () == read_scopes("") == read_scopes("['conv']")


# Rules and errors -------------------------------------------------------------------------------------------------


def test_what_torch_takes_for_granted_becomes_rules_over_the_inputs_names() -> None:
    program = SimpleNamespace(
        _guards_code=[
            "L['x'].size()[2] % 4 == 0",
            "L['x'].size()[0] * L['x'].size()[3] <= 100",
            "L['z'].size()[0] > 2",
            "L['x'].size()[2] % 4 == 0",
            "L['args'][0].size()[2] != 7",
        ]
    )
    axes = {"x": {0: "batch", 2: "height", 3: "width"}, "z": {0: "count"}}
    assert exporter._rules(program, axes) == (
        "x[2] > 1",
        "x[3] > 1",
        "z[0] > 1",
        "x[2] % 4 == 0",
        "max(2, x[0]) * x[3] <= 100",
        "z[0] > 2",
    )
    assert exporter._rules(SimpleNamespace(), {"x": {0: "batch"}}) == ()
    assert exporter._rules(SimpleNamespace(_guards_code=None), {"x": {1: "side"}}) == ("x[1] > 1",)


def chained() -> BaseException:
    try:
        try:
            raise ValueError("the\n  root   of it")
        except ValueError as error:
            raise RuntimeError("advice") from error
    except RuntimeError as error:
        return error


def test_the_root_of_an_error_is_shown_on_one_line() -> None:
    assert exporter._innermost(chained()) == "the root of it"
    assert exporter._innermost(ValueError("x" * 500)) == "x" * 400
    assert [type(error) for error in exporter._chain(chained())] == [RuntimeError, ValueError]


def test_the_module_of_an_operator_that_onnx_lacks_is_named() -> None:
    def node(name: str, stack: Any, op: str = "call_function") -> Any:
        return SimpleNamespace(op=op, name=name, target=f"aten.{name}", meta={"nn_module_stack": stack})

    nodes = [
        node("fft", {}, op="placeholder"),
        node("fft", {"a": ("", 0), "b": ("layers.0.op", 0)}),
        node("sort", {"a": ("", 0)}),
        node("mul", {}),
    ]
    program = SimpleNamespace(graph=SimpleNamespace(nodes=nodes))
    assert exporter._where(program, ValueError("at node 'fft' of")) == (
        ", at aten.fft in the module layers.0.op"
    )
    assert exporter._where(program, ValueError("%sort : [num_users=1]")) == ", at aten.sort"
    assert exporter._where(program, ValueError("%sorted : [num_users=1]")) == ""
    assert exporter._where(program, ValueError("node 'mul'")) == ", at aten.mul"
    wrapped = RuntimeError("outside")
    wrapped.__cause__ = ValueError("node 'mul'")
    assert exporter._where(program, wrapped) == ", at aten.mul"


# Operators --------------------------------------------------------------------------------------------------------


def test_our_operators_have_schemas_while_a_graph_is_exported() -> None:
    names = (SELECTIVE_SCAN_2D, SELECTIVE_SCAN, "BlockOutput")
    assert not any(onnx.defs.has(name, DOMAIN) for name in names)
    with exporter._operators():
        for name, inputs, required in (
            (SELECTIVE_SCAN_2D, INPUTS_2D, 7),
            (SELECTIVE_SCAN, INPUTS_1D, 5),
            ("BlockOutput", ("x",), 1),
        ):
            schema = onnx.defs.get_schema(name, 1, DOMAIN)
            assert [item.name for item in schema.inputs] == list(inputs)
            optional = onnx.defs.OpSchema.FormalParameterOption.Optional
            assert [item.option == optional for item in schema.inputs] == [
                place >= required for place in range(len(inputs))
            ]
            assert (schema.min_input, schema.max_input, schema.max_output) == (required, len(inputs), 1)
        assert set(onnx.defs.get_schema(SELECTIVE_SCAN_2D, 1, DOMAIN).attributes) >= {
            "directions",
            "softplus",
        }
    assert not any(onnx.defs.has(name, DOMAIN) for name in names)
    with pytest.raises(ZeroDivisionError), exporter._operators():
        raise ZeroDivisionError
    assert not any(onnx.defs.has(name, DOMAIN) for name in names)


def test_outputs_of_blocks_are_marked_by_the_call_that_made_them() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.other = torch.nn.Identity(), torch.nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(self.block(self.block(x)))

    module = Twice()
    calls = [
        exporter.ModuleCall(1, "block", module.block),
        exporter.ModuleCall(1, "block", module.block, call=2),
        exporter.ModuleCall(2, "", module.other),
    ]
    marked: list[int] = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "block_output" in str(func):
                marked.append(args[1])
            return func(*args, **(kwargs or {}))

    with exporter._marked_blocks(module, calls):
        for _ in range(2):
            with Seen():
                y = module(torch.ones(2))
            assert torch.equal(y, torch.ones(2))
        # What is no floating-point tensor cannot be a block's map.
        with Seen():
            module(torch.ones(2, dtype=torch.int64))
    assert marked == [0, 1, 0, 1]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


# A trace ----------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """What `trace` asks of a model, with two blocks that scan nothing."""

    output_names = ("logits", "features")

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3).double()
        self.asked: list[Any] = []
        self.frozen = False

    def check_input_shape(self, shape: Any) -> None:
        self.asked.append(shape)

    def freeze(self) -> None:
        self.frozen = True

    def blocks(self) -> list[Any]:
        return [SimpleNamespace(index=index, path=f"layers.{index}", module=self.norm) for index in (1, 2)]


@pytest.mark.parametrize(
    ("given", "open_batch", "open_size", "traced", "names"),
    [
        ((1, 3, 32, 64), True, False, (2, 3, 32, 64), {0: "batch"}),
        ((4, 3, 32, 64), True, False, (4, 3, 32, 64), {0: "batch"}),
        ((1, 3, 32, 64), False, False, (1, 3, 32, 64), {}),
        ((1, 3, 32, 64), False, True, (1, 3, 96, 128), {2: "height", 3: "width"}),
        ((1, 3, 224, 320), True, True, (2, 3, 224, 320), {0: "batch", 2: "height", 3: "width"}),
    ],
)
def test_what_is_left_open_is_traced_with_a_size_that_is_no_special_one(
    given: tuple[int, ...],
    open_batch: bool,
    open_size: bool,
    traced: tuple[int, ...],
    names: dict[int, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[Any] = []

    def trace_module(*arguments: Any) -> exporter.TracedGraph:
        found.extend(arguments)
        return exporter.TracedGraph(onnx.ModelProto(producer_name="traced"), ())

    monkeypatch.setattr(exporter, "trace_module", trace_module)
    model: Any = Model().train()
    made = exporter.trace(model, given, dynamic_batch=open_batch, dynamic_size=open_size)
    assert made.producer_name == "traced" and model.asked == [given]
    module, example, axes, outputs, calls = found
    # It is a copy that is prepared: in float32, in eval mode, frozen.
    assert module is not model and module.frozen and not module.training and not module.norm.training
    assert module.norm.weight.dtype == torch.float32
    assert not model.frozen and model.training and model.norm.weight.dtype == torch.float64
    assert list(example) == ["images"] and tuple(example["images"].shape) == traced
    assert axes == {"images": names} and outputs == ("logits", "features")
    assert [(call.index, call.path, call.call, call.scans) for call in calls] == [
        *((1, "layers.1", 1, 1), (2, "layers.2", 1, 1))
    ]
    assert all(call.module is module.norm for call in calls)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_module_is_traced_with_its_open_axes_from_two_on(
    by_keyword: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    program = SimpleNamespace(
        model="model", exported_program=SimpleNamespace(_guards_code=["L['x'].size()[1] < 9"])
    )

    def record(name: str, made: Any) -> Any:
        def call(*arguments: Any) -> Any:
            given.append((name, *arguments))
            return made

        return call

    monkeypatch.setattr(exporter, "_program", record("program", "program"))
    monkeypatch.setattr(exporter, "_exported", record("exported", program))
    monkeypatch.setattr(exporter, "_tidy", record("tidy", "tidied"))
    x, z = torch.ones(2, 3), torch.ones(4)
    axes = {"x": {0: "batch", 1: "side"}}
    module = torch.nn.Identity()
    found = exporter.trace_module(module, {"x": x, "z": z}, axes, ("y",), (), by_keyword=by_keyword)
    assert found.model == "tidied" and found.rules == ("x[1] > 1", "x[1] < 9")
    (_, traced, args, kwargs, shapes), exported, tidied = given
    assert traced is module and exported == ("exported", "program", module, ["x", "z"], ["y"])
    assert tidied == ("tidy", "model", (), axes)
    if by_keyword:
        assert args == () and list(kwargs) == ["x", "z"] and kwargs["x"] is x and kwargs["z"] is z
        assert list(shapes) == ["x", "z"]
        first, second = shapes["x"], shapes["z"]
    else:
        assert kwargs == {} and args[0] is x and args[1] is z and len(args) == len(shapes) == 2
        first, second = shapes
    assert second == {} and set(first) == {0, 1}
    assert (first[0].__name__, first[0].min) == ("batch", 2) and first[1].min == 2
    given.clear()
    exporter.trace_module(module, {"x": x}, {}, ("y",), ())
    assert given[0][-1] is None


# The graph as torch exports it ------------------------------------------------------------------------------------

EXPORTED = """
<ir_version: 10, opset_import: ["" : 20, "quartermap" : 1]>
agraph (float[s0, 3, s1, 8] images) => (float[s0, 3, s1, 8] logits, float[s0, 3, s2, 4] half)
<float[3] weight = {1, 2, 3}>
{
    a = quartermap.SelectiveScan2D <site = 1> (images, weight)
    marked_a = quartermap.BlockOutput <block = 0> (a)
    b = quartermap.SelectiveScan2D <site = 0> (marked_a, weight)
    c = Sin (b)
    marked_c = quartermap.BlockOutput <block = 1> (c)
    marked_again = quartermap.BlockOutput <block = 2> (marked_c)
    d = Neg (marked_again)
    half = Cos (d)
    logits = quartermap.BlockOutput <block = 3> (d)
}
"""


def tidied(text: str, calls: list[exporter.ModuleCall], axes: Any = None) -> onnx.ModelProto:
    import onnx_ir

    model = onnx.parser.parse_model(text)
    model.producer_name, model.doc_string, model.graph.name = "other", "/home/someone", "main"
    for entry in (model.metadata_props.add(), model.graph.metadata_props.add()):
        entry.key, entry.value = "path", "/home/someone"
    scopes = {
        "a": "['', 'layers.0', 'scan']",
        "c": "['', 'layers.1', 'layers.1.act', 'sin']",
        "d": "['', 'neg']",
    }
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
        if node.output[0] in scopes:
            entry = node.metadata_props.add()
            entry.key, entry.value = exporter.SCOPES, scopes[node.output[0]]
    read = onnx_ir.from_proto(model)
    for value in (
        *read.graph.initializers.values(),
        *(value for node in read.graph for value in node.outputs),
    ):
        value.metadata_props["path"] = "/home/someone"
    return exporter._tidy(read, calls, axes or {})


def block(index: int, path: str, call: int = 1, scans: int = 1) -> exporter.ModuleCall:
    return exporter.ModuleCall(index, path, torch.nn.Identity(), call, scans)


def test_scans_blocks_and_nodes_of_an_exported_graph_get_their_names() -> None:
    calls = [block(1, "layers.0", scans=2), block(2, "layers.1", scans=0), block(3, "layers", scans=0)]
    calls.append(block(4, "", scans=0))
    model = tidied(EXPORTED, calls, {"images": {0: "batch", 2: "height"}})
    assert [
        (node.op_type, node.domain, node.name, *node.input, *node.output) for node in model.graph.node
    ] == [
        ("SelectiveScan2D", "quartermap", "block_1/scan_2", "images", "weight", "block_1"),
        ("SelectiveScan2D", "quartermap", "block_1/scan", "block_1", "weight", "b"),
        ("Sin", "", "block_2/act/node_c", "b", "block_2"),
        # The output of a block that is another's as well, and one of the model, have names already.
        ("Identity", "", "block_2/act/node_marked_again", "block_2", "block_3"),
        ("Neg", "", "node_d", "block_3", "d"),
        ("Cos", "", "node_half", "d", "half"),
        ("Identity", "", "node_logits", "d", "logits"),
    ]
    assert not any(node.attribute for node in model.graph.node)
    # Nothing tells about the machine that exported it.
    assert "someone" not in str(model) and exporter.SCOPES not in str(model)
    assert (model.producer_name, model.producer_version, model.doc_string) == ("quartermap-deploy", "", "")
    assert model.graph.name == "quartermap"
    shapes = {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "images": ["batch", 3, "height", 8],
        "logits": ["batch", 3, "height", 8],
        "half": ["batch", 3, "", 4],
    }


def test_a_block_whose_output_is_one_of_the_model_and_is_read_on_keeps_its_name_there() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20, "quartermap" : 1]>
    agraph (float[2] x) => (float[2] y, float[2] z)
    { y = Sin (x)  marked = quartermap.BlockOutput <block = 0> (y)  z = Neg (marked) }
    """
    model = tidied(text, [block(1, "layer", scans=0)])
    assert [(node.op_type, *node.input, *node.output) for node in model.graph.node] == [
        ("Sin", "x", "y"),
        ("Identity", "y", "block_1"),
        ("Neg", "block_1", "z"),
    ]


def test_another_number_of_scans_than_the_calls_make_is_an_error() -> None:
    calls = [block(1, "layers.0"), *(block(index, "", scans=0) for index in (2, 3, 4))]
    with pytest.raises(ExportError, match="the model makes 1 scans, but 2 were exported"):
        tidied(EXPORTED, calls)
    calls[0] = block(1, "layers.0", scans=3)
    with pytest.raises(ExportError, match="the model makes 3 scans, but 2 were exported"):
        tidied(EXPORTED, calls)


def test_a_value_that_is_named_as_a_block_is_an_error() -> None:
    with pytest.raises(ExportError, match="already has a value named 'block_7'"):
        tidied(EXPORTED.replace("d = Neg", "block_7 = Neg").replace("(d)", "(block_7)"), [])


def test_constants_of_any_size_are_folded() -> None:
    import onnx_ir

    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    agraph (float[4096, 3] x) => (float[4096, 3] y) <float[1] one = {1}, int64[2] sides = {4096, 3}>
    { wide = Expand (one, sides)  sum = Add (wide, wide)  unread = Neg (x)  y = Add (x, sum) }
    """
    model = onnx_ir.from_proto(onnx.parser.parse_model(text))
    exporter._fold(model)
    assert [node.op_type for node in model.graph] == ["Add"]
