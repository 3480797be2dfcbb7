"""ONNX Runtime on a CPU: what the scan costs, and what QuarterMap and its passes save.

    python benchmarks/scan_cost.py --models vmamba_tiny_s1l8 --threads 2 --json results.json

For each model, on real photographs, all of these run in turns in one process, after their outputs were checked:

    native          the portable model, its scans by the native operator, its layer normalisations of maps likewise
    norms apart     the same, with the layer normalisations as they stand in the file
    portable        the same file, its scans by the body in it
    native k=3      pruned, every third block, hoisted and sunk; likewise portable k=3
    canonical k=3   the same in the paper's form, Slice before and Resize after the scan; with the native operator
    floor           the portable model with the scan taken out (floor.py)
    torch           PyTorch with its operator for scans, which takes the native kernels where they are built
    torch floor     PyTorch with the scan taken out
    torch steps     PyTorch with the step-by-step scan, as the public code runs on a CPU

The native operator has to be built (`quartermap native build`); what instruction set it uses is told with the results.

Weights are newly initialised with a fixed seed: they decide no time.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from floor import FLOOR, STEP_BY_STEP, VECTORIZED, floor_onnx, with_scan

import quartermap_deploy as qm
from quartermap_deploy.bench import Timing, interleave
from quartermap_deploy.exporting.export import export
from quartermap_deploy.passes import CANONICAL, OPTIMIZED, Selection, lower, run_passes
from quartermap_deploy.scan.operators import selective_scan_2d
from quartermap_deploy.sources.architectures import architecture_source
from quartermap_deploy.targets.onnxruntime_cpu import OnnxRuntimeSession
from quartermap_deploy.validation.inputs import real_images
from quartermap_deploy.validation.tolerances import tolerance_for

MODELS = ("vmamba_tiny_s1l8", "vmamba_small_s2l15", "vmamba_base_s2l15", "medmamba_t")
PLAN = qm.QuarterMap(every=3)


def benchmark(name: str, batch: int, threads: int, repeats: int, step_by_step: bool) -> dict[str, Any]:
    """Build everything for one model, check it, and time it in turns."""
    card = qm.load_card(name)
    size = card.preprocessing.crop
    images = real_images(card.preprocessing, count=batch, digits=name == "vmamba_digits")
    torch.manual_seed(0)
    model = qm.create_model(name)
    start = time.perf_counter()
    exported = export(architecture_source(model, (1, 3, *size)))
    export_seconds = time.perf_counter() - start
    plain, traced = exported.model, exported.traced.model
    selection = Selection(PLAN.select(model.depths), PLAN.subsample)
    pruned = lower(run_passes(traced, selection, OPTIMIZED)[0])
    graphs = {
        "native": (plain, True),
        "norms apart": (plain, True),
        "portable": (plain, False),
        "native k=3": (pruned, True),
        "portable k=3": (pruned, False),
        "canonical k=3": (lower(run_passes(traced, selection, CANONICAL)[0]), True),
        "floor": (floor_onnx(plain), False),
    }
    sessions, loading = {}, {}
    for label, (graph, native) in graphs.items():
        data = graph.SerializeToString()
        start = time.perf_counter()
        sessions[label] = OnnxRuntimeSession(
            data, threads=threads, native=native, fuse=label != "norms apart"
        )
        loading[label] = time.perf_counter() - start
    model.freeze()
    tensor = torch.from_numpy(images)
    _require_parity(model, tensor, sessions)

    calls: dict[str, Any] = {label: _call(session, images) for label, session in sessions.items()}
    calls["torch"] = with_scan(model, tensor, selective_scan_2d)
    calls["torch floor"] = with_scan(model, tensor, FLOOR)
    if step_by_step:
        calls["torch steps"] = with_scan(model, tensor, STEP_BY_STEP)
    timings = interleave(calls, repeats)
    return {
        "model": name,
        "batch": batch,
        "nodes": len(plain.graph.node),
        "export_seconds": export_seconds,
        "load_seconds": {label: loading[label] for label in ("native", "portable")},
        "instruction_set": sessions["native"].scans.instruction_set,
        "median_ms": {label: timing.median * 1e3 for label, timing in timings.items()},
        "ratios": _ratios(timings),
    }


def _call(session: OnnxRuntimeSession, images: np.ndarray[Any, Any]) -> Any:
    return lambda: session.run(images)


def _require_parity(model: Any, images: torch.Tensor, sessions: dict[str, OnnxRuntimeSession]) -> None:
    """No speed counts before the outputs are right."""
    with torch.no_grad():
        whole = with_scan(model, images, VECTORIZED)().numpy()
        pruned = with_scan(qm.prune(model, PLAN), images, VECTORIZED)().numpy()
    expected = {label: pruned if "k=3" in label else whole for label in sessions if label != "floor"}
    for label, logits in expected.items():
        error = float(np.abs(sessions[label].run(images.numpy()) - logits).max() / np.abs(logits).max())
        if not error <= tolerance_for("float32").relative:
            raise SystemExit(f"{label} departs from PyTorch by {error:.1e} of the largest output; no timing")


def _ratios(timings: dict[str, Timing]) -> dict[str, float]:
    pairs = {
        "native / floor": ("native", "floor"),
        "norms apart / floor": ("norms apart", "floor"),
        "portable / floor": ("portable", "floor"),
        "torch steps / native": ("torch steps", "native"),
        "torch / torch floor": ("torch", "torch floor"),
        "native / native k=3": ("native", "native k=3"),
        "portable / portable k=3": ("portable", "portable k=3"),
        "canonical k=3 / native k=3": ("canonical k=3", "native k=3"),
    }
    return {
        label: timings[a].ratio(timings[b])
        for label, (a, b) in pairs.items()
        if a in timings and b in timings
    }


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="models to time")
    parser.add_argument("--batch", type=int, default=1, help="images at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--skip-steps", action="store_true", help="leave out the slow step-by-step PyTorch scan"
    )
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for name in arguments.models:
        results.append(
            benchmark(name, arguments.batch, arguments.threads, arguments.repeats, not arguments.skip_steps)
        )
        _print(results[-1])
    environment = {
        "machine": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": __import__("onnxruntime").__version__,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"environment": environment, "results": results}, indent=2) + "\n"
        )


def _print(result: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"{result['model']}, batch {result['batch']}, {result['nodes']} nodes")
    table.add_column("variant")
    table.add_column("median ms", justify="right")
    for label, milliseconds in result["median_ms"].items():
        table.add_row(label, f"{milliseconds:.1f}")
    console.print(table)
    ratios = Table()
    ratios.add_column("ratio, median of the rounds")
    ratios.add_column("", justify="right")
    for label, ratio in result["ratios"].items():
        ratios.add_row(label, f"{ratio:.2f}")
    console.print(ratios)
    loads = ", ".join(f"{label} {seconds:.1f} s" for label, seconds in result["load_seconds"].items())
    console.print(
        f"native operator: {result['instruction_set']}; export {result['export_seconds']:.1f} s, load {loads}\n"
    )


if __name__ == "__main__":
    main()
