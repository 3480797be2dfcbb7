"""The native operator in ONNX Runtime, registered as in any program: against the definition and the portable body."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cpu_builds
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import ONNX_TYPES, Array, ScanCase, error, run, scan_case, scan_feeds, scan_model, scan_node
from onnx import TensorProto, helper
from torch import Tensor

from quartermap_deploy.lowering.operator import (
    DOMAIN,
    INPUTS_1D,
    INPUTS_2D,
    SELECTIVE_SCAN,
    VERSION,
    SequenceVariant,
)
from quartermap_deploy.lowering.sequence_body import sequence_body
from quartermap_deploy.scan.definition import DIRECTIONS, selective_scan_definition

TOLERANCE = 1e-6
HALF_STEP = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
VARIANTS = [
    {"d_inner": 5, "height": 7, "width": 9, "d_state": 1, "rank": 3},
    {"batch": 2, "d_inner": 17, "height": 4, "width": 6, "d_state": 16, "rank": None},
    {"d_inner": 4, "rank": 2, "directions": ("column_reverse",)},
    {"d_inner": 6, "rank": 1, "directions": ("row", "row", "column"), "softplus": False},
    {"d_inner": 3, "height": 1, "width": 1, "rank": None, "directions": ("row_reverse", "column")},
]


@pytest.fixture(scope="module")
def library() -> Path:
    return cpu_builds.library("all")


def open_session(
    model: onnx.ModelProto,
    library: Path,
    threads: int = 1,
    settings: Mapping[str, str] | None = None,
    profile: Path | None = None,
) -> Any:
    """Return a session in which the library is registered."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    for key, value in (settings or {}).items():
        options.add_session_config_entry(key, value)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def ordered(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give every scan of a map the attribute that kernels can read."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "directions":
                names = ",".join(name.decode() for name in attribute.strings)
                node.attribute.append(helper.make_attribute("order", names))
                break
    return model


def run_native(
    model: onnx.ModelProto, feeds: Mapping[str, Array], library: Path, threads: int = 1
) -> list[Array]:
    return list(open_session(model, library, threads).run(None, dict(feeds)))


def case_model(case: ScanCase, dtype: torch.dtype = torch.float32) -> onnx.ModelProto:
    return ordered(scan_model([case.variant], dtype))


# What it computes -------------------------------------------------------------------------------------------------


def test_variants_in_one_model_equal_their_definitions_and_their_bodies(library: Path) -> None:
    cases = [scan_case(**options, seed=i) for i, options in enumerate(VARIANTS)]  # type: ignore[arg-type]
    model = ordered(scan_model([case.variant for case in cases]))
    feeds = {name: a for i, case in enumerate(cases) for name, a in scan_feeds(case, index=i).items()}
    bodies = run(model, feeds)
    for threads in (1, 2, 5):
        native = run_native(model, feeds, library, threads)
        for case, y, portable in zip(cases, native, bodies.values(), strict=True):
            assert error(y, case.expected(torch.float32)) <= TOLERANCE
            assert error(portable, case.expected(torch.float32)) <= TOLERANCE


def test_the_operator_runs_and_not_the_body(library: Path, tmp_path: Path) -> None:
    case = scan_case()
    session = open_session(case_model(case), library, profile=tmp_path / "profile")
    session.run(None, scan_feeds(case))
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    operators = {event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})}
    assert operators == {"SelectiveScan2D"}


def test_float16(library: Path) -> None:
    for options in VARIANTS:
        case = scan_case(**options)  # type: ignore[arg-type]
        (y,) = run_native(case_model(case, torch.float16), scan_feeds(case, torch.float16), library)
        assert y.dtype == np.float16
        assert error(y, case.expected(torch.float16)) <= HALF_STEP[torch.float16] + TOLERANCE


def scan_between_casts(case: ScanCase, kind: int) -> onnx.ModelProto:
    """Return a model whose float32 inputs are cast to a type, scanned in it, and cast back."""
    names = INPUTS_2D if case.low_rank else INPUTS_2D[:-1]
    nodes = [helper.make_node("Cast", [name], [f"cast/{name}"], to=kind) for name in names]
    scan = scan_node(case.variant, "cast/")
    parameters = ("A", "D", "dt_bias")
    scan.input[:] = [name if name in parameters else f"cast/{name}" for name in names]
    nodes = [node for node in nodes if node.input[0] not in parameters]
    nodes += [scan, helper.make_node("Cast", ["y"], ["out"], to=TensorProto.FLOAT)]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, tensor.shape)
        for name, tensor in zip(names, case.tensors, strict=True)
    ]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "casts", inputs, [output])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    return ordered(helper.make_model(graph, opset_imports=opsets, ir_version=10))


