"""Compile the models of public repositories, as they are, and print what became of each.

    git clone https://github.com/MzeroMiko/VMamba checkouts/VMamba       # and others, by their names
    pip install einops timm fvcore                                       # what their model code imports
    python benchmarks/public_models.py checkouts

Not a part of continuous integration: the repositories are other people's, and large.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from public_model_table import MODELS, PublicModel

DESCRIPTION = """\
Compile the models of public repositories, unchanged, and print what became of each.

DIR holds checkouts, one folder for each repository, named as on GitHub. A repository that is not there is skipped.
Each model is made by its own code, in a process of its own, since repositories share names of modules. Neither CUDA
nor mamba-ssm is needed; what else the code imports is, and --list says what that is.
"""

EPILOG = """\
columns:
  scans      calls of a selective scan in one run of the model
  2-D        how many of them became scans of a map, with the four directions or some of them, or one for each
  parity     largest difference of an output between ONNX Runtime and PyTorch, as a share of the largest value, over
             the example, real images and zeros
  pruned     the same with a QuarterMap plan, every k-th block from the first stage on; or why it was refused
  nodes      of the ONNX graph; a scan is one
  seconds    export, recovery and parity together
  eager, ORT milliseconds for one run of PyTorch (with our scan) and of ONNX Runtime, run in turns: the fastest of each

examples:
  public_models.py checkouts                                   all models whose repositories are there
  public_models.py checkouts --list                            what is known, and what is missing
  public_models.py checkouts --only vmamba_tiny_s1l8 vim_tiny  two of them
  public_models.py checkouts --size 96 --no-timing             quickly: small images, where the model takes them
  public_models.py checkouts --json results.json               all figures and reasons, for other programs
  public_models.py checkouts --markdown table.md               the table for docs/your-own-model.md
"""

MARK = "public_models result: "


def main() -> int:
    """Run the command; returns its exit code: 1 if a model failed."""
    options = _parser().parse_args()
    if not options.folder.is_dir():
        print(
            f"{options.folder} is no folder; give one with checkouts of public repositories", file=sys.stderr
        )
        return 2
    if unknown := [name for name in options.only or () if name not in MODELS]:
        print(f"unknown model {unknown[0]!r}; known are {', '.join(MODELS)}", file=sys.stderr)
        return 2
    names = options.only or list(MODELS)
    if options.worker:
        print(MARK + json.dumps(measure(names[0], options)))
        return 0
    if options.list:
        _print_list(options.folder, names)
        return 0
    present = [name for name in names if MODELS[name].folder(options.folder)]
    results = [_in_own_process(name, options, first=not place) for place, name in enumerate(present)]
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(_as_markdown(results))
    if missing := sorted({MODELS[n].repository[0] for n in names if not MODELS[n].folder(options.folder)}):
        print(f"not in {options.folder}: {', '.join(missing)}")
    return 1 if any("error" in result for result in results) or not results else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder with the checkouts")
    parser.add_argument(
        "--list", action="store_true", help="say which models are known and which are there; run none"
    )
    parser.add_argument("--only", metavar="MODEL", nargs="+", help="these models alone")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures and reasons to a file")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the table as Markdown")
    parser.add_argument(
        "--size", metavar="N", type=int, help="height and width of the images, instead of the usual ones"
    )
    parser.add_argument(
        "--every", metavar="K", type=int, default=2, help="prune every k-th block (default: 2)"
    )
    parser.add_argument("--no-pruning", action="store_true", help="leave the pruned model out")
    parser.add_argument("--no-timing", action="store_true", help="leave eager and ORT out")
    parser.add_argument(
        "--threads", metavar="N", type=int, default=0, help="threads; 0 takes all cores (default)"
    )
    parser.add_argument(
        "--timeout", metavar="S", type=int, default=1800, help="seconds for a model (default: 1800)"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _print_list(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        model = MODELS[name]
        there = "there" if model.folder(folder) else "missing"
        note = f"; {model.note}" if model.note else ""
        print(f"{name:30} {model.repository[0]:16} {there:8} needs {', '.join(model.needs)}{note}")


# One model, in a process of its own ---------------------------------------------------------------------------------


def _in_own_process(name: str, options: argparse.Namespace, first: bool) -> dict[str, Any]:
    """Measure a model and print its line, the first one with a header."""
    command = [sys.executable, "-W", "ignore", __file__, *_arguments(options), "--only", name, "--worker"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        result: dict[str, Any] = {"model": name, "error": f"took more than {options.timeout} s"}
    else:
        lines = [line for line in ran.stdout.splitlines() if line.startswith(MARK)]
        last = (ran.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        result = json.loads(lines[-1][len(MARK) :]) if lines else {"model": name, "error": last}
    print(_as_text(result, first=first), flush=True)
    return result


def _arguments(options: argparse.Namespace) -> list[str]:
    given = [str(options.folder), "--every", str(options.every), "--threads", str(options.threads)]
    if options.size:
        given += ["--size", str(options.size)]
    return given + ["--no-pruning"] * options.no_pruning + ["--no-timing"] * options.no_timing


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compile a model; the figures and reasons, and under "error" what did not work."""
    import torch

    from quartermap_deploy.machine import usable_cores

    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads or usable_cores())
    model, result = MODELS[name], {"model": name}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        for step in (_make, _compile, _prune, _time):
            try:
                step(model, result, Path(folder), options)
            except Exception as error:
                traceback.print_exc()
                result["error"] = f"{step.__name__.strip('_')}: {type(error).__name__}: {_line(error)}"
                break
    return {key: value for key, value in result.items() if not key.startswith("_")}


