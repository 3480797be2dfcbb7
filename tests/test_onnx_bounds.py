"""ONNX files that keep a runtime busy for ever or fill the memory are refused before it reads them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import pytest
import toy_bundles
from command_line import call
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from quartermap_deploy.bundle import MODEL, describe_file, load_bundle, write_json
from quartermap_deploy.errors import BundleError
from quartermap_deploy.lowering.operator import DOMAIN
from quartermap_deploy.onnx_bounds import DEEPEST, check_model
from quartermap_deploy.targets.onnxruntime_cpu import inference_session

OPSETS = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
node = helper.make_node


def whole(name: str, *values: int, scalar: bool = False) -> TensorProto:
    return helper.make_tensor(name, INT64, [] if scalar else [len(values)], values)


def function(
    name: str, nodes: Sequence[onnx.NodeProto], inputs: Sequence[str] = ("a",)
) -> onnx.FunctionProto:
    return helper.make_function(DOMAIN, name, inputs, ["b"], nodes, OPSETS)


def model(
    *nodes: onnx.NodeProto,
    weights: Sequence[TensorProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """A model of x, a vector, that gives y."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", FLOAT, [1])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        weights,
    )
    return helper.make_model(graph, opset_imports=OPSETS, functions=functions, ir_version=10)


def levels(depth: int, calls: int) -> onnx.ModelProto:
    """Functions of which each calls the next one several times."""
    functions = [
        function(
            f"f{level}",
            [
                *(node(f"f{level + 1}", ["a"], [f"c{call}"], domain=DOMAIN) for call in range(calls)),
                node("Sum", [f"c{call}" for call in range(calls)], ["b"]),
            ],
        )
        for level in range(depth)
    ]
    last = function(f"f{depth}", [node("Relu", ["a"], ["b"])])
    return model(node("f0", ["x"], ["y"], domain=DOMAIN), functions=[*functions, last])


def endless() -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, kind, []) for name, kind in (("i", INT64), ("c", BOOL))]
    body = helper.make_graph(
        [node("Identity", ["c"], ["more"]), node("Identity", ["v"], ["w"])],
        "body",
        [*values, helper.make_tensor_value_info("v", FLOAT, [1])],
        [helper.make_tensor_value_info("more", BOOL, []), helper.make_tensor_value_info("w", FLOAT, [1])],
    )
    true = helper.make_tensor("true", BOOL, [], [True])
    return model(node("Loop", ["", "true", "x"], ["y"], body=body), weights=[true])


def branches(depth: int) -> onnx.ModelProto:
    """Branches in branches."""
    value = [helper.make_tensor_value_info("v", FLOAT, [1])]
    graph = helper.make_graph([node("Identity", ["x"], ["v"])], "leaf", [], value)
    for _ in range(depth - 1):
        graph = helper.make_graph(
            [node("If", ["true"], ["v"], then_branch=graph, else_branch=graph)], "b", [], value
        )
    true = helper.make_tensor("true", BOOL, [], [True])
    return model(node("If", ["true"], ["y"], then_branch=graph, else_branch=graph), weights=[true])


def sparse() -> onnx.ModelProto:
    made = model(node("Relu", ["x"], ["y"]))
    entry = made.graph.sparse_initializer.add()
    entry.dims.append(10**10)
    entry.values.name = "w"
    return made


def empty_weights() -> onnx.ModelProto:
    made = model(node("Relu", ["x"], ["y"]))
    made.graph.initializer.add(name="w", dims=[10**5, 10**5], data_type=FLOAT)
    return made


def elsewhere() -> onnx.ModelProto:
    made = model(node("Relu", ["x"], ["y"]))
    weights = made.graph.initializer.add(name="w", dims=[2], data_type=FLOAT, data_location=1)
    weights.external_data.add(key="location", value="weights.bin")
    return made


