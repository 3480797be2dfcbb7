"""Time whole models on a GPU, with our kernel and with the public kernels, in one run: a table, and JSON with --json.

    python benchmarks/gpu/models.py [--library LIB] [--models NAME ...] [--batches N ...] [--json FILE]

Each model runs in PyTorch, in float16, in four forms, of which every call is captured in a CUDA graph and all run in
turns:

    ours         our operator, with our kernel
    ours k=3     the same, pruned: every third block
    public       cross-scan, the selective scan of mamba-ssm, cross-merge, where mamba-ssm is installed
    public k=3   the same, pruned

Before anything is timed, the logits of each form are compared with those of the model in float64, whose scan is the
PyTorch code; if one departs by more than the package's tolerance for float16, the program ends with code 1 and no time.
Weights are newly initialised, and the skip connection of the scan is zero, so that the logits depend on what the scans
compute.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from public_path import Scan, find_public_scan, with_public_scan
from timing import eager_milliseconds, find_library, machine, refuse, require_gpu, times
from torch import Tensor

import quartermap_deploy as qm
from quartermap_deploy.architectures.base import VisualStateSpaceModel
from quartermap_deploy.errors import QuartermapError
from quartermap_deploy.evaluation.tome import merge_tokens
from quartermap_deploy.scan.cuda import enable_cuda_kernels
from quartermap_deploy.validation.tolerances import tolerance_for

MODELS = ("vmamba_tiny_s1l8", "vmamba_base_s2l15")
BATCHES = (1, 8, 128)
EVERY = 3
PLAN = qm.QuarterMap(every=EVERY)
FORMS = ("ours", f"ours k={EVERY}", "public", f"public k={EVERY}")
RATIOS = {
    "public / ours": ("public", "ours"),
    f"public k={EVERY} / ours k={EVERY}": (f"public k={EVERY}", f"ours k={EVERY}"),
    f"ours / ours k={EVERY}": ("ours", f"ours k={EVERY}"),
}
CHECKED_IMAGES = 2
OTHER_FORMS = ("ours k=2", f"ours ToMe k={EVERY}", "public eager", "ours eager")
"""What `benchmark_others` times: the paper's other variants, and both kernels without CUDA graphs."""


def make_model(name: str, device: str, dtype: torch.dtype) -> VisualStateSpaceModel:
    """Return a newly initialised model whose logits depend on its scans.

    Args:
        name: of the model.
        device: where it is to lie.
        dtype: of its weights; those that the scan takes in float32 stay so.
    """
    torch.manual_seed(0)
    model = qm.create_model(name)
    for block in model.blocks():
        torch.nn.init.zeros_(block.mixer.Ds)
    kept = [
        (parameter, parameter.detach().clone())
        for block in model.blocks()
        for parameter in (block.mixer.A_logs, block.mixer.Ds, block.mixer.dt_projs_bias)
    ]
    model.to(dtype)
    for parameter, value in kept:
        parameter.data = value
    return model.to(device).requires_grad_(False)


def make_forms(
    model: VisualStateSpaceModel, images: Tensor, public: Scan | None
) -> dict[str, Callable[[], Tensor]]:
    """Return a call for each form; the public ones are missing where there are no public kernels.

    Args:
        model: of the element type that is timed.
        images: (batch, 3, H, W), of the same type and device.
        public: mamba-ssm's scan, or None.
    """
    calls = {FORMS[0]: with_frozen(model, images), FORMS[1]: with_frozen(qm.prune(model, PLAN), images)}
    if public is not None:
        calls[FORMS[2]] = with_public_scan(calls[FORMS[0]], public)
        calls[FORMS[3]] = with_public_scan(calls[FORMS[1]], public)
    return calls


def errors(
    model: VisualStateSpaceModel, images: Tensor, calls: Mapping[str, Callable[[], Tensor]]
) -> dict[str, float]:
    """Return how far the logits of each form lie from those of the model in float64, as a share of the largest.

    Args:
        model: as in `make_forms`.
        images: as there.
        calls: what `make_forms` returned for them.
    """
    exact = copy.deepcopy(model)
    exact.unfreeze()
    exact = exact.double()
    pruned = qm.prune(exact, PLAN)
    with torch.no_grad():
        expected = {False: exact(images.double()), True: pruned(images.double())}
    found = {}
    for name, call in calls.items():
        wanted = expected[name in (FORMS[1], FORMS[3])]
        error = float((call().double() - wanted).abs().max() / wanted.abs().max())
        # A comparison with NaN is false, so that none passes.
        found[name] = error if error >= 0 else float("inf")
    return found


def require_parity(found: Mapping[str, float], tolerance: float) -> None:
    """End the program with code 1 if a form is wrong."""
    wrong = {name: error for name, error in found.items() if not error <= tolerance}
    if wrong:
        words = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
        raise SystemExit(
            f"FAILED: departs from the model in float64: {words} of the largest logit, tolerance {tolerance:.0e}; "
            "nothing was timed"
        )