def _make(model: PublicModel, result: dict[str, Any], folder: Path, options: argparse.Namespace) -> None:
    import torch

    import quartermap_deploy as qm

    checkout = model.folder(options.folder.resolve())
    assert checkout is not None
    torch.manual_seed(0)
    with qm.public_code() as block:
        made = model.build(checkout)
    # Some repositories' train() returns nothing, and so does eval().
    made.eval()
    enliven(made)
    size = options.size if model.any_size else None
    shapes = {name: _sized(shape, size) for name, shape in model.inputs.items()}
    result["supplied"] = block.supplied
    result["_model"] = made
    result["_inputs"] = tuple(torch.rand(shape) for shape in shapes.values())
    with qm.public_code(made) as block, torch.no_grad(), _counted() as scans:
        made(*result["_inputs"])
    result["redirected"] = block.redirected
    result["runs"], result["scans"] = True, scans[0]


@contextlib.contextmanager
def _counted() -> Iterator[list[int]]:
    """Count the calls of scans."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    count = [0]

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            count[0] += func is torch.ops.quartermap.selective_scan.default
            return func(*args, **(kwargs or {}))

    with Counter():
        yield count


def _sized(shape: tuple[int, ...], size: int | None) -> tuple[int, ...]:
    return shape if size is None else (*shape[:2], size, size)


def _compile(model: PublicModel, result: dict[str, Any], folder: Path, options: argparse.Namespace) -> None:
    import quartermap_deploy as qm

    start = time.perf_counter()
    bundle = qm.compile_module(result["_model"], result["_inputs"], folder / "plain")
    result["seconds"] = round(time.perf_counter() - start, 1)
    graph = bundle.manifest["graph"]
    result["nodes"] = graph["nodes"]
    (recovery,) = (p for p in bundle.manifest["passes"] if p["name"] == "recover_2d")
    # Each line begins with the names of the scans that it is about: one node of the graph may stand for several, and
    # one for each direction of a scan.
    result["two_dimensional"] = sum(len(line.split(": ")[0].split(", ")) for line in recovery["changed"])
    result["one_dimensional"] = graph["operators"].get("SelectiveScan", 0)
    result["why_not"] = collections.Counter(recovery["refused"].values())
    result["parity"] = _parity(bundle)
    result["_bundle"] = bundle


def _parity(bundle: Any) -> float:
    """The largest error of an output of the model, over all cases."""
    outputs = [item for case in bundle.report["cases"] for item in case["outputs"]]
    names = {item.name for item in bundle.outputs}
    return max(float(item["relative_error"]) for item in outputs if item["name"] in names)


def _prune(model: PublicModel, result: dict[str, Any], folder: Path, options: argparse.Namespace) -> None:
    import quartermap_deploy as qm
    from quartermap_deploy.errors import PassError, PlanError

    if options.no_pruning:
        return
    plan = qm.QuarterMap(every=options.every, exclude_stages=())
    try:
        bundle = qm.compile_module(result["_model"], result["_inputs"], folder / "pruned", quartermap=plan)
    except (PassError, PlanError) as error:
        result["pruning_refused"] = _line(error)
        return
    result["pruned_parity"] = _parity(bundle)
    result["pruned_nodes"] = bundle.manifest["graph"]["nodes"]


def _time(model: PublicModel, result: dict[str, Any], folder: Path, options: argparse.Namespace) -> None:
    import torch

    import quartermap_deploy as qm

    if options.no_timing:
        return
    made, inputs, bundle = result["_model"], result["_inputs"], result["_bundle"]
    feeds = dict(zip((item.name for item in bundle.inputs), (v.numpy() for v in inputs), strict=True))
    with qm.public_code(made), torch.no_grad():
        calls: dict[str, Callable[[], Any]] = {
            "eager_ms": lambda: made(*inputs),
            "onnxruntime_ms": lambda: bundle.run(feeds),
        }
        result |= _fastest(calls)


def _fastest(calls: Mapping[str, Callable[[], Any]], rounds: int = 5) -> dict[str, float]:
    """The fastest of several runs of each, in milliseconds, run in turns."""
    best = dict.fromkeys(calls, math.inf)
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return {name: round(value, 1) for name, value in best.items()}


def enliven(model: Any) -> None:
    """Change what a scan reads, by its usual names, so that it matters: freshly initialised, it hardly does."""
    import torch

    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            name = path.rpartition(".")[2]
            normal = torch.randn(parameter.shape, generator=random)
            if name.startswith("A") and "log" in name:
                parameter.add_(0.3 * normal)
            elif name in ("D", "Ds", "D_b"):
                parameter.copy_(0.5 * normal)
            elif "dt_proj" in path and "bias" in name:
                steps = torch.exp(math.log(0.05) * torch.rand(parameter.shape, generator=random))
                parameter.copy_(steps + torch.log(-torch.expm1(-steps)))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:600]


# Printing -----------------------------------------------------------------------------------------------------------

COLUMNS = {
    "model": 30,
    "runs": 5,
    "exports": 8,
    "scans": 6,
    "2-D": 5,
    "parity": 9,
    "pruned": 9,
    "nodes": 6,
    "seconds": 8,
    "eager": 7,
    "ORT": 7,
}
"""The columns of the table and their widths."""


def _cells(result: dict[str, Any]) -> dict[str, str]:
    """A result as cells of the table."""

    def number(key: str, form: str) -> str:
        return format(result[key], form) if result.get(key) is not None else "–"

    return {
        "model": result["model"],
        "runs": "yes" if result.get("runs") else "no",
        "exports": "yes" if "nodes" in result else "no",
        "scans": number("scans", "d"),
        "2-D": number("two_dimensional", "d"),
        "parity": number("parity", ".1e"),
        "pruned": "refused" if "pruning_refused" in result else number("pruned_parity", ".1e"),
        "nodes": number("nodes", "d"),
        "seconds": number("seconds", ".0f"),
        "eager": number("eager_ms", ".0f"),
        "ORT": number("onnxruntime_ms", ".0f"),
    }


def _as_text(result: dict[str, Any], first: bool) -> str:
    """A result as a line of the table, with the header before the first, and reasons below."""
    cells = _cells(result)
    rows = [{name: name for name in COLUMNS}] if first else []
    lines = [
        " ".join(f"{row[name]:<{width}}" for name, width in COLUMNS.items()).rstrip()
        for row in [*rows, cells]
    ]
    return "\n".join([*lines, *(f"    {reason}" for reason in _reasons(result))])


def _as_markdown(results: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *(list(_cells(result).values()) for result in results)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _reasons(result: dict[str, Any]) -> Iterator[str]:
    if "error" in result:
        yield result["error"]
    for reason, count in result.get("why_not", {}).items():
        yield f"{count} × one-dimensional: {reason}"
    if "pruning_refused" in result:
        yield f"not pruned: {result['pruning_refused']}"


if __name__ == "__main__":
    sys.exit(main())
