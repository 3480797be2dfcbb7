"""Tests run in a process that was forked from this one, which has imported the large libraries and nothing of ours.

Importing torch, ONNX and ONNX Runtime takes longer than most tests; a fork has them at once. Nothing of the package or
of its tests is imported here, so each fork imports them from the copy of the repository, with the fault in it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutants import inside
from mutants.tree import remove

LIBRARIES = (
    *("numpy", "torch", "torch.export", "torch.onnx", "torch.onnx._internal.exporter._core", "torch._dynamo"),
    *(
        "onnx",
        "onnx.reference",
        "onnxruntime",
        "onnxscript",
        "onnx_graphsurgeon",
        "polygraphy",
        "safetensors",
    ),
    *("PIL.Image", "jsonschema", "sklearn.datasets", "scipy.special", "yaml", "rich.table", "aiohttp"),
    *("pytest", "_pytest.assertion.rewrite", "hypothesis"),
)
MEMORY = 16 << 30
"""Bytes of address space: a fault that takes out a bound must not take the machine."""
FILE_SIZE = 8 << 30


@dataclass(frozen=True)
class Run:
    """What tests in a fork said.

    Attributes:
        outcome: "passed", "failed", "crashed", "time" or "nothing ran".
        test: the one that failed, or "".
        seconds: that it took.
        data: what else the fork reported.
    """

    outcome: str
    test: str
    seconds: float
    data: dict[str, Any]


def import_libraries() -> None:
    """Import what every fork is to have; what is missing stays out."""
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    ours = [name for name in sys.modules if name.split(".")[0] in ("quartermap_deploy", "helpers")]
    assert not ours, f"imported before the fork: {ours}"


def run_tests(
    tree: Path,
    scratch: Path,
    files: Sequence[str],
    *,
    order: Sequence[str] | None = None,
    seconds: float = 900.0,
    budget: float = math.inf,
    measure: bool = False,
) -> Run:
    """Run tests in a fork, and end it with all that it started.

    Args:
        tree: the copy of the repository.
        scratch: a folder for what the tests write; it is removed before and after.
        files: the test files, from the tree.
        order: the tests to run, in their order, by pytest's names; None for all.
        seconds: after which the fork is ended.
        budget: seconds of processors after which no further test begins.
        measure: run on after a failure, and report time and functions of each test.
    """
    remove(scratch)
    scratch.mkdir(parents=True)
    report = scratch / "report.json"
    began = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _be_the_fork(tree, scratch, report, files, order, budget, measure)
    try:
        ended = _wait(child, began + seconds)
    except BaseException:
        _end(child, reaped=False)
        raise
    _end(child, reaped=ended)
    taken = time.monotonic() - began
    found = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None
    log = (scratch / "log.txt").read_text(encoding="utf-8", errors="replace")
    remove(scratch)
    if found is not None and (ended or found["outcome"] == "failed"):
        return Run(found["outcome"], found["test"], taken, {**found, "log": log})
    return Run("crashed" if ended else "time", "", taken, {"log": log})


def _wait(child: int, deadline: float) -> bool:
    """Wait for a child; return whether it ended by itself."""
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0] == child:
            return True
        time.sleep(0.02)
    return False


def _end(child: int, reaped: bool) -> None:
    """End a child and what it started, which is its process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if not reaped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)  # the group may not be there yet
        os.waitpid(child, 0)


def _be_the_fork(
    tree: Path,
    scratch: Path,
    report: Path,
    files: Sequence[str],
    order: Sequence[str] | None,
    budget: float,
    measure: bool,
) -> None:
    """Run the tests and leave; never returns."""
    code = 70
    try:
        os.setsid()
        log = os.open(scratch / "log.txt", os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for limit, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, FILE_SIZE)):
            with contextlib.suppress(ValueError, OSError):  # a lower one stands already
                resource.setrlimit(limit, (most, most))
        code = inside.run(tree, scratch, report, files, order, budget, measure)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)
