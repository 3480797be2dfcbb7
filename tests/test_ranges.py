"""The range scan: the largest value of everything in a graph, and what is kept in float32 because of it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from helpers import (
    CHANNEL_FIRST,
    Array,
    block_weights,
    digits,
    image,
    run,
    text_model,
    traced_digits,
    with_outputs,
)

from quartermap_deploy.errors import InputError, UnknownNameError
from quartermap_deploy.exporting import ranges as module
from quartermap_deploy.exporting.ranges import RangeReport, scan_ranges
from quartermap_deploy.frontend.exporter import INPUT
from quartermap_deploy.lowering.element_types import FLOAT, types_of_values
from quartermap_deploy.passes import infer_shapes, lower
from quartermap_deploy.passes.cast_precision import cast_precision
from quartermap_deploy.validation.rounding import rounded_in_float32

VALUES = ["projected", "convolved", "gate", "features", "narrow", "dt", "B", "C", "scanned", "last", "normal"]


def block(scale: float = 1.0) -> tuple[Array, object]:
    """Return images and a block whose in_proj is scaled, and its depthwise convolution back again."""
    weights = block_weights()
    own = {"in_proj": weights["in_proj"] * np.float32(scale), "conv": weights["conv"] / np.float32(scale)}
    model = text_model(CHANNEL_FIRST, weights={**own, "x_proj": weights["x_proj"] / 6})
    return image(6, 7, batch=5), infer_shapes(model)


def test_the_largest_of_every_value_is_found() -> None:
    images, model = block()
    report = scan_ranges(lower(model), {"x": images})  # type: ignore[arg-type]
    lowered = lower(model)  # type: ignore[arg-type]
    assert list(report.largest) == ["x", *VALUES, "first", "mixed", "y"]
    expected = run(with_outputs(lowered, VALUES), {"x": images})
    for name, value in expected.items():
        assert report.largest[name] == pytest.approx(np.abs(value).max(), rel=1e-6), name
    assert report.largest["x"] == np.abs(images).max()
    assert report.keep_float32 == ()
    assert report.images == 5


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize("group", [1, 2**30])
def test_batches_and_groups_make_no_difference(
    batch: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, model = block()
    lowered = lower(model)  # type: ignore[arg-type]
    expected = scan_ranges(lowered, {"x": images}, batch=5)
    monkeypatch.setattr(module, "GROUP_BYTES", group)
    found = scan_ranges(lowered, {"x": images}, batch=batch)
    assert found.largest == pytest.approx(expected.largest, rel=1e-5)


def test_values_count_by_their_sizes_though_their_batch_lost_its_name() -> None:
    """As it does behind a Resize; a session for every few values took most of the time of a pruned model."""
    images = image(6, 7, batch=5)
    lowered = lower(infer_shapes(text_model(CHANNEL_FIRST, 6, 7)))
    known = module._bytes(lowered, images.shape)
    assert set(known) >= set(VALUES) and known["features"] == 4 * 5 * 6 * 6 * 7
    for value in lowered.graph.value_info:
        value.type.tensor_type.shape.dim[0].dim_param = "unk__0"
    assert module._bytes(lowered, images.shape) == known
    for value in lowered.graph.value_info:
        value.type.tensor_type.shape.dim[1].dim_param = "unk__1"
    assert not set(VALUES) & set(module._bytes(lowered, images.shape))


def test_a_fixed_batch_is_filled_up() -> None:
    images, model = block()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2  # type: ignore[attr-defined]
    found = scan_ranges(lower(model), {"x": images})  # type: ignore[arg-type]
    assert found.largest["x"] == np.abs(images).max()


@pytest.mark.parametrize(("scale", "kept"), [(1e3, False), (4e3, True), (1e5, True)])
def test_what_comes_near_the_limit_is_kept_in_float32(scale: float, kept: bool) -> None:
    images, model = block(scale)
    report = scan_ranges(lower(model), {"x": images})  # type: ignore[arg-type]
    assert (report.largest["projected"] >= 65504 / 8) == kept
    assert report.keep_float32 == (("projected",) if kept else ())
    assert scan_ranges(lower(model), {"x": images}, "bfloat16").keep_float32 == ()  # type: ignore[arg-type]

    typed, _ = cast_precision(model, "float16", keep_float32=report.keep_float32)  # type: ignore[arg-type]
    assert (types_of_values(typed.graph)["projected"] == FLOAT) == kept
    expected = run(lower(model), {"x": images})["y"]  # type: ignore[arg-type]
    found = run(rounded_in_float32(lower(typed)), {"x": images})["y"]
    assert np.abs(found - expected).max() <= 5e-3 * np.abs(expected).max()


def test_infinite_values_are_kept_and_fit_into_json() -> None:
    report = RangeReport("float16", 65504.0, 8.0, 1, {"a": float("inf"), "b": 1.0, "c": 8188.0, "d": 8187.9})
    assert report.keep_float32 == ("a", "c")
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert written["kept_float32"] == {"a": None, "c": 8188.0}
    assert list(written["largest_others"]) == ["d", "b"]
    assert dataclasses.replace(report, factor=1.0).keep_float32 == ("a",)


def test_a_value_that_is_not_a_number_is_kept() -> None:
    images, model = block()
    images[0, 0, 0, 0] = np.nan
    assert "projected" in scan_ranges(lower(model), {"x": images}).keep_float32  # type: ignore[arg-type]


def test_bad_arguments_are_refused() -> None:
    images, model = block()
    with pytest.raises(InputError, match="at least one image"):
        scan_ranges(lower(model), {"x": images[:0]})  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError):
        scan_ranges(lower(model), {"x": images}, "float8")  # type: ignore[arg-type]


def test_nothing_in_the_digits_model_comes_near_the_limit() -> None:
    _, images = digits()
    graph = infer_shapes(traced_digits())
    report = scan_ranges(lower(graph), {INPUT: images.numpy()})
    assert report.keep_float32 == ()
    assert len(report.largest) > 200
    assert 10 < max(report.largest.values()) < 1000
