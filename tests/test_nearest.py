"""Keeping positions and nearest upsampling: the same indices everywhere, for every size, stride and keep.

The meaning is source index floor(i·H'/H), in integers. These tests compare it, position by position, with the PyTorch
reference and with the ONNX nodes that the passes write, run by ONNX Runtime.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from helpers import Array, error, run, run_session, session
from onnx import helper
from torch.nn import functional

from quartermap_deploy.passes.base import GraphWriter
from quartermap_deploy.passes.subsampling import write_keep, write_restore
from quartermap_deploy.pruning.plan import Subsample
from quartermap_deploy.pruning.positions import keep_positions, restore_positions

LARGEST = 512
SIZES = range(1, LARGEST + 1)
PAIRS = [(stride, keep) for stride in range(2, 9) for keep in range(1, stride)]


def kept_positions(size: int, stride: int, keep: int) -> list[int]:
    """Return the positions that stay, by the plan's words: of every `stride`, the first `keep`."""
    return [i for i in range(size) if i % stride < keep]


def sources(size: int, stride: int, keep: int) -> list[int]:
    """Return, for every position of the restored map, the position it is copied from."""
    kept = len(kept_positions(size, stride, keep))
    return [i * kept // size for i in range(size)]


def expected_sources(stride: int, keep: int) -> Array:
    """Return the sources of all sizes, one after the other."""
    return np.concatenate([sources(size, stride, keep) for size in SIZES])


def columns(count: int) -> Array:
    """Return a map (1, 1, count, 1) that holds its own row numbers."""
    return np.arange(count, dtype=np.float32).reshape(1, 1, -1, 1)


def build(outputs: list[gs.Variable], inputs: list[gs.Variable], nodes: list[gs.Node]) -> onnx.ModelProto:
    """Return a model of the nodes."""
    graph = gs.Graph(nodes, inputs=inputs, outputs=outputs, opset=20)
    model = gs.export_onnx(graph, do_type_check=False)
    model.ir_version = 10
    return model


def writer(graph: gs.Graph, prefix: str) -> GraphWriter:
    """Return a writer that adds nodes at the end of a graph."""
    return GraphWriter(graph, prefix, np.dtype(np.float32), len(graph.nodes))


def map_variable(name: str, *sizes: int | str) -> gs.Variable:
    """Return a float32 value of a known or open shape."""
    return gs.Variable(name, dtype=np.dtype(np.float32), shape=sizes)


# PyTorch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "keep"), PAIRS)
def test_the_reference_in_pytorch(stride: int, keep: int) -> None:
    subsample = Subsample(stride, keep)
    for size in SIZES:
        kept = kept_positions(size, stride, keep)
        assert subsample.kept_size(size) == len(kept) and list(subsample.kept_indices(size)) == kept
        full = torch.from_numpy(columns(size))
        assert keep_positions(full, subsample).flatten().tolist() == kept
    restored = [
        restore_positions(torch.from_numpy(columns(subsample.kept_size(size))), (size, 1), subsample)
        for size in SIZES
    ]
    assert np.array_equal(torch.cat(restored, dim=2).flatten().numpy(), expected_sources(stride, keep))


# ONNX, sizes known ------------------------------------------------------------------------------------------------


def known_sizes_model(subsample: Subsample, axis: int) -> onnx.ModelProto:
    """Return a model that restores, from prefixes of one long map, the maps of every size, and joins them."""
    graph = gs.Graph(opset=20)
    # (1, 1, kept, 1) for rows, (1, 1, 1, kept) for columns.
    shape = [1, 1, LARGEST, 1] if axis == 2 else [1, 1, 1, LARGEST]
    ramp = map_variable("ramp", *shape)
    prefixes: dict[int, gs.Variable] = {}
    restored = []
    for size in SIZES:
        small, full = list(shape), list(shape)
        small[axis], full[axis] = subsample.kept_size(size), size
        write = writer(graph, f"size_{size}")
        if small[axis] not in prefixes:
            bounds = [
                write.constant(name, np.array([value], dtype=np.int64))
                for name, value in (("start", 0), ("end", small[axis]), ("axis", axis))
            ]
            prefixes[small[axis]] = write("Slice", "prefix", [ramp, *bounds])
            prefixes[small[axis]].shape = small
        full_map = map_variable(f"full_{size}", *full)
        restored.append(write_restore(write, prefixes[small[axis]], full_map, subsample))
    joined = map_variable("joined", *[None] * 4)
    graph.nodes.append(gs.Node("Concat", attrs={"axis": axis}, inputs=restored, outputs=[joined]))
    return build([joined], [ramp], graph.nodes)


@pytest.mark.parametrize(("stride", "keep"), PAIRS)
def test_nodes_for_known_sizes(stride: int, keep: int) -> None:
    subsample = Subsample(stride, keep)
    # The two axes are written by the same lines, so one stride is enough to see that columns work as well.
    for axis in (2, 3) if stride == 2 else (2,):
        model = known_sizes_model(subsample, axis)
        ramp = columns(LARGEST) if axis == 2 else columns(LARGEST).transpose(0, 1, 3, 2)
        restored = run(model, {"ramp": ramp})["joined"].flatten()
        assert np.array_equal(restored, expected_sources(stride, keep))
        found = {node.op_type for node in model.graph.node} & {"Resize", "Gather"}
        assert "Resize" in found
        if (stride, keep) == (2, 1):
            assert found == {"Resize"}


# ONNX, sizes open -------------------------------------------------------------------------------------------------


def open_sizes_model(subsample: Subsample) -> onnx.ModelProto:
    """Return a model that subsamples a map and restores it, whatever its height and width are."""
    graph = gs.Graph(opset=20)
    full = map_variable("full", 1, 1, "height", "width")
    small = write_keep(writer(graph, "keeping"), full, subsample)
    small.shape = [1, 1, None, None]
    restored = write_restore(writer(graph, "restoring"), small, full, subsample)
    kept_output, restored_output = map_variable("kept", *[None] * 4), map_variable("restored", *[None] * 4)
    for source, output in ((small, kept_output), (restored, restored_output)):
        graph.nodes.append(gs.Node("Identity", inputs=[source], outputs=[output]))
    return build([kept_output, restored_output], [full], graph.nodes)


@pytest.mark.parametrize(("stride", "keep"), PAIRS)
def test_nodes_for_open_sizes(stride: int, keep: int) -> None:
    ready = session(open_sizes_model(Subsample(stride, keep)))
    for size in SIZES:
        kept = kept_positions(size, stride, keep)
        outputs = run_session(ready, {"full": columns(size)})
        assert outputs["kept"].flatten().tolist() == kept
        # The restored map holds numbers of the full map, as the kept map does.
        taken = np.array(kept)[sources(size, stride, keep)]
        assert np.array_equal(outputs["restored"].flatten(), taken), size
        assert outputs["restored"].shape == (1, 1, size, 1)


@pytest.mark.parametrize(("stride", "keep"), [(2, 1), (3, 2), (5, 1)])
def test_both_axes_at_once(stride: int, keep: int) -> None:
    subsample = Subsample(stride, keep)
    ready = session(open_sizes_model(subsample))
    for height, width in ((7, 9), (1, 14), (14, 1), (56, 31), (94, 3)):
        full = np.arange(height * width, dtype=np.float32).reshape(1, 1, height, width)
        outputs = run_session(ready, {"full": full})
        tensor = torch.from_numpy(full)
        small = keep_positions(tensor, subsample)
        assert np.array_equal(outputs["kept"], small)
        assert np.array_equal(outputs["restored"], restore_positions(small, (height, width), subsample))


def test_stride_two_is_exact_at_every_open_size() -> None:
    """At stride 2 a Resize is written for open sizes; see `_resize_is_exact` for why it never rounds wrongly."""
    model = open_sizes_model(Subsample())
    assert "Resize" in {node.op_type for node in model.graph.node}
    ready = session(model)
    for size in (*range(513, 2049, 7), *range(2049, 4000, 13), 3999):
        restored = run_session(ready, {"full": columns(size)})["restored"].flatten()
        assert np.array_equal(restored, 2 * np.array(sources(size, 2, 1))), size


# Why it is not a Resize everywhere ----------------------------------------------------------------------------------


def resized(kept: int, size: int) -> Array:
    """Return what ONNX Runtime's Resize (nearest, asymmetric, floor) takes for each position."""
    node = helper.make_node(
        "Resize",
        ["small", "", "", "size"],
        ["restored"],
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    graph = helper.make_graph(
        [node],
        "resize",
        [helper.make_tensor_value_info("small", onnx.TensorProto.FLOAT, [1, 1, kept, 1])],
        [helper.make_tensor_value_info("restored", onnx.TensorProto.FLOAT, [1, 1, size, 1])],
        [helper.make_tensor("size", onnx.TensorProto.INT64, [4], [1, 1, size, 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return run(model, {"small": columns(kept)})["restored"].flatten()


def test_a_resize_alone_would_be_wrong_at_some_sizes() -> None:
    """The reason for the Gather: in float32 a Resize lands one position too low where i·H'/H is a whole number."""
    wrong = {}
    for stride, keep in ((3, 1), (5, 2), (7, 3)):
        for size in range(2, 200):
            kept = len(kept_positions(size, stride, keep))
            difference = np.array(sources(size, stride, keep)) - resized(kept, size)
            if difference.any():
                wrong[stride, keep, size] = set(difference.tolist())
    assert wrong and set().union(*wrong.values()) <= {0.0, 1.0, -1.0}


def test_torch_interpolate_alone_would_be_wrong_at_some_sizes() -> None:
    """The reason for integers in the PyTorch reference."""
    stride, keep, size = 3, 1, 94
    small = torch.from_numpy(columns(len(kept_positions(size, stride, keep))))
    interpolated = functional.interpolate(small, size=(size, 1), mode="nearest").flatten().tolist()
    assert interpolated != sources(size, stride, keep)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_interpolation_is_that_of_torch(mode: str) -> None:
    subsample = Subsample(upsample=mode)  # type: ignore[arg-type]
    ready = session(open_sizes_model(subsample))
    random = np.random.default_rng(0)
    for height, width in ((8, 8), (7, 9), (1, 5), (14, 28), (3, 2)):
        full = random.standard_normal((1, 1, height, width)).astype(np.float32)
        small = full[:, :, ::2, ::2]
        expected = functional.interpolate(
            torch.from_numpy(small), size=(height, width), mode=mode, align_corners=False
        )
        assert error(run_session(ready, {"full": full})["restored"], expected) <= 1e-6
