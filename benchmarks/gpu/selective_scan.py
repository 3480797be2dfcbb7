"""Check and time the CUDA kernels on a GPU, in one run: a table, and JSON with --json FILE.

    python benchmarks/gpu/selective_scan.py [--library LIB] [--json FILE] [--rounds N] [--quick]

First every element type, odd sizes and every stage of VMamba-T and VMamba-B are compared with the float64 definition;
no time is reported before all of them pass. Then, in float16, for each stage and batch 1, 8 and 128:

    fused       our kernel, the time-step projection inside (low rank)
    fused full  the projection by torch, then our kernel on the full time-step map
    public      cross-scan, the projection, selective scan on the unrolled copies, cross-merge: the selective scan of
                mamba-ssm where it is installed; else only what surrounds it is timed, which is a lower bound

Every call is captured in a CUDA graph, so that what launching costs on the host is left out; the variants run in turns.
`share` is the bytes that the fused kernel must move, by its time, over the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quartermap_deploy.frontend.definition import DIRECTIONS, selective_scan_2d_definition
from quartermap_deploy.plugin.build import BuildOptions, build_plugin
from quartermap_deploy.plugin.cuda import Kernels

STAGES = {
    "VMamba-T (s1l8)": [(96, 56, 6), (192, 28, 12), (384, 14, 24), (768, 7, 48)],
    "VMamba-B (s2l15)": [(256, 56, 8), (512, 28, 16), (1024, 14, 32), (2048, 7, 64)],
}
"""(d_inner, side, dt_rank) at 224 x 224; d_state is 1."""
BATCHES = (1, 8, 128)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
ODD = [
    (1, 1, 1, 1, 1, 0),
    (2, 3, 1, 9, 1, 2),
    (2, 3, 9, 1, 1, 2),
    (2, 5, 13, 17, 16, 3),
    (1, 7, 31, 29, 5, 0),
    (1, 3, 128, 128, 1, 6),
    (1, 2, 200, 211, 1, 2),
    (3, 33, 40, 41, 1, 9),
]

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except ImportError:
    selective_scan_fn = None


def make_inputs(
    batch: int, d_inner: int, height: int, width: int, states: int, rank: int, dtype: torch.dtype
) -> list[Tensor | None]:
    """Return x, dt, B, C, A, D, dt_bias, dt_weight on the GPU, with time steps as in trained models."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    def maps(channels: int) -> Tensor:
        return normal(batch, channels, height, width).to(dtype)

    wide = 4 * d_inner
    weight = (normal(wide, rank) * rank**-0.5).to(dtype) if rank else None
    parameters = (-normal(wide, states).exp(), normal(wide), normal(wide) - 3)
    return [
        maps(d_inner),
        maps(4 * (rank or d_inner)),
        maps(4 * states),
        maps(4 * states),
        *parameters,
        weight,
    ]


def check(kernels: Kernels) -> list[dict[str, Any]]:
    """Compare with the definition; ends the program if a case fails."""
    cases = ODD + [(1, d, side, side, 1, rank) for stages in STAGES.values() for d, side, rank in stages]
    cases += [(1, d, side, side, 1, 0) for stages in STAGES.values() for d, side, _ in stages]
    rows = []
    for sizes in cases:
        for dtype, tolerance in TOLERANCES.items():
            inputs = make_inputs(*sizes, dtype)
            y = kernels.scan_2d(*inputs, DIRECTIONS, True)  # type: ignore[arg-type]
            doubles = [None if tensor is None else tensor.double() for tensor in inputs]
            expected = selective_scan_2d_definition(*doubles)  # type: ignore[arg-type]
            error = float((y.double() - expected).abs().max() / expected.abs().max())
            rows.append({"sizes": sizes, "type": str(dtype), "error": error, "tolerance": tolerance})
            if not error <= tolerance:
                sys.exit(
                    f"FAILED: {sizes} {dtype}: error {error:.2e}, tolerance {tolerance:.0e}; nothing was timed"
                )
    print(f"{len(rows)} cases agree with the float64 definition")
    return rows


def public(inputs: list[Tensor]) -> Callable[[], Tensor]:
    """Return the scan as the public code does it: unrolled copies of every map."""
    x, dt, B, C, A, D, bias, weight = inputs
    batch, d_inner, height, width = x.shape
    length = height * width

    def cross(map_: Tensor) -> Tensor:
        rows, columns = map_.flatten(2), map_.transpose(2, 3).flatten(2)
        return torch.stack([rows, columns, rows.flip(-1), columns.flip(-1)], dim=1)

    # dt, B and C come from the unrolled copy in the public code, in scan order already: not counted against it.
    low = dt.view(batch, 4, -1, length)
    b, c = (tensor.view(batch, 4, -1, length) for tensor in (B, C))
    weights = weight.view(4, d_inner, -1)

    def run() -> Tensor:
        xs = cross(x).view(batch, -1, length)
        steps = torch.einsum("bkrl,kdr->bkdl", low, weights).reshape(batch, -1, length)
        if selective_scan_fn is None:
            ys = xs * steps
        else:
            ys = selective_scan_fn(xs, steps, A, b, c, D, delta_bias=bias, delta_softplus=True)
        ys = ys.view(batch, 4, d_inner, length)
        rows = ys[:, 0] + ys[:, 2].flip(-1)
        columns = ys[:, 1] + ys[:, 3].flip(-1)
        return rows + columns.view(batch, d_inner, width, height).transpose(2, 3).flatten(2)

    return run


