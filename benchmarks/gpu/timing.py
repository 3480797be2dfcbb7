"""What the benchmarks on a GPU share: refusing to run without one, the kernels, CUDA graphs, timing in turns."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from quartermap_deploy.errors import QuartermapError
from quartermap_deploy.native.build import BuildOptions, build_plugin

USER_ERROR = 2
"""Exit code for what the user can put right, as on the command line of the package."""


def refuse(message: str) -> NoReturn:
    """End the program with one message and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(USER_ERROR)


def require_gpu() -> None:
    """End the program where torch finds no GPU."""
    if not torch.cuda.is_available():
        refuse(
            f"this benchmark needs an NVIDIA GPU, and torch {torch.__version__} finds none; with a GPU in the machine, "
            "install a build of torch for CUDA (https://pytorch.org/get-started)"
        )


def find_library(library: Path | None, folder: Path) -> Path:
    """Return the library that the user named, or build the kernels for this GPU.

    Args:
        library: as named, or None.
        folder: where to build.
    """
    if library is not None:
        return library
    major, minor = torch.cuda.get_device_capability()
    print("building the kernels", flush=True)
    try:
        options = BuildOptions(kernels_only=True, cuda_architectures=(f"{major}{minor}-real",))
        return build_plugin(folder, options)
    except QuartermapError as error:
        refuse(str(error))


def captured(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Record a call in a CUDA graph, after three calls that make plans and load code."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def times(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float | None]:
    """Time functions in turns, each in a CUDA graph of its own.

    Args:
        functions: what to time, by name.
        rounds: how often.

    Returns:
        The median of each, in microseconds; None for one that the GPU's memory does not hold.
    """
    graphs = {name: _captured_if_it_fits(function) for name, function in functions.items()}
    fitting = {name: graph for name, graph in graphs.items() if graph is not None}
    microseconds: dict[str, list[float]] = {name: [] for name in fitting}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats = {}
    for name, graph in fitting.items():
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        # Long enough for the events' resolution, half a microsecond.
        repeats[name] = max(1, min(200, int(2.0 / max(start.elapsed_time(end), 1e-3))))
    for _ in range(rounds):
        for name, graph in fitting.items():
            start.record()
            for _ in range(repeats[name]):
                graph.replay()
            end.record()
            end.synchronize()
            microseconds[name].append(start.elapsed_time(end) * 1e3 / repeats[name])
    return {name: statistics.median(microseconds[name]) if name in fitting else None for name in functions}


def eager_milliseconds(function: Callable[[], Any], rounds: int) -> float | None:
    """Time a call as it is, launching on the host included; None for one that the GPU's memory does not hold."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    try:
        for _ in range(rounds + 3):
            start.record()
            function()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end))
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return statistics.median(found[3:])


def _captured_if_it_fits(function: Callable[[], Any]) -> torch.cuda.CUDAGraph | None:
    try:
        # Once outside of a capture, where running out of memory leaves nothing half done.
        function()
        return captured(function)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def copy_bandwidth(rounds: int) -> float:
    """Return the bandwidth of a large copy, read and written bytes, in GB/s."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    median = times({"copy": lambda: target.copy_(source)}, rounds)["copy"]
    if median is None:
        refuse("the GPU has less than 1 GiB of free memory; end what else uses it")
    return 2 * source.numel() / median / 1e3


def machine(public: bool) -> dict[str, Any]:
    """Describe the machine for the results.

    Args:
        public: whether the public kernels are installed.
    """
    return {
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "mamba_ssm": public,
    }
