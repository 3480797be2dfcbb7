"""Layer normalisation of maps: the kernel against float64, the operator, and the sessions that take it."""

from __future__ import annotations

import ctypes
import functools
import json
from pathlib import Path
from typing import Any

import cpu_builds
import numpy as np
import onnx
import onnxruntime
import pytest
from cpu_builds import BUILT_SETS, FORMS
from helpers import Array, traced_digits
from onnx import TensorProto, helper, numpy_helper

from quartermap_deploy.lowering.operator import DOMAIN
from quartermap_deploy.native.cpu_kernels import CpuKernels, Parallel
from quartermap_deploy.passes import lower
from quartermap_deploy.targets.fused_norms import NORM, fuse_norms, fused_model
from quartermap_deploy.targets.onnxruntime.opening import open_session

TOLERANCE = 1e-6
"""Of the largest output."""
BESIDE = 256
"""Numbers before and behind a result that have to stay as they are."""
BAD_SIZE, TOO_LARGE, NULL_POINTER = 1, 4, 5


class Norm(ctypes.Structure):
    """`QuartermapCpuNorm`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "channels", "positions")),
        ("epsilon", ctypes.c_float),
        ("threads", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("x", "scale", "bias", "y")),
    )


@functools.cache
def library_of(form: str) -> tuple[ctypes.CDLL, CpuKernels]:
    library = ctypes.CDLL(str(cpu_builds.library_of(form)))
    return library, CpuKernels(library)


@pytest.fixture(params=FORMS)
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    found, kernels = library_of(request.param)
    if request.param in BUILT_SETS and not kernels.choose(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return found


def status_of(library: ctypes.CDLL, norm: Norm | None) -> int:
    pointer = None if norm is None else ctypes.byref(norm)
    return int(library.quartermap_cpu_norm(pointer, Parallel(), None))


def normalized(
    library: ctypes.CDLL, x: Array, scale: Array, bias: Array, threads: int = 1, epsilon: float = 1e-5
) -> Array:
    """Normalise maps (batch, channels, positions) by the kernel, which writes nothing beside the result."""
    memory = np.full(x.size + 2 * BESIDE, np.nan, np.float32)
    memory[:BESIDE] = memory[-BESIDE:] = 7.0
    y = memory[BESIDE:-BESIDE].reshape(x.shape)
    norm = Norm(*x.shape, epsilon, threads, x.ctypes.data, scale.ctypes.data, bias.ctypes.data, y.ctypes.data)
    assert status_of(library, norm) == 0
    assert (memory[:BESIDE] == 7).all() and (memory[-BESIDE:] == 7).all()
    return y


def expected(x: Array, scale: Array, bias: Array, epsilon: float = 1e-5) -> Array:
    exact = x.astype(np.float64)
    off = exact - exact.mean(1, keepdims=True)
    deviation = np.sqrt((off**2).mean(1, keepdims=True) + epsilon)
    shape = (1, -1, *[1] * (x.ndim - 2))
    return off / deviation * scale.astype(np.float64).reshape(shape) + bias.reshape(shape)


def made(shape: tuple[int, ...], seed: int = 0) -> tuple[Array, Array, Array]:
    random = np.random.default_rng(seed)
    channels = shape[1]
    x = random.standard_normal(shape, dtype=np.float32) * 3 + 2
    return (
        x,
        random.standard_normal(channels, dtype=np.float32),
        random.standard_normal(channels, dtype=np.float32),
    )


def difference(found: Array, wanted: Array) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "shape", [(1, 96, 3136), (2, 5, 49), (3, 768, 49), (1, 1, 1), (2, 33, 8), (1, 200, 131), (5, 2, 7)]
)
def test_every_position_is_normalised(
    library: ctypes.CDLL, shape: tuple[int, int, int], threads: int
) -> None:
    x, scale, bias = made(shape)
    found = normalized(library, x, scale, bias, threads)
    error = difference(found, expected(x, scale, bias))
    assert error <= TOLERANCE


def test_many_channels_are_added_up_without_loss(library: ctypes.CDLL) -> None:
    x, scale, bias = made((1, 50_000, 9))
    error = difference(normalized(library, x, scale, bias), expected(x, scale, bias))
    assert error <= TOLERANCE


@pytest.mark.parametrize("positions", [1, 7, 16, 183, 300])
def test_epsilon_counts_at_every_position(library: ctypes.CDLL, positions: int) -> None:
    """Where channels hardly differ most of what they are divided by is epsilon, and where they do not, all of it."""
    x, scale, bias = made((2, 5, positions))
    for spread, epsilon in ((0.0, 1e-5), (0.001, 1e-5), (0.1, 0.3)):
        maps = (spread * (x - 2)).astype(np.float32)
        found = normalized(library, maps, scale, bias, epsilon=epsilon)
        assert difference(found, expected(maps, scale, bias, np.float32(epsilon))) <= 2 * TOLERANCE


def test_what_is_no_number_stays_at_its_position(library: ctypes.CDLL) -> None:
    x, scale, bias = made((1, 12, 40))
    x[0, 3, 17], x[0, 5, 39] = np.nan, np.inf
    found = normalized(library, x, scale, bias)
    wrong = np.isnan(found).all(1)[0]
    assert wrong[17] and np.isnan(found[0, 5, 39])
    sound = [i for i in range(40) if i not in (17, 39)]
    assert difference(found[..., sound], expected(x[..., sound], scale, bias)) <= TOLERANCE


def test_what_cannot_be_is_refused(library: ctypes.CDLL) -> None:
    x, scale, bias = made((1, 4, 4))
    y = np.zeros_like(x)
    sound = (1, 4, 4, 1e-5, 1, x.ctypes.data, scale.ctypes.data, bias.ctypes.data, y.ctypes.data)
    for place, value, status in [
        *[(place, -1, BAD_SIZE) for place in (0, 1, 2, 4)],
        *[(3, value, BAD_SIZE) for value in (0.0, -1e-5, float("nan"))],
        *[(place, 1 << 62, TOO_LARGE) for place in (0, 1, 2)],
        *[(place, None, NULL_POINTER) for place in (5, 6, 7, 8)],
    ]:
        changed = list(sound)
        changed[place] = value
        assert status_of(library, Norm(*changed)) == status, (place, value)
    assert status_of(library, None) == NULL_POINTER
    assert status_of(library, Norm(0, 4, 4, 1e-5, 1, None, None, None, None)) == 0
    assert not y.any()


# Graphs -----------------------------------------------------------------------------------------------------------


def norm_graph(
    first: tuple[int, ...] = (0, 2, 3, 1),
    last: tuple[int, ...] = (0, 3, 1, 2),
    axis: int = -1,
    kind: int = TensorProto.FLOAT,
    outputs: tuple[str, ...] = ("y",),
    constant: bool = True,
    inputs: int = 3,
    after: bool = False,
) -> onnx.ModelProto:
    """A map of 6 channels, normalised between two transpositions; options make it something else."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    random = np.random.default_rng(1)
    constants = [
        numpy_helper.from_array(random.standard_normal(6).astype(dtype), name) for name in ("scale", "bias")
    ]
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"], name="first", perm=first),
        helper.make_node(
            "LayerNormalization",
            ["turned", "scale", "bias"][:inputs],
            ["normed"],
            name="norm",
            axis=axis,
            epsilon=0.03,
        ),
        helper.make_node("Transpose", ["normed"], ["y"], name="last", perm=last),
    ]
    if after:
        nodes.append(helper.make_node("Neg", ["normed"], ["other"]))
        nodes.append(helper.make_node("Neg", ["turned"], ["third"]))
        outputs = (*outputs, "other", "third")
    given = [helper.make_tensor_value_info("x", kind, ["b", 6, "h", "w"])]
    if not constant:
        given += [helper.make_tensor_value_info(name, kind, [6]) for name in ("scale", "bias")]
    graph = helper.make_graph(
        nodes,
        "norm",
        given,
        [helper.make_tensor_value_info(name, kind, [None] * 4) for name in outputs],
        constants if constant else [],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def session_with(library: Path, model: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("axis", [-1, 3])
def test_a_normalisation_between_two_transpositions_is_one_operator(axis: int) -> None:
    model = norm_graph(axis=axis)
    assert fuse_norms(model) == 1
    (node,) = model.graph.node
    assert (node.domain, node.op_type, node.name) == (DOMAIN, NORM, "norm")
    assert (list(node.input), list(node.output)) == (["x", "scale", "bias"], ["y"])
    x = np.random.default_rng(2).standard_normal((2, 6, 5, 7)).astype(np.float32)
    (y,) = session_with(cpu_builds.library("all"), model).run(None, {"x": x})
    scale, bias = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    assert difference(y, expected(x, scale, bias, 0.03)) <= TOLERANCE


def test_epsilon_has_onnx_default() -> None:
    model = norm_graph()
    del model.graph.node[1].attribute[:]
    assert fuse_norms(model) == 1
    (epsilon,) = model.graph.node[0].attribute
    assert epsilon.f == np.float32(1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"first": (0, 3, 2, 1)},
        {"last": (0, 3, 2, 1)},
        {"axis": 2},
        {"axis": 1},
        {"kind": TensorProto.FLOAT16},
        {"constant": False},
        {"inputs": 2},
        {"outputs": ("y", "normed")},
        {"after": True},
    ],
)
def test_what_is_something_else_stays(options: dict[str, Any]) -> None:
    model = norm_graph(**options)
    before = model.SerializeToString()
    assert fuse_norms(model) == 0
    assert model.SerializeToString() == before
    assert fused_model(before) is before