def make_row(model: str, batch: int, microseconds: Mapping[str, float | None]) -> dict[str, Any]:
    """Return the results of one model and batch; None where there is no time.

    Args:
        model: its name.
        batch: images.
        microseconds: of each form that was run; None for one that did not fit the GPU's memory.
    """
    milliseconds = {name: None if (time := microseconds.get(name)) is None else time / 1e3 for name in FORMS}
    return {
        "model": model,
        "batch": batch,
        "milliseconds": milliseconds,
        "images_per_second": {
            name: None if time is None else batch / time * 1e3 for name, time in milliseconds.items()
        },
        "ratios": {label: _ratio(milliseconds[a], milliseconds[b]) for label, (a, b) in RATIOS.items()},
    }


def _ratio(slow: float | None, fast: float | None) -> float | None:
    return None if slow is None or fast is None else slow / fast


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of docs/performance.md."""
    heads = ["model", "batch", *(f"{name}, ms" for name in FORMS), *RATIOS]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        cells = [row["model"], str(row["batch"])]
        cells += [_cell(row["milliseconds"][name], ".3f") for name in FORMS]
        cells += [_cell(row["ratios"][label], ".2f") for label in RATIOS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def benchmark(name: str, batches: Sequence[int], rounds: int, public: Scan | None) -> dict[str, Any]:
    """Check one model, and time it with every batch."""
    side = qm.load_card(name).preprocessing.crop
    model = make_model(name, "cuda", torch.float16)
    generator = torch.Generator("cuda").manual_seed(0)

    def images(batch: int) -> Tensor:
        return torch.randn(batch, 3, *side, generator=generator, device="cuda").half()

    checked = images(CHECKED_IMAGES)
    found = errors(model, checked, make_forms(model, checked, public))
    require_parity(found, tolerance_for("float16").relative)
    rows = []
    for batch in batches:
        print(f"timing {name}, batch {batch}", flush=True)
        rows.append(make_row(name, batch, times(make_forms(model, images(batch), public), rounds)))
        torch.cuda.empty_cache()
    return {"model": name, "errors": found, "timings": rows}


def benchmark_others(name: str, batch: int, rounds: int, public: Scan | None) -> dict[str, Any]:
    """Time the forms of `OTHER_FORMS` of one model, in turns with the model itself.

    Args:
        name: of the model.
        batch: images.
        rounds: how often.
        public: mamba-ssm's scan, or None, which leaves out its form.

    Returns:
        The milliseconds of each, None for what did not fit the memory; and why forms failed.
    """
    side = qm.load_card(name).preprocessing.crop
    model = make_model(name, "cuda", torch.float16)
    generator = torch.Generator("cuda").manual_seed(0)
    images = torch.randn(batch, 3, *side, generator=generator, device="cuda").half()
    ours = make_forms(model, images, public)
    half = with_frozen(qm.prune(model, qm.QuarterMap(every=2)), images)
    merged = with_frozen(merge_tokens(model, PLAN), images)
    eager = {OTHER_FORMS[3]: ours[FORMS[0]]} | (
        {OTHER_FORMS[2]: ours[FORMS[2]]} if public is not None else {}
    )
    found: dict[str, float | None] = {}
    failed: dict[str, str] = {}
    for label, call in {OTHER_FORMS[0]: half, OTHER_FORMS[1]: merged}.items():
        try:
            timed = times({FORMS[0]: ours[FORMS[0]], label: call}, rounds)
            found |= {each: None if time is None else time / 1e3 for each, time in timed.items()}
        except RuntimeError as error:  # what a CUDA graph cannot hold
            failed[label] = str(error)[:300]
    for label, call in eager.items():
        found[label] = eager_milliseconds(call, rounds)
    return {"model": name, "batch": batch, "milliseconds": found, "failed": failed}


def with_frozen(model: VisualStateSpaceModel, images: Tensor) -> Callable[[], Tensor]:
    """Return a call of a model whose constants are computed once."""
    model.freeze()

    def run() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(images)
            return logits

    return run


def positive(text: str) -> int:
    """Read a whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
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
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help="models to time")
    parser.add_argument(
        "--batches", nargs="+", type=positive, default=list(BATCHES), metavar="N", help="images at a time"
    )
    parser.add_argument(
        "--rounds", type=positive, default=15, help="rounds that are timed (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    return parser


def main() -> None:
    """Check, time, print."""
    options = make_parser().parse_args()
    known = qm.list_models()
    if unknown := [name for name in options.models if name not in known]:
        refuse(f"unknown model {', '.join(unknown)}; expected some of {', '.join(known)}")
    require_gpu()
    public = find_public_scan()
    if public is None:
        print("mamba-ssm is not installed: the public kernels are left out")
    with tempfile.TemporaryDirectory() as folder:
        try:
            enable_cuda_kernels(find_library(options.built, Path(folder)))
        except QuartermapError as error:
            refuse(str(error))
        results = [benchmark(name, options.batches, options.rounds, public) for name in options.models]
    print(markdown([row for result in results for row in result["timings"]]))
    if options.json is not None:
        described = {"machine": machine(public is not None), "results": results}
        options.json.write_text(json.dumps(described, indent=2) + "\n")


if __name__ == "__main__":
    main()