@pytest.mark.parametrize(
    ("kind", "dtype"), [(TensorProto.BFLOAT16, torch.bfloat16), (TensorProto.DOUBLE, torch.float32)]
)
def test_bfloat16_and_float64(library: Path, kind: int, dtype: torch.dtype) -> None:
    for options in VARIANTS:
        case = scan_case(**options)  # type: ignore[arg-type]
        feeds = {n: t.float().numpy() for n, t in zip(INPUTS_2D, case.converted(dtype), strict=False)}
        (y,) = run_native(scan_between_casts(case, kind), feeds, library)
        assert error(y, case.expected(dtype)) <= HALF_STEP[dtype] + TOLERANCE


def test_sizes_may_change_between_runs(library: Path) -> None:
    first = scan_case(d_inner=9, height=6, width=7)
    session = open_session(case_model(first), library, threads=2)
    for batch, height, width in ((1, 6, 7), (3, 1, 20), (2, 33, 40), (1, 6, 7)):
        case = scan_case(batch, 9, height, width)
        (y,) = session.run(None, scan_feeds(case))
        assert error(y, case.expected(torch.float32)) <= TOLERANCE
    empty = {name: a[:0] if a.ndim == 4 else a for name, a in scan_feeds(first).items()}
    assert session.run(None, empty)[0].shape == (0, 9, 6, 7)


def test_the_shape_of_the_output_is_inferred(library: Path) -> None:
    model = case_model(scan_case())
    for value, shape in zip(model.graph.input, ((2, 3, 4, 5), (2, 8, 4, 5)), strict=False):
        del value.type.tensor_type.shape.dim[:]
        for size in shape:
            value.type.tensor_type.shape.dim.add().dim_value = size
    model.graph.output[0].type.tensor_type.ClearField("shape")
    (output,) = open_session(model, library).get_outputs()
    assert output.shape == [2, 3, 4, 5] and output.type == "tensor(float)"


# Sequences --------------------------------------------------------------------------------------------------------


def sequence_tensors(length: int = 50, groups: int = 2) -> list[Tensor]:
    case = scan_case(2, 6, 1, length, d_state=3, rank=None, directions=["row"] * groups)
    x, dt, B, C, A, D, bias = case.converted(torch.float32)
    narrow = [tensor[:, :, 0].unflatten(1, (groups, 3)).contiguous() for tensor in (B, C)]
    return [x[:, :, 0].repeat(1, groups, 1), dt[:, :, 0].contiguous(), A, *narrow, D, bias]


def sequence_model(
    tensors: Sequence[Tensor | None], kind: int = TensorProto.FLOAT, softplus: int = 1, body: bool = True
) -> onnx.ModelProto:
    """Return a model of one scan over a sequence; a missing input has an empty name."""
    names = [name if tensor is not None else "" for name, tensor in zip(INPUTS_1D, tensors, strict=True)]
    while not names[-1]:
        names.pop()
    node = helper.make_node(SELECTIVE_SCAN, names, ["y"], domain=DOMAIN, name="scan", delta_softplus=softplus)
    parameters = ("A", "D", "delta_bias")
    inputs = [
        helper.make_tensor_value_info(
            name, TensorProto.FLOAT if name in parameters else kind, [None] * tensor.ndim
        )
        for name, tensor in zip(INPUTS_1D, tensors, strict=True)
        if tensor is not None
    ]
    output = helper.make_tensor_value_info("y", kind, [None] * 3)
    variant = SequenceVariant.of(node.input, {"delta_softplus": softplus}, 3)
    return helper.make_model(
        helper.make_graph([node], "sequence", inputs, [output]),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[sequence_body(variant, "")] if body else [],
        ir_version=10,
    )


@pytest.mark.parametrize("missing", [(), ("D",), ("delta_bias",), ("D", "delta_bias")], ids=str)
def test_sequences_with_and_without_their_optional_inputs(library: Path, missing: Sequence[str]) -> None:
    given = [
        None if name in missing else tensor
        for name, tensor in zip(INPUTS_1D, sequence_tensors(), strict=True)
    ]
    doubles = [None if tensor is None else tensor.double() for tensor in given]
    expected = selective_scan_definition(*doubles, True)  # type: ignore[arg-type]
    feeds = {n: t.numpy() for n, t in zip(INPUTS_1D, given, strict=True) if t is not None}
    model = sequence_model(given)
    assert error(run(model, feeds)["y"], expected) <= TOLERANCE
    for threads in (1, 3):
        assert error(run_native(model, feeds, library, threads)[0], expected) <= TOLERANCE


