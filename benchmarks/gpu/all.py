"""Build, check and time everything on a GPU, in one call of at most eight minutes, and write one JSON.

    python benchmarks/gpu/all.py --json gpu.json [--seconds 480] [--only PART ...] [--library LIB] [--rates PROGRAM]
    python benchmarks/gpu/all.py --dry-run                        # what it would do here, and what is missing; no GPU
    python benchmarks/gpu/all.py --export FOLDER                  # on another machine before: the ONNX files alone
    python benchmarks/gpu/all.py --models FOLDER ...              # which are then not made here

Each part runs in a process of its own, within its seconds and what is left of all: one that fails, hangs or crashes
ends itself alone, and the JSON says so with the last lines of its output. Parts stand in the order of what they are
worth. The JSON is written anew after each part, so that what was measured is there whatever happens.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartermap_deploy.native.build import find_nvcc

HERE = Path(__file__).resolve()
LIBRARY, RATES, CHECKED = "libquartermap_kernels.so", "rates", "check.json"
MODELS = ("vmamba_tiny_s1l8", "vmamba_base_s2l15")
DIGITS = "vmamba_digits"
USER_ERROR = 2
TAIL = 3000
"""Characters of a part's output that are kept."""


@dataclass(frozen=True)
class Part:
    """A part of the run.

    Attributes:
        name: of it.
        seconds: that it may take.
        what: it does, in a sentence.
        run: does it, given the folder that all parts share, and returns what goes into the JSON.
        missing: says what this machine lacks for it, or None.
    """

    name: str
    seconds: int
    what: str
    run: Callable[[Path], Any]
    missing: Callable[[Path], str | None]


# What the parts do: each in a process of its own ----------------------------------------------------------------------


def build(folder: Path) -> dict[str, Any]:
    """Build the kernels for this GPU, and the program that measures rates, unless they are there already."""
    import torch
    from timing import find_library, machine

    begun = time.monotonic()
    if not (folder / LIBRARY).exists():
        find_library(None, folder)
    kernels = time.monotonic() - begun
    if not (folder / RATES).exists() and (nvcc := find_nvcc()):
        major, minor = torch.cuda.get_device_capability()
        command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{major}{minor}", "-o", str(folder / RATES)]
        subprocess.run([*command, str(HERE.with_name("rates.cu"))], check=True)
    return {"machine": machine(importlib.util.find_spec("mamba_ssm") is not None), "kernel_seconds": kernels}


def check(folder: Path) -> list[dict[str, Any]]:
    """Compare every plan with the float64 definition; all cases run, whatever the others give."""
    from selective_scan import check_plans

    from quartermap_deploy.scan.cuda import Kernels

    rows = check_plans(Kernels(folder / LIBRARY), small=False)
    (folder / CHECKED).write_text(json.dumps([row["right"] for row in rows]))
    return rows


def check_small(folder: Path) -> int:
    """Run each plan once on small scans, for compute-sanitizer."""
    from selective_scan import check_plans

    from quartermap_deploy.scan.cuda import Kernels

    rows = check_plans(Kernels(folder / LIBRARY), small=True)
    if wrong := [row for row in rows if not row["right"]]:
        raise SystemExit(f"FAILED: {wrong}")
    return len(rows)


