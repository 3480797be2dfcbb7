"""Where the time of a model goes: into its scans, into what pruning or merging adds to a block, and into the rest.

Scan is the operator SelectiveScan2D, with the projection of its time step. Added is what QuarterMap or ToMe puts
before and after it: the Slice and the Resize; matching, merging and unmerging of tokens. In ONNX Runtime both are
told from the profile of the session: the native operator is a node of its own, and those of a scan's function body are
told by their names. They are named here before the model is loaded, and keep these names when the runtime puts the body
into the graph; those that were added are named after their block by the passes and by the export of ToMe. What the
runtime makes itself, as reordered layouts of convolutions, has names of its own and counts as the rest. In PyTorch the
same steps are timed from call to call, by CUDA events on a GPU and by the clock on a CPU.

Recording takes time itself, a microsecond or two for each node, and a Scan has the nodes of its body recorded at every
step: on small maps that is several times what is recorded, and most of it lies between the nodes. So only the times of
nodes themselves are added up, of those that have no others in them, and their shares are those of a call that is not
recorded.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.bench import interleave
from quartermap_deploy.errors import BundleError
from quartermap_deploy.lowering.operator import SCANS
from quartermap_deploy.progress import SILENT, Progress

if TYPE_CHECKING:
    import onnx

    from quartermap_deploy.architectures.base import VisualStateSpaceModel

SCAN_BODY = "scan_body"
"""What the names of nodes in a scan's body start with; the runtime puts more before it."""
_ADDED = re.compile(
    r"block_\d+/(quartermap/(keep|restore|outer_size|inner_size|size|to_raster|from_raster|full|kept|source|scaled)"
    r"|merge/|unmerge/)"
)
_EVENT = "_kernel_time"
WARMUP = 1


@dataclass(frozen=True)
class TimeParts:
    """Where the time of one recorded call goes, in milliseconds.

    Attributes:
        total: the whole call.
        nodes: everything that was recorded of it: in ONNX Runtime all nodes, in PyTorch the call.
        scan: of that, its scans.
        added: of that, what pruning or merging adds around them.
    """

    total: float
    nodes: float
    scan: float
    added: float

    def to_dict(self, unrecorded: float) -> dict[str, Any]:
        """Return plain values for JSON: the shares of what was recorded, in a call that is not recorded.

        Args:
            unrecorded: milliseconds of a call that is not recorded.
        """
        scale = unrecorded / self.nodes if self.nodes else 0.0
        return {
            "profiled_ms": self.total,
            "scan_ms": self.scan * scale,
            "added_ms": self.added * scale,
            "scan_share": self.scan / self.nodes if self.nodes else None,
        }

    @classmethod
    def median(cls, calls: Sequence[TimeParts]) -> TimeParts:
        """Return the median of each part."""
        return cls(
            *(statistics.median(getattr(call, name) for call in calls) for name in cls.__annotations__)
        )


# ONNX Runtime --------------------------------------------------------------------------------------------------------


def name_scan_bodies(model: onnx.ModelProto) -> None:
    """Name the nodes of all function bodies, in place; that changes nothing of what they compute."""
    for function in model.functions:
        _name(function.node, f"{SCAN_BODY}_{function.overload}" if function.overload else SCAN_BODY)


def _name(nodes: Iterable[onnx.NodeProto], prefix: str) -> None:
    for number, node in enumerate(nodes):
        node.name = f"{prefix}/{number}_{node.op_type}"
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _name(attribute.g.node, node.name)


def profile_onnxruntime(
    models: Mapping[str, Path],
    images: NDArray[np.float32],
    folder: Path,
    *,
    threads: int | None = None,
    repeats: int = 5,
    progress: Progress = SILENT,
) -> dict[str, TimeParts]:
    """Record calls of models in ONNX Runtime, in turns, and return the medians of their parts.

    Args:
        models: files whose scan bodies were named by `name_scan_bodies`, by name.
        images: the batch.
        folder: for the profiles, which are removed again.
        threads: threads of each session; None as for any session.
        repeats: recorded calls of each.
        progress: told about the steps.
    """
    from quartermap_deploy.targets.onnxruntime.opening import open_session

    sessions = {}
    with progress.step("loading the models again, to record their nodes", total=len(models)) as advance:
        for number, (name, path) in enumerate(models.items()):
            sessions[name] = open_session(path, threads, profile=folder / f"profile_{number}")[0]
            advance(1)
    interleave({name: _run(session, images) for name, session in sessions.items()}, repeats, WARMUP, progress)
    parts = {}
    for name, session in sessions.items():
        path = Path(session.end_profiling())
        events = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        parts[name] = TimeParts.median(read_profile(events)[WARMUP:])
    return parts


def _run(session: Any, images: NDArray[np.float32]) -> Callable[[], object]:
    feed = {session.get_inputs()[0].name: images}
    return lambda: session.run(None, feed)


