"""TensorRT for RTX: what an engine costs to build, without a GPU.

    python benchmarks/tensorrt_build.py --models vmamba_digits vmamba_tiny_s1l8 --json results.json

For each model, pruned (k = 3) and not, in float32 and float16: seconds, processor seconds, peak memory, size, layers of
the parsed network and kernels of the engine. Each engine is built in a process of its own, one after the other, so that
no build sees the memory of another. Weights of models without a checkpoint are newly initialised: they decide nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MODELS = ("vmamba_digits", "vmamba_tiny_s1l8")
PRECISIONS = ("float32", "float16")


def exported(name: str, pruned: bool, precision: str, path: Path) -> None:
    """Write the portable model."""
    import onnx
    import torch

    import quartermap_deploy as qm
    from quartermap_deploy.exporting.export import export_onnx
    from quartermap_deploy.passes import lower

    torch.manual_seed(0)
    size = qm.load_card(name).preprocessing.crop
    plan = qm.QuarterMap(every=3) if pruned else None
    model = export_onnx(qm.create_model(name), (1, 3, *size), plan)
    if precision != "float32":
        from quartermap_deploy.passes.cast_precision import cast_precision

        del model.functions[:]
        model = lower(cast_precision(model, precision)[0])
    onnx.save(model, path)


def built(path: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Build an engine and return what it took."""
    from quartermap_deploy.targets.tensorrt import rtx
    from quartermap_deploy.targets.tensorrt.options import EngineOptions

    entry = rtx.build(path, folder, EngineOptions.from_dict(settings))
    return {"version": entry["version"], **entry["build"]}


def benchmark(
    name: str, pruned: bool, precision: str, scans: Sequence[str], settings: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Export a model and build an engine with each form of its scans, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.onnx"
        with context.Pool(1) as pool:
            pool.apply(exported, (name, pruned, precision, path))
        for scan in scans:
            before = os.getloadavg()[0]
            with context.Pool(1) as pool:
                result = pool.apply(built, (path, Path(temporary), {**settings, "scan": scan}))
            about = {"model": name, "k": 3 if pruned else None, "precision": precision, "scan": scan}
            yield {**about, "load_before": before, **result}


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=(*PRECISIONS, "bfloat16"))
    parser.add_argument(
        "--scans",
        nargs="+",
        default=("tree",),
        choices=("tree", "plugin"),
        help="what scans become; the plugin takes the library of QUARTERMAP_PLUGIN or of your store (default: tree)",
    )
    parser.add_argument("--compute-capabilities", nargs="+", help="such as 8.9 (default: those of engines)")
    parser.add_argument("--batch", nargs=3, type=int, default=(1, 8, 32), metavar=("MIN", "OPT", "MAX"))
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    table = Table(title="TensorRT for RTX, built without a GPU", title_justify="left")
    for column in ("model", "k", "type", "scan"):
        table.add_column(column)
    for column in ("seconds", "processor s", "load", "peak GB", "engine MB", "network layers", "kernels"):
        table.add_column(column, justify="right")
    settings: dict[str, Any] = {"profiles": [{"batch": list(options.batch)}]}
    if options.compute_capabilities:
        settings["compute_capabilities"] = options.compute_capabilities
    rows = []
    for name, pruned, precision in itertools.product(options.models, (False, True), options.precisions):
        for row in benchmark(name, pruned, precision, options.scans, settings):
            rows.append(row)
            peak = row["peak_memory_bytes"]
            table.add_row(
                name,
                "3" if pruned else "–",
                precision,
                row["scan"],
                f"{row['seconds']:.1f}",
                f"{row['processor_seconds']:.1f}",
                f"{row['load_before']:.1f}",
                "–" if peak is None else f"{peak / 1e9:.2f}",
                f"{row['engine_bytes'] / 1e6:.1f}",
                str(row["network_layers"]),
                str(row["layers"] or "–"),
            )
    Console(width=140).print(table)
    if options.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
        }
        options.json.write_text(json.dumps({"machine": machine, "builds": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