def test_sequences_in_float16_without_softplus(library: Path) -> None:
    u, delta, A, B, C, D, _ = sequence_tensors()
    maps = [tensor.half() for tensor in (u, delta.abs() + 0.01, B, C)]
    given = [maps[0], maps[1], A, maps[2], maps[3], D, None]
    doubles = [None if tensor is None else tensor.double() for tensor in given]
    expected = selective_scan_definition(*doubles, False)  # type: ignore[arg-type]
    feeds = {n: t.numpy() for n, t in zip(INPUTS_1D, given, strict=True) if t is not None}
    model = sequence_model(given, ONNX_TYPES[torch.float16], softplus=0, body=False)
    (y,) = run_native(model, feeds, library)
    assert y.dtype == np.float16
    assert error(y, expected) <= HALF_STEP[torch.float16] + TOLERANCE


def unsaid(model: onnx.ModelProto, attribute: str) -> onnx.ModelProto:
    """Take an attribute from the only node of a model."""
    (node,) = model.graph.node
    kept = [item for item in node.attribute if item.name != attribute]
    assert len(kept) == len(node.attribute) - 1
    del node.attribute[:]
    node.attribute.extend(kept)
    return model


def test_where_a_node_does_not_say_maps_have_a_softplus_and_sequences_have_none(library: Path) -> None:
    case = scan_case()
    model = unsaid(case_model(case), "softplus")
    assert error(run_native(model, scan_feeds(case), library)[0], case.expected(torch.float32)) <= TOLERANCE
    given = sequence_tensors()
    given[1] = given[1].abs() + 0.01
    doubles = [tensor.double() for tensor in given[:-1]]
    feeds = {name: tensor.numpy() for name, tensor in zip(INPUTS_1D, given[:-1], strict=False)}
    silent = unsaid(sequence_model([*given[:-1], None], body=False), "delta_softplus")
    (y,) = run_native(silent, feeds, library)
    assert error(y, selective_scan_definition(*doubles, None, False)) <= TOLERANCE  # type: ignore[arg-type]


# Threads and sessions ---------------------------------------------------------------------------------------------


def test_the_number_of_threads_changes_no_bit_of_small_maps(library: Path) -> None:
    case = scan_case(2, 70, 9, 12, d_state=16, rank=3)
    model, feeds = case_model(case), scan_feeds(case)
    (alone,) = run_native(model, feeds, library)
    for threads in (2, 3, 8, 64):
        settings = {"quartermap.threads": str(threads)}
        (y,) = open_session(model, library, threads, settings).run(None, feeds)
        assert np.array_equal(y, alone)
    for threads in (1, 64):  # more tasks than the session has threads, and fewer
        (y,) = open_session(model, library, 2, {"quartermap.threads": str(threads)}).run(None, feeds)
        assert np.array_equal(y, alone)


@pytest.mark.parametrize(
    "said", ["0", "-3", "many", "4294967295", "99999999999999999999", "1e3", "7" * 100, ""]
)
def test_a_number_of_threads_that_is_none_is_passed_over(library: Path, said: str) -> None:
    case = scan_case(d_inner=40, height=20, width=20)
    (y,) = open_session(case_model(case), library, 2, {"quartermap.threads": said}).run(
        None, scan_feeds(case)
    )
    assert error(y, case.expected(torch.float32)) <= TOLERANCE


def test_sixteen_sessions_side_by_side(library: Path) -> None:
    cases = [scan_case(d_inner=5 + i, height=9, width=8, rank=2) for i in range(16)]
    sessions = [open_session(case_model(case), library, 2) for case in cases]
    for _ in range(3):
        for case, session in zip(cases, sessions, strict=True):
            assert error(session.run(None, scan_feeds(case))[0], case.expected(torch.float32)) <= TOLERANCE


def test_sixty_four_threads_each_with_a_session(library: Path) -> None:
    """Loading too happens at once; every other model has directions of its own."""
    orders = (DIRECTIONS, ("column",))
    cases = [scan_case(d_inner=21, height=12, width=11, rank=2, directions=names) for names in orders]
    models = [case_model(case) for case in cases]
    alone = [run_native(m, scan_feeds(c), library)[0] for m, c in zip(models, cases, strict=True)]
    start = threading.Barrier(64)

    def load_and_run(i: int) -> bool:
        start.wait()
        session = open_session(models[i % 2], library)
        feeds = scan_feeds(cases[i % 2])
        return all(np.array_equal(session.run(None, feeds)[0], alone[i % 2]) for _ in range(3))

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(load_and_run, range(64)))


# Refusals ---------------------------------------------------------------------------------------------------------


def without_order(names: Sequence[str]) -> onnx.ModelProto:
    return scan_model([scan_case(rank=2, directions=names).variant])