def full(kernels: Kernels, inputs: list[Tensor]) -> Callable[[], Tensor]:
    """Return the projection by torch and the kernel on the full time-step map."""
    x, dt, B, C, A, D, bias, weight = inputs
    batch, d_inner, height, width = x.shape
    low, weights = dt.view(batch, 4, -1, height * width), weight.view(4, d_inner, -1)

    def run() -> Tensor:
        steps = torch.einsum("bkrl,kdr->bkdl", low, weights).reshape(batch, -1, height, width)
        return kernels.scan_2d(x, steps, B, C, A, D, bias, None, DIRECTIONS, True)

    return run


def captured(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Record a call in a CUDA graph."""
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


def times(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Time functions in turns and return the median of each, in microseconds."""
    graphs = {name: captured(function) for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats = {}
    for name, graph in graphs.items():
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        # Long enough for the events' resolution, half a microsecond.
        repeats[name] = max(1, min(200, int(2.0 / max(start.elapsed_time(end), 1e-3))))
    for _ in range(rounds):
        for name, graph in graphs.items():
            start.record()
            for _ in range(repeats[name]):
                graph.replay()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) * 1e3 / repeats[name])
    return {name: statistics.median(values) for name, values in seconds.items()}


def copy_bandwidth(rounds: int) -> float:
    """Return the bandwidth of a large copy, read and written bytes, in GB/s."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    median = times({"copy": lambda: target.copy_(source)}, rounds)["copy"]
    return 2 * source.numel() / median / 1e3


def moved(batch: int, d_inner: int, side: int, rank: int, states: int = 1, bytes_: int = 2) -> int:
    """Return the bytes that the fused kernel must move: x and y, the low-rank time step, B and C."""
    return batch * side * side * (2 * d_inner + 4 * rank + 8 * states) * bytes_


def measure(kernels: Kernels, rounds: int, batches: tuple[int, ...]) -> tuple[float, list[dict[str, Any]]]:
    """Time every stage; prints a line for each."""
    bandwidth = copy_bandwidth(rounds)
    baseline = "mamba-ssm" if selective_scan_fn else "no mamba-ssm: without its scan, a lower bound"
    print(f"copy bandwidth {bandwidth:,.0f} GB/s; public: {baseline}")
    heads = ("stage", "batch", "fused", "full", "public", "x", "GB/s", "share")
    print(f"{'model':18} " + " ".join(f"{head:>9}" for head in heads))
    rows = []
    for model, stages in STAGES.items():
        for stage, (d_inner, side, rank) in enumerate(stages, start=1):
            for batch in batches:
                inputs: Any = make_inputs(batch, d_inner, side, side, 1, rank, torch.float16)
                functions = {
                    "fused": lambda inputs=inputs: kernels.scan_2d(*inputs, DIRECTIONS, True),
                    "full": full(kernels, inputs),
                    "public": public(inputs),
                }
                found = times(functions, rounds)
                rate = moved(batch, d_inner, side, rank) / found["fused"] / 1e3
                speed = found["public"] / found["fused"]
                rows.append(
                    {
                        "model": model,
                        "stage": stage,
                        "batch": batch,
                        "microseconds": found,
                        "speed": speed,
                        "gb_per_second": rate,
                        "share_of_copy": rate / bandwidth,
                    }
                )
                print(
                    f"{model:18} {stage:5} {batch:5} {found['fused']:7.1f}us {found['full']:7.1f}us "
                    f"{found['public']:7.1f}us {speed:6.2f} {rate:7.0f} {rate / bandwidth:6.1%}",
                    flush=True,
                )
    return bandwidth, rows


def main() -> None:
    """Build if asked to, check, time, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--library", type=Path, help="a built library (default: build the kernels for this GPU)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that are timed (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="batch 8 alone")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU that torch can use")
    with tempfile.TemporaryDirectory() as folder:
        library = options.library
        if library is None:
            major, minor = torch.cuda.get_device_capability()
            settings = BuildOptions(kernels_only=True, cuda_architectures=(f"{major}{minor}-real",))
            print("building the kernels", flush=True)
            library = build_plugin(Path(folder), settings)
        kernels = Kernels(library)
        checks = check(kernels)
        bandwidth, rows = measure(kernels, options.rounds, (8,) if options.quick else BATCHES)
    if options.json is not None:
        machine = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "mamba_ssm": selective_scan_fn is not None,
            "copy_gb_per_second": bandwidth,
        }
        options.json.write_text(
            json.dumps({"machine": machine, "checks": checks, "timings": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
