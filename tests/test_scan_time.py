"""The time in the scan and around it: profiles of ONNX Runtime, and PyTorch's steps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import CHANNEL_FIRST, chained, error, image, run, text_model
from reference_models import tiny

from quartermap_deploy.errors import BundleError
from quartermap_deploy.evaluation import scan_time
from quartermap_deploy.evaluation.scan_time import (
    Recorder,
    TimeParts,
    name_scan_bodies,
    profile_onnxruntime,
    profile_torch,
    read_profile,
)
from quartermap_deploy.evaluation.tome import merge_tokens
from quartermap_deploy.passes import CANONICAL, OPTIMIZED, Selection, lower, run_passes
from quartermap_deploy.pruning import QuarterMap, Subsample, prune

SIZE = 24


def event(name: str, start: float, length: float, kind: str = "Node") -> dict[str, Any]:
    return {"name": name, "ts": start, "dur": length, "cat": kind}


def blocks(pruned: tuple[int, ...] = (), passes: Any = CANONICAL) -> onnx.ModelProto:
    """Two blocks written by hand, some of them pruned."""
    model = text_model(chained(CHANNEL_FIRST, 2), SIZE, SIZE)
    if pruned:
        model, _ = run_passes(model, Selection(pruned, Subsample()), passes)
    return lower(model)


class TestReadProfile:
    def test_parts_of_each_call(self) -> None:
        events = [
            event("model_run", 0, 1000, "Session"),
            event("conv_kernel_time", 10, 200),
            event("block_1/quartermap/keep_kernel_time", 220, 30),
            event("_inlfunc_SelectiveScan2D_scan_body/3_Scan_kernel_time", 300, 400),
            # Inside the Scan, and recorded too.
            event("_inlfunc_SelectiveScan2D_scan_body/3_Scan/0_Mul_kernel_time", 310, 100),
            event("block_1/quartermap/restore_kernel_time", 710, 20),
            event("block_2/merge/node_max_kernel_time", 740, 10),
            event("block_2/unmerge/node_add_kernel_time", 760, 5),
            # A convolution that the passes made, in place of another one.
            event("block_1/quartermap/small_nchwc_kernel_time", 780, 50),
            event("model_run", 2000, 500, "Session"),
            event("_inlfunc_SelectiveScan2D_scan_body/1_Mul_kernel_time", 2100, 50),
            event("model_loading_array", -100, 50, "Session"),
        ]
        assert read_profile(events) == [
            TimeParts(1.0, 0.415, 0.1, 0.065),
            TimeParts(0.5, 0.05, 0.05, 0.0),
        ]

    def test_shares_are_those_of_a_call_that_is_not_recorded(self) -> None:
        values = TimeParts(30.0, 16.0, 8.0, 2.0).to_dict(10.0)
        assert values == {"profiled_ms": 30.0, "scan_ms": 5.0, "added_ms": 1.25, "scan_share": 0.5}

    def test_a_profile_without_scans_is_refused(self) -> None:
        with pytest.raises(BundleError, match="1 calls and no node of a scan"):
            read_profile([event("model_run", 0, 10, "Session"), event("conv_kernel_time", 1, 2)])

    def test_medians_of_each_part(self) -> None:
        calls = [TimeParts(3, 3, 1, 0), TimeParts(1, 1, 3, 5), TimeParts(2, 2, 2, 9)]
        assert TimeParts.median(calls) == TimeParts(2, 2, 2, 5)


class TestOnnxRuntime:
    def test_naming_nodes_changes_no_output(self) -> None:
        model, x = blocks(), image(SIZE, SIZE)
        before = run(model, {"x": x})["y"]
        name_scan_bodies(model)
        assert error(run(model, {"x": x})["y"], before) == 0
        names = [node.name for function in model.functions for node in function.node]
        assert len(set(names)) == len(names) > 20
        assert all(name.startswith("scan_body") for name in names)

    def test_scans_and_what_pruning_adds_are_told_apart(self, tmp_path: Path) -> None:
        models = {"unpruned": blocks(), "canonical": blocks((1, 2)), "sunk": blocks((1, 2), OPTIMIZED)}
        paths = {}
        for name, model in models.items():
            name_scan_bodies(model)
            paths[name] = tmp_path / f"{name}.onnx"
            onnx.save(model, paths[name])
        before = set(tmp_path.iterdir())
        parts = profile_onnxruntime(paths, image(SIZE, SIZE), tmp_path, threads=1, repeats=3)
        assert set(tmp_path.iterdir()) == before
        assert list(parts) == list(models)
        for part in parts.values():
            assert 0 < part.scan < part.total
            assert part.scan + part.added < part.total
        assert parts["unpruned"].added == 0
        assert parts["canonical"].added > 0
        assert parts["sunk"].added > 0


class TestTorch:
    def test_steps_of_each_kind(self) -> None:
        model = tiny("v2")
        models = {
            "unpruned": model,
            "pruned": prune(model, QuarterMap(blocks=(1, 2))),
            "merged": merge_tokens(model, QuarterMap(blocks=(1, 2))),
        }
        images = np.zeros((1, 3, 64, 64), np.float32)
        parts = profile_torch(models, images, repeats=3)
        for part in parts.values():
            assert 0 < part.scan < part.total
            assert part.scan + part.added < part.total
        assert parts["unpruned"].added == 0
        assert parts["merged"].added > 0
        assert parts["pruned"].added > 0

    def test_nothing_is_watched_afterwards(self) -> None:
        from quartermap_deploy.architectures import ss2d

        before = ss2d.selective_scan_2d
        with pytest.raises(ZeroDivisionError), Recorder(time.perf_counter).watching():
            assert ss2d.selective_scan_2d is not before
            raise ZeroDivisionError
        assert ss2d.selective_scan_2d is before

    def test_spans_add_up_by_kind(self) -> None:
        moments = iter([0.0, 1.0, 2.0, 5.0, 6.0, 6.5])
        recorder = Recorder(lambda: next(moments))
        for kind in ("scan", "scan", "added"):
            with recorder.span(kind):
                pass
        assert [recorder.milliseconds(kind) for kind in ("scan", "added", "total")] == [4000, 500, 0]

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")
    def test_events_of_a_gpu(self) -> None:
        merged = merge_tokens(tiny("v2"), QuarterMap(blocks=(1, 2))).to("cuda")
        (part,) = profile_torch({"merged": merged}, np.zeros((1, 3, 64, 64), np.float32)).values()
        assert 0 < part.scan < part.total and 0 < part.added < part.total
        assert scan_time._between(scan_time._cpu_moment(), scan_time._cpu_moment()) >= 0