BIG = whole("size", 100_000, 100_000)
ATTACKS: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "2^24 functions": (lambda: levels(24, 2), "more than 4 deep"),
    "wide functions": (lambda: levels(3, 500), "more than 200,000 nodes"),
    "a function that calls itself": (
        lambda: model(
            node("f", ["x"], ["y"], domain=DOMAIN),
            functions=[function("f", [node("f", ["a"], ["b"], domain=DOMAIN)])],
        ),
        "'f' calls itself",
    ),
    "a function of another domain": (
        lambda: model(
            node("Relu", ["x"], ["y"]),
            functions=[
                helper.make_function("other", "f", ["a"], ["b"], [node("Relu", ["a"], ["b"])], OPSETS)
            ],
        ),
        "none of this package",
    ),
    "an endless loop": (endless, "Loop, which may have no end"),
    "deep branches": (lambda: branches(DEEPEST + 1), "more than 4 deep"),
    "another domain": (
        lambda: model(node("EPContext", ["x"], ["y"], domain="com.microsoft")),
        "domain 'com.microsoft'",
    ),
    "Expand": (lambda: model(node("Expand", ["x", "size"], ["y"]), weights=[BIG]), "10000000000 numbers"),
    "ConstantOfShape": (
        lambda: model(node("ConstantOfShape", ["size"], ["y"]), weights=[BIG]),
        "10000000000 numbers",
    ),
    "Tile": (
        lambda: model(node("Tile", ["x", "size"], ["y"]), weights=[whole("size", 10**10)]),
        "10000000000 numbers",
    ),
    "Range": (
        lambda: model(
            node("Range", ["from", "to", "by"], ["y"]),
            weights=[
                whole(name, value, scalar=True) for name, value in (("from", 0), ("to", 10**12), ("by", 1))
            ],
        ),
        "1000000000000 numbers",
    ),
    "Resize": (
        lambda: model(
            node("Resize", ["x", "", "scales"], ["y"]),
            weights=[helper.make_tensor("scales", FLOAT, [4], [1, 1, 1e6, 1e6])],
        ),
        "1000000000000 numbers",
    ),
    "Pad": (
        lambda: model(node("Pad", ["x", "size"], ["y"]), weights=[whole("size", 0, 10**10)]),
        "10000000000 numbers",
    ),
    "pads of a pooling": (
        lambda: model(node("MaxPool", ["x"], ["y"], kernel_shape=[1, 1], pads=[10**9] * 4)),
        "pads",
    ),
    "a size by a constant node": (
        lambda: model(
            node("Constant", [], ["size"], value_ints=[10**6, 10**6]), node("Expand", ["x", "size"], ["y"])
        ),
        "1000000000000 numbers",
    ),
    "a size by a function's input": (
        lambda: model(
            node("f", ["x", "size"], ["y"], domain=DOMAIN),
            weights=[BIG],
            functions=[function("f", [node("Expand", ["a", "s"], ["b"])], ("a", "s"))],
        ),
        "10000000000 numbers",
    ),
    "a size put together": (
        lambda: model(
            node("Concat", ["side", "side"], ["size"], axis=0),
            node("ConstantOfShape", ["size"], ["y"]),
            weights=[whole("side", 10**5)],
        ),
        "10000000000 numbers",
    ),
    "a size computed": (
        lambda: model(
            node("Mul", ["side", "side"], ["size"]),
            node("ConstantOfShape", ["size"], ["y"]),
            weights=[whole("side", 10**5)],
        ),
        "computed from constants",
    ),
    "sparse weights": (sparse, "sparse"),
    "weights without numbers": (empty_weights, r"shape \[100000, 100000\] in 0 bytes"),
    "weights in another file": (elsewhere, "another file"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_it_is_refused_at_once(name: str, tmp_path: Path) -> None:
    make, message = ATTACKS[name]
    data = make().SerializeToString()
    (tmp_path / MODEL).write_bytes(data)
    began = time.monotonic()
    for given_as in (data, tmp_path / MODEL):
        with pytest.raises(BundleError, match=message):
            inference_session(given_as, 1)
    assert time.monotonic() - began < 20


def test_their_honest_kin_are_taken() -> None:
    honest = (
        model(node("Expand", ["x", "size"], ["y"]), weights=[whole("size", 3, 4)]),
        model(node("Shape", ["x"], ["size"]), node("ConstantOfShape", ["size"], ["y"])),
        branches(DEEPEST),
        levels(2, 3),
    )
    for made in honest:
        check_model(made.SerializeToString())
        assert inference_session(made.SerializeToString(), 1).get_outputs()


def test_what_constants_grow_to_while_a_file_is_loaded_is_bounded() -> None:
    """A constant that is put together with itself thirty times would have 4 GB, and be computed ahead of time."""
    doubled = (
        node("Concat", [f"c{place}"] * 2, [f"c{place + 1}"], axis=0, name=f"n{place}") for place in range(30)
    )
    one = helper.make_tensor("c0", FLOAT, [1], [1.0])
    made = model(*doubled, node("Add", ["c30", "x"], ["y"]), weights=[one])
    began = time.monotonic()
    inference_session(made.SerializeToString(), 1)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("make", [toy_bundles.classifier, toy_bundles.change, toy_bundles.sequences])
def test_what_this_package_writes_is_taken(make: Callable[[], Path]) -> None:
    check_model(make() / MODEL)


def hostile_bundle(source: Path, folder: Path, made: onnx.ModelProto) -> Path:
    """A bundle whose manifest knows its model, which another one took the place of."""
    shutil.copytree(source, folder)
    bundle = load_bundle(folder)
    data = made.SerializeToString()
    (folder / MODEL).write_bytes(data)
    files = {**bundle.manifest["files"], MODEL: describe_file(folder / MODEL)}
    write_json(folder / "manifest.json", {**bundle.manifest, "files": files})
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ("validate",),
        ("bench",),
        ("eval",),
        ("predict", "image.png"),
        ("serve", "--port", "0"),
        ("inspect",),
        ("deploy", "triton", "-o", "repository"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_every_command_refuses_such_a_bundle(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile_bundle(toy_bundles.classifier(), tmp_path / "bundle", endless())
    from PIL import Image

    Image.new("RGB", (32, 32)).save("image.png")
    words = (
        [*command[:2], "bundle", *command[2:]]
        if command[0] == "deploy"
        else [command[0], "bundle", *command[1:]]
    )
    if command[0] == "eval":
        (tmp_path / "data" / "digit 1").mkdir(parents=True)
        shutil.copy("image.png", tmp_path / "data" / "digit 1" / "a.png")
        words += ["--data", "data"]
    outcome = call(*words)
    assert outcome.code == 2
    assert "Loop, which may have no end" in outcome.err and "Traceback" not in outcome.err


@given(st.binary(max_size=200))
def test_what_is_no_model_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError):
        check_model(data)
