"""What the exporter is made of, without an export: names of nodes, rules about sizes, and what is said of errors."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

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
