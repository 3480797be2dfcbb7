"""Does an execution provider of ONNX Runtime really work here? A tiny model is run through it, in a process of its own.

ONNX Runtime says which providers were compiled in, not which ones start: without a driver or a library that it loads, a
session goes to the CPU, and the reason to the log. A broken provider may also end the process, or never come back. So
it is tried elsewhere first, with a time limit, and the log of that process is read.

The model is a convolution, for which CUDA needs cuDNN, a sum and a matrix product; the result is compared with NumPy's.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from quartermap_deploy.processes import ending
from quartermap_deploy.targets.execution import CUDA, TENSORRT, Provider

TIME_LIMIT = 120.0
"""Seconds for a provider to start and to run the tiny model; CUDA's first start takes some ten."""
TOLERANCE = 1e-2
"""Of the largest value. A device that computes in 16 bits passes: what a model needs is judged by its parity."""
_LOG = re.compile(r"\[([EWF]):onnxruntime:[^\]]*\] (.*)")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_WHERE_IN_SOURCE = re.compile(
    r"^(.*?\[ONNXRuntimeError\] : \d+ : \w+ : )?(/\S+\.(cc|cpp|h|cu):\d+ .*?\)( const)? (\[ERROR\] )?)?"
)
_LONGEST = 700

_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import main; main()"


@dataclass(frozen=True)
class Probe:
    """What was found out about a provider.

    Attributes:
        provider: its name.
        starts: whether a session has it.
        works: whether it computed the tiny model, or a part of it, rightly.
        reason: why not, in ONNX Runtime's own words where it has some; None where it works.
        seconds: that it took, with the start of the process.
    """

    provider: str
    starts: bool
    works: bool
    reason: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@functools.lru_cache(maxsize=32)
def probe(provider: Provider, limit: float = TIME_LIMIT) -> Probe:
    """Try a provider, with its options, in a process of its own; the answer is kept for this process.

    Args:
        provider: what to try.
        limit: seconds until the process is ended.
    """
    request = json.dumps({"name": provider.name, "options": provider.settings()})
    child = _CHILD.format(module=__name__)
    start = time.monotonic()

    def found(reason: str | None, *, starts: bool = False, works: bool = False) -> Probe:
        return Probe(provider.name, starts, works, reason, round(time.monotonic() - start, 3))

    try:
        # -I: nothing of the current folder is imported, only what this process would import.
        done = subprocess.run(
            [sys.executable or "", "-I", "-c", child, json.dumps(sys.path)],
            input=request,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return found(f"it did not come back within {limit:g} seconds")
    except OSError as error:
        return found(f"no process could be started to try it: {error}")
    said = log_text(done.stderr)
    answer = _answer(done.stdout)
    if answer is None:
        return found(f"it ended the process {ending(done.returncode)}{f': {said}' if said else ''}")
    raised, starts = answer["error"], bool(answer["starts"])
    if answer["works"]:
        return found(None, starts=True, works=True)
    # The log says more than the exception where it could not start, and nothing that matters where it could.
    parts = [raised, None if starts or (raised and raised in said) else said]
    reason = "; ".join(part for part in parts if part)
    return found(reason or "ONNX Runtime did not take it, and says no reason", starts=starts)


def _answer(output: str) -> dict[str, Any] | None:
    """What the process said in its last line; None where it ended before."""
    lines = output.splitlines()
    try:
        values = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def log_text(output: str) -> str:
    """The errors in ONNX Runtime's log, and then its warnings, in one line, without places in its source code."""
    found: dict[str, list[str]] = {"E": [], "W": []}
    for line in _COLOURS.sub("", output).splitlines():
        if (match := _LOG.search(line)) is not None:
            text = " ".join(_WHERE_IN_SOURCE.sub("", match[2]).split()).rstrip(".")
            kept = found["W" if match[1] == "W" else "E"]
            if text and text not in kept:
                kept.append(text)
    return "; ".join([*found["E"], *found["W"]])[:_LONGEST]


def preload(names: tuple[str, ...]) -> None:
    """Load the CUDA libraries that pip packages bring, which the system's loader does not find by itself."""
    import onnxruntime

    if {CUDA, TENSORRT}.isdisjoint(names) or not hasattr(onnxruntime, "preload_dlls"):
        return
    # What it cannot load it prints; where a library is really missing, starting the provider says so.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        onnxruntime.preload_dlls()


# In the process of its own -------------------------------------------------------------------------------------------


def main() -> None:
    """Read a provider from standard input, try it, and print what was found as one line of JSON."""
    request = json.load(sys.stdin)
    # Libraries print to standard output, so the answer has one of its own.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        print(json.dumps(_tried(request["name"], request["options"])), file=answers, flush=True)
    # Nothing is left to do, and some providers do not survive their own unloading.
    os._exit(0)


def _tried(name: str, options: dict[str, str]) -> dict[str, Any]:
    import numpy as np
    import onnxruntime

    preload((name,))
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    starts = False
    try:
        session = onnxruntime.InferenceSession(
            _model(), settings, providers=[(name, options)], enable_fallback=0
        )
        starts = name in session.get_providers()
        image = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
        (found,) = session.run(None, {"image": image})
    except Exception as error:  # whatever it raises is the answer
        return {"starts": starts, "works": False, "error": one_line(error)}
    expected = _expected(image)
    wrong = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not wrong <= TOLERANCE:
        said = f"its result is wrong by {wrong:.2g} of the largest value"
        return {"starts": starts, "works": False, "error": said}
    return {"starts": starts, "works": starts, "error": None}


def one_line(error: Exception) -> str:
    """An exception of ONNX Runtime in one line, without places in its source code."""
    return (
        " ".join(_WHERE_IN_SOURCE.sub("", str(error)).split()).rstrip(".")[:_LONGEST] or type(error).__name__
    )


def _weights() -> tuple[Any, Any]:
    """A convolution's, (4, 3, 3, 3), and a matrix, (4, 5)."""
    import numpy as np

    numbers = np.random.default_rng(1)
    kernel, matrix = (numbers.standard_normal(shape) for shape in ((4, 3, 3, 3), (4, 5)))
    return kernel.astype(np.float32), matrix.astype(np.float32)


def _model() -> bytes:
    """An image (1, 3, 8, 8) → convolution → the sum over all positions → a matrix product, (1, 5)."""
    from onnx import TensorProto, helper, numpy_helper

    kernel, matrix = _weights()
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["maps"]),
        helper.make_node("ReduceSum", ["maps", "sides"], ["sums"], keepdims=0),
        helper.make_node("MatMul", ["sums", "matrix"], ["result"]),
    ]
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, [1, 5])],
        [
            numpy_helper.from_array(kernel, "kernel"),
            numpy_helper.from_array(matrix, "matrix"),
            helper.make_tensor("sides", TensorProto.INT64, [2], [2, 3]),
        ],
    )
    made = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return bytes(made.SerializeToString())


def _expected(image: Any) -> Any:
    """What the model computes, by NumPy, in float64."""
    import numpy as np

    kernel, matrix = _weights()
    windows = np.lib.stride_tricks.sliding_window_view(image.astype(np.float64), (3, 3), axis=(2, 3))
    sums = np.einsum("bcyxij,ocij->bo", windows, kernel)
    return sums @ matrix
