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
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from public_path import Scan, cross_merge, cross_scan, find_public_scan
from timing import copy_bandwidth, find_library, machine, refuse, require_gpu, times
from torch import Tensor
from traffic import BATCHES, STAGES, fused_bytes

from quartermap_deploy.errors import QuartermapError
from quartermap_deploy.scan.cuda import Kernels, make_scan
from quartermap_deploy.scan.definition import DIRECTIONS, selective_scan_2d_definition
from quartermap_deploy.scan.vectorized import selective_scan_2d_vectorized

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
    real = [stage for stages in STAGES.values() for stage in stages]
    cases = ODD + [(1, stage.d_inner, stage.side, stage.side, 1, stage.rank) for stage in real]
    cases += [(1, stage.d_inner, stage.side, stage.side, 1, 0) for stage in real]
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


PLANS = [(1, 227 * 1024, 228 * 1024), (4, 99 * 1024, 100 * 1024), (132, 24 * 1024, 48 * 1024)]
"""Multiprocessors and shared memory of devices for which plans are checked, beside the device itself."""
LARGE = [(1, 128, 7, 7, 1, 48), (1, 16, 28, 28, 1, 12), (1, 16, 56, 56, 1, 6)]
KINDS = ("general", "resident", "split", "streamed")
"""Kernels that are asked for by name, beside what estimates choose."""


def check_plans(kernels: Kernels, small: bool) -> list[dict[str, Any]]:
    """Compare the plans for several devices with the definition, as far as they run on this one; ends at no case.

    Args:
        kernels: of both kinds.
        small: one tile of channels and one image, and half of the types, for slow tools.

    Returns:
        A row for each case, with its kernels, blocks and error, and whether it is right.
    """
    found = torch.cuda.get_device_properties(0)
    # Not told by every release of torch; what it does not tell leaves the plans that fit every card.
    shared = getattr(found, "shared_memory_per_block_optin", 99 * 1024)
    own = (found.multi_processor_count, shared, shared + 1024)
    stages = [stage for stages in STAGES.values() for stage in stages]
    cases = [] if small else list(ODD)
    for stage in stages:
        # A tile of channels, all, and so many that only the general kernel takes them.
        for channels in (128,) if small else (128, stage.d_inner, stage.d_inner - 8):
            cases.append((1 if small else 2, channels, stage.side, stage.side, 1, stage.rank))
    cases += [(1, 16, 64, 64, 1, 6), (1, 32, 21, 35, 1, 33)]
    rows = []
    # Time steps times x beyond float16 last, which the kernels on tensor cores compute again in float32.
    every = [(sizes, False) for sizes in cases] + [(sizes, True) for sizes in LARGE]
    for sizes, large in every:
        for dtype in (torch.float16,) if small or large else TOLERANCES:
            inputs: Any = make_inputs(*sizes, dtype)
            if large:
                inputs[0].mul_(2e4).clamp_(-6e4, 6e4)
                inputs[2].mul_(1e-5)
                inputs[5].mul_(1e-3)
                inputs[6].add_(12)
            # The definition goes step by step, which takes a GPU too long for so many cases.
            expected = selective_scan_2d_vectorized(
                *(None if tensor is None else tensor.double() for tensor in inputs), DIRECTIONS, True
            )
            scan = make_scan(sizes, DIRECTIONS, True, str(dtype).removeprefix("torch."))
            seen = set()
            for device, kind in itertools.product((own, *PLANS), ("", *KINDS)):
                os.environ["QUARTERMAP_KERNELS"] = kind
                plan = kernels.plan_for(scan, *device)
                os.environ["QUARTERMAP_KERNELS"] = ""
                if plan.shared_bytes > shared or bytes(plan) in seen:
                    continue
                seen.add(bytes(plan))
                kernels.prepare(plan)
                y = kernels.scan_2d(*inputs, DIRECTIONS, True, plan)
                error = float((y.double() - expected).abs().max() / expected.abs().max())
                rows.append(
                    {
                        "sizes": sizes,
                        "large": large,
                        "type": str(dtype),
                        "kernels": plan.kernels,
                        "blocks": plan.blocks,
                        "error": error,
                        "right": error <= TOLERANCES[dtype],
                    }
                )
    return rows


