"""Counters of one model: for the protocol's statistics, for Prometheus, and for the page.

Everything here belongs to the thread of the event loop. Times are whole nanoseconds.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

RECENT = 10.0
"""Seconds that the figures of the page look back."""
_KEPT = 20_000
_MICROSECOND = 1000


@dataclass(frozen=True)
class Timings:
    """Where the time of one request went, in nanoseconds.

    Attributes:
        queue: waiting for a worker.
        input: preparing the input of the model: decoding files, putting requests together.
        infer: running the model.
        output: taking the answers apart.
    """

    queue: int = 0
    input: int = 0
    infer: int = 0
    output: int = 0

    def plus(self, *, queue: int = 0, input: int = 0) -> Timings:
        """Return the timings with more time before the model."""
        return Timings(self.queue + queue, self.input + input, self.infer, self.output)


@dataclass
class Duration:
    """How often something happened, and how long it took in all.

    Attributes:
        count: how often.
        ns: in all, in nanoseconds.
    """

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Count once more."""
        self.count += 1
        self.ns += ns

    def to_dict(self) -> dict[str, int]:
        """Return plain values, as the protocol names them."""
        return {"count": self.count, "ns": self.ns}


@dataclass
class BatchStatistics:
    """What running batches of one size took."""

    input: Duration = field(default_factory=Duration)
    infer: Duration = field(default_factory=Duration)
    output: Duration = field(default_factory=Duration)

    def to_dict(self, size: int) -> dict[str, Any]:
        """Return plain values, as the protocol names them."""
        return {
            "batch_size": size,
            "compute_input": self.input.to_dict(),
            "compute_infer": self.infer.to_dict(),
            "compute_output": self.output.to_dict(),
        }


class ModelStatistics:
    """Counters of one model."""

    def __init__(self, name: str, version: str) -> None:
        self.name, self.version = name, version
        self.success, self.fail = Duration(), Duration()
        self.queue, self.input, self.infer, self.output = Duration(), Duration(), Duration(), Duration()
        self.inferences = self.executions = self.pending = 0
        self.last_inference = 0
        self.batches: dict[int, BatchStatistics] = {}
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=_KEPT)

    def succeeded(self, images: int, total: int, timings: Timings) -> None:
        """Count a request that was answered.

        Args:
            images: how many it had.
            total: from its arrival to its answer.
            timings: where that time went.
        """
        self.success.add(total)
        self.queue.add(timings.queue)
        self.input.add(timings.input)
        self.infer.add(timings.infer)
        self.output.add(timings.output)
        self.inferences += images
        self.last_inference = time.time_ns() // 1_000_000
        self._recent.append((time.monotonic(), total, images))

    def failed(self, total: int) -> None:
        """Count a request that was refused, went wrong, or was given up by its client."""
        self.fail.add(total)

    def executed(self, size: int, timings: Timings) -> None:
        """Count a batch that was run."""
        self.executions += 1
        batch = self.batches.setdefault(size, BatchStatistics())
        batch.input.add(timings.input)
        batch.infer.add(timings.infer)
        batch.output.add(timings.output)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as the protocol's statistics name them."""
        parts = {
            "success": self.success,
            "fail": self.fail,
            "queue": self.queue,
            "compute_input": self.input,
            "compute_infer": self.infer,
            "compute_output": self.output,
            "cache_hit": Duration(),
            "cache_miss": Duration(),
        }
        return {
            "name": self.name,
            "version": self.version,
            "last_inference": self.last_inference,
            "inference_count": self.inferences,
            "execution_count": self.executions,
            "inference_stats": {name: part.to_dict() for name, part in parts.items()},
            "batch_stats": [self.batches[size].to_dict(size) for size in sorted(self.batches)],
        }

    def recent(self, now: float | None = None) -> dict[str, float | None]:
        """Return what happened in the last `RECENT` seconds, for the page."""
        now = time.monotonic() if now is None else now
        entries = [entry for entry in self._recent if entry[0] > now - RECENT]
        totals = sorted(total for _, total, _ in entries)
        return {
            "requests_per_second": len(entries) / RECENT,
            "images_per_second": sum(images for _, _, images in entries) / RECENT,
            "p50_ms": percentile(totals, 0.5),
            "p99_ms": percentile(totals, 0.99),
        }


def percentile(ordered: list[int], share: float) -> float | None:
    """Return a percentile of ordered nanoseconds, in milliseconds; None where there are none.

    It is the smallest of them that at least this share is not above (nearest rank).
    """
    if not ordered:
        return None
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] / 1e6


def prometheus(models: Iterable[ModelStatistics]) -> str:
    """Return the counters in Prometheus' text format, under the names that Triton gives them."""
    models = list(models)
    lines: list[str] = []
    for name, kind, text, value in _METRICS:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [f'{name}{{model="{one.name}",version="{one.version}"}} {value(one)}' for one in models]
    return "\n".join(lines) + "\n"


_METRICS: tuple[tuple[str, str, str, Any], ...] = (
    (
        "nv_inference_request_success",
        "counter",
        "Requests that were answered",
        lambda one: one.success.count,
    ),
    (
        "nv_inference_request_failure",
        "counter",
        "Requests that got an error or were given up",
        lambda one: one.fail.count,
    ),
    ("nv_inference_count", "counter", "Images of the answered requests", lambda one: one.inferences),
    ("nv_inference_exec_count", "counter", "Batches that were run", lambda one: one.executions),
    (
        "nv_inference_pending_request_count",
        "gauge",
        "Requests that wait or run",
        lambda one: one.pending,
    ),
    (
        "nv_inference_request_duration_us",
        "counter",
        "Microseconds from arrival to answer, over the answered requests",
        lambda one: one.success.ns // _MICROSECOND,
    ),
    (
        "nv_inference_queue_duration_us",
        "counter",
        "Microseconds of waiting for a worker, over the answered requests",
        lambda one: one.queue.ns // _MICROSECOND,
    ),
    (
        "nv_inference_compute_input_duration_us",
        "counter",
        "Microseconds of preparing inputs, over the answered requests",
        lambda one: one.input.ns // _MICROSECOND,
    ),
    (
        "nv_inference_compute_infer_duration_us",
        "counter",
        "Microseconds of running the model, over the answered requests",
        lambda one: one.infer.ns // _MICROSECOND,
    ),
    (
        "nv_inference_compute_output_duration_us",
        "counter",
        "Microseconds of taking outputs apart, over the answered requests",
        lambda one: one.output.ns // _MICROSECOND,
    ),
)