def sanitize(folder: Path) -> dict[str, Any]:
    """Run `check_small` under three tools of compute-sanitizer."""
    found = {}
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "5"]
        command += [sys.executable, str(HERE), "--part", "check small", "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        found[tool] = {"code": done.returncode, "output": (done.stdout + done.stderr)[-TAIL:]}
    return found


def operator(folder: Path) -> dict[str, Any]:
    """Time the operator against the public path in every stage, batch 1, 8 and 128."""
    from public_path import find_public_scan
    from selective_scan import measure
    from traffic import BATCHES

    from quartermap_deploy.scan.cuda import Kernels

    return measure(Kernels(folder / LIBRARY), 5, BATCHES, find_public_scan())


def rates(folder: Path) -> Any:
    """Measure how long the instructions take that the kernels are made of."""
    done = subprocess.run([str(folder / RATES)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def model(name: str) -> Callable[[Path], dict[str, Any]]:
    """Return a part's function that times one whole model."""

    def run(folder: Path) -> dict[str, Any]:
        from public_path import find_public_scan

        from models import BATCHES, benchmark, benchmark_others
        from quartermap_deploy.scan.cuda import enable_cuda_kernels

        enable_cuda_kernels(folder / LIBRARY)
        public = find_public_scan()
        result = benchmark(name, BATCHES, 5, public)
        return {**result, "others": [benchmark_others(name, batch, 5, public) for batch in (1, 128)]}

    return run


def onnxruntime(name: str) -> Callable[[Path], dict[str, Any]]:
    """Return a part's function that runs a model in ONNX Runtime on CUDA, with `tree` bodies, against the CPU."""

    def run(folder: Path) -> dict[str, Any]:
        import onnxruntime as ort

        session, images = portable(folder, name), some_images(name)
        found: dict[str, Any] = {"version": ort.__version__}
        outputs = {}
        for provider, times in (("CPUExecutionProvider", 1), ("CUDAExecutionProvider", 20)):
            # As targets/execution.py has it: no TF32, whose errors are 1e-3.
            options = {"use_tf32": "0"} if provider.startswith("CUDA") else {}
            runner = ort.InferenceSession(str(session), providers=[(provider, options)])
            found.setdefault("providers", {})[provider] = runner.get_providers()
            feed = {runner.get_inputs()[0].name: images}
            outputs[provider] = runner.run(None, feed)[0]
            begun = time.perf_counter()
            for _ in range(times):
                runner.run(None, feed)
            found.setdefault("milliseconds", {})[provider] = (time.perf_counter() - begun) / times * 1e3
        wanted, given = outputs.values()
        found["error"] = float(abs(given - wanted).max() / abs(wanted).max())
        return found

    return run


def rtx(name: str) -> Callable[[Path], dict[str, Any]]:
    """Return a part's function that builds an engine by TensorRT for RTX, and runs it where it supports the GPU."""

    def run(folder: Path) -> dict[str, Any]:
        from quartermap_deploy.targets.tensorrt import rtx as target
        from quartermap_deploy.targets.tensorrt.options import EngineOptions, Profile

        begun = time.perf_counter()
        entry = target.build(portable(folder, name), folder, EngineOptions(profiles=(Profile((1, 8, 8)),)))
        found = {"entry": entry, "build, s": time.perf_counter() - begun}
        if reason := target.cannot_run(entry):
            return {**found, "not run": reason}
        session = target.open(folder, entry, built_here=True)
        begun = time.perf_counter()
        session.run(some_images(name))
        return {**found, "first run, ms": (time.perf_counter() - begun) * 1e3}

    return run


def some_images(name: str) -> Any:
    """Return eight random images of a model's size."""
    import numpy

    import quartermap_deploy as qm

    shape = (8, 3, *qm.load_card(name).preprocessing.crop)
    return numpy.random.default_rng(0).normal(size=shape).astype("float32")


def portable(folder: Path, name: str) -> Path:
    """Export a model once, with the scan's `tree` body in its graph; its weights are random."""
    path = folder / f"{name}.onnx"
    if not path.exists():
        import onnx
        import torch

        import quartermap_deploy as qm
        from quartermap_deploy.exporting.export import export_onnx
        from quartermap_deploy.passes.inline_scans import inline_scans
        from quartermap_deploy.passes.lower import lower

        torch.manual_seed(0)
        size = qm.load_card(name).preprocessing.crop
        onnx.save(inline_scans(lower(export_onnx(qm.create_model(name), (1, 3, *size)), "tree")), path)
    return path


# What a machine lacks -------------------------------------------------------------------------------------------------


def _no_compiler(folder: Path) -> str | None:
    if (folder / LIBRARY).exists():
        return None
    if find_nvcc() is None:
        return "no nvcc: install the CUDA toolkit, or name a library with --library"
    return None if shutil.which("cmake") else "no cmake: pip install cmake, or name a library with --library"


def _not_built(folder: Path) -> str | None:
    return None if (folder / LIBRARY).exists() else "the kernels were not built"


def _not_right(folder: Path) -> str | None:
    if missing := _not_built(folder):
        return missing
    if not (folder / CHECKED).exists():
        return "the kernels were not checked, and no time of what may be wrong is reported"
    right = json.loads((folder / CHECKED).read_text())
    return None if right and all(right) else "the kernels give wrong results; no time is reported"


def _no_rates(folder: Path) -> str | None:
    return None if (folder / RATES).exists() else "the program was not built: no nvcc"


def _no_sanitizer(folder: Path) -> str | None:
    if shutil.which("compute-sanitizer") is None:
        return "no compute-sanitizer on the PATH; it comes with the CUDA toolkit"
    return _not_built(folder)


def _no_provider(folder: Path) -> str | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return "no onnxruntime: pip install onnxruntime-gpu"
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return f"onnxruntime {ort.__version__} has no CUDA provider: pip install onnxruntime-gpu in its place"
    return None


def _no_rtx(folder: Path) -> str | None:
    found = importlib.util.find_spec("tensorrt_rtx")
    return None if found else "no tensorrt_rtx: pip install tensorrt-rtx"


PARTS = (
    Part(
        "build",
        120,
        "builds the kernels for this GPU, and the program that measures rates",
        build,
        _no_compiler,
    ),
    Part(
        "check",
        90,
        "compares both kernels in every plan, odd sizes and types with float64",
        check,
        _not_built,
    ),
    Part("operator", 100, "times each stage of VMamba-T and B against the public path", operator, _not_right),
    Part("rates", 20, "measures F2FP, HMMA, EX2, HFMA2 and FFMA, alone and side by side", rates, _no_rates),
    *(
        Part(
            name,
            90,
            f"times {name} in CUDA graphs: k = 3, k = 2, ToMe, public kernels",
            model(name),
            _not_right,
        )
        for name in MODELS
    ),
    Part(
        "sanitizer", 120, "runs each plan once under compute-sanitizer, three tools", sanitize, _no_sanitizer
    ),
    Part(
        "onnxruntime",
        40,
        "runs the digits in ONNX Runtime on CUDA against the CPU",
        onnxruntime(DIGITS),
        _no_provider,
    ),
    Part(
        "rtx",
        60,
        "builds an engine of the digits by TensorRT for RTX and runs it if it can",
        rtx(DIGITS),
        _no_rtx,
    ),
    *(
        Part(
            f"onnxruntime-{name}",
            60,
            f"runs {name} in ONNX Runtime on CUDA against the CPU",
            onnxruntime(name),
            _no_provider,
        )
        for name in MODELS
    ),
    *(
        Part(f"rtx-{name}", 90, f"builds an engine of {name} and runs it if it can", rtx(name), _no_rtx)
        for name in MODELS
    ),
)
HIDDEN = (Part("check small", 120, "for the sanitizer", check_small, _not_built),)


# The run --------------------------------------------------------------------------------------------------------------


def run_part(part: Part, folder: Path, seconds: float) -> dict[str, Any]:
    """Run one part in a process of its own, and return how it went.

    Args:
        part: which.
        folder: that all parts share.
        seconds: that are left for it.
    """
    if missing := part.missing(folder):
        return {"state": "skipped", "why": missing}
    result, log = folder / "result.json", folder / "output.txt"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(HERE), "--part", part.name, "--folder", str(folder), "--json", str(result)]
    begun = time.monotonic()
    with log.open("w") as output:
        # A session of its own, so that what it started ends with it.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            state = "done" if process.wait(timeout=seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            state = "out of time"
    found: dict[str, Any] = {"state": state, "seconds": round(time.monotonic() - begun, 1)}
    if state == "done":
        found["result"] = json.loads(result.read_text())
    else:
        found["code"], found["output"] = process.returncode, log.read_text(errors="replace")[-TAIL:]
    return found


def run_all(parts: Sequence[Part], folder: Path, seconds: float, output: Path | None) -> dict[str, Any]:
    """Run parts one after the other within so many seconds, and write what there is after each."""
    begun = time.monotonic()
    results: dict[str, Any] = {}
    for part in parts:
        left = seconds - (time.monotonic() - begun)
        allowed = min(part.seconds, left)
        print(f"{part.name}: {part.what}", flush=True)
        results[part.name] = (
            run_part(part, folder, allowed)
            if allowed > 1
            else {"state": "skipped", "why": "no time was left"}
        )
        print(f"  {describe(results[part.name])}", flush=True)
        if output is not None:
            output.write_text(json.dumps({"parts": results}, indent=1) + "\n")
    return results


def describe(result: dict[str, Any]) -> str:
    """Return one line on how a part went."""
    if result["state"] == "skipped":
        return f"skipped: {result['why']}"
    last = result.get("output", "").strip().splitlines()[-1:]
    return f"{result['state']} after {result['seconds']} s" + (f": {last[0]}" if last else "")


def describe_plan(parts: Sequence[Part], folder: Path, seconds: int) -> str:
    """Return what a run would do here, and what it lacks; build and check are taken to succeed."""
    lines = [f"{len(parts)} parts, at most {seconds} s together; each in a process of its own:"]
    later = {_not_built, _not_right, _no_rates}
    for part in parts:
        missing = None if part.missing in later else part.missing(folder)
        lines.append(
            f"  {part.name:29} {part.seconds:4} s  {part.what}" + (f"; MISSING: {missing}" if missing else "")
        )
    if importlib.util.find_spec("mamba_ssm") is None:
        lines.append(
            "mamba-ssm is not installed: public kernels are left out, and the public path is a lower bound"
        )
    return "\n".join(lines)


def main() -> None:
    """Run, or say what would be run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, after each part")
    parser.add_argument(
        "--seconds", type=int, default=480, help="for all parts together (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--library", dest="built", type=Path, metavar="LIB", help="built kernels (default: build them)"
    )
    parser.add_argument("--rates", type=Path, metavar="PROGRAM", help="rates.cu, built (default: build it)")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="ONNX files that --export wrote")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the models' ONNX files, and end")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and what is missing")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # run by this program itself
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        part = next(part for part in (*PARTS, *HIDDEN) if part.name == options.part)
        result = part.run(options.folder)
        if options.json is not None:
            options.json.write_text(json.dumps(result))
        return
    if options.export is not None:
        options.export.mkdir(parents=True, exist_ok=True)
        for name in (DIGITS, *MODELS):
            print(portable(options.export, name))
        return
    parts = [part for part in PARTS if options.only is None or part.name in options.only]
    with tempfile.TemporaryDirectory(prefix="quartermap-gpu-") as temporary:
        folder = Path(temporary)
        for given, name in ((options.built, LIBRARY), (options.rates, RATES)):
            if given is not None:
                if not given.is_file():
                    parser.error(f"there is no file {given}")
                shutil.copy(given, folder / name)
        if options.models is not None:
            if not (files := list(options.models.glob("*.onnx"))):
                parser.error(f"there are no ONNX files in {options.models}; --export writes them")
            for file in files:
                shutil.copy(file, folder / file.name)
        if options.dry_run:
            print(describe_plan(parts, folder, options.seconds))
            return
        from timing import require_gpu

        require_gpu()
        results = run_all(parts, folder, options.seconds, options.json)
    if any(result["state"] in ("failed", "out of time") for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