def test_a_turned_map_that_others_read_stays() -> None:
    model = norm_graph(outputs=("y", "turned"))
    assert fuse_norms(model) == 1
    assert [node.op_type for node in model.graph.node] == ["Transpose", NORM]


def test_wrong_sizes_are_refused_by_name() -> None:
    model = norm_graph()
    fuse_norms(model)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "c"
    session = session_with(cpu_builds.library("all"), model)
    with pytest.raises(
        onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument,
        match=r"LayerNormalization2D node 'norm': input Scale is \(6\), expected \(7\), which is \(channels\)",
    ):
        session.run(None, {"x": np.zeros((1, 7, 2, 2), np.float32)})


# Sessions ---------------------------------------------------------------------------------------------------------


def operators_run(model: bytes, folder: Path, **options: Any) -> tuple[dict[str, int], Array]:
    """How often each operator ran for one batch of digits, and the result."""
    session = open_session(model, 1, profile=folder / "profile", **options).session
    (given,) = session.get_inputs()
    images = np.random.default_rng(3).random((2, *given.shape[1:]), dtype=np.float32)
    (y,) = session.run(None, {given.name: images})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    counts: dict[str, int] = {}
    for event in events:
        if event["name"].endswith("kernel_time"):
            name = event["args"]["op_name"]
            counts[name] = counts.get(name, 0) + 1
    return counts, y


def test_sessions_with_the_library_fuse_them(
    cpu_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARTERMAP_NATIVE", str(cpu_library))
    data = lower(traced_digits()).SerializeToString()
    apart, plain = operators_run(data, tmp_path, native=True, fuse=False)
    fused, y = operators_run(data, tmp_path, native=True)
    assert fused[NORM] == apart["LayerNormalization"] and "LayerNormalization" not in fused
    assert NORM not in apart
    assert difference(y, plain) <= 1e-5


def test_sessions_without_the_library_keep_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTERMAP_NATIVE", "0")
    portable, _ = operators_run(lower(traced_digits()).SerializeToString(), tmp_path)
    assert NORM not in portable and portable["LayerNormalization"] > 0
