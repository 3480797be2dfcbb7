"""ONNX files that keep a runtime busy for ever or fill the memory are refused before it reads them."""

from __future__ import annotations

import shutil
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
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
from quartermap_deploy.onnx_bounds import check_model
from quartermap_deploy.onnx_graphs import DEEPEST
from quartermap_deploy.targets.onnxruntime.opening import inference_session
from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession

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


def text_field(number: int, data: bytes) -> bytes:
    """A field of a message, as protobuf writes it."""
    assert number < 16
    size, length = b"", len(data)
    while length > 127:
        size += bytes([length & 127 | 128])
        length >>= 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + data


def in_two_parts() -> bytes:
    """A constant whose tensor stands there twice: readers take the numbers of the first."""
    first = onnx.TensorProto(raw_data=struct.pack("<2q", 10**5, 10**5))
    second = onnx.TensorProto(dims=[2], data_type=INT64, int64_data=[5, 5])
    parts = b"".join(text_field(5, part.SerializeToString()) for part in (first, second))
    attribute = text_field(1, b"value") + parts + b"\xa0\x01\x04"
    constant = text_field(2, b"size") + text_field(4, b"Constant") + text_field(5, attribute)
    made = model(node("ConstantOfShape", ["size"], ["y"]))
    graph = text_field(1, constant) + made.graph.SerializeToString()
    made.ClearField("graph")
    return text_field(7, graph) + made.SerializeToString()


def hidden() -> bytes:
    """An endless loop in a field whose number has 33 bits; ONNX Runtime drops the first."""
    loop = onnx.GraphProto(node=[endless().graph.node[0]]).SerializeToString()
    field = text_field(7, loop)
    return model(node("Relu", ["x"], ["y"])).SerializeToString() + b"\xba\x80\x80\x80\x10" + field[1:]


def size_of_a_call() -> onnx.ModelProto:
    made = node("RandomNormal", [], ["b"])
    made.attribute.add(name="shape", ref_attr_name="k", type=onnx.AttributeProto.INTS)
    body = helper.make_function(DOMAIN, "f", ["a"], ["b"], [made], OPSETS, attributes=["k"])
    return model(node("f", ["x"], ["y"], domain=DOMAIN, k=[10**10]), functions=[body])


def constant_branches() -> onnx.ModelProto:
    def branch(name: str) -> onnx.GraphProto:
        size = node("Constant", [], [name], value_ints=[10**5, 10**5])
        return helper.make_graph([size], name, [], [helper.make_tensor_value_info(name, INT64, [2])])

    choice = node("If", ["true"], ["size"], then_branch=branch("a"), else_branch=branch("b"))
    true = helper.make_tensor("true", BOOL, [], [True])
    return model(choice, node("ConstantOfShape", ["size"], ["y"]), weights=[true])


def two_values() -> onnx.ModelProto:
    size = node("Constant", [], ["size"], value_ints=[10**5, 10**5])
    size.attribute.append(helper.make_attribute("value_ints", [5, 5]))
    return model(size, node("ConstantOfShape", ["size"], ["y"]))


LARGE = node("Constant", [], ["size"], value_ints=[10**5, 10**5])
BIG = whole("size", 100_000, 100_000)
ATTACKS: dict[str, tuple[Callable[[], onnx.ModelProto | bytes], str]] = {
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
    "a size that comes later": (
        lambda: model(node("ConstantOfShape", ["size"], ["y"]), LARGE),
        "stands before what it takes",
    ),
    "a size of a function": (
        lambda: model(
            node("f", ["x"], ["size"], domain=DOMAIN),
            node("ConstantOfShape", ["size"], ["y"]),
            functions=[function("f", [node("Constant", [], ["b"], value_ints=[10**5, 10**5])])],
        ),
        "10000000000 numbers",
    ),
    "a size of constant branches": (constant_branches, "computed from constants"),
    "a size of a call": (size_of_a_call, "from where its function is called"),
    "a size in two parts": (in_two_parts, "has 2 tensors"),
    "a size that is there twice": (two_values, "two attributes 'value_ints'"),
    "a loop in a hidden field": (hidden, "a field of an unknown kind"),
    "sides of a RoiAlign": (
        lambda: model(node("RoiAlign", ["x", "x", "x"], ["y"], output_height=1 << 20, output_width=1 << 20)),
        "RoiAlign ask for",
    ),
    "scales of an old Upsample": (
        lambda: model(node("Upsample", ["x"], ["y"], scales=[1.0, 1.0, 1e5, 1e5])),
        "scales",
    ),
    "a text that is doubled": (
        lambda: model(
            *(node("StringConcat", [f"c{place}"] * 2, [f"c{place + 1}"]) for place in range(40)),
            node("Cast", ["c40"], ["y"], to=FLOAT),
            weights=[helper.make_tensor("c0", TensorProto.STRING, [1], [b"1"])],
        ),
        "texts of any length",
    ),
    "sparse weights": (sparse, "sparse"),
    "weights without numbers": (empty_weights, r"shape \[100000, 100000\] in 0 bytes"),
    "weights in another file": (elsewhere, "another file"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_it_is_refused_at_once(name: str, tmp_path: Path) -> None:
    make, message = ATTACKS[name]
    made = make()
    data = made if isinstance(made, bytes) else made.SerializeToString()
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
        # Of a map that is hardly larger than its pads: a convolution as segmentation heads have them.
        model(
            node("Reshape", ["x", "square"], ["map"]),
            node("Conv", ["map", "w"], ["y"], dilations=[36, 36], pads=[36] * 4, kernel_shape=[3, 3]),
            weights=[whole("square", 1, 1, 1, 1), helper.make_tensor("w", FLOAT, [1, 1, 3, 3], [1.0] * 9)],
        ),
    )
    for made in honest:
        check_model(made.SerializeToString())
        assert inference_session(made.SerializeToString(), 1).get_outputs()


def test_what_cannot_be_run_is_a_message() -> None:
    made = model(
        node("Reshape", ["x", "square"], ["map"]),
        node("Conv", ["map", "w"], ["y"], group=0),
        weights=[whole("square", 1, 1, 1, 1), helper.make_tensor("w", FLOAT, [1, 1, 1, 1], [1.0])],
    )
    session = OnnxRuntimeSession(made.SerializeToString(), 1)
    with pytest.raises(BundleError, match="ONNX Runtime cannot run the model"):
        session.infer({"x": np.zeros(1, dtype=np.float32)})


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
