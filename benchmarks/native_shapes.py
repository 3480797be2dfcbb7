"""One scan in ONNX Runtime, native and portable, from 1×1 to 56×56 positions: is the native operator ever slower?

    python benchmarks/native_shapes.py --threads 2 --json shapes.json

Each scan is a model of its own. Both forms of it are compared first, to 1e-5 of the largest output, and then timed in
turns. The ratio is portable / native, the median of the rounds: below 1 the native operator would be slower. The exit
code is 1 if it is anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table

from quartermap_deploy.bench import interleave
from quartermap_deploy.lowering.operator import (
    DIRECTIONS,
    DOMAIN,
    INPUTS_2D,
    MAPS,
    SELECTIVE_SCAN_2D,
    VERSION,
)
from quartermap_deploy.passes import lower
from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession

SHAPES = [
    # batch, d_inner, height, width, N, R
    (1, 96, 1, 1, 1, 6),
    (1, 96, 1, 1, 16, 6),
    (1, 192, 1, 49, 1, 12),
    (1, 192, 49, 1, 16, 12),
    (1, 3, 7, 7, 1, 1),
    (1, 768, 7, 7, 1, 48),
    (1, 384, 7, 7, 16, 24),
    (8, 768, 7, 7, 1, 48),
    (1, 384, 14, 14, 1, 24),
    (1, 192, 28, 28, 16, 12),
    (1, 96, 56, 56, 1, 6),
    (4, 96, 56, 56, 1, 6),
]


def scan_model(
    batch: int, d_inner: int, height: int, width: int, states: int, rank: int
) -> tuple[bytes, dict[str, Any]]:
    """A model of one scan in four directions, and inputs for it."""
    random = np.random.default_rng(0)
    count = len(DIRECTIONS)
    channels = {"x": d_inner, "dt": count * rank, "B": count * states, "C": count * states}
    feeds = {
        name: random.normal(size=(batch, channels[name], height, width)).astype(np.float32)
        for name in INPUTS_2D[MAPS]
    }
    parameters = {
        "A": -random.uniform(0.5, 1.5, (count * d_inner, states)),
        "D": random.normal(size=count * d_inner),
        "dt_bias": random.normal(-3, 0.5, count * d_inner),
        "dt_weight": random.normal(size=(count * d_inner, rank)) / np.sqrt(rank),
    }
    node = helper.make_node(
        SELECTIVE_SCAN_2D, INPUTS_2D, ["y"], "scan", domain=DOMAIN, directions=DIRECTIONS, softplus=1
    )
    graph = helper.make_graph(
        [node],
        "scan",
        [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, value.shape)
            for name, value in feeds.items()
        ],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, feeds["x"].shape)],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in parameters.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    model = lower(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    return model.SerializeToString(), feeds


def measure(shape: tuple[int, ...], threads: int, repeats: int) -> dict[str, Any]:
    """Compare both forms of one scan, then time them in turns."""
    model, feeds = scan_model(*shape)
    sessions = {
        form: OnnxRuntimeSession(model, threads, native=form == "native") for form in ("native", "portable")
    }
    found = {form: session.infer(feeds)["y"] for form, session in sessions.items()}
    error = float(np.abs(found["native"] - found["portable"]).max() / np.abs(found["portable"]).max())
    if not error <= 1e-5:
        raise SystemExit(f"the two forms of {shape} differ by {error:.1e} of the largest output; no timing")
    timings = interleave(
        {form: lambda session=session: session.infer(feeds) for form, session in sessions.items()},
        repeats,
        warmup=5,
        rest=0.002,
    )
    return {
        "shape": shape,
        **{f"{form}_ms": timing.median * 1e3 for form, timing in timings.items()},
        "portable / native": timings["portable"].ratio(timings["native"]),
    }


def main() -> int:
    """Run the benchmark and print its table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="threads (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=51, help="timed rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    results = [measure(shape, options.threads, options.repeats) for shape in SHAPES]
    table = Table("batch, d_inner, H, W, N, R", "native ms", "portable ms", "portable / native")
    for result in results:
        numbers = (result["native_ms"], result["portable_ms"], result["portable / native"])
        table.add_row(", ".join(map(str, result["shape"])), *(f"{number:.3f}" for number in numbers))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return int(any(not result["portable / native"] >= 1 for result in results))


if __name__ == "__main__":
    sys.exit(main())