def public(inputs: list[Tensor], scan: Scan | None) -> Callable[[], Tensor]:
    """Return the scan as the public code does it: unrolled copies of every map."""
    x, dt, B, C, A, D, bias, weight = inputs
    batch, d_inner, height, width = x.shape
    # dt, B and C come from the unrolled copy in the public code, in scan order already: not counted against it.
    low = dt.view(batch, 4, -1, height * width)
    b, c = (tensor.view(batch, 4, -1, height * width) for tensor in (B, C))
    weights = weight.view(4, d_inner, -1)

    def without_scan(xs: Tensor, steps: Tensor, *_: Any, **options: Any) -> Tensor:
        return xs * steps

    def run() -> Tensor:
        xs = cross_scan(x).flatten(1, 2)
        steps = torch.einsum("bkrl,kdr->bkdl", low, weights).flatten(1, 2)
        ys = (scan or without_scan)(xs, steps, A, b, c, D, delta_bias=bias, delta_softplus=True)
        return cross_merge(ys.view(batch, 4, d_inner, -1), height, width)

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


def measure(kernels: Kernels, rounds: int, batches: tuple[int, ...], scan: Scan | None) -> dict[str, Any]:
    """Time every stage; prints a line for each."""
    bandwidth = copy_bandwidth(rounds)
    baseline = "mamba-ssm" if scan else "no mamba-ssm: without its scan, a lower bound"
    print(f"copy bandwidth {bandwidth:,.0f} GB/s; public: {baseline}")
    heads = ("stage", "batch", "fused", "full", "public", "x", "GB/s", "share")
    print(f"{'model':18} " + " ".join(f"{head:>9}" for head in heads))
    rows = []
    for model, stages in STAGES.items():
        for number, stage in enumerate(stages, start=1):
            for batch in batches:
                inputs: Any = make_inputs(
                    batch, stage.d_inner, stage.side, stage.side, 1, stage.rank, torch.float16
                )
                functions = {
                    "fused": lambda inputs=inputs: kernels.scan_2d(*inputs, DIRECTIONS, True),
                    "full": full(kernels, inputs),
                    "public": public(inputs, scan),
                }
                found = times(functions, rounds)
                row = make_row(model, number, batch, found, fused_bytes(stage, batch), bandwidth)
                rows.append(row)
                print(line(row), flush=True)
    return {"copy_gb_per_second": bandwidth, "timings": rows}


def make_row(
    model: str, stage: int, batch: int, found: dict[str, float | None], size: int, bandwidth: float
) -> dict[str, Any]:
    """Return the results of one stage and batch; None where there is no time.

    Args:
        model: its name.
        stage: its number.
        batch: images.
        found: microseconds of each variant; None for one that did not fit the GPU's memory.
        size: bytes that the fused kernel must move.
        bandwidth: of a copy, in GB/s.
    """
    fused, slow = found["fused"], found["public"]
    rate = None if fused is None else size / fused / 1e3
    return {
        "model": model,
        "stage": stage,
        "batch": batch,
        "microseconds": found,
        "speed": None if fused is None or slow is None else slow / fused,
        "gb_per_second": rate,
        "share_of_copy": None if rate is None else rate / bandwidth,
    }


def line(row: dict[str, Any]) -> str:
    """Return a row of the table; a dash stands for what there is not."""

    def cell(value: float | None, form: str, unit: str = "") -> str:
        return f"{'–' if value is None else format(value, form) + unit:>9}"

    found = row["microseconds"]
    return " ".join(
        [
            f"{row['model']:18} {row['stage']:9} {row['batch']:9}",
            *(cell(found[name], ".1f", "us") for name in ("fused", "full", "public")),
            cell(row["speed"], ".2f"),
            cell(row["gb_per_second"], ".0f"),
            cell(row["share_of_copy"], ".1%"),
        ]
    )


def main() -> None:
    """Build if asked to, check, time, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--library",
        dest="built",
        type=Path,
        metavar="LIB",
        help="a built library (default: build the kernels for this GPU)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that are timed (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="batch 8 alone")
    options = parser.parse_args()
    require_gpu()
    scan = find_public_scan()
    with tempfile.TemporaryDirectory() as folder:
        try:
            kernels = Kernels(find_library(options.built, Path(folder)))
        except QuartermapError as error:
            refuse(str(error))
        checks = check(kernels)
        results = measure(kernels, options.rounds, (8,) if options.quick else BATCHES, scan)
    if options.json is not None:
        described = {"machine": machine(scan is not None), "checks": checks, **results}
        options.json.write_text(json.dumps(described, indent=2) + "\n")


if __name__ == "__main__":
    main()
