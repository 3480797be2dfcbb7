"""Runs another tool on every model of a folder; a process of its own, with that tool and NumPy alone.

    python tool_runs.py TOOL MODELS OUT

For each MODELS/NAME.onnx, a tool that runs models reads MODELS/NAME.npz and writes OUT/NAME.npz with what it computes,
in order; one that changes models writes OUT/NAME.onnx. What it refuses goes to OUT/NAME.txt, in its own words.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[Path, Path], None]


def openvino(model: Path, out: Path) -> None:
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    core = ov.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", settings)
    # Twice, with another batch in between where it is open: loops keep shapes.
    feeds = dict(np.load(model.with_suffix(".npz")))
    if compiled.inputs[0].partial_shape[0].is_dynamic:
        compiled({name: value[:1] for name, value in feeds.items()})
    found = compiled(feeds)
    save(out, [found[output] for output in compiled.outputs])


def onnxruntime(model: Path, out: Path) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    save(out, session.run(None, dict(np.load(model.with_suffix(".npz")))))


def onnxsim(model: Path, out: Path) -> None:
    import onnx
    import onnxsim as tool

    changed, right = tool.simplify(onnx.load(model))
    if not right:
        raise RuntimeError("onnxsim says itself that its result departs")
    onnx.save(changed, out.with_suffix(".onnx"))


def onnxslim(model: Path, out: Path) -> None:
    import onnx
    import onnxslim as tool

    onnx.save(tool.slim(onnx.load(model)), out.with_suffix(".onnx"))


def onnxoptimizer(model: Path, out: Path) -> None:
    import onnx
    import onnxoptimizer as tool

    onnx.save(tool.optimize(onnx.load(model)), out.with_suffix(".onnx"))


def onnxscript(model: Path, out: Path) -> None:
    import onnx
    import onnxscript.optimizer as tool

    onnx.save(tool.optimize(onnx.load(model)), out.with_suffix(".onnx"))


def inliner(model: Path, out: Path) -> None:
    import onnx
    import onnx.inliner as tool

    onnx.save(tool.inline_local_functions(onnx.load(model)), out.with_suffix(".onnx"))


def float16(model: Path, out: Path) -> None:
    import onnx
    from onnxconverter_common import float16 as tool

    onnx.save(tool.convert_float_to_float16(onnx.load(model), keep_io_types=True), out.with_suffix(".onnx"))


def pre_process(model: Path, out: Path) -> None:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(model), str(out.with_suffix(".onnx")))


def surgeon(model: Path, out: Path) -> None:
    import subprocess

    written = str(out.with_suffix(".onnx"))
    command = ["surgeon", "sanitize", str(model), "--fold-constants", "-o", written]
    program = "import sys; from polygraphy.tools import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])


TOOLS: dict[str, Run] = {
    function.__name__: function
    for function in (
        *(openvino, onnxruntime, onnxsim, onnxslim, onnxoptimizer, onnxscript, inliner, float16, pre_process),
        surgeon,
    )
}


def save(out: Path, arrays: list[Any]) -> None:
    np.savez(out.with_suffix(".npz"), *(np.asarray(array) for array in arrays))


def main() -> None:
    run, models, out = TOOLS[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])
    tempfile.tempdir = str(out)
    for model in sorted(models.glob("*.onnx")):
        try:
            run(model, out / model.stem)
        except Exception as error:
            (out / f"{model.stem}.txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")


if __name__ == "__main__":
    main()
