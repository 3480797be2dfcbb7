"""The counters of the server: exact values from known requests."""

from __future__ import annotations

import re

import pytest

from quartermap_deploy.serving.statistics import ModelStatistics, Timings, percentile, prometheus

MS = 1_000_000


@pytest.fixture
def counted() -> ModelStatistics:
    """Two requests that were answered, in two batches, one that failed, and one that waits."""
    one = ModelStatistics("digits", "1")
    one.succeeded(3, 11 * MS, Timings(queue=1 * MS, input=2 * MS, infer=3 * MS, output=5 * MS))
    one.succeeded(1, 70 * MS, Timings(queue=7 * MS, input=11 * MS, infer=13 * MS, output=17 * MS))
    one.failed(19 * MS)
    one.executed(4, Timings(queue=1, input=23 * MS, infer=29 * MS, output=31 * MS))
    one.executed(4, Timings(queue=1, input=1 * MS, infer=1 * MS, output=1 * MS))
    one.executed(1, Timings(queue=1, input=37 * MS, infer=41 * MS, output=43 * MS))
    one.pending = 1
    return one


def test_prometheus_metrics_are_exact(counted: ModelStatistics) -> None:
    lines = dict(re.findall(r'^(\w+)\{model="digits",version="1"\} (\S+)$', prometheus([counted]), re.M))
    assert lines == {
        "nv_inference_request_success": "2",
        "nv_inference_request_failure": "1",
        "nv_inference_count": "4",
        "nv_inference_exec_count": "3",
        "nv_inference_pending_request_count": "1",
        "nv_inference_request_duration_us": "81000",
        "nv_inference_queue_duration_us": "8000",
        "nv_inference_compute_input_duration_us": "13000",
        "nv_inference_compute_infer_duration_us": "16000",
        "nv_inference_compute_output_duration_us": "22000",
    }


def test_all_metrics_but_the_pending_requests_only_grow(counted: ModelStatistics) -> None:
    text = prometheus([counted])
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.M))
    names = re.findall(r"^(\w+)\{", text, re.M)
    pending = "nv_inference_pending_request_count"
    assert kinds == {name: "gauge" if name == pending else "counter" for name in names}


def test_the_statistics_of_the_protocol_are_exact(counted: ModelStatistics) -> None:
    found = counted.to_dict()
    assert (found["inference_count"], found["execution_count"]) == (4, 3)
    assert (found["name"], found["version"]) == ("digits", "1")
    assert {name: (part["count"], part["ns"]) for name, part in found["inference_stats"].items()} == {
        "success": (2, 81 * MS),
        "fail": (1, 19 * MS),
        "queue": (2, 8 * MS),
        "compute_input": (2, 13 * MS),
        "compute_infer": (2, 16 * MS),
        "compute_output": (2, 22 * MS),
        "cache_hit": (0, 0),
        "cache_miss": (0, 0),
    }
    assert [
        (
            batch["batch_size"],
            *(batch[f"compute_{part}"]["ns"] for part in ("input", "infer", "output")),
        )
        for batch in found["batch_stats"]
    ] == [(1, 37 * MS, 41 * MS, 43 * MS), (4, 24 * MS, 30 * MS, 32 * MS)]
    assert [batch["compute_infer"]["count"] for batch in found["batch_stats"]] == [1, 2]


def test_time_before_the_model_is_added_to_its_own_part() -> None:
    assert Timings(1, 2, 3, 4).plus(queue=10, input=100) == Timings(11, 102, 3, 4)


@pytest.mark.parametrize(
    ("count", "share", "rank"),
    [
        (1, 0.5, 1),
        (1, 0.99, 1),
        (2, 0.5, 1),
        (3, 0.5, 2),
        (10, 0.5, 5),
        (10, 0.99, 10),
        (100, 0.5, 50),
        (100, 0.99, 99),
        (101, 0.99, 100),
        (1000, 0.99, 990),
    ],
)
def test_percentiles_are_those_of_the_nearest_rank(count: int, share: float, rank: int) -> None:
    assert percentile([number * MS for number in range(1, count + 1)], share) == rank


def test_the_page_looks_back_ten_seconds() -> None:
    one = ModelStatistics("digits", "1")
    assert one.recent() == {
        "requests_per_second": 0.0,
        "images_per_second": 0.0,
        "p50_ms": None,
        "p99_ms": None,
    }
    for total in range(1, 101):
        one.succeeded(2, total * MS, Timings())
    when = one._recent[-1][0]
    found = one.recent(when + 5)
    assert found == {"requests_per_second": 10.0, "images_per_second": 20.0, "p50_ms": 50.0, "p99_ms": 99.0}
    assert one.recent(when + 11)["requests_per_second"] == 0.0
