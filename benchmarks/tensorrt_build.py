"""TensorRT for RTX: what an engine costs to build, without a GPU.

    python benchmarks/tensorrt_build.py --models vmamba_digits vmamba_tiny_s1l8 --json results.json

For each model, pruned (k = 3) and not, in float32 and float16: seconds, processor seconds, peak memory, size, layers of
the parsed network and kernels of the engine. Each engine is built in a process of its own, one after the other, so that
no build sees the memory of another. Weights of models without a checkpoint are newly initialised: they decide nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import tempfile
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


def built(path: Path, folder: Path, batch: tuple[int, int, int]) -> dict[str, Any]:
    """Build an engine and return what it took."""
    from quartermap_deploy.targets.tensorrt import rtx
    from quartermap_deploy.targets.tensorrt.options import EngineOptions, Profile

    entry = rtx.build(path, folder, EngineOptions(profiles=(Profile(batch),)))
    return {"version": entry["version"], **entry["build"]}


def benchmark(name: str, pruned: bool, precision: str, batch: tuple[int, int, int]) -> dict[str, Any]:
    """Export and build one engine, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.onnx"
        with context.Pool(1) as pool:
            pool.apply(exported, (name, pruned, precision, path))
        with context.Pool(1) as pool:
            result = pool.apply(built, (path, Path(temporary), batch))
    return {"model": name, "k": 3 if pruned else None, "precision": precision, **result}


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=(*PRECISIONS, "bfloat16"))
    parser.add_argument("--batch", nargs=3, type=int, default=(1, 8, 32), metavar=("MIN", "OPT", "MAX"))
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    table = Table(title="TensorRT for RTX, built without a GPU", title_justify="left")
    for column in ("model", "k", "type"):
        table.add_column(column)
    for column in ("seconds", "processor s", "peak GB", "engine MB", "network layers", "kernels"):
        table.add_column(column, justify="right")
    rows = []
    for name in options.models:
        for pruned in (False, True):
            for precision in options.precisions:
                row = benchmark(name, pruned, precision, tuple(options.batch))
                rows.append(row)
                peak = row["peak_memory_bytes"]
                table.add_row(
                    name,
                    "3" if pruned else "–",
                    precision,
                    f"{row['seconds']:.1f}",
                    f"{row['processor_seconds']:.1f}",
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
