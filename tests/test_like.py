"""Files that another tool changed, run as the bundles that they come from: `load_like` and --like."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import toy_bundles
from evaluation_data import digit_folders
from helpers import error
from made_once import made_once
from onnx import TensorProto, helper
from served import ask, file_of, serving
from test_cli import Refuse, call, contents, refused, workplace

import quartermap_deploy as qm
from quartermap_deploy.errors import BundleError, InputError, ParityError, ServeError, UnknownNameError
from quartermap_deploy.passes.store_weights import store_weights
from quartermap_deploy.serving.options import ServeOptions
from quartermap_deploy.serving.page import page_values
from quartermap_deploy.serving.startup import check_golden, make_plan, open_sessions

__all__ = ["refused", "workplace"]

Change = Callable[[onnx.ModelProto], onnx.ModelProto]


@functools.cache
def model() -> onnx.ModelProto:
    return onnx.load(toy_bundles.classifier() / "model.onnx")


def changed(name: str, change: Change) -> Path:
    """The bundle's model, as a tool left it; made once, and not to be changed."""
    return made_once(f"{name}.onnx", lambda path: onnx.save(change(model()), path))


def half(model: onnx.ModelProto) -> onnx.ModelProto:
    """In float16 as converters do it: weights, and what goes in and comes out."""
    typed = store_weights(model, "float16")
    taken, given = typed.graph.input[0], typed.graph.output[0]
    for node in typed.graph.node:
        node.input[:] = ["whole" if name == taken.name else name for name in node.input]
        node.output[:] = ["exact" if name == given.name else name for name in node.output]
    typed.graph.node.insert(0, helper.make_node("Cast", [taken.name], ["whole"], to=TensorProto.FLOAT))
    typed.graph.node.append(helper.make_node("Cast", ["exact"], [given.name], to=TensorProto.FLOAT16))
    for value in (taken, given):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    del typed.graph.value_info[:]
    return typed