def read_profile(events: Sequence[Mapping[str, Any]]) -> list[TimeParts]:
    """Return the parts of each call in a profile of ONNX Runtime, as its JSON has it.

    Raises:
        BundleError: if the profile has no call, or none of its nodes is of a scan's body.
    """
    calls = sorted((e for e in events if e["name"] == "model_run"), key=lambda e: float(e["ts"]))
    nodes = _innermost([e for e in events if e.get("cat") == "Node" and e["name"].endswith(_EVENT)])
    if not calls or not any(map(_is_scan, nodes)):
        raise BundleError(
            f"the profile of ONNX Runtime has {len(calls)} calls and no node of a scan; this version of ONNX Runtime "
            "names nodes in another way than those that are known here, 1.23 to 1.31"
        )
    return [_parts(call, nodes) for call in calls]


def _innermost(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Leave out the events that have others in them: most of what is recorded of a Scan is the recording itself."""
    ordered = sorted(events, key=lambda e: (e["ts"], -e["dur"]))
    return [
        event
        for event, after in zip(ordered, [*ordered[1:], None], strict=True)
        if after is None or after["ts"] >= event["ts"] + event["dur"]
    ]


def _is_scan(event: Mapping[str, Any]) -> bool:
    """Whether a node is the native operator, or one of a scan's body."""
    return event.get("args", {}).get("op_name") in SCANS or SCAN_BODY in event["name"]


def _parts(call: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> TimeParts:
    start, end = call["ts"], call["ts"] + call["dur"]
    every = scan = added = 0.0
    for event in nodes:
        if start <= event["ts"] < end:
            every += event["dur"]
            if _is_scan(event):
                scan += event["dur"]
            elif _ADDED.search(event["name"]):
                added += event["dur"]
    return TimeParts(call["dur"] / 1e3, every / 1e3, scan / 1e3, added / 1e3)


# PyTorch ------------------------------------------------------------------------------------------------------------


def profile_torch(
    models: Mapping[str, VisualStateSpaceModel],
    images: NDArray[np.float32],
    *,
    repeats: int = 5,
    progress: Progress = SILENT,
) -> dict[str, TimeParts]:
    """Time the steps of PyTorch models, in turns, and return the medians of their parts.

    Args:
        models: where they are to run, by name.
        images: the batch.
        repeats: recorded calls of each.
        progress: told about the steps.
    """
    calls: dict[str, list[TimeParts]] = {name: [] for name in models}

    def recorded(name: str) -> Callable[[], None]:
        return lambda: calls[name].append(_recorded(models[name], images))

    interleave({name: recorded(name) for name in models}, repeats, WARMUP, progress)
    return {name: TimeParts.median(parts[WARMUP:]) for name, parts in calls.items()}


def _recorded(model: VisualStateSpaceModel, images: NDArray[np.float32]) -> TimeParts:
    import torch

    device = next(model.parameters()).device
    batch = torch.from_numpy(images).to(device)
    recorder = Recorder(_cuda_moment if device.type == "cuda" else _cpu_moment)
    with torch.inference_mode(), recorder.watching(), recorder.span("total"):
        model(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    total, scan, added = map(recorder.milliseconds, ("total", "scan", "added"))
    return TimeParts(total, total, scan, added)


Moment = Callable[[], Any]
"""Records a moment; `_between` tells the time between two."""


def _cpu_moment() -> float:
    return time.perf_counter()


def _cuda_moment() -> Any:
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    """Milliseconds between two moments; those of a GPU must have come."""
    return (end - start) * 1e3 if isinstance(start, float) else float(start.elapsed_time(end))


class Recorder:
    """Times the steps of PyTorch models by kind: "scan" and "added", and what its user opens a span for."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def span(self, kind: str) -> Iterator[None]:
        """Record what happens while it is open."""
        start = self._moment()
        try:
            yield
        finally:
            self._spans.append((kind, start, self._moment()))

    def milliseconds(self, kind: str) -> float:
        """Time of all spans of a kind."""
        return sum((_between(start, end) for own, start, end in self._spans if own == kind), 0.0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, record every scan and what pruning and merging add, in any model of this package."""
        from quartermap_deploy.architectures import ss2d
        from quartermap_deploy.evaluation import tome

        watched = [
            (ss2d, "selective_scan_2d", "scan"),
            (ss2d, "keep_positions", "added"),
            (ss2d, "restore_positions", "added"),
            (tome.Merge, "forward", "added"),
            (tome.Unmerge, "forward", "added"),
        ]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in watched]
        for (owner, name, function), (*_, kind) in zip(before, watched, strict=True):
            setattr(owner, name, self._timed(function, kind))
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def _timed(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self.span(kind):
                return function(*arguments, **options)

        return call