@pytest.mark.parametrize("names", [("row",), ("column", "row", "row_reverse", "column_reverse")])
def test_directions_that_no_order_tells_are_refused(library: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(Exception, match=f"directions of a node are '{','.join(names)}'.*`order`"):
        open_session(without_order(names), library)


def test_the_directions_of_vmamba_need_no_order(library: Path) -> None:
    case = scan_case(rank=2)
    (y,) = run_native(without_order(DIRECTIONS), scan_feeds(case), library)
    assert error(y, case.expected(torch.float32)) <= TOLERANCE


def test_a_refusal_leaves_nothing_behind_for_the_next_model(library: Path) -> None:
    for _ in range(2):
        with pytest.raises(Exception, match="`order`"):
            open_session(without_order(("row",)), library)
        case = scan_case(rank=2)
        (y,) = run_native(without_order(DIRECTIONS), scan_feeds(case), library)
        assert error(y, case.expected(torch.float32)) <= TOLERANCE


def test_a_load_that_fails_early_leaves_nothing_behind(library: Path) -> None:
    """Shapes are inferred, and then another node of the graph is refused before any kernel is made."""
    broken = without_order(("row",))
    broken.graph.node.append(helper.make_node("NoSuchOperator", ["0/y"], ["z"]))
    with pytest.raises(Exception, match="NoSuchOperator"):
        open_session(broken, library)
    case = scan_case(rank=2)
    (y,) = run_native(without_order(DIRECTIONS), scan_feeds(case), library)
    assert error(y, case.expected(torch.float32)) <= TOLERANCE


def test_an_order_that_contradicts_the_directions_is_refused(library: Path) -> None:
    model = without_order(("row",))
    model.graph.node[0].attribute.append(helper.make_attribute("order", "column"))
    with pytest.raises(Exception, match="are 'row', and its attribute `order` says 'column'"):
        open_session(model, library)


def test_an_unknown_direction_is_refused(library: Path) -> None:
    model = without_order(("row",))
    node = model.graph.node[0]
    del node.attribute[:]
    node.attribute.extend([helper.make_attribute(n, v) for n, v in (("directions", ["up"]), ("order", "up"))])
    with pytest.raises(Exception, match=r"unknown scan direction 'up'; expected row, column"):
        open_session(model, library)


WRONG = [
    ("dt", (1, 7, 4, 5), r"input dt is \(1, 7, 4, 5\), expected \(1, 8, 4, 5\)"),
    ("B", (1, 4, 4, 4), r"input B is \(1, 4, 4, 4\), expected \(1, 4, 4, 5\)"),
    ("C", (2, 4, 4, 5), r"input C is \(2, 4, 4, 5\), expected \(1, 4, 4, 5\)"),
    ("A", (11, 1), r"input A is \(11, 1\), expected \(12, 1\)"),
    ("D", (13,), r"input D is \(13\), expected \(12\)"),
    ("dt_bias", (1,), r"input dt_bias is \(1\), expected \(12\)"),
    ("dt_weight", (12, 3), r"input dt is \(1, 8, 4, 5\), expected \(1, 12, 4, 5\)"),
    ("dt_weight", (12, 0), r"dt_weight has rank 0"),
    ("A", (12, 0), ""),
]


@pytest.mark.parametrize(("name", "shape", "words"), WRONG)
def test_wrong_shapes_name_node_input_and_sizes(
    library: Path, name: str, shape: tuple[int, ...], words: str
) -> None:
    case = scan_case()
    model = case_model(case)
    model.graph.node[0].name = "blocks.3/scan"
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")
    session = open_session(model, library)
    feeds = scan_feeds(case)
    feeds[f"0/{name}"] = np.ones(shape, dtype=np.float32)
    with pytest.raises(Exception, match="quartermap.SelectiveScan2D node 'blocks.3/scan': .*" + words):
        session.run(None, feeds)
    # The session goes on.
    assert error(session.run(None, scan_feeds(case))[0], case.expected(torch.float32)) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("delta", (2, 12, 49), r"input delta is \(2, 12, 49\), expected \(2, 12, 50\)"),
        ("B", (2, 5, 3, 50), r"input B is \(2, 5, 3, 50\).* a K that divides the 12 channels"),
        ("C", (2, 2, 4, 50), r"input C is \(2, 2, 4, 50\), expected \(2, 2, 3, 50\)"),
        ("D", (1,), r"input D is \(1\), expected \(12\)"),
    ],
)
def test_wrong_shapes_of_sequences(library: Path, name: str, shape: tuple[int, ...], words: str) -> None:
    tensors = sequence_tensors()
    model = sequence_model(tensors)
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")
    feeds = {n: t.numpy() for n, t in zip(INPUTS_1D, tensors, strict=True)}
    feeds[name] = np.ones(shape, dtype=np.float32)
    with pytest.raises(Exception, match="quartermap.SelectiveScan node 'scan': " + words):
        run_native(model, feeds, library)


def test_an_operator_without_registration_and_body_is_unknown_to_onnx_runtime() -> None:
    """So what the tests above run is the library's."""
    model = sequence_model(sequence_tensors(), body=False)
    with pytest.raises(Exception, match="quartermap"):
        run(model, {})