def single(model: onnx.ModelProto) -> onnx.ModelProto:
    """With the batch fixed at 1."""
    result = onnx.ModelProto.FromString(model.SerializeToString())
    for value in (*result.graph.input, *result.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del result.graph.value_info[:]
    return result


def other(change: Callable[[onnx.GraphProto], None]) -> Change:
    """A change of the graph."""

    def made(model: onnx.ModelProto) -> onnx.ModelProto:
        result = onnx.ModelProto.FromString(model.SerializeToString())
        change(result.graph)
        return result

    return made


def inlined() -> Path:
    return changed("toy_inlined", qm.inline)


def halved() -> Path:
    return changed("toy_half", half)


def images(count: int = 2) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((count, 3, 32, 32)).astype(np.float32)


def test_a_file_is_run_as_its_bundle_and_nothing_is_written() -> None:
    folder = toy_bundles.classifier()
    before = contents(folder)
    bundle, like = qm.load_bundle(folder), qm.load_like(inlined(), folder)
    assert (like.path, like.changed, like.name) == (folder, inlined(), "toy_inlined.onnx")
    assert like.model_path == inlined() and like.default_target == "onnxruntime"
    assert (like.labels, like.task, like.preprocessing) == (bundle.labels, bundle.task, bundle.preprocessing)
    assert like.inputs == bundle.inputs and like.outputs == bundle.outputs
    like.check_graph()
    assert like.session(native=False) is not bundle.session(native=False)
    expected = bundle.session(native=False).run(images())
    assert np.array_equal(like.session(native=False).run(images()), expected)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    (found,), (wanted,) = (one.predict(pixels, top=1) for one in (like, bundle))
    assert found.scores[0].label == wanted.scores[0].label
    assert contents(folder) == before


def test_types_and_sizes_are_those_of_the_file() -> None:
    bundle, like = qm.load_bundle(toy_bundles.classifier()), qm.load_like(halved(), toy_bundles.classifier())
    assert [item.type for item in (*like.inputs, *like.outputs)] == ["float16", "float16"]
    found = like.run(images().astype(np.float16))
    assert isinstance(found, np.ndarray) and found.dtype == np.float16
    assert 0 < error(found.astype(np.float32), bundle.run(images())) <= 5e-3  # type: ignore[arg-type]
    fixed = qm.load_like(changed("toy_single", single), bundle)
    assert fixed.inputs[0].shape == (1, 3, 32, 32)
    assert error(fixed.run(images(1)), bundle.run(images(1))) <= 1e-6  # type: ignore[arg-type]


def _rename(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        node.input[:] = ["pixels" if name == graph.input[0].name else name for name in node.input]
    graph.input[0].name = "pixels"


def _fewer(graph: onnx.GraphProto) -> None:
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = 9


def _whole(graph: onnx.GraphProto) -> None:
    graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8


def _flat(graph: onnx.GraphProto) -> None:
    del graph.output[0].type.tensor_type.shape.dim[1:]


def _more(graph: onnx.GraphProto) -> None:
    graph.output.append(helper.make_tensor_value_info("block_1", TensorProto.FLOAT, None))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_rename, r"takes pixels \(.*, 3, 32, 32\) of float32; expected \w+ \(.*, 3, 32, 32\) of float32"),
        (_whole, r"takes \w+ \(.*\) of uint8; expected"),
        (_fewer, r"gives \w+ \(\w+, 9\) of float32; expected \w+ \(\w+, 10\) of float32"),
        (_flat, r"gives \w+ \(\w+\) of float32; expected"),
        (_more, r"gives .*, block_1 \(\) of float32; expected"),
    ],
)
def test_another_interface_is_refused(
    change: Callable[[onnx.GraphProto], None], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.onnx"
    onnx.save(other(change)(model()), path)
    with pytest.raises(InputError, match=words) as caught:
        qm.load_like(path, toy_bundles.classifier())
    assert "Name the bundle that the file was made from" in str(caught.value)


def test_what_no_runtime_should_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fused.onnx"
    foreign = helper.make_node(
        "FusedMatMul", [model().graph.input[0].name] * 2, ["unused"], domain="com.microsoft"
    )
    onnx.save(other(lambda graph: graph.node.insert(0, foreign))(model()), path)
    with pytest.raises(BundleError, match=r"com\.microsoft.*have the tool write ONNX's own operators"):
        qm.load_like(path, toy_bundles.classifier())
    path.write_bytes(b"no model")
    for wrong in (path, tmp_path, tmp_path / "absent.onnx"):
        with pytest.raises(BundleError):
            qm.load_like(wrong, toy_bundles.classifier())


# Commands -----------------------------------------------------------------------------------------------------------


def test_eval_measures_the_file(workplace: Path) -> None:
    folder = toy_bundles.classifier()
    digit_folders(workplace / "images", [str(digit) for digit in range(10)], per_class=2)
    data = ("--data", "images", "--json")
    expected = call("eval", folder, *data).json
    found = call("eval", inlined(), "--like", folder, *data).json
    third = call("eval", halved(), "--like", folder, *data).json
    assert found["source"] == "toy_inlined.onnx" and found["images"] == third["images"] == 20
    for key in ("top1", "per_class", "preprocessing", "model"):
        assert found[key] == expected[key]
    # A state of the bundle is none of the file.
    call("eval", folder, *data, "--resume", "state.json")
    assert call("eval", inlined(), "--like", folder, *data, "--resume", "state.json").code == 2


def test_bench_times_files_beside_their_bundle(workplace: Path) -> None:
    folder = toy_bundles.classifier()
    files = (inlined(), halved(), changed("toy_single", single))
    values = call("bench", folder, *files, "--like", folder, "--repeats", 1, "--json").json
    assert [entry["name"] for entry in values["bundles"]] == [path.name for path in (folder, *files)]
    assert values["bundles"][1]["scans"].startswith("portable")


def test_serve_compares_it_with_the_golden_outputs() -> None:
    folder = toy_bundles.classifier()

    def golden(path: Path, tolerance: float | None = None) -> float:
        plan = make_plan(qm.load_like(path, folder), ServeOptions(tolerance=tolerance, workers=1))
        assert page_values(plan)["changed"] == path.name
        assert plan.model.properties["parity_worst_relative_error"] == ""
        return check_golden(plan, open_sessions(plan).different())

    assert 0 < golden(inlined()) <= 1e-5
    assert golden(changed("toy_single", single)) <= 1e-5
    with pytest.raises(
        ParityError, match=r"tolerance 1e-04.*`--tolerance \de-0\d` allows it; `quartermap eval"
    ) as caught:
        golden(halved())
    advised = float(str(caught.value).split("`--tolerance ")[1].split("`")[0])
    assert 1e-4 < golden(halved(), advised) <= advised
    wide = changed("toy_wide", other(lambda graph: _fix(graph, 7)))
    with pytest.raises(ParityError, match="takes none of the golden inputs"):
        golden(wide)
    with pytest.raises(ServeError, match="has a tolerance of its own"):
        make_plan(qm.load_bundle(folder), ServeOptions(tolerance=0.1))
    with pytest.raises(ServeError, match="expected a share"):
        ServeOptions(tolerance=float("nan"))


def _fix(graph: onnx.GraphProto, batch: int) -> None:
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    del graph.value_info[:]


def test_a_file_in_float16_is_served() -> None:
    folder = toy_bundles.classifier()
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    (wanted,) = qm.load_bundle(folder).predict(image, top=1)
    with serving(halved(), "--like", folder, "--tolerance", "5e-3") as server:
        assert server.until("loaded")["file"] == str(halved())
        status, _, body = ask(server, "POST", "/classify", file_of(image), Content_Type="image/png")
        assert status == 200 and wanted.scores[0].label in body.decode()
        name = qm.load_bundle(folder).manifest["model"]["name"]
        metadata = json.loads(ask(server, "GET", f"/v2/models/{name}")[2])
        assert metadata["inputs"][0]["datatype"] == "FP16"


def test_what_cannot_be_is_said(refused: Refuse, tmp_path: Path) -> None:
    folder, path = toy_bundles.classifier(), inlined()
    for command in ("eval", "bench", "serve"):
        assert "with --like BUNDLE" in refused(command, path)
        signed = refused(command, path, "--like", folder, "--require-signature", tmp_path / "key.pem")
        assert "is not what was signed" in signed
        assert "the target onnxruntime alone" in refused(
            command, path, "--like", folder, "--target", "tensorrt"
        )
    assert "the target onnxruntime alone" in refused("eval", path, "--like", folder, "--target", "torch")
    for command in ("eval", "serve"):
        assert "expected an ONNX file" in refused(command, folder, "--like", folder)
    assert "none is named" in refused("bench", folder, "--like", folder)
    assert "no share" in refused("serve", path, "--like", folder, "--tolerance", "nan")
    with pytest.raises(UnknownNameError):
        qm.load_like(path, folder).session("tensorrt")
